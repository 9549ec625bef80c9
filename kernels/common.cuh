// What all kernels share: number formats, packets of 128 bits, reductions.
//
// No header of the CUDA toolkit is included, so that a .cu file compiles the same way with nvcc, with NVRTC (which has
// no include path at run time) and with g++ behind tests/kernels/emulation/cuda_shim.h, which defines
// PASSDEPLOY_TOUCH to check every access to global memory.
#pragma once

#ifndef PASSDEPLOY_TOUCH
#define PASSDEPLOY_TOUCH(address, bytes, is_write)
#endif

#ifndef PASSDEPLOY_HALF_TO_FLOAT  // nvcc's host pass reads these functions but never runs them
#define PASSDEPLOY_HALF_TO_FLOAT(bits) 0.0f
#define PASSDEPLOY_FLOAT_TO_HALF(value) 0
#endif

namespace passdeploy {

typedef unsigned int u32;
typedef unsigned long long u64;

// ---- number formats -------------------------------------------------------------------------------------------------

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

__device__ __forceinline__ float float_of_bits(u32 bits) {
  union {
    u32 u;
    float f;
  } both;
  both.u = bits;
  return both.f;
}
__device__ __forceinline__ u32 bits_of_float(float value) {
  union {
    float f;
    u32 u;
  } both;
  both.f = value;
  return both.u;
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(bf16 value) { return float_of_bits((u32)value.bits << 16); }
__device__ __forceinline__ float widen(f16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return PASSDEPLOY_HALF_TO_FLOAT(value.bits);
#endif
}

__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(float value, f16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  out.bits = PASSDEPLOY_FLOAT_TO_HALF(value);
#endif
}
__device__ __forceinline__ void narrow(float value, bf16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  // Round to nearest, ties to even; a NaN must stay one (sm_75 has no instruction for this).
  const u32 bits = bits_of_float(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = (unsigned short)(is_nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// ---- packets: 128 bits, the widest single access --------------------------------------------------------------------

template <class T>
struct Packet {
  static constexpr int size = 16 / (int)sizeof(T);
};

// The 16 bytes of a packet as they lie in memory.
template <class T>
union Raw {
  uint4 words;
  T items[Packet<T>::size];
};

__device__ __forceinline__ bool is_aligned(const void* address, u32 bytes) { return ((u64)address & (bytes - 1)) == 0; }

__device__ __forceinline__ float load(const float* address) {
  PASSDEPLOY_TOUCH(address, 4, false);
  return __ldg(address);
}

// Elements [first, first + size) of `array`, of which only those in [low, high) are touched; the others read as zero.
// `first` is a multiple of the packet's size, so `array_is_aligned` says whether a full packet can be read at once.
template <class T>
__device__ __forceinline__ Raw<T> load_packet(const T* array, u32 first, u32 low, u32 high, bool array_is_aligned) {
  constexpr u32 size = Packet<T>::size;
  Raw<T> raw;
  raw.words.x = raw.words.y = raw.words.z = raw.words.w = 0;
  if (array_is_aligned && first >= low && first + size <= high) {
    PASSDEPLOY_TOUCH(array + first, 16, false);
    raw.words = __ldg(reinterpret_cast<const uint4*>(array + first));
    return raw;
  }
#pragma unroll
  for (u32 j = 0; j < size; ++j) {
    if (first + j >= low && first + j < high) {
      PASSDEPLOY_TOUCH(array + first + j, sizeof(T), false);
      raw.items[j] = array[first + j];
    }
  }
  return raw;
}

// Two numbers in one 32-bit register: one instruction from sm_80 on.
__device__ __forceinline__ u32 narrow_pair(float low, float high, f16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  f16 a, b;
  narrow(low, a);
  narrow(high, b);
  return (u32)a.bits | ((u32)b.bits << 16);
#endif
}
__device__ __forceinline__ u32 narrow_pair(float low, float high, bf16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  bf16 a, b;
  narrow(low, a);
  narrow(high, b);
  return (u32)a.bits | ((u32)b.bits << 16);
#endif
}

template <class T>
struct Packer {
  static __device__ __forceinline__ uint4 words(const float* v) {
    uint4 w;
    w.x = narrow_pair(v[0], v[1], T());
    w.y = narrow_pair(v[2], v[3], T());
    w.z = narrow_pair(v[4], v[5], T());
    w.w = narrow_pair(v[6], v[7], T());
    return w;
  }
};
template <>
struct Packer<float> {
  static __device__ __forceinline__ uint4 words(const float* v) {
    uint4 w;
    w.x = bits_of_float(v[0]);
    w.y = bits_of_float(v[1]);
    w.z = bits_of_float(v[2]);
    w.w = bits_of_float(v[3]);
    return w;
  }
};

template <class T>
__device__ __forceinline__ Raw<T> pack(const float (&values)[Packet<T>::size]) {
  Raw<T> raw;
  raw.words = Packer<T>::words(values);
  return raw;
}

template <class T>
__device__ __forceinline__ void store_packet(T* array, u32 first, u32 low, u32 high, bool array_is_aligned,
                                             const float (&values)[Packet<T>::size]) {
  constexpr u32 size = Packet<T>::size;
  const Raw<T> raw = pack<T>(values);
  if (array_is_aligned && first >= low && first + size <= high) {
    PASSDEPLOY_TOUCH(array + first, 16, true);
    *reinterpret_cast<uint4*>(array + first) = raw.words;
    return;
  }
#pragma unroll
  for (u32 j = 0; j < size; ++j) {
    if (first + j >= low && first + j < high) {
      PASSDEPLOY_TOUCH(array + first + j, sizeof(T), true);
      array[first + j] = raw.items[j];
    }
  }
}

template <class T>
__device__ __forceinline__ void unpack(const Raw<T>& raw, float (&values)[Packet<T>::size]) {
#pragma unroll
  for (int j = 0; j < Packet<T>::size; ++j) values[j] = widen(raw.items[j]);
}

// ---- reductions in a fixed order ------------------------------------------------------------------------------------

constexpr u32 kThreads = 256;  // per block, in every kernel that reduces

// Sums of two values over a block of kThreads threads; valid in thread 0. `scratch`: 2 * kThreads / 32 floats of shared
// memory. Every thread of the block has to call it.
__device__ __forceinline__ void sum_over_block(float& first, float& second, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    first += __shfl_down_sync(0xffffffffu, first, offset);
    second += __shfl_down_sync(0xffffffffu, second, offset);
  }
  constexpr u32 warps = kThreads / 32;
  if ((threadIdx.x & 31) == 0) {
    scratch[threadIdx.x >> 5] = first;
    scratch[warps + (threadIdx.x >> 5)] = second;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (u32 warp = 1; warp < warps; ++warp) {
      first += scratch[warp];
      second += scratch[warps + warp];
    }
  }
}

}  // namespace passdeploy
