// Functions of one number, applied elementwise to tensors. lora_ext/ops/row_attention.py documents
// the op.
#pragma once

#include <string_view>

#include "ops/call.h"

namespace lora_ext {

Tensor pointwise(const Tensor& x, std::string_view function);

}  // namespace lora_ext
