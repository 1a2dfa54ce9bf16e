// Losses over a vocabulary: checks, allocation, the loop over chunks of the vocabulary, choice of
// CPU twin or CUDA kernel. The products with the weight are library calls; twins or kernels compute
// all other steps.
#include "ops/vocab.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "lora_ext/vocab.h"
#include "ops/checks.h"
#include "ops/gemm.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

struct Step {
    LaunchStatus (*launch)(const VocabArgs&, void*);
    void (*VocabCpu::*twin)(const VocabArgs&, int64_t, int64_t);
};
constexpr Step kCrossEntropyUpdate{launch_cross_entropy_update, &VocabCpu::cross_entropy_update};
constexpr Step kCrossEntropyFinish{launch_cross_entropy_finish, &VocabCpu::cross_entropy_finish};
constexpr Step kCrossEntropyGradient{launch_cross_entropy_gradient,
                                     &VocabCpu::cross_entropy_gradient};
constexpr Step kKlUpdate{launch_kl_update, &VocabCpu::kl_update};
constexpr Step kKlFinish{launch_kl_finish, &VocabCpu::kl_finish};
constexpr Step kKlGradient{launch_kl_gradient, &VocabCpu::kl_gradient};

Tensor nothing(const Tensor& like) {
    return at::empty({0}, like.options());
}

// Arguments of one call: the output layer, and k hidden states per row, as one tensor (k N, d).
struct Call {
    const char* op;
    VocabArgs args;
    Tensor hidden, weight;  // hidden: in the dtype of the products
    OptionalTensor bias;
    Tensor labels, mask;  // labels for cross entropy, mask for the divergence
    int64_t chunk;
    at::ScalarType sums;

    Call(const char* op, const char* hidden_name, const Tensor& hidden_in, int64_t hiddens,
         const Tensor& weight_in, const OptionalTensor& bias_in, int64_t chunk_in, double softcap,
         at::ScalarType dtype)
        : op(op), weight(weight_in), bias(bias_in) {
        const Tensor h = hidden_in.flatten(0, -2);
        dtype_of(op, hidden_name, h);
        dtype_of(op, "weight", weight);
        check_dim(op, "weight", weight, 2, "(V, d)");
        check_shape(op, "weight", weight, "(V, d)", {weight.size(0), h.size(1)}, h.device());
        const int64_t vocab = weight.size(0);
        require(vocab > 0, op, "weight", expected("at least one row"), found(weight.sizes()));
        require(vocab <= kMaxSize && h.size(0) <= kMaxSize && h.size(1) <= kMaxSize, op, "weight",
                expected("at most ", kMaxSize, " rows and columns"), found(weight.sizes()));
        if (bias) {
            dtype_of(op, "bias", *bias);
            check_shape(op, "bias", *bias, "(V,)", {vocab}, h.device());
        }
        require(chunk_in > 0, op, "chunk", expected("at least 1"), found(chunk_in));
        require(softcap >= 0 && std::isfinite(softcap), op, "softcap",
                expected("None or a number above 0"), found(softcap));
        // On the CPU torch multiplies float16 an order of magnitude slower than float32.
        if (dtype == at::kHalf && !launches_kernels(h)) dtype = at::kFloat;
        hidden = rows_contiguous(h.to(dtype));
        args.dtype = dtype_of(op, hidden_name, hidden);
        sums = accumulator_of(hidden);
        chunk = std::min(chunk_in, vocab);
        args.hiddens = hiddens;
        args.rows = h.size(0) / std::max<int64_t>(hiddens, 1);
        args.width = h.size(1);
        args.softcap = softcap;
    }

    void set_labels(const Tensor& t, int64_t ignore_index) {
        check_dtype(op, "labels", t, at::kLong);
        check_shape(op, "labels", t, "(N,)", {args.rows}, hidden.device());
        labels = t.contiguous();
        args.labels = labels.const_data_ptr<int64_t>();
        args.ignore_index = ignore_index;
        if (launches_kernels(hidden)) return;
        const int64_t vocab = weight.size(0);
        for (int64_t n = 0; n < args.rows; ++n) {
            const int64_t y = args.labels[n];
            require(y == ignore_index || (y >= 0 && y < vocab), op, "labels",
                    expected(ignore_index, " or a number in [0, ", vocab, ")"), found(y));
        }
    }
    void set_mask(const OptionalTensor& t) {
        if (!t) return;
        check_dtype(op, "mask", *t, at::kBool);
        check_shape(op, "mask", *t, "(N,)", {args.rows}, hidden.device());
        mask = t->contiguous();
        args.mask = mask.const_data_ptr<bool>();
    }
    // Checks the forward's lse and sets args.lse; the returned tensor owns the memory.
    Tensor set_lse(const Tensor& t) {
        check_dtype(op, "lse", t, sums);
        require(t.numel() == args.hiddens * args.rows, op, "lse", expected("shape (k, N)"),
                found(t.sizes()));
        const Tensor lse = t.contiguous();
        args.lse = const_cast<void*>(lse.const_data_ptr());
        return lse;
    }

    Tensor new_sums(at::IntArrayRef sizes) const {
        return at::empty(sizes, hidden.options().dtype(sums));
    }
    Tensor weight_chunk() const {
        return weight.narrow(0, args.first, args.columns).to(hidden.scalar_type());
    }
    void run(const Step& step, int64_t work) const {
        if (launches_kernels(hidden)) {
            check_launch(op, step.launch(args, current_stream(hidden)));
            return;
        }
        const VocabCpu& twin = chosen_twins<VocabCpu>();
        for_items(args.rows, args.hiddens * work, kSerialExps,
                  [&](int64_t begin, int64_t end) { (twin.*step.twin)(args, begin, end); });
    }
    // For each chunk of the vocabulary: computes the logits, runs the step on them, and calls
    // f(rows of the weight, logits).
    template <class F>
    void sweep(const Step& step, F&& f) {
        if (args.rows == 0) return;
        for (int64_t first = 0; first < weight.size(0); first += chunk) {
            args.first = first;
            args.columns = std::min(chunk, weight.size(0) - first);
            const Tensor rows = weight_chunk();
            OptionalTensor offsets;
            if (bias) offsets = bias->narrow(0, first, args.columns).to(hidden.scalar_type());
            const Tensor logits = fast_linear(hidden, rows, offsets);
            args.logits = logits.mutable_data_ptr();
            run(step, args.columns);
            f(rows, logits);
        }
    }
    // Computes totals += left b in the accumulation dtype. A float16 product would overflow beyond
    // 65504. The GPU library can return its float32 sums; on the CPU float16 does not occur here.
    void add_product(Tensor& totals, const Tensor& left, const Tensor& b) const {
        const Tensor a = spaced(left);
        if (a.scalar_type() == sums)
            totals.addmm_(a, b);
        else if (a.scalar_type() == at::kHalf && a.is_cuda())
            totals.add_(at::mm(a, b, sums));
        else
            totals.add_(at::mm(a, b));
    }

    // Returns (loss, lse) of a forward. If `products` is defined, `finish` writes its result there.
    std::array<Tensor, 2> forward(const Step& update, const Step& finish, Tensor& products) {
        const int64_t k = args.hiddens;
        const Tensor state = new_sums({3, k, args.rows});
        const Tensor loss = new_sums({args.rows}), lse = new_sums({k, args.rows});
        args.state = state.mutable_data_ptr();
        args.loss = loss.mutable_data_ptr(), args.lse = lse.mutable_data_ptr();
        if (products.defined()) {
            products = at::zeros({k * args.rows, args.width}, loss.options());
            args.products = products.mutable_data_ptr();
        }
        sweep(update, [&](const Tensor& rows, const Tensor& weights) {
            if (products.defined()) add_product(products, weights, rows);
        });
        Tensor targets;
        if (products.defined() && args.labels) {
            const Tensor y = labels.clamp(0, weight.size(0) - 1);
            targets = weight.index_select(0, y).to(sums);
            args.targets = targets.const_data_ptr();
        }
        if (args.rows > 0) run(finish, args.width);
        return {loss, lse};
    }

    // Return (dhidden of the first `students` hidden states, dweight, dbias), recomputing logits.
    ThreeTensors backward(const Step& gradient, int64_t students, const Tensor& dloss,
                          at::ScalarType hidden_dtype, bool need_dhidden, bool need_dweight,
                          bool need_dbias) {
        const int64_t count = students * args.rows;
        const Tensor g = dloss.to(sums).repeat({students}).unsqueeze(1);  // (students N, 1)
        Tensor dhidden = nothing(hidden), dweight = nothing(weight), dbias = nothing(weight);
        Tensor scaled, narrow_g;
        if (need_dhidden) dhidden = at::zeros({count, args.width}, g.options());
        if (need_dweight) {
            dweight = at::zeros(weight.sizes(), weight.options());
            scaled = hidden.narrow(0, 0, count).mul(g).to(hidden.scalar_type());
        }
        if (need_dbias) {
            dbias = at::zeros({weight.size(0)}, bias->options());
            narrow_g = g.squeeze(1).to(hidden.scalar_type());
        }
        sweep(gradient, [&](const Tensor& rows, const Tensor& logits) {
            const Tensor d = logits.narrow(0, 0, count), turned = d.t();
            if (need_dhidden) add_product(dhidden, d, rows);
            if (need_dweight) {
                Tensor part = dweight.narrow(0, args.first, args.columns);
                if (part.scalar_type() == d.scalar_type())
                    at::mm_out(part, turned, scaled);
                else
                    part.copy_(at::mm(turned, scaled));
            }
            if (need_dbias)
                dbias.narrow(0, args.first, args.columns).copy_(at::mv(turned, narrow_g));
        });
        if (need_dhidden) dhidden = dhidden.mul_(g).to(hidden_dtype);
        return {dhidden, dweight, dbias};
    }
};

void check_dloss(const char* op, const Tensor& dloss, const Call& call) {
    check_shape(op, "dloss", dloss, "(N,)", {call.args.rows}, call.hidden.device());
}
// Return whether the forward has already computed the only gradient needed.
bool ready(const Tensor& gradient, bool need_dweight, bool need_dbias) {
    return gradient.dim() > 1 && !need_dweight && !need_dbias;
}

}  // namespace

ThreeTensors vocab_cross_entropy(const Tensor& hidden, const Tensor& weight,
                                 const OptionalTensor& bias, const Tensor& labels, int64_t chunk,
                                 int64_t ignore_index, double softcap, at::ScalarType dtype,
                                 bool with_gradient) {
    constexpr auto op = "chunked_cross_entropy";
    check_no_tangents(op, {&hidden, &weight});
    check_dim(op, "hidden", hidden, 2, "(N, d)");
    Call call(op, "hidden", hidden, 1, weight, bias, chunk, softcap, dtype);
    call.set_labels(labels, ignore_index);
    const c10::DeviceGuard guard(hidden.device());
    const NoAutocast no_autocast;
    Tensor products;
    if (with_gradient) products = nothing(hidden);
    const auto [loss, lse] = call.forward(kCrossEntropyUpdate, kCrossEntropyFinish, products);
    return {loss, lse.view({-1}),
            with_gradient ? products.to(hidden.scalar_type()) : nothing(hidden)};
}

ThreeTensors vocab_cross_entropy_backward(const Tensor& dloss, const Tensor& hidden,
                                          const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& labels, const Tensor& lse,
                                          const Tensor& dhidden, int64_t chunk,
                                          int64_t ignore_index, double softcap,
                                          at::ScalarType dtype, bool need_dhidden,
                                          bool need_dweight, bool need_dbias) {
    constexpr auto op = "vocab_cross_entropy_backward";
    check_dim(op, "hidden", hidden, 2, "(N, d)");
    Call call(op, "hidden", hidden, 1, weight, bias, chunk, softcap, dtype);
    call.set_labels(labels, ignore_index);
    check_dloss(op, dloss, call);
    const Tensor kept = call.set_lse(lse);
    const c10::DeviceGuard guard(hidden.device());
    const NoAutocast no_autocast;
    if (ready(dhidden, need_dweight, need_dbias))
        return {dhidden.mul(dloss.unsqueeze(1)).to(hidden.scalar_type()), nothing(weight),
                nothing(weight)};
    return call.backward(kCrossEntropyGradient, 1, dloss, hidden.scalar_type(), need_dhidden,
                         need_dweight, need_dbias);
}

ThreeTensors vocab_kl(const Tensor& hiddens, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& mask, double tau, int64_t chunk, double softcap,
                      at::ScalarType dtype, bool with_gradient) {
    constexpr auto op = "chunked_kl";
    check_no_tangents(op, {&hiddens, &weight});
    check_dim(op, "hiddens", hiddens, 3, "(k, N, d)");
    const int64_t students = hiddens.size(0) - 1;
    require(students >= 0, op, "hiddens", expected("at least the teacher's hidden state"),
            found("no tensor"));
    require(tau > 0 && std::isfinite(tau), op, "tau", expected("a number above 0"), found(tau));
    require(!with_gradient || softcap == 0, op, "with_gradient",
            expected("false with a softcap, as each student then needs separate products"),
            found("true"));
    Call call(op, "hiddens", hiddens, students + 1, weight, bias, chunk, softcap, dtype);
    call.args.tau = tau;
    call.set_mask(mask);
    const c10::DeviceGuard guard(hiddens.device());
    const NoAutocast no_autocast;
    Tensor products;
    if (with_gradient) products = nothing(hiddens);
    const auto [loss, lse] = call.forward(kKlUpdate, kKlFinish, products);
    if (!with_gradient) return {loss, lse, nothing(hiddens)};
    const Tensor own = products.narrow(0, 0, students * call.args.rows);
    Tensor dhiddens = at::empty({students, hiddens.size(1), hiddens.size(2)}, hiddens.options());
    dhiddens.view(own.sizes()).copy_(own);
    return {loss, lse, dhiddens};
}

ThreeTensors vocab_kl_backward(const Tensor& dloss, const Tensor& hiddens, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mask,
                               const Tensor& lse, const Tensor& dhiddens, double tau, int64_t chunk,
                               double softcap, at::ScalarType dtype, bool need_dhiddens,
                               bool need_dweight, bool need_dbias) {
    constexpr auto op = "vocab_kl_backward";
    check_dim(op, "hiddens", hiddens, 3, "(k, N, d)");
    const int64_t students = hiddens.size(0) - 1;
    require(students >= 0, op, "hiddens", expected("at least the teacher's hidden state"),
            found("no tensor"));
    require(tau > 0 && std::isfinite(tau), op, "tau", expected("a number above 0"), found(tau));
    Call call(op, "hiddens", hiddens, students + 1, weight, bias, chunk, softcap, dtype);
    call.args.tau = tau;
    call.set_mask(mask);
    check_dloss(op, dloss, call);
    const Tensor kept = call.set_lse(lse);
    const c10::DeviceGuard guard(hiddens.device());
    const NoAutocast no_autocast;
    Tensor all = nothing(hiddens);
    if (need_dhiddens) all = at::zeros(hiddens.sizes(), hiddens.options());  // zero for the teacher
    if (ready(dhiddens, need_dweight, need_dbias)) {
        all.narrow(0, 0, students).copy_(dhiddens.mul(dloss.unsqueeze(1)));
        return {all, nothing(weight), nothing(weight)};
    }
    auto [own, dweight, dbias] = call.backward(kKlGradient, students, dloss, hiddens.scalar_type(),
                                               need_dhiddens, need_dweight, need_dbias);
    if (need_dhiddens)
        all.narrow(0, 0, students).copy_(own.view({students, hiddens.size(1), hiddens.size(2)}));
    return {all, dweight, dbias};
}

}  // namespace lora_ext
