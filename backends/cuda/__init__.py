"""NVIDIA GPUs: targets, own kernels, schedules for everything else, cubins, artifacts. Compiling needs no GPU."""
