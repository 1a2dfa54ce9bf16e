// Products of activations with a dense matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora_ext {

// Returns `left` (T, K), the left operand of a library product, with at least 32 zeros in memory
// after each row. With AMX, torch's product of 16-bit rows reads every row up to a multiple of 32
// columns and multiplies the numbers after the row by zero, so a NaN or inf in one row reaches the
// row before it. The result is a copy if `left` is on the CPU, K is not a multiple of 32 and the
// dtype has 16 bits; otherwise it is `left`. lora_ext._torch.spaced is the same function in Python.
at::Tensor spaced(const at::Tensor& left);

// Returns at::linear(x, weight, bias), x (T, I), weight (O, I), bias (O,) or none -> (T, O), from
// the faster of torch's two libraries. The two do not give the same bits.
at::Tensor fast_linear(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

}  // namespace lora_ext
