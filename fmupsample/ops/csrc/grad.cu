// Gradients of reassembly, for the weights and for the values. No atomics: every number has one
// thread (or one fixed tree of threads) that sums it up, so results repeat bit for bit.
#include "grad_tensor_core.cuh"

namespace fmupsample {
namespace {

struct WeightsTask {
  Map grad, value, out;
  Axis rows, columns;
};

// For the weights: the transposed product. A thread owns R pixels of one column and one group, and
// sums over all channels. Blocks are numbered, fastest first: as PlaneTiles has it, then batch.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(256) grad_weights_kernel(WeightsTask task, PlaneTiles tiles) {
  using A = typename Arithmetic<scalar_t>::type;
  constexpr int R = rows_per_thread<A, T>();
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  int64_t b = blockIdx.x;
  const PlaneThread<A, T> own(tiles, rows, columns, b);
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);

  A sum[R][T * T];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int t = 0; t < T * T; ++t) sum[r][t] = A(0);

  A* cells = dynamic_shared<A>();  // [channels_at_once][T][span]
  const scalar_t* grad = static_cast<const scalar_t*>(task.grad.data) +
                         b * task.grad.stride[0] + own.y * task.grad.stride[2] + own.x;
  A next[R];
#pragma unroll
  for (int r = 0; r < R; ++r)
    next[r] = own.has(r) ? static_cast<A>(grad[r * task.grad.stride[2]]) : A(0);
  for (int32_t c0 = 0; c0 < channels; c0 += tiles.channels_at_once) {
    const int32_t count = min(tiles.channels_at_once, channels - c0);
    __syncthreads();
    own.stage(task.value, tiles, rows, columns, b, c0, count, cells);
    __syncthreads();
    for (int32_t c = 0; c < count; ++c) {
      A g[R];  // those of the next channel are under way while these are worked on
#pragma unroll
      for (int r = 0; r < R; ++r) {
        g[r] = next[r];
        if (own.has(r) && c0 + c + 1 < channels)
          next[r] = static_cast<A>(
              grad[(c0 + c + 1) * task.grad.stride[1] + r * task.grad.stride[2]]);
      }
#pragma unroll
      for (int i = 0; i < T; ++i) {
#pragma unroll
        for (int j = 0; j < T; ++j) {
          const A v = cells[(c * T + i) * tiles.span + own.cell + j];
#pragma unroll
          for (int r = 0; r < R; ++r) sum[r][i * T + j] += g[r] * v;
        }
      }
    }
  }

  const A fx = own.in_row ? columns.fraction<A>(own.x) : A(0);
  A* out = static_cast<A*>(task.out.data) + b * task.out.stride[0] +
           own.y * task.out.stride[2] + own.x;
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (own.has(r))
      unmerge<A, T>(sum[r], rows.fractional, rows.fraction<A>(own.y + r), fx,
                    out + r * task.out.stride[2], task.out.stride[1]);
}

template <typename scalar_t, int T>
void launch_grad_weights(const WeightsTask& task, void* stream) {
  const auto tiles =
      PlaneTiles::plan<typename Arithmetic<scalar_t>::type, T>(task.rows, task.columns);
  launch(grad_weights_kernel<scalar_t, T>, tiles.blocks() * task.grad.size[0], tiles.size,
         tiles.shared_bytes, stream, task, tiles);
}

// For the values, first step: per group, partial[b][gy][gx][t][v] = sum over its pixels of
// grad[v, p] * merged[p, t]. A warp takes C channels a lane, the warps of a block share the pixels
// and add up what they found in the order of their numbers.
constexpr int kSumWarps = 4;
constexpr int kSumPixels = 32;  // of a block's group whose gradients and weights lie in shared memory

struct ValueTask {
  Map grad, weights, out;
  void* partial;
  Axis rows, columns;
  bool summed;  // the first step is done already
};

template <typename scalar_t, int T>
__global__ void __launch_bounds__(32 * kSumWarps)
    group_sums_kernel(ValueTask task, int32_t channel_tiles, int32_t group_columns,
                      int32_t group_rows) {
  using A = typename Arithmetic<scalar_t>::type;
  constexpr int C = channels_per_thread<A, T>(), kChannels = 32 * C, pitch = kSumPixels + 1;
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  int64_t block = blockIdx.x;
  const int32_t c0 = static_cast<int32_t>(block % channel_tiles) * kChannels;
  block /= channel_tiles;
  const int64_t group = block;  // (b, gy, gx)
  const int32_t x_base = columns.first_base() + static_cast<int32_t>(block % group_columns);
  block /= group_columns;
  const int32_t y_base = rows.first_base() + static_cast<int32_t>(block % group_rows);
  const int64_t b = block / group_rows;
  const int32_t channels = static_cast<int32_t>(task.grad.size[1]);

  A* grads = dynamic_shared<A>();         // [kChannels][pitch]
  A* weights = grads + kChannels * pitch;  // [kSumPixels][T * T]
  const int32_t lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
  const int32_t y0 = rows.first_pixel(y_base), y1 = rows.first_pixel(int64_t(y_base) + 1);
  const int32_t x0 = columns.first_pixel(x_base), x1 = columns.first_pixel(int64_t(x_base) + 1);
  const int32_t width = x1 - x0, pixels = (y1 - y0) * width;
  const scalar_t* grad = static_cast<const scalar_t*>(task.grad.data) + b * task.grad.stride[0];

  A sum[C][T * T];
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int t = 0; t < T * T; ++t) sum[c][t] = A(0);
  for (int32_t p0 = 0; p0 < pixels; p0 += kSumPixels) {
    const int32_t count = min(kSumPixels, pixels - p0);
    __syncthreads();
    for (int32_t i = thread; i < kChannels * kSumPixels; i += 32 * kSumWarps) {
      const int32_t p = i % kSumPixels, c = i / kSumPixels;
      const int32_t y = y0 + (p0 + p) / width, x = x0 + (p0 + p) % width;
      grads[c * pitch + p] =
          p < count && c0 + c < channels
              ? static_cast<A>(grad[(c0 + c) * task.grad.stride[1] + y * task.grad.stride[2] +
                                    x * task.grad.stride[3]])
              : A(0);
    }
    for (int32_t p = thread; p < count; p += 32 * kSumWarps) {
      const int32_t y = y0 + (p0 + p) / width, x = x0 + (p0 + p) % width;
      A merged[T * T];
      merged_weights<A, T>(task.weights, b, y, x, rows.fractional, rows.fraction<A>(y),
                           columns.fraction<A>(x), merged);
#pragma unroll
      for (int t = 0; t < T * T; ++t) weights[p * T * T + t] = merged[t];
    }
    __syncthreads();
    for (int32_t p = warp; p < count; p += kSumWarps) {
      A g[C];
#pragma unroll
      for (int c = 0; c < C; ++c) g[c] = grads[(c * 32 + lane) * pitch + p];
#pragma unroll
      for (int t = 0; t < T * T; ++t) {
        const A w = weights[p * T * T + t];
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c][t] += g[c] * w;
      }
    }
  }

  // Add up the warps, 32 channels and one row of taps at a time, in memory that is free now.
  A* shares = dynamic_shared<A>();  // [kSumWarps][T][32]
  A* partial = static_cast<A*>(task.partial) + group * T * T * channels;
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < T; ++i) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < T; ++j) shares[(warp * T + j) * 32 + lane] = sum[c][i * T + j];
      __syncthreads();
      for (int32_t at = thread; at < T * 32; at += 32 * kSumWarps) {
        const int32_t channel = c0 + c * 32 + at % 32;
        if (channel >= channels) continue;
        A total = A(0);
#pragma unroll
        for (int w = 0; w < kSumWarps; ++w) total += shares[w * T * 32 + at];
        partial[int64_t(i * T + at / 32) * channels + channel] = total;
      }
    }
  }
}

// Second step: a cell's gradient is the sum over the groups that read it. Cells outside the map are
// those at its edge, so edge cells are read more than once by the same group.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(256)
    cell_sums_kernel(ValueTask task, int64_t total, int32_t group_columns, int32_t group_rows) {
  using A = typename Arithmetic<scalar_t>::type;
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  const int32_t channels = static_cast<int32_t>(task.out.size[1]);
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= total) return;
  int64_t rest = index;
  const int32_t channel = static_cast<int32_t>(rest % channels);
  rest /= channels;
  const int32_t column = static_cast<int32_t>(rest % columns.cells);
  rest /= columns.cells;
  const int32_t row = static_cast<int32_t>(rest % rows.cells);
  const int64_t b = rest / rows.cells;

  const int32_t half = (rows.fractional ? T - 1 : T) / 2;
  const int32_t y_first = rows.first_base(), x_first = columns.first_base();
  const A* partial = static_cast<const A*>(task.partial);
  A sum = A(0);
  // Tap i of base g lies in cell g - half + i, clamped.
  for (int i = 0; i < T; ++i) {
    const int32_t gy = row + half - i - y_first;
    const int32_t gy0 = row == 0 ? 0 : gy, gy1 = row == rows.cells - 1 ? group_rows - 1 : gy;
    for (int32_t y = max(gy0, 0); y <= min(gy1, group_rows - 1); ++y) {
      for (int j = 0; j < T; ++j) {
        const int32_t gx = column + half - j - x_first;
        const int32_t gx0 = column == 0 ? 0 : gx;
        const int32_t gx1 = column == columns.cells - 1 ? group_columns - 1 : gx;
        for (int32_t x = max(gx0, 0); x <= min(gx1, group_columns - 1); ++x)
          sum += partial[(((b * group_rows + y) * group_columns + x) * T * T + i * T + j) *
                             channels + channel];
      }
    }
  }
  static_cast<scalar_t*>(task.out.data)[b * task.out.stride[0] + channel * task.out.stride[1] +
                                        row * task.out.stride[2] +
                                        column * task.out.stride[3]] = narrow<scalar_t>(sum);
}

template <typename scalar_t, int T>
void launch_grad_value(const ValueTask& task, void* stream) {
  using A = typename Arithmetic<scalar_t>::type;
  constexpr int C = channels_per_thread<A, T>();
  const int32_t channels = static_cast<int32_t>(task.grad.size[1]);
  const int32_t tiles = ceil_divide(channels, 32 * C);
  const int32_t across = task.columns.groups(), down = task.rows.groups();
  const size_t sums = sizeof(A) * (32 * C * (kSumPixels + 1) + kSumPixels * T * T);
  const size_t shares = sizeof(A) * kSumWarps * T * 32;
  if (!task.summed)
    launch(group_sums_kernel<scalar_t, T>, int64_t(tiles) * across * down * task.grad.size[0],
         dim3(32, kSumWarps), sums > shares ? sums : shares, stream, task, tiles, across, down);
  const int64_t total = task.out.size[0] * task.out.size[1] * task.out.size[2] * task.out.size[3];
  launch(cell_sums_kernel<scalar_t, T>, (total + 255) / 256, dim3(256), 0, stream, task, total,
         across, down);
}

Axis axis_of(const Map& low, const Map& high, int d, bool fractional) {
  return Axis{static_cast<int32_t>(low.size[d]), static_cast<int32_t>(high.size[d]), fractional};
}

}  // namespace

void grad_weights(const Map& grad, const Map& value, const Map& out, int kernel_size,
                  bool fractional, const Device& device) {
  const Axis rows = axis_of(value, grad, 2, fractional);
  const Axis columns = axis_of(value, grad, 3, fractional);
  if (tensor_core::serves_gradients(grad, rows, columns, kernel_size, device)) {
    tensor_core::dispatch_gradients(grad, fractional, [&](auto zero, auto taps) {
      tensor_core::launch_grad_weights<decltype(zero), decltype(taps)::value>(
          grad, value, out, rows, columns, device.stream);
    });
    return;
  }
  const WeightsTask task{grad, value, out, rows, columns};
  FMUPSAMPLE_DISPATCH_SCALAR(
      grad.type, FMUPSAMPLE_DISPATCH_TAPS(
                     kernel_size, fractional,
                     launch_grad_weights<scalar_t, TAPS>(task, device.stream)))
}

void grad_value(const Map& grad, const Map& weights, void* partial, const Map& out,
                int kernel_size, bool fractional, const Device& device) {
  const Axis rows = axis_of(out, grad, 2, fractional), columns = axis_of(out, grad, 3, fractional);
  const bool served = tensor_core::serves_gradients(grad, rows, columns, kernel_size, device);
  if (served)
    tensor_core::dispatch_gradients(grad, fractional, [&](auto zero, auto taps) {
      tensor_core::launch_group_sums<decltype(zero), decltype(taps)::value>(
          grad, weights, partial, rows, columns, device.stream);
    });
  const ValueTask task{grad, weights, out, partial, rows, columns, served};
  FMUPSAMPLE_DISPATCH_SCALAR(
      grad.type, FMUPSAMPLE_DISPATCH_TAPS(kernel_size, fractional,
                                          launch_grad_value<scalar_t, TAPS>(task, device.stream)))
}

int64_t grad_value_partial_size(const Map& grad, const Map& out, int kernel_size,
                                bool fractional) {
  const int64_t taps = kernel_size + (fractional ? 1 : 0);
  return grad.size[0] * axis_of(out, grad, 2, fractional).groups() *
         axis_of(out, grad, 3, fractional).groups() * taps * taps * grad.size[1];
}

}  // namespace fmupsample
