// The gradients of masked_affine_act: a first pass per block into `partial`, a second one per channel.
#pragma once
#include "masked_channels.cuh"

namespace passdeploy {

// Gradients of the elements [first, first + size) that lie in [low, high). Leaves the gradient before the activation in
// `g` and x in `v`; both are zero outside, so that callers may sum them unconditionally.
template <class T, class ChannelAt>
__device__ __forceinline__ void backward_packet(const MaskedAffineActParams& p, u32 first, u32 low, u32 high,
                                                const ChannelAt& channel_at, float (&g)[Packet<T>::size],
                                                float (&v)[Packet<T>::size]) {
  constexpr u32 size = Packet<T>::size;
  const T* x = (const T*)p.x;
  const T* residual = (const T*)p.residual;
  const T* grad_y = (const T*)p.grad_y;
  T* grad_x = (T*)p.grad_x;
  T* grad_residual = (T*)p.grad_residual;
  const Raw<T> raw_x = load_packet(x, first, low, high, is_aligned(x, 16));
  const Raw<T> raw_g = load_packet(grad_y, first, low, high, is_aligned(grad_y, 16));
  Raw<T> raw_r;
  raw_r.words.x = raw_r.words.y = raw_r.words.z = raw_r.words.w = 0;
  if (residual != nullptr && p.activation != kNone) {
    raw_r = load_packet(residual, first, low, high, is_aligned(residual, 16));
  }
  float z[size];
  unpack(raw_x, v);
  unpack(raw_g, g);
  unpack(raw_r, z);
#pragma unroll
  for (u32 j = 0; j < size; ++j) z[j] = affine(channel_at(j), v[j], z[j]);
  apply_slope(z, g, p.activation);
  // What lies outside [low, high) was read as zero, but 0 * slope may be NaN (an infinite shift).
#pragma unroll
  for (u32 j = 0; j < size; ++j) g[j] = first + j >= low && first + j < high ? g[j] : 0.0f;
  if (grad_residual != nullptr) store_packet(grad_residual, first, low, high, is_aligned(grad_residual, 16), g);
  if (grad_x != nullptr) {
#pragma unroll
    for (u32 j = 0; j < size; ++j) z[j] = channel_at(j).kept ? g[j] * channel_at(j).factor : 0.0f;
    store_packet(grad_x, first, low, high, is_aligned(grad_x, 16), z);
  }
}

struct SameChannel {
  Channel channel;
  __device__ __forceinline__ const Channel& operator()(u32) const { return channel; }
};

extern __shared__ uint4 shared_memory[];

// Block (channel, slice): the packets that touch this channel's planes, a share of the images' per slice.
template <class T>
__device__ void backward_nchw(const MaskedAffineActParams& p) {
  constexpr u32 size = Packet<T>::size;
  const u32 channel = blockIdx.x;
  SameChannel of;
  of.channel = channel_of(p, channel);
  const u32 share = (p.items + gridDim.y - 1) / gridDim.y;
  const u32 begin = blockIdx.y * share;
  const u32 end = begin + share < p.items ? begin + share : p.items;
  float sum_gx = 0.0f, sum_g = 0.0f;
  for (u32 item = begin + threadIdx.x; item < end; item += kThreads) {
    const u32 image = item / p.item_packets;  // one division per packet
    const u32 low = (image * p.channels + channel) * p.plane, high = low + p.plane;
    const u32 first = (low / size + (item - image * p.item_packets)) * size;
    if (first >= high) continue;  // this plane starts in step with the packets and needs one fewer
    float g[size], v[size];
    backward_packet<T>(p, first, low, high, of, g, v);
#pragma unroll
    for (u32 j = 0; j < size; ++j) {
      sum_gx = fmaf(g[j], v[j], sum_gx);
      sum_g += g[j];
    }
  }
  if (p.partial == nullptr) return;
  sum_over_block(sum_gx, sum_g, (float*)shared_memory);
  if (threadIdx.x == 0) {
    float* partial = p.partial + 2 * (u64)blockIdx.y * p.positions;
    PASSDEPLOY_TOUCH(partial + channel, 4, true);
    PASSDEPLOY_TOUCH(partial + p.positions + channel, 4, true);
    partial[channel] = sum_gx;
    partial[p.positions + channel] = sum_g;
  }
}

// Block (column tile, slice): the rows of a slice; each thread sums the channels of its own packet column.
template <class T>
__device__ void backward_nhwc(const MaskedAffineActParams& p) {
  constexpr u32 size = Packet<T>::size;
  const Column<T> at(p);
  float sum_gx[size], sum_g[size];
#pragma unroll
  for (u32 j = 0; j < size; ++j) sum_gx[j] = sum_g[j] = 0.0f;
  if (at.active) {
    for (u32 row = at.row; row < at.rows; row += at.row_step) {
      const u32 first = at.first_element(p, row);
      if (first >= p.elements) break;
      float g[size], v[size];
      backward_packet<T>(p, first, 0u, p.elements, at, g, v);
#pragma unroll
      for (u32 j = 0; j < size; ++j) {
        sum_gx[j] = fmaf(g[j], v[j], sum_gx[j]);
        sum_g[j] += g[j];
      }
    }
  }
  if (p.partial == nullptr) return;
  float* sums = (float*)shared_memory;  // [2 * size][kThreads]
#pragma unroll
  for (u32 j = 0; j < size; ++j) {
    sums[j * kThreads + threadIdx.x] = sum_gx[j];
    sums[(size + j) * kThreads + threadIdx.x] = sum_g[j];
  }
  __syncthreads();
  float* partial = p.partial + 2 * (u64)blockIdx.y * p.positions;
  for (u32 index = threadIdx.x; index < 2 * size * p.tile_columns; index += kThreads) {
    const u32 which = index / p.tile_columns, tile_column = index - which * p.tile_columns;
    const u32 column = blockIdx.x * p.tile_columns + tile_column;
    if (column >= p.period) continue;
    float sum = 0.0f;
    for (u32 tile_row = 0; tile_row < p.tile_rows; ++tile_row) {
      sum += sums[which * kThreads + tile_row * p.tile_columns + tile_column];
    }
    const u32 position = column * size + which % size;
    float* out = partial + (which < size ? 0u : p.positions) + position;
    PASSDEPLOY_TOUCH(out, 4, true);
    *out = sum;
  }
}

// Second pass, a block per channel: the slices, and in nhwc the positions at which the channel stands.
__device__ void finish(const MaskedAffineActParams& p) {
  const u32 channel = blockIdx.x;
  const u32 repeats = p.positions / p.channels;
  float sum_gx = 0.0f, sum_g = 0.0f;
  for (u32 index = threadIdx.x; index < p.slices * repeats; index += kThreads) {
    const u32 slice = index / repeats, repeat = index - slice * repeats;
    const float* partial = p.partial + 2 * (u64)slice * p.positions + channel + repeat * p.channels;
    sum_gx += load(partial);
    sum_g += load(partial + p.positions);
  }
  sum_over_block(sum_gx, sum_g, (float*)shared_memory);
  if (threadIdx.x != 0) return;
  if (p.grad_mask != nullptr) {
    PASSDEPLOY_TOUCH(p.grad_mask + channel, 4, true);
    p.grad_mask[channel] = sum_gx * load(p.scale + channel);
  }
  if (p.grad_scale != nullptr) {
    PASSDEPLOY_TOUCH(p.grad_scale + channel, 4, true);
    const float mask = load(p.mask + channel);
    p.grad_scale[channel] = mask != 0.0f ? sum_gx * mask : 0.0f;  // a sum of NaNs times 0 would be one
  }
  if (p.grad_shift != nullptr) {
    PASSDEPLOY_TOUCH(p.grad_shift + channel, 4, true);
    p.grad_shift[channel] = sum_g;
  }
}

}  // namespace passdeploy
