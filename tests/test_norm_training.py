"""What moving norms is for: gradients by depth at initialisation, and a deep Transformer that trains on real text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples import norm_placement
from examples.characters import text, unigram_entropy
from examples.depth_law import Law, measure, slope


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small are slower on more threads, and sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DEPTHS = (6, 12, 24)


@pytest.fixture(scope="module")
def law() -> Law:
    return measure(DEPTHS)


def test_gradient_of_the_last_layer_is_flat_in_the_number_of_layers_behind_norms(law: Law) -> None:
    """Xiong et al. 2020, theorem 1: O(1) in L; the mean of 16 draws leaves some noise."""
    assert tuple(law.post) == DEPTHS
    assert abs(slope(law.post)) < 0.1


def test_gradient_of_the_last_layer_shrinks_as_one_over_the_root_of_the_layers_once_converted(law: Law) -> None:
    assert slope(law.pre) == pytest.approx(-0.5, abs=0.1)
    assert law.pre[24] < 0.35 * law.post[24]


def test_the_converted_stream_grows_between_the_bounds(law: Law) -> None:
    """Lemma 2: (1 + l/2)·d ≤ E‖x_l‖² ≤ (1 + 3l/2)·d; 5 % for the mean of 16 draws."""
    assert law.stream[0] == pytest.approx(1.0, rel=1e-3)
    assert len(law.stream) == 25
    for layer, square in enumerate(law.stream):
        assert 0.95 * (1 + layer / 2) <= square <= 1.05 * (1 + 3 * layer / 2)


def test_post_norm_model_stays_at_the_unigram_entropy_and_the_converted_one_leaves_it(tmp_path: Path) -> None:
    """Fixed seeds; deeper and longer the losses were 3.24 to 3.25 and 2.68 to 2.83; the entropy is 3.23."""
    result = norm_placement.convert(depth=8, width=32)
    assert len(result.applied) == 16
    assert result.refused == []
    assert all("changes the function" in rewrite.reason for rewrite in result.applied)
    entropy = unigram_entropy()
    outcomes = norm_placement.compare(result, depth=8, width=32, steps=40, rate=4e-3, warm_up=0)
    stuck, trained = outcomes["post-norm"], outcomes["converted to pre-norm"]
    assert len(stuck.curve) == len(trained.curve) == 40
    assert stuck.loss >= entropy
    assert trained.loss < entropy - 0.2
    gradients = result.compare_gradients([norm_placement.tokens()])
    assert gradients.placements == (("post", "pre"),) * 16
    law = Law({6: 1.0, 12: 1.0}, {6: 0.5, 12: 0.35}, [1.0, 2.0])
    norm_placement.draw(outcomes, entropy, gradients, law, tmp_path / "new" / "norms.svg")
    assert (tmp_path / "new" / "norms.svg").stat().st_size > 1000


def test_the_models_of_a_comparison_start_from_the_same_weights() -> None:
    one, other = norm_placement.untrained(2), norm_placement.untrained(2)
    converted = norm_placement.convert(2).model.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert torch.equal(tensor, converted[name])


def test_the_text_is_what_python_carries() -> None:
    assert len(text().tokens) > 300_000
    assert 60 < text().vocabulary < 200
    assert 2.5 < unigram_entropy() < 4.0
