// Kernels with one mistake each, which the emulator has to find.
#include "common.cuh"

namespace passdeploy {

struct BrokenParams {
  const float* in;
  float* out;
  int number;
};

extern __shared__ uint4 shared_memory[];

}  // namespace passdeploy

using namespace passdeploy;

extern "C" __global__ void sound(const BrokenParams p) {
  float* shared = (float*)shared_memory;
  shared[threadIdx.x] = load(p.in + threadIdx.x);
  __syncthreads();
  float value = shared[blockDim.x - 1 - threadIdx.x];
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_down_sync(0xffffffffu, value, offset);
  PASSDEPLOY_TOUCH(p.out + threadIdx.x, 4, true);
  p.out[threadIdx.x] = value;
}

extern "C" __global__ void missing_barrier(const BrokenParams p) {
  float* shared = (float*)shared_memory;
  shared[threadIdx.x] = load(p.in + threadIdx.x);
  PASSDEPLOY_TOUCH(p.out + threadIdx.x, 4, true);
  p.out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void divergent_barrier(const BrokenParams) {
  if (threadIdx.x != 3) __syncthreads();
}

extern "C" __global__ void divergent_shuffle(const BrokenParams p) {
  if (threadIdx.x != 3) __shfl_down_sync(0xffffffffu, load(p.in), 1);
}

extern "C" __global__ void reads_too_far(const BrokenParams p) {
  if (threadIdx.x == 0) load(p.in + 64);
}

extern "C" __global__ void writes_too_far(const BrokenParams p) {
  if (threadIdx.x == 0) {
    PASSDEPLOY_TOUCH(p.out - 1, 4, true);
    p.out[-1] = 0.0f;
  }
}

extern "C" __global__ void writes_twice(const BrokenParams p) {
  PASSDEPLOY_TOUCH(p.out, 4, true);
  p.out[0] = 1.0f;
}

extern "C" __global__ void misaligned_packet(const BrokenParams p) {
  if (threadIdx.x == 0) {
    float values[4] = {};
    store_packet(p.out, 1, 0, 64, true, values);
  }
}

extern "C" __global__ void too_much_shared(const BrokenParams p) {
  ((float*)shared_memory)[64 + threadIdx.x] = load(p.in);
}

extern "C" __global__ void undefined_shift(const BrokenParams p) {
  if (threadIdx.x == 0) {
    PASSDEPLOY_TOUCH(p.out, 4, true);
    p.out[0] = (float)(1 << (p.number + 40));
  }
}
