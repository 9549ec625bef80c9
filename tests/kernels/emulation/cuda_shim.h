// Lets g++ compile a CUDA C++ source as it is: the words of the language, and the few built-ins that the kernels use.
// How a grid is run, and how accesses are checked, is in emulator.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct Index3 {
  unsigned int x, y, z;
};
extern Index3 threadIdx, blockIdx, blockDim, gridDim;  // set before a fiber goes on

void __syncthreads();
float __shfl_down_sync(unsigned int mask, float value, int offset);

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

#define __expf(x) std::exp(static_cast<float>(x))
#define __fdividef(a, b) (static_cast<float>(a) / static_cast<float>(b))

void touch(const void* address, unsigned int bytes, bool is_write);
#define PASSDEPLOY_TOUCH(address, bytes, is_write) touch(address, bytes, is_write)

inline float half_to_float(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline unsigned short float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
#define PASSDEPLOY_HALF_TO_FLOAT(bits) half_to_float(bits)
#define PASSDEPLOY_FLOAT_TO_HALF(value) float_to_half(value)
