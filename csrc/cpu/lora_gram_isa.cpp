// Gram matrices of adapters on the CPU, compiled once per instruction set.
//
// An item is a tile of 64 x 64 ranks. The long axis is processed in spans of 256. For each side of
// the tile, a span is packed into one row per rank, in the type of sums; `a` is read in place if it
// has that type. Each element of the tile adds its sum of products over the span, with lanes along
// the span. If both sides are the same, one is packed and only the lower half is computed.
//
// Every sum runs along the lanes of a span, then over the lanes in a fixed tree, then span by span.
#include "lora_ext/lora_gram.h"

#include "by_dtype.h"
#include "tiles.h"
#include "transpose.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int64_t kSpan = 256;

// A span of one side of a tile: one row per rank, in the type S of sums.
template <typename S>
struct Panel {
    const S* data;
    int64_t row;
};

template <typename S, typename V>
LX_INLINE void put(S* to, V v) {
    constexpr int kCount = sizeof(V) / sizeof(v[0]);
    const auto wide = __builtin_convertvector(v, VecN<S, kCount>);
    __builtin_memcpy(to, &wide, sizeof(wide));
}

// Ranks of a tile from a (r, I), where each rank is a row along the long axis.
template <typename T, typename S>
struct SideA {
    const T* data;
    int64_t stride, length, ranks;

    SideA(const GramAdapter& adapter, int64_t first)
        : data(static_cast<const T*>(adapter.a) + first * int64_t{adapter.a_stride}),
          stride(adapter.a_stride),
          length(adapter.in_features),
          ranks(min(kGramTile, adapter.rank - first)) {}

    Panel<S> at(int64_t k, int64_t n, S* buffer) const {
        if constexpr (sizeof(T) == sizeof(S)) {
            return {data + k, stride};
        } else {
            constexpr int L = kLanes<T>;
            for (int64_t c = 0; c < ranks; ++c) {
                const T* from = data + c * stride + k;
                for (int64_t i = 0; i < n; i += L)
                    put(buffer + c * kSpan + i,
                        i + L <= n ? load(from + i) : load_n(from + i, n - i));
            }
            return {buffer, kSpan};
        }
    }
};

// Ranks of a tile from b or p (O, r), where each rank is a column along the long axis. The columns
// are transposed to rows.
template <typename T, typename S>
struct SideB {
    const T* data;
    int64_t stride, length, ranks;

    SideB(const GramAdapter& adapter, const void* factor, int64_t stride, int64_t first)
        : data(static_cast<const T*>(factor) + first),
          stride(stride),
          length(adapter.out_features),
          ranks(min(kGramTile, adapter.rank - first)) {}

    Panel<S> at(int64_t k, int64_t n, S* buffer) const {
        constexpr int L = kLanes<T>;
        for (int64_t c = 0; c < ranks; c += 8) {
            const int count = static_cast<int>(min(8, ranks - c));
            for (int64_t i = 0; i < n; i += L) {
                const T* from = data + (k + i) * stride + c;
                Vec<T> turned[8];
                if (count == 8 && i + L <= n)
                    load_transposed(from, stride, turned);
                else
                    load_transposed_part(from, stride, min(L, n - i), count, turned);
                for (int j = 0; j < count; ++j) put(buffer + (c + j) * kSpan + i, turned[j]);
            }
        }
        return {buffer, kSpan};
    }
};

// Ranks of a tile from p - b, in float64.
template <typename T>
struct Moved {
    SideB<T, double> p, b;
    int64_t length = p.length, ranks = p.ranks;

    Panel<double> at(int64_t k, int64_t n, double* buffer) const {
        alignas(64) double other[kGramTile * kSpan];
        p.at(k, n, buffer);
        b.at(k, n, other);
        for (int64_t c = 0; c < ranks; ++c)
            for (int64_t i = 0; i < n; ++i) buffer[c * kSpan + i] -= other[c * kSpan + i];
        return {buffer, kSpan};
    }
};

// A tile of results.
template <typename S>
struct Tile {
    alignas(64) S at[kGramTile][kGramTile];
};

// tile += x y^T over n elements; kLower: y is x, and the upper half is skipped.
template <typename S, bool kLower>
void add_span(const Panel<S>& x, int64_t rows, const Panel<S>& y, int64_t columns, int64_t n,
              Tile<S>& tile) {
    for (int64_t i = 0, tiles = blocks_of(rows, kDotRows), count; i < rows; i += count) {
        count = blocks_of(rows - i, tiles--);
        with_constant<kDotRows>(count, [&](auto kRows) {
            const S* row[kRows.value];
            for (int a = 0; a < kRows.value; ++a) row[a] = x.data + (i + a) * x.row;
            const int64_t last = kLower ? i + kRows.value : columns;
            for (int64_t j = 0; j < last; j += kDotRanks)
                with_constant<kDotRanks>(min(kDotRanks, last - j), [&](auto kColumns) {
                    Vec<S> sums[kRows.value][kColumns.value] = {};
                    dot_tile<S>(row, y.data + j * y.row, y.row, 0, n, sums);
                    for_sums<S>(sums, [&](int a, int b, S sum) { tile.at[i + a][j + b] += sum; });
                });
        });
    }
}

// tile = x y^T; kLower: y is x and is not read.
template <typename S, bool kLower = false, typename X, typename Y>
void multiply(const X& x, const Y& y, Tile<S>& tile) {
    alignas(64) S left[kGramTile * kSpan], right[kLower ? 1 : kGramTile * kSpan];
    for (int64_t i = 0; i < x.ranks; ++i)
        for (int64_t j = 0; j < y.ranks; ++j) tile.at[i][j] = 0;
    for (int64_t k = 0; k < x.length; k += kSpan) {
        const int64_t n = min(kSpan, x.length - k);
        const Panel<S> rows = x.at(k, n, left);
        if constexpr (kLower)
            add_span<S, true>(rows, x.ranks, rows, x.ranks, n, tile);
        else
            add_span<S, false>(rows, x.ranks, y.at(k, n, right), y.ranks, n, tile);
    }
}

// tile = x x^T; the upper half is copied from the lower.
template <typename X>
void square(const X& x, Tile<double>& tile) {
    multiply<double, true>(x, x, tile);
    for (int64_t i = 0; i < x.ranks; ++i)
        for (int64_t j = 0; j < i; ++j) tile.at[j][i] = tile.at[i][j];
}

template <typename T, typename S>
void gram(const GramArgs& args, int64_t begin, int64_t end) {
    Tile<S> tile;
    for (int64_t item = begin; item < end; ++item) {
        const GramAdapter& adapter = args.adapters[item / args.items];
        if (item % args.items >= gram_items(adapter.rank)) continue;
        const auto [of_b, row, column] = gram_tile(item % args.items, adapter.rank);
        const auto product = [&](const auto& x, const auto& y) {
            if (row == column)
                multiply<S, true>(x, y, tile);
            else
                multiply<S>(x, y, tile);
        };
        if (of_b)
            product(SideB<T, S>(adapter, adapter.b, adapter.b_stride, row),
                    SideB<T, S>(adapter, adapter.b, adapter.b_stride, column));
        else
            product(SideA<T, S>(adapter, row), SideA<T, S>(adapter, column));
        const int64_t rank = adapter.rank;
        S* const out = static_cast<S*>(of_b ? adapter.gram_b : adapter.gram_a);
        for (int64_t i = row; i < min(row + kGramTile, rank); ++i)
            for (int64_t j = column; j < min(column + kGramTile, i + 1); ++j)
                out[i * rank + j] = out[j * rank + i] = tile.at[i - row][j - column];
    }
}

template <typename T>
void pair_stats(const GramArgs& args, int64_t begin, int64_t end) {
    Tile<double> gram_a, tile;
    for (int64_t item = begin; item < end; ++item) {
        const GramAdapter& adapter = args.adapters[item / args.items];
        const int64_t place = item % args.items;
        if (place >= pair_items(adapter.rank)) continue;
        const int64_t row = gram_tile(place, adapter.rank).row;
        const int64_t column = gram_tile(place, adapter.rank).column;
        const bool diagonal = row == column;
        const double times = diagonal ? 1 : 2;  // a tile and its mirror image have the same sum
        double* const stats = static_cast<double*>(adapter.gram_a) + 4 * place;
        const auto b = [&](int64_t first) {
            return SideB<T, double>(adapter, adapter.b, adapter.b_stride, first);
        };
        const auto p = [&](int64_t first) {
            return SideB<T, double>(adapter, adapter.p, adapter.p_stride, first);
        };
        const auto moved = [&](int64_t first) { return Moved<T>{p(first), b(first)}; };
        // Computes the tile (row, column) of x^T x.
        const auto gram_of = [&](const auto& side, Tile<double>& to) {
            if (diagonal)
                square(side(row), to);
            else
                multiply(side(row), side(column), to);
        };
        const auto sum_products = [&] {
            const int64_t rows = min(kGramTile, adapter.rank - row);
            const int64_t columns = min(kGramTile, adapter.rank - column);
            double sum = 0;
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < columns; ++j) sum += tile.at[i][j] * gram_a.at[i][j];
            return sum;
        };
        gram_of([&](int64_t first) { return SideA<T, double>(adapter, first); }, gram_a);
        gram_of(b, tile);
        stats[0] = times * sum_products();
        gram_of(p, tile);
        stats[1] = times * sum_products();
        multiply(p(row), b(column), tile);
        stats[2] = sum_products();
        if (!diagonal) {
            multiply(b(row), p(column), tile);
            stats[2] += sum_products();
        }
        gram_of(moved, tile);
        stats[3] = times * sum_products();
    }
}

template <typename T>
void gram_in_precision(const GramArgs& args, int64_t begin, int64_t end) {
    args.float64 ? gram<T, double>(args, begin, end) : gram<T, Acc<T>>(args, begin, end);
}

}  // namespace

extern const GramCpu gram_table;
const GramCpu gram_table = {LX_BY_DTYPE(gram_in_precision), LX_BY_DTYPE(pair_stats)};

}  // namespace lora_ext::LX_ISA
