// Training of batched LoRA on the CPU, compiled once per instruction set.
//
//   v[t, :]  = c * A (m * x[t, :])            vector lanes run over ranks; without dropout csrc/ops
//                                             calls serving's shrink (lora_isa.cpp)
//   dv[t, :] = c * dy[t, :] B                 ranks
//   dB       = sum_t dy[t, :]^T v[t, :]       ranks
//   dA       = sum_t dv[t, :]^T (m * x)[t, :] inputs
//   dx[t, :] = dx[t, :] + m * (dv[t, :] A)    inputs
//
// Order of every sum, so that the result depends neither on threads nor on other adapters: one
// accumulator each, features ascending in v and dv (then times c), the adapter's rows ascending in
// dA and dB (if they accumulate, then dA + sum), ranks ascending in dx (then dx + sum, all rounded
// once).
//
// All five are products of packed blocks (lora_product.h). Ranks are processed in spans of
// kRankSpan, so that no buffer grows with them.
#include "lora_product.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int64_t kAccumulators = kRankSpan * kColumns;  // dA, dB: accumulators of one band

// ------------------------------------------------------------------------------------------------
// v and dv: items are (span of ranks, chunk).

// to[o][r] = B[begin + o][first + r], padded with zeros to a whole vector.
template <typename T>
void pack_b(const Slot<T>& slot, int64_t begin, int64_t depth, int64_t first, int64_t ranks,
            Acc<T>* to, int64_t to_row) {
    const Rows<const T> rows{slot.b + begin * slot.b_row, slot.b_row, nullptr};
    pack_rows<T>(rows, depth, first, ranks, to, to_row);
}

template <typename T>
Rows<const T> dy_rows(const LoraTrainArgs& args, const int32_t* rows) {
    return {static_cast<const T*>(args.dy), args.dy_row_stride, rows};
}
template <typename T>
Rows<Acc<T>> dv_rows(const LoraTrainArgs& args, const int32_t* rows) {
    return {static_cast<Acc<T>*>(args.dv), args.dv_row_stride, rows};
}

// Calls f(chunk, slot, span) for the items [begin, end) whose span has ranks.
template <typename T, typename F>
void for_spans(const LoraArgs& args, int64_t begin, int64_t end, F&& f) {
    for_chunks(args, begin, end, kSumRows, [&](const Chunk& chunk, int64_t index) {
        const Slot<T> slot(args.bank, chunk.slot);
        const Span span = span_of(slot, index);
        if (span.ranks > 0) f(chunk, slot, span);
    });
}

struct Segment {
    const int32_t* rows;
    int64_t len;
};
Segment segment_of(const LoraArgs& args, int32_t slot) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    const int32_t* begin = args.plan + layout.slot_begin() + slot;
    return {args.plan + layout.perm() + begin[0], begin[1] - begin[0]};
}

DropoutKey key_of(const LoraTrainArgs& args, const Chunk& chunk) {
    const int64_t first = chunk.rows - segment_of(args.lora, chunk.slot).rows;
    return {args.dropout, chunk.slot, chunk.rows, first};
}

template <typename T>
void shrink(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    for_spans<T>(args.lora, begin, end, [&](const Chunk& chunk, const Slot<T>& slot, Span span) {
        const DropoutKey key = key_of(args, chunk);
        project<T>(x_rows<T>(args.lora, chunk), chunk.len, slot.in, key.drops() ? &key : nullptr,
                   span, slot.scale * inverse_keep<T>(args.dropout), v_rows<T>(args.lora, chunk),
                   [&](auto... block) { pack_a<T>(slot, block...); });
    });
}

template <typename T>
void dv(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    for_spans<T>(args.lora, begin, end, [&](const Chunk& chunk, const Slot<T>& slot, Span span) {
        project<T>(dy_rows<T>(args, chunk.rows), chunk.len, slot.out, nullptr, span,
                   slot.scale * inverse_keep<T>(args.dropout), dv_rows<T>(args, chunk.rows),
                   [&](auto... block) { pack_b<T>(slot, block...); });
    });
}

// ------------------------------------------------------------------------------------------------
// dA, dB, dx: items are kColumns features of one span of one adapter. Adjacent items of a thread
// form one band, as wide as the accumulators allow.
struct Band {
    int32_t slot;
    int64_t span;
    int64_t begin, width;  // features
    int64_t items;
};
Band band_at(const LoraTrainArgs& args, int64_t item, int64_t last, int64_t features) {
    const int64_t spans = rank_spans(args.lora.bank.max_rank);
    const int64_t bands = blocks_of(features, kColumns), first = item % bands;
    const int64_t ranks = min(args.lora.bank.max_rank, kRankSpan);
    const int64_t fitting = kAccumulators / (blocks_of(ranks, 16) * 16 * kColumns);
    const int64_t items = min(min(bands - first, last - item), fitting);
    const int64_t begin = first * kColumns;
    return {static_cast<int32_t>(item / bands / spans), item / bands % spans, begin,
            min(items * kColumns, features - begin), items};
}
int64_t band_items(const LoraTrainArgs& args, int64_t features) {
    const LoraBank& bank = args.lora.bank;
    return bank.num_adapters * rank_spans(bank.max_rank) * blocks_of(features, kColumns);
}

// Return the width of a span's rows in dA or dB; ranks beyond the adapter's rank are zero.
int64_t span_width(const LoraBank& bank, const Span& span) {
    return min(kRankSpan, bank.max_rank - span.first);
}

// Return whether an adapter's da and db do not change.
bool leaves_unchanged(const LoraTrainArgs& args, const Segment& segment) {
    return args.accumulate && segment.len == 0;
}

// Adds n numbers, each sum rounded once. Not inlined: inlining this function or store_rounded makes
// the loops that call them slower.
template <typename T>
__attribute__((noinline)) void add_rounded(T* to, const Acc<T>* from, int64_t n) {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + L <= n; i += L) store(to + i, load(to + i) + load_bits<Vec<T>>(from + i));
    if (i < n) store_n(to + i, load_n(to + i, n - i) + load_n(from + i, n - i), n - i);
}
template <typename T>
LX_INLINE void store_sums(T* to, const Acc<T>* sums, int64_t n, bool accumulate) {
    if (accumulate)
        add_rounded<T>(to, sums, n);
    else
        store_rounded<T>(to, sums, n);
}

template <typename T>
void db(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> sums[kAccumulators], left[kRowBlock * kColumns],
        right[kRowBlock * kRankSpan];
    const LoraBank& bank = args.lora.bank;
    for (Band band; begin < end; begin += band.items) {
        band = band_at(args, begin, end, bank.out_features);
        const Span span = span_of(Slot<T>(bank, band.slot), band.span);
        const int64_t wide = whole_vectors<T>(span.ranks);
        const Segment segment = segment_of(args.lora, band.slot);
        if (leaves_unchanged(args, segment)) continue;
        for (int64_t i = 0; i < band.width * wide; ++i) sums[i] = 0;
        for (int64_t row = 0; wide > 0 && row < segment.len; row += kRowBlock) {
            const int64_t rows = min(kRowBlock, segment.len - row);
            const Rows<const Acc<T>> v{static_cast<const Acc<T>*>(args.lora.v),
                                       args.lora.v_row_stride, segment.rows + row};
            const Rows<const T> dy = dy_rows<T>(args, segment.rows + row);
            pack_rows<T>(v, rows, span.first, span.ranks, right, wide);
            for (int64_t o = 0; o < band.width; o += kColumns) {
                const int64_t outs = min(kColumns, band.width - o);
                pack_rows<T>(dy, rows, band.begin + o, outs, left, kColumns);
                add_product<T>(left, 1, kColumns, right, wide, rows, sums + o * wide, wide, outs,
                               wide);
            }
        }
        T* out = static_cast<T*>(args.db) +
                 (band.slot * int64_t{bank.out_features} + band.begin) * bank.max_rank + span.first;
        for (int64_t o = 0; o < band.width; ++o, out += bank.max_rank) {
            store_sums<T>(out, sums + o * wide, span.ranks, args.accumulate);
            for (int64_t r = span.ranks; r < span_width(bank, span); ++r) out[r] = T{};
        }
    }
}

template <typename T>
Rows<T> dx_rows(const LoraTrainArgs& args, const int32_t* rows) {
    return {static_cast<T*>(args.dx), args.dx_row_stride, rows};
}

// dx[i][begin + c] += sum over ranks of left[i][r] * right[r][c], if kept; rounded once.
template <typename T>
void add_to_dx(const Rows<T>& dx, int64_t rows, int64_t begin, int64_t width, const Acc<T>* left,
               int64_t left_row, const Acc<T>* right, int64_t rank, const Masks<kColumns>* masks) {
    constexpr int L = kLanes<T>;
    for_tiles<T>(rows, whole_vectors<T>(width), [&](auto count, auto vecs, int64_t row, int64_t c) {
        Vec<T> sum[count.value][vecs.value] = {};
        multiply_add<T>(left + row * left_row, left_row, 1, right + c, kColumns, rank, sum);
        for (int i = 0; i < count.value; ++i) {
            T* to = dx[row + i] + begin + c;
            for (int j = 0; j < vecs.value; ++j) {
                if (masks) sum[i][j] = keep_lanes<T>(sum[i][j], masks->bits(row + i, c + j * L));
                const int64_t n = width - c - j * L;
                if (n >= L)
                    store(to + j * L, load(to + j * L) + sum[i][j]);
                else
                    store_n(to + j * L, load_n(to + j * L, n) + sum[i][j], n);
            }
        }
    });
}

// Sums of dA, and a copy of A, are stored in dense blocks of kColumns features. with_dx: also
// computes dx, which requires that one span has all ranks.
template <typename T>
void da_bands(const LoraTrainArgs& args, bool with_dx, int64_t begin, int64_t end) {
    alignas(64) Acc<T> sums[kAccumulators], a[kAccumulators], xs[kRowBlock * kColumns],
        left[kRowBlock * kRankSpan];
    Masks<kColumns> masks;
    const LoraBank& bank = args.lora.bank;
    for (Band band; begin < end; begin += band.items) {
        band = band_at(args, begin, end, bank.in_features);
        const Slot<T> slot(bank, band.slot);
        const Span span = span_of(slot, band.span);
        const int64_t ranks = span.ranks, left_row = whole_vectors<T>(ranks);
        const Segment segment = segment_of(args.lora, band.slot);
        if (leaves_unchanged(args, segment)) continue;
        const DropoutKey key(args.dropout, band.slot, segment.rows, 0);
        const auto* kept = key.drops() ? &masks : nullptr;
        const auto for_blocks = [&](auto&& f) {
            for (int64_t c = 0; c < band.width; c += kColumns)
                f(c * ranks, band.begin + c, min(kColumns, band.width - c));
        };
        if (args.da)
            for (int64_t i = 0; i < band.items * kColumns * ranks; ++i) sums[i] = 0;
        if (with_dx && segment.len > 0)
            for_blocks([&](int64_t block, int64_t column, int64_t width) {
                const Rows<const T> rows{slot.a, slot.a_row, nullptr};
                pack_rows<T>(rows, ranks, column, width, a + block, kColumns);
            });
        for (int64_t row = 0; ranks > 0 && row < segment.len; row += kRowBlock) {
            const int64_t rows = min(kRowBlock, segment.len - row);
            const int32_t* index = segment.rows + row;
            pack_rows<T>(dv_rows<T>(args, index), rows, span.first, ranks, left, left_row);
            const Rows<const T> x{static_cast<const T*>(args.lora.x), args.lora.x_row_stride,
                                  index};
            for_blocks([&](int64_t block, int64_t column, int64_t width) {
                if (kept) masks.fill(key, row, rows, column, width);
                if (args.da) {
                    pack_rows<T>(x, rows, column, width, xs, kColumns, kept);
                    add_product<T>(left, 1, left_row, xs, kColumns, rows, sums + block, kColumns,
                                   ranks, whole_vectors<T>(width));
                }
                if (with_dx)
                    add_to_dx<T>(dx_rows<T>(args, index), rows, column, width, left, left_row,
                                 a + block, ranks, kept);
            });
        }
        if (!args.da) continue;
        T* out = static_cast<T*>(args.da) +
                 (band.slot * int64_t{bank.max_rank} + span.first) * bank.in_features;
        for_blocks([&](int64_t block, int64_t column, int64_t width) {
            for (int64_t r = 0; r < span_width(bank, span); ++r) {
                T* to = out + r * bank.in_features + column;
                if (r < ranks)
                    store_sums<T>(to, sums + block + r * kColumns, width, args.accumulate);
                else
                    for (int64_t i = 0; i < width; ++i) to[i] = T{};
            }
        });
    }
}

// dx for ranks of several spans: items are (kRankSpan features, chunk).
int64_t dx_items(const LoraTrainArgs& args) {
    return args.lora.plan[kPlanNumChunks] * blocks_of(args.lora.bank.in_features, kRankSpan);
}
template <typename T>
void dx(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    Masks<kRankSpan, kSumRows> masks;
    for_chunks(args.lora, begin, end, kSumRows, [&](const Chunk& chunk, int64_t block) {
        const Slot<T> slot(args.lora.bank, chunk.slot);
        if (slot.rank == 0) return;
        const int64_t column = block * kRankSpan, width = min(kRankSpan, slot.in - column);
        const Rows<const T> a{slot.a, slot.a_row, nullptr};
        const DropoutKey key = key_of(args, chunk);
        if (key.drops()) masks.fill(key, 0, chunk.len, column, width);
        add_update<T>(
            dv_rows<T>(args, chunk.rows), chunk.len, slot.rank, dx_rows<T>(args, chunk.rows),
            column, width,
            [&](int64_t r, int64_t n, int64_t c, int64_t count, Acc<T>* to, int64_t to_row) {
                pack_rows<T>(a.from(r), n, column + c, count, to, to_row);
            },
            [&](int64_t i, int64_t c, Vec<T> sum) __attribute__((always_inline)) {
                return key.drops() ? keep_lanes<T>(sum, masks.bits(i, c)) : sum;
            });
    });
}

// Items are the bands of dA, followed by the items of dx. If one span has all ranks, the bands
// compute dx as well, and there are no items of dx.
template <typename T>
void da_dx(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    const bool together = rank_spans(args.lora.bank.max_rank) == 1;
    const int64_t bands = args.da || together ? band_items(args, args.lora.bank.in_features) : 0;
    if (begin < bands) da_bands<T>(args, args.dx && together, begin, min(end, bands));
    if (end > bands) dx<T>(args, begin < bands ? 0 : begin - bands, end - bands);
}

// ------------------------------------------------------------------------------------------------
// Factors of rows and pages: items are chunks.
template <typename T, typename F>
void for_factors(const LoraTrainArgs& args, int64_t begin, int64_t end, F&& f) {
    const Acc<T> keep = inverse_keep<T>(args.dropout);
    for_chunks(args.lora, begin, end, 0, [&](const Chunk& chunk, int64_t) {
        const int64_t ranks = Slot<T>(args.lora.bank, chunk.slot).rank;
        const Factors<T> factors(args.lora, chunk);
        const Rows<Acc<T>> v = v_rows<T>(args.lora, chunk), dv = dv_rows<T>(args, chunk.rows),
                           weighed{static_cast<Acc<T>*>(args.weighed), args.weighed_row_stride,
                                   chunk.rows};
        for (int64_t i = 0; i < chunk.len; ++i)
            factors.for_pages(i, 0, ranks,
                              [&](int64_t r, int64_t last, Acc<T> scale, Acc<T> weight) {
                                  f(chunk.rows[i], factors.group(r / 8), r, last, scale * keep,
                                    weight, args.lora.v ? v[i] : nullptr, args.dv ? dv[i] : nullptr,
                                    args.weighed ? weighed[i] : nullptr);
                              });
    });
}

template <typename T>
void weigh(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    for_factors<T>(args, begin, end,
                   [](int64_t, int64_t, int64_t r, int64_t last, Acc<T> factor, Acc<T> weight,
                      Acc<T>* v, Acc<T>*, Acc<T>* weighed) {
                       for (; r < last; ++r) {
                           v[r] = factor * v[r];
                           if (weighed) weighed[r] = v[r] * weight;
                       }
                   });
}

template <typename T>
void weigh_back(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    for_factors<T>(args, begin, end,
                   [&](int64_t row, int64_t group, int64_t first, int64_t last, Acc<T> factor,
                       Acc<T> weight, Acc<T>* v, Acc<T>* dv, Acc<T>* weighed) {
                       if (weighed)
                           for (int64_t r = first; r < last; ++r) weighed[r] = v[r] * weight;
                       if (!dv) return;
                       if (args.dweights) {
                           Acc<T> sum = 0;
                           for (int64_t r = first; r < last; ++r) sum += dv[r] * v[r];
                           args.dweights[row * args.dweights_row_stride + group] += sum;
                       }
                       for (int64_t r = first; r < last; ++r) dv[r] = factor * dv[r] * weight;
                   });
}

// ------------------------------------------------------------------------------------------------
// Dropout alone
template <typename T>
void dropout(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    const DropoutKey key(args.dropout, 0, nullptr, 0);
    const int64_t columns = args.lora.bank.in_features;
    const Vec<T> factor = broadcast<T>(inverse_keep<T>(args.dropout));
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.lora.x) + row * args.lora.x_row_stride;
        T* y = static_cast<T*>(args.lora.y) + row * args.lora.y_row_stride;
        for (int64_t block = 0; block < columns; block += kMaskColumns) {
            const uint64_t bits = keep_bits(key, key.row(row), block);
            for (int64_t c = block; c < min(block + kMaskColumns, columns); c += L) {
                const int64_t n = columns - c;
                if (n >= L)
                    store(y + c, keep_lanes<T>(load(x + c) * factor, bits >> (c - block)));
                else
                    store_n(y + c, keep_lanes<T>(load_n(x + c, n) * factor, bits >> (c - block)),
                            n);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Table of functions
int64_t span_items(const LoraTrainArgs& args) {
    return args.lora.plan[kPlanNumChunks] * rank_spans(args.lora.bank.max_rank);
}
int64_t db_items(const LoraTrainArgs& args) {
    return band_items(args, args.lora.bank.out_features);
}
int64_t da_dx_items(const LoraTrainArgs& args) {
    const int64_t bands = band_items(args, args.lora.bank.in_features);
    if (rank_spans(args.lora.bank.max_rank) == 1) return bands;
    return (args.da ? bands : 0) + (args.dx ? dx_items(args) : 0);
}

}  // namespace

extern const LoraTrainCpu train_table;
const LoraTrainCpu train_table = {
    LX_ISA_NAME,        span_items,         LX_BY_DTYPE(shrink),     span_items,
    LX_BY_DTYPE(dv),    db_items,           LX_BY_DTYPE(db),         da_dx_items,
    LX_BY_DTYPE(da_dx), LX_BY_DTYPE(weigh), LX_BY_DTYPE(weigh_back), LX_BY_DTYPE(dropout)};

}  // namespace lora_ext::LX_ISA
