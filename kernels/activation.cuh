// Activations and their slopes on a packet of values. The choice is the same for the whole launch, so the switch is
// taken once per packet and never diverges.
#pragma once

namespace passdeploy {

// The order is that of ACTIVATIONS in passdeploy/kernels/geometry.py.
enum Activation { kNone = 0, kRelu, kRelu6, kSilu, kGelu, kHardswish };

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

constexpr float kInverseSqrt2 = 0.70710678118654752f;
constexpr float kInverseSqrt2Pi = 0.39894228040143268f;

// z <- activation(z). A NaN stays a NaN, as in PyTorch.
template <int N>
__device__ __forceinline__ void activate(float (&z)[N], int activation) {
  switch (activation) {
    case kRelu:
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] = z[j] < 0.0f ? 0.0f : z[j];
      break;
    case kRelu6:
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] = z[j] < 0.0f ? 0.0f : (z[j] > 6.0f ? 6.0f : z[j]);
      break;
    case kSilu:
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] *= sigmoid(z[j]);
      break;
    case kGelu:
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] *= 0.5f + 0.5f * erff(z[j] * kInverseSqrt2);
      break;
    case kHardswish:
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] = z[j] <= -3.0f ? 0.0f : (z[j] >= 3.0f ? z[j] : z[j] * (z[j] + 3.0f) * (1.0f / 6));
      break;
    default:
      break;
  }
}

// gradient <- gradient * activation'(z), with PyTorch's choice at the kinks.
template <int N>
__device__ __forceinline__ void apply_slope(const float (&z)[N], float (&gradient)[N], int activation) {
  switch (activation) {
    case kRelu:
#pragma unroll
      for (int j = 0; j < N; ++j) gradient[j] = z[j] <= 0.0f ? 0.0f : gradient[j];
      break;
    case kRelu6:
#pragma unroll
      for (int j = 0; j < N; ++j) gradient[j] = z[j] <= 0.0f || z[j] >= 6.0f ? 0.0f : gradient[j];
      break;
    case kSilu:
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float s = sigmoid(z[j]);
        gradient[j] *= s * (1.0f + z[j] * (1.0f - s));
      }
      break;
    case kGelu:
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float cdf = 0.5f + 0.5f * erff(z[j] * kInverseSqrt2);
        gradient[j] *= cdf + z[j] * kInverseSqrt2Pi * __expf(-0.5f * z[j] * z[j]);
      }
      break;
    case kHardswish:
#pragma unroll
      for (int j = 0; j < N; ++j) {
        gradient[j] *= z[j] <= -3.0f ? 0.0f : (z[j] >= 3.0f ? 1.0f : z[j] * (1.0f / 3) + 0.5f);
      }
      break;
    default:
      break;
  }
}

}  // namespace passdeploy
