// A tensor map of the simulated GPU: its arguments, as cuTensorMapEncodeTiled got them, in the 128 bytes that it has.
#pragma once
#include <cstdint>

struct alignas(64) CUtensorMap {
  uint64_t magic, address, strides[4];
  uint64_t extents[5];
  uint16_t box[5];  // elements, not what they span
  uint8_t steps[5];
  uint8_t rank, element_bytes, swizzle, type;
};
static_assert(sizeof(CUtensorMap) == 128, "the driver's size");

constexpr uint64_t tensor_map_magic = 0x70616d726f736e65;
