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

thread_local Scratch plan_scratch, dv_scratch;

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

// The backward has a block per 256 outputs, and a grid has at most 65535 rows of blocks.
constexpr int64_t kMostOutputs = int64_t{65535} * 256;

// Arguments of one call, and the tensors that own their memory.
struct Call {
    const char* op;
    LoraTrainArgs args;
    Bank bank;
    Tensor x, ids, plan, workspace;
    int64_t out;  // features

    Call(const char* op, const Tensor& x_in, const Tensor& a_in, const Tensor& b_in,
         const Tensor& adapter_ids, const OptionalTensor& scale, const OptionalTensor& ranks,
         double dropout_p, const OptionalTensor& seed)
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
        ids = adapter_ids.contiguous();
    }

    // Return false if there are no rows or no ranks, so that every product with an adapter is zero.
    bool active() const {
        return args.lora.num_tokens > 0 && args.lora.bank.max_rank > 0 &&
               args.lora.bank.in_features > 0;
    }

    void set_v(const Tensor& v) {
        args.lora.v = const_cast<void*>(v.const_data_ptr());
        args.lora.v_row_stride = v.stride(0);
    }

    // Checks the plan that the caller gave and uses it, or builds one.
    void set_plan(const OptionalTensor& given) {
        LoraArgs& lora = args.lora;
        const LoraPlanLayout layout{lora.num_tokens, lora.bank.num_adapters};
        if (given) check_plan_tensor(op, layout, *given, x.device());
        if (!active()) return;
        const bool kernels = launches_kernels(x);
        lora.ids = plan_args(ids, lora.bank.num_adapters);
        if (given) {
            lora.plan = given->const_data_ptr<int32_t>();
            if (!kernels) check_plan(op, layout, ids, lora.plan);
        } else {
            if (kernels) {
                plan = at::empty({layout.size()}, x.options().dtype(at::kInt));
                lora.ids.plan = plan.mutable_data_ptr<int32_t>();
            } else {
                lora.ids.plan =
                    static_cast<int32_t*>(plan_scratch.get(layout.size() * sizeof(int32_t)));
            }
            build_plan(op, ids, lora.ids, x);
            lora.plan = lora.ids.plan;
        }
        if (kernels && debug_mode()) {
            const Tensor& used = given ? *given : plan;
            if (used[kPlanBadIds].item<int32_t>() != 0)
                raise_bad_id(op, ids, lora.bank.num_adapters);
        }
        if (!kernels) check_slots(op, lora.bank, lora.plan);
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

    // Returns whether any row has no adapter or one of rank 0; CPU only, since it reads the plan.
    bool idle_rows() const {
        const LoraArgs& lora = args.lora;
        if (lora.plan[kPlanNumActive] < lora.num_tokens) return true;
        const int32_t *ranks = lora.bank.ranks, *chunk = lora.plan + kPlanHeader;
        for (int32_t c = 0; ranks && c < lora.plan[kPlanNumChunks]; ++c, chunk += 4)
            if (ranks[chunk[0]] == 0) return true;
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

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x_in, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const Tensor& a,
                                               const Tensor& b, const Tensor& adapter_ids,
                                               const OptionalTensor& scale,
                                               const OptionalTensor& ranks, double dropout_p,
                                               const OptionalTensor& seed,
                                               const OptionalTensor& plan) {
    constexpr auto op = "lora_linear";
    check_no_tangents(op, {&x_in, &a, &b});
    Call call(op, x_in, a, b, adapter_ids, scale, ranks, dropout_p, seed);
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
    Tensor v =
        at::empty({x.size(0), args.lora.bank.max_rank}, x.options().dtype(accumulator_of(x)));
    if (!call.active()) return {y, v.zero_()};
    call.set_v(v);
    args.lora.y = y.mutable_data_ptr();
    args.lora.y_row_stride = y.stride(0);
    if (launches_kernels(x)) {
        call.set_workspace(lora_train_shrink_workspace_bytes(args));
        void* stream = current_stream(x);
        // For any number of rows this kernel sums in the same order as the kernels of serving. It
        // stores v, from which the backward computes db.
        check_launch(op, launch_lora_train_shrink(args, stream));
        check_launch(op, launch_lora_expand(args.lora, stream));
        return {y, v};
    }
    const LoraCpu& lora = chosen_twins<LoraCpu>();
    if (dropout_p > 0)
        call.run(args, twin().shrink_items(args), twin().shrink, x.size(1));
    else  // same order of sums, and so the same bits, as in serving
        call.run(args.lora, lora.shrink_items(args.lora), lora.shrink, x.size(1));
    call.run(args.lora, lora.expand_items(args.lora), lora.expand, out);
    return {y, v};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& v_in, const OptionalTensor& weight,
    const Tensor& a, const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
    const OptionalTensor& ranks, const OptionalTensor& plan, double dropout_p,
    const OptionalTensor& seed, bool need_dx, bool need_da, bool need_db) {
    constexpr auto op = "lora_linear_backward";
    Call call(op, x_in, a, b, adapter_ids, scale, ranks, dropout_p, seed);
    const Tensor& x = call.x;
    const int64_t rows = x.size(0), out = call.out, rank = call.bank.view.max_rank;
    check_base(op, weight, x, out);
    check_like(op, "dy", dy_in, x, "x");
    check_shape(op, "dy", dy_in, "(T, O)", {rows, out}, x.device());
    check_dtype(op, "v", v_in, accumulator_of(x));
    check_shape(op, "v", v_in, "(T, R)", {rows, rank}, x.device());
    const c10::DeviceGuard guard(x.device());
    const NoAutocast no_autocast;
    call.set_plan(plan);
    const Tensor dy = rows_contiguous(dy_in), v = rows_contiguous(v_in);
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
    if (!active || !(need_dx || need_da || need_db)) return {dx, da, db};

    LoraTrainArgs& args = call.args;
    call.set_v(v);
    args.dy = dy.const_data_ptr();
    args.dy_row_stride = dy.stride(0);
    if (need_dx) args.dx = dx.mutable_data_ptr(), args.dx_row_stride = dx.stride(0);
    if (need_da) args.da = da.mutable_data_ptr();
    if (need_db) args.db = db.mutable_data_ptr();
    args.dv_row_stride = 8 * args.lora.bank.pages_per_slot;
    if (launches_kernels(x)) {
        const Tensor dv = at::empty({rows, args.dv_row_stride}, v.options());
        args.dv = dv.mutable_data_ptr();
        call.set_workspace(lora_train_backward_workspace_bytes(args));
        check_launch(op, launch_lora_train_backward(args, current_stream(x)));
        return {dx, da, db};
    }
    const LoraTrainCpu& cpu = twin();
    if (need_dx || need_da) {
        args.dv = dv_scratch.get(rows * args.dv_row_stride * v.element_size());
        call.run(args, cpu.dv_items(args), cpu.dv, out);
        call.run(args, cpu.da_dx_items(args), cpu.da_dx, x.size(1));
    }
    if (need_db) call.run(args, cpu.db_items(args), cpu.db, out);
    return {dx, da, db};
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
