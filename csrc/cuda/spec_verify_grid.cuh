// Code shared by the kernels that verify rows of many logits: the workspace through which they
// pass results on, sums of spans, and probabilities.
#pragma once

#include "spec_verify.cuh"

namespace lora_ext {

constexpr int kVerifyThreads = 256;
constexpr int kVerifyWarps = kVerifyThreads / lx::kWarpSize;
constexpr int kBlockTokens = 512;  // tokens per block of verify_weights

// The decision for a row of the batch.
struct VerifyDecision {
    Stats stats;  // statistics of the row of target from which the token is drawn
    int accepted;
};

// Workspace: results that one kernel writes for the next.
struct VerifySpace {
    int spans, blocks;
    OnlineSum* target;         // (B, K + 1, spans)
    int* argmax;               // (B, K + 1, spans), only if greedy
    OnlineSum* leaves;         // (B, C, spans)
    VerifyDecision* decision;  // (B,)
    double* sums;              // (B, 2, blocks): sums of max(0, p - q), and of p
    float* weights;            // (B, V): max(0, p - q)
};

// Adds the sums `next` to `own`. Each is a sum of exp((x - maximum) * scale), stored with its
// maximum.
template <int kCount>
LX_DEVICE void add_sums(OnlineSum& own, const OnlineSum (&next)[kCount], float scale) {
    float most = own.top;
#pragma unroll
    for (int u = 0; u < kCount; ++u) most = fmaxf(most, next[u].top);
    const float shift = shift_of(most);
    own.sum *= lx::exp_approx((own.top - shift) * scale);
#pragma unroll
    for (int u = 0; u < kCount; ++u)
        own.sum += next[u].sum * lx::exp_approx((next[u].top - shift) * scale);
    own.top = most;
}
// Returns the combined sum of a group of lanes to all lanes of the group.
LX_DEVICE OnlineSum sum_of_lanes(const OnlineSum& own, int lanes, float scale) {
    const float top = shift_of(reduce_lanes(own.top, lanes, larger));
    const float sum = own.sum * lx::exp_approx((own.top - top) * scale);
    return {top, reduce_lanes(sum, lanes, add)};
}
// Returns the sum of a row's spans. Eight lanes load them, each eight at a time. The whole warp
// must call this.
constexpr int kSpanLanes = 8, kWarpRows = lx::kWarpSize / kSpanLanes,
              kRowsAtOnce = kVerifyWarps * kWarpRows;
LX_DEVICE OnlineSum sum_of_spans(const OnlineSum* part, int spans, float scale) {
    constexpr int kBatch = 8;
    OnlineSum own;
#pragma unroll 1
    for (int first = 0; first < spans; first += kBatch * kSpanLanes) {
        const int at = first + lx::lane_id() % kSpanLanes;
        OnlineSum next[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const uint2 words = lx::load_global(
                reinterpret_cast<const uint2*>(part + lx::min(at + u * kSpanLanes, spans - 1)));
            next[u] = {lx::bit_cast<float>(words.x), lx::bit_cast<float>(words.y)};
        }
        lx::syncwarp();  // keeps the compiler from moving loads down to save registers
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
            if (at + u * kSpanLanes >= spans) next[u] = OnlineSum{};
        add_sums(own, next, scale);
    }
    return sum_of_lanes(own, kSpanLanes, scale);
}

// Returns the probability p of a token of the row.
LX_DEVICE float p_of(float logit, const Stats& stats, float scale) {
    const float factor = stats.sum > 0 ? lx::reciprocal_approx(stats.sum) : 0.0f;
    return lx::exp_approx((logit - stats.top) * scale) * factor;
}

// Declares the buffers of a kernel. The last arguments are its accesses to the sums of target, to
// the sums of leaves and to the weights.
inline void declare_space(const SpecVerifyArgs& args, const Leaves& leaves,
                          [[maybe_unused]] const VerifySpace& space,
                          [[maybe_unused]] lx::Access targets,
                          [[maybe_unused]] lx::Access of_leaves,
                          [[maybe_unused]] lx::Access of_weights) {
    [[maybe_unused]] const int64_t B = args.rows, K = args.n_token, C = args.components;
    declare_verify(args, leaves);
    LX_BUF(space.target, B * (K + 1) * space.spans * sizeof(OnlineSum), targets);
    LX_BUF(space.argmax, B * (K + 1) * space.spans * sizeof(int), targets);
    LX_BUF(space.leaves, B * C * space.spans * sizeof(OnlineSum), of_leaves);
    LX_BUF(space.decision, B * sizeof(VerifyDecision), of_leaves);
    LX_BUF(space.sums, B * 2 * space.blocks * sizeof(double), of_weights);
    LX_BUF(space.weights, B * args.vocabulary * sizeof(float), of_weights);
    LX_BUF(args.accepted, B * 8, lx::Access::kWrite);
    LX_BUF(args.next_token, B * 8, lx::Access::kWrite);
}

// Launches verify_weights and verify_pick, which choose the token (spec_verify_token.cu).
int64_t verify_weights_bytes(const SpecVerifyArgs& args);
LaunchStatus run_verify_token(const SpecVerifyArgs& args, const Leaves& leaves,
                              const LeafRows& target, const VerifySpace& space, void* stream);

}  // namespace lora_ext
