// Reassembly, forward, in ordinary arithmetic: every type, kernel size, ratio and stride.
#include "reassemble_tensor_core.cuh"

namespace fmupsample {
namespace {

// NCHW. Blocks are numbered, fastest first: as PlaneTiles has it, then channel chunk, batch.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(256)
    planes_kernel(Task task, PlaneTiles tiles, int32_t channel_chunks, int32_t channels_per_chunk) {
  using A = typename Arithmetic<scalar_t>::type;
  constexpr int R = rows_per_thread<A, T>();
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  int64_t block = blockIdx.x;
  const PlaneThread<A, T> own(tiles, rows, columns, block);
  const int32_t c_first = static_cast<int32_t>(block % channel_chunks) * channels_per_chunk;
  const int64_t b = block / channel_chunks;
  const int32_t c_last =
      min(c_first + channels_per_chunk, static_cast<int32_t>(task.value.size[1]));

  A weight[R][T * T];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (own.has(r))
      merged_weights<A, T>(task.weights, b, own.y + r, own.x, rows.fractional,
                           rows.fraction<A>(own.y + r), columns.fraction<A>(own.x), weight[r]);
    else
#pragma unroll
      for (int t = 0; t < T * T; ++t) weight[r][t] = A(0);
  }

  A* cells = dynamic_shared<A>();  // [channels_at_once][T][span]
  scalar_t* out = static_cast<scalar_t*>(task.out.data) + b * task.out.stride[0] +
                  own.y * task.out.stride[2] + own.x;
  for (int32_t c0 = c_first; c0 < c_last; c0 += tiles.channels_at_once) {
    const int32_t count = min(tiles.channels_at_once, c_last - c0);
    __syncthreads();
    own.stage(task.value, tiles, rows, columns, b, c0, count, cells);
    __syncthreads();
    for (int32_t c = 0; c < count; ++c) {
      A sum[R];
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] = A(0);
#pragma unroll
      for (int i = 0; i < T; ++i) {
#pragma unroll
        for (int j = 0; j < T; ++j) {
          const A v = cells[(c * T + i) * tiles.span + own.cell + j];
#pragma unroll
          for (int r = 0; r < R; ++r) sum[r] += weight[r][i * T + j] * v;
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (own.has(r))
          out[(c0 + c) * task.out.stride[1] + r * task.out.stride[2]] = narrow<scalar_t>(sum[r]);
    }
  }
}

// Four neighbouring numbers, stored as one word where they are aligned.
template <typename scalar_t, int N>
struct alignas(sizeof(scalar_t) * N) Pack {
  scalar_t element[N];
};

constexpr int kPixelsAtOnce = 64;  // pixels whose merged weights lie in shared memory

// NHWC. Block: one group; threadIdx.x a run of channels, threadIdx.y a share of the pixels. Blocks
// are numbered, fastest first: channel tile, group column, group row, batch.
template <typename scalar_t, int T>
__global__ void __launch_bounds__(256)
    channels_kernel(Task task, int32_t channel_tiles, int32_t group_columns, int32_t group_rows,
                    bool packed) {
  using A = typename Arithmetic<scalar_t>::type;
  constexpr int C = channels_per_thread<A, T>();
  const Axis& rows = task.rows;
  const Axis& columns = task.columns;
  int64_t block = blockIdx.x;
  const int32_t tile = static_cast<int32_t>(block % channel_tiles);
  block /= channel_tiles;
  const int32_t x_base = columns.first_base() + static_cast<int32_t>(block % group_columns);
  block /= group_columns;
  const int32_t y_base = rows.first_base() + static_cast<int32_t>(block % group_rows);
  const int64_t b = block / group_rows;

  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t c0 = (tile * blockDim.x + threadIdx.x) * C;
  const int32_t half = (rows.fractional ? T - 1 : T) / 2;
  A cell[T * T][C];
#pragma unroll
  for (int t = 0; t < T * T; ++t) {
    const int64_t row = clamp(y_base - half + t / T, 0, rows.cells - 1);
    const int64_t column = clamp(x_base - half + t % T, 0, columns.cells - 1);
#pragma unroll
    for (int c = 0; c < C; ++c)
      cell[t][c] = c0 + c < channels
                       ? load<A>(task.value, b * task.value.stride[0] +
                                                 (c0 + c) * task.value.stride[1] +
                                                 row * task.value.stride[2] +
                                                 column * task.value.stride[3])
                       : A(0);
  }

  const int32_t y0 = rows.first_pixel(y_base), y1 = rows.first_pixel(int64_t(y_base) + 1);
  const int32_t x0 = columns.first_pixel(x_base), x1 = columns.first_pixel(int64_t(x_base) + 1);
  const int32_t width = x1 - x0, pixels = (y1 - y0) * width;
  A* weight = dynamic_shared<A>();  // [kPixelsAtOnce][T * T]
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  scalar_t* out = static_cast<scalar_t*>(task.out.data) + b * task.out.stride[0] + c0;
  for (int32_t p0 = 0; p0 < pixels; p0 += kPixelsAtOnce) {
    const int32_t count = min(kPixelsAtOnce, pixels - p0);
    __syncthreads();
    for (int32_t p = thread; p < count; p += blockDim.x * blockDim.y) {
      const int32_t y = y0 + (p0 + p) / width, x = x0 + (p0 + p) % width;
      A merged[T * T];
      merged_weights<A, T>(task.weights, b, y, x, rows.fractional, rows.fraction<A>(y),
                           columns.fraction<A>(x), merged);
#pragma unroll
      for (int t = 0; t < T * T; ++t) weight[p * T * T + t] = merged[t];
    }
    __syncthreads();
    if (c0 >= channels) continue;
    for (int32_t p = threadIdx.y; p < count; p += blockDim.y) {
      Pack<scalar_t, C> result;
      A sum[C];
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] = A(0);
#pragma unroll
      for (int t = 0; t < T * T; ++t) {
        const A w = weight[p * T * T + t];
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] += w * cell[t][c];
      }
#pragma unroll
      for (int c = 0; c < C; ++c) result.element[c] = narrow<scalar_t>(sum[c]);
      const int32_t y = y0 + (p0 + p) / width, x = x0 + (p0 + p) % width;
      scalar_t* to = out + y * task.out.stride[2] + x * task.out.stride[3];
      if (packed) {
        *reinterpret_cast<Pack<scalar_t, C>*>(to) = result;
      } else {
        for (int c = 0; c < C && c0 + c < channels; ++c) to[c] = result.element[c];
      }
    }
  }
}

template <typename scalar_t, int T>
void launch_planes(const Task& task, void* stream) {
  using A = typename Arithmetic<scalar_t>::type;
  const auto tiles = PlaneTiles::plan<A, T>(task.rows, task.columns);
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t per_chunk = channels < 96 ? channels : 96;
  const int32_t chunks = ceil_divide(channels, per_chunk);
  launch(planes_kernel<scalar_t, T>, tiles.blocks() * chunks * task.value.size[0], tiles.size,
         tiles.shared_bytes, stream, task, tiles, chunks, per_chunk);
}

template <typename scalar_t, int T>
void launch_channels(const Task& task, void* stream) {
  using A = typename Arithmetic<scalar_t>::type;
  constexpr int C = channels_per_thread<A, T>();
  const int32_t channels = static_cast<int32_t>(task.value.size[1]);
  const int32_t runs = ceil_divide(channels, C);
  const dim3 size(32 * (runs <= 32 ? 1 : runs <= 64 ? 2 : 4), runs <= 32 ? 4 : 2);
  const int32_t tiles = ceil_divide(runs, int32_t(size.x));
  const int32_t across = task.columns.groups(), down = task.rows.groups();
  const int64_t blocks = int64_t(tiles) * across * down * task.value.size[0];
  const bool packed = channels % C == 0 &&
                      reinterpret_cast<uintptr_t>(task.out.data) % (sizeof(scalar_t) * C) == 0;
  launch(channels_kernel<scalar_t, T>, blocks, size, sizeof(A) * kPixelsAtOnce * T * T, stream,
         task, tiles, across, down, packed);
}

}  // namespace

void reassemble(const Map& value, const Map& weights, const Map& out, int kernel_size,
                bool fractional, const Device& device) {
  const auto axis = [&](int d) {
    return Axis{static_cast<int32_t>(value.size[d]), static_cast<int32_t>(out.size[d]), fractional};
  };
  const Task task{value, weights, out, axis(2), axis(3)};
  // Channels apart by one element, and more than one of them: NHWC.
  const bool channels_last = out.stride[1] == 1 && out.size[1] > 1;
  if (tensor_core::run_if_served(task, kernel_size, channels_last, device)) return;
  FMUPSAMPLE_DISPATCH_SCALAR(
      value.type, FMUPSAMPLE_DISPATCH_TAPS(
                      kernel_size, fractional,
                      if (channels_last) launch_channels<scalar_t, TAPS>(task, device.stream);
                      else launch_planes<scalar_t, TAPS>(task, device.stream)))
}

}  // namespace fmupsample
