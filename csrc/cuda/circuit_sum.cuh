// Code shared by the kernels of the sum layers: rows of weights of a warp, the rescue, and
// declarations of buffers.
#pragma once

#include "circuit_walk.cuh"
#include "lora_ext/circuit_sum.h"
#include "lora_kernels.cuh"

namespace lora_ext {

// A sum above kSumTrusted is accurate although terms below 2^-126 underflow; a smaller one is
// rescued, that is, recomputed from shifted terms. kTrustLog = -log(kSumTrusted).
constexpr float kSumTrusted = 0x1p-80f;
constexpr float kTrustLog = 55.451774f;

// One row of n weights, read by a warp: W_i = scaled(w_i) * exp(shift).
template <class T>
struct WarpWeights {
    const T* w;
    int n;
    bool aligned, probs, logits;
    float base = 0;     // largest entry; if all are impossible, 0, or 1 for probabilities
    float inverse = 1;  // 1 / base
    float lifted = 0;   // log(base) for probabilities, else base

    LX_DEVICE WarpWeights(const LogSumArgs& args, const T* w, int n, bool aligned)
        : w(w),
          n(n),
          aligned(aligned),
          probs(args.norm == WeightNorm::kProbs),
          logits(args.norm == WeightNorm::kLogits) {}

    template <class F>
    LX_DEVICE void for_own(F&& f) const {
        for_pieces(w, n, aligned, lx::lane_id(), lx::kWarpSize, f);
    }
    LX_DEVICE void set_top(float top) {
        base = probs ? (top >= 0x1p-126f ? top : 1.0f) : shift_of(top);
        inverse = lx::reciprocal_approx(base);  // an exact division would need a call and a stack
        lifted = probs ? logf(base) : base;
    }
    LX_DEVICE void find_top() {
        float top = kImpossible;
        for_own([&](int, const float (&v)[kPiece<T>]) {
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j) top = fmaxf(top, v[j]);
        });
        set_top(WarpTeam(nullptr).reduce(top, larger));
    }
    LX_DEVICE float scaled(float v) const {
        if (probs) return v <= 0 ? 0.0f : v * inverse;
        return lx::exp_approx(v - base);
    }
    // Returns log W_i - shift, which is at most 0.
    LX_DEVICE float log_scaled(float v) const {
        return probs ? logf(v <= 0 ? 0.0f : v) - lifted : v - base;
    }
    // Returns the shift of a row from the sum of its scaled weights.
    LX_DEVICE float shift(float total) const {
        if (total == 0) return kImpossible;
        return logits ? -logf(total) : lifted;
    }
    // Returns log sum W_i exp(l_i), with the terms shifted by their maximum.
    LX_DEVICE float rescue(const float* l, float row_shift) const {
        const WarpTeam warp(nullptr);
        float top = kImpossible;
        for_own([&](int i, const float (&v)[kPiece<T>]) {
            for (int j = 0; j < kPiece<T> && i + j < n; ++j)
                top = fmaxf(top, log_scaled(v[j]) + l[i + j]);
        });
        top = warp.reduce(top, larger);
        if (top == kImpossible) return top;
        float sum = 0;
        for_own([&](int i, const float (&v)[kPiece<T>]) {
            for (int j = 0; j < kPiece<T> && i + j < n; ++j)
                sum += expf(log_scaled(v[j]) + l[i + j] - top);
        });
        return top + logf(warp.reduce(sum, add)) + row_shift;
    }
    // Adds the flows of a rescued sum `out`: into[i] += g * (share of term i in the sum).
    LX_DEVICE void add_shares(const float* l, float row_shift, float out, float g,
                              float* into) const {
        for_own([&](int i, const float (&v)[kPiece<T>]) {
            for (int j = 0; j < kPiece<T> && i + j < n; ++j)
                into[i + j] += g * expf(log_scaled(v[j]) + l[i + j] + (row_shift - out));
        });
    }
};

// Returns the factor that converts sums relative to `top` to sums relative to `base`; 1 if there
// are no terms.
LX_DEVICE float fade(float top, float base) {
    return top == kImpossible ? 1.0f : lx::exp_approx(top - base);
}

LX_DEVICE bool was_rescued(float value_shift, float weight_shift, float out) {
    return out != kImpossible && value_shift + weight_shift - out >= kTrustLog;
}

template <class T>
LX_DEVICE const T* weights_of(const LogSumArgs& args, int64_t g, int64_t b, int64_t o) {
    return static_cast<const T*>(args.w) + g * args.w_group + b * args.w_row + o * args.w_sum;
}
LX_DEVICE const float* values_of(const LogSumArgs& args, int64_t g, int64_t b) {
    return static_cast<const float*>(args.values) + g * args.values_group + b * args.values_row;
}

// Stores the gradient of one weight, computed from its flow. For logits, scaled * factor is the
// weight's softmax times the sum of the flows of its row.
template <class T>
LX_DEVICE void store_dw(T* dw, float flow, float w, float scaled, float factor, WeightNorm norm) {
    float d = flow;
    if (norm == WeightNorm::kLogits) d -= scaled * factor;
    if (norm == WeightNorm::kProbs) d = w > 0 ? lx::divide_approx(flow, w) : 0.0f;
    *dw = lx::from_float<T>(d);
}

inline bool weights_aligned(const LogSumArgs& args) {
    return aligned_16(args.w, {args.w_group, args.w_row, args.w_sum, args.terms},
                      element_size(args.dtype));
}
inline void declare_weights(const LogSumArgs& args) {
    const int64_t size = element_size(args.dtype);
    for (int64_t g = 0; g < args.groups; ++g)
        for (int64_t b = 0; b < (args.w_row ? args.rows : 1); ++b)
            LX_BUF_ROWS(
                static_cast<const char*>(args.w) + (g * args.w_group + b * args.w_row) * size,
                args.sums, args.terms * size, args.w_sum * size, lx::Access::kConstant);
}
inline void declare_values(const LogSumArgs& args) {
    for (int64_t g = 0; g < args.groups; ++g)
        LX_BUF_ROWS(static_cast<const float*>(args.values) + g * args.values_group, args.rows,
                    args.terms * 4, args.values_row * 4, lx::Access::kConstant);
}
// Declares `count` contiguous floats.
inline void declare_floats(const void* p, int64_t count, lx::Access access) {
    LX_BUF(p, count * 4, access);
}

}  // namespace lora_ext
