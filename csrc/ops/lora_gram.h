// Inner products of adapters.
#pragma once

#include <tuple>
#include <vector>

#include "ops/call.h"

namespace lora_ext {

// Returns the Gram matrices (gram_a, gram_b) of each adapter, (r, r) each: in `dtype` if given,
// else in float32 (float64 for float64 factors).
std::tuple<std::vector<Tensor>, std::vector<Tensor>> lora_gram(
    const std::vector<Tensor>& a, const std::vector<Tensor>& b,
    const std::optional<at::ScalarType>& dtype);
// Returns the stats of lora_ext/lora_gram.h, (L, 4) float64 for L adapters, with the scale taken as
// 1.
Tensor lora_pair_stats(const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                       const std::vector<Tensor>& projected_b);

}  // namespace lora_ext
