// How the kernels in ordinary arithmetic divide the work: all pixels of a group read the same T x T
// cells, so a thread that owns several pixels of one group (or several channels of one cell) loads
// once and uses often, as far as its registers reach.
#pragma once

#include "axis.cuh"

namespace fmupsample {

// A reassembly.
struct Task {
  Map value, weights, out;
  Axis rows, columns;
};

// Pixels of one column that a thread owns: R * T * T weights lie in its registers.
template <typename A, int T>
constexpr int rows_per_thread() {
  constexpr int r = T <= 4 ? 4 : T <= 6 ? 2 : 1;
  return sizeof(A) == 8 && r > 1 ? r / 2 : r;
}

// Channels that a thread owns: C * T * T cells or sums lie in its registers.
template <typename A, int T>
constexpr int channels_per_thread() {
  return rows_per_thread<A, T>();
}

// Blocks of columns x runs of rows: threadIdx.x is a column, threadIdx.y a run of R rows of one
// group row; a block works on 8 warps' worth or a little less.
struct PlaneTiles {
  dim3 size;
  int32_t column_tiles;
  int32_t row_blocks;
  int32_t group_rows;
  int32_t span;              // cells that a block's columns can touch
  int32_t channels_at_once;  // whose cells lie in shared memory
  size_t shared_bytes;

  static constexpr int32_t kColumns = 32;
  static constexpr int32_t kChannels = 16;
  static constexpr size_t kSharedBytes = 32 << 10;  // or what one channel needs

  template <typename A, int T>
  static PlaneTiles plan(const Axis& rows, const Axis& columns) {
    const int32_t row_chunks = ceil_divide(rows.slots(), rows_per_thread<A, T>());
    const int32_t deep = row_chunks < 8 ? row_chunks : 8;
    PlaneTiles tiles;
    tiles.size = dim3(kColumns * (8 / deep), deep);
    const int32_t wide = static_cast<int32_t>(tiles.size.x);
    tiles.column_tiles = ceil_divide(columns.pixels, wide);
    tiles.row_blocks = ceil_divide(row_chunks, deep);
    tiles.group_rows = rows.groups();
    tiles.span = static_cast<int32_t>(int64_t(wide) * columns.cells / columns.pixels) + 1 + T;
    const size_t channel_bytes = sizeof(A) * T * tiles.span;
    tiles.channels_at_once =
        clamp(static_cast<int32_t>(kSharedBytes / channel_bytes), 1, kChannels);
    tiles.shared_bytes = channel_bytes * tiles.channels_at_once;
    return tiles;
  }

  // Blocks of one batch entry (and one chunk of channels).
  int64_t blocks() const { return int64_t(column_tiles) * row_blocks * group_rows; }
};

// What one thread of such a block works on. Takes its share off the block's number `rest`.
template <typename A, int T>
struct PlaneThread {
  int32_t x, y, y_end, y_base;
  int32_t first_cell;  // the cell at column 0 of shared memory
  int32_t cell;        // this thread's first cell, counted from there
  bool in_row;

  __device__ PlaneThread(const PlaneTiles& tiles, const Axis& rows, const Axis& columns,
                         int64_t& rest) {
    const int32_t x_first = static_cast<int32_t>(rest % tiles.column_tiles) * blockDim.x;
    rest /= tiles.column_tiles;
    const int32_t row_block = static_cast<int32_t>(rest % tiles.row_blocks);
    rest /= tiles.row_blocks;
    y_base = rows.first_base() + static_cast<int32_t>(rest % tiles.group_rows);
    rest /= tiles.group_rows;
    x = x_first + threadIdx.x;
    in_row = x < columns.pixels;
    y_end = rows.first_pixel(int64_t(y_base) + 1);
    y = rows.first_pixel(y_base) +
        (row_block * blockDim.y + threadIdx.y) * rows_per_thread<A, T>();
    const int32_t half = (rows.fractional ? T - 1 : T) / 2;
    first_cell = columns.base(x_first) - half;
    cell = in_row ? columns.base(x) - half - first_cell : 0;
  }

  __device__ bool has(int r) const { return in_row && y + r < y_end; }

  // Brings the cells of `count` channels from c0 on into shared memory [count][T][span].
  __device__ void stage(const Map& value, const PlaneTiles& tiles, const Axis& rows,
                        const Axis& columns, int64_t b, int32_t c0, int32_t count, A* cells) const {
    const int32_t half = (rows.fractional ? T - 1 : T) / 2, span = tiles.span;
    for (int32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < count * T * span;
         i += blockDim.x * blockDim.y) {
      const int64_t column = clamp(first_cell + i % span, 0, columns.cells - 1);
      const int64_t row = clamp(y_base - half + i / span % T, 0, rows.cells - 1);
      const int64_t c = c0 + i / (span * T);
      cells[i] = load<A>(value, b * value.stride[0] + c * value.stride[1] +
                                    row * value.stride[2] + column * value.stride[3]);
    }
  }
};

}  // namespace fmupsample
