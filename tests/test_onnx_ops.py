"""Every operator of the table: what it is read as, and that writing the same kind anew gives the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest

from rescompile.kinds import OpKind as K
from tests.onnx_models import Const, Fed, check, fed, graph_of, kinds, rewritten, same, single

FLOAT = onnx.TensorProto.FLOAT
X = fed(2, 3, 8, 8)
SMALL = fed(2, 6)


@dataclass(frozen=True)
class Case:
    op: str
    operands: tuple[Const | Fed | None, ...]
    kinds: tuple[K, ...]
    opsets: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    expect: dict[str, Any] = field(default_factory=dict)  # attributes of the last operation

    def __str__(self) -> str:
        marks = "-".join(f"{name}={value}" for name, value in self.attrs.items())
        return f"{self.op}{'-' if marks else ''}{marks}".replace(" ", "")


def case(op: str, *operands: Any, reads: K | tuple[K, ...], at: tuple[int, ...], **rest: Any) -> Case:
    keys = ("outputs", "expect")
    extra = {key: rest.pop(key) for key in keys if key in rest}
    return Case(op, operands, reads if isinstance(reads, tuple) else (reads,), at, rest, **extra)


POSITIVE = fed(2, 6, low=0.5, high=3.0)
BOOLS = fed(2, 6, dtype="bool")
INTS = fed(2, 6, dtype="int64", low=-9, high=9)
W = Const.random(4, 3, 3, 3)
B = Const.random(4)
PER_CHANNEL = tuple(Const.random(3, seed=seed, low=0.5, high=1.5) for seed in range(4))
STAT = (Const.random(3, seed=1), Const.random(3, seed=2), Const.random(3, seed=3), Const.random(3, low=0.5, high=1.5))
ROWS = fed(5, 6)
SEQUENCE = fed(2, 5, 6)

UNARY = {
    "Identity": K.IDENTITY,
    "Neg": K.NEG,
    "Abs": K.ABS,
    "Exp": K.EXP,
    "Reciprocal": K.RECIPROCAL,
    "Floor": K.FLOOR,
    "Ceil": K.CEIL,
    "Relu": K.RELU,
    "Sigmoid": K.SIGMOID,
    "Tanh": K.TANH,
    "Softplus": K.SOFTPLUS,
    "Log": K.LOG,
    "Sqrt": K.SQRT,
    "Sin": K.SIN,
    "Cos": K.COS,
}

CASES: list[Case] = [
    *(case(op, POSITIVE, reads=kind, at=(7, 13, 22)) for op, kind in UNARY.items()),
    *(case(op, SMALL, reads=kind, at=(9, 13)) for op, kind in (("Erf", K.ERF), ("Sign", K.SIGN), ("IsNaN", K.IS_NAN))),
    case("LayerNormalization", SEQUENCE, Const.random(6), reads=(K.LAYER_NORM, K.MUL), at=(17, 22), axis=1),
    case(
        "LayerNormalization",
        SEQUENCE,
        Const.random(5, 6),
        Const.random(5, 6, seed=2),
        reads=(K.LAYER_NORM, K.MUL, K.ADD),
        at=(17,),
    ),
    case(
        "LayerNormalization",
        SEQUENCE,
        Const.random(1, 1, 6),
        Const.random(6, seed=2),
        reads=(K.RESHAPE, K.LAYER_NORM),
        at=(17, 22),
        expect={"axis": 2},
    ),
    case("Round", SMALL, reads=K.ROUND, at=(11, 22)),
    case("HardSwish", SMALL, reads=K.HARDSWISH, at=(14, 22)),
    case("Mish", SMALL, reads=K.MISH, at=(18, 22)),
    case("Not", BOOLS, reads=K.LOGICAL_NOT, at=(7,)),
    # arithmetic
    case("Add", SMALL, fed(6, seed=3), reads=K.ADD, at=(7, 13, 20)),
    case("Add", INTS, Const.of(1, 2, 3, 4, 5, 6), reads=K.ADD, at=(7, 14)),
    case("Sub", SMALL, fed(6, seed=3), reads=K.ADD, at=(7, 14), expect={"scales": (1.0, -1.0)}),
    case("Sum", SMALL, fed(2, 6, seed=3), fed(1, 6, seed=4), reads=K.ADD, at=(8, 13)),
    case("Sum", SMALL, reads=K.IDENTITY, at=(8, 13)),
    case("Mean", SMALL, fed(2, 6, seed=3), reads=K.ADD, at=(8, 13), expect={"scales": (0.5, 0.5)}),
    case("Mul", SMALL, Const.random(6), reads=K.MUL, at=(7, 14)),
    case("Div", SMALL, POSITIVE, reads=K.DIV, at=(7, 14)),
    case("Pow", POSITIVE, Const.scalar(1.5), reads=K.POW, at=(7, 13)),
    case("Max", SMALL, fed(6, seed=5), reads=K.MAXIMUM, at=(8, 13)),
    case("Min", SMALL, fed(6, seed=5), fed(1, seed=6), reads=(K.MINIMUM, K.MINIMUM), at=(8, 13)),
    case("Max", SMALL, reads=K.IDENTITY, at=(8,)),
    case("Mod", INTS, Const.of(3, 4, 5, 6, 7, 8), reads=K.MOD, at=(10, 13)),
    case("Where", BOOLS, SMALL, fed(6, seed=5), reads=K.WHERE, at=(9, 16)),
    case("Equal", INTS, Const.of(1, 2, 3, 4, 5, 6), reads=K.EQUAL, at=(7, 13)),
    case("Less", SMALL, fed(6, seed=5), reads=K.LESS, at=(9, 13)),
    case("Greater", SMALL, fed(6, seed=5), reads=K.GREATER, at=(9, 13)),
    case("LessOrEqual", SMALL, fed(6, seed=5), reads=K.LESS_EQUAL, at=(12, 16)),
    case("GreaterOrEqual", SMALL, fed(6, seed=5), reads=K.GREATER_EQUAL, at=(12, 16)),
    case("And", BOOLS, fed(2, 6, dtype="bool", seed=4), reads=K.LOGICAL_AND, at=(7,)),
    case("Or", BOOLS, fed(2, 6, dtype="bool", seed=4), reads=K.LOGICAL_OR, at=(7,)),
    case("Cast", SMALL, reads=K.CAST, at=(9, 13, 19), to=int(onnx.TensorProto.FLOAT16), expect={"dtype": "float16"}),
    case("Cast", SMALL, reads=K.IDENTITY, at=(9, 13), to=int(FLOAT)),
    # views
    case("Reshape", X, Const.of(0, -1, 4), reads=K.RESHAPE, at=(7, 13, 14, 21)),
    case("Flatten", X, reads=K.RESHAPE, at=(7, 13), axis=2),
    case("Squeeze", fed(2, 1, 3, 1), reads=K.RESHAPE, at=(7, 11), axes=[1]),
    case("Squeeze", fed(2, 1, 3, 1), Const.of(-1), reads=K.RESHAPE, at=(13, 21)),
    case("Unsqueeze", SMALL, reads=K.RESHAPE, at=(7, 11), axes=[0, 2]),
    case("Unsqueeze", SMALL, Const.of(0, -1), reads=K.RESHAPE, at=(13, 21)),
    case("Transpose", X, reads=K.PERMUTE, at=(7, 13), expect={"perm": (3, 2, 1, 0)}),
    case("Transpose", X, reads=K.PERMUTE, at=(7, 21), perm=[0, 2, 3, 1]),
    case("Expand", fed(3, 1), Const.of(2, 3, 4), reads=K.EXPAND, at=(8, 13)),
    case("Expand", fed(3, 4), Const.of(3, 1), reads=K.IDENTITY, at=(8,)),
    case("Slice", X, reads=K.SLICE, at=(7, 9), starts=[1, -3], ends=[1000, -1], axes=[1, 3], expect={"stops": (3, 7)}),
    case(
        "Slice", X, Const.of(6, 0), Const.of(-1000, 8), Const.of(3, -2), Const.of(-2, 3), reads=K.SLICE, at=(10, 11, 13)
    ),
    case("Slice", X, Const.of(-1), Const.of(-1000), Const.of(2), Const.of(-1), reads=K.FLIP, at=(10, 13)),
    case("Split", X, reads=K.SPLIT, at=(7, 11), axis=3, split=[3, 5], outputs=2),
    case("Split", X, reads=K.SPLIT, at=(7, 11), axis=-1, outputs=2, expect={"sizes": (4, 4), "axis": 3}),
    case("Split", X, Const.of(3, 5), reads=K.SPLIT, at=(13, 18), axis=3, outputs=2),
    case("Split", X, reads=K.SPLIT, at=(18,), axis=3, num_outputs=3, outputs=3, expect={"sizes": (3, 3, 2)}),
    case("Pad", X, reads=K.PAD, at=(7,), pads=[0, 0, 1, 2, 0, 0, 3, 0], value=0.5),
    case("Pad", X, Const.of(0, 0, 1, 2, 0, 0, 3, 0), Const.scalar(0.5), reads=K.PAD, at=(11, 13, 18)),
    case(
        "Pad", X, Const.of(1, 2), None, Const.of(-1), reads=K.PAD, at=(18,), expect={"pads": (0, 0, 0, 1, 0, 0, 0, 2)}
    ),
    case("Pad", X, Const.of(0, 0, 1, 1, 0, 0, 1, 1), reads=K.PAD, at=(11, 18), mode="reflect"),
    case(
        "Pad", X, Const.of(0, 0, 1, 1, 0, 0, 1, 1), reads=K.PAD, at=(11, 18), mode="edge", expect={"mode": "replicate"}
    ),
    case("Tile", SMALL, Const.of(2, 3), reads=K.TILE, at=(7, 13)),
    case("Concat", SMALL, fed(2, 2), reads=K.CONCAT, at=(11, 13), axis=-1, expect={"axis": 1}),
    case("DepthToSpace", fed(1, 8, 2, 3), reads=(K.RESHAPE, K.PERMUTE, K.RESHAPE), at=(7, 13), blocksize=2),
    case("DepthToSpace", fed(1, 8, 2, 3), reads=(K.RESHAPE, K.PERMUTE, K.RESHAPE), at=(11,), blocksize=2, mode="CRD"),
    case("SpaceToDepth", fed(1, 2, 4, 6), reads=(K.RESHAPE, K.PERMUTE, K.RESHAPE), at=(7, 13), blocksize=2),
    case("Gather", Const.random(9, 4), fed(2, 3, dtype="int64", low=0, high=9), reads=K.EMBEDDING, at=(7, 13)),
    case("Gather", X, Const.of(2, 0), reads=K.GATHER, at=(7, 13), axis=1),
    case("Gather", X, Const.scalar(-1, "int64"), reads=(K.SLICE, K.RESHAPE), at=(11, 13), axis=2),
    case("Gather", X, Const.of(1), reads=K.SLICE, at=(7, 13), axis=-1, expect={"axes": (3,), "starts": (1,)}),
    case("GatherND", ROWS, Const(np.asarray([[[1], [4]]])), reads=(K.RESHAPE, K.GATHER), at=(11, 13)),
    case("ScatterElements", SMALL, Const(np.asarray([[1, 0]])), fed(1, 2), reads=K.SCATTER, at=(11, 16)),
    case("ScatterND", SMALL, Const(np.asarray([[1]])), fed(1, 6, seed=3), reads=K.SCATTER, at=(16,), reduction="add"),
    # convolutions and pools
    case("Conv", X, W, reads=K.CONV, at=(7, 11, 22)),
    case("Conv", X, W, B, reads=K.CONV, at=(7, 11), strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2]),
    case("Conv", X, Const.random(6, 1, 3, 3), reads=K.CONV, at=(11,), group=3, expect={"groups": 3}),
    case("Conv", fed(2, 3, 9), Const.random(4, 3, 2), reads=K.CONV, at=(11,), strides=[2], expect={"pads": (0, 0)}),
    case("Conv", X, W, reads=K.CONV, at=(7, 11), auto_pad="SAME_UPPER", strides=[2, 2], expect={"pads": (0, 0, 1, 1)}),
    case("Conv", X, W, reads=K.CONV, at=(11,), auto_pad="SAME_LOWER", strides=[2, 2], expect={"pads": (1, 1, 0, 0)}),
    case("Conv", X, W, reads=K.CONV, at=(11,), auto_pad="VALID", expect={"pads": (0, 0, 0, 0)}),
    case(
        "ConvTranspose",
        X,
        Const.random(3, 2, 3, 3),
        reads=K.CONV_TRANSPOSE,
        at=(7, 11),
        strides=[2, 2],
        pads=[1, 0, 1, 1],
    ),
    case(
        "ConvTranspose",
        X,
        Const.random(3, 2, 3, 3),
        reads=K.CONV_TRANSPOSE,
        at=(11,),
        strides=[2, 2],
        output_padding=[1, 1],
        expect={"output_padding": (1, 1)},
    ),
    case(
        "ConvTranspose",
        X,
        Const.random(3, 2, 3, 3),
        reads=K.CONV_TRANSPOSE,
        at=(11,),
        strides=[2, 2],
        output_shape=[16, 15],
    ),
    case(
        "ConvTranspose",
        X,
        Const.random(3, 2, 3, 3),
        reads=K.CONV_TRANSPOSE,
        at=(11,),
        strides=[2, 2],
        auto_pad="SAME_UPPER",
    ),
    case("MaxPool", X, reads=K.MAX_POOL, at=(7, 8, 12, 22), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", X, reads=K.MAX_POOL, at=(10, 12), kernel_shape=[2, 2], dilations=[2, 2], ceil_mode=1),
    case("MaxPool", X, reads=K.MAX_POOL, at=(12,), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("AveragePool", X, reads=K.AVG_POOL, at=(7, 10, 11), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case(
        "AveragePool", X, reads=K.AVG_POOL, at=(7, 11, 19), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    ),
    case("AveragePool", X, reads=K.AVG_POOL, at=(10, 19), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("GlobalAveragePool", X, reads=K.ADAPTIVE_AVG_POOL, at=(7, 22), expect={"output_size": (1, 1)}),
    case("GlobalMaxPool", X, reads=K.AMAX, at=(7, 22), expect={"axes": (2, 3), "keepdims": True}),
    case("Upsample", X, reads=K.INTERPOLATE, at=(7,), mode="nearest", scales=[1.0, 1.0, 2.0, 3.0]),
    case("Upsample", X, Const.of(1, 1, 2, 3, dtype="float32"), reads=K.INTERPOLATE, at=(9,), mode="nearest"),
    case("Resize", X, Const.of(1, 1, 2, 3, dtype="float32"), reads=K.INTERPOLATE, at=(10,), mode="nearest"),
    case(
        "Resize",
        X,
        None,
        Const.of(1, 1, 2, 3, dtype="float32"),
        reads=K.INTERPOLATE,
        at=(13, 19),
        mode="linear",
        coordinate_transformation_mode="pytorch_half_pixel",
        expect={"mode": "linear", "align_corners": False},
    ),
    case(
        "Resize",
        X,
        Const(np.zeros(0, np.float32)),
        Const(np.zeros(0, np.float32)),
        Const.of(2, 3, 13, 5),
        reads=K.INTERPOLATE,
        at=(11, 13),
        mode="cubic",
        coordinate_transformation_mode="align_corners",
        expect={"mode": "cubic", "align_corners": True},
    ),
    case(
        "Resize",
        X,
        None,
        None,
        Const.of(2, 3, 5, 7),
        reads=K.INTERPOLATE,
        at=(13, 19),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    # contractions
    case("MatMul", SEQUENCE, Const.random(6, 4), reads=K.LINEAR, at=(7, 13), expect={"transpose_weight": False}),
    case("MatMul", SEQUENCE, fed(2, 6, 3), reads=K.MATMUL, at=(7, 13)),
    case("Gemm", ROWS, Const.random(6, 4), B, reads=K.LINEAR, at=(7, 9, 11, 13), expect={"transpose_weight": False}),
    case("Gemm", ROWS, Const.random(4, 6), B, reads=K.LINEAR, at=(7, 13), transB=1, expect={"transpose_weight": True}),
    case("Gemm", ROWS, Const.random(4, 6), reads=K.LINEAR, at=(11, 13), transB=1),
    case("Gemm", ROWS, Const.random(6, 4), fed(5, 4), reads=(K.LINEAR, K.ADD), at=(7, 13), alpha=0.5, beta=2.0),
    case(
        "Gemm",
        fed(6, 5),
        fed(4, 6),
        fed(5, 4),
        reads=(K.PERMUTE, K.PERMUTE, K.MATMUL, K.ADD),
        at=(11,),
        transA=1,
        transB=1,
    ),
    case("Gemm", ROWS, Const.random(6, 4), B, reads=K.LINEAR, at=(13,), beta=0.0),
    case("Einsum", fed(2, 3, 4), fed(2, 4, 5), reads=K.EINSUM, at=(12,), equation="b i j , b j k -> b i k"),
    case(
        "Attention", fed(2, 4, 5, 8), fed(2, 2, 7, 8), fed(2, 2, 7, 8, seed=5), reads=K.ATTENTION, at=(23,), scale=0.3
    ),
    case(
        "Attention",
        fed(2, 4, 5, 8),
        fed(2, 4, 5, 8, seed=3),
        fed(2, 4, 5, 8, seed=5),
        reads=K.ATTENTION,
        at=(23,),
        is_causal=1,
    ),
    # norms
    case(
        "BatchNormalization",
        X,
        PER_CHANNEL[0],
        *STAT[1:],
        reads=K.BATCH_NORM,
        at=(7, 9, 14, 15),
        epsilon=1e-3,
        expect={"eps": 1e-3},
    ),
    case(
        "LayerNormalization",
        SEQUENCE,
        Const.random(6),
        Const.random(6, seed=8),
        reads=K.LAYER_NORM,
        at=(17,),
        expect={"axis": 2},
    ),
    case("LayerNormalization", SEQUENCE, Const.random(5, 6), reads=K.LAYER_NORM, at=(17,), axis=1, epsilon=1e-3),
    case("RMSNormalization", SEQUENCE, Const.random(6), reads=K.RMS_NORM, at=(23,), expect={"axis": 2, "eps": 1e-5}),
    case(
        "GroupNormalization",
        fed(2, 6, 4, 4),
        Const.random(6),
        Const.random(6, seed=2),
        reads=K.GROUP_NORM,
        at=(21,),
        num_groups=3,
    ),
    case(
        "GroupNormalization",
        fed(2, 6, 4, 4),
        Const.random(3),
        Const.random(3, seed=2),
        reads=K.GROUP_NORM,
        at=(18,),
        num_groups=3,
    ),
    case("InstanceNormalization", X, Const.random(3), Const.random(3, seed=2), reads=K.INSTANCE_NORM, at=(7, 22)),
    case("LRN", X, reads=K.LOCAL_RESPONSE_NORM, at=(7, 13), size=3, alpha=0.1, bias=2.0, expect={"beta": 0.75}),
    # activations
    case("Clip", SMALL, reads=K.CLIP, at=(7,), min=-0.5, max=1.0, expect={"min": -0.5, "max": 1.0}),
    case("Clip", SMALL, None, Const.scalar(1.0), reads=K.CLIP, at=(11, 12, 13), expect={"min": None, "max": 1.0}),
    case("Clip", SMALL, reads=K.IDENTITY, at=(11,)),
    case("LeakyRelu", SMALL, reads=K.LEAKY_RELU, at=(7, 16), expect={"slope": 0.01}),
    case("PRelu", X, Const.random(3, 1, 1), reads=K.PRELU, at=(7, 16)),
    case("PRelu", X, Const.random(1), reads=K.PRELU, at=(9,)),
    case("Elu", SMALL, reads=K.ELU, at=(7, 22), alpha=0.7, expect={"alpha": 0.7}),
    case("Gelu", SMALL, reads=K.GELU, at=(20,)),
    case("Gelu", SMALL, reads=K.GELU, at=(20,), approximate="tanh", expect={"approximate": "tanh"}),
    case("HardSigmoid", SMALL, reads=K.HARDSIGMOID, at=(7, 22), expect={"alpha": 0.2, "beta": 0.5}),
    case("Dropout", SMALL, reads=K.IDENTITY, at=(7, 10, 12, 13)),
    case("Softmax", SEQUENCE, reads=K.SOFTMAX, at=(13,), expect={"axis": 2}),
    case("Softmax", SEQUENCE, reads=K.SOFTMAX, at=(7, 11), axis=2),
    case("Softmax", SEQUENCE, reads=(K.RESHAPE, K.SOFTMAX, K.RESHAPE), at=(7, 11)),
    case("Softmax", fed(2, 5, 1), reads=K.SOFTMAX, at=(11,), expect={"axis": 1}),
    case("LogSoftmax", SEQUENCE, reads=K.SOFTMAX, at=(13,), axis=1, expect={"log": True}),
    # reductions
    *(
        case(
            op,
            SEQUENCE,
            reads=kind,
            at=(7, 11, 13) if op != "ReduceSum" else (7, 11),
            axes=[-1, 0],
            expect={"axes": (0, 2)},
        )
        for op, kind in (("ReduceMean", K.MEAN), ("ReduceSum", K.SUM), ("ReduceMax", K.AMAX), ("ReduceMin", K.AMIN))
    ),
    case("ReduceProd", SEQUENCE, reads=K.PROD, at=(7, 13), axes=[1], keepdims=0, expect={"keepdims": False}),
    case("ReduceMean", SEQUENCE, Const.of(1), reads=K.MEAN, at=(18,)),
    case("ReduceSum", SEQUENCE, Const.of(1), reads=K.SUM, at=(13, 18), keepdims=0),
    case("ReduceSum", SEQUENCE, reads=K.SUM, at=(7, 13), expect={"axes": (0, 1, 2)}),
    case("ReduceSum", SEQUENCE, reads=K.IDENTITY, at=(13,), noop_with_empty_axes=1),
    case("ReduceL2", SEQUENCE, reads=(K.MUL, K.SUM, K.SQRT), at=(11, 13), axes=[1]),
    case("ReduceL1", SEQUENCE, Const.of(2), reads=(K.ABS, K.SUM), at=(18,)),
    case("ReduceSumSquare", SEQUENCE, reads=(K.MUL, K.SUM), at=(11,), axes=[1], keepdims=0),
    case("ArgMax", SEQUENCE, reads=K.ARGMAX, at=(7, 11, 13), axis=-1, expect={"axes": (2,), "keepdims": True}),
    case("CumSum", SEQUENCE, Const.scalar(-1, "int32"), reads=K.CUMSUM, at=(11, 14), expect={"axis": 2}),
    case("TopK", SEQUENCE, reads=K.TOPK, at=(7,), k=3, outputs=2),
    case("TopK", SEQUENCE, Const.of(3), reads=K.TOPK, at=(10, 11), axis=1, outputs=2),
    case(
        "LSTM",
        fed(5, 2, 4),
        Const.random(2, 12, 4),
        Const.random(2, 12, 3),
        None,
        None,
        Const.random(2, 2, 3),
        reads=K.RECURRENT,
        at=(7, 14, 22),
        direction="bidirectional",
        hidden_size=3,
        outputs=3,
        expect={"mode": "lstm"},
    ),
    case(
        "RNN",
        fed(5, 2, 4),
        Const.random(1, 3, 4),
        Const.random(1, 3, 3),
        reads=K.RECURRENT,
        at=(14,),
        activations=["Relu"],
        hidden_size=3,
        expect={"mode": "rnn_relu"},
    ),
    # out of nothing
    case(
        "Range",
        Const.scalar(1, "int64"),
        fed(dtype="int64", low=8, high=9),
        Const.scalar(2, "int64"),
        reads=K.ARANGE,
        at=(11,),
        expect={"start": 1, "step": 2},
    ),
]

PAIRS = [pytest.param(item, opset, id=f"{item}-{opset}-{n}") for n, item in enumerate(CASES) for opset in item.opsets]


@pytest.mark.parametrize(("item", "opset"), PAIRS)
def test_operator_reads_as_its_kind_and_writes_back(item: Case, opset: int) -> None:
    proto, feeds = single(item.op, item.operands, opset, outputs=item.outputs, **item.attrs)
    graph = graph_of(proto)
    assert tuple(kinds(graph)) == item.kinds, graph.notes
    last = graph.ops[-1]
    for name, value in item.expect.items():
        found = last.attr(name)
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, name
    expected = graph.run(feeds)
    copy = rewritten(graph)
    check(copy)
    same(expected, copy.run(feeds), rtol=1e-4, atol=1e-5)
    same(expected, graph.run(feeds), rtol=0, atol=0)


@dataclass(frozen=True)
class Refused:
    op: str
    operands: tuple[Const | Fed | None, ...]
    opset: int
    reason: str
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1


REFUSED = [
    Refused(
        "GRU",
        (fed(5, 2, 4), Const.random(1, 9, 4), Const.random(1, 9, 3)),
        14,
        "activations",
        {"activations": ["Relu", "Tanh"], "hidden_size": 3},
    ),
    Refused("Div", (INTS, Const.of(2)), 14, "integer division"),
    Refused("Mod", (SMALL, POSITIVE), 13, "fmod", {"fmod": 1}),
    Refused("Reshape", (SMALL, fed(1, dtype="int64", low=12, high=13)), 13, "computed at run time"),
    Refused("Expand", (SMALL, fed(2, dtype="int64", low=1, high=2)), 13, "computed at run time"),
    Refused("Slice", (X, fed(1, dtype="int64", low=0, high=1), Const.of(2)), 13, "computed at run time"),
    Refused("Slice", (X, Const.of(0), Const.of(2)), 9, "no starts and ends"),
    Refused("Clip", (SMALL, fed(low=-1.0, high=0.0)), 13, "computed at run time"),
    Refused("MaxPool", (X,), 12, "indices", {"kernel_shape": [2, 2]}, outputs=2),
    Refused("AveragePool", (X,), 19, "dilated", {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    Refused("PRelu", (X, Const.random(8)), 16, "more than the channels"),
    Refused("Swish", (SMALL,), 24, "alpha", {"alpha": 0.5}),
    Refused("CumSum", (SMALL, Const.scalar(0, "int64")), 14, "exclusive", {"exclusive": 1}),
    Refused("ArgMax", (SMALL,), 13, "last of several", {"axis": 0, "select_last_index": 1}),
    Refused(
        "Resize",
        (X, None, Const.of(1, 1, 2, 2, dtype="float32")),
        13,
        "no counterpart",
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    ),
    Refused("Resize", (X, None, Const.of(1, 1, 1.5, 1.5, dtype="float32")), 13, "no counterpart", {"mode": "nearest"}),
    Refused("Resize", (X, None, Const.of(1, 1, 1.3, 1, dtype="float32")), 13, "extent times", {"mode": "cubic"}),
    Refused(
        "Attention", (fed(2, 5, 8), fed(2, 5, 8), fed(2, 5, 8)), 23, "heads", {"q_num_heads": 2, "kv_num_heads": 2}
    ),
    Refused("LayerNormalization", (SEQUENCE, Const.random(6)), 17, "statistics", outputs=2),
]


@pytest.mark.parametrize("item", REFUSED, ids=[f"{item.op}-{item.reason.replace(' ', '-')}" for item in REFUSED])
def test_operator_that_means_more_than_a_kind_stays_opaque_with_a_reason(item: Refused) -> None:
    proto, _ = single(item.op, item.operands, item.opset, outputs=item.outputs, **item.attrs)
    graph = graph_of(proto)
    assert kinds(graph) == [K.OPAQUE]
    assert graph.op("node").attr("target").endswith(item.op)
    assert any(item.reason in note for note in graph.notes), graph.notes


@pytest.mark.parametrize("op", ["Selu", "Softsign", "Tan", "Trilu", "NonZero"])
def test_operator_without_a_kind_is_opaque_and_needs_no_note(op: str) -> None:
    graph = graph_of(single(op, (SMALL,), 14)[0])
    assert kinds(graph) == [K.OPAQUE]
    assert graph.notes == []
