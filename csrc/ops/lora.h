// The LoRA ops as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <optional>
#include <vector>

#include "ops/call.h"

namespace lora_ext {

Tensor lora_plan(const Tensor& adapter_ids, int64_t num_adapters, const OptionalTensor& num_valid);
Tensor lora_segment_ids(const Tensor& seg_indptr, const Tensor& seg_adapter, int64_t num_tokens);
Tensor lora_shrink(const Tensor& x, const Tensor& a, const Tensor& adapter_ids,
                   const OptionalTensor& scale, const OptionalTensor& ranks,
                   const OptionalTensor& page_table, const OptionalTensor& plan,
                   const OptionalTensor& weights, const OptionalTensor& groups);
void lora_expand_(Tensor y, const Tensor& v, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& ranks, const OptionalTensor& page_table,
                  const OptionalTensor& plan);
Tensor lora_apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& scale, const OptionalTensor& ranks,
                  const OptionalTensor& page_table, const OptionalTensor& plan,
                  const OptionalTensor& weights, const OptionalTensor& groups);
void lora_apply_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b,
                 const Tensor& adapter_ids, const OptionalTensor& scale,
                 const OptionalTensor& ranks, const OptionalTensor& page_table,
                 const OptionalTensor& plan, const OptionalTensor& weights,
                 const OptionalTensor& groups);
// lora_apply_ for the op named `op`, whose y is new memory: does not check y.
void apply_to(const char* op, const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
              const Tensor& adapter_ids, const OptionalTensor& scale, const OptionalTensor& ranks,
              const OptionalTensor& page_table, const OptionalTensor& plan,
              const OptionalTensor& weights, const OptionalTensor& groups);
// scale, ranks, page_table and groups, if given, have one tensor per module, or are empty.
void lora_apply_siblings_(const std::vector<Tensor>& y, const Tensor& x,
                          const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                          const Tensor& adapter_ids, const std::vector<Tensor>& scale,
                          const std::vector<Tensor>& ranks, const std::vector<Tensor>& page_table,
                          const OptionalTensor& plan, const OptionalTensor& weights,
                          const std::optional<std::vector<Tensor>>& groups);

}  // namespace lora_ext
