// Adding up rounded matrix products, on raw pointers.
#pragma once

#include <cstdint>

#include "zs_isa.h"
#include "zs_token_logprobs.h"  // Element

// Elements first .. last - 1 of contiguous arrays: sum += addend.
ZS_DECLARE(void accumulate(float* sum, const void* addend, zs::Element element, int64_t first, int64_t last))
// The same for a sum kept in 24 bits: `high` is the bfloat16 nearest to it, `low` what is missing, in units of 1/256 of
// the difference between neighbours of `high`. The addend is bfloat16.
ZS_DECLARE(void accumulate_split(void* high, int8_t* low, const void* addend, int64_t first, int64_t last))
