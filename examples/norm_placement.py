"""A deep post-norm Transformer does not train without warm-up, and trains once converted to pre-norm.

`python -m examples.norm_placement`: 18 layers on the characters of Python's own documentation; same weights at the
start, same batches, same optimiser. The picture has the losses, the gradient by depth before training, and what the
number of layers does to both placements at initialisation (Xiong et al. 2020; `examples/depth_law.py`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import rescompile as rc
from examples.characters import BATCH, CONTEXT, RATE, CharacterModel, fit, text, unigram_entropy
from examples.depth_law import DEPTHS, Law, measure, slope
from examples.training import smoothed
from rescompile.gradient_comparison import GradientComparison
from rescompile.rewriting import Result

PASS = "pre-norm"


@dataclass
class Outcome:
    """Training losses by step, and the cross-entropy in nats per character at the end."""

    curve: list[float]
    loss: float


def post_norm() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The model and its input: `rescompile rewrite examples.norm_placement:post_norm -o pre.pt2 --pass pre-norm`."""
    return untrained(18), (tokens(),)


def untrained(depth: int, width: int = 64, seed: int = 0) -> CharacterModel:
    """The post-norm model at the weights that every network here starts from."""
    torch.manual_seed(seed)
    return CharacterModel(depth, width)


def tokens() -> torch.Tensor:
    """An input of the model."""
    return text().batch(torch.Generator().manual_seed(0))[0]


def convert(depth: int, width: int = 64, seed: int = 0) -> Result:
    """The rewrite of the same model with the same weights."""
    return rc.rewrite(untrained(depth, width, seed), PASS, (torch.zeros(BATCH, CONTEXT, dtype=torch.long),))


def compare(
    result: Result,
    depth: int = 18,
    steps: int = 400,
    width: int = 64,
    rate: float = RATE,
    seed: int = 0,
    warm_up: int = 0,
) -> dict[str, Outcome]:
    """The post-norm model and the converted one; with `warm_up`, the post-norm model with so many steps of it too."""
    runs: dict[str, tuple[nn.Module, int]] = {"post-norm": (untrained(depth, width, seed), 0)}
    if warm_up:
        runs[f"post-norm, {warm_up} steps of warm-up"] = (untrained(depth, width, seed), warm_up)
    runs["converted to pre-norm"] = (result.model, 0)
    outcomes = {}
    for name, (model, slowly) in runs.items():
        curve: list[float] = []
        loss = fit(model, lambda _, loss, curve=curve: curve.append(loss), steps, rate, seed, slowly)
        outcomes[name] = Outcome(curve, loss)
    return outcomes


def draw(outcomes: dict[str, Outcome], entropy: float, gradients: GradientComparison, law: Law, path: Path) -> None:
    """Four panels: losses, gradient by depth, the last layer's gradient against L, the stream against its bounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (losses, depths), (last, stream) = figure.subplots(2, 2)
    for name, outcome in outcomes.items():
        losses.plot(*smoothed(outcome.curve), label=name)
    losses.axhline(entropy, color="black", linestyle=":", label="unigram entropy")
    losses.set(xlabel="step", ylabel="nats per character", title="Training loss")
    for name, flow in (("post-norm", gradients.before), ("converted to pre-norm", gradients.after)):
        norms = [block.parameter_gradient or 0.0 for block in flow]
        depths.plot(range(len(norms)), norms, marker=".", label=name)
    depths.set(xlabel="block", ylabel="‖∂L/∂θ‖ of the branch", title="Gradient by depth, before training", yscale="log")
    for name, heights in (("post-norm", law.post), ("converted to pre-norm", law.pre)):
        last.plot(list(heights), list(heights.values()), marker="o", label=f"{name}: slope {slope(heights):.2f}")
    last.set(xlabel="layers L", ylabel="‖∂L/∂W₂‖ of the last layer", title="Xiong et al. 2020, theorem 1")
    last.set(xscale="log", yscale="log", xticks=list(law.post), xticklabels=list(map(str, law.post)))
    last.minorticks_off()
    layers = range(len(law.stream))
    stream.plot(layers, law.stream, color="C1", label="converted to pre-norm")
    stream.fill_between(layers, [1 + n / 2 for n in layers], [1 + 3 * n / 2 for n in layers], alpha=0.2, label="bounds")
    stream.set(xlabel="layer l", ylabel="E‖x_l‖² / d", title="Xiong et al. 2020, lemma 2")
    for axes in (losses, depths, last, stream):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--warm-up", type=int, default=0, help="train the post-norm model with warm-up too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # operations this small are slower on more
    result = convert(options.depth)
    first = result.applied[0]
    print(f"{len(result.applied)} rewrites; {first.pass_name}: {first.equation} ({first.reason})")
    print(result.verification)
    gradients = result.compare_gradients([tokens()])
    print(str(gradients).partition("\n")[0])
    print(*str(gradients).splitlines()[-5:], sep="\n")
    entropy = unigram_entropy()
    outcomes = compare(result, options.depth, options.steps, warm_up=options.warm_up)
    print(f"{options.steps} steps by Adam, nats per character (unigram entropy {entropy:.4f})")
    for name, outcome in outcomes.items():
        print(f"  {name:<34} {outcome.loss:.4f}")
    law = measure(DEPTHS)
    print(f"{'‖∂L/∂W₂‖ of the last layer, L =':<36}" + "".join(f"{depth:>7}" for depth in law.post) + "   slope")
    for name, heights in (("post-norm", law.post), ("converted to pre-norm", law.pre)):
        row = "".join(f"{height:>7.2f}" for height in heights.values())
        print(f"  {name:<34}{row}   {slope(heights):+.2f}")
    path = options.out / "norm_placement.svg"
    draw(outcomes, entropy, gradients, law, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
