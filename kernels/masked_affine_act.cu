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

// ---- backward -------------------------------------------------------------------------------------------------------

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
    p.grad_scale[channel] = sum_gx * load(p.mask + channel);
  }
  if (p.grad_shift != nullptr) {
    PASSDEPLOY_TOUCH(p.grad_shift + channel, 4, true);
    p.grad_shift[channel] = sum_g;
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
