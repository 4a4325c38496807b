// CUDA C++ as far as generated kernels use it, on a processor: for tests of numbers, not of speed.
//
// The threads of a block are fibers that run one after the other until each waits: at __syncthreads for its block, at a
// shuffle or a tensor-core store for its warp, for a condition. Blocks run one after the other, those of a cluster
// together. Tensor-core fragments live in lane 0. What is wrong, a deadlock among it, ends the process with a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define CUDART_INF_F INFINITY

namespace gpu {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// IEEE binary16, to nearest even, subnormals kept.
inline uint16_t half_bits(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u)  // the result is subnormal: a multiple of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyintf(float_of(magnitude) * 16777216.0f));
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline float half_value(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, fraction = h & 0x3ffu;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) / 16777216.0f, float_of(sign | 0x3f800000u));
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

inline uint16_t bfloat_bits(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float bfloat_value(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

template <uint16_t (*Narrow)(float), float (*Widen)(uint16_t)>
struct Short {
  uint16_t bits;
  Short() = default;
  Short(float x) : bits(Narrow(x)) {}
  Short(double x) : bits(Narrow(static_cast<float>(x))) {}
  Short(int x) : bits(Narrow(static_cast<float>(x))) {}
  operator float() const { return Widen(bits); }
};

}  // namespace gpu

typedef gpu::Short<gpu::half_bits, gpu::half_value> half;
typedef gpu::Short<gpu::bfloat_bits, gpu::bfloat_value> nv_bfloat16;
typedef half __half;
typedef nv_bfloat16 __nv_bfloat16;

#define GPU_VECTOR(type, name, bytes)                                                                \
  struct alignas(2 * (bytes)) name##2 { type x, y; };                                                \
  struct name##3 { type x, y, z; };                                                                  \
  struct alignas(4 * (bytes) > 16 ? 16 : 4 * (bytes)) name##4 { type x, y, z, w; };                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                   \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
GPU_VECTOR(int, int, 4)
GPU_VECTOR(uint, uint, 4)
GPU_VECTOR(float, float, 4)
GPU_VECTOR(short, short, 2)
GPU_VECTOR(ushort, ushort, 2)
GPU_VECTOR(signed char, char, 1)
GPU_VECTOR(uchar, uchar, 1)
GPU_VECTOR(half, half, 2)
GPU_VECTOR(nv_bfloat16, nv_bfloat16, 2)
GPU_VECTOR(long long, longlong, 8)
GPU_VECTOR(double, double, 8)
#undef GPU_VECTOR

inline uint __pack_half2(half x, half y) { return (static_cast<uint>(y.bits) << 16) | x.bits; }
inline uint __pack_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return (static_cast<uint>(y.bits) << 16) | x.bits; }
inline float __half2float(half x) { return x; }
inline half __float2half(float x) { return x; }
inline half __float2half_rn(float x) { return x; }
inline float __bfloat162float(nv_bfloat16 x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return x; }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

using std::max;
using std::min;
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
// Device functions of generated kernels that are one instruction each: the larger number, NaN if either is.
inline float larger_f32(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
template <class T>
uint larger_pair(uint a, uint b) {
  uint out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    T x, y;
    x.bits = static_cast<uint16_t>(a >> shift), y.bits = static_cast<uint16_t>(b >> shift);
    out |= static_cast<uint>(T(larger_f32(x, y)).bits) << shift;
  }
  return out;
}
inline uint larger_f16x2(uint a, uint b) { return larger_pair<half>(a, b); }
inline uint larger_bf16x2(uint a, uint b) { return larger_pair<nv_bfloat16>(a, b); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }

namespace gpu {

struct Extents {
  int x, y, z;
};

enum class Waits { Nothing, Warp, Block, Condition, Done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Waits waits;
  std::function<bool()> ready;  // of a fiber that waits for a condition
  Extents index, block;
  int number;  // in its cluster
  int cta;     // its block in the cluster
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* running;
inline Extents block_index, block_size, grid_size;
inline std::vector<uint64_t> exchange;  // what each thread offers in a shuffle
inline std::vector<std::vector<uint64_t>> dynamic_shared;  // of each block of the cluster
inline std::size_t shared_bytes;  // that a launch asked for
inline std::function<void()> kernel;
// What a part of the simulator does before each cluster, when nobody can go on (true: something), and after the last.
struct Engine {
  void (*begin)();
  bool (*idle)();
  void (*end)();
};
inline Engine engine{nullptr, nullptr, nullptr};

constexpr std::size_t stack_bytes = 128 << 10;

inline void wait(Waits what) {
  running->waits = what;
  swapcontext(&running->context, &scheduler);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simulated GPU: %s\n", what);
  std::abort();
}

inline void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  running->ready = std::move(condition);
  wait(Waits::Condition);
}

inline void enter() {
  kernel();
  wait(Waits::Done);
}

// Runs until nobody can go on; a warp that waits for itself goes on before a block that waits for all of its warps, and
// both before what is under way on its own, such as a copy, moves on.
inline void run_cluster(const std::vector<Extents>& blocks) {
  const int each = block_size.x * block_size.y * block_size.z, threads = each * static_cast<int>(blocks.size());
  if (static_cast<int>(fibers.size()) < threads) {
    fibers.resize(threads);
    for (Fiber& fiber : fibers)
      if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
  }
  exchange.assign(threads, 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    const int own = i % each;
    fiber.number = i;
    fiber.cta = i / each;
    fiber.block = blocks[fiber.cta];
    fiber.index = {own % block_size.x, own / block_size.x % block_size.y, own / (block_size.x * block_size.y)};
    fiber.waits = Waits::Nothing;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  auto release = [threads](Waits what) {
    bool any = false;
    for (int i = 0; i < threads; ++i)
      if (fibers[i].waits == what && (what != Waits::Condition || fibers[i].ready()))
        fibers[i].waits = Waits::Nothing, any = true;
    return any;
  };
  if (engine.begin) engine.begin();
  do {
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].waits != Waits::Nothing) continue;
      running = &fibers[i];
      block_index = running->block;
      swapcontext(&scheduler, &running->context);
    }
  } while (release(Waits::Condition) || release(Waits::Warp) || release(Waits::Block) ||
           (engine.idle && engine.idle()));
  for (int i = 0; i < threads; ++i)
    if (fibers[i].waits != Waits::Done) fail("deadlock: a thread waits for what never happens");
  if (engine.end) engine.end();
}

// dims: the grid, a block, and how many blocks along x run together.
inline void launch(const unsigned* dims, std::size_t dynamic_bytes) {
  shared_bytes = dynamic_bytes;
  const int cluster = static_cast<int>(dims[6]);
  grid_size = {static_cast<int>(dims[0]), static_cast<int>(dims[1]), static_cast<int>(dims[2])};
  block_size = {static_cast<int>(dims[3]), static_cast<int>(dims[4]), static_cast<int>(dims[5])};
  for (int z = 0; z < grid_size.z; ++z)
    for (int y = 0; y < grid_size.y; ++y)
      for (int x = 0; x < grid_size.x; x += cluster) {
        // Shared memory begins as garbage on a GPU: here as NaN, so that reading it unwritten shows.
        dynamic_shared.assign(cluster, std::vector<uint64_t>(shared_bytes / 8 + 8, ~uint64_t{0}));
        std::vector<Extents> blocks;
        for (int i = 0; i < cluster; ++i) blocks.push_back({x + i, y, z});
        run_cluster(blocks);
      }
}

inline uchar* shared(int cta) {
  const auto address = reinterpret_cast<uintptr_t>(dynamic_shared[cta].data());
  return reinterpret_cast<uchar*>((address + 63) / 64 * 64 <= address + 56 ? (address + 63) / 64 * 64 : address);
}

inline uchar* shared() { return shared(running->cta); }

template <class T>
T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 64 bits");
  const int base = running->number & ~31;
  std::memcpy(&exchange[running->number], &value, sizeof(T));
  wait(Waits::Warp);
  T out;
  std::memcpy(&out, &exchange[base + (lane & 31)], sizeof(T));
  wait(Waits::Warp);
  return out;
}

inline int lane() { return running->number & 31; }

}  // namespace gpu

#define threadIdx (gpu::running->index)
#define blockIdx (gpu::block_index)
#define blockDim (gpu::block_size)
#define gridDim (gpu::grid_size)

// What the blocks of a cluster share: they wait for each other as the threads of a block do, when nobody can go on.
inline void cluster_meet() { gpu::wait(gpu::Waits::Block); }
template <class T>
T peer(T* place, int rank) {
  T value;
  std::memcpy(&value, gpu::shared(rank) + (reinterpret_cast<uchar*>(place) - gpu::shared()), sizeof(T));
  return value;
}
inline float peer_f32(float* place, int rank) { return peer(place, rank); }
inline double peer_f64(double* place, int rank) { return peer(place, rank); }

inline uint __activemask() { return 0xffffffffu; }
inline void __syncthreads() { gpu::wait(gpu::Waits::Block); }
inline void __syncwarp(uint = 0xffffffffu) { gpu::wait(gpu::Waits::Warp); }

template <class T>
T __shfl_sync(uint, T value, int source, int width = 32) {
  return gpu::from_lane(value, gpu::lane() / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(uint, T value, int mask, int = 32) {
  return gpu::from_lane(value, gpu::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(uint, T value, int delta, int width = 32) {
  const int lane = gpu::lane();
  return gpu::from_lane(value, lane % width + delta < width ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(uint, T value, int delta, int width = 32) {
  const int lane = gpu::lane();
  return gpu::from_lane(value, lane % width >= delta ? lane - delta : lane);
}

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  T values[16][16];  // as [row][column] of the matrix, whatever its layout in memory; of lane 0 only
};

template <class Use, class T, class Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& out, float value) {
  if (gpu::lane() == 0)
    for (auto& row : out.values)
      for (T& element : row) element = value;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& out, const T* from, unsigned stride) {
  constexpr bool rows = std::is_same<Layout, row_major>::value;
  if (gpu::lane() == 0)
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) out.values[i][j] = rows ? from[i * stride + j] : from[j * stride + i];
}

template <class T, class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& out, const fragment<matrix_a, 16, 16, 16, T, A>& a,
              const fragment<matrix_b, 16, 16, 16, T, B>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  if (gpu::lane() != 0) return;
  float left[16][16], right[16][16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) left[i][j] = a.values[i][j], right[i][j] = b.values[i][j];
  for (int i = 0; i < 16; ++i) {
    float sums[16];
    for (int j = 0; j < 16; ++j) sums[j] = c.values[i][j];
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sums[j] += left[i][k] * right[k][j];
    for (int j = 0; j < 16; ++j) out.values[i][j] = sums[j];
  }
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride,
                              layout_t) {
  gpu::wait(gpu::Waits::Warp);
  if (gpu::lane() == 0)
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) to[i * stride + j] = from.values[i][j];
  gpu::wait(gpu::Waits::Warp);
}

}  // namespace nvcuda::wmma
