// uint8 RGB images [images, source_height, source_width, 3] -> normalised, prompted network input, in one pass:
//   out = prompt + (inside the border: bilinear(image) / 255 * scale + shift)
// in nchw or nhwc, float32, float16 or bfloat16. `border` 0 with a prompt is the additive prompt; `border` > 0 the
// expansive one, whose image is shrunk into the freed middle (align_corners=False, no antialiasing: what PyTorch's
// interpolate does). The CPU twin is passdeploy.search.prompt.InputStage.
//
// A block owns a tile of output rows and goes through a share of the images with it, so that the prompt is read once
// and stays in registers. A thread owns 8 neighbouring pixels of one row. When the image has to be resampled the source
// rows of the tile are first copied to shared memory with 128-bit reads, since each byte is then used several times.
#include "common.cuh"

namespace passdeploy {

// The same fields in the same order as geometry.PromptedInputParams (a test compares size and offsets).
struct PromptedInputParams {
  const unsigned char* images;
  const float* scale;   // [3], 1 / std
  const float* shift;   // [3], -mean / std
  const float* prompt;  // [3, height, width] in units of the output; null: none
  void* out;
  u32 count;  // images
  u32 source_height, source_width;
  u32 height, width;  // of the output
  u32 border;
  u32 groups;       // of 8 pixels in an output row, the last one perhaps not full
  u32 tile_rows;    // output rows of a block
  u32 tile_groups;  // groups per row of a block; tile_rows * tile_groups <= threads of the block
  u32 resampled;    // whether the inner image differs from the source in size
  u32 staged;       // whether source rows go through shared memory (only when resampled)
  float step_y, step_x;  // source pixels per inner pixel
  u32 channels_last;     // layout of the output
};

constexpr int kPixels = 8;  // per thread

extern __shared__ uint4 shared_memory[];

// Where an inner row or column lies between two of the source: PyTorch's formula.
struct Between {
  u32 low, high;
  float weight;  // of `high`
};
__device__ __forceinline__ Between between(u32 index, float step, u32 size) {
  float position = step * ((float)index + 0.5f) - 0.5f;
  position = position < 0.0f ? 0.0f : position;
  Between b;
  b.low = (u32)position;
  b.low = b.low < size - 1 ? b.low : size - 1;
  b.high = b.low + 1 < size ? b.low + 1 : b.low;
  b.weight = position - (float)b.low;
  return b;
}

struct GlobalBytes {
  const unsigned char* base;
  __device__ __forceinline__ float operator()(u32 offset) const {
    PASSDEPLOY_TOUCH(base + offset, 1, false);
    return (float)__ldg(base + offset);
  }
};
struct SharedBytes {
  u32 start;
  __device__ __forceinline__ float operator()(u32 offset) const {
    return (float)reinterpret_cast<const unsigned char*>(shared_memory)[start + offset];
  }
};

// Channel values 0..255 of one inner pixel; the byte offsets are relative to the rows' start.
template <class Bytes>
__device__ __forceinline__ void sample(const Bytes& bytes, u32 row_low, u32 row_high, float weight_y, const Between& x,
                                       float (&value)[3]) {
#pragma unroll
  for (u32 c = 0; c < 3; ++c) {
    const float a = bytes(row_low + x.low * 3 + c), b = bytes(row_low + x.high * 3 + c);
    const float d = bytes(row_high + x.low * 3 + c), e = bytes(row_high + x.high * 3 + c);
    const float top = fmaf(x.weight, b - a, a), bottom = fmaf(x.weight, e - d, d);
    value[c] = fmaf(weight_y, bottom - top, top);
  }
}

// Copies `bytes` bytes at any address to shared memory, at the same offset within 16 bytes; returns that offset.
__device__ __forceinline__ u32 stage(const unsigned char* from, u32 bytes) {
  unsigned char* to = reinterpret_cast<unsigned char*>(shared_memory);
  const u32 offset = (u32)((u64)from & 15u);
  u32 head = (16u - offset) & 15u;
  head = head < bytes ? head : bytes;
  const u32 packets = (bytes - head) / 16, tail = head + packets * 16;
  for (u32 i = threadIdx.x; i < head; i += blockDim.x) {
    PASSDEPLOY_TOUCH(from + i, 1, false);
    to[offset + i] = __ldg(from + i);
  }
  for (u32 i = threadIdx.x; i < packets; i += blockDim.x) {
    PASSDEPLOY_TOUCH(from + head + 16 * i, 16, false);
    *reinterpret_cast<uint4*>(to + offset + head + 16 * i) = __ldg(reinterpret_cast<const uint4*>(from + head + 16 * i));
  }
  for (u32 i = tail + threadIdx.x; i < bytes; i += blockDim.x) {
    PASSDEPLOY_TOUCH(from + i, 1, false);
    to[offset + i] = __ldg(from + i);
  }
  return offset;
}

// Stores a run of N elements of which the first `count` exist.
template <class T, int N>
__device__ __forceinline__ void store_run(T* to, const float (&values)[N], u32 count) {
  constexpr int size = Packet<T>::size;
  if (count == N && is_aligned(to, 16)) {
#pragma unroll
    for (int i = 0; i < N; i += size) {
      PASSDEPLOY_TOUCH(to + i, 16, true);
      *reinterpret_cast<uint4*>(to + i) = Packer<T>::words(values + i);
    }
    return;
  }
#pragma unroll
  for (u32 i = 0; i < N; ++i) {
    if (i >= count) break;
    T item;
    narrow(values[i], item);
    PASSDEPLOY_TOUCH(to + i, sizeof(T), true);
    to[i] = item;
  }
}

// The 8 pixels of a group straight from the image, when nothing has to be resampled: three 64-bit reads where possible.
__device__ __forceinline__ void copy_pixels(const unsigned char* from, u32 inside, float (&value)[3][kPixels]) {
  union {
    uint2 words[3];
    unsigned char bytes[3 * kPixels];
  } pixels;
  if (inside == 0xffu && is_aligned(from, 8)) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      PASSDEPLOY_TOUCH(from + 8 * i, 8, false);
      pixels.words[i] = __ldg(reinterpret_cast<const uint2*>(from) + i);
    }
  } else {
#pragma unroll
    for (u32 i = 0; i < 3 * kPixels; ++i) {
      pixels.bytes[i] = 0;
      if ((inside >> (i / 3)) & 1u) {
        PASSDEPLOY_TOUCH(from + i, 1, false);
        pixels.bytes[i] = __ldg(from + i);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
#pragma unroll
    for (int c = 0; c < 3; ++c) value[c][j] = (float)pixels.bytes[3 * j + c];
  }
}

template <class T>
__device__ void prompted_input(const PromptedInputParams& p) {
  const u32 tile_row = threadIdx.x / p.tile_groups;  // one division per thread
  const u32 group = blockIdx.z * p.tile_groups + (threadIdx.x - tile_row * p.tile_groups);
  const u32 tile_top = blockIdx.x * p.tile_rows;
  const u32 y = tile_top + tile_row, x0 = group * kPixels;
  const bool active = tile_row < p.tile_rows && y < p.height && group < p.groups;
  const u32 inner_bottom = p.height - p.border, inner_right = p.width - p.border;  // exclusive
  const bool row_inside = active && y >= p.border && y < inner_bottom;
  const u32 wanted = active ? (p.width - x0 < kPixels ? p.width - x0 : kPixels) : 0;

  u32 inside = 0;  // a bit per pixel that shows the image
  float scale[3], base[3][kPixels];
#pragma unroll
  for (u32 j = 0; j < kPixels; ++j) {
    if (row_inside && x0 + j >= p.border && x0 + j < inner_right) inside |= 1u << j;
  }
#pragma unroll
  for (u32 c = 0; c < 3; ++c) {
    scale[c] = load(p.scale + c) * (1.0f / 255);
    const float shift = load(p.shift + c);
#pragma unroll
    for (u32 j = 0; j < kPixels; ++j) {
      base[c][j] = (inside >> j) & 1u ? shift : 0.0f;
      if (p.prompt != nullptr && j < wanted) {
        base[c][j] += load(p.prompt + ((u64)c * p.height + y) * p.width + x0 + j);
      }
    }
  }

  // Source rows of this thread's pixels, and of the whole tile.
  const Between at_y = between(row_inside ? y - p.border : 0, p.step_y, p.source_height);
  const u32 tile_end = tile_top + p.tile_rows < inner_bottom ? tile_top + p.tile_rows : inner_bottom;
  const u32 tile_begin = tile_top > p.border ? tile_top : p.border;
  const bool tile_inside = tile_begin < tile_end;
  u32 first_row = 0, source_rows = 0;
  if (p.staged && tile_inside) {
    first_row = between(tile_begin - p.border, p.step_y, p.source_height).low;
    source_rows = between(tile_end - 1 - p.border, p.step_y, p.source_height).high + 1 - first_row;
  }
  const u32 row_bytes = p.source_width * 3;
  const u64 image_bytes = (u64)p.source_height * row_bytes;

  for (u32 image = blockIdx.y; image < p.count; image += gridDim.y) {
    const unsigned char* source = p.images + image * image_bytes;
    SharedBytes staged = {0};
    if (p.staged && tile_inside) {
      __syncthreads();  // the rows of the image before have been used
      staged.start = stage(source + (u64)first_row * row_bytes, source_rows * row_bytes);
      __syncthreads();
    }
    if (!active) continue;
    float value[3][kPixels];
    if (inside != 0 && !p.resampled) {
      // For a group that starts in the border the address lies before the image; such pixels are not touched.
      const long long column = (long long)x0 - p.border;
      copy_pixels((const unsigned char*)((long long)source + ((long long)(y - p.border) * p.source_width + column) * 3),
                  inside, value);
    } else {
#pragma unroll
      for (u32 j = 0; j < kPixels; ++j) {
        float pixel[3] = {0.0f, 0.0f, 0.0f};
        if ((inside >> j) & 1u) {
          const Between at_x = between(x0 + j - p.border, p.step_x, p.source_width);
          if (p.staged) {
            sample(staged, (at_y.low - first_row) * row_bytes, (at_y.high - first_row) * row_bytes, at_y.weight, at_x,
                   pixel);
          } else {
            const GlobalBytes bytes = {source + (u64)at_y.low * row_bytes};
            sample(bytes, 0, (at_y.high - at_y.low) * row_bytes, at_y.weight, at_x, pixel);
          }
        }
#pragma unroll
        for (u32 c = 0; c < 3; ++c) value[c][j] = pixel[c];
      }
    }
    if (p.channels_last) {
      float run[3 * kPixels];
#pragma unroll
      for (u32 j = 0; j < kPixels; ++j) {
#pragma unroll
        for (u32 c = 0; c < 3; ++c) {
          run[3 * j + c] = (inside >> j) & 1u ? fmaf(value[c][j], scale[c], base[c][j]) : base[c][j];
        }
      }
      store_run((T*)p.out + (((u64)image * p.height + y) * p.width + x0) * 3, run, 3 * wanted);
    } else {
#pragma unroll
      for (u32 c = 0; c < 3; ++c) {
        float run[kPixels];
#pragma unroll
        for (u32 j = 0; j < kPixels; ++j) {
          run[j] = (inside >> j) & 1u ? fmaf(value[c][j], scale[c], base[c][j]) : base[c][j];
        }
        store_run((T*)p.out + (((u64)image * 3 + c) * p.height + y) * p.width + x0, run, wanted);
      }
    }
  }
}

}  // namespace passdeploy

using namespace passdeploy;

#define FOR_TYPE(NAME, T)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) prompted_input_##NAME(const PromptedInputParams p) {        \
    prompted_input<T>(p);                                                                                       \
  }

FOR_TYPE(f32, float)
FOR_TYPE(f16, f16)
FOR_TYPE(bf16, bf16)
