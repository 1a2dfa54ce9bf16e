// Products of packed blocks, used by the CPU twins of LoRA for training, and for inference at ranks
// above kRankSpan.
//
// Factors are packed into stack buffers: widened, masked, transposed so that lanes run along a row
// of the result, and dense, because rows at a distance of a power of two would share one set of the
// L1 cache. A left factor that is neither widened nor masked is read in place, because a tile reads
// only kTileRows of its rows. Registers hold kTileRows x 2 vectors of the result. The stack holds
// the sums of a block of kSumRows rows and kRankSpan columns while the loop over depth runs. The
// block has that many rows so that the right factor, read from memory in short pieces, is packed
// rarely.
//
// An element of the result has one accumulator and adds its products in ascending order: its bits
// depend only on its row, its column and the depth.
#pragma once

#include "dropout.h"
#include "lora_rows.h"
#include "tiles.h"
#include "transpose.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = 6;       // two vectors per row: 12 accumulators
constexpr int64_t kRowBlock = 64;  // rows packed at a time, for sums over rows
constexpr int64_t kSumRows = 256;  // rows of a block of sums
constexpr int64_t kDepth = 128;    // depth of a sum packed at a time
constexpr int64_t kColumns = 64;   // columns of the right factor packed at a time
static_assert(kColumns == kMaskColumns && kDepth % kMaskColumns == 0);

// Calls f(Int<rows>, Int<vectors>, row, column) for tiles that cover `rows` x `columns` elements;
// `columns` is a whole number of vectors.
template <typename T, typename F>
LX_INLINE void for_tiles(int64_t rows, int64_t columns, F&& f) {
    constexpr int L = kLanes<T>;
    for (int64_t c = 0; c < columns; c += 2 * L)
        for (int64_t row = 0, tiles = blocks_of(rows, kTileRows), n; row < rows; row += n) {
            n = blocks_of(rows - row, tiles--);
            with_constant<kTileRows>(n, [&](auto count) {
                if (columns - c > L)
                    f(count, Int<2>{}, row, c);
                else
                    f(count, Int<1>{}, row, c);
            });
        }
}

// sum[i][c] += left[i * left_row + k * left_step] * right[k * right_row + c], k ascending.
template <typename T, int kRows, int kVecs>
LX_INLINE void multiply_add(const Acc<T>* left, int64_t left_row, int64_t left_step,
                            const Acc<T>* right, int64_t right_row, int64_t depth,
                            Vec<T> (&sum)[kRows][kVecs]) {
    for (int64_t k = 0; k < depth; ++k, left += left_step, right += right_row) {
        Vec<T> r[kVecs];
        for (int c = 0; c < kVecs; ++c) r[c] = load_bits<Vec<T>>(right + c * kLanes<T>);
        for (int i = 0; i < kRows; ++i) {
            const Vec<T> l = broadcast<T>(left[i * left_row]);
            for (int c = 0; c < kVecs; ++c) sum[i][c] = fma(r[c], l, sum[i][c]);
        }
    }
}

// For each tile of rows x columns: loads its sums from acc, calls add(row, column, sum), which
// updates them, and stores them.
template <typename T, typename F>
LX_INLINE void add_tiles(Acc<T>* acc, int64_t acc_row, int64_t rows, int64_t columns, F&& add) {
    for_tiles<T>(rows, columns, [&](auto count, auto vecs, int64_t row, int64_t c) {
        constexpr int L = kLanes<T>;
        Vec<T> sum[count.value][vecs.value];
        Acc<T>* a = acc + row * acc_row + c;
        for (int i = 0; i < count.value; ++i)
            for (int j = 0; j < vecs.value; ++j)
                sum[i][j] = load_bits<Vec<T>>(a + i * acc_row + j * L);
        add(row, c, sum);
        for (int i = 0; i < count.value; ++i)
            for (int j = 0; j < vecs.value; ++j) store(a + i * acc_row + j * L, sum[i][j]);
    });
}

// acc += left * right for rows x columns; the sums continue from the values in acc.
template <typename T>
void add_product(const Acc<T>* left, int64_t left_row, int64_t left_step, const Acc<T>* right,
                 int64_t right_row, int64_t depth, Acc<T>* acc, int64_t acc_row, int64_t rows,
                 int64_t columns) {
    add_tiles<T>(acc, acc_row, rows, columns,
                 [&](int64_t row, int64_t c, auto& sum) __attribute__((always_inline)) {
                     multiply_add<T>(left + row * left_row, left_row, left_step, right + c,
                                     right_row, depth, sum);
                 });
}

// Like the function above, but the rows of left may be at any addresses.
template <typename T>
void add_product(const Rows<const Acc<T>>& left, const Acc<T>* right, int64_t right_row,
                 int64_t depth, Acc<T>* acc, int64_t acc_row, int64_t rows, int64_t columns) {
    add_tiles<T>(
        acc, acc_row, rows, columns,
        [&](int64_t row, int64_t c, auto& sum) __attribute__((always_inline)) {
            constexpr int kRows = sizeof(sum) / sizeof(sum[0]);
            const Acc<T>* from[kRows];
            for (int i = 0; i < kRows; ++i) from[i] = left[row + i];
            sum_tile<Acc<T>>(
                right + c, right_row, depth,
                [&](int i, int64_t k) __attribute__((always_inline)) { return from[i][k]; }, sum);
        });
}

// ------------------------------------------------------------------------------------------------
// Packing

// Masks of rows x columns; words[i][j] is the mask of the 64 columns from 64 j on.
template <int64_t kWidth, int64_t kRows = kRowBlock>
struct Masks {
    uint64_t words[kRows][kWidth / kMaskColumns];

    // Draws the masks of the key's rows from `first` on.
    void fill(const DropoutKey& key, int64_t first, int64_t num_rows, int64_t begin,
              int64_t width) {
        for (int64_t i = 0; i < num_rows; ++i)
            for (int64_t c = 0; c < width; c += kMaskColumns)
                words[i][c / kMaskColumns] = keep_bits(key, key.row(first + i), begin + c);
    }
    // Return the mask of row i, shifted so that bit 0 is column c.
    LX_INLINE uint64_t bits(int64_t i, int64_t c) const {
        return words[i][c / kMaskColumns] >> c % kMaskColumns;
    }
};

// to[i][c] = from[i][begin + c], widened, zero if masked; padded with zeros to a whole vector.
template <typename T, typename E, typename M = Masks<kColumns>>
void pack_rows(const Rows<E>& from, int64_t rows, int64_t begin, int64_t width, Acc<T>* to,
               int64_t to_row, const M* masks = nullptr) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const auto* p = from[i] + begin;
        Acc<T>* q = to + i * to_row;
        for (int64_t c = 0; c < width; c += L) {
            const auto v = c + L <= width ? load(p + c) : load_n(p + c, width - c);
            store(q + c, masks ? keep_lanes<T>(v, masks->bits(i, c)) : v);
        }
    }
}

// to[k][r] = A[first + r][begin + k], padded with zeros to a whole vector. The ranks of a vector
// are first copied to the stack, row by row: transposing directly from rows at a distance of a
// power of two would load lines that evict each other from the cache.
template <typename T>
void pack_a(const Slot<T>& slot, int64_t begin, int64_t depth, int64_t first, int64_t ranks,
            Acc<T>* to, int64_t to_row) {
    constexpr int L = kLanes<T>;
    alignas(64) T rows[L * kDepth];
    for (int64_t r = 0; r < ranks; r += L) {
        for (int64_t i = 0; i < L; ++i) {
            T* row = rows + i * kDepth;
            if (r + i < ranks)
                __builtin_memcpy(row, slot.a_at(first + r + i) + begin, depth * sizeof(T));
            else
                __builtin_memset(row, 0, depth * sizeof(T));
        }
        for (int64_t k = 0; k < depth; k += 8) {
            Vec<T> columns[8];
            load_transposed(rows + k, kDepth, columns);
            const int64_t count = min(8, depth - k);
            for (int64_t j = 0; j < count; ++j) store(to + (k + j) * to_row + r, columns[j]);
        }
    }
}

// to[r][c] = B[o + c][first + r] of a slot's pages, first a multiple of eight; padded with zeros to
// a whole vector.
template <typename T>
void pack_b_turned(const Slot<T>& slot, int64_t first, int64_t ranks, int64_t o, int64_t width,
                   Acc<T>* to, int64_t to_row) {
    constexpr int L = kLanes<T>;
    for (int64_t r = 0; r < ranks; r += 8) {
        const int count = static_cast<int>(min(8, ranks - r));
        const T* b = slot.b_page((first + r) / 8) + o * slot.b_row;
        for (int64_t c = 0; c < width; c += L) {
            Vec<T> t[8];
            if (c + L <= width && (count == 8 || slot.full_pages))
                load_transposed(b + c * slot.b_row, slot.b_row, t);
            else
                load_transposed_part(b + c * slot.b_row, slot.b_row, min(L, width - c), count, t);
            for (int j = 0; j < count; ++j) store(to + (r + j) * to_row + c, t[j]);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// sums = left * right for up to kSumRows rows and kRankSpan columns, of any depth; a row of sums
// has `sums_row` columns, whole vectors. left_of(k, n) returns the rows of left[:, k : k + n],
// pack_right(k, n, first, count, to, row) packs right[k : k + n, first : first + count].
template <typename T, typename Left, typename PackRight>
void sum_products(int64_t rows, int64_t depth, int64_t columns, Acc<T>* sums, int64_t sums_row,
                  Left&& left_of, PackRight&& pack_right) {
    alignas(64) Acc<T> right[kDepth * kColumns];
    for (int64_t i = 0; i < rows * sums_row; ++i) sums[i] = 0;
    for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t n = min(kDepth, depth - k);
        const Rows<const Acc<T>> left = left_of(k, n);
        for (int64_t first = 0; first < columns; first += kColumns) {
            const int64_t count = min(kColumns, columns - first), row = whole_vectors<T>(count);
            pack_right(k, n, first, count, right, row);
            add_product<T>(left, right, row, n, sums + first, sums_row, rows, row);
        }
    }
}

// Ranks that one item of a CPU twin processes.
struct Span {
    int64_t first, ranks;
};
template <typename T>
Span span_of(const Slot<T>& slot, int64_t index) {
    const int64_t first = index * kRankSpan, left = slot.rank - first;
    return {first, left > 0 ? min(kRankSpan, left) : 0};
}

// v and dv: out[t][r] = factor * sum_k left[t][k] * right[k][r] for the ranks of a span.
// pack_right(k, n, first, count, to, row) packs a block of right; `key` masks left.
template <typename T, typename Pack>
void project(const Rows<const T>& left, int64_t rows, int64_t features, const DropoutKey* key,
             Span span, Acc<T> factor, const Rows<Acc<T>>& out, Pack&& pack_right) {
    if (span.ranks == 0) return;  // left would be packed needlessly
    alignas(64) Acc<T> sums[kSumRows * kRankSpan], packed[kSumRows * kDepth];
    Masks<kDepth, kSumRows> masks;
    const int64_t sums_row = whole_vectors<T>(span.ranks);
    for (int64_t row = 0; row < rows; row += kSumRows) {
        const int64_t count = min(kSumRows, rows - row);
        const Rows<const T> block = left.from(row);
        sum_products<T>(
            count, features, span.ranks, sums, sums_row,
            [&](int64_t k, int64_t n) -> Rows<const Acc<T>> {
                if constexpr (sizeof(T) == sizeof(Acc<T>))
                    if (!key) return {block.base + k, block.stride, block.index};
                if (key) masks.fill(*key, row, count, k, n);
                pack_rows<T>(block, count, k, n, packed, kDepth, key ? &masks : nullptr);
                return {packed, kDepth, nullptr};
            },
            [&](int64_t k, int64_t n, int64_t first, int64_t ranks, Acc<T>* to, int64_t to_row) {
                pack_right(k, n, span.first + first, ranks, to, to_row);
            });
        for (int64_t i = 0; i < count; ++i) {
            Acc<T>* to = out[row + i] + span.first;
            for (int64_t r = 0; r < span.ranks; ++r) to[r] = factor * sums[i * sums_row + r];
        }
    }
}

// y[t][begin + c] += sum_r v[t][r] * right[r][c], rounded once, for `rank` ranks, up to kSumRows
// rows and kRankSpan columns; keep(row, column, vector) masks a vector of the sum.
template <typename T, typename Pack, typename Keep>
void add_update(const Rows<Acc<T>>& v, int64_t rows, int64_t rank, const Rows<T>& y, int64_t begin,
                int64_t width, Pack&& pack_right, Keep&& keep) {
    constexpr int L = kLanes<T>;
    alignas(64) Acc<T> sums[kSumRows * kRankSpan];
    const int64_t sums_row = whole_vectors<T>(width);
    sum_products<T>(
        rows, rank, width, sums, sums_row,
        [&](int64_t k, int64_t) -> Rows<const Acc<T>> { return {v.base + k, v.stride, v.index}; },
        pack_right);
    for (int64_t i = 0; i < rows; ++i) {
        T* to = y[i] + begin;
        for (int64_t c = 0; c < width; c += L) {
            const Vec<T> sum = keep(i, c, load_bits<Vec<T>>(sums + i * sums_row + c));
            const int64_t n = width - c;
            if (n >= L)
                store(to + c, load(to + c) + sum);
            else
                store_n(to + c, load_n(to + c, n) + sum, n);
        }
    }
}

}  // namespace
}  // namespace lora_ext::LX_ISA
