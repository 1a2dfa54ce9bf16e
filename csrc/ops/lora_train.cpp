// The training ops: checks, allocation, choice of CPU twin or CUDA kernel. Library calls compute
// the products with the base weight; twins or kernels compute the rest.
//
// Shapes: x (T, I); weight (O, I); bank a (A, R, I), b (A, O, R), or a (R, I), b (O, R) of one
// adapter; v (T, R); y, dy (T, O).
#include "ops/lora_train.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "lora_ext/lora_train.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/deal.h"
#include "ops/gemm.h"
#include "ops/lora_args.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

thread_local Scratch plan_scratch, dv_scratch, weighed_scratch;

// Below this number of multiplications a parallel region costs more than a second thread saves.
constexpr int64_t kSerialWork = 1 << 17;

// `seed` may have one number or one per adapter; if num_adapters is -1, it must have one number.
LoraDropout dropout_of(const char* op, const char* p_name, double p, const OptionalTensor& seed,
                       at::Device device, int64_t num_adapters) {
    require(p >= 0 && p < 1, op, p_name, expected("a probability in [0, 1)"), found(p));
    LoraDropout dropout;
    if (p == 0) return dropout;
    require(seed.has_value(), op, "seed", expected("one int64 number if ", p_name, " > 0"),
            found("None"));
    dropout.per_adapter = seed->dim() == 1 && seed->size(0) == num_adapters;
    if (dropout.per_adapter) {
        dropout.seed = vector_data<int64_t>(op, "seed", *seed, num_adapters, at::kLong, device);
    } else {
        require(num_adapters < 0 || seed->numel() == 1, op, "seed",
                expected("one int64 number, or one for each of ", num_adapters, " adapters"),
                found("shape ", seed->sizes()));
        check_one(op, "seed", *seed, at::kLong, device);
        dropout.seed = seed->const_data_ptr<int64_t>();
    }
    dropout.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
    dropout.inverse_keep_f64 = 1 / (1 - p);
    dropout.inverse_keep = static_cast<float>(dropout.inverse_keep_f64);
    return dropout;
}

// The backward's kernels have one block per 256 outputs, and a grid has at most 65535 rows of
// blocks.
constexpr int64_t kMostOutputs = int64_t{65535} * 256;

// Arguments of one call, and the tensors that own their memory.
struct Call {
    const char* op;
    LoraTrainArgs args;
    Bank bank;
    Tensor x, ids, plan, workspace;  // ids (T,) or (T, K); set_plan makes (K, T) of the latter
    int64_t out;                     // features
    int64_t columns;                 // K
    const int32_t* plans = nullptr;  // one for each column

    Call(const char* op, const Tensor& x_in, const Tensor& a_in, const Tensor& b_in,
         const Tensor& adapter_ids, const OptionalTensor& scale, const OptionalTensor& ranks,
         double dropout_p, const OptionalTensor& seed, const OptionalTensor& weights,
         const OptionalTensor& groups)
        : op(op) {
        check_dim(op, "x", x_in, 2, "(T, I)");
        // A layer passes its one adapter as 2-d parameters. If the layer made views of them, the
        // graph nodes of these views would take as long as the op at small batches.
        const bool one = a_in.dim() == 2 && b_in.dim() == 2;
        const Tensor a = one ? a_in.unsqueeze(0) : a_in, b = one ? b_in.unsqueeze(0) : b_in;
        check_dim(op, "b", b, 3, "(A, O, R)");
        args.lora.dtype = dtype_of(op, "x", x_in);
        x = rows_contiguous(x_in);
        require(x.size(0) <= kMaxSize, op, "x", expected("at most ", kMaxSize, " rows"),
                found(x.size(0)));
        out = b.size(1);
        require(out <= kMostOutputs || !launches_kernels(x), op, "b",
                expected("at most ", kMostOutputs, " outputs on a device"), found(out));
        bank = bank_of(op, &a, &b, scale, ranks, {}, x, "x", x.size(1), out);
        args.lora.bank = bank.view;
        args.lora.num_tokens = x.size(0);
        args.lora.x = x.const_data_ptr();
        args.lora.x_row_stride = x.stride(0);
        args.dropout = dropout_of(op, "dropout_p", dropout_p, seed, x.device(), a.size(0));
        check_ids(op, adapter_ids, x.size(0), x.device());
        columns = adapter_ids.dim() == 2 ? adapter_ids.size(1) : 1;
        if (columns > 1 && args.dropout.per_adapter) {
            require(seed->numel() == 1, op, "seed",
                    expected("one int64 number with several ids per row"),
                    found("shape ", seed->sizes()));
            args.dropout.per_adapter = false;
        }
        set_weights(op, args.lora, bank, weights, groups, adapter_ids);
        ids = adapter_ids;
    }

    LoraPlanLayout layout() const { return {args.lora.num_tokens, args.lora.bank.num_adapters}; }

    // Return false if there are no rows, no ranks or no in-features: products with adapters are
    // then zero.
    bool active() const {
        return args.lora.num_tokens > 0 && args.lora.bank.max_rank > 0 &&
               args.lora.bank.in_features > 0;
    }

    // Calls f(k) for each column k of the ids, in order, after setting the plan, the weights, the
    // dropout and v (a column of the argument, (T, K, R)) of this column in `args`.
    template <typename F>
    void for_columns(const Tensor& v, F&& f) {
        const LoraArgs& lora = args.lora;
        const float* const weights = lora.weights;
        const int64_t step = v.size(-1) * v.element_size();
        args.lora.v_row_stride = v.stride(0);
        for (int64_t k = 0; k < columns; ++k) {
            args.lora.v = static_cast<char*>(const_cast<void*>(v.const_data_ptr())) + k * step;
            args.lora.plan = plans + k * layout().size();
            args.lora.weights = weights ? weights + k : nullptr;
            args.dropout.column = static_cast<uint32_t>(k);
            f(k);
        }
    }
    // Returns the arguments of an expand in training, whose v includes all factors.
    LoraArgs expand_args() const {
        LoraArgs lora = without_factors(args.lora);
        if (args.weighed) {
            lora.v = args.weighed;
            lora.v_row_stride = args.weighed_row_stride;
        }
        return lora;
    }
    // Sets the memory of v times its weight, for calls with weights.
    void set_weighed(Tensor& owner, const Tensor& v) {
        const int64_t rows = v.size(0), rank = args.lora.bank.max_rank;
        args.weighed_row_stride = rank;
        if (launches_kernels(x)) {
            owner = at::empty({rows, rank}, v.options());
            args.weighed = owner.mutable_data_ptr();
        } else {
            args.weighed = weighed_scratch.get(rows * rank * v.element_size());
        }
    }

    // Checks the plan that the caller gave and uses it, or builds one.
    void set_plan(const OptionalTensor& given) {
        LoraArgs& lora = args.lora;
        const LoraPlanLayout layout = this->layout();
        if (given) check_plan_tensor(op, layout, columns, *given, x.device());
        if (!active()) return;
        const bool kernels = launches_kernels(x), several = ids.dim() == 2;
        if (!given || !kernels)
            ids = several ? columns_of(ids) : ids.contiguous();
        else if (several)
            ids = ids.t();  // kernels do not read the ids
        int32_t* own = nullptr;
        if (given) {
            plans = given->const_data_ptr<int32_t>();
        } else {
            const int64_t size = columns * layout.size();
            if (kernels) {
                plan = at::empty({size}, x.options().dtype(at::kInt));
                own = plan.mutable_data_ptr<int32_t>();
            } else {
                own = static_cast<int32_t*>(plan_scratch.get(size * sizeof(int32_t)));
            }
            plans = own;
        }
        for (int64_t k = 0; k < columns; ++k) {
            const int64_t column = several ? k : -1, at = k * layout.size();
            const Tensor of_column = several ? ids[k] : ids;
            lora.ids = plan_args(of_column, lora.bank.num_adapters);
            lora.plan = plans + at;
            if (own) {
                lora.ids.plan = own + at;
                build_plan(op, of_column, lora.ids, x, column);
            } else if (!kernels) {
                check_plan(op, layout, of_column, lora.plan);
            }
            if (kernels && debug_mode()) {
                const Tensor& used = given ? *given : plan;
                if (used[at + kPlanBadIds].item<int32_t>() != 0)
                    raise_bad_id(op, of_column, lora.bank.num_adapters, column);
                check_groups(op, lora.bank, layout, lora.plan, x.device());
            }
            if (!kernels) check_slots(op, lora.bank, lora.plan);
        }
    }

    void set_workspace(int64_t bytes) {
        if (bytes == 0) return;
        workspace = at::empty({bytes}, x.options().dtype(at::kByte));
        args.workspace = workspace.mutable_data_ptr();
    }

    // Returns left weight^T + bias: the base layer's output for x, or the initial dx for dy and
    // weight^T. A row without an adapter must be bitwise equal to the base layer's output, so a
    // call with such rows uses the base layer's library.
    Tensor base_product(const Tensor& left, const Tensor& weight,
                        const OptionalTensor& bias = {}) const {
        const bool base_bits = !active() || launches_kernels(x) || idle_rows();
        return base_bits ? at::linear(spaced(left), weight, bias) : fast_linear(left, weight, bias);
    }

    // Returns whether an entry of the ids has no adapter, or an adapter of rank 0. CPU only, since
    // the function reads the plan.
    bool idle_rows() const {
        const LoraArgs& lora = args.lora;
        for (int64_t k = 0; k < columns; ++k) {
            const int32_t* const of = plans + k * layout().size();
            if (of[kPlanNumActive] < lora.num_tokens) return true;
            const int32_t *ranks = lora.bank.ranks, *chunk = of + kPlanHeader;
            for (int32_t c = 0; ranks && c < of[kPlanNumChunks]; ++c, chunk += 4)
                if (ranks[chunk[0]] == 0) return true;
        }
        return false;
    }

    template <typename Args>
    void run(const Args& what, int64_t items, void (*f)(const Args&, int64_t, int64_t),
             int64_t width) const {
        const int64_t work = args.lora.num_tokens * args.lora.bank.max_rank * width;
        const auto part = [&](int64_t begin, int64_t end) { f(what, begin, end); };
        if (items <= 1 || work < kSerialWork)
            part(0, items);
        else if (rank_spans(args.lora.bank.max_rank) > 1)
            deal_items(items, kChunksTogether, part);
        else
            at::parallel_for(0, items, 1, part);
    }
};

void check_base(const char* op, const OptionalTensor& weight, const Tensor& x, int64_t out) {
    if (!weight) return;
    check_like(op, "weight", *weight, x, "x");
    check_shape(op, "weight", *weight, "(O, I)", {out, x.size(1)}, x.device());
}

const LoraTrainCpu& twin() {
    return chosen_twins<LoraTrainCpu>();
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear_forward(
    const Tensor& x_in, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& a,
    const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
    const OptionalTensor& ranks, double dropout_p, const OptionalTensor& seed,
    const OptionalTensor& plan, const OptionalTensor& weights, const OptionalTensor& groups) {
    constexpr auto op = "lora_linear";
    check_no_tangents(op, {&x_in, &a, &b});
    Call call(op, x_in, a, b, adapter_ids, scale, ranks, dropout_p, seed, weights, groups);
    const Tensor& x = call.x;
    const int64_t out = call.out;
    check_base(op, weight, x, out);
    require(!bias || weight, op, "bias", expected("None if weight is None"), found("a tensor"));
    if (bias) {
        check_like(op, "bias", *bias, x, "x");
        check_shape(op, "bias", *bias, "(O,)", {out}, x.device());
    }
    const c10::DeviceGuard guard(x.device());
    const NoAutocast no_autocast;
    call.set_plan(plan);
    Tensor y =
        weight ? call.base_product(x, *weight, bias) : at::zeros({x.size(0), out}, x.options());
    LoraTrainArgs& args = call.args;
    const auto options = x.options().dtype(accumulator_of(x));
    const int64_t rank = args.lora.bank.max_rank;
    Tensor v = adapter_ids.dim() == 2 ? at::empty({x.size(0), call.columns, rank}, options)
                                      : at::empty({x.size(0), rank}, options);
    if (!call.active()) return {y, v.zero_()};
    args.lora.y = y.mutable_data_ptr();
    args.lora.y_row_stride = y.stride(0);
    const bool factors = has_factors(args.lora);
    Tensor weighed;
    if (args.lora.weights) call.set_weighed(weighed, v);
    if (launches_kernels(x)) {
        call.set_workspace(lora_train_shrink_workspace_bytes(args));
        void* stream = current_stream(x);
        // For any number of rows this kernel sums in the same order as the kernels of serving. It
        // stores v, from which the backward computes db.
        call.for_columns(v, [&](int64_t) {
            check_launch(op, launch_lora_train_shrink(args, stream));
            check_launch(op, launch_lora_expand(call.expand_args(), stream));
        });
        return {y, v};
    }
    const LoraCpu& lora = chosen_twins<LoraCpu>();
    call.for_columns(v, [&](int64_t) {
        const LoraTrainArgs sums = factors ? without_factors(args) : args;
        if (dropout_p > 0)
            call.run(sums, twin().shrink_items(sums), twin().shrink, x.size(1));
        else  // same order of sums, and so the same bits, as in serving
            call.run(sums.lora, lora.shrink_items(sums.lora), lora.shrink, x.size(1));
        if (factors) call.run(args, args.lora.plan[kPlanNumChunks], twin().weigh, 1);
        const LoraArgs update = call.expand_args();
        call.run(update, lora.expand_items(update), lora.expand, out);
    });
    return {y, v};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& v_in, const OptionalTensor& weight,
    const Tensor& a, const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
    const OptionalTensor& ranks, const OptionalTensor& plan, double dropout_p,
    const OptionalTensor& seed, bool need_dx, bool need_da, bool need_db,
    const OptionalTensor& weights, const OptionalTensor& groups, bool need_dweights) {
    constexpr auto op = "lora_linear_backward";
    Call call(op, x_in, a, b, adapter_ids, scale, ranks, dropout_p, seed, weights, groups);
    const Tensor& x = call.x;
    const int64_t rows = x.size(0), out = call.out, rank = call.bank.view.max_rank;
    require(!need_dweights || weights, op, "need_dweights", expected("false without weights"),
            found("true"));
    check_base(op, weight, x, out);
    check_like(op, "dy", dy_in, x, "x");
    check_shape(op, "dy", dy_in, "(T, O)", {rows, out}, x.device());
    check_dtype(op, "v", v_in, accumulator_of(x));
    if (adapter_ids.dim() == 2)
        check_shape(op, "v", v_in, "(T, K, R)", {rows, call.columns, rank}, x.device());
    else
        check_shape(op, "v", v_in, "(T, R)", {rows, rank}, x.device());
    const c10::DeviceGuard guard(x.device());
    const NoAutocast no_autocast;
    call.set_plan(plan);
    const Tensor dy = rows_contiguous(dy_in);
    const Tensor v = v_in.dim() == 2 ? rows_contiguous(v_in) : v_in.contiguous();
    const bool active = call.active();
    Tensor dx = at::empty({0}, x.options()), da = dx, db = dx;
    if (need_dx)
        dx =
            weight ? call.base_product(dy, weight->t()) : at::zeros({rows, x.size(1)}, x.options());
    const auto gradient = [&](const Tensor& of) {
        return active ? at::empty(of.sizes(), x.options()) : at::zeros(of.sizes(), x.options());
    };
    da = need_da ? gradient(a) : at::empty({0}, x.options());
    db = need_db ? gradient(b) : at::empty({0}, x.options());
    const auto floats = x.options().dtype(at::kFloat);
    // Entries of rows without an adapter stay zero.
    Tensor dweights = need_dweights ? at::zeros(weights->sizes(), floats) : at::empty({0}, floats);
    if (!active || !(need_dx || need_da || need_db || need_dweights)) return {dx, da, db, dweights};

    LoraTrainArgs& args = call.args;
    const bool factors = has_factors(args.lora);
    const bool need_dv = need_dx || need_da || need_dweights;
    if (need_dweights) args.dweights_row_stride = weights->dim() == 2 ? weights->size(1) : 1;
    Tensor weighed;
    if (weights && need_db) call.set_weighed(weighed, v);
    args.dy = dy.const_data_ptr();
    args.dy_row_stride = dy.stride(0);
    if (need_dx) args.dx = dx.mutable_data_ptr(), args.dx_row_stride = dx.stride(0);
    // Each column of the ids after the first adds its da and db to those of the columns before it:
    // CPU twins add in place, kernels write a second tensor that is then added.
    const bool kernels = launches_kernels(x);
    Tensor more_a, more_b;
    if (kernels && call.columns > 1 && need_da) more_a = at::empty(da.sizes(), da.options());
    if (kernels && call.columns > 1 && need_db) more_b = at::empty(db.sizes(), db.options());
    args.dv_row_stride = 8 * args.lora.bank.pages_per_slot;
    const auto for_columns = [&](auto&& backward) {
        call.for_columns(v, [&](int64_t k) {
            const bool apart = kernels && k > 0;
            args.accumulate = !kernels && k > 0;
            if (need_da) args.da = (apart ? more_a : da).mutable_data_ptr();
            if (need_db) args.db = (apart ? more_b : db).mutable_data_ptr();
            if (need_dweights) args.dweights = dweights.mutable_data_ptr<float>() + k;
            backward();
            if (apart && need_da) da.add_(more_a);
            if (apart && need_db) db.add_(more_b);
        });
    };
    if (kernels) {
        const Tensor dv = at::empty({rows, args.dv_row_stride}, v.options());
        args.dv = dv.mutable_data_ptr();
        call.set_workspace(lora_train_backward_workspace_bytes(args));
        for_columns([&] { check_launch(op, launch_lora_train_backward(args, current_stream(x))); });
        return {dx, da, db, dweights};
    }
    const LoraTrainCpu& cpu = twin();
    if (need_dv) args.dv = dv_scratch.get(rows * args.dv_row_stride * v.element_size());
    for_columns([&] {
        const LoraTrainArgs sums = factors ? without_factors(args) : args;
        if (need_dv) call.run(sums, cpu.dv_items(sums), cpu.dv, out);
        if (factors && (args.dv || args.weighed))
            call.run(args, args.lora.plan[kPlanNumChunks], cpu.weigh_back, 1);
        if (need_dx || need_da) call.run(args, cpu.da_dx_items(args), cpu.da_dx, x.size(1));
        LoraTrainArgs of_b = args;
        of_b.lora = call.expand_args();  // v times its weight
        if (need_db) call.run(of_b, cpu.db_items(of_b), cpu.db, out);
    });
    return {dx, da, db, dweights};
}

Tensor lora_dropout(const Tensor& x_in, double p, const OptionalTensor& seed) {
    constexpr auto op = "lora_dropout";
    check_dim(op, "x", x_in, 2, "(T, I)");
    LoraTrainArgs args;
    args.lora.dtype = dtype_of(op, "x", x_in);
    args.dropout = dropout_of(op, "p", p, seed, x_in.device(), -1);
    const Tensor x = rows_contiguous(x_in);
    const int64_t rows = x.size(0), columns = x.size(1);
    require(rows <= kMaxSize && columns <= kMaxSize, op, "x",
            expected("at most ", kMaxSize, " rows and columns"), found(x.sizes()));
    Tensor y = at::empty({rows, columns}, x.options());
    if (y.numel() == 0) return y;
    const c10::DeviceGuard guard(x.device());
    args.lora.num_tokens = rows;
    args.lora.bank.in_features = static_cast<int32_t>(columns);
    args.lora.x = x.const_data_ptr();
    args.lora.x_row_stride = x.stride(0);
    args.lora.y = y.mutable_data_ptr();
    args.lora.y_row_stride = columns;
    if (launches_kernels(x)) {
        check_launch(op, launch_lora_dropout(args, args.lora.y, current_stream(x)));
        return y;
    }
    for_items(rows, columns, kSerialWork / 4,
              [&](int64_t begin, int64_t end) { twin().dropout(args, begin, end); });
    return y;
}

}  // namespace lora_ext
