// Shrink: v[t, r] = scale * dot(a[r], x[t]), a small GEMM along I.
//
// Order of the sum: one vector accumulator, lane l takes k = l, l + L, l + 2L ... ascending; then
// the tree of sum_lanes(). It depends neither on threads nor on the rows beside it.
#pragma once

#include "lora_rows.h"

namespace lora_ext::LX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 6;  // 24 accumulators of 32 registers
#else
constexpr int kDotRows = 3;  // 12 accumulators of 16 registers
#endif
constexpr int kDotRanks = 4;
constexpr int kGroupRows = 24;    // rows and ranks whose accumulators wait on the stack
constexpr int kGroupRanks = 32;   // between two blocks of I
constexpr int kDotBlock = 1024;   // of I; 4 ranks of float are half of a 32 KiB L1
constexpr int64_t kAheadA = 512;  // bytes: how far ahead of use A is prefetched

// acc[row][rank] += x[row] . a[rank] over [k, k_end)
template <typename T, int kRows, int kRanks>
LX_INLINE void dot_tile(const T* const* x, const T* a, int64_t a_row, int64_t k, int64_t k_end,
                        Vec<T> (&acc)[kRows][kRanks]) {
    constexpr int L = kLanes<T>;
    const auto step = [&](auto&& get) {
        Vec<T> xs[kRows];
        for (int i = 0; i < kRows; ++i) xs[i] = get(x[i] + k);
        for (int j = 0; j < kRanks; ++j) {
            const Vec<T> as = get(a + j * a_row + k);
            for (int i = 0; i < kRows; ++i) acc[i][j] = fma(as, xs[i], acc[i][j]);
        }
    };
    for (; k + L <= k_end; k += L) {
        if constexpr (kRows <= 2)
            for (int j = 0; j < kRanks; ++j)
                __builtin_prefetch(reinterpret_cast<const char*>(a + j * a_row + k) + kAheadA);
        step([](const T* p) __attribute__((always_inline)) { return load(p); });
    }
    if (k < k_end)
        step([n = k_end - k](const T* p) __attribute__((always_inline)) { return load_n(p, n); });
}

template <typename T, int kRows, int kRanks>
LX_INLINE void write_v(const Vec<T> (&acc)[kRows][kRanks], Acc<T> scale, const Rows<Acc<T>>& v,
                       int64_t row, int64_t rank) {
    for (int i = 0; i < kRows; ++i) {
        Vec<T> four[4];
        Acc<T> sums[4];
        for (int j = 0; j < 4; ++j) four[j] = acc[i][j < kRanks ? j : 0];
        sum_lanes<T>(four, sums);
        Acc<T>* out = v[row + i] + rank;
        for (int j = 0; j < kRanks; ++j) out[j] = scale * sums[j];
    }
}

// Few rows: one pass over A, nothing waits in memory.
template <typename T, int kRows>
void shrink_few(const Slot<T>& slot, const Rows<const T>& x, const Rows<Acc<T>>& v) {
    const T* xs[kRows];
    for (int i = 0; i < kRows; ++i) xs[i] = x[i];
    for (int64_t r = 0; r < slot.rank; r += kDotRanks)
        with_constant<kDotRanks>(min(slot.rank - r, kDotRanks), [&](auto ranks) {
            Vec<T> acc[kRows][ranks.value] = {};
            dot_tile<T, kRows, ranks.value>(xs, slot.a_at(r), slot.a_row, 0, slot.in, acc);
            write_v<T>(acc, slot.scale, v, 0, r);
        });
}

// kGroupRows x kGroupRanks dot products, block by block of I: the block of A stays in L1 or L2 for
// all rows, the rows of x stay in L2 for all ranks. Accumulators wait as vectors, so the blocks do
// not change the order of the sum.
//
// `kept` stands between the rows and their use: kept(row, k, k_end) is the address of x[row][0], or
// of a copy with some elements of [k, k_end) dropped.
template <typename T, typename Kept>
void shrink_group(const Slot<T>& slot, Kept&& kept, int64_t rows, int64_t rank_begin,
                  int64_t rank_end, const Rows<Acc<T>>& v) {
    Vec<T> waiting[kGroupRows * kGroupRanks];
    const T* xk[kGroupRows];
    for (int64_t k = 0; k < slot.in; k += kDotBlock) {
        const int64_t k_end = min(k + kDotBlock, slot.in);
        for (int64_t row = 0; row < rows; ++row) xk[row] = kept(row, k, k_end);
        Vec<T>* saved = waiting;
        for (int64_t r = rank_begin; r < rank_end; r += kDotRanks)
            with_constant<kDotRanks>(min(rank_end - r, kDotRanks), [&](auto ranks) {
                for (int64_t row = 0, tiles = blocks_of(rows, kDotRows), n; row < rows; row += n) {
                    n = blocks_of(rows - row, tiles--);
                    with_constant<kDotRows>(n, [&](auto count) {
                        const T* xs[count.value];
                        for (int i = 0; i < count.value; ++i) xs[i] = xk[row + i];
                        Vec<T> acc[count.value][ranks.value] = {};
                        if (k > 0) __builtin_memcpy(acc, saved, sizeof(acc));
                        dot_tile<T, count.value, ranks.value>(xs, slot.a_at(r), slot.a_row, k,
                                                              k_end, acc);
                        if (k_end < slot.in)
                            __builtin_memcpy(saved, acc, sizeof(acc));
                        else
                            write_v<T>(acc, slot.scale, v, row, r);
                        saved += count.value * ranks.value;
                    });
                }
            });
    }
}

template <typename T>
void shrink_rows(const Slot<T>& slot, const Rows<const T>& x, int64_t rows, const Rows<Acc<T>>& v) {
    if (rows <= kDotRows)
        return with_constant<kDotRows>(rows, [&](auto n) { shrink_few<T, n.value>(slot, x, v); });
    for (int64_t row = 0; row < rows; row += kGroupRows)
        for (int64_t r = 0; r < slot.rank; r += kGroupRanks)
            shrink_group<T>(
                slot, [from = x.from(row)](int64_t i, int64_t, int64_t) { return from[i]; },
                min(rows - row, kGroupRows), r, min(r + kGroupRanks, slot.rank), v.from(row));
}

}  // namespace
}  // namespace lora_ext::LX_ISA
