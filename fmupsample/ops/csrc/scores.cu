// Everything between the aligned queries and keys and the neighbour scores, in one pass: paired
// central difference convolution, ReLU, grouped 1x1, ReLU, the moments of the GroupNorm that follows
// and, per norm group, its share of the scores. The 128 middle channels never leave the registers;
// unfused they are the largest tensors of the whole method and cross the memory about ten times.
//
// In exact float32: with four pixels a thread, each weight read from shared memory feeds four
// multiply-adds.
#include "axis.cuh"
#include "scores.h"

namespace fmupsample {
namespace {

using S = ScoreShape;
constexpr int kThreads = 128;
constexpr int kPixels = 4;  // of a thread, kThreads apart
constexpr int kTile = kThreads * kPixels;
constexpr int kNormChannels = S::kMiddle * S::kGroups / S::kNormGroups;
constexpr int kInputs = S::kNeighbours * S::kEmbedding;

// What one group needs, in shared memory; each array a multiple of 16 bytes long.
struct Weights {
  float key[kInputs][S::kMiddle];
  float query[S::kEmbedding][S::kMiddle];
  float mix[S::kMiddle][S::kMiddle];
  float score[S::kMiddle][S::kNeighbours + 3];
  float offset[S::kMiddle];
  float bias[S::kMiddle];
};

struct Shared {
  Weights weights;
  float sums[S::kNormGroups][2][kThreads];
};

__device__ void stage(Weights& to, const ScoreTask& task, int32_t b, int group) {
  const int thread = threadIdx.x;
  if (task.key) {
    const float* from = task.key_weight + (int64_t(b) * S::kGroups + group) * kInputs * S::kMiddle;
    for (int i = thread; i < kInputs * S::kMiddle; i += kThreads) (&to.key[0][0])[i] = from[i];
  }
  const float* query =
      task.query_weight + (int64_t(b) * S::kGroups + group) * S::kEmbedding * S::kMiddle;
  for (int i = thread; i < S::kEmbedding * S::kMiddle; i += kThreads)
    (&to.query[0][0])[i] = query[i];
  for (int i = thread; i < S::kMiddle * S::kMiddle; i += kThreads)
    (&to.mix[0][0])[i] = task.mix_weight[group * S::kMiddle * S::kMiddle + i];
  for (int i = thread; i < S::kMiddle * S::kNeighbours; i += kThreads)
    to.score[i / S::kNeighbours][i % S::kNeighbours] =
        task.score_weight[group * S::kMiddle * S::kNeighbours + i];
  for (int i = thread; i < S::kMiddle; i += kThreads) {
    to.offset[i] = task.offset[int64_t(b) * S::kGroups * S::kMiddle + group * S::kMiddle + i];
    to.bias[i] = task.mix_bias[group * S::kMiddle + i];
  }
}

// middle += column (x) input, for one input channel of every pixel.
__device__ __forceinline__ void accumulate(float (&middle)[S::kMiddle][kPixels],
                                           const float (&column)[S::kMiddle],
                                           const float (&input)[kPixels]) {
#pragma unroll
  for (int m = 0; m < S::kMiddle; m += 4) {
    const float4 w = *reinterpret_cast<const float4*>(&column[m]);
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      middle[m][p] += w.x * input[p];
      middle[m + 1][p] += w.y * input[p];
      middle[m + 2][p] += w.z * input[p];
      middle[m + 3][p] += w.w * input[p];
    }
  }
}

template <bool kDetail>
__global__ void __launch_bounds__(kThreads, 2) partial_scores_kernel(ScoreTask task, int32_t blocks) {
  const int32_t b = static_cast<int32_t>(blockIdx.x / blocks);
  const int32_t tile = static_cast<int32_t>(blockIdx.x % blocks);
  const int64_t area = int64_t(task.height) * task.width;
  const int thread = threadIdx.x;
  Weights& weights = dynamic_shared<Shared>()->weights;
  auto& shares = dynamic_shared<Shared>()->sums;

  // Within a plane 32 bits suffice; threads beyond its end repeat its last pixel.
  int32_t at[kPixels];
  const int64_t first_pixel = int64_t(tile) * kTile + thread;
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
    at[p] = static_cast<int32_t>(min(first_pixel + p * kThreads, area - 1));
  const auto inside = [&](int p) { return first_pixel + p * kThreads < area; };

#pragma unroll 1
  for (int group = 0; group < S::kGroups; ++group) {
    __syncthreads();
    stage(weights, task, b, group);
    __syncthreads();
    float middle[S::kMiddle][kPixels];
#pragma unroll
    for (int m = 0; m < S::kMiddle; ++m)
#pragma unroll
      for (int p = 0; p < kPixels; ++p) middle[m][p] = weights.offset[m];

    const int64_t first = (int64_t(b) * S::kGroups + group) * S::kEmbedding;
#pragma unroll 2
    for (int e = 0; e < S::kEmbedding; ++e) {
      float input[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) input[p] = task.query[(first + e) * area + at[p]];
      accumulate(middle, weights.query[e], input);
    }
    if constexpr (kDetail) {
      for (int d = 0; d < S::kNeighbours; ++d) {
        int32_t from[kPixels];
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const int32_t y = at[p] / task.width, x = at[p] % task.width;
          from[p] = clamp(y + (d / 3 - 1) * task.stride_y, 0, task.height - 1) * task.width +
                    clamp(x + (d % 3 - 1) * task.stride_x, 0, task.width - 1);
        }
#pragma unroll 2
        for (int e = 0; e < S::kEmbedding; ++e) {
          float input[kPixels];
#pragma unroll
          for (int p = 0; p < kPixels; ++p) input[p] = task.key[(first + e) * area + from[p]];
          accumulate(middle, weights.key[d * S::kEmbedding + e], input);
        }
      }
    } else {
      // Bilinear, on the map that is one cell larger on every side: nothing to clamp.
      const Axis rows{task.h, task.height, true}, columns{task.w, task.width, true};
      const int32_t step = task.w + 2;
      int32_t corner[kPixels];
      float fy[kPixels], fx[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const int32_t y = at[p] / task.width, x = at[p] % task.width;
        fy[p] = rows.fraction<float>(y);
        fx[p] = columns.fraction<float>(x);
        corner[p] = (rows.base(y) + 1) * step + columns.base(x) + 1;
      }
      const int64_t plane = int64_t(task.h + 2) * step;
      const float* low = task.low + (int64_t(b) * S::kGroups + group) * S::kMiddle * plane;
#pragma unroll
      for (int m = 0; m < S::kMiddle; ++m, low += plane) {
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const float* cell = low + corner[p];
          const float upper = cell[0] + fx[p] * (cell[1] - cell[0]);
          const float lower = cell[step] + fx[p] * (cell[step + 1] - cell[step]);
          middle[m][p] += upper + fy[p] * (lower - upper);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < S::kMiddle; ++m)
#pragma unroll
      for (int p = 0; p < kPixels; ++p) middle[m][p] = middle[m][p] > 0 ? middle[m][p] : 0.f;

#pragma unroll 1
    for (int half = 0; half < S::kMiddle / kNormChannels; ++half) {
      float score[S::kNeighbours][kPixels];
#pragma unroll
      for (int k = 0; k < S::kNeighbours; ++k)
#pragma unroll
        for (int p = 0; p < kPixels; ++p) score[k][p] = 0.f;
      float sum = 0.f, squares = 0.f;
#pragma unroll 1
      for (int n = half * kNormChannels; n < (half + 1) * kNormChannels; n += 4) {
        float mixed[4][kPixels];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int p = 0; p < kPixels; ++p) mixed[i][p] = weights.bias[n + i];
#pragma unroll
        for (int m = 0; m < S::kMiddle; ++m) {
          const float4 w = *reinterpret_cast<const float4*>(&weights.mix[m][n]);
#pragma unroll
          for (int p = 0; p < kPixels; ++p) {
            mixed[0][p] += w.x * middle[m][p];
            mixed[1][p] += w.y * middle[m][p];
            mixed[2][p] += w.z * middle[m][p];
            mixed[3][p] += w.w * middle[m][p];
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int p = 0; p < kPixels; ++p) {
            const float v = mixed[i][p] > 0 ? mixed[i][p] : 0.f;
            if (inside(p)) {
              sum += v;
              squares += v * v;
            }
#pragma unroll
            for (int k = 0; k < S::kNeighbours; ++k) score[k][p] += weights.score[n + i][k] * v;
          }
        }
      }
      const int norm = group * (S::kMiddle / kNormChannels) + half;
      shares[norm][0][thread] = sum;
      shares[norm][1][thread] = squares;
      float* partial =
          task.partial + (int64_t(b) * S::kNormGroups + norm) * S::kNeighbours * area;
#pragma unroll
      for (int k = 0; k < S::kNeighbours; ++k)
#pragma unroll
        for (int p = 0; p < kPixels; ++p)
          if (inside(p)) partial[k * area + at[p]] = score[k][p];
    }
  }

  // Each sum by one thread, in order, in double.
  __syncthreads();
  if (thread < 2 * S::kNormGroups) {
    double total = 0;
    for (int i = 0; i < kThreads; ++i) total += shares[thread / 2][thread % 2][i];
    task.sums[(int64_t(b) * blocks + tile) * 2 * S::kNormGroups + thread] = total;
  }
}

}  // namespace

int32_t score_blocks(int32_t height, int32_t width) {
  return static_cast<int32_t>((int64_t(height) * width + kTile - 1) / kTile);
}

void partial_scores(const ScoreTask& task, const Device& device) {
  const int32_t blocks = score_blocks(task.height, task.width);
  launch(task.key ? partial_scores_kernel<true> : partial_scores_kernel<false>, int64_t(blocks) * task.batch, dim3(kThreads), sizeof(Shared),
         device.stream, task, blocks);
}

}  // namespace fmupsample
