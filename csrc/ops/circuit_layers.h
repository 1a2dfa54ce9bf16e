// Whole circuits as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <string_view>
#include <tuple>

#include "ops/call.h"

namespace lora_ext {

// Returns e (B, M * block) for table (R, V), x (B, M) and row (M,), the first table row of each
// block.
Tensor circuit_table(const Tensor& table, const Tensor& x, const Tensor& row, int64_t block,
                     std::string_view norm);
Tensor circuit_table_backward(const Tensor& de, const Tensor& table, const Tensor& x,
                              const Tensor& row, int64_t block, std::string_view norm);

// Returns val (B, U) in unit-major memory for leaf (B, N) and w (W,). `plan` has the program's
// sizes for the host; see circuit_layers.h.
Tensor circuit_layers(const Tensor& leaf, const Tensor& w, const Tensor& program,
                      at::IntArrayRef plan, std::string_view norm, std::string_view semiring,
                      std::string_view precision);
// Returns flows (B, U), and dw, which is empty if not needed, for droots (B, roots).
std::tuple<Tensor, Tensor> circuit_layers_backward(const Tensor& droots, const Tensor& val,
                                                   const Tensor& w, const Tensor& program,
                                                   at::IntArrayRef plan, std::string_view norm,
                                                   bool need_dw);
// Returns the leaf units (M, variables) that M walks reach, or -1. The walks of one row of val (B,
// U) are consecutive and start at its root (B,). With uniforms (M, draws) the walks draw their
// terms; otherwise M is B and the walks take the heaviest terms.
Tensor circuit_layers_walk(const Tensor& val, const Tensor& w, const Tensor& program,
                           at::IntArrayRef plan, const Tensor& root,
                           const OptionalTensor& uniforms);

}  // namespace lora_ext
