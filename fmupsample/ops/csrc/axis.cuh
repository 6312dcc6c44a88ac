// Exact coordinates, as in fmupsample/ops/grid.py: pixel P of N lies at LR coordinate
// (P + 1/2) n / N - 1/2, an integer over the common denominator 2 N.
#pragma once

#include <algorithm>
#include <type_traits>

#include "portable.cuh"
#include "problem.h"

namespace fmupsample {

// Floor of a / b for b > 0.
__host__ __device__ inline int64_t floor_divide(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return q - (a % b < 0);
}

// One axis: n cells, N pixels. Pixels with the same *base* read the same cells, base - K/2 and on:
// they are a *group*. Bases run without gaps from first_base() to last_base().
struct Axis {
  int32_t cells;
  int32_t pixels;
  bool fractional;

  __host__ __device__ int64_t numerator(int64_t pixel) const {
    return (2 * pixel + 1) * cells - (fractional ? pixels : 0);
  }
  __host__ __device__ int32_t base(int64_t pixel) const {
    return static_cast<int32_t>(floor_divide(numerator(pixel), 2 * int64_t(pixels)));
  }
  // Share of cell base + 1, in [0, 1); 0 for integer neighbours.
  template <typename T>
  __host__ __device__ T fraction(int64_t pixel) const {
    if (!fractional) return T(0);
    const int64_t whole = 2 * int64_t(pixels);
    const int64_t rest = numerator(pixel) - base(pixel) * whole;
    return static_cast<T>(static_cast<double>(rest) / static_cast<double>(whole));
  }
  // The first pixel whose base is at least `base`, at most N.
  __host__ __device__ int32_t first_pixel(int64_t base) const {
    const int64_t bound = 2 * int64_t(pixels) * base + (fractional ? pixels : 0) - cells;
    const int64_t pixel = -floor_divide(-bound, 2 * int64_t(cells));
    return static_cast<int32_t>(pixel < 0 ? 0 : pixel > pixels ? pixels : pixel);
  }
  __host__ __device__ int32_t first_base() const { return base(0); }
  __host__ __device__ int32_t last_base() const { return base(pixels - 1); }
  __host__ __device__ int32_t groups() const { return last_base() - first_base() + 1; }
  // Pixels of the longest group.
  __host__ __device__ int32_t slots() const { return (pixels + cells - 1) / cells; }
};

__host__ __device__ inline int32_t ceil_divide(int32_t a, int32_t b) { return (a + b - 1) / b; }

__host__ __device__ inline int32_t clamp(int32_t i, int32_t low, int32_t high) {
  return i < low ? low : i > high ? high : i;
}

// Arithmetic type: float for everything but double.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// An element of a map whose type is known at run time only: for what is read seldom.
template <typename T>
__device__ __forceinline__ T load(const Map& map, int64_t index) {
  switch (map.type) {
    case Scalar::f64:
      return static_cast<T>(static_cast<const double*>(map.data)[index]);
    case Scalar::f32:
      return static_cast<T>(static_cast<const float*>(map.data)[index]);
    case Scalar::f16:
      return static_cast<T>(static_cast<float>(static_cast<const c10::Half*>(map.data)[index]));
    default:
      return static_cast<T>(static_cast<float>(static_cast<const c10::BFloat16*>(map.data)[index]));
  }
}

// Rounds to T from the arithmetic type; c10's 16-bit types convert from float only.
template <typename T, typename A>
__host__ __device__ __forceinline__ T narrow(A x) {
  return static_cast<T>(x);
}

// Reads a pixel's K x K weights and merges them into weights of the T x T whole cells that its
// bilinear samples touch, T = K + 1; integer neighbours are their cells already, T = K.
template <typename A, int T>
__device__ __forceinline__ void merged_weights(const Map& weights, int64_t batch, int32_t y,
                                               int32_t x, bool fractional, A fy, A fx,
                                               A (&merged)[T * T]) {
  const int k = fractional ? T - 1 : T;
  const int64_t at = batch * weights.stride[0] + y * weights.stride[2] + x * weights.stride[3];
#pragma unroll
  for (int t = 0; t < T * T; ++t) merged[t] = A(0);
#pragma unroll
  for (int i = 0; i < T; ++i) {
#pragma unroll
    for (int j = 0; j < T; ++j) {
      if (i >= k || j >= k) continue;
      const A w = load<A>(weights, at + (i * k + j) * weights.stride[1]);
      merged[i * T + j] += w * (A(1) - fy) * (A(1) - fx);
      if (fractional) {
        if (j + 1 < T) merged[i * T + j + 1] += w * (A(1) - fy) * fx;
        if (i + 1 < T) merged[(i + 1) * T + j] += w * fy * (A(1) - fx);
        if (i + 1 < T && j + 1 < T) merged[(i + 1) * T + j + 1] += w * fy * fx;
      }
    }
  }
}

// The adjoint of merged_weights(): from gradients of the T x T merged weights of a pixel to those of
// its K x K weights, written `step` apart.
template <typename A, int T>
__device__ __forceinline__ void unmerge(const A (&merged)[T * T], bool fractional, A fy, A fx,
                                        A* to, int64_t step) {
  const int k = fractional ? T - 1 : T;
#pragma unroll
  for (int i = 0; i < T; ++i) {
#pragma unroll
    for (int j = 0; j < T; ++j) {
      if (i >= k || j >= k) continue;
      A g = (A(1) - fy) * (A(1) - fx) * merged[i * T + j];
      if (j + 1 < T) g += (A(1) - fy) * fx * merged[i * T + j + 1];
      if (i + 1 < T) g += fy * (A(1) - fx) * merged[(i + 1) * T + j];
      if (i + 1 < T && j + 1 < T) g += fy * fx * merged[(i + 1) * T + j + 1];
      to[(i * k + j) * step] = g;
    }
  }
}

// Runs the arguments with TAPS, the number of cells that a pixel reads along an axis.
#define FMUPSAMPLE_DISPATCH_TAPS(kernel_size, fractional, ...)                       \
  switch ((kernel_size) + ((fractional) ? 1 : 0)) {                                  \
    case 1: { constexpr int TAPS = 1; __VA_ARGS__; break; }                          \
    case 2: { constexpr int TAPS = 2; __VA_ARGS__; break; }                          \
    case 3: { constexpr int TAPS = 3; __VA_ARGS__; break; }                          \
    case 4: { constexpr int TAPS = 4; __VA_ARGS__; break; }                          \
    case 5: { constexpr int TAPS = 5; __VA_ARGS__; break; }                          \
    case 6: { constexpr int TAPS = 6; __VA_ARGS__; break; }                          \
    case 7: { constexpr int TAPS = 7; __VA_ARGS__; break; }                          \
    case 8: { constexpr int TAPS = 8; __VA_ARGS__; break; }                          \
    default: throw std::runtime_error("fmupsample: kernel sizes above 7 have no CUDA kernel"); \
  }

// Runs the arguments with scalar_t, the type that `type` names.
#define FMUPSAMPLE_DISPATCH_SCALAR(type, ...)                                        \
  switch (type) {                                                                    \
    case Scalar::f64: { using scalar_t = double; __VA_ARGS__; break; }               \
    case Scalar::f32: { using scalar_t = float; __VA_ARGS__; break; }                \
    case Scalar::f16: { using scalar_t = c10::Half; __VA_ARGS__; break; }            \
    case Scalar::bf16: { using scalar_t = c10::BFloat16; __VA_ARGS__; break; }       \
  }

}  // namespace fmupsample
