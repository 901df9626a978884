// Eight sequences at a time, one in each lane of a vector of doubles: the recurrence waits for its own last sum, so only
// other sequences can fill the wait. Blocks of eight tokens are transposed on the way in and out, and a lane whose
// sequence is done takes the next one. Every lane does the same sums as a plain loop, on every instruction set.
#include <cstring>

#include "zs_eight.h"
#include "zs_gae.h"

namespace zs {
namespace ZS_ISA {
namespace {

using namespace eight;

// Where the eight tokens of each lane's block are read and written. An idle lane points at `Spare`.
struct Block {
  const float* rewards[kLanes];
  const float* values[kLanes];
  const bool* mask[kLanes];
  float* advantages[kLanes];
  float* returns[kLanes];
};

struct State {
  Doubles next_value, advantage, gamma, decay;  // decay: gamma * lam
};

struct Spare {
  float zeros[kLanes] = {};
  bool masked[kLanes] = {};
  bool counted[kLanes] = {true, true, true, true, true, true, true, true};
  float dump[2][kLanes];
};

template <GaeMode mode>
ZS_EIGHT_INLINE void step_block(const Block& at, State& carried) {
  State state = carried;
  Floats rewards[kLanes], values[kLanes], returns[kLanes];
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    rewards[lane] = load(at.rewards[lane]);
    values[lane] = load(at.values[lane]);
    bits |= bits_of(at.mask[lane]) << (8 * lane);
  }
  transpose(rewards);
  transpose(values);
  bits = transpose_bits(bits);
  const Doubles none = {};
  for (int t = kLanes - 1; t >= 0; --t) {
    const Mask counted = mask_of(bits >> (8 * t));
    Doubles reward = widened(rewards[t]);
    Doubles value = widened(values[t]);
    if (mode == GaeMode::zero) {
      reward = select(counted, reward, none);
      value = select(counted, value, none);
    }
    const Doubles delta = reward + state.gamma * state.next_value - value;
    const Doubles advantage = delta + state.decay * state.advantage;
    state.advantage = mode == GaeMode::carry ? select(counted, advantage, state.advantage) : advantage;
    state.next_value = mode == GaeMode::carry ? select(counted, value, state.next_value) : value;
    rewards[t] = narrowed(select(counted, advantage, none));
    returns[t] = narrowed(select(counted, advantage + value, none));
  }
  carried = state;
  transpose(rewards);
  transpose(returns);
  for (int lane = 0; lane < kLanes; ++lane) {
    store(at.advantages[lane], rewards[lane]);
    store(at.returns[lane], returns[lane]);
  }
}

// A lane with fewer than eight tokens left has them copied to the end of a block of its own, masked tokens before them.
template <GaeMode mode>
void step_edge(const Block& at, const int64_t (&left)[kLanes], State& state) {
  Block edge = at;
  float in[2][kLanes][kLanes] = {};
  float out[2][kLanes][kLanes];
  bool mask[kLanes][kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t gap = kLanes - left[lane];
    if (gap <= 0) continue;
    const size_t bytes = static_cast<size_t>(left[lane]) * sizeof(float);
    if (bytes) {
      std::memcpy(in[0][lane] + gap, at.rewards[lane] + gap, bytes);
      std::memcpy(in[1][lane] + gap, at.values[lane] + gap, bytes);
      std::memcpy(mask[lane] + gap, at.mask[lane] + gap, static_cast<size_t>(left[lane]));
    }
    edge.rewards[lane] = in[0][lane];
    edge.values[lane] = in[1][lane];
    edge.mask[lane] = mask[lane];
    edge.advantages[lane] = out[0][lane];
    edge.returns[lane] = out[1][lane];
  }
  step_block<mode>(edge, state);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t gap = kLanes - left[lane];
    if (gap <= 0 || gap == kLanes) continue;
    std::memcpy(at.advantages[lane] + gap, out[0][lane] + gap, static_cast<size_t>(left[lane]) * sizeof(float));
    std::memcpy(at.returns[lane] + gap, out[1][lane] + gap, static_cast<size_t>(left[lane]) * sizeof(float));
  }
}

// Two passes over numbers that were written just now. Masked ones are 0.
Moments moments_of(const float* values, const bool* mask, int64_t count) {
  Doubles sum = {}, squares = {};
  const int64_t blocks = count / kLanes;
  double rest = 0.0, rest_squares = 0.0;
  int64_t counted = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    sum = sum + widened(load(values + b * kLanes));
    if (mask) counted += count_of(mask + b * kLanes);
  }
  for (int64_t i = blocks * kLanes; i < count; ++i) {
    rest += values[i];
    counted += !mask || mask[i];
  }
  Moments found;
  found.count = static_cast<double>(mask ? counted : count);
  if (found.count == 0.0) return found;
  found.mean = (sum_of_lanes(sum) + rest) / found.count;
  const Doubles mean = doubles(found.mean);
  for (int64_t b = 0; b < blocks; ++b) {
    Doubles apart = widened(load(values + b * kLanes)) - mean;
    if (mask) apart = select(mask_of(bits_of(mask + b * kLanes)), apart, Doubles{});
    squares = squares + apart * apart;
  }
  for (int64_t i = blocks * kLanes; i < count; ++i) {
    const double apart = !mask || mask[i] ? values[i] - found.mean : 0.0;
    rest_squares += apart * apart;
  }
  found.squares = sum_of_lanes(squares) + rest_squares;
  return found;
}

template <GaeMode mode>
void run(const GaeInputs& inputs, int64_t first, int64_t last, float* advantages, float* returns, Moments* moments) {
  Spare spare;
  Block at;
  State state = {};
  int64_t left[kLanes] = {};  // tokens of the lane's sequence still to come
  int64_t sequence[kLanes];
  bool busy[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    at.rewards[lane] = at.values[lane] = spare.zeros;
    at.mask[lane] = spare.masked;
    at.advantages[lane] = spare.dump[0];
    at.returns[lane] = spare.dump[1];
  }
  for (int64_t next = first;;) {
    int64_t blocks = INT64_MAX;
    int active = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (left[lane] == 0 && busy[lane]) {
        const int64_t s = sequence[lane], begin = inputs.bounds[s];
        if (moments)
          moments[s] = moments_of(advantages + begin, inputs.mask ? inputs.mask + begin : nullptr,
                                  inputs.bounds[s + 1] - begin);
        busy[lane] = false;
      }
      if (!busy[lane]) {
        for (; next < last && inputs.bounds[next] == inputs.bounds[next + 1]; ++next)
          if (moments) moments[next] = Moments{};
        at.rewards[lane] = at.values[lane] = spare.zeros;
        at.mask[lane] = spare.masked;
        at.advantages[lane] = spare.dump[0];
        at.returns[lane] = spare.dump[1];
        if (next == last) continue;
        const int64_t s = next++, block = inputs.bounds[s + 1] - kLanes;
        busy[lane] = true;
        sequence[lane] = s;
        left[lane] = inputs.bounds[s + 1] - inputs.bounds[s];
        at.rewards[lane] = inputs.rewards + block;
        at.values[lane] = inputs.values + block;
        at.mask[lane] = inputs.mask ? inputs.mask + block : spare.counted;
        at.advantages[lane] = advantages + block;
        at.returns[lane] = returns + block;
        const double gamma = inputs.gammas ? inputs.gammas[s] : inputs.gamma;
        set_lane(state.advantage, lane, 0.0);
        set_lane(state.next_value, lane, inputs.bootstrap ? inputs.bootstrap[s] : 0.0);
        set_lane(state.gamma, lane, gamma);
        set_lane(state.decay, lane, gamma * (inputs.lams ? inputs.lams[s] : inputs.lam));
      }
      ++active;
      if (left[lane] / kLanes < blocks) blocks = left[lane] / kLanes;
    }
    if (!active) return;
    const bool edge = blocks == 0;
    if (edge) {
      int64_t shown[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) shown[lane] = busy[lane] ? left[lane] : kLanes;
      step_edge<mode>(at, shown, state);
      blocks = 1;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      if (!edge) step_block<mode>(at, state);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t step = busy[lane] ? kLanes : 0;
        at.rewards[lane] -= step;
        at.values[lane] -= step;
        at.mask[lane] -= inputs.mask ? step : 0;
        at.advantages[lane] -= step;
        at.returns[lane] -= step;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (busy[lane]) left[lane] = left[lane] > blocks * kLanes ? left[lane] - blocks * kLanes : 0;
  }
}

}  // namespace

void gae_sequences(const GaeInputs& inputs, int64_t first, int64_t last, float* advantages, float* returns,
                   Moments* moments) {
  switch (inputs.mode) {
    case GaeMode::carry: return run<GaeMode::carry>(inputs, first, last, advantages, returns, moments);
    case GaeMode::zero: return run<GaeMode::zero>(inputs, first, last, advantages, returns, moments);
    case GaeMode::classic: return run<GaeMode::classic>(inputs, first, last, advantages, returns, moments);
  }
}

void whiten(const float* values, const bool* mask, int64_t count, double mean, double scale, double shift,
            float* out) {
  int64_t i = 0;
  const Doubles means = doubles(mean), scales = doubles(scale), shifts = doubles(shift);
  for (; i + kLanes <= count; i += kLanes) {
    Doubles whitened = (widened(load(values + i)) - means) * scales + shifts;
    if (mask) whitened = select(mask_of(bits_of(mask + i)), whitened, Doubles{});
    store(out + i, narrowed(whitened));
  }
  for (; i < count; ++i)
    out[i] = !mask || mask[i] ? static_cast<float>((values[i] - mean) * scale + shift) : 0.0f;
}

}  // namespace ZS_ISA
}  // namespace zs
