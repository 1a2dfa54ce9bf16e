// The circuit ops: checks, allocation, choice of CPU twin or CUDA kernel.
//
// Shapes: leaf (B, K, C, V); x (B, K); e (B, K, C); prior (B, C); trans (B, M, C, C).
#include "ops/circuit.h"

#include <ATen/ops/empty.h>

#include "lora_ext/circuit.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/circuit_args.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

const CircuitCpu& twin() {
    return chosen_twins<CircuitCpu>();
}

// ------------------------------------------------------------------------------------------------
// Leaves

// Checks leaf and x; `leaf` and `x` own the memory that the arguments point to.
CircuitLeafArgs leaf_args(const char* op, Tensor& leaf, Tensor& x) {
    CircuitLeafArgs args;
    args.dtype = dtype_of(op, "leaf", leaf);
    check_dim(op, "leaf", leaf, 4, "(B, K, C, V)");
    args.rows = leaf.size(0);
    args.n_token = leaf.size(1);
    args.components = leaf.size(2);
    args.vocab = leaf.size(3);
    require(args.n_token > 0 && args.components > 0 && args.vocab > 0, op, "leaf",
            expected("at least one position, component and token"), found(leaf.sizes()));
    require(args.rows <= kMaxSize && args.n_token <= kMaxSize && args.components <= kMaxSize &&
                args.vocab <= kMaxSize,
            op, "leaf", expected("sizes of at most ", kMaxSize), found(leaf.sizes()));
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

// norm (2, B, K, C) contains the maxima and then the logarithms of the sums, see circuit.h.
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
        for_items(args.rows * args.n_token, args.components * args.vocab, kSerialExps,
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
        check_dtype(op, name, t, accumulator_of(leaf));
        check_shape(op, name, t, letters, shape, leaf.device());
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
        for_items(args.rows * args.n_token, args.components * args.vocab, kSerialExps,
                  [&](int64_t begin, int64_t end) { twin().leaf_backward(args, begin, end); });
    return dleaf;
}

// ------------------------------------------------------------------------------------------------
// Scan
namespace {

thread_local Scratch walk_scratch;

// Arguments of one call, and the tensors that own their memory.
struct Call {
    const char* op;
    CircuitScanArgs args;
    Tensor e, prior, trans;

    Call(const char* op, std::string_view kind, const Tensor& e_in, const OptionalTensor& prior_in,
         const OptionalTensor& trans_in)
        : op(op) {
        require(e_in.scalar_type() == at::kFloat || e_in.scalar_type() == at::kDouble, op, "e",
                expected("float32 or float64 (CPU)"), found(e_in.scalar_type()));
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
        for_items(args.params.rows, work(), kSerialExps, [&](int64_t begin, int64_t end) {
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
        check_shape(op, name, *t, "(B, K)", {c.rows, c.n_token}, e.device());
        return t->contiguous();
    };
    const Tensor dprefix = gradient("dprefix", dprefix_in);
    const Tensor dconditional = gradient("dconditional", dconditional_in);
    const int64_t slots = circuit_num_states(c.kind, c.n_token);
    check_like(op, "states", states_in, e, "e");
    check_shape(op, "states", states_in, "of the states of circuit_scan(save=True)",
                {c.rows, slots, c.components}, e.device());
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
