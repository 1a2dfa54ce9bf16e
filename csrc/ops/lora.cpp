// The LoRA ops: tensors in, checks, allocation, choice of twin or kernel. Writes no math.
//
// Shapes: x (T, I); bank a (A, R, I), b (A, O, R), or pool a (P, 8, I), b (P, O, 8) with page_table
// (A, R/8); adapter_ids (T,); v (T, R); y (T, O). lora_ext/lora.h has the layouts.
#include "ops/lora.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops/call.h"
#include "ops/checks.h"
#include "ops/deal.h"
#include "ops/lora_args.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

thread_local Scratch plan_scratch, v_scratch;

enum class Step { kShrink, kExpand, kApply };

// A parallel region costs a few microseconds: below so many bytes of adapters per call, one thread
// is faster.
constexpr int64_t kSerialBytes = 128 * 1024;

void run_twin(LoraArgs& args, Step step, int64_t element_size) {
    const LoraCpu& cpu = chosen_twins<LoraCpu>();
    const int64_t chunks = args.plan[kPlanNumChunks];
    if (chunks == 0) return;
    const int64_t width = (step != Step::kExpand ? args.bank.in_features : 0) +
                          (step != Step::kShrink ? args.bank.out_features : 0);
    const int64_t bytes = chunks * args.bank.max_rank * width * element_size;
    const int64_t threads = bytes < kSerialBytes ? 1 : at::get_num_threads();
    auto split = [&](int64_t items, auto&& f) {
        if (threads == 1 || items <= 1) {
            if (items > 0) f(0, items);
        } else if (rank_spans(args.bank.max_rank) > 1) {
            deal_items(items, kChunksTogether, f);
        } else {
            at::parallel_for(0, items, 1, f);
        }
    };
    auto shrink = [&](int64_t begin, int64_t end) { cpu.shrink(args, begin, end); };
    auto expand = [&](int64_t begin, int64_t end) { cpu.expand(args, begin, end); };
    const bool one_span = rank_spans(args.bank.max_rank) == 1;
    if (step == Step::kApply && one_span && (threads == 1 || chunks >= 4 * threads)) {
        split(chunks, [&](int64_t begin, int64_t end) { cpu.apply(args, begin, end); });
        return;
    }
    if (step != Step::kExpand) split(cpu.shrink_items(args), shrink);
    if (step != Step::kShrink) split(cpu.expand_items(args), expand);
}

// The common end of every op: plan, scratch, launch or loop.
void execute(const char* op, Step step, LoraArgs& args, const Bank& bank, const Tensor& x,
             const Tensor& ids_in, const OptionalTensor& plan) {
    args.bank = bank.view;
    const int64_t rows = args.num_tokens;
    const LoraPlanLayout layout{rows, args.bank.num_adapters};
    check_ids(op, ids_in, rows, x.device());
    if (plan) check_plan_tensor(op, layout, *plan, x.device());
    require(rows <= kMaxSize, op, step == Step::kExpand ? "y" : "x",
            expected("at most ", kMaxSize, " rows"), found(rows));
    if (rows == 0 || args.bank.max_rank == 0) return;
    // Without in-features v is zero, and the twins do not write it.
    if (step != Step::kExpand && args.bank.in_features == 0) return;
    const c10::DeviceGuard guard(x.device());
    const Tensor ids = ids_in.contiguous();
    args.ids = plan_args(ids, args.bank.num_adapters);
    if (plan) args.plan = plan->const_data_ptr<int32_t>();

    if (!launches_kernels(x)) {
        if (!plan) {
            args.ids.plan =
                static_cast<int32_t*>(plan_scratch.get(layout.size() * sizeof(int32_t)));
            build_plan(op, ids, args.ids, x);
            args.plan = args.ids.plan;
        } else {
            check_plan(op, layout, ids, args.plan);
        }
        check_slots(op, args.bank, args.plan);
        if (step == Step::kApply) {
            args.v_row_stride = 8 * args.bank.pages_per_slot;
            const size_t size = args.dtype == DType::kFloat64 ? 8 : 4;
            args.v = v_scratch.get(rows * args.v_row_stride * size);
        }
        run_twin(args, step, x.element_size());
        return;
    }

    // Workspaces come from torch's caching allocator, in the order of the stream and under graph
    // capture too.
    const auto ints = x.options().dtype(at::kInt);
    Tensor own_plan, workspace;
    if (!plan && (rows > kPlanlessTokens || debug_mode())) {
        own_plan = at::empty({layout.size()}, ints);
        args.ids.plan = own_plan.mutable_data_ptr<int32_t>();
        build_plan(op, ids, args.ids, x);
        args.plan = args.ids.plan;
        if (debug_mode() && own_plan[kPlanBadIds].item<int32_t>() != 0)
            raise_bad_id(op, ids, args.bank.num_adapters);
    }
    if (const int64_t bytes = lora_workspace_bytes(args); bytes > 0) {
        workspace = at::empty({bytes}, x.options().dtype(at::kByte));
        args.workspace = workspace.mutable_data_ptr();
    }
    void* stream = current_stream(x);
    switch (step) {
        case Step::kShrink:
            check_launch(op, launch_lora_shrink(args, stream));
            break;
        case Step::kExpand:
            check_launch(op, launch_lora_expand(args, stream));
            break;
        case Step::kApply:
            check_launch(op, launch_lora_apply(args, stream));
            break;
    }
}

}  // namespace

Tensor lora_plan(const Tensor& adapter_ids, int64_t num_adapters, const OptionalTensor& num_valid) {
    constexpr auto op = "lora_plan";
    check_dim(op, "adapter_ids", adapter_ids, 1, "(T,)");
    check_ids(op, adapter_ids, adapter_ids.size(0), adapter_ids.device());
    require(num_adapters >= 0 && num_adapters < kMaxAdapters, op, "num_adapters",
            expected("a number in [0, 2^24)"), found(num_adapters));
    require(adapter_ids.size(0) <= kMaxSize, op, "adapter_ids",
            expected("at most ", kMaxSize, " rows"), found(adapter_ids.size(0)));
    const c10::DeviceGuard guard(adapter_ids.device());
    const Tensor ids = adapter_ids.contiguous();
    LoraPlanArgs args = plan_args(ids, static_cast<int32_t>(num_adapters));
    if (num_valid) {
        check_one(op, "num_valid", *num_valid, at::kInt, ids.device());
        args.num_valid = num_valid->const_data_ptr<int32_t>();
    }
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    // Zeros, so that entries no one reads are equal from call to call.
    Tensor plan = at::zeros({layout.size()}, ids.options().dtype(at::kInt));
    args.plan = plan.mutable_data_ptr<int32_t>();
    build_plan(op, ids, args, ids);
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

Tensor lora_shrink(const Tensor& x_in, const Tensor& a, const Tensor& adapter_ids,
                   const OptionalTensor& scale, const OptionalTensor& ranks,
                   const OptionalTensor& page_table, const OptionalTensor& plan) {
    constexpr auto op = "lora_shrink";
    check_inference(op, {&x_in, &a});
    check_dim(op, "x", x_in, 2, "(T, I)");
    LoraArgs args;
    args.dtype = dtype_of(op, "x", x_in);
    const Tensor x = rows_contiguous(x_in);
    const Bank bank = bank_of(op, &a, nullptr, scale, ranks, page_table, x, "x", x.size(1), 0);
    args.num_tokens = x.size(0);
    args.x = x.const_data_ptr();
    args.x_row_stride = x.stride(0);
    Tensor v = at::zeros({x.size(0), bank.view.max_rank}, x.options().dtype(accumulator_of(x)));
    args.v = v.mutable_data_ptr();
    args.v_row_stride = v.stride(0);
    execute(op, Step::kShrink, args, bank, x, adapter_ids, plan);
    return v;
}

void lora_expand_(Tensor y, const Tensor& v_in, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& ranks, const OptionalTensor& page_table,
                  const OptionalTensor& plan) {
    constexpr auto op = "lora_expand_";
    check_inference(op, {&y, &v_in, &b});
    check_output(op, y);
    LoraArgs args;
    args.dtype = dtype_of(op, "y", y);
    check_dim(op, "v", v_in, 2, "(T, R)");
    check_dtype(op, "v", v_in, accumulator_of(y));
    check_device(op, "v", v_in, y.device());
    require(v_in.size(0) == y.size(0), op, "v.shape[0]", expected("y.shape[0] = ", y.size(0)),
            found(v_in.size(0)));
    const Bank bank = bank_of(op, nullptr, &b, {}, ranks, page_table, y, "y", 0, y.size(1));
    require(v_in.size(1) == bank.view.max_rank, op, "v.shape[1]",
            expected("the rank of b, ", bank.view.max_rank), found(v_in.size(1)));
    check_apart(op, y,
                {{"v", v_in},
                 {"b", b},
                 {"adapter_ids", adapter_ids},
                 {"ranks", ranks},
                 {"page_table", page_table},
                 {"plan", plan}});
    const Tensor v = rows_contiguous(v_in);
    args.num_tokens = y.size(0);
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    args.v = const_cast<void*>(v.const_data_ptr());
    args.v_row_stride = v.stride(0);
    execute(op, Step::kExpand, args, bank, y, adapter_ids, plan);
}

namespace {

void apply_to(const char* op, const Tensor& y, const Tensor& x_in, const Tensor& a, const Tensor& b,
              const Tensor& adapter_ids, const OptionalTensor& scale, const OptionalTensor& ranks,
              const OptionalTensor& page_table, const OptionalTensor& plan) {
    check_dim(op, "x", x_in, 2, "(T, I)");
    LoraArgs args;
    args.dtype = dtype_of(op, "x", x_in);
    check_like(op, "y", y, x_in, "x");
    require(y.size(0) == x_in.size(0), op, "y.shape[0]", expected("x.shape[0] = ", x_in.size(0)),
            found(y.size(0)));
    const Tensor x = rows_contiguous(x_in);
    const Bank bank = bank_of(op, &a, &b, scale, ranks, page_table, x, "x", x.size(1), y.size(1));
    args.num_tokens = x.size(0);
    args.x = x.const_data_ptr();
    args.x_row_stride = x.stride(0);
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    execute(op, Step::kApply, args, bank, x, adapter_ids, plan);
}

}  // namespace

Tensor lora_apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& scale, const OptionalTensor& ranks,
                  const OptionalTensor& page_table, const OptionalTensor& plan) {
    constexpr auto op = "lora_apply";
    check_dim(op, "x", x, 2, "(T, I)");
    check_dim(op, "b", b, 3, page_table ? "(P, O, 8)" : "(A, O, R)");
    check_no_tangents(op, {&x, &a, &b});
    Tensor y = at::zeros({x.size(0), b.size(1)}, x.options());
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan);
    return y;
}

void lora_apply_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b,
                 const Tensor& adapter_ids, const OptionalTensor& scale,
                 const OptionalTensor& ranks, const OptionalTensor& page_table,
                 const OptionalTensor& plan) {
    constexpr auto op = "lora_apply_";
    check_inference(op, {&y, &x, &a, &b});
    check_output(op, y);
    check_apart(op, y,
                {{"x", x},
                 {"a", a},
                 {"b", b},
                 {"adapter_ids", adapter_ids},
                 {"scale", scale},
                 {"ranks", ranks},
                 {"page_table", page_table},
                 {"plan", plan}});
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan);
}

}  // namespace lora_ext
