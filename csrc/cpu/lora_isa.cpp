// Batched LoRA on the CPU, compiled once per instruction set; LX_ISA names the namespace and the
// table.
//
//   v[t, :] = scale * A x[t, :]       shrink: dot products along I
//   y[t, :] = y[t, :] + B v[t, :]     expand: vector lanes run over outputs
//
// Order of every sum, so that a row's bits depend neither on threads nor on other rows:
//   v[t, r]           up to kRankSpan ranks one vector accumulator: lane l adds k = l, l + L, ...
//                     ascending (with the hardware's pair products: 2l, 2l + 1, 2l + 2L, ...), then
//                     the tree of sum_lanes(). For more ranks, one accumulator, k ascending.
//   delta of y[t, o]  one accumulator, ranks ascending; then y + delta, rounded once.
//
// If a chunk has few rows, the time is bound by the bytes of A and B, which are read once; x, v and
// y stay in cache. With many rows both products are small GEMMs: shrink holds kDotRows x 4 dot
// products in registers; expand transposes a block of B to the stack and holds kTileRows rows x 2
// vectors of y. Ranks above kRankSpan are large GEMMs of packed blocks (lora_product.h).
#include "dense_pages.h"
#include "float8.h"
#include "lora_product.h"
#include "tiles.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kGroupRows = 24;     // shrink: rows and ranks whose accumulators are kept
constexpr int kGroupRanks = 32;    // on the stack from one block of I to the next
constexpr int kDotBlock = 1024;    // in-features; 4 ranks of float are half of a 32 KiB L1
constexpr int kDirectRows = 3;     // expand: maximum rows for which B is transposed in registers
constexpr int kWideTileRank = 16;  // expand: largest rank that reads several vectors of pages
constexpr int kPackColumns = 128;
constexpr int kPackSize = 8192;       // elements of the transposed block of B
constexpr int kVSize = 8192;          // elements of v in apply
constexpr int64_t kOutBlock = 1024;   // outputs per item of expand
constexpr int64_t kWideSize = 16384;  // elements of a widened block of B
// Prefetch distances: bytes of pages of B, rows of B, and vectors of y.
constexpr int64_t kAheadB = 2048, kAheadRows = 64, kAheadY = 16;

// ------------------------------------------------------------------------------------------------
// Shrink

template <typename T, int kRows, int kRanks>
LX_INLINE void write_v(const Vec<T> (&acc)[kRows][kRanks], Acc<T> scale, const Rows<Acc<T>>& v,
                       int64_t row, int64_t rank) {
    for_sums<T>(acc, [&](int i, int j, Acc<T> sum)
                         __attribute__((always_inline)) { v[row + i][rank + j] = scale * sum; });
}

// For few rows: one pass over A, without accumulators in memory.
template <typename T, int kRows>
void shrink_few(const Slot<T>& slot, const Rows<const T>& x, const Rows<Acc<T>>& v) {
    const T* xs[kRows];
    for (int i = 0; i < kRows; ++i) xs[i] = x[i];
    for (int64_t r = 0; r < slot.rank; r += kDotRanks)
        with_constant<kDotRanks>(min(slot.rank - r, kDotRanks), [&](auto ranks) {
            Vec<T> acc[kRows][ranks.value] = {};
            const int64_t after = r + kDotRanks;  // prefetch no lines beyond whole tiles
            const T* next = after + kDotRanks <= slot.rank ? slot.a_at(after) : nullptr;
            dot_tile<T, kRows, ranks.value>(xs, slot.a_at(r), slot.a_row, 0, slot.in, acc, next);
            write_v<T>(acc, slot.scale, v, 0, r);
        });
}

// kGroupRows x kGroupRanks dot products, block by block of I: the block of A stays in L1 or L2 for
// all rows, and the rows of x stay in L2 for all ranks. Accumulators are saved as vectors, so that
// the blocks do not change the order of the sum.
template <typename T>
void shrink_group(const Slot<T>& slot, const Rows<const T>& x, int64_t rows, int64_t rank_begin,
                  int64_t rank_end, const Rows<Acc<T>>& v) {
    Vec<T> waiting[kGroupRows * kGroupRanks];
    alignas(64) T wide[kDotRanks * kDotBlock];
    for (int64_t k = 0; k < slot.in; k += kDotBlock) {
        const int64_t k_end = min(k + kDotBlock, slot.in);
        Vec<T>* saved = waiting;
        for (int64_t r = rank_begin; r < rank_end; r += kDotRanks)
            with_constant<kDotRanks>(min(rank_end - r, kDotRanks), [&](auto ranks) {
                const T* a = slot.float8 ? wide : slot.a_at(r) + k;
                const int64_t a_row = slot.float8 ? kDotBlock : slot.a_row;
                for (int j = 0; slot.float8 && j < ranks.value; ++j)
                    widen_float8(slot.a8_at(r + j) + k, k_end - k, wide + j * kDotBlock);
                for (int64_t row = 0, tiles = blocks_of(rows, kDotRows), n; row < rows; row += n) {
                    n = blocks_of(rows - row, tiles--);
                    with_constant<kDotRows>(n, [&](auto count) {
                        const T* xs[count.value];
                        for (int i = 0; i < count.value; ++i) xs[i] = x[row + i] + k;
                        Vec<T> acc[count.value][ranks.value] = {};
                        if (k > 0) __builtin_memcpy(acc, saved, sizeof(acc));
                        dot_tile<T, count.value, ranks.value>(xs, a, a_row, 0, k_end - k, acc);
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

// Computes v of `rows` rows for one span of the ranks.
template <typename T>
void shrink_rows(const Slot<T>& slot, int64_t span, const Rows<const T>& x, int64_t rows,
                 const Rows<Acc<T>>& v) {
    if (slot.rank > kRankSpan)
        return project<T>(x, rows, slot.in, nullptr, span_of(slot, span), slot.scale, v,
                          [&](auto... block) { pack_a<T>(slot, block...); });
    if (span > 0) return;
    if (rows <= kDotRows && !slot.float8)
        return with_constant<kDotRows>(rows, [&](auto n) { shrink_few<T, n.value>(slot, x, v); });
    for (int64_t row = 0; row < rows; row += kGroupRows)
        for (int64_t r = 0; r < slot.rank; r += kGroupRanks)
            shrink_group<T>(slot, x.from(row), min(rows - row, kGroupRows), r,
                            min(r + kGroupRanks, slot.rank), v.from(row));
}

// ------------------------------------------------------------------------------------------------
// Expand

template <typename T, bool kPart>
LX_INLINE void add_to(T* y, Vec<T> delta, int64_t n) {
    if constexpr (kPart)
        store_n(y, load_n(y, n) + delta, n);
    else
        store(y, load(y) + delta);
}

// Outputs of a tile: whole vectors of adjacent outputs in full pages, other whole vectors, or n
// lanes of one vector.
enum class Outputs { kDense, kWhole, kPart };

// If a bank has memory for larger ranks than the adapter's, the rows of the adapter's B have gaps,
// which must not be read; rows may also span many lines. The first page in each cache line of a row
// prefetches that line of later rows: of the next tile to L1, and far ahead to L2, which allows
// more outstanding lines. Measured on Zen 4 with rows of 64 ranks: with prefetches to L1 only,
// ranks 32 and 64 take twice as long; with prefetches to L2 only, or to L1 and L2 in turn, some
// lines are not fetched.
template <int kCount, typename T>
LX_INLINE void prefetch_rows(const T* b, int64_t row, bool one_line) {
    if (one_line)
        for (int i = 0; i < kCount; ++i) __builtin_prefetch(b + (kCount + i) * row);
    for (int i = 0; i < kCount; ++i) {
        __builtin_prefetch(b + (kAheadRows + i) * row, 0, kToL2);
        if (!one_line) __builtin_prefetch(b + (kCount + i) * row);
    }
}

// Updates kVecs vectors of outputs from o on, with B transposed in registers. With many pages kVecs
// is 1, because lines that a tile prefetches in all pages would be evicted from L1 before their
// use.
template <typename T, int kRows, int kVecs, Outputs kOutputs>
LX_INLINE void direct_tile(const Slot<T>& slot, const Acc<T>* const* v, T* const* y, int64_t o,
                           int64_t n) {
    constexpr int L = kLanes<T>;
    constexpr bool kPart = kOutputs == Outputs::kPart;
    Vec<T> acc[kVecs][kRows] = {};
    constexpr int kTile = kVecs * L, kLine = 64 / sizeof(T);
    const bool dense = slot.b_row <= min(blocks_of(slot.rank, 8) * 8, 2 * kLine);
    const T* const bank = slot.b + (o + kTile) * slot.b_row;
    const auto add_page = [&](int64_t p, int ranks) __attribute__((always_inline)) {
        const T* b = slot.b_page(p) + o * slot.b_row;
        const bool whole = ranks == 8 || slot.full_pages;
        if constexpr (!kPart) {
            if (kVecs > 1 || slot.table)  // only slots with a page table read several vectors
                for (int i = 0; i < kTile * 8; i += kLine)
                    __builtin_prefetch(b + kAheadB / sizeof(T) + i, 0, kToL2);
            else if (dense)  // full rows: each page prefetches its share of the next tile
                for (int i = 0; i < kTile * 8; i += kLine)
                    __builtin_prefetch(bank + p * (kTile * 8) + i);
            else if (8 * p % kLine == 0)
                prefetch_rows<kTile>(b, slot.b_row, slot.rank <= kLine);
        }
        // Unrolled, because otherwise sums are stored to memory between two pages.
#pragma GCC unroll 4
        for (int c = 0; c < kVecs; ++c) {
            Vec<T> bt[8];
            const T* from = b + c * L * slot.b_row;
            if constexpr (kOutputs == Outputs::kDense)
                load_quick(b + c * L * 8, bt);
            else if (!kPart && whole)
                load_transposed(from, slot.b_row, bt);
            else
                load_transposed_part(from, slot.b_row, n, ranks, bt);
            for (int j = 0; j < 8; ++j)
                if (j < ranks)
                    for (int i = 0; i < kRows; ++i)
                        acc[c][i] = fma(bt[j], broadcast<T>(v[i][8 * p + j]), acc[c][i]);
        }
    };
    const int64_t pages = slot.rank / 8;
    for (int64_t p = 0; p < pages; ++p) add_page(p, 8);
    if (slot.rank % 8) add_page(pages, slot.rank % 8);
    for (int c = 0; c < kVecs; ++c)
        for (int i = 0; i < kRows; ++i) {
            if constexpr (kOutputs == Outputs::kDense) acc[c][i] = in_order<T>(acc[c][i]);
            add_to<T, kPart>(y[i] + o + c * L, acc[c][i], n);
        }
}

template <typename T, int kRows, int kVecs>
void expand_direct(const Slot<T>& slot, const Rows<Acc<T>>& v, const Rows<T>& y, int64_t o,
                   int64_t o_end) {
    constexpr int L = kLanes<T>;
    const Acc<T>* vs[kRows];
    T* ys[kRows];
    for (int i = 0; i < kRows; ++i) vs[i] = v[i], ys[i] = y[i];
    const auto tiles = [&](auto vecs, auto outputs) __attribute__((always_inline)) {
        for (; o + vecs.value * L <= o_end; o += vecs.value * L)
            direct_tile<T, kRows, vecs.value, Outputs(outputs.value)>(slot, vs, ys, o, L);
    };
    constexpr Int<int(Outputs::kDense)> dense;
    constexpr Int<int(Outputs::kWhole)> whole;
    if constexpr (kQuick<T>)
        if (slot.b_row == 8 && slot.full_pages) tiles(Int<kVecs>{}, dense), tiles(Int<1>{}, dense);
    tiles(Int<kVecs>{}, whole);
    tiles(Int<1>{}, whole);
    if (o < o_end) direct_tile<T, kRows, 1, Outputs::kPart>(slot, vs, ys, o, o_end - o);
}

template <typename T, int kRows, int kVecs, bool kPart>
LX_INLINE void packed_tile(const Acc<T>* bt, int64_t columns, int64_t rank, const Acc<T>* const* v,
                           T* const* y, int64_t o, int64_t n) {
    constexpr int L = kLanes<T>;
    Vec<T> acc[kRows][kVecs] = {};
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(y[i] + o + kAheadY * L, 1);
    sum_tile<Acc<T>, kRows, kVecs>(
        bt, columns, rank, [&](int i, int64_t r) __attribute__((always_inline)) { return v[i][r]; },
        acc);
    for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < kVecs; ++c) add_to<T, kPart>(y[i] + o + c * L, acc[i][c], n);
}

template <typename T>
void expand_packed(const Slot<T>& slot, const Rows<Acc<T>>& v, const Rows<T>& y, int64_t rows,
                   int64_t o_begin, int64_t o_end) {
    constexpr int L = kLanes<T>;
    alignas(64) Acc<T> bt[kPackSize];
    const int64_t fitting = kPackSize / slot.rank / (2 * L) * (2 * L);
    const int64_t block = min(fitting, kPackColumns);
    for (int64_t o = o_begin; o < o_end; o += block) {
        const int64_t width = min(block, o_end - o), columns = blocks_of(width, L) * L;
        pack_b_turned<T>(slot, 0, slot.rank, o, width, bt, columns);
        for (int64_t row = 0, tiles = blocks_of(rows, kTileRows), n; row < rows; row += n) {
            n = blocks_of(rows - row, tiles--);
            with_constant<kTileRows>(n, [&](auto count) {
                const Acc<T>* vs[count.value];
                T* ys[count.value];
                for (int i = 0; i < count.value; ++i) vs[i] = v[row + i], ys[i] = y[row + i] + o;
                int64_t c = 0;
                for (; c + 2 * L <= width; c += 2 * L)
                    packed_tile<T, count.value, 2, false>(bt + c, columns, slot.rank, vs, ys, c, L);
                for (; c + L <= width; c += L)
                    packed_tile<T, count.value, 1, false>(bt + c, columns, slot.rank, vs, ys, c, L);
                if (c < width)
                    packed_tile<T, count.value, 1, true>(bt + c, columns, slot.rank, vs, ys, c,
                                                         width - c);
            });
        }
    }
}

template <typename T>
void expand_spans(const Slot<T>& slot, const Rows<Acc<T>>& v, const Rows<T>& y, int64_t rows,
                  int64_t o_begin, int64_t o_end) {
    for (int64_t row = 0; row < rows; row += kSumRows)
        for (int64_t o = o_begin; o < o_end; o += kRankSpan)
            add_update<T>(
                v.from(row), min(kSumRows, rows - row), slot.rank, y.from(row), o,
                min(kRankSpan, o_end - o),
                [&](int64_t r, int64_t n, int64_t c, int64_t count, Acc<T>* to, int64_t to_row) {
                    pack_b_turned<T>(slot, r, n, o + c, count, to, to_row);
                },
                [](int64_t, int64_t, Vec<T> sum) __attribute__((always_inline)) { return sum; });
}

template <typename T>
void expand_rows(const Slot<T>& slot, const Rows<Acc<T>>& v, const Rows<T>& y, int64_t rows,
                 int64_t o, int64_t o_end);

// Widens a block of B, of all ranks, at a time; sums have the same order as with pages of T.
template <typename T>
void expand_float8(const Slot<T>& slot, const Rows<Acc<T>>& v, const Rows<T>& y, int64_t rows,
                   int64_t o, int64_t o_end) {
    alignas(64) T wide[kWideSize];
    const int64_t pages = blocks_of(slot.rank, 8), block = kWideSize / (8 * pages) / 64 * 64;
    Slot<T> of_block = slot;
    of_block.b = wide;
    of_block.table = nullptr;
    of_block.b_row = 8;
    of_block.float8 = false;
    for (; o < o_end; o += block) {
        const int64_t n = min(block, o_end - o);
        of_block.b_page_stride = 8 * n;
        for (int64_t p = 0; p < pages; ++p)
            widen_float8(slot.b8_page(p) + 8 * o, 8 * n, wide + 8 * n * p);
        expand_rows<T>(of_block, v, {y.base + o, y.stride, y.index}, rows, 0, n);
    }
}

template <typename T>
void expand_rows(const Slot<T>& slot, const Rows<Acc<T>>& v, const Rows<T>& y, int64_t rows,
                 int64_t o, int64_t o_end) {
    if (slot.rank == 0) return;
    if (slot.float8) return expand_float8<T>(slot, v, y, rows, o, o_end);
    if (rows > kDirectRows)
        return slot.rank > kRankSpan ? expand_spans<T>(slot, v, y, rows, o, o_end)
                                     : expand_packed<T>(slot, v, y, rows, o, o_end);
    for (int64_t row = 0; row < rows; row += kDirectRows)
        with_constant<kDirectRows>(min(rows - row, kDirectRows), [&](auto n) {
            if (slot.table && slot.rank <= kWideTileRank)
                expand_direct<T, n.value, n.value == 1 ? 4 : 2>(slot, v.from(row), y.from(row), o,
                                                                o_end);
            else
                expand_direct<T, n.value, 1>(slot, v.from(row), y.from(row), o, o_end);
        });
}

// ------------------------------------------------------------------------------------------------
// Functions of lora_table. for_chunks merges adjacent chunks of one slot, so that their rows share
// a transposed block of B.
template <typename T>
Rows<T> y_rows(const LoraArgs& args, const Chunk& chunk) {
    return {static_cast<T*>(args.y), args.y_row_stride, chunk.rows};
}

// v = (scale * v) * weight for the ranks of a span, if the rows or pages have factors. `first` is
// the row of the chunk that is row 0 of v.
template <typename T>
void weigh(const LoraArgs& args, const Chunk& chunk, Span span, int64_t first, int64_t rows,
           const Rows<Acc<T>>& v) {
    if (!has_factors(args)) return;
    const Factors<T> factors(args, chunk);
    for (int64_t i = 0; i < rows; ++i)
        factors.for_pages(first + i, span.first, span.ranks,
                          [&](int64_t r, int64_t end, Acc<T> scale, Acc<T> weight) {
                              for (; r < end; ++r) v[i][r] = scale * v[i][r] * weight;
                          });
}

template <typename T>
void shrink(const LoraArgs& args, int64_t begin, int64_t end) {
    for_chunks(args, begin, end, kSumRows, [&](const Chunk& chunk, int64_t index) {
        const Slot<T> slot(args.bank, chunk.slot, !has_factors(args));
        shrink_rows<T>(slot, index, x_rows<T>(args, chunk), chunk.len, v_rows<T>(args, chunk));
        weigh<T>(args, chunk, span_of(slot, index), 0, chunk.len, v_rows<T>(args, chunk));
    });
}

int64_t out_block(const LoraArgs& args) {
    return rank_spans(args.bank.max_rank) > 1 ? kRankSpan : kOutBlock;
}
template <typename T>
void expand(const LoraArgs& args, int64_t begin, int64_t end) {
    const int64_t out = args.bank.out_features, width = out_block(args);
    for_chunks(args, begin, end, kSumRows, [&](const Chunk& chunk, int64_t block) {
        expand_rows<T>({args.bank, chunk.slot}, v_rows<T>(args, chunk), y_rows<T>(args, chunk),
                       chunk.len, block * width, min((block + 1) * width, out));
    });
}

// For ranks of one span only. v is on the stack, and args.v is unused.
template <typename T>
void apply(const LoraArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> buffer[kVSize];
    for_chunks(args, begin, end, kSumRows, [&](const Chunk& chunk, int64_t) {
        const Slot<T> slot(args.bank, chunk.slot, !has_factors(args));
        if (slot.rank == 0) return;
        const int64_t step = kVSize / slot.rank;
        for (int64_t row = 0; row < chunk.len; row += step) {
            const int64_t rows = min(step, chunk.len - row);
            const Rows<Acc<T>> v{buffer, slot.rank, nullptr};
            shrink_rows<T>(slot, 0, x_rows<T>(args, chunk).from(row), rows, v);
            weigh<T>(args, chunk, {0, slot.rank}, row, rows, v);
            expand_rows<T>(slot, v, y_rows<T>(args, chunk).from(row), rows, 0, slot.out);
        }
    });
}

int64_t shrink_items(const LoraArgs& args) {
    return args.plan[kPlanNumChunks] * rank_spans(args.bank.max_rank);
}
int64_t expand_items(const LoraArgs& args) {
    return args.plan[kPlanNumChunks] * blocks_of(args.bank.out_features, out_block(args));
}

}  // namespace

extern const LoraCpu lora_table;
const LoraCpu lora_table = {LX_ISA_NAME,  shrink_items,        LX_BY_DTYPE(shrink),
                            expand_items, LX_BY_DTYPE(expand), LX_BY_DTYPE(apply)};

}  // namespace lora_ext::LX_ISA
