// The circuit ops: tensors in, checks, allocation, choice of twin or kernel.
//
// Shapes: leaf (B, K, C, V); x (B, K); e (B, K, C); prior (B, C); trans (B, M, C, C).
#include "ops/circuit.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>

#include "lora_ext/circuit.h"
#include "ops/checks.h"
#include "ops/circuit_args.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Below so many exponentials a parallel region costs more than a second thread saves.
constexpr int64_t kSerialWork = 1 << 13;

const CircuitCpu& twin() {
    return *circuit_cpu(lora_twin().isa);
}

template <typename F>
void for_items(int64_t items, int64_t work_per_item, F&& f) {
    const int64_t grain = std::max<int64_t>(1, kSerialWork / std::max<int64_t>(1, work_per_item));
    at::parallel_for(0, items, grain, f);
}

// ------------------------------------------------------------------------------------------------
// Leaves

void check_tokens(const char* op, const Tensor& x, int64_t rows, int64_t n_token, int64_t vocab,
                  at::Device device) {
    LX_CHECK(x.scalar_type() == at::kLong, op, ": x must be int64, got ", x.scalar_type());
    LX_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == n_token, op,
             ": x must have shape (B, K) = (", rows, ", ", n_token, "), got ", x.sizes());
    LX_CHECK(x.device() == device, op, ": x must be on ", device, ", got ", x.device());
    check_range(op, "x", x, -1, vocab);
}

// Checks leaf and x; `leaf` and `x` keep alive what the arguments point at.
CircuitLeafArgs leaf_args(const char* op, Tensor& leaf, Tensor& x) {
    CircuitLeafArgs args;
    args.dtype = dtype_of(op, "leaf", leaf);
    check_dim(op, "leaf", leaf, 4, "(B, K, C, V)");
    args.rows = leaf.size(0);
    args.n_token = leaf.size(1);
    args.components = leaf.size(2);
    args.vocab = leaf.size(3);
    LX_CHECK(args.n_token > 0 && args.components > 0 && args.vocab > 0, op,
             ": leaf must have at least one position, component and token, got shape ",
             leaf.sizes());
    LX_CHECK(args.rows <= kMaxSize && args.n_token <= kMaxSize && args.components <= kMaxSize &&
                 args.vocab <= kMaxSize,
             op, ": sizes of leaf must be at most ", kMaxSize, ", got ", leaf.sizes());
    check_tokens(op, x, args.rows, args.n_token, args.vocab, leaf.device());
    leaf = batch_of_rows(leaf);
    x = batch_of_rows(x);
    args.logits = leaf.const_data_ptr();
    args.logits_stride = leaf.stride(0);
    args.x = x.const_data_ptr<int64_t>();
    args.x_stride = x.stride(0);
    args.e_stride = args.n_token * args.components;
    return args;
}

// norm (2, B, K, C): the maxima, then the logarithms of the sums.
void set_norm(CircuitLeafArgs& args, const Tensor& norm) {
    args.top = const_cast<void*>(norm.const_data_ptr());
    args.log_sum = static_cast<char*>(args.top) + norm.nbytes() / 2;
}

}  // namespace

std::tuple<Tensor, Tensor> circuit_leaf(const Tensor& leaf_in, const Tensor& x_in) {
    constexpr auto op = "circuit_leaf";
    Tensor leaf = leaf_in, x = x_in;
    CircuitLeafArgs args = leaf_args(op, leaf, x);
    const auto options = leaf.options().dtype(accumulator_of(leaf));
    Tensor e = at::empty({args.rows, args.n_token, args.components}, options);
    Tensor norm = at::empty({2, args.rows, args.n_token, args.components}, options);
    if (e.numel() == 0) return {e, norm};
    const c10::DeviceGuard guard(leaf.device());
    args.e = e.mutable_data_ptr();
    set_norm(args, norm);
    if (launches_kernels(leaf))
        check_launch(op, launch_circuit_leaf(args, current_stream(leaf)));
    else
        for_items(args.rows * args.n_token, args.components * args.vocab,
                  [&](int64_t begin, int64_t end) { twin().leaf(args, begin, end); });
    return {e, norm};
}

Tensor circuit_leaf_backward(const Tensor& de_in, const Tensor& leaf_in, const Tensor& x_in,
                             const Tensor& norm_in) {
    constexpr auto op = "circuit_leaf_backward";
    Tensor leaf = leaf_in, x = x_in;
    CircuitLeafArgs args = leaf_args(op, leaf, x);
    const auto check = [&](const char* name, const Tensor& t, at::IntArrayRef shape,
                           const char* letters) {
        LX_CHECK(t.sizes() == shape && t.scalar_type() == accumulator_of(leaf) &&
                     t.device() == leaf.device(),
                 op, ": ", name, " must have shape ", letters, " = ", shape, " and be ",
                 accumulator_of(leaf), " on ", leaf.device(), ", got ", t.scalar_type(),
                 " of shape ", t.sizes(), " on ", t.device());
    };
    check("de", de_in, {args.rows, args.n_token, args.components}, "(B, K, C)");
    check("norm", norm_in, {2, args.rows, args.n_token, args.components}, "(2, B, K, C)");
    const Tensor de = de_in.contiguous(), norm = norm_in.contiguous();
    Tensor dleaf = at::empty(leaf.sizes(), leaf.options());
    if (dleaf.numel() == 0) return dleaf;
    const c10::DeviceGuard guard(leaf.device());
    set_norm(args, norm);
    args.de = de.const_data_ptr();
    args.dlogits = dleaf.mutable_data_ptr();
    if (launches_kernels(leaf))
        check_launch(op, launch_circuit_leaf_backward(args, current_stream(leaf)));
    else
        for_items(args.rows * args.n_token, args.components * args.vocab,
                  [&](int64_t begin, int64_t end) { twin().leaf_backward(args, begin, end); });
    return dleaf;
}

// ------------------------------------------------------------------------------------------------
// Leaves of a linear head
namespace {

constexpr int64_t kLogitBytes = int64_t{64} << 20;  // of the logits of one chunk

// One op under way. For each position and as many rows as fit: logits = h @ emit[k].T by the
// library, then the leaf kernels in place.
struct Emission {
    const char* op;
    Tensor h, emit, x;
    int64_t rows, n_token, components, vocab, width, chunk_rows;
    Tensor logits;

    Emission(const char* op, const Tensor& h_in, const Tensor& emit_in, const Tensor& x_in)
        : op(op) {
        dtype_of(op, "h", h_in);
        check_dim(op, "h", h_in, 2, "(B, D)");
        check_like(op, "emit", emit_in, h_in, "h");
        check_dim(op, "emit", emit_in, 4, "(K, C, V, D)");
        rows = h_in.size(0);
        n_token = emit_in.size(0);
        components = emit_in.size(1);
        vocab = emit_in.size(2);
        width = emit_in.size(3);
        LX_CHECK(h_in.size(1) == width, op, ": h.shape[1] must equal emit.shape[3] = ", width,
                 ", got ", h_in.size(1));
        LX_CHECK(n_token > 0 && components > 0 && vocab > 0, op,
                 ": emit must have at least one position, component and token, got shape ",
                 emit_in.sizes());
        check_tokens(op, x_in, rows, n_token, vocab, h_in.device());
        h = h_in.contiguous();
        emit = emit_in.contiguous();
        x = x_in.contiguous();
        const int64_t row_bytes = components * vocab * static_cast<int64_t>(h.element_size());
        chunk_rows = std::clamp<int64_t>(kLogitBytes / row_bytes, 1, std::max<int64_t>(rows, 1));
        logits = at::empty({chunk_rows, components * vocab}, h.options());
    }

    Tensor weights(int64_t k) const { return emit.select(0, k).view({components * vocab, width}); }

    // f(k, first row, h of the chunk, its logits, arguments of the leaf kernels) for each chunk.
    template <typename F>
    void for_chunks(F&& f) {
        for (int64_t k = 0; k < n_token; ++k) {
            const Tensor w = weights(k).t();
            for (int64_t first = 0; first < rows; first += chunk_rows) {
                const int64_t count = std::min(chunk_rows, rows - first);
                const Tensor part = h.narrow(0, first, count);
                Tensor out = logits.narrow(0, 0, count);
                at::mm_out(out, part, w);
                CircuitLeafArgs args;
                args.dtype = dtype_of(op, "h", h);
                args.rows = count;
                args.n_token = 1;
                args.components = components;
                args.vocab = vocab;
                args.logits = out.const_data_ptr();
                args.logits_stride = components * vocab;
                args.x = x.const_data_ptr<int64_t>() + first * n_token + k;
                args.x_stride = n_token;
                args.e_stride = n_token * components;
                f(k, first, part, out, args);
            }
        }
    }
    // The same element of a tensor (B, K, C).
    char* at(const Tensor& t, int64_t first, int64_t k) const {
        return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) +
               (first * n_token + k) * components * t.element_size();
    }
    // e of a chunk, and the norms beside it.
    void gather(CircuitLeafArgs& args, const Tensor& e, const Tensor& norm, int64_t first,
                int64_t k) const {
        args.e = at(e, first, k);
        args.top = at(norm[0], first, k);
        args.log_sum = at(norm[1], first, k);
        if (launches_kernels(h))
            check_launch(op, launch_circuit_leaf(args, current_stream(h)));
        else
            for_items(args.rows, components * vocab,
                      [&](int64_t begin, int64_t end) { twin().leaf(args, begin, end); });
    }
};

}  // namespace

Tensor emission_gather(const Tensor& h, const Tensor& emit, const Tensor& x) {
    Emission chunks("emission_gather", h, emit, x);
    const c10::DeviceGuard guard(h.device());
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto options = h.options().dtype(accumulator_of(h));
    const std::array<int64_t, 3> shape{chunks.rows, chunks.n_token, chunks.components};
    Tensor e = at::empty(shape, options);
    const Tensor norm = at::empty({2, shape[0], shape[1], shape[2]}, options);
    chunks.for_chunks([&](int64_t k, int64_t first, const Tensor&, const Tensor&,
                          CircuitLeafArgs& args) { chunks.gather(args, e, norm, first, k); });
    return e;
}

std::tuple<Tensor, Tensor> emission_gather_backward(const Tensor& de_in, const Tensor& h,
                                                    const Tensor& emit, const Tensor& x,
                                                    bool need_h, bool need_emit) {
    constexpr auto op = "emission_gather_backward";
    Emission chunks(op, h, emit, x);
    const auto type = accumulator_of(h);
    const auto options = h.options().dtype(type);
    const std::array<int64_t, 3> shape{chunks.rows, chunks.n_token, chunks.components};
    LX_CHECK(de_in.sizes() == at::IntArrayRef(shape) && de_in.scalar_type() == type &&
                 de_in.device() == h.device(),
             op, ": de must have shape (B, K, C) = ", at::IntArrayRef(shape), " and be ", type,
             " on ", h.device(), ", got ", de_in.scalar_type(), " of shape ", de_in.sizes(), " on ",
             de_in.device());
    const Tensor de = de_in.contiguous();
    const c10::DeviceGuard guard(h.device());
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor e = at::empty(shape, options);
    const Tensor norm = at::empty({2, shape[0], shape[1], shape[2]}, options);
    const auto nothing = [&] { return at::empty({0}, h.options()); };
    // Sums over positions and over chunks of rows, in float32.
    Tensor dh = need_h ? at::zeros(h.sizes(), options) : nothing();
    Tensor demit = need_emit ? at::empty(emit.sizes(), h.options()) : nothing();
    if (need_emit && chunks.rows == 0) demit.zero_();
    Tensor sum;
    chunks.for_chunks([&](int64_t k, int64_t first, const Tensor& part, const Tensor& logits,
                          CircuitLeafArgs& args) {
        chunks.gather(args, e, norm, first, k);
        args.de = chunks.at(de, first, k);
        args.dlogits = logits.mutable_data_ptr();
        if (launches_kernels(h))
            check_launch(op, launch_circuit_leaf_backward(args, current_stream(h)));
        else
            for_items(args.rows, chunks.components * chunks.vocab,
                      [&](int64_t begin, int64_t end) { twin().leaf_backward(args, begin, end); });
        if (need_h) dh.narrow(0, first, part.size(0)).add_(at::mm(logits, chunks.weights(k)));
        if (!need_emit) return;
        const Tensor own = at::mm(logits.t(), part);
        Tensor to = demit.select(0, k).view(own.sizes());
        if (chunks.chunk_rows >= chunks.rows) {
            to.copy_(own);
            return;
        }
        sum = first == 0 ? own.to(type) : sum.add_(own);
        if (first + part.size(0) == chunks.rows) to.copy_(sum);
    });
    return {need_h ? dh.to(h.scalar_type()) : dh, demit};
}

// ------------------------------------------------------------------------------------------------
// Scan
namespace {

thread_local Scratch walk_scratch;

// One op under way: what the twins and launchers read, and the tensors that keep it alive.
struct Call {
    const char* op;
    CircuitScanArgs args;
    Tensor e, prior, trans;

    Call(const char* op, std::string_view kind, const Tensor& e_in, const OptionalTensor& prior_in,
         const OptionalTensor& trans_in)
        : op(op) {
        LX_CHECK(e_in.scalar_type() == at::kFloat || e_in.scalar_type() == at::kDouble, op,
                 ": e must be float32 or float64 (CPU), got ", e_in.scalar_type());
        check_dim(op, "e", e_in, 3, "(B, K, C)");
        const CircuitWeights weights = circuit_weights(op, kind, e_in, "e", prior_in, trans_in);
        args.params = weights.params;
        prior = weights.prior;
        trans = weights.trans;
        e = batch_of_rows(e_in);
        args.e = e.const_data_ptr();
        args.e_stride = e.stride(0);
    }

    int64_t work() const {
        const CircuitParams& c = args.params;
        const int64_t matrices = circuit_num_transitions(c.kind, c.n_token);
        return c.components * (2 * matrices * c.components + 4 * c.n_token);
    }
    template <typename Run>
    void run(Run run) const {
        const int64_t bytes = twin().scan_scratch(args);
        for_items(args.params.rows, work(), [&](int64_t begin, int64_t end) {
            run(args, begin, end, walk_scratch.get(bytes));
        });
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> circuit_scan(std::string_view kind, const Tensor& e,
                                                        const OptionalTensor& prior,
                                                        const OptionalTensor& trans, bool save) {
    constexpr auto op = "circuit_scan";
    Call call(op, kind, e, prior, trans);
    CircuitScanArgs& args = call.args;
    const CircuitParams& c = args.params;
    const auto options = e.options();
    Tensor prefix = at::empty({c.rows, c.n_token}, options);
    Tensor conditional = at::empty({c.rows, c.n_token}, options);
    Tensor posterior = at::empty({c.rows, c.n_token, c.components}, options);
    const int64_t slots = circuit_num_states(c.kind, c.n_token);
    Tensor states =
        save ? at::empty({c.rows, slots, c.components}, options) : at::empty({0}, options);
    if (c.rows == 0) return {prefix, conditional, posterior, states};
    const c10::DeviceGuard guard(e.device());
    args.prefix = prefix.mutable_data_ptr();
    args.conditional = conditional.mutable_data_ptr();
    args.posterior = posterior.mutable_data_ptr();
    if (save) args.states = states.mutable_data_ptr();
    if (launches_kernels(e))
        check_launch(op, launch_circuit_scan(args, current_stream(e)));
    else
        call.run(twin().scan);
    return {prefix, conditional, posterior, states};
}

std::tuple<Tensor, Tensor, Tensor> circuit_scan_backward(
    const OptionalTensor& dprefix_in, const OptionalTensor& dconditional_in, std::string_view kind,
    const Tensor& e, const OptionalTensor& prior, const OptionalTensor& trans,
    const Tensor& states_in, bool need_prior, bool need_trans) {
    constexpr auto op = "circuit_scan_backward";
    Call call(op, kind, e, prior, trans);
    CircuitScanArgs& args = call.args;
    const CircuitParams& c = args.params;
    const auto gradient = [&](const char* name, const OptionalTensor& t) {
        if (!t) return Tensor();
        check_like(op, name, *t, e, "e");
        LX_CHECK(t->dim() == 2 && t->size(0) == c.rows && t->size(1) == c.n_token, op, ": ", name,
                 " must have shape (B, K) = (", c.rows, ", ", c.n_token, "), got ", t->sizes());
        return t->contiguous();
    };
    const Tensor dprefix = gradient("dprefix", dprefix_in);
    const Tensor dconditional = gradient("dconditional", dconditional_in);
    const int64_t slots = circuit_num_states(c.kind, c.n_token);
    check_like(op, "states", states_in, e, "e");
    LX_CHECK(states_in.dim() == 3 && states_in.size(0) == c.rows && states_in.size(1) == slots &&
                 states_in.size(2) == c.components,
             op, ": states must be those of circuit_scan(save=True), of shape (", c.rows, ", ",
             slots, ", ", c.components, "), got ", states_in.sizes());
    const Tensor states = states_in.contiguous();
    const auto empty_like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
    const auto nothing = [&] { return at::empty({0}, e.options()); };  // outputs must not alias
    Tensor de = empty_like(e);
    need_prior = need_prior && prior;
    need_trans = need_trans && trans;
    Tensor dprior = need_prior ? empty_like(call.prior) : nothing();
    Tensor dtrans = need_trans ? empty_like(call.trans) : nothing();
    if (c.rows > 0) {
        const c10::DeviceGuard guard(e.device());
        args.states = const_cast<void*>(states.const_data_ptr());
        if (dprefix.defined()) args.dprefix = dprefix.const_data_ptr();
        if (dconditional.defined()) args.dconditional = dconditional.const_data_ptr();
        args.de = de.mutable_data_ptr();
        if (need_prior) args.dprior = dprior.mutable_data_ptr();
        if (need_trans && dtrans.numel() > 0) args.dtrans = dtrans.mutable_data_ptr();
        if (launches_kernels(e))
            check_launch(op, launch_circuit_scan_backward(args, current_stream(e)));
        else
            call.run(twin().scan_backward);
    }
    if (need_prior) dprior = dprior.to(prior->scalar_type());
    if (need_trans) dtrans = dtrans.to(trans->scalar_type());
    return {de, dprior, dtrans};
}

}  // namespace lora_ext
