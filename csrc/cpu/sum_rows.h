// Rows of weights and of log-values, for sum layers and whole circuits; formulas in circuit_sum.h.
// Compiled per instruction set like vec_math.h.
//
// A sum over a row has one accumulator vector, whose lanes are added at the end, in an order that
// depends only on the instruction set.
#pragma once

#include "lora_ext/circuit_sum.h"
#include "parts.h"
#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());
// -log of 2^-80 (double: 2^-900). Sums above 2^-80 are accurate, although terms below 2^-126 are
// lost.
template <typename A>
constexpr A kTrust = sizeof(A) == 4 ? A(55.451774) : A(623.8324625);
template <typename A>
constexpr A kTiny = sizeof(A) == 4 ? A(0x1p-80) : A(0x1p-900);

template <typename A>
LX_INLINE A log_of(A x) {
    return log(splat<Vec<A>>(x))[0];
}
template <typename A>
LX_INLINE A exp_of(A x) {
    return exp(splat<Vec<A>>(x))[0];
}

// Loads `count` lanes and sets the others to `fill`.
template <typename T>
LX_INLINE Vec<T> load_or(const T* p, int64_t count, Acc<T> fill) {
    if (count == kLanes<T>) return load(p);
    Vec<T> v = load_n(p, count);
    for (int64_t i = count; i < kLanes<T>; ++i) v[i] = fill;
    return v;
}
template <typename T>
LX_INLINE Acc<T> row_max(const T* p, int64_t n) {
    using A = Acc<T>;
    Vec<T> top = broadcast<T>(-kInfinity<A>);
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        top = max(top, load_or(p + i, count, -kInfinity<A>));
    });
    return max_lane(top);
}

// Largest of n numbers and the first index that attains it, or -inf and 0 if all are -inf. f(first,
// count) returns them a vector at a time. NaN is skipped.
template <typename T>
struct Best {
    Acc<T> value;
    int64_t index;
};
template <typename T, typename F>
LX_INLINE Best<T> best_of(int64_t n, F&& f) {
    using A = Acc<T>;
    Vec<T> best = broadcast<T>(-kInfinity<A>);
    Ints<Vec<T>> index{}, at{};
    for (int j = 0; j < kLanes<T>; ++j) at[j] = j;
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<T> v = f(i, count);
        const auto better = v > best;
        best = better ? v : best;
        index = better ? at : index;
        at += kLanes<T>;
    });
    int64_t lane = 0;
    for (int64_t j = 1; j < kLanes<T>; ++j)
        if (best[j] > best[lane] || (best[j] == best[lane] && index[j] < index[lane])) lane = j;
    const bool possible = best[lane] != -kInfinity<A>;
    return {best[lane], possible ? static_cast<int64_t>(index[lane]) : 0};
}

// ------------------------------------------------------------------------------------------------
// A row of weights: W_i = scaled(i) * exp(shift).

template <typename T>
struct WeightRow {
    using A = Acc<T>;
    const T* w;
    WeightNorm norm;
    A base;    // largest entry; for a row without possible terms a value that scales it to 0
    A lifted;  // log(base) for norm kProbs, else base

    LX_INLINE WeightRow(const T* w, int64_t n, WeightNorm norm) : w(w), norm(norm) {
        const A top = row_max(w, n);
        if (norm == WeightNorm::kProbs) {
            base = top > 0 ? top : A(1);
            lifted = log_of(base);
        } else {
            base = lifted = top == -kInfinity<A> ? A(0) : top;
        }
    }
    LX_INLINE Vec<T> scaled(int64_t i, int64_t count) const {
        const Vec<T> v = load_or(w + i, count, -kInfinity<A>);
        if (norm == WeightNorm::kProbs) return (v <= Vec<T>{} ? Vec<T>{} : v) / base;
        return exp<false>(v - base);
    }
    // log W_i - shift; at most 0.
    LX_INLINE Vec<T> log_scaled(int64_t i, int64_t count) const {
        const Vec<T> v = load_or(w + i, count, -kInfinity<A>);
        if (norm == WeightNorm::kProbs) return log(v <= Vec<T>{} ? Vec<T>{} : v) - lifted;
        return v - base;
    }
    // Return the shift, given the sum of scaled(i) over the row.
    LX_INLINE A shift(A total) const {
        if (total == 0) return -kInfinity<A>;
        return norm == WeightNorm::kLogits ? -log_of(total) : lifted;
    }
};

// Writes scaled(i) and returns the shift.
template <typename T>
LX_INLINE Acc<T> scale_row(const T* w, int64_t n, WeightNorm norm, Acc<T>* scaled) {
    const WeightRow<T> row(w, n, norm);
    Vec<T> total{};
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<T> e = row.scaled(i, count);
        total += e;
        store_part(scaled + i, e, count);
    });
    return row.shift(lane_sum(total));
}

// Scales consecutive rows of n logits or log-weights by their largest entry. Writes the scaled rows
// to `to`, and maxima and sums per row; each output may be null. Four rows at a time hide the
// latency of the maximum and the sum.
template <typename A, int kRows>
LX_INLINE void scale_tile(const A* w, int64_t n, A* to, A* tops, A* totals) {
    Vec<A> top[kRows], total[kRows] = {};
    for (int r = 0; r < kRows; ++r) top[r] = broadcast<A>(-kInfinity<A>);
    for_vectors<A>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r)
            top[r] = max(top[r], load_or(w + r * n + i, count, -kInfinity<A>));
    });
    A base[kRows];
    for (int r = 0; r < kRows; ++r) {
        const A largest = max_lane(top[r]);
        if (tops) tops[r] = largest;
        base[r] = largest == -kInfinity<A> ? A(0) : largest;
    }
    if (!to && !totals) return;
    for_vectors<A>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r) {
            const Vec<A> e =
                exp<false>(load_or(w + r * n + i, count, -kInfinity<A>) - broadcast<A>(base[r]));
            total[r] += e;
            if (to) store_part(to + r * n + i, e, count);
        }
    });
    if (!totals) return;
    for (int r = 0; r < kRows; ++r) totals[r] = lane_sum(total[r]);
}
template <typename A>
LX_INLINE void scale_rows(const A* w, int64_t rows, int64_t n, A* to, A* tops, A* totals) {
    const auto from = [](A* p, int64_t i) { return p ? p + i : nullptr; };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        scale_tile<A, 4>(w + r * n, n, from(to, r * n), from(tops, r), from(totals, r));
    for (; r < rows; ++r)
        scale_tile<A, 1>(w + r * n, n, from(to, r * n), from(tops, r), from(totals, r));
}
// Converts sums of scaled logits to shifts; a row without possible terms has shift -inf.
template <typename A>
LX_INLINE void shifts_of(A* totals, int64_t count) {
    for_vectors<A>(0, count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vec<A> total = load_part(totals + i, n);
        store_part(totals + i, total == 0 ? broadcast<A>(-kInfinity<A>) : -log(total), n);
    });
}

// log sum W_i exp(l_i), with the terms shifted by their own maximum.
template <typename T>
Acc<T> rescue(const WeightRow<T>& row, const Acc<T>* l, int64_t n, Acc<T> shift) {
    using A = Acc<T>;
    Vec<T> tops = broadcast<T>(-kInfinity<A>), sums{};
    const auto term = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        return row.log_scaled(i, count) + load_or(l + i, count, -kInfinity<A>);
    };
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        tops = max(tops, term(i, count));
    });
    const A top = max_lane(tops);
    if (top == -kInfinity<A>) return top;
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        sums += exp(term(i, count) - top);
    });
    return top + log_of(lane_sum(sums)) + shift;
}
// into[i] += g * share of term i, for an `out` that was rescued.
template <typename T>
void add_shares(const WeightRow<T>& row, const Acc<T>* l, int64_t n, Acc<T> shift, Acc<T> out,
                Acc<T> g, Acc<T>* into) {
    using A = Acc<T>;
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<T> share =
            exp(row.log_scaled(i, count) + load_or(l + i, count, -kInfinity<A>) + (shift - out));
        store_part(into + i, load_part(into + i, count) + g * share, count);
    });
}

// Return -log s, where s is the sum of scaled weights times scaled values.
template <typename A>
LX_INLINE A depth_of(A value_shift, A weight_shift, A out) {
    return value_shift + weight_shift - out;
}
template <typename A>
LX_INLINE bool was_rescued(A value_shift, A weight_shift, A out) {
    return out != -kInfinity<A> && depth_of(value_shift, weight_shift, out) >= kTrust<A>;
}

}  // namespace
}  // namespace lora_ext::LX_ISA
