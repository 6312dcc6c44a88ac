// The fused neighbour scores of ReSFU; see fmupsample/ops/scores.py for the mathematics.
#pragma once

#include "problem.h"

namespace fmupsample {

// The one shape there is a kernel for, the paper's: 3 x 3 neighbours, 4 groups of 8 embedding and
// 32 middle channels, and 8 norm groups of 16 middle channels.
struct ScoreShape {
  static constexpr int kGroups = 4, kEmbedding = 8, kMiddle = 32, kNeighbours = 9;
  static constexpr int kNormGroups = 8;
};

struct ScoreTask {
  int32_t batch, height, width;
  const float* query;  // [B, 32, H, W]
  // Keys at full resolution [B, 32, H, W], neighbours stride_y and stride_x pixels apart ...
  const float* key;
  int32_t stride_y, stride_x;
  // ... or null, and what their convolution gives at low resolution: [B, 128, h + 2, w + 2].
  const float* low;
  int32_t h, w;
  const float* key_weight;    // [B, 4, 72, 32]: group, (neighbour, embedding), middle; with `key`
  const float* query_weight;  // [B, 4, 8, 32], to be added (the minus sign is in it)
  const float* offset;        // [B, 128]
  const float* mix_weight;    // [4, 32, 32]: group, from, to
  const float* mix_bias;      // [128]
  const float* score_weight;  // [128, 9], the norm's gain multiplied in
  float* partial;             // [B, 8, 9, H, W]
  double* sums;               // [B, blocks, 8, 2]: sum and sum of squares of the mixed channels
};

int32_t score_blocks(int32_t height, int32_t width);  // per batch entry
void partial_scores(const ScoreTask& task, const Device& device);

}  // namespace fmupsample
