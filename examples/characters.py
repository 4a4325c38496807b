"""A language model of characters, on the documentation that Python carries with it, and how it is trained.

The text is `pydoc_data.topics`, what `help("topics")` prints: some 465,000 characters, about 100 different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 16
CONTEXT = 64
RATE = 1e-3
SCORED = 32  # batches that a model is scored on


@dataclass(frozen=True)
class Text:
    """The characters as numbers, and how many different ones there are."""

    tokens: Tensor
    vocabulary: int

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [B, T] from random places, and the character behind each of them, [B, T]."""
        starts = torch.randint(len(self.tokens) - CONTEXT, (BATCH, 1), generator=generator)
        window = self.tokens[starts + torch.arange(CONTEXT + 1)]
        return window[:, :-1], window[:, 1:]


@cache
def text() -> Text:
    """All topics in the order of their names."""
    whole = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    numbers = {character: number for number, character in enumerate(sorted(set(whole)))}
    return Text(torch.tensor([numbers[character] for character in whole]), len(numbers))


class CharacterModel(nn.Module):
    """Embeddings, `depth` post-norm Transformer layers that see no later character, scores: [B, T] to [B, T, V]."""

    def __init__(self, depth: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(text().vocabulary, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, text().vocabulary)
        # The encoder's layers are copies of one: each gets weights of its own.
        for parameter in self.body.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
        self.register_buffer("places", torch.arange(CONTEXT))

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.token(tokens) + self.place(self.places)
        scores: Tensor = self.head(self.body(stream, mask=self.mask, is_causal=True))
        return scores


def fit(
    model: nn.Module,
    report: Callable[[int, float], None],
    steps: int,
    rate: float = RATE,
    seed: int = 0,
    warm_up: int = 0,
) -> float:
    """Train for `steps` batches by Adam, the rate reached in equal steps over the first `warm_up` of them; no clipping.

    `report(step, loss)` is called after each; the result is that of `score`. The batches depend on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / max(warm_up, 1))
        tokens, following = text().batch(generator)
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        report(step, loss.item())
    return score(model)


def score(model: nn.Module) -> float:
    """Cross-entropy in nats per character, on the same places of the text for every model; evaluation mode."""
    generator = torch.Generator().manual_seed(-1)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for _ in range(SCORED):
            tokens, following = text().batch(generator)
            total += functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten()).item()
    return total / SCORED


def unigram_entropy() -> float:
    """Of the characters that `score` asks for: no model that ignores what stands before them gets below it."""
    generator = torch.Generator().manual_seed(-1)
    counts = sum(text().batch(generator)[1].flatten().bincount(minlength=text().vocabulary) for _ in range(SCORED))
    shares = torch.as_tensor(counts).double() / (SCORED * BATCH * CONTEXT)
    return -sum(share * math.log(share) for share in shares.tolist() if share)
