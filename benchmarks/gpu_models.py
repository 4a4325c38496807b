"""Whole models on a GPU: programs of ours beside torch eager, inductor with CUDA graphs and ONNX Runtime.

    python -m benchmarks.gpu_models SET OUT.jsonl [--inductor] [--seconds N] [--only NAME]

A program comes from the set, without weights: these are drawn on the device with the mean and deviation of the ones it
was compiled with, so its time is that of the model and its outputs are only checked to be finite. Where TVM is
installed too, the model is compiled here instead, candidates measured, and its outputs are compared with torch's in
float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_kernels import read_lines
from benchmarks.gpu_set import Set, load_runtime
from rescompile.errors import RescompileError

ROUNDS, LOOP_SECONDS = 9, 0.05
DRAWN = "weights.json"
WEIGHTS = "weights.safetensors"
_VERBATIM = 64  # elements up to which a weight is kept as it is: scalars, tables of positions
_TOLERANCE = {"float16": 2e-2, "bfloat16": 8e-2}

# ---- the models ------------------------------------------------------------------------------------------------


def models() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...], str]]]:
    """Builders of (module, inputs, dtype), on the processor, by name; the most telling first."""
    vision = {
        f"{name} b{batch}": _vision(name, batch)
        for name, batches in (("resnet50", (32, 1, 128)), ("convnext_tiny", (1,)), ("vit_b_16", (1, 32)))
        for batch in batches
    }
    language = {"bert_base b1": _bert(1), "bert_base b32": _bert(32), "gpt2 b1": _gpt2, "llama 12 layers": _llama}
    order = ["resnet50 b32", "bert_base b32", "llama 12 layers", "vit_b_16 b1", "resnet50 b1", "bert_base b1"]
    every = {**vision, **language}
    return {name: every[name] for name in [*order, *(name for name in every if name not in order)]}


def _vision(name: str, batch: int) -> Callable[[], tuple[Any, tuple[Any, ...], str]]:
    def build() -> tuple[Any, tuple[Any, ...], str]:
        import torch

        from benchmarks.corpus import import_torchvision, vary_norms

        torch.manual_seed(0)
        model = import_torchvision().models.get_model(name, weights=None)
        vary_norms(model)
        return model.eval().half(), (torch.randn(batch, 3, 224, 224).half(),), "float16"

    return build


def _bert(batch: int) -> Callable[[], tuple[Any, tuple[Any, ...], str]]:
    def build() -> tuple[Any, tuple[Any, ...], str]:
        import torch

        from benchmarks.corpus import LastHidden, import_torchvision, vary_norms

        import_torchvision()  # transformers imports it
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        model = BertModel(BertConfig(), add_pooling_layer=False)
        vary_norms(model)
        return LastHidden(model).eval().half(), (torch.randint(0, 30522, (batch, 128)),), "float16"

    return build


def _gpt2() -> tuple[Any, tuple[Any, ...], str]:
    import torch

    from benchmarks.corpus import LastHidden, import_torchvision, vary_norms

    import_torchvision()
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(use_cache=False, attn_implementation="eager"))
    vary_norms(model)
    return LastHidden(model).eval().half(), (torch.randint(0, 50257, (1, 128)),), "float16"


def _llama() -> tuple[Any, tuple[Any, ...], str]:
    import torch

    torch.manual_seed(0)
    return llama_stack(12, 2048, 5632, 16).eval().bfloat16(), (torch.randn(1, 2048, 2048).bfloat16(),), "bfloat16"


def llama_stack(layers: int, width: int, inner: int, heads: int) -> Any:
    """Pre-norm blocks: x + attention(RMSNorm(x)), x + down(silu(gate(n))·up(n)), rotary embedding left out."""
    import torch
    from torch import nn
    from torch.nn import functional as f

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before_attention, self.before_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
            self.down = nn.Linear(inner, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            packed = self.qkv(self.before_attention(x)).view(batch, length, 3, heads, width // heads)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = f.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
            normed = self.before_mlp(x)
            return x + self.down(f.silu(self.gate(normed)) * self.up(normed))

    return nn.Sequential(*(Block() for _ in range(layers)), nn.RMSNorm(width, eps=1e-5))


# ---- packing, with TVM -----------------------------------------------------------------------------------------


def pack_models(folder: Path, names: str, arch: str) -> None:
    """Compile models (with commas, or `all`) into the set's folder, without weights, and name them in its index."""
    from benchmarks.gpu_set import INDEX

    known = models()
    wanted = list(known) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise RescompileError(f"There is no model '{unknown[0]}': choose from {', '.join(known)}.")
    index = folder / INDEX
    for name in wanted:
        began = time.monotonic()
        program = compiled(*known[name](), arch=arch, measure=False)
        file = f"{name.replace(' ', '_')}.zip"
        with tempfile.TemporaryDirectory() as place:
            program.save(Path(place) / "whole.zip")
            without_weights(Path(place) / "whole.zip", folder / file)
        data = json.loads(index.read_text(encoding="utf-8"))
        data["models"] = [model for model in data["models"] if model["name"] != name]
        data["models"].append({"name": name, "file": file, "regions": len(program.explain())})
        index.write_text(json.dumps(data, indent=1), encoding="utf-8")
        print(f"{name}: {(folder / file).stat().st_size / 2**20:.1f} MiB, {time.monotonic() - began:.0f} s", flush=True)


def compiled(module: Any, inputs: tuple[Any, ...], _: str, *, arch: str, measure: bool) -> Any:
    """The model fused and compiled; torch's libraries are candidates, as torch is there where it will run."""
    import rescompile as rc

    graph = rc.capture(module, inputs)
    fused = rc.rewrite(graph, ["fuse"], verify=False)
    target = {"kind": "cuda", "arch": arch.rstrip("a"), "libs": ["torch"]}
    return rc.compile(fused.model, inputs, target=target if not measure else f"cuda:{arch.rstrip('a')}")


def without_weights(whole: Path, path: Path) -> None:
    """An artifact with the shapes, means and deviations of its weights in their place."""
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if name.startswith("sources/"):
                continue
            if name != WEIGHTS:
                target.writestr(name, source.read(name))
                continue
            target.writestr(DRAWN, json.dumps(described(source.read(name))))


def described(data: bytes) -> list[dict[str, Any]]:
    """Name, dtype, shape, mean and deviation of each tensor of a safetensors file; small ones and integers in full."""
    import numpy as np

    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    found = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + size + place for place in info["data_offsets"])
        entry = {"name": name, "dtype": info["dtype"], "shape": info["shape"]}
        values = _floats(data[first:last], info["dtype"])
        if values is None or values.size <= _VERBATIM:
            found.append({**entry, "hex": data[first:last].hex()})
        else:
            wide = values.astype(np.float64)
            found.append({**entry, "mean": float(wide.mean()), "deviation": float(wide.std())})
    return found


def _floats(data: bytes, dtype: str) -> Any:
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}.get(dtype)
    return None if kind is None else np.frombuffer(data, kind)


# ---- running ---------------------------------------------------------------------------------------------------


def with_weights(stripped: Path, path: Path, draw: Callable[[str, Sequence[int], int, float, float], bytes]) -> Path:
    """The artifact whole again: what `described` left out is drawn by `draw(dtype, shape, seed, mean, deviation)`."""
    with zipfile.ZipFile(stripped) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if name != DRAWN:
                target.writestr(name, source.read(name))
                continue
            header: dict[str, Any] = {}
            parts, place = [], 0
            for seed, entry in enumerate(json.loads(source.read(name))):
                known = entry.get("hex")
                shape, dtype = entry["shape"], entry["dtype"]
                part = (
                    draw(dtype, shape, seed, entry["mean"], entry["deviation"])
                    if known is None
                    else bytes.fromhex(known)
                )
                header[entry["name"]] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(part)]}
                parts.append(part)
                place += len(part)
            said = json.dumps(header).encode()
            said += b" " * (-len(said) % 8)
            with target.open(WEIGHTS, "w", force_zip64=True) as file:
                file.write(struct.pack("<Q", len(said)) + said)
                for part in parts:
                    file.write(part)
    return path


def drawn_on_the_device(dtype: str, shape: Sequence[int], seed: int, mean: float, deviation: float) -> bytes:
    """Normally distributed values as bytes."""
    import torch

    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device=where).manual_seed(seed)
    values = torch.randn(*shape, generator=random, device=where) * deviation + mean
    return values.to(kind).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def main(given: Sequence[str] | None = None) -> None:
    """Measure the models that OUT does not name yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inductor", action="store_true", help="time inductor beside ours, and nothing else")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no model after so many seconds")
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args(given)
    opened = Set.open(options.set)
    load_runtime(options.set)
    deadline = time.monotonic() + options.seconds
    known = {line["name"] for line in read_lines(options.out)}
    with options.out.open("a", encoding="utf-8") as file:
        for model in opened.models:
            name = model["name"]
            if name in known or options.only not in name or time.monotonic() > deadline:
                continue
            for line in ({"begun": True}, measured(opened, model, inductor=options.inductor)):
                file.write(json.dumps({"name": name, **line}) + "\n")
                file.flush()


def measured(opened: Set, model: Mapping[str, Any], *, inductor: bool) -> dict[str, Any]:
    """One model: milliseconds of a call by runtime, what failed, and how far our outputs are from torch's."""
    import torch

    began = time.monotonic()
    module, inputs, dtype = models()[model["name"]]()
    failures: dict[str, str] = {}
    line: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        arguments = tuple(value.cuda() for value in inputs)
        try:
            program, exact = _program(opened, model, module, inputs, dtype)
            out = program(*arguments)
            torch.cuda.synchronize()
            line["finite"] = bool(_first(out).isfinite().all())
            calls["rescompile"] = lambda: program(*arguments)
        except (RescompileError, RuntimeError, OSError) as error:
            failures["rescompile"] = _last_line(error)
            out, exact = None, False
        module = module.cuda()
        if arguments[0].ndim == 4:
            module = module.to(memory_format=torch.channels_last)
        if exact and out is not None:
            line["error"] = _error(module, arguments, out)
            if not line["error"] <= _TOLERANCE[dtype]:
                failures["rescompile"] = f"its outputs differ by {line['error']:.1e} from torch's in float32"
        rivals = {"inductor max-autotune": _inductor} if inductor else {"torch eager": _eager, "ONNX Runtime": _onnx}
        for name, make in rivals.items():
            try:
                calls[name] = make(module, arguments)
                for _ in range(3):
                    calls[name]()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 what a rival raises is its own
                calls.pop(name, None)
                failures[name] = _last_line(error)
        times = interleaved(calls)
    return {**line, "milliseconds": times, "failures": failures, "took": round(time.monotonic() - began, 1)}


def _program(opened: Set, model: Mapping[str, Any], module: Any, inputs: Any, dtype: str) -> tuple[Any, bool]:
    """The program, and whether it has the module's own weights."""
    if _tvm_is_whole():
        return compiled(module, inputs, dtype, arch=opened.arch, measure=True), True
    from rescompile.backends.program import Program

    with tempfile.TemporaryDirectory() as place:
        return Program.load(
            with_weights(opened.folder / model["file"], Path(place) / "p.zip", drawn_on_the_device)
        ), False


def _tvm_is_whole() -> bool:
    """Whether TVM's compiler is installed, and not its runtime alone."""
    found = importlib.util.find_spec("tvm")
    return found is not None and found.origin is not None


def interleaved(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of a call: loops of calls in turns, the device waited for at the end of each loop."""
    import torch

    counts = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        counts[name] = max(1, min(200, int(LOOP_SECONDS / (time.perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - start) / counts[name])
    return {name: median(found) * 1e3 for name, found in samples.items()}


def _eager(module: Any, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: module(*inputs)


def _inductor(module: Any, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """torch.compile, mode max-autotune: tuned products and CUDA graphs."""
    import torch

    torch._dynamo.reset()
    fast = torch.compile(module, mode="max-autotune", dynamic=False)
    return lambda: fast(*inputs)


def _onnx(module: Any, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """ONNX Runtime's CUDA provider, inputs and outputs staying on the device."""
    import onnxruntime
    import torch

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RescompileError("this ONNX Runtime has no CUDA provider")
    with tempfile.TemporaryDirectory() as place:
        path = str(Path(place) / "model.onnx")
        torch.onnx.export(module, inputs, path, dynamo=True)
        session = onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"])
    bound = session.io_binding()
    for described_, tensor in zip(session.get_inputs(), inputs, strict=True):
        kind = {"torch.float16": 10, "torch.bfloat16": 16, "torch.int64": 7}[str(tensor.dtype)]
        bound.bind_input(described_.name, "cuda", 0, kind, tuple(tensor.shape), tensor.contiguous().data_ptr())
    for output in session.get_outputs():
        bound.bind_output(output.name, "cuda")
    return lambda: session.run_with_iobinding(bound)


def _error(module: Any, inputs: tuple[Any, ...], out: Any) -> float:
    """max |ours − torch in float32| / max |torch in float32|"""
    import copy

    wide = copy.deepcopy(module).float()
    want = _first(wide(*(value.float() if value.is_floating_point() else value for value in inputs)))
    return float((_first(out).float() - want).abs().max() / want.abs().max())


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


if __name__ == "__main__":
    main()
