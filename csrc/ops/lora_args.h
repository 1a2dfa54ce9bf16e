// Helpers of the LoRA ops that check tensors and convert them to the structs of lora_ext/lora.h.
#pragma once

#include <initializer_list>

#include "lora_ext/lora.h"
#include "ops/call.h"

namespace lora_ext {

constexpr int64_t kMaxAdapters = 1 << 24;
// Number of items that a thread takes at once: adjacent items of a CPU twin are usually chunks of
// one adapter and share its packed factors.
constexpr int64_t kChunksTogether = 4;

// Adapters of one op, and the tensors that own their memory.
struct Bank {
    LoraBank view;
    Tensor a, b, weights, page_table;
};

constexpr int64_t kMaxColumns = 64;  // ids per row

// Returns the checked bank. An op passes only the factors that it uses; `in` and `out` are the
// widths of the activations.
Bank bank_of(const char* op, const Tensor* a, const Tensor* b, const OptionalTensor& scale,
             const OptionalTensor& ranks, const OptionalTensor& page_table, const Tensor& x,
             const char* x_name, int64_t in, int64_t out);

// Converts float8 pages to the dtype of x if kernels do not read float8 pages in this call. The
// rows of `args` must be set; `ids` are their adapter ids.
void widen_pages(LoraArgs& args, Bank& bank, const Tensor& x, const Tensor& ids);

// Checks the weights of rows and the groups of pages of a call with these ids, and stores both in
// `args`, whose bank must be set.
void set_weights(const char* op, LoraArgs& args, Bank& bank, const OptionalTensor& weights,
                 const OptionalTensor& groups, const Tensor& ids);

// Raises if an op without a backward would become part of an autograd graph.
void check_inference(const char* op, std::initializer_list<const Tensor*> tensors);
// Checks that there is one id per row, or K ids, int64 or int32, on `device`. The values are read
// only when a plan is built.
void check_ids(const char* op, const Tensor& ids, int64_t rows, at::Device device);
// Returns contiguous ids (K, T) for ids (T, K), or (1, T) for ids (T,).
Tensor columns_of(const Tensor& ids);
// Checks that a caller's plan has the size and device that these rows, adapters and columns of ids
// require.
void check_plan_tensor(const char* op, const LoraPlanLayout& layout, int64_t columns,
                       const Tensor& plan, at::Device device);
// Checks that a caller's plan on the CPU was made for these ids: every grouped row must have the id
// of its chunk, otherwise a CPU twin would access memory outside the tensors.
void check_plan(const char* op, const LoraPlanLayout& layout, const Tensor& ids,
                const int32_t* plan);
// Checks ranks and pages of the slots that a plan on the CPU uses. A pool may be changing other
// slots at the same time.
void check_slots(const char* op, const LoraBank& w, const int32_t* plan);
// Checks the groups of the slots that a plan on `device` uses, and their ranks. Waits for the
// device, so it is for debug mode only.
void check_groups(const char* op, LoraBank w, const LoraPlanLayout& layout, const int32_t* plan,
                  at::Device device);

// Returns the arguments that build a plan of ids (T,); the caller sets the memory of the plan. A
// device that builds the plan reads the ids, which must then be contiguous.
LoraPlanArgs plan_args(const Tensor& ids, int32_t num_adapters);
// Fills the plan of `args`. On the CPU, raises if an id is out of range; on a device, the caller
// must check this in debug mode.
void build_plan(const char* op, const Tensor& ids, LoraPlanArgs args, const Tensor& like,
                int64_t column = -1);
// Raises for the first id out of range. `ids` are column `column` of (T, K), or (T,) if it is -1.
[[noreturn]] void raise_bad_id(const char* op, const Tensor& ids, int64_t num_adapters,
                               int64_t column = -1);

}  // namespace lora_ext
