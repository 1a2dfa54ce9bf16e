// Mixes of normalised hidden states: checks, allocation, choice of CPU twin or CUDA kernel.
#include "ops/depth_mix.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "lora_ext/depth_mix.h"
#include "ops/checks.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Minimum count of tensor elements that each thread reads.
constexpr int64_t kSerialWork = 1 << 14;

// Arguments of one call, and the tensors that own their memory.
class Call {
  public:
    DepthMixArgs args;
    at::DimVector of_weights;  // (..., k)

    const char* const op;

    Call(const std::vector<Tensor>& hiddens, const std::vector<Tensor>& gammas,
         const std::vector<Tensor>& betas, bool routed)
        : op(routed ? "depth_mix_routed" : "depth_mix"),
          sums_(hiddens.empty() ? at::kFloat : accumulator_of(hiddens[0])) {
        const size_t depths = hiddens.size();
        require(depths >= 1 && depths <= kMaxDepths, op, "hiddens",
                expected("1 to ", kMaxDepths, " tensors"), found(depths));
        const Tensor& h = hiddens[0];
        options_ = h.options();
        require(h.dim() >= 1 && h.size(-1) >= 1, op, "hiddens[0]",
                expected("shape (..., d) with d >= 1"), found(h.sizes()));
        args.dtype = dtype_of(op, "hiddens[0]", h);
        args.depths = static_cast<int32_t>(depths);
        args.width = h.size(-1);
        args.rows = h.numel() / args.width;
        require(std::max(args.rows, args.width) <= kMaxSize, op, "hiddens[0]",
                expected("at most ", kMaxSize, " rows and columns"), found(h.sizes()));
        of_weights = h.sizes();
        of_weights.back() = args.depths;
        for (size_t e = 1; e < depths; ++e) {
            check(words("hiddens[", e, "]"), hiddens[e], "of hiddens[0]", h.sizes());
            require(hiddens[e].scalar_type() == h.scalar_type(), op, words("hiddens[", e, "]"),
                    expected("the dtype of hiddens[0], ", h.scalar_type()),
                    found(hiddens[e].scalar_type()));
        }
        check_scales("gammas", gammas);
        if (!betas.empty()) check_scales("betas", betas);
        const auto as_hidden = [&](const Tensor& t) { return t.scalar_type() == h.scalar_type(); };
        const bool alike = std::all_of(gammas.begin(), gammas.end(), as_hidden) &&
                           std::all_of(betas.begin(), betas.end(), as_hidden);
        args.wide_scales = sums_ != h.scalar_type() && !(alike && launches_kernels(h));
        const at::ScalarType scales = args.wide_scales ? sums_ : h.scalar_type();
        for (size_t e = 0; e < depths; ++e) {
            take_rows(hiddens[e], e);
            args.gamma[e] = keep(gammas[e].to(scales).contiguous());
            if (!betas.empty()) args.beta[e] = keep(betas[e].to(scales).contiguous());
        }
    }

    // Checks the shape of t and returns its data in the accumulation dtype. Raises if that dtype
    // cannot represent the values exactly.
    const void* take_floats(const char* name, const Tensor& t, const char* letters,
                            at::IntArrayRef sizes) {
        check(name, t, letters, sizes);
        check_exact(name, t);
        return keep(t.to(sums_).contiguous());
    }
    void take_router(const Tensor& router) {
        args.router = take_floats("router", router, "(k, d)", {args.depths, args.width});
    }
    const void* keep(Tensor t) {
        kept_.push_back(std::move(t));
        return kept_.back().const_data_ptr();
    }

    Tensor like_hidden(at::IntArrayRef sizes) const { return at::empty(sizes, options_); }
    Tensor floats(at::IntArrayRef sizes) const { return at::empty(sizes, options_.dtype(sums_)); }
    Tensor no_floats() const { return floats({0}); }

  private:
    template <class Name>
    void check(const Name& name, const Tensor& t, const char* letters, at::IntArrayRef sizes) {
        require(t.sizes() == sizes, op, name, expected("shape ", letters, " = ", sizes),
                found(t.sizes()));
        require(t.device() == options_.device(), op, name,
                expected("a tensor on ", options_.device()), found(t.device()));
    }
    // Checks that the accumulation dtype represents every value of t exactly.
    template <class Name>
    void check_exact(const Name& name, const Tensor& t) {
        require(at::isFloatingType(t.scalar_type()) &&
                    c10::promoteTypes(t.scalar_type(), sums_) == sums_,
                op, name, expected("a dtype that ", sums_, " holds exactly"),
                found(t.scalar_type()));
    }
    void check_scales(const char* name, const std::vector<Tensor>& scales) {
        require(scales.size() == static_cast<size_t>(args.depths), op, name,
                expected(args.depths, " tensors, as hiddens"), found(scales.size()));
        for (size_t e = 0; e < scales.size(); ++e) {
            check(words(name, "[", e, "]"), scales[e], "(d,)", {args.width});
            check_exact(words(name, "[", e, "]"), scales[e]);
        }
    }
    void take_rows(const Tensor& h, size_t e) {
        args.hidden_stride[e] = args.width;
        if (h.is_contiguous()) {
            args.hidden[e] = h.const_data_ptr();
            return;
        }
        const Tensor rows = rows_contiguous(h.reshape({args.rows, args.width}));
        if (args.rows > 1) args.hidden_stride[e] = rows.stride(0);
        args.hidden[e] = keep(rows);
    }

    at::ScalarType sums_;
    at::TensorOptions options_;
    std::vector<Tensor> kept_;
};

bool layer_norm(const char* op, std::string_view norm) {
    require(norm == "rms" || norm == "layer", op, "norm", expected("'rms' or 'layer'"),
            found("'", norm, "'"));
    return norm == "layer";
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> depth_mix_forward(
    const std::vector<Tensor>& hiddens, const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas, const OptionalTensor& weights, const OptionalTensor& router,
    const OptionalTensor& bias, double eps, std::string_view norm) {
    Call call(hiddens, gammas, betas, router.has_value());
    DepthMixArgs& args = call.args;
    require(eps >= 0, call.op, "eps", expected("at least 0"), found(eps));
    args.eps = eps;
    args.layer = layer_norm(call.op, norm);
    require(weights.has_value() != router.has_value() && router.has_value() == bias.has_value(),
            call.op, "weights", expected("weights, or a router and its bias"),
            found("neither or both"));
    Tensor chosen = call.no_floats();
    if (router) {
        call.take_router(*router);
        args.bias = call.take_floats("bias", *bias, "(k,)", {args.depths});
        chosen = call.floats(call.of_weights);
        args.weights = chosen.mutable_data_ptr();
    } else {
        args.weights =
            const_cast<void*>(call.take_floats("weights", *weights, "(..., k)", call.of_weights));
    }
    Tensor mixed = call.like_hidden(hiddens[0].sizes());
    Tensor rinv = call.floats({args.rows, args.depths});
    Tensor mean = args.layer ? call.floats({args.rows, args.depths}) : call.no_floats();
    if (args.rows == 0) return {mixed, chosen, rinv, mean};
    args.mixed = mixed.mutable_data_ptr();
    args.rinv = rinv.mutable_data_ptr();
    args.mean = mean.mutable_data_ptr();
    if (launches_kernels(mixed)) {
        const c10::DeviceGuard guard(mixed.device());
        check_launch(call.op, launch_depth_mix(args, current_stream(mixed)));
    } else {
        const DepthMixCpu& twin = chosen_twins<DepthMixCpu>();
        for_items(args.rows, args.depths * args.width, kSerialWork,
                  [&](int64_t begin, int64_t end) { twin.forward(args, begin, end); });
    }
    return {mixed, chosen, rinv, mean};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> depth_mix_backward(
    const Tensor& dmixed, const OptionalTensor& dweights_in, const std::vector<Tensor>& hiddens,
    const std::vector<Tensor>& gammas, const std::vector<Tensor>& betas, const Tensor& weights,
    const OptionalTensor& router, const Tensor& rinv, const Tensor& mean, bool need_hiddens) {
    Call call(hiddens, gammas, betas, router.has_value());
    DepthMixArgs& args = call.args;
    args.layer = mean.numel() > 0;
    check_shape(call.op, "dmixed", dmixed, "of hiddens[0]", hiddens[0].sizes(),
                hiddens[0].device());
    check_dtype(call.op, "dmixed", dmixed, hiddens[0].scalar_type());
    args.dmixed = call.keep(dmixed.contiguous());
    args.weights =
        const_cast<void*>(call.take_floats("weights", weights, "(..., k)", call.of_weights));
    if (router) call.take_router(*router);
    if (dweights_in)
        args.dweights_in = call.take_floats("dweights", *dweights_in, "(..., k)", call.of_weights);
    const at::DimVector of_rows = {args.rows, args.depths};
    args.rinv = const_cast<void*>(call.take_floats("rinv", rinv, "(N, k)", of_rows));
    if (args.layer)
        args.mean = const_cast<void*>(call.take_floats("mean", mean, "(N, k)", of_rows));

    Tensor dweights = call.floats(call.of_weights);
    args.dweights = dweights.mutable_data_ptr();
    std::vector<Tensor> dhiddens;
    for (size_t e = 0; need_hiddens && e < hiddens.size(); ++e) {
        dhiddens.push_back(call.like_hidden(hiddens[0].sizes()));
        args.dhidden[e] = dhiddens.back().mutable_data_ptr();
    }
    Tensor sums = call.floats({mix_sums(args)});
    const int64_t parts = mix_parts(args.rows);
    const Tensor partial = call.floats({parts, mix_sums(args)});
    args.sums = sums.mutable_data_ptr();
    args.partial = partial.mutable_data_ptr();
    if (args.rows == 0) {
        sums.zero_();
    } else if (launches_kernels(dmixed)) {
        const c10::DeviceGuard guard(dmixed.device());
        check_launch(call.op, launch_depth_mix_backward(args, current_stream(dmixed)));
    } else {
        const DepthMixCpu& twin = chosen_twins<DepthMixCpu>();
        const int64_t bytes = twin.backward_scratch(args);
        for_items(parts, mix_part_rows(args.rows) * args.depths * args.width, kSerialWork,
                  [&](int64_t begin, int64_t end) {
                      thread_local Scratch scratch;
                      twin.backward(args, scratch.get(bytes), begin, end);
                  });
        for_items(mix_sums(args), parts, kSerialWork,
                  [&](int64_t begin, int64_t end) { twin.sums(args, begin, end); });
    }
    return {dhiddens, sums, dweights};
}

}  // namespace lora_ext
