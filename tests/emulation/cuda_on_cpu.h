// Runs CUDA kernels on a CPU, one block at a time, each thread a coroutine.
//
// It is made for finding mistakes, not for speed. Between two barriers the threads run one after
// another, in an order that can be turned around or shuffled: a missing barrier gives wrong numbers
// in at least one of the orders. Shared memory starts as NaNs and ends at a page that must not be
// touched. A barrier that not all threads reach is an error.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

namespace emulation {

enum class State { runnable, at_block_barrier, at_warp_barrier, finished };

struct Thread {
  ucontext_t context;
  dim3 index;
  int linear = 0;
  State state = State::runnable;
};

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32;

struct Warp {
  uint64_t word[kWarp][4];  // what each lane shows the others
};

inline std::vector<Thread> threads;
inline std::vector<char> stacks;
inline std::vector<Warp> warps;
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline dim3 block_index, block_size, grid_size;
inline unsigned char* shared = nullptr;
inline int order = 0;  // 0: ascending, 1: descending, 2 and more: shuffled with that seed
inline std::exception_ptr failure;

inline void entry() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  current->state = State::finished;
  swapcontext(&current->context, &scheduler);
}

inline void wait(State state) {
  Thread* self = current;
  self->state = state;
  swapcontext(&self->context, &scheduler);
}

inline Warp& warp() { return warps[current->linear / kWarp]; }
inline int lane() { return current->linear % kWarp; }
inline void warp_barrier() { wait(State::at_warp_barrier); }

// Releases what may go on; false if nothing may.
inline bool release() {
  bool released = false;
  const int n = static_cast<int>(threads.size());
  for (int first = 0; first < n; first += kWarp) {
    const int last = std::min(first + kWarp, n);
    auto all = [&](State s) {
      return std::all_of(threads.begin() + first, threads.begin() + last,
                         [&](const Thread& t) { return t.state == s; });
    };
    if (all(State::at_warp_barrier)) {
      for (int i = first; i < last; ++i) threads[i].state = State::runnable;
      released = true;
    }
  }
  if (std::all_of(threads.begin(), threads.end(),
                  [](const Thread& t) { return t.state == State::at_block_barrier; })) {
    for (auto& t : threads) t.state = State::runnable;
    released = true;
  }
  return released;
}

inline void run_block() {
  const int n = static_cast<int>(threads.size());
  for (int i = 0; i < n; ++i) {
    Thread& t = threads[i];
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &scheduler;
    makecontext(&t.context, entry, 0);
    t.linear = i;
    t.index = dim3(i % block_size.x, i / block_size.x % block_size.y,
                   i / (block_size.x * block_size.y));
    t.state = State::runnable;
  }
  std::vector<int> turn(n);
  for (int i = 0; i < n; ++i) turn[i] = order == 1 ? n - 1 - i : i;
  if (order > 1) std::shuffle(turn.begin(), turn.end(), std::mt19937(order));
  while (true) {
    bool ran = false;
    for (int i : turn) {
      if (threads[i].state != State::runnable) continue;
      current = &threads[i];
      swapcontext(&scheduler, &current->context);
      if (failure) std::rethrow_exception(failure);
      ran = true;
    }
    if (std::all_of(threads.begin(), threads.end(),
                    [](const Thread& t) { return t.state == State::finished; }))
      return;
    if (!release() && !ran) throw std::runtime_error("emulation: a barrier that not all threads reach");
  }
}

// Shared memory that ends where a page begins that must not be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes = (bytes + 15) / 16 * 16;
    length_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + length_ - page, page, PROT_NONE);
    data = base_ + length_ - page - bytes;
    size = bytes;
  }
  ~Guarded() { munmap(base_, length_); }
  unsigned char* data;
  size_t size;

 private:
  unsigned char* base_;
  size_t length_;
};

}  // namespace emulation

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

inline void __syncthreads() { ::emulation::wait(::emulation::State::at_block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { ::emulation::warp_barrier(); }

namespace fmupsample {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(::emulation::shared);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 size, size_t shared_bytes, void*,
            Arguments... arguments) {
  using namespace ::emulation;
  const size_t count = size_t(size.x) * size.y * size.z;
  if (count > 1024) throw std::runtime_error("emulation: more than 1024 threads in a block");
  if (shared_bytes > 48 * 1024) throw std::runtime_error("emulation: over 48 KiB of shared memory");
  Guarded memory(shared_bytes);
  threads.assign(count, Thread{});
  stacks.resize(count * kStack);
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  block_size = size;
  grid_size = dim3(static_cast<unsigned>(blocks));
  shared = memory.data;
  body = [&] { kernel(arguments...); };
  for (int64_t block = 0; block < blocks; ++block) {
    block_index = dim3(static_cast<unsigned>(block));
    std::memset(memory.data, 0xff, memory.size);
    run_block();
  }
}

template <typename T>
float element(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  return static_cast<float>(T(bits, T::from_bits()));
}

template <typename T>
void warp_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& warp = ::emulation::warp();
  const int lane = ::emulation::lane();
  uint32_t words[8] = {a[0], a[1], a[2], a[3], b[0], b[1], 0, 0};
  std::memcpy(warp.word[lane], words, sizeof(words));
  ::emulation::warp_barrier();
  auto word = [&](int from, int i) {
    uint32_t w;
    std::memcpy(&w, reinterpret_cast<const char*>(warp.word[from]) + 4 * i, 4);
    return w;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const uint32_t left = word(4 * (row % 8) + quad, row / 8 + 2 * (k / 8));
      const uint32_t right = word(4 * column + quad, 4 + k / 8);
      d[i] += element<T>(left, k % 2) * element<T>(right, k % 2);
    }
  }
  ::emulation::warp_barrier();
}

inline void warp_load_transposed(uint32_t (&fragment)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    throw std::runtime_error("emulation: a matrix row that is not aligned to 16 bytes");
  auto& warp = ::emulation::warp();
  const int lane = ::emulation::lane();
  std::memcpy(warp.word[lane], row, 16);
  ::emulation::warp_barrier();
  for (int m = 0; m < 4; ++m) {
    uint32_t word = 0;
    for (int e = 0; e < 2; ++e) {
      uint16_t bits;
      std::memcpy(&bits,
                  reinterpret_cast<const char*>(warp.word[8 * m + 2 * (lane % 4) + e]) +
                      2 * (lane / 4),
                  2);
      word |= uint32_t(bits) << (16 * e);
    }
    fragment[m] = word;
  }
  ::emulation::warp_barrier();
}

}  // namespace fmupsample
