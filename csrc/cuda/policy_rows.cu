// Logits become their own gradient with one read and one write of device memory.
//
// A row of 151,936 bfloat16 logits is 304 KB: more than the 227 KB of shared memory that a thread block can have, so a
// kernel of independent blocks (Triton's) reads the row twice, the second time from the level-2 cache if it is lucky:
// 132 rows in flight are 40 MB. Here a cluster of blocks shares a row: each keeps its part in its own shared memory,
// they exchange three numbers through distributed shared memory, and each writes its part of the gradient.
//
// Needs compute capability 9.0. UNMEASURED: compiled, its mathematics tested on a CPU, never run on a GPU.
#include "zs_policy_rows.h"
#include "zs_row_math.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace cg = cooperative_groups;

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kWide = 8;    // logits in one 16-byte access
constexpr int kBatch = 4;   // accesses of a thread in flight
constexpr int kMaxBlocks = 8;
// Two blocks on a multiprocessor: one loads while the other computes and stores.
constexpr size_t kComfortableBytes = 110 << 10, kMostBytes = 224 << 10;

struct Shared {
  zs::row::Statistics of_warps[kWarps];
  zs::row::Statistics of_block;  // read by the other blocks of the cluster
  float chosen;
  zs::row::Row row;
  zs::row::Slopes slopes;
};

__device__ void widen(const uint4& packed, float* z) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    z[2 * i] = __uint_as_float(words[i] << 16);
    z[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ uint4 narrow(const float* z) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(z[2 * i], z[2 * i + 1]);
    words[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The part of a row that one block works on, in units of kWide columns; the row's last unit may be ragged.
struct Part {
  int64_t first;  // unit
  int units;
  int ragged;  // columns of the last unit where it is the row's ragged one, else kWide
};

__device__ Part part_of(int64_t vocabulary, int rank, int blocks) {
  const int64_t all = (vocabulary + kWide - 1) / kWide, share = (all + blocks - 1) / blocks;
  const int64_t first = min(rank * share, all), last = min(first + share, all);
  const bool holds_end = last == all && last > first;
  return {first, static_cast<int>(last - first), holds_end && vocabulary % kWide ? int(vocabulary % kWide) : kWide};
}

__device__ uint4 load_unit(const __nv_bfloat16* row, const Part& part, int unit) {
  const __nv_bfloat16* from = row + (part.first + unit) * kWide;
  if (unit < part.units - 1 || part.ragged == kWide) return __ldcs(reinterpret_cast<const uint4*>(from));
  float z[kWide];
#pragma unroll
  for (int i = 0; i < kWide; ++i) z[i] = i < part.ragged ? __bfloat162float(from[i]) : -INFINITY;
  return narrow(z);
}

__device__ void store_unit(__nv_bfloat16* row, const Part& part, int unit, const float* z) {
  __nv_bfloat16* to = row + (part.first + unit) * kWide;
  if (unit < part.units - 1 || part.ragged == kWide) {
    *reinterpret_cast<uint4*>(to) = narrow(z);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i)
    if (i < part.ragged) to[i] = __float2bfloat16_rn(z[i]);
}

// Reads the block's part into `kept`; the statistics of what this thread read.
__device__ zs::row::Statistics read_part(const __nv_bfloat16* row, const Part& part, uint4* kept, float scale) {
  zs::row::Statistics mine;
  for (int unit = threadIdx.x; unit < part.units; unit += kThreads * kBatch) {
    uint4 packed[kBatch];
    float z[kBatch * kWide];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = unit + i * kThreads;
      packed[i] = at < part.units ? load_unit(row, part, at) : uint4{0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * kThreads < part.units) kept[unit + i * kThreads] = packed[i];
      widen(packed[i], z + i * kWide);
    }
    mine = zs::row::merged(mine, zs::row::of_batch(z, scale), scale);
  }
  return mine;
}

__device__ zs::row::Statistics over_warp(zs::row::Statistics mine, float scale) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const zs::row::Statistics other{__shfl_down_sync(~0u, mine.m, step), __shfl_down_sync(~0u, mine.s, step),
                                    __shfl_down_sync(~0u, mine.t, step)};
    mine = zs::row::merged(mine, other, scale);
  }
  return mine;
}

__device__ zs::row::Token token_of(const zs::PolicyRows& work, int64_t row) {
  const auto read = [row](const float* column) { return column ? column[row] : 0.0f; };
  const float scale = work.gradient_scale ? *work.gradient_scale : 1.0f;
  return {read(work.old_logprobs),       work.advantages[row],
          work.weights[row] * scale,     read(work.importance_weights),
          read(work.ref_logprobs),       work.old_logprobs != nullptr,
          work.importance_weights != nullptr};
}

__global__ void __launch_bounds__(kThreads, 2) policy_rows(const zs::PolicyRows work) {
  extern __shared__ uint4 kept[];
  __shared__ Shared shared;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int64_t row = blockIdx.x / blocks;
  const __nv_bfloat16* logits = static_cast<const __nv_bfloat16*>(work.logits) + row * work.row_stride;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(work.out) + row * work.out_stride;
  const float inverse = work.inverse_temperatures ? work.inverse_temperatures[row] : work.inverse_temperature;
  const float scale = inverse * zs::row::kLog2e;
  const int64_t index = work.index[row];
  const Part part = part_of(work.vocabulary, rank, blocks);

  // Read now: once the cluster has met, another block may already write the gradient over it.
  if (threadIdx.x == 0)
    shared.chosen = index >= 0 && index < work.vocabulary ? __bfloat162float(logits[index]) : NAN;
  const zs::row::Statistics of_warp = over_warp(read_part(logits, part, kept, scale), scale);
  if (threadIdx.x % 32 == 0) shared.of_warps[threadIdx.x / 32] = of_warp;
  __syncthreads();
  if (threadIdx.x < 32) {
    const zs::row::Statistics mine = threadIdx.x < kWarps ? shared.of_warps[threadIdx.x] : zs::row::Statistics{};
    const zs::row::Statistics of_block = over_warp(mine, scale);
    if (threadIdx.x == 0) shared.of_block = of_block;
  }
  cluster.sync();
  if (threadIdx.x == 0) {
    zs::row::Statistics all;
    for (int other = 0; other < blocks; ++other)
      all = zs::row::merged(all, *cluster.map_shared_rank(&shared.of_block, other), scale);
    shared.row = zs::row::finished(all, shared.chosen, scale);
    shared.slopes = zs::row::slopes(shared.row.logprob, token_of(work, row), work.settings);
    if (rank == 0) {
      work.logprobs[row] = shared.row.logprob;
      work.logsumexps[row] = shared.row.logsumexp;
      work.entropies[row] = shared.row.entropy;
    }
  }
  cluster.sync();  // the numbers are there, and nobody reads this block's shared memory any more

  const zs::row::Row found = shared.row;
  const zs::row::Slopes by = shared.slopes;
  const bool moves = zs::row::moves(found, by);
  for (int unit = threadIdx.x; unit < part.units; unit += kThreads) {
    float z[kWide];
    widen(kept[unit], z);
    const int64_t first = (part.first + unit) * kWide;
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      z[i] = moves ? zs::row::gradient(z[i], first + i == index, found, by, inverse) : 0.0f;
    store_unit(out, part, unit, z);
  }
}

size_t bytes_of_part(int64_t vocabulary, int blocks) {
  const int64_t units = (vocabulary + kWide - 1) / kWide;
  return static_cast<size_t>((units + blocks - 1) / blocks) * sizeof(uint4);
}

const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

extern "C" const char* zs_policy_rows(const zs::PolicyRows* work, int blocks, void* stream) {
  if (work->rows == 0) return nullptr;
  if (blocks == 0)
    for (blocks = 1; blocks < kMaxBlocks && bytes_of_part(work->vocabulary, blocks) > kComfortableBytes;) blocks *= 2;
  const size_t bytes = bytes_of_part(work->vocabulary, blocks);
  if (bytes > kMostBytes) return "a row does not fit in the shared memory of a cluster";
  if (work->rows > INT32_MAX / blocks) return "too many rows for one launch";
  if (const char* wrong = said(cudaFuncSetAttribute(policy_rows, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(kMostBytes))))
    return wrong;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(work->rows * blocks));
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  return said(cudaLaunchKernelEx(&launch, policy_rows, *work));
}
