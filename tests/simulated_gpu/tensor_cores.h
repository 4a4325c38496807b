// mma, ldmatrix and cp.async as generated kernels call them (TVM's helper functions, by name), on a processor.
//
// An instruction that is not here does not compile: nothing is passed over. A shared address is an offset from the start
// of dynamic shared memory, plus one page, so that a null is none. Copies of odd blocks happen when they are issued,
// those of even blocks when they are waited for: whoever reads too early or overwrites too early is seen in one of them.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <deque>

namespace gpu {

constexpr uint32_t shared_base = 4096;

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uchar*>(pointer) - shared()) + shared_base;
}

template <class T>
T* shared_pointer(uint32_t address) {
  return reinterpret_cast<T*>(shared() + (address - shared_base));
}

// ---- what a warp does together: each lane offers words, waits once, and reads what the others offered ---------------

constexpr int offered_words = 16;

struct Offers {
  uint32_t words[2][1024][offered_words];
  uint8_t turn[1024];
};
inline Offers offers;

inline uint32_t* offer() { return offers.words[offers.turn[running->number]][running->number]; }

// The offers of the lanes of one's warp; they last until the lane has waited twice more.
inline const uint32_t (*gathered())[offered_words] {
  const int thread = running->number, turn = offers.turn[thread];
  wait(Waits::Warp);
  offers.turn[thread] = 1 - turn;
  return &offers.words[turn][thread & ~31];
}

// ---- cp.async ---------------------------------------------------------------------------------------------------------

struct Copy {
  uint32_t to;
  uchar bytes[16];
  int size, group;
};

struct Copies {
  std::deque<Copy> pending;
  int groups = 0;
  Extents block;
};
inline Copies copies[1024];

inline Copies& copies_of_thread() {
  Copies& own = copies[running->number];
  if (own.block.x != block_index.x || own.block.y != block_index.y || own.block.z != block_index.z)
    own = Copies{{}, 0, block_index};
  return own;
}

inline void land(const Copy& copy) { std::memcpy(shared_pointer<uchar>(copy.to), copy.bytes, copy.size); }

inline void copy_async(uint32_t to, const void* from, int size, uint32_t read) {
  if (to % size || (read && reinterpret_cast<uintptr_t>(from) % size)) {
    std::fprintf(stderr, "cp.async of %d bytes to or from an address that they do not divide\n", size);
    std::abort();
  }
  Copies& own = copies_of_thread();
  Copy copy{to, {}, size, own.groups};
  if (read) std::memcpy(copy.bytes, from, read);
  if ((block_index.x + block_index.y + block_index.z) % 2)
    land(copy);
  else
    own.pending.push_back(copy);
}

inline void wait_copies(int but) {
  Copies& own = copies_of_thread();
  while (!own.pending.empty() && own.pending.front().group < own.groups - but) {
    land(own.pending.front());
    own.pending.pop_front();
  }
}

// ---- ldmatrix ---------------------------------------------------------------------------------------------------------

template <int Count, bool Transposed>
void load_matrices(uint32_t* out, uint32_t address) {
  *offer() = address;
  const auto all = gathered();
  const int lane = running->number & 31;
  for (int i = 0; i < Count; ++i) {
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const int row = Transposed ? lane % 4 * 2 + half : lane / 4, column = Transposed ? lane / 4 : lane % 4 * 2 + half;
      const uint32_t at = all[i * 8 + row][0];
      if (at % 16) std::abort();
      word |= static_cast<uint32_t>(shared_pointer<uint16_t>(at)[column]) << (16 * half);
    }
    out[i] = word;
  }
}

// ---- mma --------------------------------------------------------------------------------------------------------------

// tf32 keeps 10 bits after the point; the instruction does not look at the others.
inline float tf32_value(uint32_t word) { return float_of(word & 0xffffe000u); }

inline float narrow_value(uint32_t word, int half, bool brain) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  return brain ? bfloat_value(bits) : half_value(bits);
}

// D (16×8) = A (16×16)·B (16×8) + C; a lane's fragments as in the PTX manual, m16n8k16.
template <bool Brain>
void multiply_16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  float* own = reinterpret_cast<float*>(offer());
  for (int i = 0; i < 8; ++i) own[i] = narrow_value(a[i / 2], i % 2, Brain);
  for (int i = 0; i < 4; ++i) own[8 + i] = narrow_value(b[i / 2], i % 2, Brain);
  const auto all = reinterpret_cast<const float(*)[offered_words]>(gathered());
  const int lane = running->number & 31, group = lane / 4 * 4;
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2, low = i / 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const float* left = all[group + k % 8 / 2];
      sum += left[(k / 8 * 2 + low) * 2 + k % 2] * all[column * 4 + k % 8 / 2][8 + k / 8 * 2 + k % 2];
    }
    d[i] = sum;
  }
}

// D (16×8) = A (16×8)·B (8×8) + C in tf32.
inline void multiply_8(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  float* own = reinterpret_cast<float*>(offer());
  for (int i = 0; i < 4; ++i) own[i] = tf32_value(a[i]);
  for (int i = 0; i < 2; ++i) own[8 + i] = tf32_value(b[i]);
  const auto all = reinterpret_cast<const float(*)[offered_words]>(gathered());
  const int lane = running->number & 31, group = lane / 4 * 4;
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 8; ++k) sum += all[group + k % 4][k / 4 * 2 + i / 2] * all[column * 4 + k % 4][8 + k / 4];
    d[i] = sum;
  }
}

}  // namespace gpu

#ifndef GPU_SHARED_ADDRESS
#define GPU_SHARED_ADDRESS
inline uint tvm_builtin_cuda_cvta_generic_to_shared(const void* pointer) { return gpu::shared_address(pointer); }
#endif

#define GPU_COPY(cache, size)                                                                                        \
  inline void tvm_builtin_ptx_cp_async_##cache##_src_size_async_##cache##_shared_global_##size(                      \
      uint32_t to, const void* from, uint32_t read) {                                                                \
    gpu::copy_async(to, from, size, read);                                                                           \
  }                                                                                                                  \
  inline void tvm_builtin_ptx_cp_async_##cache##_async_##cache##_shared_global_##size(uint32_t to, const void* from) { \
    gpu::copy_async(to, from, size, size);                                                                           \
  }
GPU_COPY(cg, 16)
GPU_COPY(ca, 8)
GPU_COPY(ca, 4)
#undef GPU_COPY
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() { ++gpu::copies_of_thread().groups; }
#define GPU_WAIT(count) \
  inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##count() { gpu::wait_copies(count); }
GPU_WAIT(0)
GPU_WAIT(1)
GPU_WAIT(2)
GPU_WAIT(3)
#undef GPU_WAIT

#define GPU_LDMATRIX(kind, transposed)                                                                                \
  inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_##kind(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, \
                                                                   uint32_t address) {                                \
    uint32_t out[4];                                                                                                  \
    gpu::load_matrices<4, transposed>(out, address);                                                                  \
    a = out[0], b = out[1], c = out[2], d = out[3];                                                                   \
  }                                                                                                                   \
  inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x2_##kind(uint32_t& a, uint32_t& b, uint32_t address) {       \
    uint32_t out[2];                                                                                                  \
    gpu::load_matrices<2, transposed>(out, address);                                                                  \
    a = out[0], b = out[1];                                                                                           \
  }
GPU_LDMATRIX(shared_b16, false)
GPU_LDMATRIX(trans_shared_b16, true)
#undef GPU_LDMATRIX

#define GPU_MMA(name, ...)                                                                                            \
  inline void tvm_builtin_ptx_mma_sync_aligned_##name(                                                                \
      float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,    \
      uint32_t b1, float c0, float c1, float c2, float c3) {                                                          \
    float d[4];                                                                                                       \
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                                          \
    const float c[4] = {c0, c1, c2, c3};                                                                              \
    __VA_ARGS__(d, a, b, c);                                                                                          \
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];                                                                       \
  }
GPU_MMA(m16n8k16_row_col_f32_f16_f16_f32, gpu::multiply_16<false>)
GPU_MMA(m16n8k16_row_col_f32_bf16_bf16_f32, gpu::multiply_16<true>)
GPU_MMA(m16n8k8_row_col_f32_tf32_tf32_f32, gpu::multiply_8)
#undef GPU_MMA

// To nearest, ties away from zero.
inline void tvm_builtin_ptx_cvt_tf32_f32_rna_tf32_f32(uint32_t& out, float x) {
  const uint32_t bits = gpu::bits_of(x);
  out = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + 0x1000u & 0xffffe000u;
}

inline void tvm_builtin_cuda_warp_sync() { __syncwarp(); }
inline void tvm_builtin_ptx_st_vec_shared_v2_f32(uint32_t to, float x, float y) {
  if (to % 8) std::abort();
  gpu::shared_pointer<float>(to)[0] = x, gpu::shared_pointer<float>(to)[1] = y;
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_f32(float& x, float& y, float& z, float& w, uint32_t from) {
  if (from % 16) std::abort();
  const float* p = gpu::shared_pointer<float>(from);
  x = p[0], y = p[1], z = p[2], w = p[3];
}
inline void tvm_builtin_ptx_ld_vec_shared_v2_f32(float& x, float& y, uint32_t from) {
  if (from % 8) std::abort();
  x = gpu::shared_pointer<float>(from)[0], y = gpu::shared_pointer<float>(from)[1];
}
inline void tvm_builtin_ptx_ld_shared_f32(float& x, uint32_t from) { x = *gpu::shared_pointer<float>(from); }
inline void tvm_builtin_ptx_ld_shared_b32(uint32_t& x, uint32_t from) { x = *gpu::shared_pointer<uint32_t>(from); }
inline void tvm_builtin_ptx_st_shared_b16(uint32_t to, uint16_t x) { *gpu::shared_pointer<uint16_t>(to) = x; }
inline void tvm_builtin_ptx_st_shared_b32(uint32_t to, uint32_t x) {
  if (to % 4) std::abort();
  *gpu::shared_pointer<uint32_t>(to) = x;
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_b32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t from) {
  if (from % 16) std::abort();
  const uint32_t* p = gpu::shared_pointer<uint32_t>(from);
  x = p[0], y = p[1], z = p[2], w = p[3];
}
inline void tvm_builtin_ptx_st_vec_global_v4_b32(const void* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
  const uint32_t words[4] = {x, y, z, w};
  std::memcpy(const_cast<void*>(to), words, 16);
}
// Two numbers in a word, the second operand in its lower half.
inline void tvm_builtin_ptx_cvt_f16x2_f32_rn_f16x2_f32(uint32_t& out, float high, float low) {
  out = static_cast<uint32_t>(gpu::half_bits(high)) << 16 | gpu::half_bits(low);
}
inline void tvm_builtin_ptx_cvt_bf16x2_f32_rn_bf16x2_f32(uint32_t& out, float high, float low) {
  out = static_cast<uint32_t>(gpu::bfloat_bits(high)) << 16 | gpu::bfloat_bits(low);
}
