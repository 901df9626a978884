#include "zs_group_advantages.h"

#include <cmath>
#include <vector>

namespace zs {
namespace {

struct Group {
  double mean = 0.0;
  double std = 0.0;
  double leave_one_out = 1.0;  // n / (n - 1)
  bool dead = true;
};

// The moments of weighted numbers, in two passes.
Moments batch_moments(const std::vector<double>& numbers, const double* weights, const bool* valid) {
  Moments found;
  double sum = 0.0;
  for (size_t s = 0; s < numbers.size(); ++s) {
    if (valid && !valid[s]) continue;
    const double weight = weights ? weights[s] : 1.0;
    if (weight == 0.0) continue;
    found.count += weight;
    sum += weight * numbers[s];
  }
  if (found.count == 0.0) return found;
  found.mean = sum / found.count;
  for (size_t s = 0; s < numbers.size(); ++s) {
    if (valid && !valid[s]) continue;
    const double weight = weights ? weights[s] : 1.0;
    if (weight == 0.0) continue;
    found.squares += weight * (numbers[s] - found.mean) * (numbers[s] - found.mean);
  }
  return found;
}

double variance(const Moments& moments, int64_t ddof) {
  const double freedom = moments.count - static_cast<double>(ddof);
  return moments.squares / (freedom > 1.0 ? freedom : 1.0);
}

Group group_of(const GroupInputs& inputs, const int64_t* members, int64_t count) {
  Group group;
  if (count == 0) return group;
  if (count == 1 && inputs.keep_singletons) return {0.0, 1.0, 1.0, false};
  double sum = 0.0;
  bool equal = true;
  for (int64_t i = 0; i < count; ++i) {
    sum += inputs.rewards[members[i]];
    equal &= inputs.rewards[members[i]] == inputs.rewards[members[0]];
  }
  group.mean = sum / static_cast<double>(count);
  // Compared exactly: equal rewards may leave a tiny spread about their rounded mean, which must not become a signal.
  group.dead = count < 2 || equal;
  if (group.dead) return group;
  double squares = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double apart = inputs.rewards[members[i]] - group.mean;
    squares += apart * apart;
  }
  group.std = std::sqrt(variance({static_cast<double>(count), group.mean, squares}, inputs.ddof));
  group.leave_one_out = static_cast<double>(count) / static_cast<double>(count - 1);
  return group;
}

}  // namespace

Moments group_advantages(const GroupInputs& inputs, const GroupOutputs& outputs) {
  const int64_t S = inputs.num_sequences, G = inputs.num_groups;
  std::vector<int64_t> starts(G + 1, 0);
  for (int64_t s = 0; s < S; ++s)
    if (!inputs.valid || inputs.valid[s]) ++starts[inputs.groups[s] + 1];
  for (int64_t g = 0; g < G; ++g) starts[g + 1] += starts[g];
  std::vector<int64_t> members(starts[G]), next(starts.begin(), starts.end() - 1);
  for (int64_t s = 0; s < S; ++s)
    if (!inputs.valid || inputs.valid[s]) members[next[inputs.groups[s]]++] = s;

  std::vector<double> numbers(S, 0.0);  // what the batch's moments are taken of
  if (inputs.mode != GroupMode::baseline)
    for (int64_t member : members) numbers[member] = inputs.rewards[member];
  Moments batch;
  if (inputs.mode == GroupMode::batch_std) batch = batch_moments(numbers, nullptr, inputs.valid);
  const double batch_std = std::sqrt(variance(batch, inputs.ddof));

  for (int64_t s = 0; s < S; ++s) outputs.advantages[s] = 0.0f;
  for (int64_t g = 0; g < G; ++g) {
    const int64_t* own = members.data() + starts[g];
    const int64_t count = starts[g + 1] - starts[g];
    const Group group = group_of(inputs, own, count);
    outputs.mean[g] = static_cast<float>(group.mean);
    outputs.std[g] = static_cast<float>(group.std);
    outputs.dead[g] = group.dead;
    if (inputs.mode == GroupMode::reinforce)
      for (int64_t i = 0; i < count; ++i) outputs.advantages[own[i]] = static_cast<float>(inputs.rewards[own[i]]);
    if (group.dead || inputs.mode == GroupMode::reinforce) continue;
    for (int64_t i = 0; i < count; ++i) {
      const double centred = inputs.rewards[own[i]] - group.mean;
      double advantage = centred;
      if (inputs.mode == GroupMode::grpo) advantage = centred / (group.std + inputs.eps);
      if (inputs.mode == GroupMode::rloo) advantage = centred * group.leave_one_out;
      if (inputs.mode == GroupMode::batch_std) advantage = centred / (batch_std + inputs.eps);
      outputs.advantages[own[i]] = static_cast<float>(advantage);
      if (inputs.mode == GroupMode::baseline) numbers[own[i]] = centred;
    }
  }
  if (!whitens(inputs.mode)) return batch;
  batch = batch_moments(numbers, inputs.weights, inputs.valid);
  const double scale = 1.0 / std::sqrt(variance(batch, inputs.ddof) + inputs.eps);
  for (int64_t member : members)
    outputs.advantages[member] = static_cast<float>((numbers[member] - batch.mean) * scale);
  return batch;
}

}  // namespace zs
