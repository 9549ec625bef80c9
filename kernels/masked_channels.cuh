// The parameters of masked_affine_act, and what a channel does to its elements: shared by forward and backward.
#pragma once
#include "activation.cuh"
#include "common.cuh"

namespace passdeploy {

// The same fields in the same order as geometry.MaskedAffineActParams (a test compares size and offsets).
struct MaskedAffineActParams {
  const void* x;
  const void* residual;  // null: none
  const float* mask;
  const float* scale;
  const float* shift;
  void* y;
  const void* grad_y;
  void* grad_x;         // null: not wanted
  void* grad_residual;  // null: not wanted
  float* partial;       // [slices][2][positions]; null: gradients of mask, scale and shift not wanted
  float* grad_mask;
  float* grad_scale;
  float* grad_shift;
  u32 elements;  // below 2^31
  u32 channels;
  u32 plane;         // elements of one channel of one image (1 in nhwc)
  u32 items;         // nchw backward: packets of one channel over all images
  u32 item_packets;  // nchw backward: packets of one plane, at most
  u32 period;        // nhwc: packets after which the channels repeat
  u32 tile_columns;  // nhwc: packet columns of a block; tile_columns * tile_rows <= kThreads
  u32 tile_rows;
  u32 slices;     // blocks that share one channel
  u32 positions;  // width of `partial`: channels (nchw), period * packet size (nhwc)
  int activation;
  int reserved;
};

constexpr int kUnroll = 2;  // packets of one tensor in flight per thread

// One of two in registers, for a loop that is not unrolled (its body holds every activation, so twice is a lot of code).
template <class V>
__device__ __forceinline__ V pick(const V (&values)[kUnroll], int k) {
  return k == 0 ? values[0] : values[1];
}
template <class T>
__device__ __forceinline__ Raw<T> pick(const Raw<T> (&values)[kUnroll], int k) {
  Raw<T> one;
  one.words.x = k == 0 ? values[0].words.x : values[1].words.x;
  one.words.y = k == 0 ? values[0].words.y : values[1].words.y;
  one.words.z = k == 0 ? values[0].words.z : values[1].words.z;
  one.words.w = k == 0 ? values[0].words.w : values[1].words.w;
  return one;
}

struct Channel {
  float factor, shift;
  bool kept;
};

__device__ __forceinline__ Channel channel_of(const MaskedAffineActParams& p, u32 channel) {
  Channel c;
  const float mask = load(p.mask + channel);
  c.kept = mask != 0.0f;
  c.factor = c.kept ? mask * load(p.scale + channel) : 0.0f;
  c.shift = load(p.shift + channel);
  return c;
}

__device__ __forceinline__ float affine(const Channel& c, float x, float residual) {
  return fmaf(c.factor, c.kept ? x : 0.0f, c.shift) + residual;
}

// ---- nhwc: where a thread stands, and its channels ------------------------------------------------------------------

template <class T>
struct Column {
  static constexpr u32 size = Packet<T>::size;
  bool active;
  u32 column;  // packet column, below p.period
  u32 row, row_step, rows;
  float factor[size], shift[size];
  u32 kept;  // a bit per channel

  __device__ __forceinline__ explicit Column(const MaskedAffineActParams& p) {
    const u32 tile_row = threadIdx.x / p.tile_columns;  // one division per thread
    column = blockIdx.x * p.tile_columns + (threadIdx.x - tile_row * p.tile_columns);
    active = tile_row < p.tile_rows && column < p.period;
    row = blockIdx.y * p.tile_rows + tile_row;
    row_step = gridDim.y * p.tile_rows;
    const u32 packets = (p.elements + size - 1) / size;
    rows = (packets + p.period - 1) / p.period;
    kept = 0;
    u32 channel = active ? (column * size) % p.channels : 0;
#pragma unroll
    for (u32 j = 0; j < size; ++j) {
      const Channel c = channel_of(p, channel);
      factor[j] = c.factor;
      shift[j] = c.shift;
      kept |= c.kept ? 1u << j : 0u;
      channel = channel + 1 == p.channels ? 0 : channel + 1;
    }
  }
  __device__ __forceinline__ Channel operator()(u32 j) const {
    return {factor[j], shift[j], ((kept >> j) & 1u) != 0u};
  }
  __device__ __forceinline__ u32 first_element(const MaskedAffineActParams& p, u32 at_row) const {
    return (at_row * p.period + column) * size;
  }
};

}  // namespace passdeploy
