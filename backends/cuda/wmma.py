"""Descriptions of the tensor cores' 16×16×16 product to TVM's `tensorize`: load, fill, multiply, store.

TVM has its own, in `tvm.s_tir.tensor_intrin`, which also describes what no kernel here uses, in script that it parses
when it is imported: half a minute of a compile that takes seconds. These six take a tenth of a second.
"""

from __future__ import annotations

import tvm
from tvm import s_tir
from tvm.script import tirx as T

SIDE = 16  # of the three extents of one product
_SHARED = "shared.dyn"
_REGISTERED: set[str] = set()

_SCRIPT = {
    "load_desc": """@T.prim_func(s_tir=True)
def load_desc(a: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (16, 16), dtype, align=64, offset_factor=16, scope=shared)
    C = T.match_buffer(c, (16, 16), dtype, align=64, offset_factor=16, scope=fragment)
    with T.sblock("root"):
        T.reads(A[0:16, 0:16])
        T.writes(C[0:16, 0:16])
        for i, j in T.grid(16, 16):
            with T.sblock("load"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = A[vi, vj]
""",
    "load_impl": """@T.prim_func(s_tir=True)
def load_impl(a: T.handle, c: T.handle) -> None:
    s1 = T.int32()
    s0 = T.int32()
    d1 = T.int32()
    d0 = T.int32()
    A = T.match_buffer(a, (16, 16), dtype, align=64, offset_factor=16, scope=shared, strides=[s1, s0])
    C = T.match_buffer(c, (16, 16), dtype, align=64, offset_factor=16, scope=fragment, strides=[d1, d0])
    with T.sblock("root"):
        T.reads(A[0:16, 0:16])
        T.writes(C[0:16, 0:16])
        T.evaluate(T.tvm_load_matrix_sync(C.data, 16, 16, 16,
            C.elem_offset // d1 // 16 * (d1 // 16) + C.elem_offset % d1 // 16,
            A.access_ptr("r", ptr_type=dtype), s1, layout, dtype="void"))
""",
    "fill_desc": """@T.prim_func(s_tir=True)
def fill_desc(c: T.handle) -> None:
    C = T.match_buffer(c, (16, 16), "float32", align=64, offset_factor=16, scope="wmma.accumulator")
    with T.sblock("root"):
        T.reads()
        T.writes(C[0:16, 0:16])
        for i, j in T.grid(16, 16):
            with T.sblock("fill"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = T.float32(0)
""",
    "fill_impl": """@T.prim_func(s_tir=True)
def fill_impl(c: T.handle) -> None:
    d1 = T.int32()
    d0 = T.int32()
    C = T.match_buffer(c, (16, 16), "float32", align=64, offset_factor=16, scope="wmma.accumulator", strides=[d1, d0])
    with T.sblock("root"):
        T.reads()
        T.writes(C[0:16, 0:16])
        T.evaluate(T.tvm_fill_fragment(C.data, 16, 16, 16,
            C.elem_offset // d1 // 16 * (d1 // 16) + C.elem_offset % d1 // 16, T.float32(0), dtype="void"))
""",
    "store_desc": """@T.prim_func(s_tir=True)
def store_desc(a: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (16, 16), "float32", align=64, offset_factor=16, scope="wmma.accumulator")
    C = T.match_buffer(c, (16, 16), "float32", align=64, offset_factor=16, scope=shared)
    with T.sblock("root"):
        T.reads(A[0:16, 0:16])
        T.writes(C[0:16, 0:16])
        for i, j in T.grid(16, 16):
            with T.sblock("store"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = A[vi, vj]
""",
    "store_impl": """@T.prim_func(s_tir=True)
def store_impl(a: T.handle, c: T.handle) -> None:
    s1 = T.int32()
    s0 = T.int32()
    d1 = T.int32()
    d0 = T.int32()
    A = T.match_buffer(a, (16, 16), "float32", align=64, offset_factor=16, scope="wmma.accumulator", strides=[d1, d0])
    C = T.match_buffer(c, (16, 16), "float32", align=64, offset_factor=16, scope=shared, strides=[s1, s0])
    with T.sblock("root"):
        T.reads(A[0:16, 0:16])
        T.writes(C[0:16, 0:16])
        T.evaluate(T.tvm_store_matrix_sync(A.data, 16, 16, 16,
            A.elem_offset // d1 // 16 * (d1 // 16) + A.elem_offset % d1 // 16,
            C.access_ptr("w", ptr_type="float32"), s1, "row_major", dtype="void"))
""",
    "multiply_desc": """@T.prim_func(s_tir=True)
def multiply_desc(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (16, 16), dtype, align=64, offset_factor=16, scope="wmma.matrix_a")
    B = T.match_buffer(b, (16, 16), dtype, align=64, offset_factor=16, scope="wmma.matrix_b")
    C = T.match_buffer(c, (16, 16), "float32", align=64, offset_factor=16, scope="wmma.accumulator")
    with T.sblock("root"):
        T.reads(C[0:16, 0:16], A[0:16, 0:16], B[0:16, 0:16])
        T.writes(C[0:16, 0:16])
        for i, j, k in T.grid(16, 16, 16):
            with T.sblock(""):
                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                C[vi, vj] = C[vi, vj] + T.Cast("float32", A[@A@]) * T.Cast("float32", B[@B@])
""",
    "multiply_impl": """@T.prim_func(s_tir=True)
def multiply_impl(a: T.handle, b: T.handle, c: T.handle) -> None:
    a1 = T.int32()
    a0 = T.int32()
    b1 = T.int32()
    b0 = T.int32()
    c1 = T.int32()
    c0 = T.int32()
    A = T.match_buffer(a, (16, 16), dtype, align=64, offset_factor=16, scope="wmma.matrix_a", strides=[a1, a0])
    B = T.match_buffer(b, (16, 16), dtype, align=64, offset_factor=16, scope="wmma.matrix_b", strides=[b1, b0])
    C = T.match_buffer(c, (16, 16), "float32", align=64, offset_factor=16, scope="wmma.accumulator", strides=[c1, c0])
    with T.sblock("root"):
        T.reads(C[0:16, 0:16], A[0:16, 0:16], B[0:16, 0:16])
        T.writes(C[0:16, 0:16])
        T.evaluate(T.tvm_mma_sync(
            C.data, C.elem_offset // c1 // 16 * (c1 // 16) + C.elem_offset % c1 // 16,
            A.data, A.elem_offset // a1 // 16 * (a1 // 16) + A.elem_offset % a1 // 16,
            B.data, B.elem_offset // b1 // 16 * (b1 // 16) + B.elem_offset % b1 // 16,
            C.data, C.elem_offset // c1 // 16 * (c1 // 16) + C.elem_offset % c1 // 16, dtype="void"))
""",
}


def intrinsics(dtype: str, sum_last: tuple[bool, bool]) -> dict[str, str]:
    """Names of the tensor intrinsics for operands of float16 or bfloat16, sums in float32.

    `sum_last` says of a and of b whether the summed axis is the last one: a[i, k] or a[k, i], b[j, k] or b[k, j].
    Keys: load_a, load_b, fill, multiply, store.
    """
    a_last, b_last = sum_last
    scripts: dict[str, tuple[str, str, dict[str, str]]] = {
        "load_a": ("load", f"a{int(a_last)}", _fragment("a", rows=a_last)),
        "load_b": ("load", f"b{int(b_last)}", _fragment("b", rows=not b_last)),
        "multiply": ("multiply", f"a{int(a_last)}b{int(b_last)}", {}),
        "fill": ("fill", "", {}),
        "store": ("store", "", {}),
    }
    names = {}
    for part, (script, variant, values) in scripts.items():
        names[part] = f"rescompile.wmma.{script}.{variant}.{dtype}"
        if names[part] in _REGISTERED:
            continue
        given = {"T": T, "dtype": dtype, "shared": _SHARED, **values}
        indices = {"@A@": "vi, vk" if a_last else "vk, vi", "@B@": "vj, vk" if b_last else "vk, vj"}
        description, implementation = (
            tvm.script.from_source(_filled(_SCRIPT[f"{script}_{form}"], indices), extra_vars=given)
            for form in ("desc", "impl")
        )
        s_tir.TensorIntrin.register(names[part], description, implementation, override=True)
        _REGISTERED.add(names[part])
    return names


def _fragment(operand: str, *, rows: bool) -> dict[str, str]:
    return {"fragment": f"wmma.matrix_{operand}", "layout": "row_major" if rows else "col_major"}


def _filled(script: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        script = script.replace(key, value)
    return script
