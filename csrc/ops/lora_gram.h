// Inner products of adapters.
#pragma once

#include <tuple>
#include <vector>

#include "ops/call.h"

namespace lora_ext {

// Returns (gram_a, gram_b), (r, r) each, in float32 (float64 for float64), or in `dtype`.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> lora_gram(
    const std::vector<Tensor>& a, const std::vector<Tensor>& b,
    const std::optional<at::ScalarType>& dtype);
// Returns (L, 4) float64, for adapters with scale 1.
Tensor lora_pair_stats(const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                       const std::vector<Tensor>& projected_b);

}  // namespace lora_ext
