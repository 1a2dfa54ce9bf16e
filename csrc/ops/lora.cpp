// The LoRA ops: checks, allocation, choice of CPU twin or CUDA kernel.
//
// Shapes: x (T, I); bank a (A, R, I), b (A, O, R), or pool a (P, 8, I), b (P, O, 8) with page_table
// (A, R/8); adapter_ids (T,); v (T, R); y (T, O). lora_ext/lora.h has the layouts. A call with
// adapter_ids (T, K) runs as one pass for each column, in order; its v is (T, K, R).
#include "ops/lora.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <span>

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

// Smallest size of a call's adapters in bytes for which several threads are used: a parallel region
// costs a few microseconds.
constexpr int64_t kSerialBytes = 128 * 1024;

void run_twin(std::span<const LoraArgs> modules, Step step, int64_t element_size) {
    const LoraCpu& cpu = chosen_twins<LoraCpu>();
    const int64_t chunks = modules[0].plan[kPlanNumChunks];
    if (chunks == 0) return;
    int64_t bytes = 0;
    bool one_span = true;
    for (const LoraArgs& args : modules) {
        const int64_t width = (step != Step::kExpand ? args.bank.in_features : 0) +
                              (step != Step::kShrink ? args.bank.out_features : 0);
        bytes += chunks * args.bank.max_rank * width * element_size;
        one_span = one_span && rank_spans(args.bank.max_rank) == 1;
    }
    const int64_t threads = bytes < kSerialBytes ? 1 : at::get_num_threads();
    auto split = [&](int64_t items, auto&& f) {
        if (threads == 1 || items <= 1) {
            if (items > 0) f(0, items);
        } else if (one_span) {
            at::parallel_for(0, items, 1, f);
        } else {
            deal_items(items, kChunksTogether, f);
        }
    };
    // Runs the items of all modules as one range: all items of a module precede those of the next.
    auto run = [&](auto items_of, auto part) {
        int64_t items = 0;
        for (const LoraArgs& args : modules) items += items_of(args);
        split(items, [&](int64_t begin, int64_t end) {
            int64_t first = 0;
            for (const LoraArgs& args : modules) {
                const int64_t count = items_of(args);
                const int64_t from = std::max(begin - first, int64_t{0});
                const int64_t to = std::min(end - first, count);
                if (from < to) part(args, from, to);
                first += count;
            }
        });
    };
    if (step == Step::kApply && one_span && (threads == 1 || chunks >= 4 * threads)) {
        // The inner loop runs over chunks of rows. An inner loop over modules would read x once,
        // but switch to other adapter pages at every step. Which order is faster has not been
        // measured.
        split(chunks, [&](int64_t begin, int64_t end) {
            for (const LoraArgs& args : modules) cpu.apply(args, begin, end);
        });
        return;
    }
    if (step != Step::kExpand) run(cpu.shrink_items, cpu.shrink);
    if (step != Step::kShrink) run(cpu.expand_items, cpu.expand);
}

// Allocates one block of memory with `get`, and passes a slice of it to `give` per module.
template <class Get, class Give>
void cut(std::span<LoraArgs> modules, int64_t (*bytes_of)(const LoraArgs&), Get&& get,
         Give&& give) {
    constexpr int64_t kApart = 64;
    int64_t bytes = 0;
    for (const LoraArgs& args : modules) bytes += ceil_div(bytes_of(args), kApart) * kApart;
    if (bytes == 0) return;
    char* memory = static_cast<char*>(get(bytes));
    for (LoraArgs& args : modules) {
        give(args, memory);
        memory += ceil_div(bytes_of(args), kApart) * kApart;
    }
}

int64_t bytes_of_rank(const LoraArgs& args) {
    return args.dtype == DType::kFloat64 ? 8 : 4;
}
int64_t bytes_of_v(const LoraArgs& args) {
    return args.num_tokens * 8 * args.bank.pages_per_slot * bytes_of_rank(args);
}

// Builds the plan, allocates scratch memory, and launches kernels or runs CPU twins for ids (T,).
// `column` is their column in ids (T, K), or -1 if a row has one id. Kernels read ids or a plan.
void execute_column(const char* op, Step step, std::span<LoraArgs> modules, const Tensor& x,
                    const Tensor& ids_in, const int32_t* plan, const char* const* names,
                    int64_t column = -1) {
    const LoraArgs& first = modules[0];
    const int64_t rows = first.num_tokens, num_adapters = first.bank.num_adapters;
    const LoraPlanLayout layout{rows, first.bank.num_adapters};
    const auto idle = [](const LoraArgs& args) { return args.bank.max_rank == 0; };
    if (rows == 0 || std::all_of(modules.begin(), modules.end(), idle)) return;
    // Without in-features the update is zero: y stays as it is, and v is already zero.
    if (step != Step::kExpand && first.bank.in_features == 0) return;
    const c10::DeviceGuard guard(x.device());
    const bool kernels = launches_kernels(x);
    const Tensor ids = kernels && plan ? ids_in : ids_in.contiguous();
    LoraPlanArgs rows_of = plan_args(ids, first.bank.num_adapters);
    const auto share_plan = [&] {
        for (LoraArgs& args : modules) args.ids = rows_of, args.plan = plan;
    };

    if (!kernels) {
        if (!plan) {
            rows_of.plan = static_cast<int32_t*>(plan_scratch.get(layout.size() * sizeof(int32_t)));
            build_plan(op, ids, rows_of, x);
            plan = rows_of.plan;
        } else {
            check_plan(op, layout, ids, plan);
        }
        share_plan();
        for (size_t i = 0; i < modules.size(); ++i)
            check_slots(names ? names[i] : op, modules[i].bank, plan);
        if (step == Step::kApply)
            cut(
                modules, bytes_of_v, [](int64_t bytes) { return v_scratch.get(bytes); },
                [](LoraArgs& args, void* v) {
                    args.v = v;
                    args.v_row_stride = 8 * args.bank.pages_per_slot;
                });
        run_twin(modules, step, x.element_size());
        return;
    }

    // Workspaces use torch's caching allocator: stream-ordered, and legal under graph capture.
    const auto ints = x.options().dtype(at::kInt);
    Tensor own_plan, workspace;
    if (!plan && (rows > kPlanlessTokens || debug_mode())) {
        own_plan = at::empty({layout.size()}, ints);
        rows_of.plan = own_plan.mutable_data_ptr<int32_t>();
        build_plan(op, ids, rows_of, x);
        plan = rows_of.plan;
        if (debug_mode() && own_plan[kPlanBadIds].item<int32_t>() != 0)
            raise_bad_id(op, ids, num_adapters, column);
    }
    share_plan();
    for (size_t i = 0; debug_mode() && i < modules.size(); ++i)
        check_groups(names ? names[i] : op, modules[i].bank, layout, plan, x.device());
    cut(
        modules, lora_workspace_bytes,
        [&](int64_t bytes) {
            workspace = at::empty({bytes}, x.options().dtype(at::kByte));
            return workspace.mutable_data_ptr();
        },
        [](LoraArgs& args, void* memory) { args.workspace = memory; });
    void* stream = current_stream(x);
    switch (step) {
        case Step::kShrink:
            check_launch(op, launch_lora_shrink(first, stream));
            break;
        case Step::kExpand:
            check_launch(op, launch_lora_expand(first, stream));
            break;
        case Step::kApply:
            check_launch(op, launch_lora_apply(modules, stream));
            break;
    }
}

// Runs one op on all modules, which share their rows; `names` are the modules' names in messages.
void execute(const char* op, Step step, std::span<LoraArgs> modules, const Tensor& x,
             const Tensor& ids, const OptionalTensor& plan_in, const char* const* names = nullptr) {
    const int64_t rows = modules[0].num_tokens;
    const LoraPlanLayout layout{rows, modules[0].bank.num_adapters};
    check_ids(op, ids, rows, x.device());
    const int64_t count = ids.dim() == 2 ? ids.size(1) : 1;
    if (plan_in) check_plan_tensor(op, layout, count, *plan_in, x.device());
    require(rows <= kMaxSize, op, step == Step::kExpand ? "y" : "x",
            expected("at most ", kMaxSize, " rows"), found(rows));
    const int32_t* plan = plan_in ? plan_in->const_data_ptr<int32_t>() : nullptr;
    if (ids.dim() == 1) return execute_column(op, step, modules, x, ids, plan, names);
    const bool kernels = launches_kernels(x);
    const Tensor columns = kernels && plan ? ids.t() : columns_of(ids);
    Tensor plans;
    if (!kernels) {  // Raise for any column before the first one changes y.
        if (!plan) {
            plans = at::empty({count * layout.size()}, ids.options().dtype(at::kInt));
            for (int64_t k = 0; k < count; ++k) {
                const Tensor column = columns[k];
                LoraPlanArgs of = plan_args(column, layout.num_adapters);
                of.plan = plans.mutable_data_ptr<int32_t>() + k * layout.size();
                build_plan(op, column, of, x, k);
            }
            plan = plans.const_data_ptr<int32_t>();
        }
        for (int64_t k = 0; k < count; ++k) {
            if (plan_in) check_plan(op, layout, columns[k], plan + k * layout.size());
            for (size_t i = 0; i < modules.size(); ++i)
                check_slots(names ? names[i] : op, modules[i].bank, plan + k * layout.size());
        }
    }
    for (int64_t k = 0; k < count; ++k) {
        execute_column(op, step, modules, x, columns[k], plan, names, k);
        if (plan) plan += layout.size();
        for (LoraArgs& args : modules) {
            if (args.weights) ++args.weights;
            if (step != Step::kApply)
                args.v = static_cast<char*>(args.v) + bytes_of_rank(args) * args.bank.max_rank;
        }
    }
}

}  // namespace

Tensor lora_shrink(const Tensor& x_in, const Tensor& a, const Tensor& adapter_ids,
                   const OptionalTensor& scale, const OptionalTensor& ranks,
                   const OptionalTensor& page_table, const OptionalTensor& plan,
                   const OptionalTensor& weights, const OptionalTensor& groups) {
    constexpr auto op = "lora_shrink";
    check_inference(op, {&x_in, &a});
    check_dim(op, "x", x_in, 2, "(T, I)");
    LoraArgs args;
    args.dtype = dtype_of(op, "x", x_in);
    const Tensor x = rows_contiguous(x_in);
    Bank bank = bank_of(op, &a, nullptr, scale, ranks, page_table, x, "x", x.size(1), 0);
    args.bank = bank.view;
    args.num_tokens = x.size(0);
    check_ids(op, adapter_ids, x.size(0), x.device());
    set_weights(op, args, bank, weights, groups, adapter_ids);
    args.x = x.const_data_ptr();
    args.x_row_stride = x.stride(0);
    widen_pages(args, bank, x, adapter_ids);
    const auto options = x.options().dtype(accumulator_of(x));
    const int64_t rank = args.bank.max_rank;
    Tensor v = adapter_ids.dim() == 2 ? at::zeros({x.size(0), adapter_ids.size(1), rank}, options)
                                      : at::zeros({x.size(0), rank}, options);
    args.v = v.mutable_data_ptr();
    args.v_row_stride = v.stride(0);
    execute(op, Step::kShrink, std::span(&args, 1), x, adapter_ids, plan);
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
    const bool columns = adapter_ids.dim() == 2;
    check_dim(op, "v", v_in, columns ? 3 : 2, columns ? "(T, K, R)" : "(T, R)");
    check_dtype(op, "v", v_in, accumulator_of(y));
    check_device(op, "v", v_in, y.device());
    require(v_in.size(0) == y.size(0), op, "v.shape[0]", expected("y.shape[0] = ", y.size(0)),
            found(v_in.size(0)));
    Bank bank = bank_of(op, nullptr, &b, {}, ranks, page_table, y, "y", 0, y.size(1));
    args.bank = bank.view;
    require(v_in.size(-1) == bank.view.max_rank, op, words("v.shape[", v_in.dim() - 1, "]"),
            expected("the rank of b, ", bank.view.max_rank), found(v_in.size(-1)));
    require(!columns || v_in.size(1) == adapter_ids.size(1), op, "v.shape[1]",
            expected("adapter_ids.shape[1] = ", adapter_ids.size(-1)), found(v_in.size(1)));
    check_apart(op, y,
                {{"v", v_in},
                 {"b", b},
                 {"adapter_ids", adapter_ids},
                 {"ranks", ranks},
                 {"page_table", page_table},
                 {"plan", plan}});
    const Tensor v = columns ? v_in.contiguous() : rows_contiguous(v_in);
    args.num_tokens = y.size(0);
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    args.v = const_cast<void*>(v.const_data_ptr());
    args.v_row_stride = v.stride(0);
    check_ids(op, adapter_ids, y.size(0), y.device());
    widen_pages(args, bank, y, adapter_ids);
    execute(op, Step::kExpand, std::span(&args, 1), y, adapter_ids, plan);
}

namespace {

// Return the arguments of one module of an apply; `bank` must outlive them.
LoraArgs apply_args(const char* op, const Tensor& y, const Tensor& x, const Tensor& a,
                    const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
                    const OptionalTensor& ranks, const OptionalTensor& page_table, Bank& bank) {
    LoraArgs args;
    args.dtype = dtype_of(op, "x", x);
    check_like(op, "y", y, x, "x");
    require(y.size(0) == x.size(0), op, "y.shape[0]", expected("x.shape[0] = ", x.size(0)),
            found(y.size(0)));
    bank = bank_of(op, &a, &b, scale, ranks, page_table, x, "x", x.size(1), y.size(1));
    args.bank = bank.view;
    args.num_tokens = x.size(0);
    args.x = x.const_data_ptr();
    args.x_row_stride = x.stride(0);
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    widen_pages(args, bank, x, adapter_ids);
    return args;
}

}  // namespace

void apply_to(const char* op, const Tensor& y, const Tensor& x_in, const Tensor& a, const Tensor& b,
              const Tensor& adapter_ids, const OptionalTensor& scale, const OptionalTensor& ranks,
              const OptionalTensor& page_table, const OptionalTensor& plan,
              const OptionalTensor& weights, const OptionalTensor& groups) {
    check_dim(op, "x", x_in, 2, "(T, I)");
    const Tensor x = rows_contiguous(x_in);
    check_ids(op, adapter_ids, x.size(0), x.device());
    Bank bank;
    LoraArgs args = apply_args(op, y, x, a, b, adapter_ids, scale, ranks, page_table, bank);
    set_weights(op, args, bank, weights, groups, adapter_ids);
    execute(op, Step::kApply, std::span(&args, 1), x, adapter_ids, plan);
}

Tensor lora_apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& scale, const OptionalTensor& ranks,
                  const OptionalTensor& page_table, const OptionalTensor& plan,
                  const OptionalTensor& weights, const OptionalTensor& groups) {
    constexpr auto op = "lora_apply";
    check_dim(op, "x", x, 2, "(T, I)");
    check_dim(op, "b", b, 3, page_table ? "(P, O, 8)" : "(A, O, R)");
    check_no_tangents(op, {&x, &a, &b});
    Tensor y = at::zeros({x.size(0), b.size(1)}, x.options());
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan, weights, groups);
    return y;
}

void lora_apply_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b,
                 const Tensor& adapter_ids, const OptionalTensor& scale,
                 const OptionalTensor& ranks, const OptionalTensor& page_table,
                 const OptionalTensor& plan, const OptionalTensor& weights,
                 const OptionalTensor& groups) {
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
                 {"plan", plan},
                 {"weights", weights},
                 {"groups", groups}});
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan, weights, groups);
}

namespace {

constexpr const char* kSiblings[kMaxSiblings] = {
    "lora_apply_siblings_: module 0", "lora_apply_siblings_: module 1",
    "lora_apply_siblings_: module 2", "lora_apply_siblings_: module 3",
    "lora_apply_siblings_: module 4", "lora_apply_siblings_: module 5",
    "lora_apply_siblings_: module 6", "lora_apply_siblings_: module 7"};

OptionalTensor of_module(const std::vector<Tensor>& tensors, size_t i) {
    return tensors.empty() ? OptionalTensor() : OptionalTensor(tensors[i]);
}

}  // namespace

void lora_apply_siblings_(const std::vector<Tensor>& ys, const Tensor& x_in,
                          const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                          const Tensor& adapter_ids, const std::vector<Tensor>& scale,
                          const std::vector<Tensor>& ranks, const std::vector<Tensor>& page_table,
                          const OptionalTensor& plan, const OptionalTensor& weights,
                          const std::optional<std::vector<Tensor>>& groups_in) {
    constexpr auto op = "lora_apply_siblings_";
    const size_t count = ys.size();
    const std::vector<Tensor> groups = groups_in.value_or(std::vector<Tensor>());
    require(count >= 1 && count <= kMaxSiblings, op, "y",
            expected("1 to ", kMaxSiblings, " tensors"), found(count));
    const auto check_count = [&](const char* name, const std::vector<Tensor>& tensors,
                                 bool needed) {
        require(tensors.size() == count || (tensors.empty() && !needed), op, name,
                expected("as many tensors as y, ", count), found(tensors.size()));
    };
    check_count("a", a, true);
    check_count("b", b, true);
    check_count("scale", scale, false);
    check_count("ranks", ranks, false);
    check_count("page_table", page_table, false);
    check_count("groups", groups, false);
    check_dim(op, "x", x_in, 2, "(T, I)");
    const Tensor x = rows_contiguous(x_in);
    LoraArgs modules[kMaxSiblings];
    Bank banks[kMaxSiblings];
    for (size_t i = 0; i < count; ++i) {
        const char* const module = kSiblings[i];
        const Tensor& y = ys[i];
        check_inference(module, {&y, &x, &a[i], &b[i]});
        check_output(module, y);
        check_apart(
            module, y,
            {{"x", x_in}, {"adapter_ids", adapter_ids}, {"plan", plan}, {"weights", weights}});
        for (size_t j = 0; j < count; ++j) {
            if (j != i) check_apart(module, y, {{"another y", ys[j]}});
            check_apart(module, y,
                        {{"a", a[j]},
                         {"b", b[j]},
                         {"scale", of_module(scale, j)},
                         {"ranks", of_module(ranks, j)},
                         {"page_table", of_module(page_table, j)},
                         {"groups", of_module(groups, j)}});
        }
        if (i == 0) check_ids(op, adapter_ids, x.size(0), x.device());
        modules[i] = apply_args(module, y, x, a[i], b[i], adapter_ids, of_module(scale, i),
                                of_module(ranks, i), of_module(page_table, i), banks[i]);
        set_weights(module, modules[i], banks[i], weights, of_module(groups, i), adapter_ids);
        const int64_t slots = modules[i].bank.num_adapters;
        require(slots == modules[0].bank.num_adapters, module, "a",
                expected("as many adapters as module 0, ", modules[0].bank.num_adapters),
                found(slots));
    }
    execute(op, Step::kApply, std::span(modules, count), x, adapter_ids, plan, kSiblings);
}

}  // namespace lora_ext
