// TMA, mbarrier and wgmma as generated kernels call them (TVM's helper functions, by name), on a processor.
//
// What is asynchronous happens as late as it may: a copy when no thread can go on, the youngest first, a wgmma when it is
// waited for. So data that is read, or memory that is overwritten, too early gives a wrong number, a barrier that never
// completes a deadlock. What the PTX manual forbids and a GPU would not notice ends the process with a message.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <tuple>

#include "tensor_cores.h"
#include "tensor_map.h"

namespace gpu {

using Place = std::pair<int, uint32_t>;  // a block of the cluster, an address in its shared memory

inline uchar* shared_at(Place place) {
  const std::size_t at = place.second - shared_base;
  if (at >= shared_bytes) fail("an access outside of the shared memory that the launch asked for");
  return shared(place.first) + at;
}

// ---- mbarrier ---------------------------------------------------------------------------------------------------------

struct Barrier {
  int count, pending;
  int64_t bytes;
  unsigned phase;
};
inline std::map<Place, Barrier> barriers;
inline bool published;  // since the last mbarrier.init a fence has made them known to the copy engine
constexpr uint64_t barrier_mark = 0x6d62617272696572;

inline Barrier& barrier_at(Place place) {
  const auto found = barriers.find(place);
  uint64_t mark = 0;
  if (found != barriers.end()) std::memcpy(&mark, shared_at(place), 8);
  if (mark == barrier_mark) return found->second;
  fail(found == barriers.end() ? "an mbarrier that nobody initialised" : "an mbarrier whose memory was overwritten");
}

inline Place here(uint32_t address) { return {running->cta, address}; }

// An address of the cluster's window, as mapa makes it: the rank above the 24 bits of a block's own.
inline Place in_cluster(uint32_t address) {
  return {address >> 24 ? static_cast<int>(address >> 24) - 1 : running->cta, address & 0xffffff};
}

inline void settle(Barrier& barrier) {
  if (barrier.pending < 0) fail("more arrivals at an mbarrier than its phase expects");
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
}

inline void init_barrier(uint32_t address, uint32_t count) {
  if (address % 8) fail("an mbarrier that is not aligned to 8 bytes");
  barriers[here(address)] = {static_cast<int>(count), static_cast<int>(count), 0, 0};
  std::memcpy(shared_at(here(address)), &barrier_mark, 8);
  published = false;
}

inline void arrive(Place place, int count, int64_t bytes = 0) {
  Barrier& barrier = barrier_at(place);
  barrier.bytes += bytes;
  barrier.pending -= count;
  settle(barrier);
}

inline void wait_barrier(uint32_t address, int parity) {
  const Place place = here(address);
  barrier_at(place);
  wait_until([place, parity] { return barrier_at(place).phase != static_cast<unsigned>(parity & 1); });
}

// ---- TMA --------------------------------------------------------------------------------------------------------------

struct BoxCopy {
  CUtensorMap map;
  std::vector<Place> to, barrier;
  std::array<int, 5> at;
};
inline std::vector<BoxCopy> box_copies;

inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void land(const BoxCopy& copy) {
  const CUtensorMap& map = copy.map;
  uint32_t offset = 0;
  std::array<int, 5> i{};
  for (;;) {
    int64_t source = 0;
    bool inside = true;
    for (int axis = 0; axis < map.rank; ++axis) {
      const int64_t index = int64_t{copy.at[axis]} + i[axis] * map.steps[axis];
      inside = inside && index >= 0 && index < static_cast<int64_t>(map.extents[axis]);
      source += index * static_cast<int64_t>(axis ? map.strides[axis - 1] : map.element_bytes);
    }
    for (const Place& to : copy.to) {
      uchar* target = shared_at({to.first, swizzled(to.second + offset)});
      if (inside)
        std::memcpy(target, reinterpret_cast<const uchar*>(map.address) + source, map.element_bytes);
      else
        std::memset(target, 0, map.element_bytes);
    }
    offset += map.element_bytes;
    int axis = 0;
    while (axis < map.rank && ++i[axis] == map.box[axis]) i[axis++] = 0;
    if (axis == map.rank) break;
  }
  for (const Place& place : copy.barrier) {
    Barrier& barrier = barrier_at(place);
    barrier.bytes -= offset;
    settle(barrier);
  }
}

inline void load_box(uint32_t to, const void* map, std::array<int, 5> at, int rank, uint32_t barrier, int mask = 0) {
  BoxCopy copy{*static_cast<const CUtensorMap*>(map), {}, {}, at};
  if (copy.map.magic != tensor_map_magic) fail("a TMA copy by what is no tensor map");
  if (copy.map.rank != rank) fail("a TMA copy of another rank than its tensor map's");
  if (to % 1024) fail("a box with 128-byte swizzle that does not begin on a boundary of 1,024 bytes");
  if (!published) fail("a TMA copy for an mbarrier that no fence.mbarrier_init made known");
  for (int cta = 0; cta < 16; ++cta)
    if (mask ? mask >> cta & 1 : cta == running->cta) {
      if (cta >= static_cast<int>(dynamic_shared.size())) fail("a TMA copy to a block that the cluster does not have");
      copy.to.push_back({cta, to});
      copy.barrier.push_back({cta, barrier});
    }
  box_copies.push_back(copy);
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------

struct Product {  // of a warpgroup: the operands, and what all of its threads add to their sums
  uint64_t a, b;
  int columns;
  bool brain, turn_a, turn_b, keep;
  std::vector<float> values;  // 64 × columns, once computed
  int left = 128;
  bool same(const Product& o) const {
    return a == o.a && b == o.b && columns == o.columns && turn_a == o.turn_a && turn_b == o.turn_b && keep == o.keep;
  }
};

struct Warpgroup {
  std::deque<Product> products;
  long first = 0;  // number of the oldest
};

struct Issued {
  long number;
  int group;
  std::vector<float*> sums;
};

struct Multiplier {  // of a thread
  std::deque<Issued> issued;
  long count = 0;
  int groups = 0;
  bool fenced = false;
};
inline std::vector<Warpgroup> warpgroups;
inline std::vector<Multiplier> multipliers;

// Element (row, term) of a matrix that a descriptor names; `turned`: rows are innermost (PTX, Matrix Descriptor Format,
// Strides, and the canonical layouts of 128-byte swizzle).
inline float element(int cta, uint64_t descriptor, bool turned, bool brain, int row, int term) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t at = turned ? row / 64 * leading + row % 64 * 2 + term / 8 * stride + term % 8 * 128
                             : row / 8 * stride + row % 8 * 128 + term * 2;
  uint16_t bits;
  std::memcpy(&bits, shared_at({cta, swizzled(start + at)}), 2);
  return brain ? bfloat_value(bits) : half_value(bits);
}

inline void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("a matrix descriptor without 128-byte swizzle");
  if (descriptor >> 49 & 7 || (descriptor << 4) & 0x380)
    fail("a matrix descriptor that begins inside an atom of the swizzle, without a base offset");
}

inline void compute(Product& product, int cta) {
  std::vector<float> a(64 * 16), b(product.columns * 16);
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < 16; ++k) a[i * 16 + k] = element(cta, product.a, product.turn_a, product.brain, i, k);
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < product.columns; ++j)
      b[k * product.columns + j] = element(cta, product.b, product.turn_b, product.brain, j, k);
  product.values.assign(64 * product.columns, 0.0f);
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < product.columns; ++j)
        product.values[i * product.columns + j] += a[i * 16 + k] * b[k * product.columns + j];
}

inline void multiply(const std::vector<float*>& sums, uint64_t a, uint64_t b, bool keep, bool brain, bool turn_a,
                     bool turn_b) {
  Multiplier& own = multipliers[running->number];
  Warpgroup& group = warpgroups[running->number / 128];
  if (!own.fenced) fail("a wgmma without wgmma.fence after its registers were free to be used");
  check_descriptor(a);
  check_descriptor(b);
  const Product product{a, b, static_cast<int>(sums.size()) * 2, brain, turn_a, turn_b, keep, {}};
  const long number = own.count++;
  if (number - group.first == static_cast<long>(group.products.size())) group.products.push_back(product);
  if (!group.products[number - group.first].same(product)) fail("threads of a warpgroup issue different wgmmas");
  own.issued.push_back({number, own.groups, sums});
}

inline void await_products(int pending) {
  Multiplier& own = multipliers[running->number];
  Warpgroup& group = warpgroups[running->number / 128];
  const int thread = running->number % 128, row = thread / 32 * 16 + thread % 32 / 4;
  while (!own.issued.empty() && own.issued.front().group < own.groups - pending) {
    const Issued& issued = own.issued.front();
    Product& product = group.products[issued.number - group.first];
    if (product.values.empty()) compute(product, running->cta);
    for (int i = 0; i < static_cast<int>(issued.sums.size()); ++i) {
      const float value = product.values[(row + i / 2 % 2 * 8) * product.columns + i / 4 * 8 + thread % 4 * 2 + i % 2];
      *issued.sums[i] = product.keep ? *issued.sums[i] + value : value;
    }
    --product.left;
    own.issued.pop_front();
    while (!group.products.empty() && group.products.front().left == 0) group.products.pop_front(), ++group.first;
  }
  if (pending == 0) own.fenced = false;
}

template <class Tuple, std::size_t... I>
std::vector<float*> addresses(Tuple& all, std::index_sequence<I...>) {
  return {&std::get<I>(all)...};
}

// sums..., a, b, whether to keep the sums
template <bool Brain, bool TurnA, bool TurnB, class... Arguments>
void multiply_all(Arguments&&... arguments) {
  constexpr std::size_t sums = sizeof...(arguments) - 3;
  auto all = std::forward_as_tuple(arguments...);
  multiply(addresses(all, std::make_index_sequence<sums>()), std::get<sums>(all), std::get<sums + 1>(all),
           std::get<sums + 2>(all), Brain, TurnA, TurnB);
}

// ---- the block --------------------------------------------------------------------------------------------------------

inline const Engine hopper_engine{
    [] {
      barriers.clear();
      box_copies.clear();
      published = false;
      warpgroups.assign(16, {});
      multipliers.assign(4096, {});
    },
    [] {
      if (box_copies.empty()) return false;
      const BoxCopy copy = box_copies.back();
      box_copies.pop_back();
      land(copy);
      return true;
    },
    [] {
      if (!box_copies.empty()) fail("a block ends while a copy to its shared memory is under way");
      for (const Multiplier& own : multipliers)
        if (!own.issued.empty()) fail("a wgmma that nobody waited for");
    }};
inline const bool hopper_engine_is_set = (engine = hopper_engine, true);

}  // namespace gpu

inline void hold_float(float&) {}
inline void tvm_builtin_ptx_prefetch_tensormap(const void*) {}
inline void tvm_builtin_ptx_setmaxnreg_dec_sync_aligned_u32_40() {}
inline void tvm_builtin_ptx_setmaxnreg_inc_sync_aligned_u32_232() {}

inline void tvm_builtin_ptx_st_shared_s32(uint32_t to, int32_t x) { *gpu::shared_pointer<int32_t>(to) = x; }
inline void tvm_builtin_ptx_ld_shared_s32(int32_t& x, uint32_t from) { x = *gpu::shared_pointer<int32_t>(from); }

inline void tvm_builtin_ptx_mbarrier_init_init_shared__cta_b64(uint32_t at, uint32_t n) { gpu::init_barrier(at, n); }
inline void tvm_builtin_ptx_fence_mbarrier_init_mbarrier_init_release_cluster() { gpu::published = true; }
inline void tvm_builtin_ptx_mbarrier_arrive_arrive_shared__cta_b64(uint32_t at, uint32_t count) {
  gpu::arrive(gpu::here(at), count);
}
inline void tvm_builtin_ptx_mbarrier_arrive_expect_tx_arrive_expect_tx_shared__cta_b64(uint32_t at, uint32_t bytes) {
  gpu::arrive(gpu::here(at), 1, bytes);
}
inline void wait_for_cluster(uint32_t at, int parity) { gpu::wait_barrier(at, parity); }
inline uint tvm_builtin_cluster_ctaid_x() { return gpu::running->cta; }
inline void tvm_builtin_cuda_cluster_sync() { gpu::wait(gpu::Waits::Block); }
inline void tvm_builtin_ptx_mapa_u32_shared__cluster_u32(uint32_t& out, uint32_t at, uint32_t rank) {
  if (rank >= gpu::dynamic_shared.size()) gpu::fail("mapa to a block that the cluster does not have");
  out = at | (rank + 1) << 24;
}
inline void tvm_builtin_ptx_mbarrier_arrive_arrive_release_cluster_shared__cluster_b64(uint32_t at, uint32_t count) {
  gpu::arrive(gpu::in_cluster(at), count);
}
inline void tvm_builtin_cuda_mbarrier_wait_raw_u32(uint32_t at, int parity) { gpu::wait_barrier(at, parity); }

#define GPU_BOX(rank, coordinates, ...)                                                                                \
  inline void                                                                                                         \
  tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_##rank##d_shared__cluster_global_mbarrier__complete_tx__bytes( \
      uint32_t to, const void* map, __VA_ARGS__, uint32_t barrier) {                                                  \
    gpu::load_box(to, map, {GPU_LIST coordinates}, rank, barrier);                                                    \
  }                                                                                                                   \
  inline void                                                                                                         \
  tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_##rank##d_shared__cluster_global_mbarrier__complete_tx__bytes_multicast__cluster( \
      uint32_t to, const void* map, __VA_ARGS__, uint32_t barrier, uint16_t ctas) {                                   \
    gpu::load_box(to, map, {GPU_LIST coordinates}, rank, barrier, ctas);                                              \
  }
#define GPU_LIST(...) __VA_ARGS__
GPU_BOX(2, (x, y), int x, int y)
GPU_BOX(3, (x, y, z), int x, int y, int z)
GPU_BOX(4, (x, y, z, w), int x, int y, int z, int w)
#undef GPU_BOX

#define GPU_WGMMA(columns, kind, brain, a, b)                                                                          \
  template <class... T>                                                                                               \
  void tvm_builtin_ptx_wgmma_##kind##_ss_mma_async_sync_aligned_m64n##columns##k16_f32_##kind##_##kind##_1_1_##a##_##b( \
      T&&... arguments) {                                                                                             \
    gpu::multiply_all<brain, a, b>(arguments...);                                                                     \
  }
#define GPU_WGMMAS(columns)             \
  GPU_WGMMA(columns, f16, false, 0, 0)  \
  GPU_WGMMA(columns, f16, false, 0, 1)  \
  GPU_WGMMA(columns, f16, false, 1, 0)  \
  GPU_WGMMA(columns, f16, false, 1, 1)  \
  GPU_WGMMA(columns, bf16, true, 0, 0)  \
  GPU_WGMMA(columns, bf16, true, 0, 1)  \
  GPU_WGMMA(columns, bf16, true, 1, 0)  \
  GPU_WGMMA(columns, bf16, true, 1, 1)
GPU_WGMMAS(64)
GPU_WGMMAS(128)
GPU_WGMMAS(256)
#undef GPU_WGMMAS
#undef GPU_WGMMA

inline void tvm_builtin_ptx_wgmma_fence_fence_sync_aligned() { gpu::multipliers[gpu::running->number].fenced = true; }
inline void tvm_builtin_ptx_wgmma_commit_group_commit_group_sync_aligned() {
  ++gpu::multipliers[gpu::running->number].groups;
}
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0() { gpu::await_products(0); }
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_1() { gpu::await_products(1); }
