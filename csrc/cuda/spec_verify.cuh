// Code shared by the two variants of verification: one block per row of the batch (spec_verify.cu),
// or many blocks per row if it has too many logits for one multiprocessor (spec_verify_grid.cu).
#pragma once

#include "circuit_decode.cuh"

namespace lora_ext {

// Statistics of one row of target, that is, of the model's logits at one position.
struct Stats {
    float top, sum;  // sum of exp((logit - top) * scale)
    int argmax;
};

// Returns the number of leading tokens of a row that are evidence. These are not tested.
LX_DEVICE int given_tokens(const SpecVerifyArgs& args, int64_t row) {
    const int64_t given = args.num_evidence ? args.num_evidence[row] : 0;
    return static_cast<int>(lx::min(lx::max<int64_t>(given, 0), args.n_token));
}

// A drafted token and the inputs of its test, except the statistics of its row of target.
struct Draft {
    int64_t token;
    float logit;  // -inf if the token is invalid
    float log_q, uniform;
};
// Returns the draft at position k < K. logit(token) reads the row of target.
template <class Logit>
LX_DEVICE Draft draft_of(const SpecVerifyArgs& args, int64_t row, int k, Logit&& logit) {
    const int64_t at = row * args.n_token + k, token = args.tokens[at];
    return {token, token >= 0 && token < args.vocabulary ? logit(token) : kImpossible,
            static_cast<const float*>(args.conditional)[at],
            static_cast<const float*>(args.uniforms)[at + row]};
}
// Returns whether the draft is accepted; a scale of 0 means greedy decoding.
LX_DEVICE bool stands(const Draft& draft, const Stats& stats, float scale) {
    if (scale == 0) return draft.token == stats.argmax;
    const float log_p = (draft.logit - stats.top) * scale - logf(stats.sum);
    return stats.sum > 0 && draft.log_q != kImpossible && draft.uniform < expf(log_p - draft.log_q);
}

// Returns the norm (top, log_sum) of a state with its posterior p included, such that exp(logit -
// top - log_sum) = p exp(logit - norm.top - norm.log_sum). A state with posterior 0, or without a
// possible token, contributes 0 to each token.
LX_DEVICE Norm weight_of_state(const Norm& norm, float posterior) {
    const bool none = !(posterior > 0) || norm.log_sum == kImpossible;
    return {norm.top, none ? -kImpossible : norm.log_sum - logf(posterior)};
}

// Returns whether the variant with many blocks per row (spec_verify_grid.cu) is used.
bool verified_by_grid(const SpecVerifyArgs& args);
LaunchStatus run_verify_grid(const SpecVerifyArgs& args, const Leaves& leaves, bool aligned,
                             void* stream);

// Declares the buffers that the kernels of both variants read.
inline void declare_verify(const SpecVerifyArgs& args, const Leaves& leaves) {
    const int64_t B = args.rows, K = args.n_token, size = element_size(args.target_dtype);
    declare_leaves(leaves, B, K);
    LX_BUF_ROWS(args.target, B, (K + 1) * args.vocabulary * size, args.target_stride * size,
                lx::Access::kConstant);
    LX_BUF(args.tokens, B * K * 8, lx::Access::kConstant);
    LX_BUF(args.conditional, B * K * 4, lx::Access::kConstant);
    LX_BUF(args.posterior, B * K * args.components * 4, lx::Access::kConstant);
    LX_BUF(args.uniforms, B * (K + 1) * 4, lx::Access::kConstant);
    if (args.num_evidence) LX_BUF(args.num_evidence, B * 8, lx::Access::kConstant);
}

}  // namespace lora_ext
