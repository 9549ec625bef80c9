// y = activation(x * (mask * scale) + shift + residual), per channel; and its gradients.
//
// The masked forward of the search. `mask`, `scale` and `shift` are float32, one value per channel; x, residual and y
// share a type (float32, float16, bfloat16); sums are in float32. Where the mask is zero x counts as absent, not as
// multiplied by zero: its packets are not read, and a NaN in it does no harm.
//
// Two layouts: `nchw` is [images, channels, plane]; `nhwc` is a matrix of rows of `channels`, in which the channels of
// a packet repeat every `period` packets (period * packet size = the least common multiple of channels and packet
// size). A thread of an nhwc kernel owns one packet column, so that its parameters stay in registers.
//
// Gradients are reduced in two passes in a fixed order: per block into `partial`, then per channel. No atomics, so the
// same input gives the same bits. What a launch looks like is decided in passdeploy/kernels/geometry.py.
#include "masked_backward.cuh"
#include "masked_channels.cuh"

namespace passdeploy {

// ---- forward, nchw: the tensor as one run of packets, so any plane size keeps 128-bit accesses ----------------------

template <class T>
__device__ void forward_nchw(const MaskedAffineActParams& p) {
  constexpr u32 size = Packet<T>::size;
  const T* x = (const T*)p.x;
  const T* residual = (const T*)p.residual;
  T* y = (T*)p.y;
  const bool x_aligned = is_aligned(x, 16), residual_aligned = is_aligned(residual, 16), y_aligned = is_aligned(y, 16);
  const u32 first_packet = blockIdx.x * (blockDim.x * kUnroll) + threadIdx.x;

  Raw<T> raw[kUnroll], added[kUnroll];
  u32 start_channel[kUnroll], left[kUnroll];  // of a packet's first element: its channel, and what is left of its plane
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const u32 first = (first_packet + k * blockDim.x) * size;
    raw[k].words.x = raw[k].words.y = raw[k].words.z = raw[k].words.w = 0;
    added[k] = raw[k];
    start_channel[k] = left[k] = 0;
    if (first >= p.elements) continue;
    const u32 plane = first / p.plane;  // two divisions per packet, none per element
    start_channel[k] = plane % p.channels;
    left[k] = p.plane - (first - plane * p.plane);
    bool any = load(p.mask + start_channel[k]) != 0.0f;
    for (u32 channel = start_channel[k], end = left[k]; !any && end < size && first + end < p.elements; end += p.plane) {
      channel = channel + 1 == p.channels ? 0 : channel + 1;
      any = load(p.mask + channel) != 0.0f;
    }
    if (any) raw[k] = load_packet(x, first, 0u, p.elements, x_aligned);
    if (residual != nullptr) added[k] = load_packet(residual, first, 0u, p.elements, residual_aligned);
  }
#pragma unroll 1
  for (int k = 0; k < kUnroll; ++k) {
    const u32 first = (first_packet + k * blockDim.x) * size;
    if (first >= p.elements) continue;
    float z[size], r[size];
    unpack(pick(raw, k), z);
    unpack(pick(added, k), r);
    u32 channel = pick(start_channel, k), end = pick(left, k);  // end: where in the packet the plane ends
    Channel c = channel_of(p, channel);
    if (end >= size) {
#pragma unroll
      for (u32 j = 0; j < size; ++j) z[j] = affine(c, z[j], r[j]);
    } else {
#pragma unroll
      for (u32 j = 0; j < size; ++j) {
        if (j == end && first + j < p.elements) {
          channel = channel + 1 == p.channels ? 0 : channel + 1;
          c = channel_of(p, channel);
          end += p.plane;
        }
        z[j] = affine(c, z[j], r[j]);
      }
    }
    activate(z, p.activation);
    store_packet(y, first, 0u, p.elements, y_aligned, z);
  }
}

// ---- forward, nhwc ---------------------------------------------------------------------------------------------------

template <class T>
__device__ void forward_nhwc(const MaskedAffineActParams& p) {
  constexpr u32 size = Packet<T>::size;
  const T* x = (const T*)p.x;
  const T* residual = (const T*)p.residual;
  T* y = (T*)p.y;
  const bool x_aligned = is_aligned(x, 16), residual_aligned = is_aligned(residual, 16), y_aligned = is_aligned(y, 16);
  const Column<T> at(p);
  if (!at.active) return;
  for (u32 row = at.row; row < at.rows; row += kUnroll * at.row_step) {
    Raw<T> raw[kUnroll], added[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const u32 this_row = row + k * at.row_step;
      const u32 first = at.first_element(p, this_row);
      raw[k].words.x = raw[k].words.y = raw[k].words.z = raw[k].words.w = 0;
      added[k] = raw[k];
      if (this_row >= at.rows || first >= p.elements) continue;
      if (at.kept != 0) raw[k] = load_packet(x, first, 0u, p.elements, x_aligned);
      if (residual != nullptr) added[k] = load_packet(residual, first, 0u, p.elements, residual_aligned);
    }
#pragma unroll 1
    for (int k = 0; k < kUnroll; ++k) {
      const u32 this_row = row + k * at.row_step;
      const u32 first = at.first_element(p, this_row);
      if (this_row >= at.rows || first >= p.elements) continue;
      float z[size], r[size];
      unpack(pick(raw, k), z);
      unpack(pick(added, k), r);
#pragma unroll
      for (u32 j = 0; j < size; ++j) z[j] = affine(at(j), z[j], r[j]);
      activate(z, p.activation);
      store_packet(y, first, 0u, p.elements, y_aligned, z);
    }
  }
}

// ---- for callers that can pass only pointers and 32-bit numbers: TensorRT's ahead-of-time plugins (inputs, numbers,
// outputs) -----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void forward_flat(const T* x, const float* mask, const float* scale, const float* shift,
                                             const T* residual, int elements, int channels, int plane, int activation,
                                             T* y) {
  MaskedAffineActParams p = {};
  p.x = x;
  p.residual = residual;
  p.mask = mask;
  p.scale = scale;
  p.shift = shift;
  p.y = y;
  p.elements = (u32)elements;
  p.channels = (u32)channels;
  p.plane = (u32)plane;
  p.activation = activation;
  forward_nchw<T>(p);
}

}  // namespace passdeploy

using namespace passdeploy;

#define FOR_TYPE(NAME, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) masked_affine_act_forward_nchw_##NAME(                             \
      const MaskedAffineActParams p) {                                                                                 \
    forward_nchw<T>(p);                                                                                                \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) masked_affine_act_forward_nhwc_##NAME(                             \
      const MaskedAffineActParams p) {                                                                                 \
    forward_nhwc<T>(p);                                                                                                \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) masked_affine_act_backward_nchw_##NAME(                            \
      const MaskedAffineActParams p) {                                                                                 \
    backward_nchw<T>(p);                                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) masked_affine_act_backward_nhwc_##NAME(                            \
      const MaskedAffineActParams p) {                                                                                 \
    backward_nhwc<T>(p);                                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) masked_affine_act_flat_##NAME(                                     \
      const T* x, const float* mask, const float* scale, const float* shift, int elements, int channels, int plane,    \
      int activation, T* y) {                                                                                          \
    forward_flat<T>(x, mask, scale, shift, (const T*)nullptr, elements, channels, plane, activation, y);               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) masked_affine_act_flat_residual_##NAME(                            \
      const T* x, const float* mask, const float* scale, const float* shift, const T* residual, int elements,          \
      int channels, int plane, int activation, T* y) {                                                                 \
    forward_flat<T>(x, mask, scale, shift, residual, elements, channels, plane, activation, y);                        \
  }

FOR_TYPE(f32, float)
FOR_TYPE(f16, f16)
FOR_TYPE(bf16, bf16)

extern "C" __global__ void __launch_bounds__(256) masked_affine_act_finish(const MaskedAffineActParams p) { finish(p); }
