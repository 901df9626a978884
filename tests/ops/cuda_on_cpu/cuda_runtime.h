// Enough of CUDA to run csrc/cuda on a CPU, so that a kernel's indexing and exchanges are tested where no GPU is.
// A block is one thread of the system, its CUDA threads are fibres that take turns; `thread_local` is then exactly
// shared memory. A fibre runs until it meets a barrier or an exchange within its warp.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ thread_local
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaLaunchAttributeClusterDimension = 0;
template <class Function>
cudaError_t cudaFuncSetAttribute(Function, int, int) { return cudaSuccess; }
struct cudaLaunchAttribute {
  int id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  int numAttrs = 0;
};

namespace on_cpu {

constexpr size_t kStack = 64 << 10;

struct Cluster {
  explicit Cluster(int blocks) : meeting(blocks), bases(blocks) {}
  std::barrier<> meeting;
  std::vector<char*> bases;
};
inline thread_local char base;  // where this block's shared memory begins, up to a constant
inline thread_local Cluster* cluster = nullptr;
inline thread_local int rank = 0;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};
struct Barrier {
  int arrived = 0, generation = 0;
};
struct Block {
  ucontext_t scheduler;
  std::vector<Fibre> fibres;
  std::function<void()> kernel;
  int running = 0;
  std::vector<float> exchange;
  Barrier all;
  std::vector<Barrier> warps;
};
inline thread_local Block* block = nullptr;

inline void yield() { swapcontext(&block->fibres[block->running].context, &block->scheduler); }

// Until `count` fibres are here; the last to come calls `meet` first.
template <class Meet>
void wait(Barrier& barrier, int count, Meet meet) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    meet();
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}
inline void wait_for_warp() {
  wait(block->warps[block->running / 32], 32, [] {});
}

inline void body() {
  block->kernel();
  block->fibres[block->running].done = true;
  yield();
}

// Runs every fibre of the block up to its next yield, again and again, until all are done.
inline void run_block(int threads, std::function<void()> kernel) {
  Block mine;
  block = &mine;
  mine.kernel = std::move(kernel);
  mine.fibres = std::vector<Fibre>(threads);
  mine.exchange.resize(threads);
  mine.warps.resize(threads / 32);
  for (Fibre& fibre : mine.fibres) {
    fibre.stack = std::make_unique_for_overwrite<char[]>(kStack);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, body, 0);
  }
  const auto round = [&] {
    bool any = false;
    for (int i = 0; i < threads; ++i) {
      if (mine.fibres[i].done) continue;
      mine.running = i;
      swapcontext(&mine.scheduler, &mine.fibres[i].context);
      any = true;
    }
    return any;
  };
  while (round()) {
  }
}

}  // namespace on_cpu

// Which CUDA thread is asked, is read off the scheduler.
struct ThreadIndex {
  struct Number {
    operator unsigned() const { return on_cpu::block->running; }
  } x;
};
inline ThreadIndex threadIdx;
inline thread_local dim3 blockIdx;

inline void __syncthreads() {
  on_cpu::wait(on_cpu::block->all, static_cast<int>(on_cpu::block->fibres.size()), [] {});
}

inline float __shfl_down_sync(unsigned, float value, int step) {
  on_cpu::Block& block = *on_cpu::block;
  const int lane = block.running % 32;
  block.exchange[block.running] = value;
  on_cpu::wait_for_warp();  // everyone has written
  const float found = lane + step < 32 ? block.exchange[block.running + step] : value;
  on_cpu::wait_for_warp();  // everyone has read
  return found;
}

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

template <class T>
T __ldcs(const T* from) { return *from; }

template <class Kernel, class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, Kernel kernel, Argument argument) {
  const int blocks = launch->attrs->val.clusterDim.x, threads = launch->blockDim.x;
  for (unsigned first = 0; first < launch->gridDim.x; first += blocks) {
    on_cpu::Cluster cluster(blocks);
    std::vector<std::thread> running;
    for (int rank = 0; rank < blocks; ++rank)
      running.emplace_back([&, rank] {
        on_cpu::cluster = &cluster;
        on_cpu::rank = rank;
        cluster.bases[rank] = &on_cpu::base;
        cluster.meeting.arrive_and_wait();
        blockIdx = dim3(first + rank);
        on_cpu::run_block(threads, [&] { kernel(argument); });
      });
    for (std::thread& one : running) one.join();
  }
  return cudaSuccess;
}
