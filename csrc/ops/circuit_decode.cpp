// Drafting from circuits and verifying: tensors in, checks, allocation, choice of twin or kernel.
//
// Shapes: leaf (B, K, C, V); prior (B, C); trans (B, M, C, C); tokens (B, K); target (B, K + 1, V).
#include "ops/circuit_decode.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "lora_ext/circuit_decode.h"
#include "ops/checks.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

thread_local Scratch row_scratch;

constexpr int64_t kMaxTokens = 1024, kMaxComponents = 1024;

CircuitKind kind_of(const char* op, const std::string& kind) {
    if (kind == "ff") return CircuitKind::kFF;
    if (kind == "cp") return CircuitKind::kCP;
    if (kind == "hmm") return CircuitKind::kHMM;
    LX_CHECK(kind == "btree", op, ": kind must be ff, cp, hmm or btree, got ", kind);
    return CircuitKind::kBTree;
}

at::ScalarType accumulator(const Tensor& t) {
    return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 at::IntArrayRef sizes, at::Device device) {
    LX_CHECK(t.sizes() == sizes, op, ": ", name, " must have shape ", letters, " = ", sizes,
             ", got ", t.sizes());
    LX_CHECK(t.device() == device, op, ": ", name, " must be on ", device, ", got ", t.device());
}
void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype) {
    LX_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ",
             t.scalar_type());
}

// The tensor itself if each row of the batch is contiguous, else a copy.
Tensor row_contiguous(const Tensor& t) {
    return t.size(0) == 0 || t.select(0, 0).is_contiguous() ? t : t.contiguous();
}

// The values of an int64 tensor where this thread may look at them: always on the CPU, in debug
// mode on a device.
template <typename F>
void check_values(const Tensor& t, F&& check) {
    if (launches_kernels(t) && !debug_mode()) return;
    const Tensor values = t.cpu().contiguous();
    check(values.const_data_ptr<int64_t>());
}
void check_tokens(const char* op, const char* name, const Tensor& t, int64_t least,
                  int64_t vocabulary) {
    check_values(t, [&](const int64_t* value) {
        for (int64_t i = 0; i < t.numel(); ++i)
            LX_CHECK(value[i] >= least && value[i] < vocabulary, op, ": ", name, "[", i / t.size(1),
                     ", ", i % t.size(1), "] must be in [", least, ", ", vocabulary, "), got ",
                     value[i]);
    });
}

// The circuit of one op, checked, and the tensors that keep it alive.
struct Circuit {
    const char* op;
    CircuitLogits logits;
    Tensor leaf, prior, trans;

    Circuit(const char* op, const std::string& kind, const Tensor& leaf_in,
            const OptionalTensor& prior_in, const OptionalTensor& trans_in)
        : op(op) {
        CircuitParams& c = logits.circuit;
        c.kind = kind_of(op, kind);
        check_dim(op, "leaf", leaf_in, 4, "(B, K, C, V)");
        logits.dtype = dtype_of(op, "leaf", leaf_in);
        const int64_t B = leaf_in.size(0), K = leaf_in.size(1), C = leaf_in.size(2),
                      V = leaf_in.size(3);
        LX_CHECK(K >= 1 && K <= kMaxTokens && C >= 1 && C <= kMaxComponents && V >= 1, op,
                 ": leaf must have 1 to ", kMaxTokens, " positions, 1 to ", kMaxComponents,
                 " components and a vocabulary, got shape ", leaf_in.sizes());
        LX_CHECK(V <= kMaxSize && B <= kMaxSize, op, ": at most ", kMaxSize,
                 " rows and tokens, got ", B, " and ", V);
        LX_CHECK(c.kind != CircuitKind::kFF || C == 1, op,
                 ": ff has one component, got leaf of shape ", leaf_in.sizes());
        const int64_t M = circuit_num_transitions(c.kind, K);
        LX_CHECK(M == 0 || trans_in, op, ": trans is required for ", kind, " of ", K,
                 " positions, got None");
        const bool wide = logits.dtype == DType::kFloat64;
        c.dtype = wide ? DType::kFloat64 : DType::kFloat32;
        const auto weights = [&](const char* name, const Tensor& t) {
            c.dtype = dtype_of(op, name, t);
            LX_CHECK((c.dtype == DType::kFloat64) == wide, op, ": ", name,
                     " must be float64 where leaf is, and only there, got ", t.scalar_type());
            return row_contiguous(t);
        };
        if (prior_in) {
            check_shape(op, "prior", *prior_in, "(B, C)", {B, C}, leaf_in.device());
            prior = weights("prior", *prior_in);
            c.prior = prior.const_data_ptr();
            c.prior_stride = prior.stride(0);
        }
        if (trans_in) {
            check_shape(op, "trans", *trans_in, "(B, M, C, C)", {B, M, C, C}, leaf_in.device());
            if (prior_in) check_like(op, "trans", *trans_in, *prior_in, "prior");
            trans = weights("trans", *trans_in);
            c.trans = trans.const_data_ptr();
            c.trans_stride = trans.stride(0);
        }
        if (M == 0 && c.kind != CircuitKind::kFF) c.kind = CircuitKind::kCP;
        leaf = row_contiguous(leaf_in);
        logits.leaf = leaf.const_data_ptr();
        logits.leaf_stride = leaf.stride(0);
        logits.vocabulary = V;
        c.rows = B;
        c.n_token = K;
        c.components = C;
    }

    Tensor tokens() const {
        const CircuitParams& c = logits.circuit;
        return at::empty({c.rows, c.n_token}, leaf.options().dtype(at::kLong));
    }
    Tensor values(at::IntArrayRef sizes) const {
        return at::empty(sizes, leaf.options().dtype(accumulator(leaf)));
    }

    Tensor checked_evidence(const OptionalTensor& evidence) const {
        if (!evidence) return {};
        const CircuitParams& c = logits.circuit;
        check_shape(op, "evidence", *evidence, "(B, K)", {c.rows, c.n_token}, leaf.device());
        check_dtype(op, "evidence", *evidence, at::kLong);
        check_tokens(op, "evidence", *evidence, -1, logits.vocabulary);
        check_values(*evidence, [&](const int64_t* value) {
            for (int64_t i = 0; i < evidence->numel(); ++i)
                LX_CHECK(i % c.n_token == 0 || value[i] < 0 || value[i - 1] >= 0, op,
                         ": evidence must come first in its row, got token ", value[i], " at [",
                         i / c.n_token, ", ", i % c.n_token, "] behind a -1");
        });
        return evidence->contiguous();
    }
};

const int64_t* data_or_null(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
}

// Uniforms are float32, and may be float64 where the logits are.
Tensor checked_uniforms(const char* op, const Tensor& uniforms, const char* letters,
                        at::IntArrayRef sizes, const Tensor& logits) {
    check_shape(op, "uniforms", uniforms, letters, sizes, logits.device());
    if (uniforms.scalar_type() != accumulator(logits))
        check_dtype(op, "uniforms", uniforms, at::kFloat);
    return uniforms.to(accumulator(logits)).contiguous();
}

const CircuitDecodeCpu& twin() {
    return *circuit_decode_cpu(lora_twin().isa);
}
template <typename Args>
void run_twin(void (*f)(const Args&, int64_t, int64_t, void*), const Args& args, int64_t rows,
              int64_t scratch_bytes) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        f(args, begin, end, row_scratch.get(scratch_bytes));
    });
}

}  // namespace

Tensor circuit_conditional_dist(std::string kind, const Tensor& leaf, const OptionalTensor& prior,
                                const OptionalTensor& trans, const Tensor& x_in,
                                const Tensor& k_in) {
    constexpr auto op = "circuit_conditional_dist";
    const Circuit circuit(op, kind, leaf, prior, trans);
    const CircuitParams& c = circuit.logits.circuit;
    const int64_t V = circuit.logits.vocabulary;
    check_shape(op, "x", x_in, "(B, K)", {c.rows, c.n_token}, leaf.device());
    check_dtype(op, "x", x_in, at::kLong);
    check_shape(op, "k", k_in, "(B,)", {c.rows}, leaf.device());
    check_dtype(op, "k", k_in, at::kLong);
    check_values(k_in, [&](const int64_t* k) {
        for (int64_t row = 0; row < c.rows; ++row)
            LX_CHECK(k[row] >= 0 && k[row] < c.n_token, op, ": k[", row, "] must be in [0, ",
                     c.n_token, "), got ", k[row]);
    });
    check_tokens(op, "x", x_in, -1, V);
    const Tensor x = x_in.contiguous(), k = k_in.contiguous();
    Tensor out = circuit.values({c.rows, V});
    if (c.rows == 0) return out;
    const CircuitConditionalArgs args{circuit.logits, x.const_data_ptr<int64_t>(),
                                      k.const_data_ptr<int64_t>(), out.mutable_data_ptr()};
    if (launches_kernels(leaf)) {
        const c10::DeviceGuard guard(leaf.device());
        check_launch(op, launch_circuit_conditional_dist(args, current_stream(leaf)));
    } else {
        run_twin(twin().conditional_dist, args, c.rows, twin().sample_scratch(args.logits));
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor> circuit_sample(std::string kind, const Tensor& leaf,
                                                  const OptionalTensor& prior,
                                                  const OptionalTensor& trans,
                                                  const Tensor& uniforms_in,
                                                  const OptionalTensor& evidence_in) {
    constexpr auto op = "circuit_sample";
    const Circuit circuit(op, kind, leaf, prior, trans);
    const CircuitParams& c = circuit.logits.circuit;
    const Tensor uniforms =
        checked_uniforms(op, uniforms_in, "(B, K, 2)", {c.rows, c.n_token, 2}, leaf);
    const Tensor evidence = circuit.checked_evidence(evidence_in);
    Tensor tokens = circuit.tokens();
    Tensor conditional = circuit.values({c.rows, c.n_token});
    Tensor posterior = circuit.values({c.rows, c.n_token, c.components});
    if (c.rows == 0) return {tokens, conditional, posterior};
    const CircuitSampleArgs args{circuit.logits,
                                 uniforms.const_data_ptr(),
                                 data_or_null(evidence),
                                 tokens.mutable_data_ptr<int64_t>(),
                                 conditional.mutable_data_ptr(),
                                 posterior.mutable_data_ptr()};
    if (launches_kernels(leaf)) {
        const c10::DeviceGuard guard(leaf.device());
        check_launch(op, launch_circuit_sample(args, current_stream(leaf)));
    } else {
        run_twin(twin().sample, args, c.rows, twin().sample_scratch(args.logits));
    }
    return {tokens, conditional, posterior};
}

std::tuple<Tensor, Tensor> circuit_argmax(std::string kind, const Tensor& leaf,
                                          const OptionalTensor& prior, const OptionalTensor& trans,
                                          const OptionalTensor& evidence_in) {
    constexpr auto op = "circuit_argmax";
    const Circuit circuit(op, kind, leaf, prior, trans);
    const int64_t rows = circuit.logits.circuit.rows;
    const Tensor evidence = circuit.checked_evidence(evidence_in);
    Tensor tokens = circuit.tokens(), value = circuit.values({rows});
    if (rows == 0) return {tokens, value};
    const CircuitArgmaxArgs args{circuit.logits, data_or_null(evidence),
                                 tokens.mutable_data_ptr<int64_t>(), value.mutable_data_ptr()};
    if (launches_kernels(leaf)) {
        const c10::DeviceGuard guard(leaf.device());
        check_launch(op, launch_circuit_argmax(args, current_stream(leaf)));
    } else {
        run_twin(twin().argmax, args, rows, twin().argmax_scratch(args.logits));
    }
    return {tokens, value};
}

std::tuple<Tensor, Tensor> spec_verify(const Tensor& target_in, const Tensor& tokens_in,
                                       const Tensor& conditional_in, const Tensor& posterior_in,
                                       const Tensor& leaf_in, const Tensor& uniforms_in,
                                       const OptionalTensor& num_evidence_in, double temperature) {
    constexpr auto op = "spec_verify";
    check_dim(op, "leaf", leaf_in, 4, "(B, K, C, V)");
    const int64_t B = leaf_in.size(0), K = leaf_in.size(1), C = leaf_in.size(2),
                  V = leaf_in.size(3);
    const auto device = leaf_in.device();
    SpecVerifyArgs args;
    args.leaf_dtype = dtype_of(op, "leaf", leaf_in);
    LX_CHECK(K >= 1 && C >= 1 && V >= 1, op,
             ": leaf must have positions, components and a vocabulary, got shape ",
             leaf_in.sizes());
    LX_CHECK(V <= kMaxSize && B <= kMaxSize, op, ": at most ", kMaxSize, " rows and tokens, got ",
             B, " and ", V);
    args.target_dtype = dtype_of(op, "target", target_in);
    check_shape(op, "target", target_in, "(B, K + 1, V)", {B, K + 1, V}, device);
    LX_CHECK((args.target_dtype == DType::kFloat64) == (args.leaf_dtype == DType::kFloat64), op,
             ": target must be float64 where leaf is, and only there, got ",
             target_in.scalar_type());
    check_shape(op, "tokens", tokens_in, "(B, K)", {B, K}, device);
    check_dtype(op, "tokens", tokens_in, at::kLong);
    check_shape(op, "conditional", conditional_in, "(B, K)", {B, K}, device);
    check_dtype(op, "conditional", conditional_in, accumulator(leaf_in));
    check_shape(op, "posterior", posterior_in, "(B, K, C)", {B, K, C}, device);
    check_dtype(op, "posterior", posterior_in, accumulator(leaf_in));
    LX_CHECK(temperature >= 0 && std::isfinite(temperature), op,
             ": temperature must be at least 0 and finite, got ", temperature);
    const Tensor uniforms = checked_uniforms(op, uniforms_in, "(B, K + 1)", {B, K + 1}, leaf_in);
    check_tokens(op, "tokens", tokens_in, 0, V);
    Tensor num_evidence;
    if (num_evidence_in) {
        check_shape(op, "num_evidence", *num_evidence_in, "(B,)", {B}, device);
        check_dtype(op, "num_evidence", *num_evidence_in, at::kLong);
        check_values(*num_evidence_in, [&](const int64_t* value) {
            for (int64_t row = 0; row < B; ++row)
                LX_CHECK(value[row] >= 0 && value[row] <= K, op, ": num_evidence[", row,
                         "] must be in [0, ", K, "], got ", value[row]);
        });
        num_evidence = num_evidence_in->contiguous();
    }
    const auto longs = leaf_in.options().dtype(at::kLong);
    Tensor accepted = at::empty({B}, longs), next_token = at::empty({B}, longs);
    if (B == 0) return {accepted, next_token};

    const Tensor target = row_contiguous(target_in), leaf = row_contiguous(leaf_in);
    const Tensor tokens = tokens_in.contiguous(), conditional = conditional_in.contiguous();
    const Tensor posterior = posterior_in.contiguous();
    args.rows = B;
    args.n_token = K;
    args.components = C;
    args.vocabulary = V;
    args.target = target.const_data_ptr();
    args.leaf = leaf.const_data_ptr();
    args.target_stride = target.stride(0);
    args.leaf_stride = leaf.stride(0);
    args.tokens = tokens.const_data_ptr<int64_t>();
    args.conditional = conditional.const_data_ptr();
    args.posterior = posterior.const_data_ptr();
    args.uniforms = uniforms.const_data_ptr();
    args.num_evidence = data_or_null(num_evidence);
    // Finite, so that the largest logit, which is 0 by then, stays 0.
    args.inverse_temperature = temperature == 0 ? 0 : std::min(1 / temperature, 1e38);
    args.accepted = accepted.mutable_data_ptr<int64_t>();
    args.next_token = next_token.mutable_data_ptr<int64_t>();
    if (launches_kernels(leaf)) {
        const c10::DeviceGuard guard(device);
        check_launch(op, launch_spec_verify(args, current_stream(leaf)));
    } else {
        run_twin(twin().verify, args, B, twin().verify_scratch(args));
    }
    return {accepted, next_token};
}

}  // namespace lora_ext
