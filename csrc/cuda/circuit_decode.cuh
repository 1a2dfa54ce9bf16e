// Code shared by the decoding kernels: reading rows of logits of any dtype, and drawing from them.
//
// A group of lanes reads a row of V logits in 16-byte loads. The number of lanes and the order of
// every sum depend only on V and the dtype. The dtype of the leaves may differ from that of the
// op's other arguments; kernels receive it as an argument and branch on it, and all threads take
// the same branch.
#pragma once

#include "circuit_kernels.cuh"
#include "lora_ext/circuit_decode.h"

namespace lora_ext {

constexpr int kDrawChunks = 1024;  // maximum number of partial sums of a draw

// log_lanes_of_row returns the binary logarithm of the number of lanes that read a row of V logits,
// and lanes_of_row returns the number. It is chosen so that each lane has a few loads.
template <class T>
LX_HOST_DEVICE constexpr int log_lanes_of_row(int vocabulary) {
    const int pieces = vocabulary / kPiece<T>;
    return pieces >= 128 ? 5 : pieces >= 64 ? 4 : pieces >= 16 ? 3 : 2;
}
template <class T>
LX_DEVICE int lanes_of_row(int vocabulary) {
    return 1 << log_lanes_of_row<T>(vocabulary);
}
// Reduces x by `op` over the group of `lanes` lanes that contains this lane, in a fixed tree.
template <class X, class Op>
LX_DEVICE X reduce_lanes(X x, int lanes, Op op) {
    for (int mask = lanes / 2; mask > 0; mask /= 2)
        x = op(x, lx::shfl_xor_sync(lx::kFullMask, x, mask));
    return x;
}

// The C rows of leaf logits of one position.
struct LeafRows {
    const void* first;
    DType dtype;
    int vocabulary;
    bool aligned;

    // Calls f with row z as a pointer of its C++ type.
    template <class F>
    LX_DEVICE auto with_row(int z, F&& f) const {
        const int64_t at = int64_t{z} * vocabulary;
        switch (dtype) {
            case DType::kFloat16:
                return f(static_cast<const lx::f16*>(first) + at);
            case DType::kBFloat16:
                return f(static_cast<const lx::bf16*>(first) + at);
            default:
                return f(static_cast<const float*>(first) + at);
        }
    }
    // Loads logits i to i + 3 of row z; logits beyond the end of the row are -inf.
    LX_DEVICE void load_four(int z, int i, float (&v)[4]) const {
        with_row(z, [&]<class T>(const T* row) {
            if (!aligned) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    v[j] =
                        i + j < vocabulary ? lx::to_float(lx::load_nc(row + i + j)) : kImpossible;
            } else if constexpr (sizeof(T) == 2) {
                const uint2 words = lx::load_nc(reinterpret_cast<const uint2*>(row + i));
                const float2 low = lx::unpack_floats<T>(words.x);
                const float2 high = lx::unpack_floats<T>(words.y);
                v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
            } else {
                const float4 words = lx::load_nc(reinterpret_cast<const float4*>(row + i));
                v[0] = words.x, v[1] = words.y, v[2] = words.z, v[3] = words.w;
            }
        });
    }
    LX_DEVICE float at(int z, int64_t v) const {
        return with_row(z, [&](const auto* row) { return lx::to_float(lx::load_nc(row + v)); });
    }
};
// The leaves of a batch. The rows of leaf logits of all positions are contiguous.
struct Leaves {
    const void* leaf;
    int64_t stride;  // elements between rows of the batch
    int64_t components;
    DType dtype;
    int vocabulary;
    bool aligned;

    LX_DEVICE LeafRows rows(int64_t row, int64_t k) const {
        const int64_t at = row * stride + k * components * vocabulary;
        const char* p = static_cast<const char*>(leaf) + at * (dtype == DType::kFloat32 ? 4 : 2);
        return {p, dtype, vocabulary, aligned};
    }
};
inline Leaves leaves_of(const void* leaf, int64_t stride, DType dtype, int64_t components,
                        int64_t vocabulary) {
    return {leaf,
            stride,
            components,
            dtype,
            static_cast<int>(vocabulary),
            aligned_16(leaf, {stride, vocabulary}, element_size(dtype))};
}
inline void declare_leaves(const Leaves& leaves, int64_t rows, int64_t n_token) {
    const int64_t size = element_size(leaves.dtype);
    declare_batch(leaves.leaf, rows, n_token * leaves.components * leaves.vocabulary * size,
                  leaves.stride * size, lx::Access::kConstant);
}

// Returns whether the rows of the transitions are aligned to 16 bytes.
inline bool trans_aligned(const CircuitParams& c) {
    return aligned_16(c.trans, {c.trans_stride, c.components}, element_size(c.dtype));
}
// Declares to the emulator the buffers of a circuit that a kernel reads.
inline void declare_circuit(const CircuitLogits& logits, const Leaves& leaves) {
    const CircuitParams& c = logits.circuit;
    const int64_t size = element_size(c.dtype), C = c.components;
    const int64_t M = circuit_num_transitions(c.kind, c.n_token);
    declare_leaves(leaves, c.rows, c.n_token);
    if (c.prior)
        declare_batch(c.prior, c.rows, C * size, c.prior_stride * size, lx::Access::kConstant);
    if (M > 0)
        declare_batch(c.trans, c.rows, M * C * C * size, c.trans_stride * size,
                      lx::Access::kConstant);
    if (logits.workspace)
        LX_BUF(logits.workspace, circuit_workspace_bytes(logits), lx::Access::kRead);
}

// The normaliser of a row of logits. log p = logit - top - log_sum keeps the digits of large
// logits, because `top` is subtracted first. If log_sum is -inf, no token is possible.
struct Norm {
    float top, log_sum;
    LX_DEVICE float log_p(float logit) const {
        return log_sum == kImpossible ? kImpossible : logit - top - log_sum;
    }
};
// Returns the norm to every lane of a group, computed from the partial sums of the group's lanes.
LX_DEVICE Norm norm_of(const OnlineSum& mine, int lanes) {
    const float shift = shift_of(reduce_lanes(mine.top, lanes, larger));
    return {shift, logf(reduce_lanes(mine.sum * lx::exp_approx(mine.top - shift), lanes, add))};
}

// Calls f(z, norm) for the rows z in [0, count) of `rows`, each on one lane. `warps` warps share
// the rows, and this is warp `warp` of them. All their lanes must call this.
template <class F>
LX_DEVICE void for_norms(const LeafRows& rows, int count, int warp, int warps, F&& f) {
    rows.with_row(0, [&]<class T>(const T* first) {
        const int lanes = lanes_of_row<T>(rows.vocabulary), lane = lx::lane_id();
        const int per_warp = lx::kWarpSize / lanes;
        for (int z0 = warp * per_warp; z0 < count; z0 += warps * per_warp) {
            const int z = z0 + lane / lanes;
            OnlineSum mine;
            if (z < count)
                for_pieces(first + int64_t{z} * rows.vocabulary, rows.vocabulary, rows.aligned,
                           lane % lanes, lanes, [&](int, const auto& v) { mine.add(v); });
            const Norm norm = norm_of(mine, lanes);
            if (z < count && lane % lanes == 0) f(z, norm);
        }
    });
}
// Launches the kernel that computes the norms of all leaves, (B, K, C), before a kernel that walks.
// Does nothing without a workspace, which exists only if the logits of a row of the batch are too
// many for one multiprocessor. If `last` is given, only positions up to last[row] are computed.
LaunchStatus run_norms(const CircuitLogits& logits, const Leaves& leaves, const int64_t* last,
                       void* stream);
// Returns the norms of a row of the batch from the workspace, or nullptr.
LX_DEVICE const Norm* norms_of(const CircuitLogits& logits, int64_t row) {
    const int64_t states = logits.circuit.n_token * logits.circuit.components;
    return logits.workspace ? static_cast<const Norm*>(logits.workspace) + row * states : nullptr;
}

// The largest of n numbers and its first index, the same on every lane of the warp. Each lane
// passes the largest of its own numbers.
struct Largest {
    float value;
    int index;
};
LX_DEVICE Largest largest_among(int n, float top, int index) {
    const float best = reduce_lanes(top, lx::kWarpSize, larger);
    index = lx::reduce_min_sync(lx::kFullMask, top == best ? index : 0x7fffffff);
    return {best, index < n ? index : 0};  // 0 if all are -inf or NaN
}
template <class T>
LX_DEVICE Largest largest_of(const T* row, int n, bool aligned) {
    float top = kImpossible;
    int index = 0x7fffffff;
    for_pieces(row, n, aligned, lx::lane_id(), lx::kWarpSize, [&](int i, const auto& v) {
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) {
            if (v[j] > top) {
                top = v[j];
                index = i + j;
            }
        }
    });
    return largest_among(n, top, index);
}

// ------------------------------------------------------------------------------------------------
// Draws. Each warp computes the same result. Weights are float and their sums double, so that small
// weights are not lost in a sum.

// Returns the sum of x over the lanes from 0 to this one.
LX_DEVICE double running_sum(double x) {
#pragma unroll
    for (int delta = 1; delta < lx::kWarpSize; delta *= 2) {
        const double below = lx::shfl_up_sync(lx::kFullMask, x, static_cast<unsigned>(delta));
        if (lx::lane_id() >= delta) x += below;
    }
    return x;
}
LX_DEVICE double last_lane(double x) {
    return lx::shfl_sync(lx::kFullMask, x, lx::kWarpSize - 1);
}
// Returns the first lane in the mask `hit`, or the last lane in the mask `has` if `hit` is 0.
LX_DEVICE int pick_lane(unsigned hit, unsigned has) {
    return hit ? lx::ffs(hit) - 1 : lx::kWarpSize - 1 - lx::clz(has);
}

// Result of a draw: the first index whose running sum exceeds `limit`, else the last of weight > 0.
struct Place {
    int index = -1;     // -1: no weight is positive
    double before = 0;  // sum of the weights before `index`
    double limit = 0;   // uniform * sum of all weights
};
// Draws among n weights. at(i) returns weight i + lane on each lane, and 0 beyond the last weight.
template <class At>
LX_DEVICE Place find_among(int n, double uniform, At&& at) {
    Place place;
    double carry = 0;
    for (int i = 0; i < n; i += lx::kWarpSize) carry = last_lane(carry + running_sum(at(i)));
    place.limit = uniform * carry;
    carry = 0;
    for (int i = 0; i < n; i += lx::kWarpSize) {
        const double own = at(i), sum = carry + running_sum(own);
        const unsigned has = lx::ballot_sync(lx::kFullMask, own > 0);
        const unsigned hit = lx::ballot_sync(lx::kFullMask, own > 0 && sum > place.limit);
        if (has) {
            const int lane_of = pick_lane(hit, has);
            const double below = lx::shfl_sync(lx::kFullMask, sum, lx::max(lane_of - 1, 0));
            place.index = i + lane_of;
            place.before = lane_of > 0 ? below : carry;
        }
        if (hit) break;
        carry = last_lane(sum);
    }
    return place;
}
// Draws among n weights of type float or double in shared memory.
template <class X>
LX_DEVICE Place find(const X* values, int n, float uniform) {
    const int lane = lx::lane_id();
    return find_among(n, uniform,
                      [&](int i) -> double { return i + lane < n ? values[i + lane] : X{0}; });
}

// Draws among n weights; weights(i, w) sets w to the kCount weights from i on, zero beyond the end.
// A warp reads a chunk of weights at a time, `steps` loads of kCount per lane. The first pass sums
// each chunk in a fixed tree and stores the results in `sums`, kDrawChunks numbers in shared
// memory. The second pass recomputes the weights of the selected chunk. All threads of the team
// call this function, and all return the same index.
template <int kCount, class Team, class Weights>
LX_DEVICE int draw(const Team& team, double* sums, int n, float uniform, Weights&& weights) {
    constexpr int kStep = kCount * lx::kWarpSize;
    const int lane = lx::lane_id();
    const int loads = (n + kStep - 1) / kStep;
    const int steps = (loads + kDrawChunks - 1) / kDrawChunks;
    const int chunks = (loads + steps - 1) / steps;
    const auto sum_at = [&](int chunk, int step, float (&w)[kCount]) {
        const int i = (chunk * steps + step) * kStep + kCount * lane;
        double sum = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) w[j] = 0;
        if (i < n) weights(i, w);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum += w[j];
        return sum;
    };
    float w[kCount];
    team.sync();  // the sums of the previous draw have been read
    for (int c = team.rank() / lx::kWarpSize; c < chunks; c += team.size() / lx::kWarpSize) {
        double sum = 0;
        for (int s = 0; s < steps; ++s) sum += sum_at(c, s, w);
        sum = reduce_lanes(sum, lx::kWarpSize, [](double a, double b) { return a + b; });
        if (lane == 0) sums[c] = sum;
    }
    team.sync();
    const Place chunk = find(sums, chunks, uniform);
    if (chunk.index < 0) return -1;
    int found = 0;
    double carry = chunk.before;
    for (int s = 0; s < steps; ++s) {
        const double own = sum_at(chunk.index, s, w), sum = carry + running_sum(own);
        const unsigned has = lx::ballot_sync(lx::kFullMask, own > 0);
        const unsigned hit = lx::ballot_sync(lx::kFullMask, own > 0 && sum > chunk.limit);
        double below = lx::shfl_up_sync(lx::kFullMask, sum, 1u);
        if (lane == 0) below = carry;
        int mine = -1;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            if (w[j] > 0 && (mine < 0 || !(below > chunk.limit))) {
                below += w[j];
                mine = j;
            }
        }
        if (has) {
            const int lane_of = pick_lane(hit, has);
            found = (chunk.index * steps + s) * kStep + kCount * lane_of +
                    lx::shfl_sync(lx::kFullMask, mine, lane_of);
        }
        if (hit) break;
        carry = last_lane(sum);
    }
    return found;
}

// Draws a token from the softmax of row z, whose largest logit is `top`.
template <class Team>
LX_DEVICE int draw_token(const Team& team, double* sums, const LeafRows& rows, int z, float top,
                         float uniform) {
    return draw<4>(team, sums, rows.vocabulary, uniform, [&](int i, float (&w)[4]) {
        rows.load_four(z, i, w);
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = lx::exp_approx(w[j] - top);
    });
}

}  // namespace lora_ext
