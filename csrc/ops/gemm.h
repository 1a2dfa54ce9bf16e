// Products of activations with a dense matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora_ext {

// The rows of `left` (T, K), the left operand of a library product, with at least 32 zeros in memory
// behind each. With AMX, torch's product of 16-bit rows reads every row up to a multiple of 32
// columns and multiplies what lies there by zero, so that a NaN or inf in one row reaches the row
// before it. A copy on the CPU where K is no multiple of 32 and the dtype has 16 bits; otherwise
// `left` itself. The twin in Python is lora_ext._torch.spaced.
at::Tensor spaced(const at::Tensor& left);

// What at::linear computes, x (T, I), weight (O, I), bias (O,) or none -> (T, O), by whichever
// library of torch's is the faster. The two do not give the same bits.
at::Tensor fast_linear(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

}  // namespace lora_ext
