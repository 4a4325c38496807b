"""Arguments and options that several commands of the command line share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="file.onnx, file.pt2 or package.module:attribute")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="1x3x224x224, 2x16:int64 or Nx3x224x224; once for each input, where the model does not bring its own",
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="let torch run the code that a .pt2 file holds")]
Json = Annotated[bool, typer.Option("--json", help="print JSON only")]
Passes = Annotated[
    list[str] | None,
    typer.Option("--pass", metavar="SPEC", help="name or name{option=value,...}; repeats, in order; fuse otherwise"),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="do not compare the result with the original")]
ModelOut = Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="where the model goes")]
ArtifactOut = Annotated[Path, typer.Option("-o", "--output", metavar="ARTIFACT", help="where the compiled model goes")]


class Dialect(StrEnum):
    """How fused operations are written into an ONNX model."""

    FUNCTIONS = "functions"
    ORT = "ort"


DialectOption = Annotated[
    Dialect | None,
    typer.Option("--dialect", help="fused operations of an ONNX model: its own functions, or ONNX Runtime's operators"),
]


class Init(StrEnum):
    """Which weights gradients are measured with."""

    GIVEN = "given"
    XAVIER = "xavier"


class Backend(StrEnum):
    """What runs a model."""

    TVM = "tvm"
    ONNXRUNTIME = "onnxruntime"
    INDUCTOR = "inductor"
    EAGER = "eager"
