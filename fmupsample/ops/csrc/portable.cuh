// The few things that differ between nvcc and the emulation the tests run on a CPU.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef FMUPSAMPLE_EMULATED
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

namespace fmupsample {

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes,
            void* stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("fmupsample: the map is too large for one launch");
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fmupsample: a CUDA kernel failed to launch: ") +
                             cudaGetErrorString(error));
}

// d += a b, a [16 x 16], b [16 x 8], over one warp; fragments as PTX lays them out for
// mma.m16n8k16. With capability below 8.0 the host never chooses a kernel that calls this.
template <typename T>
__device__ __forceinline__ void warp_multiply(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]);

#if __CUDA_ARCH__ >= 800
#define FMUPSAMPLE_MMA(kind)                                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind                           \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define FMUPSAMPLE_MMA(kind) __trap()
#endif

template <>
__device__ __forceinline__ void warp_multiply<c10::BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                             const uint32_t (&b)[2]) {
  FMUPSAMPLE_MMA("bf16");
}

template <>
__device__ __forceinline__ void warp_multiply<c10::Half>(float (&d)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
  FMUPSAMPLE_MMA("f16");
}

#undef FMUPSAMPLE_MMA

// Four 8 x 8 matrices of 16-bit numbers, transposed: lane l gives the address of row l % 8 of
// matrix l / 8 (16 aligned bytes in shared memory), and receives of matrix m, in fragment[m], the
// elements [2 (l % 4) + {0, 1}][l / 4].
__device__ __forceinline__ void warp_load_transposed(uint32_t (&fragment)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
#else
  __trap();
#endif
}

}  // namespace fmupsample
#endif
