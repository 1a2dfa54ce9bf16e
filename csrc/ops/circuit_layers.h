// Whole circuits as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <string_view>
#include <tuple>

#include "ops/call.h"

namespace lora_ext {

// e (B, M * block) of table (R, V), x (B, M) and the first rows (M,) of the blocks.
Tensor circuit_table(const Tensor& table, const Tensor& x, const Tensor& row, int64_t block,
                     std::string_view norm);
Tensor circuit_table_backward(const Tensor& de, const Tensor& table, const Tensor& x,
                              const Tensor& row, int64_t block, std::string_view norm);

// val (B, U) of leaf (B, N) and w (W,), of which the memory is unit-major. `plan` repeats the
// program's sizes for the host: circuit_layers.h.
Tensor circuit_layers(const Tensor& leaf, const Tensor& w, const Tensor& program,
                      at::IntArrayRef plan, std::string_view norm, std::string_view semiring,
                      std::string_view precision);
// Flows (B, U) and dw, empty if it is not needed, of droots (B, roots).
std::tuple<Tensor, Tensor> circuit_layers_backward(const Tensor& droots, const Tensor& val,
                                                   const Tensor& w, const Tensor& program,
                                                   at::IntArrayRef plan, std::string_view norm,
                                                   bool need_dw);
// Leaf units (M, variables) that M walks come to, or -1, those of a row of val (B, U) following one
// another; each starts from its row's root (B,). Given uniforms (M, draws) they draw their terms;
// else M is B, and they take the heaviest.
Tensor circuit_layers_walk(const Tensor& val, const Tensor& w, const Tensor& program,
                           at::IntArrayRef plan, const Tensor& root,
                           const OptionalTensor& uniforms);

}  // namespace lora_ext
