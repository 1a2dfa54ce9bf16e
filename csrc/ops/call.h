// Helpers for calling a CPU twin or a CUDA kernel, shared by the ops of all families.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>

namespace lora_ext {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

// Return the dtype in which values of t are accumulated: float32, or float64 for float64.
inline at::ScalarType accumulator_of(const Tensor& t) {
    return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Disables autocast during its lifetime, so that a library's GEMM keeps the dtype of its operands.
struct NoAutocast {
    c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Minimum number of exponentials per thread.
constexpr int64_t kSerialExps = 1 << 13;

// Calls f(begin, end) for parts of [0, items) on torch's threads. Each thread has at least
// `serial_work` units of work: for less, a parallel region costs more than a second thread saves.
template <typename F>
void for_items(int64_t items, int64_t work_per_item, int64_t serial_work, const F& f) {
    at::parallel_for(0, items,
                     std::max<int64_t>(1, serial_work / std::max<int64_t>(1, work_per_item)), f);
}

}  // namespace lora_ext
