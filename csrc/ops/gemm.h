// Products of activations with a dense matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora_ext {

// What at::linear computes, x (T, I), weight (O, I), bias (O,) or none -> (T, O), by whichever
// library of torch's is the faster. The two do not give the same bits.
at::Tensor fast_linear(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

}  // namespace lora_ext
