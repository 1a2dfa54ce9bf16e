// Drafting from circuits and verification: checks, allocation, choice of CPU twin or CUDA kernel.
//
// Shapes: leaf (B, K, C, V); prior (B, C); trans (B, M, C, C); tokens (B, K); target (B, K + 1, V).
#include "ops/circuit_decode.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "lora_ext/circuit_decode.h"
#include "ops/checks.h"
#include "ops/circuit_args.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

thread_local Scratch row_scratch;

// Checked circuit of one op, and the tensors that own its memory.
struct Circuit {
    const char* op;
    CircuitLogits logits;
    CircuitWeights weights;
    Tensor leaf, workspace;

    // `block_bytes` returns the bytes of shared memory that a thread block needs for one row.
    Circuit(const char* op, std::string_view kind, const Tensor& leaf_in,
            const OptionalTensor& prior, const OptionalTensor& trans,
            int64_t (*block_bytes)(const CircuitLogits&) = circuit_row_bytes)
        : op(op) {
        check_dim(op, "leaf", leaf_in, 4, "(B, K, C, V)");
        weights = circuit_weights(op, kind, leaf_in, "leaf", prior, trans);
        leaf = batch_of_rows(leaf_in);
        logits.circuit = weights.params;
        logits.dtype = dtype_of(op, "leaf", leaf);
        logits.vocabulary = leaf.size(3);
        logits.leaf = leaf.const_data_ptr();
        logits.leaf_stride = leaf.stride(0);
        require(logits.vocabulary > 0 && logits.vocabulary <= kMaxSize, op, "leaf",
                expected("1 to ", kMaxSize, " tokens"), found(leaf.sizes()));
        if (!launches_kernels(leaf)) return;
        const c10::DeviceGuard guard(leaf.device());
        require(weights.params.n_token * weights.params.components <= kMaxSize &&
                    block_bytes(logits) <= circuit_block_bytes(),
                op, "leaf",
                expected("positions and components that fit in ", circuit_block_bytes(),
                         " bytes of shared memory"),
                found("shape ", leaf.sizes(), ", which needs ", block_bytes(logits)));
        if (const int64_t bytes = circuit_workspace_bytes(logits)) {
            workspace = at::empty({bytes}, leaf.options().dtype(at::kByte));
            logits.workspace = workspace.mutable_data_ptr();
        }
    }

    Tensor tokens() const {
        const CircuitParams& c = logits.circuit;
        return at::empty({c.rows, c.n_token}, leaf.options().dtype(at::kLong));
    }
    Tensor values(at::IntArrayRef sizes) const {
        return at::empty(sizes, leaf.options().dtype(accumulator_of(leaf)));
    }

    int64_t logits_per_row() const { return leaf.size(1) * leaf.size(2) * leaf.size(3); }

    Tensor checked_evidence(const OptionalTensor& evidence) const {
        if (!evidence) return {};
        const CircuitParams& c = logits.circuit;
        check_shape(op, "evidence", *evidence, "(B, K)", {c.rows, c.n_token}, leaf.device());
        check_dtype(op, "evidence", *evidence, at::kLong);
        check_range(op, "evidence", *evidence, -1, logits.vocabulary);
        const Tensor tokens = evidence->contiguous();
        if (launches_kernels(leaf)) return tokens;
        const int64_t* token = tokens.const_data_ptr<int64_t>();
        for (int64_t i = 0; i < tokens.numel(); ++i)
            require(i % c.n_token == 0 || token[i] < 0 || token[i - 1] >= 0, op,
                    words("evidence[", i / c.n_token, ", ", i % c.n_token, "]"),
                    expected("-1 after a -1, as the given tokens must come first"),
                    found(token[i]));
        return tokens;
    }
};

const int64_t* data_or_null(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
}

// Uniforms are float32; they may be float64 if the logits are.
Tensor checked_uniforms(const char* op, const Tensor& uniforms, const char* letters,
                        at::IntArrayRef sizes, const Tensor& logits) {
    check_shape(op, "uniforms", uniforms, letters, sizes, logits.device());
    if (uniforms.scalar_type() != accumulator_of(logits))
        check_dtype(op, "uniforms", uniforms, at::kFloat);
    const Tensor wide = uniforms.to(accumulator_of(logits)).contiguous();
    check_uniforms(op, wide);
    return wide;
}

const CircuitDecodeCpu& twin() {
    return chosen_twins<CircuitDecodeCpu>();
}
// Smallest number of logits per thread: below it a parallel region costs more than it saves.
constexpr int64_t kSerialLogits = 1 << 13;

template <typename Args>
void run_twin(void (*f)(const Args&, int64_t, int64_t, void*), const Args& args, int64_t rows,
              int64_t logits_per_row, int64_t scratch_bytes) {
    for_items(rows, logits_per_row, kSerialLogits, [&](int64_t begin, int64_t end) {
        f(args, begin, end, row_scratch.get(scratch_bytes));
    });
}

}  // namespace

Tensor circuit_conditional_dist(std::string_view kind, const Tensor& leaf,
                                const OptionalTensor& prior, const OptionalTensor& trans,
                                const Tensor& x_in, const Tensor& k_in) {
    constexpr auto op = "circuit_conditional_dist";
    const Circuit circuit(op, kind, leaf, prior, trans);
    const CircuitParams& c = circuit.logits.circuit;
    const int64_t V = circuit.logits.vocabulary;
    check_shape(op, "x", x_in, "(B, K)", {c.rows, c.n_token}, leaf.device());
    check_dtype(op, "x", x_in, at::kLong);
    check_shape(op, "k", k_in, "(B,)", {c.rows}, leaf.device());
    check_dtype(op, "k", k_in, at::kLong);
    check_range(op, "k", k_in, 0, c.n_token);
    check_range(op, "x", x_in, -1, V);
    const Tensor x = x_in.contiguous(), k = k_in.contiguous();
    Tensor out = circuit.values({c.rows, V});
    if (c.rows == 0) return out;
    const CircuitConditionalArgs args{circuit.logits, x.const_data_ptr<int64_t>(),
                                      k.const_data_ptr<int64_t>(), out.mutable_data_ptr()};
    if (launches_kernels(leaf)) {
        const c10::DeviceGuard guard(leaf.device());
        check_launch(op, launch_circuit_conditional_dist(args, current_stream(leaf)));
    } else {
        run_twin(twin().conditional_dist, args, c.rows, circuit.logits_per_row(),
                 twin().sample_scratch(args.logits));
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor> circuit_sample(std::string_view kind, const Tensor& leaf,
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
        run_twin(twin().sample, args, c.rows, circuit.logits_per_row(),
                 twin().sample_scratch(args.logits));
    }
    return {tokens, conditional, posterior};
}

std::tuple<Tensor, Tensor> circuit_argmax(std::string_view kind, const Tensor& leaf,
                                          const OptionalTensor& prior, const OptionalTensor& trans,
                                          const OptionalTensor& evidence_in) {
    constexpr auto op = "circuit_argmax";
    const Circuit circuit(op, kind, leaf, prior, trans, circuit_argmax_bytes);
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
        run_twin(twin().argmax, args, rows, circuit.logits_per_row(),
                 twin().argmax_scratch(args.logits));
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
    require(K >= 1 && C >= 1 && V >= 1, op, "leaf",
            expected("at least one position, component and token"), found(leaf_in.sizes()));
    require(V <= kMaxSize && B <= kMaxSize, op, "leaf",
            expected("at most ", kMaxSize, " rows and tokens"), found(leaf_in.sizes()));
    args.target_dtype = dtype_of(op, "target", target_in);
    check_shape(op, "target", target_in, "(B, K + 1, V)", {B, K + 1, V}, device);
    require((args.target_dtype == DType::kFloat64) == (args.leaf_dtype == DType::kFloat64), op,
            "target", expected("float64 if and only if leaf is float64"),
            found(target_in.scalar_type()));
    check_shape(op, "tokens", tokens_in, "(B, K)", {B, K}, device);
    check_dtype(op, "tokens", tokens_in, at::kLong);
    check_shape(op, "conditional", conditional_in, "(B, K)", {B, K}, device);
    check_dtype(op, "conditional", conditional_in, accumulator_of(leaf_in));
    check_shape(op, "posterior", posterior_in, "(B, K, C)", {B, K, C}, device);
    check_dtype(op, "posterior", posterior_in, accumulator_of(leaf_in));
    require(temperature >= 0 && std::isfinite(temperature), op, "temperature",
            expected("a finite number of at least 0"), found(temperature));
    const Tensor uniforms = checked_uniforms(op, uniforms_in, "(B, K + 1)", {B, K + 1}, leaf_in);
    check_range(op, "tokens", tokens_in, 0, V);
    Tensor num_evidence;
    if (num_evidence_in) {
        check_shape(op, "num_evidence", *num_evidence_in, "(B,)", {B}, device);
        check_dtype(op, "num_evidence", *num_evidence_in, at::kLong);
        check_range(op, "num_evidence", *num_evidence_in, 0, K + 1);
        num_evidence = num_evidence_in->contiguous();
    }
    const auto longs = leaf_in.options().dtype(at::kLong);
    Tensor accepted = at::empty({B}, longs), next_token = at::empty({B}, longs);
    if (B == 0) return {accepted, next_token};

    const Tensor target = batch_of_rows(target_in), leaf = batch_of_rows(leaf_in);
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
    // Clamped to finite values, because the largest logit, shifted to 0, must stay 0 when scaled.
    args.inverse_temperature = temperature == 0 ? 0 : std::clamp(1 / temperature, 1e-37, 1e38);
    args.accepted = accepted.mutable_data_ptr<int64_t>();
    args.next_token = next_token.mutable_data_ptr<int64_t>();
    if (launches_kernels(leaf)) {
        const c10::DeviceGuard guard(device);
        Tensor workspace;
        if (const int64_t bytes = spec_verify_workspace_bytes(args)) {
            workspace = at::empty({bytes}, leaf_in.options().dtype(at::kByte));
            args.workspace = workspace.mutable_data_ptr();
        }
        check_launch(op, launch_spec_verify(args, current_stream(leaf)));
    } else {
        run_twin(twin().verify, args, B, (C + 1) * V, twin().verify_scratch(args));
    }
    return {accepted, next_token};
}

}  // namespace lora_ext
