// What the kernels are told: maps of four axes, and how two axes of pixels lie on two of cells.
// No PyTorch and no CUDA in here, so that it serves the bindings, the kernels and the tests.
#pragma once

#include <cstdint>

namespace fmupsample {

enum class Scalar : int32_t { f64, f32, f16, bf16 };

// A tensor [B, C, Y, X] of any strides (in elements).
struct Map {
  void* data;
  Scalar type;
  int64_t size[4];
  int64_t stride[4];
};

// Where and on what to run.
struct Device {
  void* stream;       // cudaStream_t
  int32_t capability; // 10 * major + minor; 80 and more have the tensor-core instructions used here
};

// out[b, v, P] = sum_d weights[b, d, P] * sample(value[b, v], P, d); see fmupsample/ops/reassembly.py.
// `out` is dense in NCHW or NHWC order.
void reassemble(const Map& value, const Map& weights, const Map& out, int kernel_size,
                bool fractional, const Device& device);

// Gradient for the weights, float32 or float64, dense [B, K*K, H, W]; `grad` is dense NCHW.
void grad_weights(const Map& grad, const Map& value, const Map& out, int kernel_size,
                  bool fractional, const Device& device);

// Gradient for the values in two steps: per group of pixels that read the same cells, the sum for
// each of those cells (`partial`, see grad_value_groups), then per cell the sum over groups.
// `grad` is dense NCHW, `out` dense NCHW of grad's type.
void grad_value(const Map& grad, const Map& weights, void* partial, const Map& out,
                int kernel_size, bool fractional, const Device& device);

// Elements of `partial`, which is float32 (float64 for float64 gradients).
int64_t grad_value_partial_size(const Map& grad, const Map& out, int kernel_size, bool fractional);

}  // namespace fmupsample
