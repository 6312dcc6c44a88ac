// Reassembly of 16-bit values on tensor cores (capability 8.0 and up), accumulated in float32.
//
// Per group of pixels that read the same cells, reassembly is a product [pixels x taps] x
// [taps x channels], taps = 9 to 64: for the usual K = 3, fractional, the 16 taps are exactly one
// k-step of mma.m16n8k16. What is left to do is memory: outputs leave as 16 aligned bytes a lane,
// which decides how rows and columns of the products are given to pixels and channels.
//
// Column n = 2 q + e of product j of 4 stands for number 8 q + 2 j + e of 32 neighbouring ones
// (pixels in NCHW, channels in NHWC). PTX gives lane l the columns 2 (l % 4) + {0, 1}, so over
// the four products a lane holds the 8 neighbours 8 (l % 4) .. 8 (l % 4) + 7.
#pragma once

#include "fragments.cuh"

namespace fmupsample {
namespace tensor_core {

template <int T>
constexpr int k_steps() {
  return (T * T + 15) / 16;
}

// Merged weights of one pixel, rounded to the type of the product, padded with zeros to whole
// k-steps. All zeros where `inside` is false.
template <typename scalar_t, int T>
__device__ __forceinline__ void write_weights(const Task& task, int64_t b, int32_t y, int32_t x,
                                              bool inside, scalar_t* to) {
  float merged[T * T];
  if (inside)
    merged_weights<float, T>(task.weights, b, y, x, task.rows.fractional,
                             task.rows.fraction<float>(y), task.columns.fraction<float>(x), merged);
#pragma unroll
  for (int t = 0; t < 16 * k_steps<T>(); ++t)
    to[t] = narrow<scalar_t>(inside && t < T * T ? merged[t < T * T ? t : 0] : 0.f);
}

// Channels whose cells lie in shared memory: fewer where the weights take more of it.
template <int T>
constexpr int plane_channels() {
  return k_steps<T>() <= 2 ? 64 : 32;
}

constexpr int kPlaneRows = 2;  // rows of pixels that a warp holds

// NCHW: products [16 channels x 16 taps] x [16 taps x 8 pixels]. A warp holds 32 pixels of R rows,
// which start at multiples of 32 to keep stores aligned, so they belong to several groups: each
// group's cells are multiplied with the weights of its own pixels, zeros elsewhere, and added up.
// (Where features are infinite, that spreads NaNs a few pixels further than the definition does.)
// Blocks are numbered, fastest first: column tile, run of row chunks, group row, channels, batch.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(32 * kWarps, 2)
    planes_kernel(Task task, int32_t wide, int32_t column_tiles, int32_t row_blocks,
                  int32_t group_rows, int32_t channel_chunks, int32_t channels_per_chunk,
                  int32_t span, bool aligned) {
  constexpr int R = kPlaneRows, S = k_steps<T>(), P = 16 * S;
  constexpr int at_once = plane_channels<T>(), pitch = padded(at_once);
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  int64_t block = blockIdx.x;
  const int32_t x_first = static_cast<int32_t>(block % column_tiles) * wide * kStrip;
  block /= column_tiles;
  const int32_t row_block = static_cast<int32_t>(block % row_blocks);
  block /= row_blocks;
  const int32_t y_base = rows.first_base() + static_cast<int32_t>(block % group_rows);
  block /= group_rows;
  const int32_t c_first = static_cast<int32_t>(block % channel_chunks) * channels_per_chunk;
  const int64_t b = block / channel_chunks;
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t c_last = min(c_first + channels_per_chunk, channels);

  const int32_t lane = threadIdx.x, warp = threadIdx.y, deep = blockDim.y / wide;
  const int32_t x_warp = x_first + warp % wide * kStrip;
  const int32_t y_end = rows.first_pixel(int64_t(y_base) + 1);
  const int32_t y_warp = rows.first_pixel(y_base) + (row_block * deep + warp / wide) * R;
  const int32_t half = (rows.fractional ? T - 1 : T) / 2;
  const int32_t first_base = columns.base(x_first);

  // Shared: the cells [T][span][pitch], then per warp the weights [32][P] of one row of pixels.
  scalar_t* cells = dynamic_shared<scalar_t>();
  scalar_t* weights = cells + T * span * pitch + warp * kStrip * P;

  // Right-hand sides, and whose pixels they are: column lane / 4 of the four products.
  uint32_t right[R][S][4][2];
  int32_t group[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int32_t x = x_warp + 8 * (lane / 8) + 2 * j + lane / 4 % 2;
    group[j] = columns.base(min(x, columns.pixels - 1));
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int32_t x = x_warp + lane, y = y_warp + r;
    write_weights<scalar_t, T>(task, b, y, x, x < columns.pixels && y < y_end, weights + lane * P);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const scalar_t* from = weights + (8 * (lane / 8) + 2 * j + lane / 4 % 2) * P + 2 * (lane % 4);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        right[r][s][j][0] = pair(from[16 * s], from[16 * s + 1]);
        right[r][s][j][1] = pair(from[16 * s + 8], from[16 * s + 9]);
      }
    }
    __syncwarp();
  }
  const bool works = x_warp < columns.pixels && y_warp < y_end;
  const int32_t first_group = columns.base(min(x_warp, columns.pixels - 1));
  const int32_t last_group = columns.base(min(x_warp + kStrip, columns.pixels) - 1);

  const int32_t thread = warp * 32 + lane, threads = 32 * blockDim.y;
  const int32_t x_lane = x_warp + 8 * (lane % 4);
  scalar_t* out = static_cast<scalar_t*>(task.out.data) + b * task.out.stride[0] + x_lane;
  for (int32_t c0 = c_first; c0 < c_last; c0 += at_once) {
    const int32_t count = min(at_once, c_last - c0);
    const int32_t whole = ceil_divide(count, 16) * 16;
    __syncthreads();
    for (int32_t i = thread; i < whole * T * span; i += threads) {
      const int32_t at = i % (T * span), c = i / (T * span);
      const int32_t row = clamp(y_base - half + at / span, 0, rows.cells - 1);
      const int32_t column = clamp(first_base - half + at % span, 0, columns.cells - 1);
      const int64_t from = b * task.value.stride[0] + (c0 + c) * task.value.stride[1] +
                           row * task.value.stride[2] + column * task.value.stride[3];
      cells[at * pitch + c] =
          c < count ? static_cast<const scalar_t*>(task.value.data)[from] : scalar_t(0.f);
    }
    __syncthreads();
    if (!works) continue;
    for (int32_t c = 0; c < count; c += 16) {
      float sum[R][4][4];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r][j][i] = 0.f;
      for (int32_t g = first_group; g <= last_group; ++g) {
#pragma unroll
        for (int s = 0; s < S; ++s) {
          // Matrices: taps 0-7 and channels 0-7, taps 0-7 and channels 8-15, then taps 8-15.
          int32_t tap = 16 * s + lane / 16 * 8 + lane % 8;
          if (tap >= T * T) tap = 0;  // its weights are zero
          const int32_t at = tap / T * span + g - first_base + tap % T;
          uint32_t left[4];
          warp_load_transposed(left, cells + at * pitch + c + lane / 8 % 2 * 8);
#pragma unroll
          for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const bool own = group[j] == g;
              const uint32_t masked[2] = {own ? right[r][s][j][0] : 0u,
                                          own ? right[r][s][j][1] : 0u};
              warp_multiply<scalar_t>(sum[r][j], left, masked);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (y_warp + r >= y_end) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int32_t channel = c0 + c + lane / 4 + 8 * h;
          if (channel >= c_last) continue;
          float run[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) run[i] = sum[r][i / 2][2 * h + i % 2];
          store8<scalar_t>(out + channel * task.out.stride[1] + (y_warp + r) * task.out.stride[2],
                           run, columns.pixels - x_lane, aligned);
        }
      }
    }
  }
}

constexpr int kGroupPixels = 64;                   // pixels whose weights lie in shared memory
constexpr int kGroupChannels = kWarps * kStrip;    // channels of a block

// NHWC: products [16 pixels x 16 taps] x [16 taps x 8 channels]. Block: one group, each warp 32
// channels of it. Blocks are numbered, fastest first: channel tile, group column, group row, batch.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(32 * kWarps)
    channels_kernel(Task task, int32_t channel_tiles, int32_t group_columns, int32_t group_rows,
                    bool aligned) {
  constexpr int S = k_steps<T>(), P = 16 * S;
  const int32_t lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int32_t pitch = padded(warps * kStrip);
  constexpr int weight_pitch = P + 8;
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  int64_t block = blockIdx.x;
  const int32_t c_block = static_cast<int32_t>(block % channel_tiles) * warps * kStrip;
  block /= channel_tiles;
  const int32_t x_base = columns.first_base() + static_cast<int32_t>(block % group_columns);
  block /= group_columns;
  const int32_t y_base = rows.first_base() + static_cast<int32_t>(block % group_rows);
  const int64_t b = block / group_rows;
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t half = (rows.fractional ? T - 1 : T) / 2;

  scalar_t* cells = dynamic_shared<scalar_t>();  // [P][pitch], channels in the products' order
  scalar_t* weights = cells + P * pitch;         // [kGroupPixels][weight_pitch]
  const int32_t thread = warp * 32 + lane, threads = 32 * warps;
  for (int32_t i = thread; i < P * warps * kStrip; i += threads) {
    const int32_t c = i % (warps * kStrip), tap = i / (warps * kStrip);
    const int32_t row = clamp(y_base - half + tap / T, 0, rows.cells - 1);
    const int32_t column = clamp(x_base - half + tap % T, 0, columns.cells - 1);
    const bool inside = tap < T * T && c_block + c < channels;
    const int64_t from = b * task.value.stride[0] + (c_block + c) * task.value.stride[1] +
                         row * task.value.stride[2] + column * task.value.stride[3];
    // Number 8 q + 2 j + e of a strip is column 2 q + e of product j.
    const int32_t n = c % kStrip, place = c - n + n % 8 / 2 * 8 + n / 8 * 2 + n % 2;
    cells[tap * pitch + place] =
        inside ? static_cast<const scalar_t*>(task.value.data)[from] : scalar_t(0.f);
  }
  __syncthreads();
  uint32_t right[S][4][2];
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t four[4];  // taps 0-7 and 8-15 of product j, then of j + 1
      warp_load_transposed(four, cells + (16 * s + lane / 8 % 2 * 8 + lane % 8) * pitch +
                                     warp * kStrip + (j + lane / 16) * 8);
      right[s][j][0] = four[0];
      right[s][j][1] = four[1];
      right[s][j + 1][0] = four[2];
      right[s][j + 1][1] = four[3];
    }
  }

  const int32_t y0 = rows.first_pixel(y_base), y1 = rows.first_pixel(int64_t(y_base) + 1);
  const int32_t x0 = columns.first_pixel(x_base), x1 = columns.first_pixel(int64_t(x_base) + 1);
  const int32_t width = x1 - x0, pixels = (y1 - y0) * width;
  const int32_t c_lane = c_block + warp * kStrip + 8 * (lane % 4);
  scalar_t* out = static_cast<scalar_t*>(task.out.data) + b * task.out.stride[0] + c_lane;
  for (int32_t p0 = 0; p0 < pixels; p0 += kGroupPixels) {
    const int32_t count = min(kGroupPixels, pixels - p0);
    __syncthreads();
    for (int32_t p = thread; p < kGroupPixels; p += threads)
      write_weights<scalar_t, T>(task, b, y0 + (p0 + p) / width, x0 + (p0 + p) % width, p < count,
                                 weights + p * weight_pitch);
    __syncthreads();
    for (int32_t p = 0; p < count; p += 16) {
      float sum[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[j][i] = 0.f;
      const scalar_t* from = weights + (p + lane / 4) * weight_pitch + 2 * (lane % 4);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        uint32_t left[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const scalar_t* two = from + i % 2 * 8 * weight_pitch + 16 * s + i / 2 * 8;
          left[i] = pair(two[0], two[1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) warp_multiply<scalar_t>(sum[j], left, right[s][j]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int32_t at = p0 + p + lane / 4 + 8 * h;
        if (at >= p0 + count || c_lane >= channels) continue;
        float run[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) run[i] = sum[i / 2][2 * h + i % 2];
        store8<scalar_t>(out + (y0 + at / width) * task.out.stride[2] +
                             (x0 + at % width) * task.out.stride[3],
                         run, channels - c_lane, aligned);
      }
    }
  }
}

template <typename scalar_t, int T>
void launch_planes(const Task& task, void* stream) {
  constexpr int R = kPlaneRows, P = 16 * k_steps<T>();
  const int32_t row_chunks = ceil_divide(task.rows.slots(), R);
  const int32_t deep = row_chunks < kWarps ? row_chunks : kWarps;
  const int32_t wide = kWarps / deep;
  const int32_t column_tiles = ceil_divide(task.columns.pixels, wide * kStrip);
  const int32_t row_blocks = ceil_divide(row_chunks, deep);
  const int32_t span = static_cast<int32_t>(int64_t(wide) * kStrip * task.columns.cells /
                                            task.columns.pixels) + 1 + T;
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t per_chunk = channels < 128 ? channels : 128;
  const int32_t chunks = ceil_divide(channels, per_chunk), group_rows = task.rows.groups();
  const int64_t blocks =
      int64_t(column_tiles) * row_blocks * group_rows * chunks * task.value.size[0];
  const size_t shared = sizeof(scalar_t) * (size_t(T) * span * padded(plane_channels<T>()) +
                                            size_t(wide) * deep * kStrip * P);
  const bool aligned =
      task.columns.pixels % 8 == 0 && reinterpret_cast<uintptr_t>(task.out.data) % 16 == 0;
  launch(planes_kernel<scalar_t, T>, blocks, dim3(32, wide * deep), shared, stream, task, wide,
         column_tiles, row_blocks, group_rows, chunks, per_chunk, span, aligned);
}

template <typename scalar_t, int T>
void launch_channels(const Task& task, void* stream) {
  constexpr int P = 16 * k_steps<T>();
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t strips = ceil_divide(channels, kStrip);
  const int32_t tiles = ceil_divide(strips, kWarps), warps = ceil_divide(strips, tiles);
  const int32_t across = task.columns.groups(), down = task.rows.groups();
  const size_t shared =
      sizeof(scalar_t) * (size_t(P) * padded(warps * kStrip) + size_t(kGroupPixels) * (P + 8));
  const bool aligned = channels % 8 == 0 && reinterpret_cast<uintptr_t>(task.out.data) % 16 == 0;
  launch(channels_kernel<scalar_t, T>, int64_t(tiles) * across * down * task.value.size[0],
         dim3(32, warps), shared, stream, task, tiles, across, down, aligned);
}

template <int T>
void launch_for(const Task& task, bool channels_last, void* stream) {
  if constexpr (T >= 3) {  // fewer taps do not fill a k-step
    const auto run = [&](auto zero) {
      using scalar_t = decltype(zero);
      if (channels_last)
        launch_channels<scalar_t, T>(task, stream);
      else
        launch_planes<scalar_t, T>(task, stream);
    };
    if (task.value.type == Scalar::f16)
      run(c10::Half(0.f));
    else
      run(c10::BFloat16(0.f));
  }
}

// Runs if tensor cores serve the case and gain something: 16-bit values, a capable device, taps
// that fill a k-step, and groups wide enough that 32 pixels span a few only.
inline bool run_if_served(const Task& task, int kernel_size, bool channels_last,
                          const Device& device) {
  if (device.capability < 80) return false;
  if (task.value.type != Scalar::f16 && task.value.type != Scalar::bf16) return false;
  const bool fractional = task.rows.fractional;
  if (kernel_size + (fractional ? 1 : 0) < 3) return false;
  if (task.columns.pixels / task.columns.cells < 8) return false;
  FMUPSAMPLE_DISPATCH_TAPS(kernel_size, fractional,
                           launch_for<TAPS>(task, channels_last, device.stream))
  return true;
}

}  // namespace tensor_core
}  // namespace fmupsample
