"""The operation vocabulary: one small table of kinds that every IR's operations are read into.

A kind says what an operation *means*; adapters map their own spellings onto it, and detection, passes and lowering ask
for its traits instead of listing operator names. An operation that is not in the table is `OPAQUE`: it costs nothing,
is never edited, and survives every rewrite untouched.

Attributes are normalised: axes are non-negative, `pads` is (begin_0, ..., begin_n, end_0, ..., end_n) over the spatial
dimensions, `stride` and `dilation` have one entry for each spatial dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any


class Trait(Flag):
    """What passes may ask of a kind."""

    NONE = 0
    FREE = auto()  # moves or relabels elements, computes nothing: identity, view, permute, slice, cast
    ELEMENTWISE = auto()  # y[i] depends on the operands' element i only (after broadcasting)
    SHAPE_PRESERVING = auto()  # the output has the shape of the first operand
    WORK = auto()  # transforms with weights or across positions: makes a branch a working branch
    NORM = auto()  # a normalisation
    PARAMETRIC = auto()  # carries weights as operands
    LINEAR_IN_INPUT = auto()  # linear in its first operand, the others fixed
    ACTIVATION = auto()  # a one-operand nonlinearity (trained slopes count)
    COMMUTATIVE = auto()
    REDUCTION = auto()
    POOL = auto()
    SOURCE = auto()  # produces a value out of nothing or out of a shape: arange, full
    FUSED = auto()  # made by a pass out of simpler kinds; see rescompile.fused
    RANDOM = auto()  # a different value on each call


_VIEW = Trait.FREE | Trait.LINEAR_IN_INPUT
_UNARY = Trait.ELEMENTWISE | Trait.SHAPE_PRESERVING
_ACTIVATION = _UNARY | Trait.ACTIVATION
_BINARY = Trait.ELEMENTWISE
_CONTRACTION = Trait.WORK | Trait.PARAMETRIC | Trait.LINEAR_IN_INPUT
_NORM = Trait.WORK | Trait.NORM | Trait.PARAMETRIC | Trait.SHAPE_PRESERVING
_POOL = Trait.WORK | Trait.POOL


@dataclass(frozen=True, slots=True)
class KindSpec:
    """Signature of a kind.

    `operands`: names in order; `?` marks one that may be absent (None), `*` one that repeats.
    `attrs`: names of the attributes, with their defaults. `outputs`: how many values it produces (0: varies).
    """

    operands: tuple[str, ...]
    traits: Trait
    attrs: dict[str, object]
    outputs: int = 1


class OpKind(Enum):
    """Kinds of operation; the value is the printed name."""

    bits: int  # the kind's traits as a number: combining enum members costs a microsecond
    # Members are singletons. Enum's own hash is a Python function, and kinds are keys everywhere.
    __hash__ = object.__hash__

    # moves elements
    IDENTITY = "identity"
    CAST = "cast"
    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    RESHAPE = "reshape"
    PERMUTE = "permute"
    SLICE = "slice"
    SPLIT = "split"
    EXPAND = "expand"
    ROLL = "roll"
    FLIP = "flip"
    PAD = "pad"
    TILE = "tile"
    # brings values together
    ADD = "add"
    CONCAT = "concat"
    # elementwise, two or more operands
    MUL = "mul"
    DIV = "div"
    POW = "pow"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    MOD = "mod"
    WHERE = "where"
    EQUAL = "equal"
    NOT_EQUAL = "not_equal"
    LESS = "less"
    LESS_EQUAL = "less_equal"
    GREATER = "greater"
    GREATER_EQUAL = "greater_equal"
    LOGICAL_AND = "logical_and"
    LOGICAL_OR = "logical_or"
    # elementwise, one operand
    LOGICAL_NOT = "logical_not"
    NEG = "neg"
    ABS = "abs"
    EXP = "exp"
    LOG = "log"
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    RECIPROCAL = "reciprocal"
    ERF = "erf"
    SIN = "sin"
    COS = "cos"
    FLOOR = "floor"
    CEIL = "ceil"
    ROUND = "round"
    SIGN = "sign"
    IS_NAN = "is_nan"
    # activations
    RELU = "relu"
    CLIP = "clip"
    LEAKY_RELU = "leaky_relu"
    PRELU = "prelu"
    ELU = "elu"
    GELU = "gelu"
    SILU = "silu"
    SIGMOID = "sigmoid"
    TANH = "tanh"
    HARDSIGMOID = "hardsigmoid"
    HARDSWISH = "hardswish"
    SOFTPLUS = "softplus"
    MISH = "mish"
    DROPOUT = "dropout"
    # contractions
    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    MATMUL = "matmul"
    EINSUM = "einsum"
    ATTENTION = "attention"
    RECURRENT = "recurrent"
    FFT = "fft"
    # looks up and scatters
    EMBEDDING = "embedding"
    GATHER = "gather"
    SCATTER = "scatter"
    # norms
    BATCH_NORM = "batch_norm"
    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    GROUP_NORM = "group_norm"
    INSTANCE_NORM = "instance_norm"
    LOCAL_RESPONSE_NORM = "local_response_norm"
    NORMALISE = "normalise"
    # across positions
    SOFTMAX = "softmax"
    MAX_POOL = "max_pool"
    AVG_POOL = "avg_pool"
    ADAPTIVE_AVG_POOL = "adaptive_avg_pool"
    INTERPOLATE = "interpolate"
    MEAN = "mean"
    SUM = "sum"
    AMAX = "amax"
    AMIN = "amin"
    PROD = "prod"
    ARGMAX = "argmax"
    CUMSUM = "cumsum"
    TOPK = "topk"
    # out of nothing
    FULL = "full"
    ARANGE = "arange"
    SHAPE = "shape"
    RANDOM = "random"
    # made by passes
    FUSED_CONV = "fused_conv"
    FUSED_LINEAR = "fused_linear"
    ADD_NORM = "add_norm"
    FUSED_REGION = "fused_region"
    # everything else
    OPAQUE = "opaque"

    @property
    def spec(self) -> KindSpec:
        """The kind's signature and traits."""
        return KINDS[self]

    def has(self, trait: Trait) -> bool:
        """Whether the kind has all of `trait`."""
        wanted = trait._value_
        return self.bits & wanted == wanted


def _kind(operands: str, traits: Trait, outputs: int = 1, **attrs: Any) -> KindSpec:
    return KindSpec(tuple(operands.split()), traits, attrs, outputs)


_CONV_ATTRS: dict[str, Any] = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
_EPILOGUE_ATTRS: dict[str, Any] = {"inner": "none", "outer": "none"}

K = OpKind
KINDS: dict[OpKind, KindSpec] = {
    # dropout: the rate of a dropout that evaluation switches off, 0 for what never does anything.
    K.IDENTITY: _kind("x", _VIEW | _UNARY, dropout=0.0),
    K.CAST: _kind("x", _VIEW | _UNARY, dtype="float32"),
    # Casts between floats and integers with a scale: q = round(x / scale) + zero, x = (q − zero)·scale.
    K.QUANTIZE: _kind("x scale zero?", Trait.FREE | _UNARY),
    K.DEQUANTIZE: _kind("x scale zero?", Trait.FREE | _UNARY),
    # The target is the output's shape, or `shape` where that is not known: −1 for one extent. A shape operand of the IR
    # (ONNX) is kept by the adapter only.
    K.RESHAPE: _kind("x", _VIEW, shape=()),
    K.PERMUTE: _kind("x", _VIEW, perm=()),
    K.SLICE: _kind("x", _VIEW, axes=(), starts=(), stops=(), steps=()),
    K.SPLIT: _kind("x", _VIEW, 0, axis=0, sizes=()),
    K.EXPAND: _kind("x", _VIEW),
    K.ROLL: _kind("x", _VIEW, axes=(), shifts=()),
    K.FLIP: _kind("x", _VIEW, axes=()),
    # Here `pads` covers every dimension, not only the spatial ones. mode: constant, reflect, replicate, circular.
    K.PAD: _kind("x", _VIEW, pads=(), mode="constant", value=0.0),
    K.TILE: _kind("x", _VIEW, repeats=()),
    # y = scales[0]·x0 + scales[1]·x1 + ...; a difference is a sum with scale −1, torch's alpha= a scale.
    K.ADD: _kind("*x", _BINARY | Trait.COMMUTATIVE, scales=()),
    K.CONCAT: _kind("*x", Trait.NONE, axis=0),
    K.MUL: _kind("a b", _BINARY | Trait.COMMUTATIVE | Trait.LINEAR_IN_INPUT),
    K.DIV: _kind("a b", _BINARY | Trait.LINEAR_IN_INPUT),
    K.POW: _kind("a b", _BINARY),
    K.MAXIMUM: _kind("a b", _BINARY | Trait.COMMUTATIVE),
    K.MINIMUM: _kind("a b", _BINARY | Trait.COMMUTATIVE),
    K.MOD: _kind("a b", _BINARY),
    K.WHERE: _kind("condition a b", _BINARY),
    K.EQUAL: _kind("a b", _BINARY | Trait.COMMUTATIVE),
    K.NOT_EQUAL: _kind("a b", _BINARY | Trait.COMMUTATIVE),
    K.LESS: _kind("a b", _BINARY),
    K.LESS_EQUAL: _kind("a b", _BINARY),
    K.GREATER: _kind("a b", _BINARY),
    K.GREATER_EQUAL: _kind("a b", _BINARY),
    K.LOGICAL_AND: _kind("a b", _BINARY | Trait.COMMUTATIVE),
    K.LOGICAL_OR: _kind("a b", _BINARY | Trait.COMMUTATIVE),
    K.LOGICAL_NOT: _kind("x", _UNARY),
    K.NEG: _kind("x", _UNARY | Trait.LINEAR_IN_INPUT),
    K.ABS: _kind("x", _UNARY),
    K.EXP: _kind("x", _UNARY),
    K.LOG: _kind("x", _UNARY),
    K.SQRT: _kind("x", _UNARY),
    K.RSQRT: _kind("x", _UNARY),
    K.RECIPROCAL: _kind("x", _UNARY),
    K.ERF: _kind("x", _UNARY),
    K.SIN: _kind("x", _UNARY),
    K.COS: _kind("x", _UNARY),
    K.FLOOR: _kind("x", _UNARY),
    K.CEIL: _kind("x", _UNARY),
    K.ROUND: _kind("x", _UNARY),
    K.SIGN: _kind("x", _UNARY),
    K.IS_NAN: _kind("x", _UNARY),
    K.RELU: _kind("x", _ACTIVATION),
    K.CLIP: _kind("x", _ACTIVATION, min=None, max=None),
    K.LEAKY_RELU: _kind("x", _ACTIVATION, slope=0.01),
    K.PRELU: _kind("x slope", _ACTIVATION | Trait.PARAMETRIC),
    K.ELU: _kind("x", _ACTIVATION, alpha=1.0),
    # approximate: "none" (erf) or "tanh".
    K.GELU: _kind("x", _ACTIVATION, approximate="none"),
    K.SILU: _kind("x", _ACTIVATION),
    K.SIGMOID: _kind("x", _ACTIVATION),
    K.TANH: _kind("x", _ACTIVATION),
    # max(0, min(1, alpha·x + beta))
    K.HARDSIGMOID: _kind("x", _ACTIVATION, alpha=1.0 / 6.0, beta=0.5),
    K.HARDSWISH: _kind("x", _ACTIVATION),
    K.SOFTPLUS: _kind("x", _ACTIVATION),
    K.MISH: _kind("x", _ACTIVATION),
    # Only in training; a dropout that does nothing (evaluation, p = 0) arrives as IDENTITY.
    K.DROPOUT: _kind("x", _UNARY | Trait.RANDOM, p=0.5),
    # weight: [out_channels, in_channels / groups, *kernel]; x: [N, C, *spatial]
    K.CONV: _kind("x weight bias?", _CONTRACTION, **_CONV_ATTRS),
    # weight: [in_channels, out_channels / groups, *kernel]
    K.CONV_TRANSPOSE: _kind("x weight bias?", _CONTRACTION, output_padding=(0, 0), **_CONV_ATTRS),
    # weight: [out, in] when transpose_weight (torch), [in, out] otherwise (ONNX MatMul); a constant in both
    K.LINEAR: _kind("x weight bias?", _CONTRACTION, transpose_weight=True),
    K.MATMUL: _kind("a b", Trait.WORK | Trait.LINEAR_IN_INPUT),
    K.EINSUM: _kind("*x", Trait.WORK, equation=""),
    # softmax(scale·q·kᵀ + mask)·v; q: [..., Hq, S, D], k, v: [..., Hkv, T, D]; a boolean mask keeps where true.
    K.ATTENTION: _kind("q k v mask?", Trait.WORK, scale=1.0, causal=False),
    # mode: lstm, gru, rnn_tanh, rnn_relu; operands after the input are the IR's own.
    K.RECURRENT: _kind("x *weights", Trait.WORK | Trait.PARAMETRIC, 0, mode="lstm"),
    K.FFT: _kind("x", Trait.WORK),
    K.EMBEDDING: _kind("weight indices", Trait.WORK | Trait.PARAMETRIC),
    K.GATHER: _kind("x indices", Trait.NONE, axis=0),
    # The last operand is what is put at the given places of x; reduction: none (it replaces), add, mul, max, min, mean.
    K.SCATTER: _kind("x *rest", Trait.NONE, reduction="none"),
    # statistics over all but axis 1; with training they are of the batch, and weight folding is not exact
    K.BATCH_NORM: _kind("x weight? bias? mean? var?", _NORM | Trait.LINEAR_IN_INPUT, eps=1e-5, training=False),
    # over the dimensions from `axis` to the last
    K.LAYER_NORM: _kind("x weight? bias?", _NORM, axis=-1, eps=1e-5),
    # stash_type: a type narrower than x's in which r = 1 / √(mean(x²) + eps) is computed, and x·r too if `rounded`; the
    # weight then multiplies in the wider type of both. Empty where nothing is narrower.
    K.RMS_NORM: _kind("x weight?", _NORM, axis=-1, eps=1e-5, stash_type="", rounded=True),
    K.GROUP_NORM: _kind("x weight? bias?", _NORM, groups=1, eps=1e-5),
    K.INSTANCE_NORM: _kind("x weight? bias?", _NORM, eps=1e-5),
    K.LOCAL_RESPONSE_NORM: _kind(
        "x", Trait.WORK | Trait.NORM | Trait.SHAPE_PRESERVING, size=5, alpha=1e-4, beta=0.75, bias=1.0
    ),
    # x / a spread or length of x over `axes`, in an equation that none of the above is; what else the native nodes read
    # follows. centred: the mean is taken off.
    K.NORMALISE: _kind("x *constants", _NORM, axes=(), centred=False, eps=0.0),
    K.SOFTMAX: _kind("x", Trait.WORK | Trait.SHAPE_PRESERVING, axis=-1, log=False),
    K.MAX_POOL: _kind("x", _POOL, kernel=(), stride=(), pads=(), dilation=(), ceil_mode=False),
    K.AVG_POOL: _kind("x", _POOL, kernel=(), stride=(), pads=(), ceil_mode=False, count_include_pad=True),
    # output_size: one entry for each spatial dimension; (1, ...) is global average pooling
    K.ADAPTIVE_AVG_POOL: _kind("x", _POOL, output_size=()),
    K.INTERPOLATE: _kind("x", Trait.WORK, mode="nearest", align_corners=False),
    K.MEAN: _kind("x", Trait.WORK | Trait.REDUCTION, axes=(), keepdims=False),
    K.SUM: _kind("x", Trait.WORK | Trait.REDUCTION, axes=(), keepdims=False),
    K.AMAX: _kind("x", Trait.WORK | Trait.REDUCTION, axes=(), keepdims=False),
    K.AMIN: _kind("x", Trait.WORK | Trait.REDUCTION, axes=(), keepdims=False),
    K.PROD: _kind("x", Trait.WORK | Trait.REDUCTION, axes=(), keepdims=False),
    K.ARGMAX: _kind("x", Trait.WORK | Trait.REDUCTION, axes=(), keepdims=False),
    K.CUMSUM: _kind("x", Trait.WORK, axis=0),
    K.TOPK: _kind("x *rest", Trait.WORK, 2),
    K.FULL: _kind("*shape", Trait.SOURCE, value=0.0),
    K.ARANGE: _kind("*bounds", Trait.SOURCE, start=0, step=1),
    # axis None: all extents, as a vector; otherwise that one, as a scalar.
    K.SHAPE: _kind("x", Trait.SOURCE, axis=None),
    K.RANDOM: _kind("*x", Trait.SOURCE | Trait.RANDOM),
    # y = outer(residual + inner(conv(x) + bias))
    K.FUSED_CONV: _kind("x weight bias? residual?", _CONTRACTION | Trait.FUSED, **_CONV_ATTRS, **_EPILOGUE_ATTRS),
    # y = outer(residual + inner(x·weightᵀ + bias))
    K.FUSED_LINEAR: _kind(
        "x weight bias? residual?", _CONTRACTION | Trait.FUSED, transpose_weight=True, **_EPILOGUE_ATTRS
    ),
    # sum = x + residual; y = N(sum). Outputs: y, sum. norm: "layer" or "rms".
    K.ADD_NORM: _kind(
        "x residual weight? bias?",
        Trait.WORK | Trait.NORM | Trait.PARAMETRIC | Trait.FUSED,
        2,
        norm="layer",
        axis=-1,
        eps=1e-5,
    ),
    # Several operations in one, in any arrangement; see rescompile.fused_region. `label`: their kinds, for people.
    K.FUSED_REGION: _kind("*x", Trait.WORK | Trait.FUSED, 0, label="", steps=""),
    # works: False where it is known to move elements, to reduce, or to compute each alone
    K.OPAQUE: _kind("*x", Trait.WORK, 0, target="", works=True),
}
del K
for _spelled, _spec in KINDS.items():
    _spelled.bits = _spec.traits.value

# Activations that a fused kind can carry, by the name its `inner` and `outer` attributes use.
ACTIVATIONS: dict[str, tuple[OpKind, dict[str, object]] | None] = {
    "none": None,
    "relu": (OpKind.RELU, {}),
    "relu6": (OpKind.CLIP, {"min": 0.0, "max": 6.0}),
    "gelu": (OpKind.GELU, {"approximate": "none"}),
    "gelu_tanh": (OpKind.GELU, {"approximate": "tanh"}),
    "silu": (OpKind.SILU, {}),
    "sigmoid": (OpKind.SIGMOID, {}),
    "tanh": (OpKind.TANH, {}),
    "hardswish": (OpKind.HARDSWISH, {}),
}


def activation_name(kind: OpKind, attrs: dict[str, object]) -> str | None:
    """The name under which a fused kind can carry this activation, None when it cannot."""
    for name, entry in ACTIVATIONS.items():
        if entry is not None and entry[0] is kind and all(attrs.get(key) == value for key, value in entry[1].items()):
            return name
    return None
