"""NVIDIA GPUs: targets, kernels, schedules for everything else, cubins, artifacts. No GPU is needed to compile."""
