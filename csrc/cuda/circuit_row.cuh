// A block that walks one row of the batch with the leaves of its positions.
//
// With up to 32 states and 4096 tokens, one warp walks: all warps first compute the norms of the
// leaves of all positions, then only the first warp walks, without block barriers. Otherwise the
// whole block walks and computes a position's norms when it reaches the position.
#pragma once

#include "circuit_decode.cuh"

namespace lora_ext {

constexpr int kMaxWarpTokens = 4096;  // with more, one warp would need too long to read a row

template <class Team>
constexpr bool kByWarp = Team::kScratch == 0;
template <class Team>
constexpr int kRowThreads = kByWarp<Team> ? 512 : 256;

// Returns the number of floats in shared memory before the walk's vectors: sums of a draw (double),
// norms, state and e.
template <class Team>
LX_HOST_DEVICE constexpr int64_t own_floats(const CircuitParams& c) {
    const int64_t norms = kByWarp<Team> ? c.n_token * c.components : c.components;
    return (2 * kDrawChunks + 2 * norms + 2 * c.components + 3) / 4 * 4;
}
template <class Team>
int64_t shared_bytes(const CircuitParams& c) {
    return 4 * (own_floats<Team>(c) + circuit_walk_floats(c, Team::kScratch));
}
// Returns whether a warp walks, that is, whether there are few states and the norms of all
// positions fit in shared memory.
inline bool walks_by_warp(const CircuitLogits& logits) {
    const CircuitParams& c = logits.circuit;
    return c.components <= kWarpStates && logits.vocabulary <= kMaxWarpTokens &&
           shared_bytes<WarpTeam>(c) <= most_dynamic_bytes();
}

// The shared memory of a block, and access to the norms.
template <class Team>
struct Row {
    const Leaves& leaves;
    const Norm* given;  // norms from run_norms, or nullptr
    int64_t row;
    int components;
    double* sums;
    Norm* norms;
    float *state, *e, *walk;

    LX_DEVICE Row(const CircuitLogits& logits, const Leaves& leaves, int64_t row, float* shared)
        : leaves(leaves),
          given(norms_of(logits, row)),
          row(row),
          components(static_cast<int>(leaves.components)),
          sums(reinterpret_cast<double*>(shared)),
          norms(reinterpret_cast<Norm*>(sums + kDrawChunks)) {
        const CircuitParams& c = logits.circuit;
        state = reinterpret_cast<float*>(norms) +
                2 * (kByWarp<Team> ? c.n_token * c.components : c.components);
        e = state + c.components;
        walk = shared + own_floats<Team>(c);
    }
    // Computes `count` norms from position k on. They may belong to several positions, whose rows
    // are contiguous.
    LX_DEVICE void take_norms(int64_t k, int count) const {
        for_norms(leaves.rows(row, k), count, lx::warp_id(), kRowThreads<Team> / lx::kWarpSize,
                  [&](int z, const Norm& norm) { norms[z] = norm; });
    }
    // Computes the norms of all positions before the walk, if a warp walks.
    LX_DEVICE void prepare(int64_t positions) const {
        if (kByWarp<Team> && !given) {
            take_norms(0, static_cast<int>(positions) * components);
            lx::syncthreads();
        }
    }
    // Returns the norms of position k during the walk.
    LX_DEVICE const Norm* norms_at(int64_t k) const {
        if (given) return given + k * components;
        if constexpr (kByWarp<Team>) {
            return norms + k * components;
        } else {
            lx::syncthreads();  // the norms of the previous position have been read
            take_norms(k, components);
            lx::syncthreads();
            return norms;
        }
    }
    // Returns the norms of position k without computing them; k must be the last argument of
    // norms_at.
    LX_DEVICE const Norm* last_norms(int64_t k) const {
        return given ? given + k * components : norms + (kByWarp<Team> ? k * components : 0);
    }
};

// Computes state = softmax(cur) and returns the logarithm of the softmax's denominator. The team is
// synchronised at the end.
template <class Walk>
LX_DEVICE float posterior_of(const Walk& walk, const float* cur, float* state) {
    const float shift = shift_of(walk.max_of(cur));
    const float sum =
        walk.reduce(0.0f, add, [&](int z) { return state[z] = lx::exp_approx(cur[z] - shift); });
    const float factor = sum > 0 ? lx::reciprocal_approx(sum) : 0.0f;
    walk.for_own([&](int z) { state[z] *= factor; });
    walk.team.sync();
    return logf(sum) + shift;
}

// Calls run_norms and then f<P, Team>(leaves, aligned) with the C++ type of the circuit's
// parameters and the team that walks. declare() must declare the kernel's buffers that are not part
// of the circuit.
template <class Declare, class F>
LaunchStatus with_circuit(const CircuitLogits& logits, const int64_t* last, void* stream,
                          Declare&& declare, F&& f) {
    const CircuitParams& c = logits.circuit;
    const Leaves leaves =
        leaves_of(logits.leaf, logits.leaf_stride, logits.dtype, c.components, logits.vocabulary);
    if (const LaunchStatus status = run_norms(logits, leaves, last, stream)) return status;
    declare_circuit(logits, leaves);
    declare();
    const bool aligned = trans_aligned(c);
    return with_dtype(c.dtype, [&]<class P>() {
        return walks_by_warp(logits) ? f.template operator()<P, WarpTeam>(leaves, aligned)
                                     : f.template operator()<P, BlockTeam>(leaves, aligned);
    });
}

}  // namespace lora_ext
