// The walk through a circuit from left to right, for all kernels: one template for all kinds of
// circuits, which calls a functor at each position. csrc/cpu/circuit_walk.h is the vectorised CPU
// counterpart.
//
// A team walks one row of the batch: a warp for up to 32 states, a block for more. Thread i of a
// team of size s owns the states i, i + s, ... of every vector. It reads a matrix in two ways:
//
//   first the rows of its states       for the normalisers, and for projections up the tree,
//   then the columns of its states     for the step log sum_z exp(cur[z]) softmax(a[z])[z'].
//
// The sums therefore need no exchange between threads, and the second read of a matrix hits L1. If
// a warp walks, in a step each lane stores the probabilities of its row to shared memory, and then
// sums one column of them.
// Bound: the bytes of the matrices, read once from memory. A sum may lose terms to underflow, at
// most 2^-126 each, which is 2^-36 of a sum above kTrusted. If a sum is below kTrusted, its owner
// recomputes it as log-sum-exp of exact logarithms.
//
// Vectors are in shared memory and may be read by the whole team after it has synchronised; every
// function here synchronises before it returns. Control flow around synchronisation depends only on
// (kind, K, C).
#pragma once

#include "lora_ext/circuit.h"
#include "lx/device.h"

namespace lora_ext {

constexpr int kWarpStates = 32;  // maximum number of states of a row walked by a warp
constexpr float kTrusted = 0x1p-90f;
constexpr float kImpossible = -__builtin_huge_valf();

LX_DEVICE float shift_of(float top) {
    return top == kImpossible ? 0.0f : top;
}
LX_DEVICE float add(float a, float b) {
    return a + b;
}
LX_DEVICE float larger(float a, float b) {
    return fmaxf(a, b);
}

struct WarpTeam {
    static constexpr int kScratch = 0;
    LX_DEVICE explicit WarpTeam(float*) {}
    LX_DEVICE int rank() const { return lx::lane_id(); }
    LX_DEVICE int size() const { return lx::kWarpSize; }
    LX_DEVICE void sync() const { lx::syncwarp(); }
    // Reduces x over all threads in a fixed tree; every thread receives the result.
    template <class Op>
    LX_DEVICE float reduce(float x, Op op) const {
#pragma unroll
        for (int mask = lx::kWarpSize / 2; mask > 0; mask /= 2)
            x = op(x, lx::shfl_xor_sync(lx::kFullMask, x, mask));
        return x;
    }
};

struct BlockTeam {
    static constexpr int kScratch = 32;
    float* partial;
    LX_DEVICE explicit BlockTeam(float* scratch) : partial(scratch) {}
    LX_DEVICE int rank() const { return lx::thread_rank(); }
    LX_DEVICE int size() const { return static_cast<int>(blockDim.x); }
    LX_DEVICE void sync() const { lx::syncthreads(); }
    template <class Op>
    LX_DEVICE float reduce(float x, Op op) const {
        x = WarpTeam(nullptr).reduce(x, op);
        lx::syncthreads();  // the partial results of the previous call have been read
        if (lx::lane_id() == 0) partial[lx::warp_id()] = x;
        lx::syncthreads();
        float total = partial[0];
        for (int w = 1; w < size() / lx::kWarpSize; ++w) total = op(total, partial[w]);
        return total;
    }
};
inline unsigned block_team_size(int64_t components) {
    return static_cast<unsigned>(lx::min<int64_t>(ceil_div(components, 32) * 32, 256));
}

// ------------------------------------------------------------------------------------------------
// Rows of numbers, read 16 bytes at a time if they are aligned

template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

template <class T>
LX_DEVICE void unpack_piece(uint4 words, float (&v)[kPiece<T>]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
            const float2 pair = lx::unpack_floats<T>(w[i]);
            v[2 * i] = pair.x;
            v[2 * i + 1] = pair.y;
        } else {
            v[i] = lx::bit_cast<float>(w[i]);
        }
    }
}
// Calls f(index, values) for pieces `first`, `first + step`, ... of n elements; values beyond n are
// -inf. If `aligned`, p is aligned to 16 bytes, n is a multiple of a piece, and kBatch pieces are
// in flight at once: beyond the end a lane reloads the first piece of its batch without calling f.
// No lane loads a piece of another lane, so f may overwrite the elements that it receives in
// memory.
template <int kBatch = 4, class T, class F>
LX_DEVICE void for_pieces(const T* p, int n, bool aligned, int first, int step, F&& f) {
    constexpr int kSize = kPiece<T>;
    if (aligned) {
#pragma unroll 1
        for (int i = first * kSize; i < n; i += kBatch * step * kSize) {
            uint4 words[kBatch];
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                const int at = i + k * step * kSize;
                words[k] = lx::load_global(reinterpret_cast<const uint4*>(p + (at < n ? at : i)));
            }
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                const int at = i + k * step * kSize;
                float v[kSize];
                unpack_piece<T>(words[k], v);
                if (at < n) f(at, v);
            }
        }
    } else {
        for (int i = first * kSize; i < n; i += step * kSize) {
            float v[kSize];
#pragma unroll
            for (int j = 0; j < kSize; ++j) v[j] = i + j < n ? lx::to_float(p[i + j]) : kImpossible;
            f(i, v);
        }
    }
}

// Running log-sum-exp: maximum `top`, and `sum` of exp(v - top).
struct OnlineSum {
    float top = kImpossible, sum = 0;

    template <int kCount>
    LX_DEVICE void add(const float (&v)[kCount]) {
        float most = top;
#pragma unroll
        for (int j = 0; j < kCount; ++j) most = fmaxf(most, v[j]);
        const float shift = shift_of(most);
        sum *= lx::exp_approx(top - shift);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum += lx::exp_approx(v[j] - shift);
        top = most;
    }
    LX_DEVICE float log() const { return logf(sum) + shift_of(top); }
};

// ------------------------------------------------------------------------------------------------
// One row of the batch

// Distance between rows of probabilities in shared memory, in floats: eight lanes that store four
// floats each, in different rows, access different banks.
constexpr int kProbabilityStride = kWarpStates + 4;

// Returns the number of floats in shared memory for the probabilities of one matrix, or 0 if a
// block walks or there are no matrices.
LX_HOST_DEVICE constexpr int64_t circuit_probability_floats(const CircuitParams& c) {
    const bool kept = c.components <= kWarpStates && circuit_num_transitions(c.kind, c.n_token) > 0;
    return kept ? kProbabilityStride * c.components : 0;
}
// Returns the number of floats of a team's share of dynamic shared memory, a multiple of four.
LX_HOST_DEVICE constexpr int64_t circuit_walk_floats(const CircuitParams& c, int64_t team_scratch) {
    const int64_t levels = c.kind == CircuitKind::kBTree ? circuit_tree_levels(c.n_token) : 1;
    const int64_t first = circuit_probability_floats(c) + (c.components + 3) / 4 * 4;
    return (first + 4 * levels + (2 * levels + 3) * c.components + team_scratch + 3) / 4 * 4;
}

template <class P, class Team>
struct CircuitWalk {
    static constexpr bool kWarp = Team::kScratch == 0;
    const CircuitParams& c;
    Team team;
    const P* prior;
    const P* trans;
    int n;
    bool aligned;                    // rows of trans are aligned to 16 bytes
    float *probabilities, *weights;  // aligned to 16 bytes
    double* bases;
    float *vectors, *top, *log_sum, *u;

    LX_DEVICE CircuitWalk(const CircuitParams& c, int64_t row, bool aligned, float* scratch)
        : c(c),
          team(scratch + circuit_walk_floats(c, 0)),
          prior(c.prior ? static_cast<const P*>(c.prior) + row * c.prior_stride : nullptr),
          trans(static_cast<const P*>(c.trans) + row * c.trans_stride),
          n(static_cast<int>(c.components)),
          aligned(aligned),
          probabilities(scratch),
          weights(scratch + circuit_probability_floats(c)),
          bases(reinterpret_cast<double*>(weights + (n + 3) / 4 * 4)) {
        const int64_t levels = c.kind == CircuitKind::kBTree ? circuit_tree_levels(c.n_token) : 1;
        vectors = reinterpret_cast<float*>(bases) + 4 * levels;
        top = vectors + 2 * levels * n;
        log_sum = top + n;
        u = log_sum + n;
    }

    // Calls f(state) for the states that this thread owns.
    template <class F>
    LX_DEVICE void for_own(F&& f) const {
        for (int z = team.rank(); z < n; z += team.size()) f(z);
    }
    // Reduces f(state) over all states by op; every thread receives the result.
    template <class Op, class F>
    LX_DEVICE float reduce(float neutral, Op op, F&& f) const {
        float mine = neutral;
        for_own([&](int z) { mine = op(mine, f(z)); });
        return team.reduce(mine, op);
    }
    LX_DEVICE float max_of(const float* x) const {
        return reduce(kImpossible, larger, [&](int z) { return x[z]; });
    }
    LX_DEVICE const P* matrix_row(int64_t m, int z) const { return trans + (m * n + z) * n; }

    // Subtracts the maximum from x and returns it; impossible states remain impossible.
    LX_DEVICE float normalise(float* x) const {
        const float shift = shift_of(max_of(x));
        for_own([&](int z) { x[z] -= shift; });
        team.sync();
        return shift;
    }
    // Adds y to x, normalises x and returns its shift. y may be in any memory.
    LX_DEVICE float add_to(float* x, const float* y) const {
        for_own([&](int z) { x[z] += y[z]; });
        return normalise(x);
    }
    LX_DEVICE void start(float* cur) const {
        for_own([&](int z) { cur[z] = prior ? lx::to_float(prior[z]) : 0.0f; });
        normalise(cur);
        const float total = reduce(0.0f, add, [&](int z) { return lx::exp_approx(cur[z]); });
        const float log_total = total == 0 ? 0 : logf(total);
        for_own([&](int z) { cur[z] -= log_total; });
        team.sync();
    }

    // Computes the maximum of row z of matrix m, and the log of the sum of exp(a - top).
    LX_DEVICE void take_norms(int64_t m, int z) const {
        OnlineSum row;
        for_pieces(matrix_row(m, z), n, aligned, 0, 1, [&](int, const auto& v) { row.add(v); });
        top[z] = shift_of(row.top);
        log_sum[z] = row.sum == 0 ? 0 : logf(row.sum);  // no possible state: every probability is 0
    }
    LX_DEVICE float log_p(const P* a, int z, int j) const {
        return lx::to_float(a[int64_t{z} * n + j]) - top[z] - log_sum[z];
    }

    // Computes the norms of row z of matrix m and, if a warp walks, stores its probabilities.
    LX_DEVICE void take_row(int64_t m, int z) const {
        take_norms(m, z);
        if constexpr (kWarp) {
            const float row_top = top[z], row_log_sum = log_sum[z];
            float* const to = probabilities + z * kProbabilityStride;
            for_pieces(matrix_row(m, z), n, aligned, 0, 1, [&](int i, const auto& v) {
                float p[kPiece<P>];
#pragma unroll
                for (int j = 0; j < kPiece<P>; ++j)
                    p[j] = lx::exp_approx(v[j] - row_top - row_log_sum);
#pragma unroll
                for (int j = 0; j < kPiece<P>; j += 4)
                    *reinterpret_cast<float4*>(to + i + j) = {p[j], p[j + 1], p[j + 2], p[j + 3]};
            });
        }
    }
    // Returns P[z, j] of matrix `a`. take_row must have been called for row z.
    LX_DEVICE float p_at(const P* a, int z, int j) const {
        return kWarp ? probabilities[z * kProbabilityStride + j] : lx::exp_approx(log_p(a, z, j));
    }
    // Calls f(j, P[z, j], log_p) for a row z for which this thread has called take_row. log_p()
    // returns the logarithm of P[z, j].
    template <class F>
    LX_DEVICE void for_probabilities(int64_t m, int z, F&& f) const {
        if constexpr (kWarp) {
            for (int i = 0; i < n; i += 4) {
                const float4 four =
                    *reinterpret_cast<const float4*>(probabilities + z * kProbabilityStride + i);
                const float p[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (i + j < n)
                        f(i + j, p[j], [&] { return log_p(matrix_row(m, 0), z, i + j); });
            }
        } else {
            for_pieces(matrix_row(m, z), n, aligned, 0, 1, [&](int i, const auto& v) {
#pragma unroll
                for (int j = 0; j < kPiece<P>; ++j) {
                    const float own = v[j] - top[z] - log_sum[z];
                    if (i + j < n) f(i + j, lx::exp_approx(own), [&] { return own; });
                }
            });
        }
    }
    // Returns sum_z weights[z] P[z, j] with the probabilities in shared memory.
    LX_DEVICE float weighted_column(int j) const {
        const float* const column = probabilities + j;
        float sum = 0;
        int z = 0;
#pragma unroll 2
        for (; z + 4 <= n; z += 4) {
            const float4 weight = *reinterpret_cast<const float4*>(weights + z);
            sum += weight.x * column[z * kProbabilityStride];
            sum += weight.y * column[(z + 1) * kProbabilityStride];
            sum += weight.z * column[(z + 2) * kProbabilityStride];
            sum += weight.w * column[(z + 3) * kProbabilityStride];
        }
#pragma unroll 1
        for (; z < n; ++z) sum += weights[z] * column[z * kProbabilityStride];
        return sum;
    }

    // Computes out[z'] = log sum_z exp(cur[z] + A[z, z']).
    LX_DEVICE void step(int64_t m, const float* cur, float* out) const {
        const float shift = shift_of(max_of(cur));
        for_own([&](int z) {
            weights[z] = lx::exp_approx(cur[z] - shift);
            if (cur[z] != kImpossible) return take_row(m, z);
            float* const to = probabilities + z * kProbabilityStride;  // the row is not read
            for (int i = 0; kWarp && i < n; i += 4)
                *reinterpret_cast<float4*>(to + i) = {0, 0, 0, 0};
        });
        team.sync();
        const P* a = matrix_row(m, 0);
        for_own([&](int j) {
            float sum = 0;
            if constexpr (kWarp) {
                sum = weighted_column(j);
            } else {
                for (int z = 0; z < n; ++z) {
                    if (cur[z] == kImpossible) continue;
                    sum += weights[z] * lx::exp_approx(log_p(a, z, j));
                }
            }
            out[j] = sum < kTrusted ? exact_step(a, cur, j) : logf(sum) + shift;
        });
        team.sync();
    }
    LX_DEVICE float exact_step(const P* a, const float* cur, int j) const {
        OnlineSum sum;
        for (int z = 0; z < n; ++z) {
            if (cur[z] == kImpossible) continue;
            const float term[1] = {cur[z] + log_p(a, z, j)};
            sum.add(term);
        }
        return sum.log();
    }

    // Computes out[z] = log sum_z' exp(A[z, z'] + up[z']).
    LX_DEVICE void project(int64_t m, const float* up, float* out) const {
        const float shift = shift_of(max_of(up));
        for_own([&](int z) { weights[z] = lx::exp_approx(up[z] - shift); });
        team.sync();
        for_own([&](int z) {
            OnlineSum row;
            const P* a = matrix_row(m, z);
            for_pieces(a, n, aligned, 0, 1, [&](int, const auto& v) { row.add(v); });
            const float shift_row = shift_of(row.top), log_row = logf(row.sum);
            float sum = 0;
            for_pieces(a, n, aligned, 0, 1, [&](int i, const auto& v) {
#pragma unroll
                for (int j = 0; j < kPiece<P>; ++j)
                    if (i + j < n) sum += lx::exp_approx(v[j] - shift_row) * weights[i + j];
            });
            out[z] = row.sum == 0     ? kImpossible
                     : sum < kTrusted ? exact_project(a, shift_row, up) - log_row
                                      : logf(sum) - log_row + shift;
        });
        team.sync();
    }
    LX_DEVICE float exact_project(const P* a, float minus, const float* up) const {
        OnlineSum sum;
        for (int j = 0; j < n; ++j) {
            const float term[1] = {lx::to_float(a[j]) - minus + up[j]};
            sum.add(term);
        }
        return sum.log();
    }

    // Visits the positions in order.
    //
    //   observe(k, cur, base) -> e   receives log p(state at k = z, x_<k) = base + cur[z] and
    //                                returns e[z] = log p(x_k | z), in any memory;
    //   save(slot, vector)           receives the vectors for the backward pass: cur of position k
    //                                in slot k or, in the tree, three vectors for each matrix m:
    //                                cur after m in slot 3m, up in 3m + 1, projection of up in 3m +
    //                                2.
    //
    // The whole team calls both functions, each thread for the states that it owns.
    template <class Observe, class Save>
    LX_DEVICE void run(Observe&& observe, Save&& save) const {
        start(vectors);
        if (c.kind == CircuitKind::kBTree)
            run_tree(observe, save);
        else
            run_chain(observe, save);
    }
    template <class Observe>
    LX_DEVICE void run(Observe&& observe) const {
        run(observe, [](int64_t, const float*) {});
    }

    template <class Observe, class Save>
    LX_DEVICE void run_chain(Observe&& observe, Save&& save) const {
        float *cur = vectors, *next = vectors + n;
        double base = 0;
        for (int64_t k = 0; k < c.n_token; ++k) {
            if (k > 0 && c.kind == CircuitKind::kHMM) {
                step(k - 1, cur, next);
                float* const old = cur;
                cur = next;
                next = old;
            }
            save(k, cur);
            base += add_to(cur, observe(k, cur, base));
        }
    }

    // Each level l of the path to position k has two vectors at vectors + 2 l n: first cur, then
    // up.
    template <class Observe, class Save>
    LX_DEVICE void run_tree(Observe&& observe, Save&& save) const {
        const CircuitNode root{0, c.n_token, -1};
        const auto cur_at = [&](int level) { return vectors + 2 * level * n; };
        const auto up_at = [&](int level) { return vectors + (2 * level + 1) * n; };
        const auto open = [&](int level, double from) {
            for_own([&](int z) { up_at(level)[z] = 0; });
            if (team.rank() == 0) {
                bases[2 * level] = from;
                bases[2 * level + 1] = 0;
            }
            team.sync();
        };
        const auto join = [&](int level, const float* from, double from_base) {
            const double base = from_base + add_to(cur_at(level), from);
            const double up_base = from_base + add_to(up_at(level), from);
            if (team.rank() == 0) {
                bases[2 * level] += base;
                bases[2 * level + 1] += up_base;
            }
            team.sync();
        };
        open(0, 0);
        for (int64_t k = 0; k < c.n_token; ++k) {
            int level = 0;
            CircuitNode node = root;
            for (CircuitNode child = node.toward(k); !child.is_leaf(); child = node.toward(k)) {
                if (child.lo == k) {
                    step(child.matrix, cur_at(level), cur_at(level + 1));
                    save(3 * child.matrix, cur_at(level + 1));
                    open(level + 1, bases[2 * level]);
                }
                node = child;
                ++level;
            }
            join(level, observe(k, cur_at(level), bases[2 * level]), 0);
            for (; level > 0 && node.hi == k + 1; node = root.below(k, --level)) {
                save(3 * node.matrix + 1, up_at(level));
                project(node.matrix, up_at(level), u);
                save(3 * node.matrix + 2, u);
                join(level - 1, u, bases[2 * level + 1]);
            }
        }
    }
};

}  // namespace lora_ext
