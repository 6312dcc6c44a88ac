// Gradients of reassembly for 16-bit gradients on tensor cores (capability 8.0 and up), K = 3,
// accumulated in float32. What the forward kernels say of groups and fragments holds here too.
#pragma once

#include "fragments.cuh"

namespace fmupsample {
namespace tensor_core {

template <int T>
constexpr int tap_blocks() {  // of 8 taps, the width of a product
  return (T * T + 7) / 8;
}

constexpr int kGradChannels = 64;             // channels whose cells lie in shared memory
constexpr int kGradPitch = padded(kStrip);    // of gradients in shared memory
constexpr int kCellPitch = padded(kGradChannels);

// For the weights: products [16 pixels x 16 channels] x [16 channels x 8 taps], summed over all
// channels. A warp holds 32 pixels of one row; gradients of pixels outside the group whose cells are
// multiplied are taken as zero. Blocks are numbered: column tile, run of rows, group row, batch.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(32 * kWarps)
    grad_weights_kernel(Map grad_map, Map value, Map out_map, Axis rows, Axis columns,
                        int32_t wide, int32_t column_tiles, int32_t row_blocks,
                        int32_t group_rows, int32_t span, bool aligned) {
  constexpr int N = tap_blocks<T>();
  int64_t block = blockIdx.x;
  const int32_t x_first = static_cast<int32_t>(block % column_tiles) * wide * kStrip;
  block /= column_tiles;
  const int32_t row_block = static_cast<int32_t>(block % row_blocks);
  block /= row_blocks;
  const int32_t y_base = rows.first_base() + static_cast<int32_t>(block % group_rows);
  const int64_t b = block / group_rows;
  const int32_t channels = static_cast<int32_t>(value.size[1]);

  const int32_t lane = threadIdx.x, warp = threadIdx.y, deep = blockDim.y / wide;
  const int32_t x_warp = x_first + warp % wide * kStrip;
  const int32_t y_end = rows.first_pixel(int64_t(y_base) + 1);
  const int32_t y = rows.first_pixel(y_base) + row_block * deep + warp / wide;
  const bool works = x_warp < columns.pixels && y < y_end;
  const int32_t half = (rows.fractional ? T - 1 : T) / 2;
  const int32_t first_base = columns.base(x_first);
  const int32_t first_group = columns.base(min(x_warp, columns.pixels - 1));
  const int32_t last_group = columns.base(min(x_warp + kStrip, columns.pixels) - 1);

  // Shared: cells [T][span][kCellPitch]; per warp 16 channels of gradients [16][kGradPitch], and in
  // the end its sums, float [32][8 N + 1].
  scalar_t* cells = dynamic_shared<scalar_t>();
  constexpr int own = sizeof(float) * kStrip * (8 * N + 1) > sizeof(scalar_t) * 16 * kGradPitch
                          ? sizeof(float) * kStrip * (8 * N + 1)
                          : sizeof(scalar_t) * 16 * kGradPitch;
  unsigned char* room = reinterpret_cast<unsigned char*>(cells + T * span * kCellPitch) +
                        warp * ((own + 15) / 16 * 16);
  scalar_t* grads = reinterpret_cast<scalar_t*>(room);

  // Pixels of rows lane / 4 + 8 i of the two products side by side: whose group they are in.
  int32_t group[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      group[m][i] = columns.base(min(x_warp + 16 * m + 8 * i + lane / 4, columns.pixels - 1));

  float sum[2][N][4];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;

  // A lane brings 8 pixels of channels lane / 4 and lane / 4 + 8; the next ones are under way while
  // these are worked on.
  const int32_t x_lane = x_warp + 8 * (lane % 4);
  const scalar_t* grad = static_cast<const scalar_t*>(grad_map.data) + b * grad_map.stride[0] +
                         y * grad_map.stride[2] + x_lane;
  uint4 next[2];
  const auto fetch = [&](int32_t c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t channel = c + lane / 4 + 8 * h;
      const bool there = works && channel < channels;
      next[h] = load8(there ? grad + channel * grad_map.stride[1] : grad,
                      there ? columns.pixels - x_lane : 0, aligned);
    }
  };
  fetch(0);
  const int32_t thread = warp * 32 + lane, threads = 32 * blockDim.y;
  for (int32_t c0 = 0; c0 < channels; c0 += kGradChannels) {
    const int32_t count = min(kGradChannels, channels - c0);
    const int32_t whole = ceil_divide(count, 16) * 16;
    __syncthreads();
    for (int32_t i = thread; i < whole * T * span; i += threads) {
      const int32_t at = i % (T * span), c = i / (T * span);
      const int64_t row = clamp(y_base - half + at / span, 0, rows.cells - 1);
      const int64_t column = clamp(first_base - half + at % span, 0, columns.cells - 1);
      cells[at * kCellPitch + c] =
          c < count ? static_cast<scalar_t>(load<float>(
                          value, b * value.stride[0] + (c0 + c) * value.stride[1] +
                                     row * value.stride[2] + column * value.stride[3]))
                    : scalar_t(0.f);
    }
    __syncthreads();
    if (!works) continue;
    for (int32_t c = 0; c < count; c += 16) {
      __syncwarp();
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint4*>(grads + (lane / 4 + 8 * h) * kGradPitch + 8 * (lane % 4)) =
            next[h];
      __syncwarp();
      fetch(c0 + c + 16);
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        // Matrices: channels 0-7 and pixels 0-7, channels 0-7 and pixels 8-15, then channels 8-15.
        warp_load_transposed(left[m], grads + (lane / 16 * 8 + lane % 8) * kGradPitch + 16 * m +
                                          lane / 8 % 2 * 8);
      for (int32_t g = first_group; g <= last_group; ++g) {
        uint32_t right[N][2];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int32_t tap = min(8 * n + lane / 4, T * T - 1);  // columns beyond are not used
          const scalar_t* cell = cells + (tap / T * span + g - first_base + tap % T) * kCellPitch +
                                 c + 2 * (lane % 4);
          right[n][0] = pair(cell[0], cell[1]);
          right[n][1] = pair(cell[8], cell[9]);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const bool upper = group[m][0] == g, lower = group[m][1] == g;
          const uint32_t masked[4] = {upper ? left[m][0] : 0u, lower ? left[m][1] : 0u,
                                      upper ? left[m][2] : 0u, lower ? left[m][3] : 0u};
#pragma unroll
          for (int n = 0; n < N; ++n) warp_multiply<scalar_t>(sum[m][n], masked, right[n]);
        }
      }
    }
  }
  if (!works) return;

  // To the lane that owns the pixel, which unmerges.
  float* sums = reinterpret_cast<float*>(room);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(16 * m + lane / 4 + i / 2 * 8) * (8 * N + 1) + 8 * n + 2 * (lane % 4) + i % 2] =
            sum[m][n][i];
  __syncwarp();
  const int32_t x = x_warp + lane;
  if (x >= columns.pixels) return;
  float merged[T * T];
#pragma unroll
  for (int t = 0; t < T * T; ++t) merged[t] = sums[lane * (8 * N + 1) + t];
  unmerge<float, T>(merged, rows.fractional, rows.fraction<float>(y), columns.fraction<float>(x),
                    static_cast<float*>(out_map.data) + b * out_map.stride[0] +
                        y * out_map.stride[2] + x,
                    out_map.stride[1]);
}

constexpr int kValueWarps = 4;
constexpr int kValueChannels = 32 * kValueWarps;  // of a block
constexpr int kValuePixels = 32;                  // whose gradients lie in shared memory
constexpr int kValuePitch = padded(kValuePixels);

// For the values, first step (see grad.cu): products [16 channels x 16 pixels] x [16 pixels x
// 8 taps], summed over the pixels of a group. A warp takes 32 channels of the block's group.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(32 * kValueWarps)
    group_sums_kernel(Map grad_map, Map weight_map, float* partial, Axis rows, Axis columns,
                      int32_t channel_tiles, int32_t group_columns, int32_t group_rows) {
  constexpr int N = tap_blocks<T>();
  int64_t block = blockIdx.x;
  const int32_t c0 = static_cast<int32_t>(block % channel_tiles) * kValueChannels;
  block /= channel_tiles;
  const int64_t number = block;  // (b, gy, gx)
  const int32_t x_base = columns.first_base() + static_cast<int32_t>(block % group_columns);
  block /= group_columns;
  const int32_t y_base = rows.first_base() + static_cast<int32_t>(block % group_rows);
  const int64_t b = block / group_rows;
  const int32_t channels = static_cast<int32_t>(grad_map.size[1]);
  const int32_t lane = threadIdx.x, warp = threadIdx.y;

  scalar_t* grads = dynamic_shared<scalar_t>();           // [kValueChannels][kValuePitch]
  scalar_t* weights = grads + kValueChannels * kValuePitch;  // [8 N taps][kValuePitch]
  const int32_t y0 = rows.first_pixel(y_base), y1 = rows.first_pixel(int64_t(y_base) + 1);
  const int32_t x0 = columns.first_pixel(x_base), x1 = columns.first_pixel(int64_t(x_base) + 1);
  const int32_t width = x1 - x0, pixels = (y1 - y0) * width;
  const scalar_t* grad = static_cast<const scalar_t*>(grad_map.data) + b * grad_map.stride[0];

  float sum[2][N][4];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;
  for (int32_t p0 = 0; p0 < pixels; p0 += kValuePixels) {
    const int32_t p = p0 + lane;
    const bool there = p < pixels;
    const int32_t y = y0 + p / width, x = x0 + p % width;
    __syncthreads();
    // A warp brings 32 pixels of one channel at a time.
    const scalar_t* from = grad + y * grad_map.stride[2] + x * grad_map.stride[3];
#pragma unroll 8
    for (int32_t c = warp; c < kValueChannels; c += kValueWarps)
      grads[c * kValuePitch + lane] =
          there && c0 + c < channels ? from[(c0 + c) * grad_map.stride[1]] : scalar_t(0.f);
    if (warp == 0) {
      float merged[T * T];
      if (there)
        merged_weights<float, T>(weight_map, b, y, x, rows.fractional, rows.fraction<float>(y),
                                 columns.fraction<float>(x), merged);
#pragma unroll
      for (int t = 0; t < 8 * N; ++t)
        weights[t * kValuePitch + lane] =
            narrow<scalar_t>(there && t < T * T ? merged[t < T * T ? t : 0] : 0.f);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kValuePixels; k += 16) {
      uint32_t right[N][2];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const scalar_t* w = weights + (8 * n + lane / 4) * kValuePitch + k + 2 * (lane % 4);
        right[n][0] = pair(w[0], w[1]);
        right[n][1] = pair(w[8], w[9]);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t left[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const scalar_t* g = grads +
                              (warp * 32 + 16 * m + lane / 4 + i % 2 * 8) * kValuePitch + k +
                              i / 2 * 8 + 2 * (lane % 4);
          left[i] = pair(g[0], g[1]);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) warp_multiply<scalar_t>(sum[m][n], left, right[n]);
      }
    }
  }
  partial += number * T * T * channels;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t channel = c0 + warp * 32 + 16 * m + lane / 4 + i / 2 * 8;
        const int32_t tap = 8 * n + 2 * (lane % 4) + i % 2;
        if (channel < channels && tap < T * T)
          partial[int64_t(tap) * channels + channel] = sum[m][n][i];
      }
}

// Whether these kernels serve a case; see run_if_served.
inline bool serves_gradients(const Map& grad, const Axis& rows, const Axis& columns,
                             int kernel_size, const Device& device) {
  return device.capability >= 80 && (grad.type == Scalar::f16 || grad.type == Scalar::bf16) &&
         kernel_size == 3 && columns.pixels / columns.cells >= 8 &&
         rows.pixels / rows.cells >= 2;
}

template <typename scalar_t, int T>
void launch_grad_weights(const Map& grad, const Map& value, const Map& out, const Axis& rows,
                         const Axis& columns, void* stream) {
  constexpr int N = tap_blocks<T>();
  const int32_t deep = rows.slots() < kWarps ? rows.slots() : kWarps, wide = kWarps / deep;
  const int32_t column_tiles = ceil_divide(columns.pixels, wide * kStrip);
  const int32_t row_blocks = ceil_divide(rows.slots(), deep), group_rows = rows.groups();
  const int32_t span = static_cast<int32_t>(int64_t(wide) * kStrip * columns.cells /
                                            columns.pixels) + 1 + T;
  size_t own = sizeof(float) * kStrip * (8 * N + 1);
  if (own < sizeof(scalar_t) * 16 * kGradPitch) own = sizeof(scalar_t) * 16 * kGradPitch;
  const size_t shared =
      sizeof(scalar_t) * T * span * kCellPitch + size_t(wide) * deep * ((own + 15) / 16 * 16);
  const bool aligned =
      columns.pixels % 8 == 0 && reinterpret_cast<uintptr_t>(grad.data) % 16 == 0;
  launch(grad_weights_kernel<scalar_t, T>,
         int64_t(column_tiles) * row_blocks * group_rows * grad.size[0], dim3(32, wide * deep),
         shared, stream, grad, value, out, rows, columns, wide, column_tiles, row_blocks,
         group_rows, span, aligned);
}

template <typename scalar_t, int T>
void launch_group_sums(const Map& grad, const Map& weights, void* partial, const Axis& rows,
                       const Axis& columns, void* stream) {
  const int32_t tiles = ceil_divide(static_cast<int32_t>(grad.size[1]), kValueChannels);
  const int32_t across = columns.groups(), down = rows.groups();
  const size_t shared =
      sizeof(scalar_t) * (kValueChannels + 8 * tap_blocks<T>()) * kValuePitch;
  launch(group_sums_kernel<scalar_t, T>, int64_t(tiles) * across * down * grad.size[0],
         dim3(32, kValueWarps), shared, stream, grad, weights, static_cast<float*>(partial), rows,
         columns, tiles, across, down);
}

// Calls f(scalar_t(0), taps as an integral constant) for the two types and the two kinds of
// neighbours that the gradient kernels serve.
template <typename F>
void dispatch_gradients(const Map& grad, bool fractional, F f) {
  const auto with = [&](auto taps) {
    if (grad.type == Scalar::f16)
      f(c10::Half(0.f), taps);
    else
      f(c10::BFloat16(0.f), taps);
  };
  if (fractional)
    with(std::integral_constant<int, 4>());
  else
    with(std::integral_constant<int, 3>());
}

}  // namespace tensor_core
}  // namespace fmupsample
