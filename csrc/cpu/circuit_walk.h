// Walk of a circuit from left to right, one row of the batch at a time, shared by the CPU twins:
// one template for all kinds, with a functor that is called at each position.
//
//   step     out[z'] = log sum_z exp(cur[z] + A[z, z'])         cur before the latent z'
//   project  u[z]    = log sum_z' exp(A[z, z'] + up[z'])        the return up the tree
// with A = log softmax of a row of trans. Both compute with numbers relative to a maximum,
//   out = top + log sum_z p[z] E[z, z']
//   p[z] = exp(cur[z] - top) / sum E[z, :],  E = exp(a - max a)
// so that an element of a matrix costs one exponential. A sum below kTrusted may have lost terms to
// underflow; the vector of states that contains it is then recomputed as log-sum-exp of exact
// logarithms. If all terms are -inf, the sum is -inf.
//
// Logarithms are relative to a base in double, so that a chain of thousands of positions loses no
// digits. A vector of states is padded with -inf to whole vectors.
#pragma once

#include "lora_ext/circuit.h"

#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

// A sum above kTrusted is accurate: terms that underflow are below the smallest normal number, and
// even 2^10 of them are negligible in such a sum.
template <typename A>
constexpr A kTrusted = sizeof(A) == 4 ? A(0x1p-90) : A(0x1p-900);
template <typename A>
constexpr A kImpossible = -A(__builtin_inf());

template <typename A>
using VecA = Vec<A>;  // A is float or double, the accumulator type

// Return v with lanes from n on set to `other`.
template <typename V>
LX_INLINE V keep_first(V v, int64_t n, Element<V> other) {
    using I = Ints<V>;
    constexpr int kCount = sizeof(V) / sizeof(Element<V>);
    I lane;
    for (int i = 0; i < kCount; ++i) lane[i] = i;
    return lane < static_cast<typename Float<Element<V>>::Int>(n) ? v : splat<V>(other);
}
// Loads kLanes elements; lanes from n on are -inf.
template <typename T>
LX_INLINE Vec<T> load_padded(const T* p, int64_t n) {
    if (n >= kLanes<T>) return load(p);
    return keep_first(load_n(p, n), n, kImpossible<Acc<T>>);
}
// Copies n >= 1 elements, padded with -inf to whole vectors.
template <typename T>
LX_INLINE void copy_padded(const T* from, int64_t n, Acc<T>* to) {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load_padded(from + i, n - i));
}
// Below, `width` is a number of elements rounded up to whole vectors.
template <typename A>
LX_INLINE A max_of(const A* x, int64_t width) {
    VecA<A> top = load(x);
    for (int64_t i = kLanes<A>; i < width; i += kLanes<A>) top = max(top, load(x + i));
    return max_lane(top);
}
// Return the number to subtract before exp: the maximum, or 0 if all entries are -inf.
template <typename A>
LX_INLINE A shift_of(A top) {
    return top == kImpossible<A> ? A(0) : top;
}
// out = exp(x - shift); returns the sum of out.
template <typename A>
LX_INLINE A exp_of(const A* x, A shift, int64_t width, A* out) {
    VecA<A> sum{};
    for (int64_t i = 0; i < width; i += kLanes<A>) {
        const VecA<A> e = exp(load(x + i) - shift);
        store(out + i, e);
        sum += e;
    }
    return lane_sum(sum);
}
template <typename A>
LX_INLINE A log_of(A x) {
    return log(splat<VecA<A>>(x))[0];
}
// Subtracts the maximum from x and returns it; impossible states remain -inf.
template <typename A>
LX_INLINE A normalise(A* x, int64_t width) {
    const A shift = shift_of(max_of(x, width));
    for (int64_t i = 0; i < width; i += kLanes<A>) store(x + i, load(x + i) - shift);
    return shift;
}
template <typename A>
LX_INLINE void add_to(A* x, const A* y, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes<A>) store(x + i, load(x + i) + load(y + i));
}

// Softmax of a row of logits a: writes exp(a - top) to `out`, padded with zeros; stores top, sum.
template <typename P>
struct SoftmaxRow {
    Acc<P> top, sum;  // sum is 0 if all logits are -inf

    LX_INLINE SoftmaxRow(const P* a, int64_t n, Acc<P>* out) {
        constexpr int L = kLanes<P>;
        Vec<P> most = load_padded(a, n);
        for (int64_t i = L; i < n; i += L) most = max(most, load_padded(a + i, n - i));
        top = shift_of(max_lane(most));
        Vec<P> total{};
        for (int64_t i = 0; i < n; i += L) {
            const Vec<P> e = exp(load_padded(a + i, n - i) - top);
            store(out + i, e);
            total += e;
        }
        sum = lane_sum(total);
    }
    // Return log(sum); the softmax is exp(a - top) / sum.
    LX_INLINE Acc<P> log_sum() const { return log_of(sum); }
};

// Return the size of a walk's scratch, in elements of the accumulator type.
template <typename A>
LX_INLINE int64_t circuit_walk_scratch(const CircuitParams& c) {
    const int64_t levels =
        c.kind == CircuitKind::kBTree ? circuit_tree_levels(c.n_token) : int64_t{1};
    return whole_vectors<A>(c.components) * (2 * levels + 4 + kLanes<A>);
}

// x = 0, padded with -inf.
template <typename A>
LX_INLINE void fill_zero(A* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<A>)
        store(x + i, keep_first(VecA<A>{}, n - i, kImpossible<A>));
}

// cur = log softmax of the row's prior, or of zeros if the circuit has no prior.
template <typename P>
void log_prior(const CircuitParams& c, int64_t batch_row, Acc<P>* cur, Acc<P>* scratch) {
    const int64_t n = c.components, width = whole_vectors<P>(n);
    if (c.prior)
        copy_padded(static_cast<const P*>(c.prior) + batch_row * c.prior_stride, n, cur);
    else
        fill_zero(cur, n);
    normalise(cur, width);
    const Acc<P> sum = exp_of(cur, Acc<P>(0), width, scratch);
    if (sum == 0) return;
    const Acc<P> norm = log_of(sum);
    for (int64_t i = 0; i < width; i += kLanes<P>) store(cur + i, load(cur + i) - norm);
}

template <typename P>
struct CircuitStep {
    using A = Acc<P>;
    static constexpr int L = kLanes<P>;
    static constexpr int64_t kRows = kLanes<P>;     // rows of a matrix per step
    static constexpr int64_t kVectors = 4 + kRows;  // vectors of scratch

    const P* trans;  // transitions of this row of the batch
    int64_t n, width;
    A *weights, *top, *sum, *u;  // width each
    A* row;                      // kRows times width

    CircuitStep(const CircuitParams& c, int64_t batch_row, A* scratch)
        : trans(static_cast<const P*>(c.trans) + batch_row * c.trans_stride),
          n(c.components),
          width(whole_vectors<P>(n)),
          weights(scratch),
          top(scratch + width),
          sum(scratch + 2 * width),
          u(scratch + 3 * width),
          row(scratch + 4 * width) {}

    LX_INLINE const P* matrix_row(int64_t m, int64_t z) const { return trans + (m * n + z) * n; }

    void step(int64_t m, const A* cur, A* out) const {
        const A shift = shift_of(max_of(cur, width));
        exp_of(cur, shift, width, weights);
        for (int64_t i = 0; i < width; i += L) store(out + i, Vec<A>{});
        for (int64_t z = 0; z < n; z += kRows) add_rows(m, z, min(kRows, n - z), out);
        bool logarithms = false;
        for (int64_t i = 0; i < width; i += L) {
            const Vec<A> total = load(out + i);
            if (max_lane(keep_first(-total, n - i, A(-1))) > -kTrusted<A>) {
                if (!logarithms) take_logarithms(cur);
                logarithms = true;
                store(out + i, exact_step(m, cur, i));
            } else {
                store(out + i, log(total) + shift);
            }
        }
    }
    // out += sum_z weights[z] E[z, :] / sum E[z, :] over `count` rows. Maxima precede exponentials,
    // so that the rows' chains of operations overlap; the next rows are prefetched.
    void add_rows(int64_t m, int64_t first, int64_t count, A* out) const {
        const P* const a = matrix_row(m, first);
        for (int64_t z = 0; z < count; ++z) {
            Vec<A> most = load_padded(a + z * n, n);
            for (int64_t i = L; i < n; i += L) most = max(most, load_padded(a + z * n + i, n - i));
            top[first + z] = shift_of(max_lane(most));
        }
        for (int64_t z = 0; z < count; ++z) {
            const Vec<A> above = splat<Vec<A>>(top[first + z]);
            Vec<A> total{};
            for (int64_t i = 0; i < n; i += L) {
                __builtin_prefetch(a + (z + kRows) * n + i);
                const Vec<A> e = exp<false>(load_padded(a + z * n + i, n - i) - above);
                store(row + z * width + i, e);
                total += e;
            }
            sum[first + z] = lane_sum(total);
        }
        const Vec<A> total = load(sum + first), weight = load(weights + first);
        const Vec<A> p = total == Vec<A>{} ? total : weight / total;
        for (int64_t i = 0; i < n; i += L) {
            Vec<A> sum_of_rows = load(out + i);
            for (int64_t z = 0; z < count; ++z)
                if (p[z] != 0)
                    sum_of_rows = fma(splat<Vec<A>>(p[z]), load(row + z * width + i), sum_of_rows);
            store(out + i, sum_of_rows);
        }
    }
    // Replaces sum[z] by its logarithm, which exact_step reads.
    void take_logarithms(const A* cur) const {
        for (int64_t z = 0; z < n; ++z)
            if (cur[z] != kImpossible<A>) sum[z] = log_of(sum[z]);
    }
    Vec<A> exact_step(int64_t m, const A* cur, int64_t i) const {
        const auto for_terms = [&](auto&& f) __attribute__((always_inline)) {
            for (int64_t z = 0; z < n; ++z)
                if (cur[z] != kImpossible<A> && sum[z] != kImpossible<A>)
                    f(load_padded(matrix_row(m, z) + i, n - i) - top[z] + (cur[z] - sum[z]));
        };
        Vec<A> most = splat<Vec<A>>(kImpossible<A>), total{};
        for_terms([&](Vec<A> term) { most = max(most, term); });
        const Vec<A> shift = most == kImpossible<A> ? Vec<A>{} : most;
        for_terms([&](Vec<A> term) { total += exp(term - shift); });
        return log(total) + shift;
    }

    void project(int64_t m, const A* up, A* out) const {
        const A shift = shift_of(max_of(up, width));
        exp_of(up, shift, width, weights);
        for (int64_t z = 0; z < n; ++z) {
            const SoftmaxRow<P> soft(matrix_row(m, z), n, row);
            Vec<A> total{};
            for (int64_t i = 0; i < width; i += L)
                total = fma(load(row + i), load(weights + i), total);
            const A value = lane_sum(total);
            if (value < kTrusted<A> && soft.sum != 0) {
                top[z] = exact_project(m, z, soft.top, up) - soft.log_sum();
                sum[z] = 1;
            } else {
                top[z] = shift;
                sum[z] = soft.sum == 0 ? soft.sum : value / soft.sum;
            }
        }
        for (int64_t z = n; z < width; ++z) top[z] = sum[z] = 0;
        for (int64_t i = 0; i < width; i += L) store(out + i, log(load(sum + i)) + load(top + i));
    }
    A exact_project(int64_t m, int64_t z, A minus, const A* up) const {
        const P* a = matrix_row(m, z);
        const auto term = [&](int64_t i) __attribute__((always_inline)) {
            return load_padded(a + i, n - i) - minus + load(up + i);
        };
        Vec<A> most = term(0);
        for (int64_t i = L; i < n; i += L) most = max(most, term(i));
        const A shift = shift_of(max_lane(most));
        Vec<A> total{};
        for (int64_t i = 0; i < n; i += L) total += exp(term(i) - shift);
        return log_of(lane_sum(total)) + shift;
    }
};

struct SaveNothing {
    template <typename... Args>
    LX_INLINE void operator()(Args...) const {}
};

// Visits the positions of one row of the batch in order.
//
//   observe(k, cur, base) -> e   log p(state at k = z, x_<k) = base + cur[z]; e[z] = log p(x_k | z)
//   save(slot, vector)           vectors that the backward needs: cur of position k in slot k; in
//                                the tree, for each matrix m, cur after m in slot 3m, up in 3m + 1,
//                                the projection of up in 3m + 2
// All vectors have whole_vectors(C) elements: cur is -inf beyond C, and e must not be NaN or
// infinite there.
template <typename P, typename Observe, typename Save = SaveNothing>
void circuit_walk(const CircuitParams& c, int64_t batch_row, Acc<P>* scratch, Observe&& observe,
                  Save&& save = {}) {
    using A = Acc<P>;
    const CircuitStep<P> step(c, batch_row, scratch);
    const int64_t width = step.width;
    A* const vectors = scratch + step.kVectors * width;
    A* cur = vectors;
    log_prior<P>(c, batch_row, cur, step.row);
    double base = 0;
    if (c.kind != CircuitKind::kBTree) {
        for (int64_t k = 0; k < c.n_token; ++k) {
            if (k > 0 && c.kind == CircuitKind::kHMM) {
                A* const next = cur == vectors ? vectors + width : vectors;
                step.step(k - 1, cur, next);
                cur = next;
            }
            save(k, static_cast<const A*>(cur));
            add_to(cur, observe(k, static_cast<const A*>(cur), base), width);
            base += normalise(cur, width);
        }
        return;
    }

    // Level l of the path to position k has two vectors, at vectors + 2 l width: first cur, then
    // up.
    constexpr int kMaxLevels = 64;
    double bases[kMaxLevels] = {}, up_bases[kMaxLevels] = {};
    const CircuitNode root{0, c.n_token, -1};
    const auto cur_at = [&](int64_t l) { return vectors + 2 * l * width; };
    const auto up_at = [&](int64_t l) { return vectors + (2 * l + 1) * width; };
    const auto open = [&](int64_t l, double from) {
        bases[l] = from;
        up_bases[l] = 0;
        fill_zero(up_at(l), c.components);
    };
    const auto join = [&](int64_t l, const A* u, double u_base) {
        add_to(cur_at(l), u, width);
        add_to(up_at(l), u, width);
        bases[l] += u_base + normalise(cur_at(l), width);
        up_bases[l] += u_base + normalise(up_at(l), width);
    };
    open(0, 0);
    for (int64_t k = 0; k < c.n_token; ++k) {
        int64_t level = 0;
        CircuitNode node = root;
        for (CircuitNode child = node.toward(k); !child.is_leaf(); child = node.toward(k)) {
            if (child.lo == k) {
                step.step(child.matrix, cur_at(level), cur_at(level + 1));
                save(3 * child.matrix, static_cast<const A*>(cur_at(level + 1)));
                open(level + 1, bases[level]);
            }
            node = child;
            ++level;
        }
        const A* const here = cur_at(level);
        join(level, observe(k, here, bases[level]), 0);
        for (; level > 0 && node.hi == k + 1; node = root.below(k, --level)) {
            save(3 * node.matrix + 1, static_cast<const A*>(up_at(level)));
            step.project(node.matrix, up_at(level), step.u);
            save(3 * node.matrix + 2, static_cast<const A*>(step.u));
            join(level - 1, step.u, up_bases[level]);
        }
    }
}

}  // namespace
}  // namespace lora_ext::LX_ISA
