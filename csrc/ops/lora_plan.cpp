// lora_plan, which groups rows by adapter, and lora_segment_ids, which expands segments to ids.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops/checks.h"
#include "ops/lora.h"
#include "ops/lora_args.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {

Tensor lora_plan(const Tensor& adapter_ids, int64_t num_adapters, const OptionalTensor& num_valid) {
    constexpr auto op = "lora_plan";
    if (adapter_ids.dim() != 2) check_dim(op, "adapter_ids", adapter_ids, 1, "(T,) or (T, K)");
    check_ids(op, adapter_ids, adapter_ids.size(0), adapter_ids.device());
    require(num_adapters >= 0 && num_adapters < kMaxAdapters, op, "num_adapters",
            expected("a number in [0, 2^24)"), found(num_adapters));
    require(adapter_ids.size(0) <= kMaxSize, op, "adapter_ids",
            expected("at most ", kMaxSize, " rows"), found(adapter_ids.size(0)));
    const c10::DeviceGuard guard(adapter_ids.device());
    const bool one = adapter_ids.dim() == 1;
    const Tensor columns = one ? adapter_ids.contiguous() : columns_of(adapter_ids);
    const int64_t count = one ? 1 : columns.size(0);
    if (num_valid) check_one(op, "num_valid", *num_valid, at::kInt, columns.device());
    const LoraPlanLayout layout{adapter_ids.size(0), static_cast<int32_t>(num_adapters)};
    // Unused entries are zero, so that all plans of the same ids are equal.
    Tensor plan = at::zeros({count * layout.size()}, columns.options().dtype(at::kInt));
    for (int64_t k = 0; k < count; ++k) {
        const Tensor ids = one ? columns : columns[k];
        LoraPlanArgs args = plan_args(ids, layout.num_adapters);
        if (num_valid) args.num_valid = num_valid->const_data_ptr<int32_t>();
        args.plan = plan.mutable_data_ptr<int32_t>() + k * layout.size();
        const int64_t column = one ? -1 : k;
        build_plan(op, ids, args, ids, column);
        if (debug_mode() && plan[k * layout.size() + kPlanBadIds].item<int32_t>() != 0)
            raise_bad_id(op, ids, args.num_adapters, column);
    }
    return plan;
}

Tensor lora_segment_ids(const Tensor& seg_indptr, const Tensor& seg_adapter, int64_t num_tokens) {
    constexpr auto op = "lora_segment_ids";
    const int64_t segments = seg_adapter.numel();
    const int32_t* indptr = vector_data<int32_t>(op, "seg_indptr", seg_indptr, segments + 1,
                                                 at::kInt, seg_adapter.device());
    const int32_t* adapter = vector_data<int32_t>(op, "seg_adapter", seg_adapter, segments,
                                                  at::kInt, seg_adapter.device());
    require(num_tokens >= 0, op, "num_tokens", expected("a number of at least 0"),
            found(num_tokens));
    const c10::DeviceGuard guard(seg_indptr.device());
    Tensor ids = at::empty({num_tokens}, seg_adapter.options());
    int32_t* out = ids.mutable_data_ptr<int32_t>();
    const int32_t n = static_cast<int32_t>(segments);
    if (launches_kernels(seg_indptr)) {
        if (num_tokens > 0)
            check_launch(op, launch_lora_segment_ids(indptr, adapter, n, out, num_tokens,
                                                     current_stream(seg_indptr)));
        return ids;
    }
    for (int64_t s = 0; s <= segments; ++s)
        require(indptr[s] >= (s == 0 ? 0 : indptr[s - 1]) && indptr[s] <= num_tokens, op,
                words("seg_indptr[", s, "]"),
                expected("a bound that does not decrease and stays in [0, ", num_tokens, "]"),
                found(indptr[s]));
    lora_segment_ids_cpu(indptr, adapter, n, out, num_tokens);
    return ids;
}

}  // namespace lora_ext
