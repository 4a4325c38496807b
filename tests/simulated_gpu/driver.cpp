// The CUDA driver and runtime that TVM's CUDA runtime calls, on a processor. "Device memory" is ordinary memory, and a
// "cubin" is a shared library made by tests/simulated_gpu: its kernels are the generated CUDA source, as C++.
#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tensor_map.h"

namespace {

constexpr int success = 0, failure = 1;

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const struct Attribute* attributes;
  unsigned attribute_count;
};

struct Attribute {  // CUlaunchAttribute
  int id;
  unsigned padding, value[16];
};
constexpr int cluster_dimension = 4;  // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION

using Kernel = const char* (*)(void** parameters, const unsigned* dims, std::size_t shared_bytes, int cluster);

int refused(const char* why) { return std::fprintf(stderr, "simulated GPU: %s\n", why), failure; }

}  // namespace

extern "C" {

int cuModuleLoadData(void** module, const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return failure;
  const std::size_t size = header->e_shoff + std::size_t{header->e_shentsize} * header->e_shnum;
  char path[] = "/tmp/simulated-gpu-XXXXXX";
  const int file = mkstemp(path);
  const bool written = file >= 0 && write(file, image, size) == static_cast<ssize_t>(size);
  if (file >= 0) close(file);
  *module = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!*module) std::fprintf(stderr, "%s\n", dlerror());
  unlink(path);
  return *module ? success : failure;
}
int cuModuleUnload(void*) { return success; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, (std::string("launch_") + name).c_str());
  return *function ? success : failure;
}
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
  for (int i = 0; i < 3; ++i)
    if (config->grid[i] == 0 || config->block[i] == 0) return failure;
  const unsigned threads = config->block[0] * config->block[1] * config->block[2];
  if (threads > 1024 || config->grid[1] > 65535 || config->grid[2] > 65535 || config->shared_bytes > (227 << 10))
    return failure;
  unsigned dims[6];
  std::memcpy(dims, config->grid, sizeof(config->grid));
  std::memcpy(dims + 3, config->block, sizeof(config->block));
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->attribute_count; ++i)
    if (config->attributes[i].id == cluster_dimension) cluster = config->attributes[i].value[0];
  if (config->grid[0] % cluster) return refused("a grid that its clusters do not divide");
  const char* wrong = reinterpret_cast<Kernel>(function)(parameters, dims, config->shared_bytes, cluster);
  return wrong ? refused(wrong) : success;
}
int cuFuncSetAttribute(void*, int, int) { return success; }
int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "simulated"), success; }
int cuGetErrorName(int, const char** text) { return *text = "failure of the simulated GPU", success; }
int cuGetErrorString(int, const char** text) { return *text = "failure of the simulated GPU", success; }
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* extents,
                           const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int fill) {
  // The conditions of the CUDA driver API's description, as far as they concern 16 and 32-bit numbers.
  const unsigned bytes = type == 6 || type == 9 ? 2 : type == 7 || type == 11 ? 4 : 0;
  if (!bytes || interleave || fill || promotion < 0 || promotion > 3) return refused("a tensor map of another kind");
  if (swizzle != 3) return refused("a tensor map without 128-byte swizzle");
  if (reinterpret_cast<uintptr_t>(map) % 64) return refused("a tensor map that is not aligned to 64 bytes");
  if (reinterpret_cast<uintptr_t>(address) % 16) return refused("a tensor map of an address not aligned to 16 bytes");
  if (rank < 1 || rank > 5) return refused("a tensor map of a rank outside of 1 to 5");
  CUtensorMap made{tensor_map_magic, reinterpret_cast<uint64_t>(address), {}, {}, {}, static_cast<uint8_t>(rank),
                   static_cast<uint8_t>(bytes), static_cast<uint8_t>(swizzle), static_cast<uint8_t>(type)};
  for (unsigned i = 0; i < rank; ++i) {
    if (extents[i] < 1 || extents[i] > uint64_t{1} << 32) return refused("an extent outside of 1 to 2^32");
    if (box[i] < 1 || box[i] > 256) return refused("a box outside of 1 to 256 elements");
    if (steps[i] != 1) return refused("a traversal in steps");
    made.extents[i] = extents[i];
    made.box[i] = static_cast<uint16_t>(box[i]);
    if (i + 1 == rank) break;
    const uint64_t inner = i ? strides[i - 1] * extents[i] : bytes * extents[0];
    if (strides[i] % 16 || strides[i] >= uint64_t{1} << 40 || strides[i] < inner)
      return refused("a stride that is not a multiple of 16 bytes, is too large, or makes rows overlap");
    made.strides[i] = strides[i];
  }
  if (box[0] * bytes % 16 || box[0] * bytes > 128) return refused("an inner box that is no part of the swizzle's width");
  return *static_cast<CUtensorMap*>(map) = made, success;
}

int cudaGetDeviceCount(int* count) { return *count = 1, success; }
int cudaGetDevice(int* device) { return *device = 0, success; }
int cudaSetDevice(int) { return success; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  // cudaDevAttrMaxThreadsPerBlock, WarpSize, MultiProcessorCount, ComputeCapabilityMajor
  *value = attribute == 1 ? 1024 : attribute == 10 ? 32 : attribute == 16 ? 132 : attribute == 75 ? 9 : 0;
  return success;
}
int cudaGetDeviceProperties(void*, int) { return failure; }
int cudaMemGetInfo(std::size_t* free, std::size_t* total) { return *free = *total = std::size_t{1} << 33, success; }
int cudaMalloc(void** memory, std::size_t size) {
  *memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
  if (*memory) std::memset(*memory, 0xff, size);  // NaN: what is read before it is written shows
  return *memory || size == 0 ? success : failure;
}
int cudaMallocHost(void** memory, std::size_t size) { return cudaMalloc(memory, size); }
int cudaFree(void* memory) { return std::free(memory), success; }
int cudaFreeHost(void* memory) { return std::free(memory), success; }
int cudaMemcpyAsync(void* to, const void* from, std::size_t size, int, void*) {
  return std::memmove(to, from, size), success;
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t size, void*) {
  return std::memmove(to, from, size), success;
}
int cudaGetLastError() { return success; }
int cudaPeekAtLastError() { return success; }
const char* cudaGetErrorName(int) { return "failure of the simulated GPU"; }
const char* cudaGetErrorString(int) { return "failure of the simulated GPU"; }
int cudaStreamCreate(void** stream) { return *stream = nullptr, success; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = nullptr, success; }
int cudaStreamDestroy(void*) { return success; }
int cudaStreamSynchronize(void*) { return success; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return success; }
int cudaStreamBeginCapture(void*, int) { return failure; }
int cudaStreamEndCapture(void*, void**) { return failure; }
int cudaEventCreate(void** event) { return *event = nullptr, success; }
int cudaEventDestroy(void*) { return success; }
int cudaEventRecord(void*, void*) { return success; }
int cudaEventSynchronize(void*) { return success; }
int cudaEventElapsedTime(float* time, void*, void*) { return *time = 0, success; }
int cudaGraphDestroy(void*) { return failure; }
int cudaGraphExecDestroy(void*) { return failure; }
int cudaGraphInstantiate() { return failure; }
int cudaGraphLaunch(void*, void*) { return failure; }
}
