#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  int block_rank() const { return on_cpu::rank; }
  int num_blocks() const { return static_cast<int>(on_cpu::cluster->bases.size()); }
  // The block's last fibre to come waits for the other blocks.
  void sync() const {
    on_cpu::wait(on_cpu::block->all, static_cast<int>(on_cpu::block->fibres.size()),
                 [] { on_cpu::cluster->meeting.arrive_and_wait(); });
  }
  template <class T>
  T* map_shared_rank(T* here, int rank) const {
    const ptrdiff_t offset = reinterpret_cast<char*>(here) - &on_cpu::base;
    return reinterpret_cast<T*>(on_cpu::cluster->bases[rank] + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
