"""Vectors of booleans in CUDA source: TVM 0.27 reads and writes them as vectors of shorts, at twice their distance."""

from __future__ import annotations

import re

_ACCESS = re.compile(r"\*\(ushort([234])\*\)\(")
_BOOLEANS = re.compile(r"\bbool\s*\*|\bbool \w+\[")
_KERNELS = 'extern "C" __global__'

# A place of booleans that reads and writes as a vector of shorts; other pointers are what TVM takes them for.
_PLACES = """template <class V, int N> struct Booleans {
  bool* at;
  __device__ __forceinline__ operator V() const {
    V v; unsigned short* to = reinterpret_cast<unsigned short*>(&v);
    for (int i = 0; i < N; ++i) to[i] = at[i];
    return v;
  }
  __device__ __forceinline__ Booleans& operator=(V v) {
    const unsigned short* from = reinterpret_cast<const unsigned short*>(&v);
    for (int i = 0; i < N; ++i) at[i] = from[i] != 0;
    return *this;
  }
};
template <class V, int N, class T> __device__ __forceinline__ V& shorts_at(T* at) { return *reinterpret_cast<V*>(at); }
template <class V, int N> __device__ __forceinline__ Booleans<V, N> shorts_at(bool* at) { return Booleans<V, N>{at}; }
"""


def corrected(source: str) -> str:
    """The source with vectors of booleans read and written one by one; itself where it has none."""
    start = source.find(_KERNELS)
    body = source[start:]
    if start < 0 or "shorts_at" in source or not _BOOLEANS.search(body) or not _ACCESS.search(body):
        return source
    return source[:start] + _PLACES + _ACCESS.sub(r"shorts_at<ushort\1, \1>(", body)
