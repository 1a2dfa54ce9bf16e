// Small matrix products in registers for the LoRA ops and the sum layers of circuits: dot_tile
// along the axis that is contiguous in both factors, sum_tile across it. Compiled per instruction
// set like vec.h. Each result has one accumulator, which adds in ascending order, for any tile.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 6;  // accumulators take 24 of 32 registers
#else
constexpr int kDotRows = 3;  // accumulators take 12 of 16 registers
#endif
constexpr int kDotRanks = 4;
constexpr int64_t kAheadA = 512;  // prefetch distance of `a` in bytes
constexpr int kToL2 = 2;          // locality argument of __builtin_prefetch

// acc[row][rank] += x[row] . a[rank] over [k, k_end). With few rows, most time is spent on reading
// `a`, so the ranks that follow are prefetched, from `next` if it is known.
template <typename T, int kRows, int kRanks>
LX_INLINE void dot_tile(const T* const* x, const T* a, int64_t a_row, int64_t k, int64_t k_end,
                        Vec<T> (&acc)[kRows][kRanks], const T* next = nullptr) {
    constexpr int L = kLanes<T>;
    // Inlined, because otherwise each step would store the sums to memory.
    const auto step = [&](auto&& get) __attribute__((always_inline)) {
        Vec<T> xs[kRows];
        for (int i = 0; i < kRows; ++i) xs[i] = get(x[i] + k);
        for (int j = 0; j < kRanks; ++j) {
            const Vec<T> as = get(a + j * a_row + k);
            for (int i = 0; i < kRows; ++i) acc[i][j] = fma(as, xs[i], acc[i][j]);
        }
    };
    const auto ahead = [&]() __attribute__((always_inline)) {
        if constexpr (kRows <= 2)
            for (int j = 0; j < kRanks; ++j) {
                if (next)
                    __builtin_prefetch(next + j * a_row + k, 0, kToL2);
                else
                    __builtin_prefetch(reinterpret_cast<const char*>(a + j * a_row + k) + kAheadA);
            }
    };
    if constexpr (kPairs<T>)
        for (; k + 2 * L <= k_end; k += 2 * L) {
            ahead();
            Pairs xs[kRows];
            for (int i = 0; i < kRows; ++i) xs[i] = load_bits<Pairs>(x[i] + k);
            for (int j = 0; j < kRanks; ++j) {
                const Pairs as = load_bits<Pairs>(a + j * a_row + k);
                for (int i = 0; i < kRows; ++i) acc[i][j] = dot_pairs(as, xs[i], acc[i][j]);
            }
        }
    for (; k + L <= k_end; k += L) {
        ahead();
        step([](const T* p) __attribute__((always_inline)) { return load(p); });
    }
    if (k < k_end)
        step([n = k_end - k](const T* p) __attribute__((always_inline)) { return load_n(p, n); });
}

// Calls f(row, rank, sum of the lanes of acc[row][rank]).
template <typename T, int kRows, int kRanks, typename F>
LX_INLINE void for_sums(const Vec<T> (&acc)[kRows][kRanks], F&& f) {
    for (int i = 0; i < kRows; ++i) {
        Vec<T> four[4];
        Acc<T> sums[4];
        for (int j = 0; j < 4; ++j) four[j] = acc[i][j < kRanks ? j : 0];
        sum_lanes<T>(four, sums);
        for (int j = 0; j < kRanks; ++j) f(i, j, sums[j]);
    }
}

// acc[row][vector] += sum of s(row, k) b[k][vector] over [0, depth)
template <typename A, int kRows, int kVecs, typename S>
LX_INLINE void sum_tile(const A* b, int64_t b_row, int64_t depth, S&& s,
                        Vec<A> (&acc)[kRows][kVecs]) {
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        Vec<A> bs[kVecs];
        for (int c = 0; c < kVecs; ++c) bs[c] = load(b + c * kLanes<A>);
        for (int i = 0; i < kRows; ++i) {
            const Vec<A> scalar = broadcast<A>(s(i, k));
            for (int c = 0; c < kVecs; ++c) acc[i][c] = fma(bs[c], scalar, acc[i][c]);
        }
    }
}

}  // namespace
}  // namespace lora_ext::LX_ISA
