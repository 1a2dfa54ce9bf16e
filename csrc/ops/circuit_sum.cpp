// Sum layers: checks, allocation, choice of CPU twin or CUDA kernel. On CUDA at::bmm computes the
// products with shared weights; twins or kernels compute the rest.
//
// Shapes: w (O, I) with values (B, I), (G, O, I) with (G, B, I), or (B, O, I) with (B, I).
#include "ops/circuit_sum.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "lora_ext/circuit_sum.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

WeightNorm norm_of(const char* op, std::string_view norm) {
    if (norm == "logits") return WeightNorm::kLogits;
    if (norm == "logprobs" || norm == "none") return WeightNorm::kLog;
    if (norm == "probs") return WeightNorm::kProbs;
    refuse(op, "norm", expected("'logits', 'logprobs', 'probs' or 'none'"), found("'", norm, "'"));
}

Tensor last_contiguous(const Tensor& t) {
    return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// Arguments of one call, and the tensors that own their memory.
struct Call {
    const char* op;
    LogSumArgs args;
    Tensor w, values;  // values (G, B, I)
    at::TensorOptions options;
    at::DimVector out_sizes;
    bool per_row;

    Call(const char* op, const Tensor& w_in, const Tensor& values_in, std::string_view norm)
        : op(op) {
        args.dtype = dtype_of(op, "w", w_in);
        args.norm = norm_of(op, norm);
        const int64_t dims = values_in.dim();
        const auto sizes = found(w_in.sizes(), " and ", values_in.sizes());
        require((w_in.dim() == 2 && dims == 2) || (w_in.dim() == 3 && (dims == 2 || dims == 3)), op,
                "w and values",
                expected("shapes (O, I) and (B, I), (G, O, I) and (G, B, I), or (B, O, I) and "
                         "(B, I)"),
                sizes);
        check_dtype(op, "values", values_in, accumulator_of(w_in));
        check_device(op, "values", values_in, w_in.device());
        require(w_in.size(-1) == values_in.size(-1), op, "values",
                expected("as many terms as w, I = ", w_in.size(-1)), found(values_in.sizes()));
        require(w_in.size(-1) > 0, op, "w", expected("at least one term"), found(w_in.sizes()));
        require(w_in.dim() == 2 || w_in.size(0) == values_in.size(0), op, "w and values",
                expected("the same number of ", dims == 3 ? "groups" : "rows"), sizes);
        per_row = w_in.dim() == 3 && dims == 2;
        w = per_row && w_in.stride(0) == 0 ? w_in.contiguous() : last_contiguous(w_in);
        values = last_contiguous(dims == 3 ? values_in : values_in.unsqueeze(0));
        options = values.options();
        args.groups = values.size(0);
        args.rows = values.size(1);
        args.terms = values.size(2);
        args.sums = w.size(-2);
        for (const int64_t size : {args.groups, args.rows, args.terms, args.sums})
            require(size <= kMaxSize, op, "w and values", expected("sizes of at most ", kMaxSize),
                    found(size));
        args.w = w.const_data_ptr();
        args.w_sum = w.stride(-2);
        if (per_row) args.w_row = args.rows > 1 ? w.stride(0) : args.sums * args.terms;
        if (dims == 3) args.w_group = w.stride(0);
        args.values = values.const_data_ptr();
        args.values_group = values.stride(0);
        args.values_row = values.stride(1);
        out_sizes = {args.rows, args.sums};
        if (dims == 3) out_sizes.insert(out_sizes.begin(), args.groups);
    }

    bool empty() const { return args.groups * args.rows * args.sums == 0; }

    Tensor take(void*& pointer, at::IntArrayRef sizes) const {
        Tensor t = at::empty(sizes, options);
        pointer = t.mutable_data_ptr();
        return t;
    }
    Tensor given(const char* name, const Tensor& t) const {
        check_dtype(op, name, t, values.scalar_type());
        check_shape(op, name, t, out_sizes.size() == 3 ? "(G, B, O)" : "(B, O)", out_sizes,
                    values.device());
        return t.contiguous();
    }

    using Step = void (*)(const LogSumArgs&, int64_t, int64_t);
    using Launch = LaunchStatus (*)(const LogSumArgs&, void*);
    void run(Step LogSumCpu::* step, Launch launch, int64_t items, int64_t work) const {
        if (launches_kernels(values)) {
            check_launch(op, launch(args, current_stream(values)));
            return;
        }
        on_twin(twin().*step, items, work);
    }
    static const LogSumCpu& twin() { return chosen_twins<LogSumCpu>(); }
    void on_twin(Step f, int64_t items, int64_t work) const {
        for_items(items, work, kSerialExps,
                  [&](int64_t begin, int64_t end) { f(args, begin, end); });
    }
    void value_rows(Step LogSumCpu::* step, Launch launch, int64_t work) const {
        run(step, launch, args.groups * args.rows, work);
    }
};

// Scaled weights of a product: passed by the caller, computed here, or written by the CPU twin.
struct Weights {
    Tensor weight, shift;

    Weights(Call& call, const OptionalTensor& given_weight, const OptionalTensor& given_shift,
            bool make = true) {
        LogSumArgs& a = call.args;
        const at::DimVector sizes = {a.groups, a.sums, a.terms};
        if (!given_weight && !given_shift) {
            weight = call.take(a.weight, sizes);
            shift = call.take(a.weight_shift, at::IntArrayRef(sizes).slice(0, 2));
            if (make)
                call.run(&LogSumCpu::weights, launch_log_sum_weights, a.groups * a.sums, a.terms);
            return;
        }
        const auto check = [&](const char* name, const OptionalTensor& t, const char* shape,
                               at::IntArrayRef expected_sizes) {
            require(t.has_value(), call.op, name, expected("both weight and shift"), found("None"));
            check_dtype(call.op, name, *t, call.values.scalar_type());
            check_shape(call.op, name, *t, shape, expected_sizes, call.values.device());
            require(t->is_contiguous(), call.op, name, expected("a contiguous tensor"),
                    found("strides ", t->strides()));
        };
        check("scaled.weight", given_weight, "of w", call.w.sizes());
        check("scaled.shift", given_shift, "of w without its last axis",
              call.w.sizes().slice(0, call.w.dim() - 1));
        weight = given_weight->view(sizes);
        if (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 != 0) weight = weight.clone();
        shift = *given_shift;
        a.weight = const_cast<void*>(weight.const_data_ptr());
        a.weight_shift = const_cast<void*>(shift.const_data_ptr());
        a.scaled = true;
    }
};

// Scaled values of a product.
struct Values {
    Tensor value, shift;

    explicit Values(Call& call) {
        LogSumArgs& a = call.args;
        value = call.take(a.value, {a.groups, a.rows, a.terms});
        shift = call.take(a.value_shift, {a.groups, a.rows});
        call.value_rows(&LogSumCpu::values, launch_log_sum_values, a.terms);
    }
};

}  // namespace

std::tuple<Tensor, Tensor> log_einsum_weights(const Tensor& w, std::string_view norm) {
    constexpr auto op = "log_einsum_weights";
    require(w.dim() == 2 || w.dim() == 3, op, "w", expected("shape (O, I) or (G, O, I)"),
            found(w.sizes()));
    at::DimVector sizes(w.sizes());
    sizes[w.dim() - 2] = 0;  // values without rows: only w is used
    Call call(op, w, at::empty(sizes, w.options().dtype(accumulator_of(w))), norm);
    const c10::DeviceGuard guard(w.device());
    if (w.numel() == 0)
        return {at::empty(w.sizes(), call.options),
                at::empty(w.sizes().slice(0, w.dim() - 1), call.options)};
    const Weights made(call, {}, {});
    return {made.weight.view(w.sizes()), made.shift.view(w.sizes().slice(0, w.dim() - 1))};
}

Tensor log_einsum_exp(const Tensor& w, const Tensor& values, std::string_view norm,
                      std::string_view precision, const OptionalTensor& given_weight,
                      const OptionalTensor& given_shift) {
    constexpr auto op = "log_einsum_exp";
    check_no_tangents(op, {&w, &values});
    require(precision == "fp32" || precision == "high" || precision == "fp16s", op, "precision",
            expected("'fp32', 'high' or 'fp16s'"), found("'", precision, "'"));
    Call call(op, w, values, norm);
    const LogSumArgs& args = call.args;
    Tensor out = at::empty(call.out_sizes, call.options);
    if (call.empty()) return out;
    const c10::DeviceGuard guard(values.device());
    const NoAutocast no_autocast;
    call.args.out = out.mutable_data_ptr();
    if (call.per_row) {
        const Tensor scratch = call.take(call.args.value, {args.groups, args.rows, args.terms});
        call.value_rows(&LogSumCpu::per_row, launch_log_sum_per_row, args.sums * args.terms);
        return out;
    }
    const bool kernels = launches_kernels(values);
    const Weights weights(call, given_weight, given_shift, kernels);
    if (precision != "fp32" && kernels && log_sum_fused_fits(args)) {
        check_launch(op, launch_log_sum_fused(args, precision == "high", current_stream(values)));
        return out;
    }
    const Values scaled(call);
    if (kernels) {
        Tensor s = out.view({args.groups, args.rows, args.sums});
        at::bmm_out(s, scaled.value, weights.weight.transpose(1, 2));
        check_launch(op, launch_log_sum_finish(args, current_stream(values)));
        return out;
    }
    const int64_t items = Call::twin().forward_items(args);
    call.on_twin(Call::twin().forward, items,
                 args.groups * args.sums * args.terms * (4 + args.rows) / (4 * items));
    return out;
}

std::tuple<Tensor, Tensor> log_einsum_exp_backward(const Tensor& dout_in, const Tensor& w,
                                                   const Tensor& values, const Tensor& out_in,
                                                   std::string_view norm, bool need_dw,
                                                   bool need_dvalues,
                                                   const OptionalTensor& given_weight,
                                                   const OptionalTensor& given_shift) {
    constexpr auto op = "log_einsum_exp_backward";
    Call call(op, w, values, norm);
    LogSumArgs& args = call.args;
    const Tensor dout = call.given("dout", dout_in), out = call.given("out", out_in);
    Tensor dw = at::empty(need_dw ? w.sizes() : at::IntArrayRef{0}, w.options());
    Tensor dvalues = at::empty(need_dvalues ? values.sizes() : at::IntArrayRef{0}, call.options);
    if (call.empty()) return {dw.zero_(), dvalues.zero_()};
    if (!need_dw && !need_dvalues) return {dw, dvalues};
    const c10::DeviceGuard guard(values.device());
    const NoAutocast no_autocast;
    args.dout = dout.const_data_ptr();
    args.out = const_cast<void*>(out.const_data_ptr());
    Tensor d, flow, all_dw = dw;
    if (call.per_row) {
        const Tensor scratch = call.take(args.value, {3, args.rows, args.terms});
        args.weight = scratch[1].mutable_data_ptr();
        args.flow = scratch[2].mutable_data_ptr();
        if (!need_dw) all_dw = at::empty(w.sizes(), w.options());
        d = call.take(args.dvalues, {1, args.rows, args.terms});
        args.dw = all_dw.mutable_data_ptr();
        call.value_rows(&LogSumCpu::per_row_backward, launch_log_sum_per_row_backward,
                        args.sums * args.terms);
        return {dw, need_dvalues ? d.view(values.sizes()) : dvalues};
    }
    const bool kernels = launches_kernels(values);
    const Weights weights(call, given_weight, given_shift);
    const Values scaled(call);
    const Tensor ratio = call.take(args.ratio, {args.groups, args.rows, args.sums});
    call.value_rows(&LogSumCpu::ratios, launch_log_sum_ratios, args.sums);
    if (need_dvalues) {
        args.dvalues = dvalues.mutable_data_ptr();
        if (kernels) {
            Tensor product = dvalues.view({args.groups, args.rows, args.terms});
            at::bmm_out(product, ratio, weights.weight);
        }
        call.value_rows(&LogSumCpu::dvalues, launch_log_sum_dvalues, args.sums * args.terms / 8);
    }
    if (need_dw) {
        if (!kernels && dw.scalar_type() == values.scalar_type())
            args.flow = dw.mutable_data_ptr();  // the twin reads flow before it writes dw
        else
            flow = call.take(args.flow, {args.groups, args.sums, args.terms});
        if (kernels) at::bmm_out(flow, ratio.transpose(1, 2), scaled.value);
        args.dw = dw.mutable_data_ptr();
        call.run(&LogSumCpu::dweights, launch_log_sum_dweights, args.groups * args.sums,
                 args.rows * args.terms / 8);
    }
    return {dw, dvalues};
}

std::tuple<Tensor, Tensor> log_einsum_max(const Tensor& w, const Tensor& values,
                                          std::string_view norm) {
    constexpr auto op = "log_einsum_max";
    check_no_tangents(op, {&w, &values});
    Call call(op, w, values, norm);
    LogSumArgs& args = call.args;
    Tensor out = at::empty(call.out_sizes, call.options);
    Tensor indices = at::empty(call.out_sizes, call.options.dtype(at::kInt));
    if (call.empty()) return {out, indices};
    const c10::DeviceGuard guard(values.device());
    args.out = out.mutable_data_ptr();
    args.indices = indices.mutable_data_ptr<int32_t>();
    call.run(&LogSumCpu::max, launch_log_max, args.groups * (call.per_row ? args.rows : args.sums),
             args.terms * (call.per_row ? args.sums : args.rows));
    return {out, indices};
}

}  // namespace lora_ext
