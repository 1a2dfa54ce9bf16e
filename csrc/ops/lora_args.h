// What the LoRA ops have in common: tensors checked and turned into the structs of lora_ext/lora.h.
#pragma once

#include <initializer_list>

#include "lora_ext/lora.h"
#include "ops/call.h"

namespace lora_ext {

constexpr int64_t kMaxAdapters = 1 << 24;
// Adjacent items of a twin, which are chunks of one adapter as a rule, share what is packed of it.
constexpr int64_t kChunksTogether = 4;

// The adapters of one op, and the tensors that keep their memory alive.
struct Bank {
    LoraBank view;
    Tensor a, b;
};

// Each op names the factors it uses; `in` and `out` are what the activations say their widths are.
Bank bank_of(const char* op, const Tensor* a, const Tensor* b, const OptionalTensor& scale,
             const OptionalTensor& ranks, const OptionalTensor& page_table, const Tensor& x,
             const char* x_name, int64_t in, int64_t out);

// An op without backward must not be part of a graph.
void check_inference(const char* op, std::initializer_list<const Tensor*> tensors);
// One id per row, int64 or int32, on the device; their values are read by plans alone.
void check_ids(const char* op, const Tensor& ids, int64_t rows, at::Device device);
// A caller's plan has the size and place of one for these rows and adapters.
void check_plan_tensor(const char* op, const LoraPlanLayout& layout, const Tensor& plan,
                       at::Device device);
// A caller's plan on the CPU is one of these ids: every row that it groups carries the id of its
// chunk, or memory outside the tensors would be touched.
void check_plan(const char* op, const LoraPlanLayout& layout, const Tensor& ids,
                const int32_t* plan);
// Ranks and pages of the slots that a plan on the CPU uses. Slots it does not use may be changing
// under a pool's hands at this moment.
void check_slots(const char* op, const LoraBank& w, const int32_t* plan);

// `ids` contiguous; the plan's memory is the caller's to add.
LoraPlanArgs plan_args(const Tensor& ids, int32_t num_adapters);
// Fills `plan` and raises on an id out of range: at once on the CPU, in debug mode on a device.
void build_plan(const char* op, const Tensor& ids, LoraPlanArgs args, const Tensor& like);
[[noreturn]] void raise_bad_id(const char* op, const Tensor& ids, int64_t num_adapters);

}  // namespace lora_ext
