"""A sample of the sweep: architectures whose counts their definitions tell, as torch exports them and as ONNX.

`make sweep` looks at all families of torchvision and timm; these are small, and unlike each other and the models of
tests/test_detect_models.py.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from benchmarks import sweep, sweep_table
from benchmarks.sweep_expected import EXPECTED

BOTH = (
    "timm:dla46_c",  # trees: roots that concatenate, a pool as shortcut
    "timm:ese_vovnet19b_slim",  # one-shot aggregation
    "timm:fasternet_t0",  # a convolution of a part of the channels
    "timm:lcnetv2_small",  # branches of several kernels
    "timm:selecsls42b",  # concatenations of a chain
    "timm:starnet_s050",  # products in the branch
)
TORCH_ONLY = (  # whose export takes long; `make sweep` compares them too
    "timm:dpn48b",  # a sum and a concatenation in one block
    "timm:crossvit_tiny_240",  # cross-attention of two streams, a class token alone as the skip
    "timm:ghostnet_050",  # separable projections
    "timm:mobilevit_xxs",  # transformers inside convolutions
)


@pytest.mark.parametrize(("key", "irs"), [*((key, sweep.IRS) for key in BOTH), *((key, ("fx",)) for key in TORCH_ONLY)])
def test_counts_are_those_of_the_definition(key: str, irs: tuple[str, ...]) -> None:
    source, _, name = key.partition(":")
    logging.disable(logging.WARNING)
    try:
        record = sweep.check(source, name, irs)
    finally:
        logging.disable(logging.NOTSET)
    assert key in EXPECTED
    assert sweep_table.verdict(record) == "ok", record
    assert sweep_table.agreement(record) == ("same" if irs == sweep.IRS else ""), record
    assert not sweep_table.crashed(record)


def test_every_module_of_timm_is_in_the_sweep() -> None:
    timm = pytest.importorskip("timm")
    names = set(sweep.find_source("timm").names())
    missing = [module for module in timm.list_modules() if names.isdisjoint(timm.list_models(module=module))]
    assert missing == []


def test_expectations_are_of_models_that_the_sweep_looks_at() -> None:
    known = {f"{source}:{name}" for source in ("torchvision", "timm") for name in sweep.find_source(source).names()}
    assert sorted(key for key in EXPECTED.keys() - known if not key.startswith("transformers:")) == []


def test_a_model_that_the_definition_contradicts_is_said_to_be_bad() -> None:
    found = {"kinds": {"add": 2}, "shortcuts": {"identity": 2}}
    record = {"source": "timm", "name": "starnet_s050", "fx": found, "onnx": found}
    assert sweep_table.verdict(record).startswith("BAD: fx 2 identity, not 6")
    assert sweep_table.agreement(record) == "same"
    assert sweep_table.agreement({**record, "onnx": {"kinds": {}, "shortcuts": {}}}) == "differ"


def test_models_that_differ_in_size_alone_have_one_structure() -> None:
    pytest.importorskip("timm")
    structure = sweep.find_source("timm").structure
    assert structure("resnet18") == structure("resnet34")
    assert len({structure(name) for name in ("resnet18", "resnet50", "seresnet50", "resnet50d")}) == 4


def test_whole_names_come_before_parts_of_names() -> None:
    offered = [("timm", "vit"), ("timm", "crossvit"), ("timm", "resnet18"), ("timm", "resnet50")]
    assert sweep.choose(offered, ["resnet", "vit"]) == [offered[2], offered[3], offered[0]]
    assert sweep.choose(offered, ["*vit"]) == offered[:2]


def test_an_export_that_took_too_long_does_not_hide_what_was_found_before(tmp_path: Path) -> None:
    found = {"kinds": {"add": 2}, "shortcuts": {"identity": 2}, "not_residual": {}, "norms": {}, "nested": 0}
    records = [
        {"source": "timm", "name": "a", "fx": found},
        {"source": "timm", "name": "a", "export": "over 60 s"},
        {"source": "timm", "name": "b", "twin": "a"},
        {"source": "timm", "name": "b", "fx": found},
    ]
    log = tmp_path / "records.jsonl"
    log.write_text("\n".join(map(json.dumps, records)))
    known = sweep.read_records([log])
    assert known["timm", "a"]["fx"] == found
    assert known["timm", "a"]["onnx"] == {"stage": "export", "error": "over 60 s"}
    assert "export" not in known["timm", "a"]
    assert "twin" not in known["timm", "b"]
