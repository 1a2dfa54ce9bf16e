// Product of two sides over their long axis. A side has up to 64 ranks of a factor a or b. The long
// axis is the in-features of a or the outputs of b.
//
// A block iterates over the long axis in steps of 4096 elements (16-bit types with float sums:
// 8192, doubles: 2048). All threads load the next step, in pieces of 16 bytes, while they sum the
// current step from shared memory, where elements have the type of the sums. A thread has 4 x 4
// sums; in a diagonal tile, only sums with i >= j are computed. If a tile has few ranks, its
// threads form groups that divide the elements, four at a time: 25 groups at 16 ranks, 7 at 32, one
// at 64.
#pragma once

#include "lora_ext/lora_gram.h"

#include "launch.cuh"

namespace lora_ext {

constexpr int kGramThreads = 256;
constexpr int kGramRanks = static_cast<int>(kGramTile);
constexpr int kGramPad = 4;    // padding of each rank of a, to put eight ranks in different banks
constexpr int kGramSums = 16;  // sums per thread, 4 x 4

template <class T>
constexpr int kGramVec = 16 / static_cast<int>(sizeof(T));
// Log2 of the number of elements of a step, counted over both sides.
template <class T, class S>
constexpr int kGramLogStep = sizeof(T) == 8                     ? 11
                             : sizeof(T) == 2 && sizeof(S) == 4 ? 13
                                                                : 12;
template <class T, class S>
constexpr int kGramPieces =
    (1 << kGramLogStep<T, S>) / kGramVec<T> / kGramThreads;  // pieces per thread and step; even
// Size of shared memory, counted in numbers of type S. It holds the elements of a step and later
// the sums of the groups.
template <class T, class S>
constexpr int kGramShared =
    lx::max(1 << kGramLogStep<T, S>, kGramThreads* kGramSums) + 2 * kGramRanks * kGramPad;

template <class T>
struct alignas(16) GramPiece {
    T e[kGramVec<T>];
};
template <class S>
constexpr int kGramWide = 16 / static_cast<int>(sizeof(S));
template <class S>
using GramWide = GramPiece<S>;

template <class S, class T>
LX_DEVICE S widen(T x) {
    if constexpr (std::is_same_v<T, double>) {
        return static_cast<S>(x);
    } else {
        return static_cast<S>(lx::to_float(x));
    }
}

// The ranks of one side of a tile.
template <class T>
struct GramSide {
    const T* data;             // data of the side's first rank
    const T* minus;            // subtracted from each element, or nullptr
    int stride, minus_stride;  // elements between rows
    int ranks;
    bool aligned;  // pieces are aligned to 16 bytes, and none crosses the end of a row

    LX_DEVICE GramSide(const void* factor, int row_stride, int first, int rank, int row,
                       bool ranks_in_row)
        : data(static_cast<const T*>(factor) +
               (ranks_in_row ? first : int64_t{first} * row_stride)),
          minus(nullptr),
          stride(row_stride),
          minus_stride(0),
          ranks(lx::min(kGramRanks, rank - first)),
          aligned(reinterpret_cast<uintptr_t>(factor) % 16 == 0 && row_stride % kGramVec<T> == 0 &&
                  row % kGramVec<T> == 0) {}
};

// Two sides, multiplied over the long axis.
template <class T>
struct GramSides {
    GramSide<T> x, y;
    int length;  // length of the long axis
    bool of_b;   // the sides are factors b, otherwise a
    bool same;   // both sides are equal: y is x
};

// A thread's share of a product: sums (4 i + m, 4 j + n), m, n < 4, over its group's elements.
struct GramPart {
    int i, j, group, groups, lanes;

    // If `lower`, the tile is diagonal and only sums with i >= j are computed.
    LX_DEVICE GramPart(int rows, int columns, bool lower) {
        const int thread = lx::thread_rank();
        const int down = (rows + 3) / 4, across = (columns + 3) / 4;
        lanes = lower ? down * (down + 1) / 2 : down * across;
        groups = kGramThreads / lanes;
        group = thread / lanes;
        const int lane = thread % lanes;
        if (lower) {
            i = 0;
            while ((i + 1) * (i + 2) / 2 <= lane) ++i;
            j = lane - i * (i + 1) / 2;
        } else {
            i = lane / across;
            j = lane % across;
        }
    }
};

// Adds the sums of all groups to those of group 0. shared: kGramThreads * kCount numbers.
template <class S, int kCount>
LX_DEVICE void add_groups(S (&sum)[kCount], int group, int groups, int lanes, S* shared) {
    const int thread = lx::thread_rank();
    lx::syncthreads();  // the previous contents have been read
    for (int n = groups; n > 1;) {
        const int half = (n + 1) / 2;
        if (group >= half && group < n) {
#pragma unroll
            for (int s = 0; s < kCount; ++s) shared[s * kGramThreads + thread] = sum[s];
        }
        lx::syncthreads();
        if (group < n - half) {
#pragma unroll
            for (int s = 0; s < kCount; ++s)
                sum[s] += shared[s * kGramThreads + thread + half * lanes];
        }
        n = half;
    }
}

// Computes sum[4 m + n] = sum over k of x[4 i + m, k] y[4 j + n, k] for the threads of group 0. All
// threads of the block must call this. kMoved: the sides may have a `minus`.
template <class T, class S, bool kMoved, bool kOfB, bool kAligned>
LX_DEVICE void multiply_sides(const GramSides<T>& sides, const GramPart& part, S* shared,
                              S (&sum)[kGramSums]) {
    constexpr int V = kGramVec<T>;
    const GramSide<T>&x = sides.x, &y = sides.y;
    const int thread = lx::thread_rank(), length = sides.length;
    // Widths and depths are powers of two. A piece of b has V ranks, and a piece of a has V
    // elements of the long axis.
    const int most = lx::max(lx::max(x.ranks, y.ranks), V < 4 ? 4 : V);
    const int log_width = 32 - lx::clz(static_cast<unsigned>(most - 1)), width = 1 << log_width;
    const int log_depth = kGramLogStep<T, S> - (sides.same ? 0 : 1) - log_width,
              depth = 1 << log_depth;
    const int row = kOfB ? width : depth + kGramPad;
    const int side_size = kOfB ? depth * width : width * row;

    // A line is a rank of a, or an element of the long axis of b. No line is longer than the pieces
    // that all threads load together. All pieces of a thread therefore have the same offset
    // `within` in their lines, and these lines are `hop` lines apart. Pieces of x precede pieces of
    // y.
    const int log_line = kOfB ? log_width : log_depth;
    const int within = thread * V & ((1 << log_line) - 1), across = thread * V >> log_line;
    const int hop = kGramThreads * V >> log_line;
    auto of_y = [&](int v) { return !sides.same && v >= kGramPieces<T, S> / 2; };
    auto line_of = [&](int v) { return across + (of_y(v) ? v - kGramPieces<T, S> / 2 : v) * hop; };
    // Returns how many numbers of piece v are valid.
    auto count_of = [&](int v, int begin) {
        const int ranks = of_y(v) ? y.ranks : x.ranks, left = length - begin, line = line_of(v);
        const bool there = kOfB ? line < left : line < ranks;
        return there ? lx::min((kOfB ? ranks : left) - within, V) : 0;
    };
    // For a piece without valid numbers, the first piece of the side is read instead.
    auto load = [&](const T* data, int stride, int v, int begin) {
        const int64_t line = kOfB ? begin + line_of(v) : line_of(v);
        const int count = count_of(v, begin);
        const T* const from =
            data + (count > 0 ? line * stride + (kOfB ? within : begin + within) : 0);
        if constexpr (kAligned) {
            return lx::load_stream(reinterpret_cast<const GramPiece<T>*>(from));
        } else {
            GramPiece<T> piece;
#pragma unroll
            for (int e = 0; e < V; ++e)
                piece.e[e] = e < count ? lx::load_nc(from + e) : lx::from_float<T>(0);
            return piece;
        }
    };
    auto load_side = [&](int v, int begin) {
        return load(of_y(v) ? y.data : x.data, of_y(v) ? y.stride : x.stride, v, begin);
    };

    GramPiece<T> pieces[kGramPieces<T, S>];
    auto fetch = [&](int begin) {
#pragma unroll
        for (int v = 0; v < kGramPieces<T, S>; ++v) pieces[v] = load_side(v, begin);
    };
    // Ranks of a are stored in the order 0, 4, 8, ..., 1, 5, ..., so that the ranks that lanes read
    // at the same time are adjacent.
    auto put = [&](int begin) {
#pragma unroll
        for (int v = 0; v < kGramPieces<T, S>; ++v) {
            const GramPiece<T> piece = kAligned ? pieces[v] : load_side(v, begin);
            S values[V];
#pragma unroll
            for (int e = 0; e < V; ++e) values[e] = widen<S>(piece.e[e]);
            if constexpr (kMoved) {
                if (x.minus) {
                    const GramPiece<T> taken =
                        load(of_y(v) ? y.minus : x.minus, of_y(v) ? y.minus_stride : x.minus_stride,
                             v, begin);
#pragma unroll
                    for (int e = 0; e < V; ++e) values[e] -= widen<S>(taken.e[e]);
                }
            }
            const int count = count_of(v, begin), line = line_of(v);
            const int place = kOfB ? line : (line & 3) * (width / 4) + line / 4;
            S* const to = shared + (of_y(v) ? side_size : 0) + place * row + within;
#pragma unroll
            for (int e = 0; e < V; e += kGramWide<S>) {
                GramWide<S> wide;
#pragma unroll
                for (int n = 0; n < kGramWide<S>; ++n)
                    wide.e[n] = e + n < count ? values[e + n] : S{0};
                *reinterpret_cast<GramWide<S>*>(to + e) = wide;
            }
        }
    };
    auto wide_at = [](const S* p) { return *reinterpret_cast<const GramWide<S>*>(p); };
    // Adds the products of elements 4 f to 4 f + 3 of the long axis to `step`.
    auto add_b = [&](S(&step)[kGramSums], int f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const S* const line = shared + (4 * f + e) * row;
            const S* const other = line + (sides.same ? 0 : side_size);
            S u[4], w[4];
#pragma unroll
            for (int n = 0; n < 4; n += kGramWide<S>) {
                const GramWide<S> left = wide_at(line + 4 * part.i + n);
                const GramWide<S> right = wide_at(other + 4 * part.j + n);
#pragma unroll
                for (int h = 0; h < kGramWide<S>; ++h) u[n + h] = left.e[h], w[n + h] = right.e[h];
            }
#pragma unroll
            for (int s = 0; s < kGramSums; ++s) step[s] += u[s / 4] * w[s % 4];
        }
    };
    auto add_a = [&](S(&step)[kGramSums], int f) {
        const int apart = width / 4 * row;
#pragma unroll
        for (int e = 0; e < 4; e += kGramWide<S>) {
            const S* const line = shared + part.i * row + 4 * f + e;
            const S* const other = shared + (sides.same ? 0 : side_size) + part.j * row + 4 * f + e;
            GramWide<S> u[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) u[m] = wide_at(line + m * apart);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const GramWide<S> w = wide_at(other + n * apart);
#pragma unroll
                for (int m = 0; m < 4; ++m) {
#pragma unroll
                    for (int h = 0; h < kGramWide<S>; ++h) step[4 * m + n] += u[m].e[h] * w.e[h];
                }
            }
        }
    };

#pragma unroll
    for (int s = 0; s < kGramSums; ++s) sum[s] = 0;
    if (kAligned && length > 0) fetch(0);
    for (int begin = 0; begin < length; begin += depth) {
        lx::syncthreads();  // the previous step has been read
        put(begin);
        lx::syncthreads();
        if (kAligned && begin + depth < length) fetch(begin + depth);
        const int fours = (lx::min(depth, length - begin) + 3) / 4;
        const int first = part.group < part.groups ? part.group : fours;
        // Float sums start at zero in each step, so that rounding errors accumulate less.
        S step[kGramSums];
#pragma unroll
        for (int s = 0; s < kGramSums; ++s) step[s] = sizeof(S) == 4 ? 0 : sum[s];
        if constexpr (kOfB) {
            for (int f = first; f < fours; f += part.groups) add_b(step, f);
        } else {
            for (int f = first; f < fours; f += part.groups) add_a(step, f);
        }
#pragma unroll
        for (int s = 0; s < kGramSums; ++s) sum[s] = sizeof(S) == 4 ? sum[s] + step[s] : step[s];
    }
    add_groups(sum, part.group, part.groups, part.lanes, shared);
}

template <class T, class S, bool kMoved>
LX_DEVICE void multiply_any(const GramSides<T>& sides, const GramPart& part, S* shared,
                            S (&sum)[kGramSums]) {
    const bool aligned = sides.x.aligned && sides.y.aligned;
    if (sides.of_b) {
        if (aligned)
            multiply_sides<T, S, kMoved, true, true>(sides, part, shared, sum);
        else
            multiply_sides<T, S, kMoved, true, false>(sides, part, shared, sum);
    } else {
        if (aligned)
            multiply_sides<T, S, false, false, true>(sides, part, shared, sum);
        else
            multiply_sides<T, S, false, false, false>(sides, part, shared, sum);
    }
}

}  // namespace lora_ext
