// What the tensor-core kernels have in common: sizes, and 16-bit numbers in words of 4 and 16 bytes.
#pragma once

#include "tiles.cuh"

namespace fmupsample {
namespace tensor_core {

constexpr int kWarps = 8;
constexpr int kStrip = 32;  // pixels of a row (NCHW) or channels (NHWC) that a warp holds

// Numbers between rows of shared memory that ldmatrix reads: an odd multiple of 16 bytes, so that
// the eight rows of a matrix lie in different banks.
constexpr int padded(int count) { return (count + 7) / 8 % 2 ? (count + 7) / 8 * 8 : count + 8; }

template <typename scalar_t>
__device__ __forceinline__ uint32_t pair(scalar_t low, scalar_t high) {
  return uint32_t(low.x) | uint32_t(high.x) << 16;
}

// Stores 8 neighbours, or as many as there are; `aligned`: every full run is 16-byte aligned.
template <typename scalar_t>
__device__ __forceinline__ void store8(scalar_t* to, const float (&value)[8], int32_t count,
                                       bool aligned) {
  if (count >= 8 && aligned) {
    uint4 word;
    word.x = pair(narrow<scalar_t>(value[0]), narrow<scalar_t>(value[1]));
    word.y = pair(narrow<scalar_t>(value[2]), narrow<scalar_t>(value[3]));
    word.z = pair(narrow<scalar_t>(value[4]), narrow<scalar_t>(value[5]));
    word.w = pair(narrow<scalar_t>(value[6]), narrow<scalar_t>(value[7]));
    *reinterpret_cast<uint4*>(to) = word;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[i] = narrow<scalar_t>(value[i]);
  }
}

// 8 neighbours of a row in memory, zeros beyond its end.
template <typename scalar_t>
__device__ __forceinline__ uint4 load8(const scalar_t* from, int32_t count, bool aligned) {
  if (count >= 8 && aligned) return *reinterpret_cast<const uint4*>(from);
  scalar_t value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = i < count ? from[i] : scalar_t(0.f);
  uint4 word;
  word.x = pair(value[0], value[1]);
  word.y = pair(value[2], value[3]);
  word.z = pair(value[4], value[5]);
  word.w = pair(value[6], value[7]);
  return word;
}

}  // namespace tensor_core
}  // namespace fmupsample
