// Training of batched LoRA on the CPU, compiled once per instruction set.
//
//   v[t, :]  = c * A (m * x[t, :])            vector lanes run over ranks
//   dv[t, :] = c * dy[t, :] B                 ranks
//   dB       = sum_t dy[t, :]^T v[t, :]       ranks
//   dA       = sum_t dv[t, :]^T (m * x)[t, :] inputs
//   dx[t, :] = dx[t, :] + m * (dv[t, :] A)    inputs
//
// Order of every sum, so that no bit depends on threads or on the adapters beside it: one
// accumulator each, features ascending in v and dv (then times c), the adapter's rows ascending in
// dA and dB, ranks ascending in dx (then dx + sum, rounded once).
//
// All five are products of two blocks, packed into stack buffers (widened, masked, transposed so
// that lanes run along a row, and laid out densely: rows whole powers of two apart would share one
// set of the L1 cache) while kTileRows x 2 vectors of the result sit in registers.
#include "dropout.h"
#include "lora_rows.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = 6;              // x 2 vectors: 12 accumulators
constexpr int64_t kRowBlock = 64;         // rows packed at a time
constexpr int64_t kDepth = 128;           // v, dv: features packed at a time
constexpr int64_t kRankBlock = 64;        // v, dv: ranks packed at a time
constexpr int64_t kColumns = 64;          // dA, dB, dx: features packed at a time, and of an item
constexpr int64_t kAccumulators = 16384;  // dA, dB: of one band
constexpr int64_t kMaxRank = 256;
static_assert(kColumns == kMaskColumns && kDepth % kMaskColumns == 0);

// ------------------------------------------------------------------------------------------------
// Products of packed blocks

// Calls f(Int<rows>, Int<vectors>, row, column) for tiles that cover rows x columns; columns is a
// whole number of vectors.
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

// acc += left * right, of rows x columns; the sums go on from what acc holds.
template <typename T>
void add_product(const Acc<T>* left, int64_t left_row, int64_t left_step, const Acc<T>* right,
                 int64_t right_row, int64_t depth, Acc<T>* acc, int64_t acc_row, int64_t rows,
                 int64_t columns) {
    for_tiles<T>(rows, columns, [&](auto count, auto vecs, int64_t row, int64_t c) {
        constexpr int L = kLanes<T>;
        Vec<T> sum[count.value][vecs.value];
        Acc<T>* a = acc + row * acc_row + c;
        for (int i = 0; i < count.value; ++i)
            for (int j = 0; j < vecs.value; ++j)
                sum[i][j] = load_bits<Vec<T>>(a + i * acc_row + j * L);
        multiply_add<T>(left + row * left_row, left_row, left_step, right + c, right_row, depth,
                        sum);
        for (int i = 0; i < count.value; ++i)
            for (int j = 0; j < vecs.value; ++j)
                __builtin_memcpy(a + i * acc_row + j * L, &sum[i][j], sizeof(Vec<T>));
    });
}

// ------------------------------------------------------------------------------------------------
// Packing

template <typename T>
LX_INLINE void put(Acc<T>* to, Vec<T> v) {
    __builtin_memcpy(to, &v, sizeof(v));
}

// The masks of rows x columns: word(i, c) is that of the 64 columns from c on.
template <int64_t kWidth>
struct Masks {
    uint64_t words[kRowBlock][kWidth / kMaskColumns];

    void fill(const DropoutKey& key, const int32_t* rows, int64_t num_rows, int64_t begin,
              int64_t width) {
        for (int64_t i = 0; i < num_rows; ++i)
            for (int64_t c = 0; c < width; c += kMaskColumns)
                words[i][c / kMaskColumns] =
                    keep_bits(key, static_cast<uint32_t>(rows[i]), begin + c);
    }
    // From column c on.
    LX_INLINE uint64_t bits(int64_t i, int64_t c) const {
        return words[i][c / kMaskColumns] >> c % kMaskColumns;
    }
};

// to[i][c] = from[i][begin + c], widened, zero where a mask says so; zero up to a whole vector.
template <typename T, typename E, int64_t kWidth = kColumns>
void pack_rows(const Rows<E>& from, int64_t rows, int64_t begin, int64_t width, Acc<T>* to,
               int64_t to_row, const Masks<kWidth>* masks = nullptr) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const auto* p = from[i] + begin;
        Acc<T>* q = to + i * to_row;
        for (int64_t c = 0; c < width; c += L) {
            const auto v = c + L <= width ? load(p + c) : load_n(p + c, width - c);
            put<T>(q + c, masks ? keep_lanes<T>(v, masks->bits(i, c)) : v);
        }
    }
}

// to[k][r] = A[first + r][begin + k], zero up to a whole vector.
template <typename T>
void pack_a(const Slot<T>& slot, int64_t begin, int64_t depth, int64_t first, int64_t ranks,
            Acc<T>* to, int64_t to_row) {
    constexpr int L = kLanes<T>;
    for (int64_t r = 0; r < ranks; r += L)
        for (int64_t k = 0; k < depth; k += 8) {
            const T* a = slot.a + (first + r) * slot.a_row + begin + k;
            Vec<T> columns[8];
            const int count = static_cast<int>(min(8, depth - k));
            if (r + L <= ranks && count == 8)
                load_transposed(a, slot.a_row, columns);
            else
                load_transposed_part(a, slot.a_row, min(L, ranks - r), count, columns);
            for (int j = 0; j < count; ++j) put<T>(to + (k + j) * to_row + r, columns[j]);
        }
}

// to[o][r] = B[begin + o][first + r], zero up to a whole vector.
template <typename T>
void pack_b(const Slot<T>& slot, int64_t begin, int64_t depth, int64_t first, int64_t ranks,
            Acc<T>* to, int64_t to_row) {
    const Rows<const T> rows{slot.b + begin * slot.b_row, slot.b_row, nullptr};
    pack_rows<T>(rows, depth, first, ranks, to, to_row);
}

// ------------------------------------------------------------------------------------------------
// v and dv: out[t][r] = factor * sum_k left[t][k] * right[k][r], where pack_right packs a block of
// right.
template <typename T, typename Pack>
void project(const Rows<const T>& left, int64_t rows, int64_t features, const DropoutKey* key,
             const Slot<T>& slot, Acc<T> factor, const Rows<Acc<T>>& out, Pack&& pack_right) {
    alignas(64) Acc<T> block[kRowBlock * kDepth], right[kDepth * kRankBlock],
        sums[kRowBlock * kMaxRank];
    Masks<kDepth> masks;
    const int64_t wide = whole_vectors<T>(slot.rank);
    for (int64_t i = 0; i < rows * wide; ++i) sums[i] = 0;
    for (int64_t k = 0; k < features; k += kDepth) {
        const int64_t depth = min(kDepth, features - k);
        if (key) masks.fill(*key, left.index, rows, k, depth);
        pack_rows<T>(left, rows, k, depth, block, kDepth, key ? &masks : nullptr);
        for (int64_t first = 0; first < slot.rank; first += kRankBlock) {
            const int64_t ranks = min(kRankBlock, slot.rank - first);
            const int64_t columns = whole_vectors<T>(ranks);
            pack_right(slot, k, depth, first, ranks, right, columns);
            add_product<T>(block, kDepth, 1, right, columns, depth, sums + first, wide, rows,
                           columns);
        }
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < slot.rank; ++r) out[i][r] = factor * sums[i * wide + r];
}

template <typename T>
Rows<const T> dy_rows(const LoraTrainArgs& args, const int32_t* rows) {
    return {static_cast<const T*>(args.dy), args.dy_row_stride, rows};
}
template <typename T>
Rows<Acc<T>> dv_rows(const LoraTrainArgs& args, const int32_t* rows) {
    return {static_cast<Acc<T>*>(args.dv), args.dv_row_stride, rows};
}

template <typename T>
void shrink(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    const DropoutKey key(args.dropout);
    for (int64_t c = begin; c < end; ++c) {
        const Chunk chunk = chunk_at(args.lora, c);
        const Slot<T> slot(args.lora.bank, chunk.slot);
        const Acc<T> factor = slot.scale * inverse_keep<T>(args.dropout);
        for (int64_t row = 0; row < chunk.len && slot.rank > 0; row += kRowBlock)
            project<T>(x_rows<T>(args.lora, chunk).from(row), min(kRowBlock, chunk.len - row),
                       slot.in, key.drops() ? &key : nullptr, slot, factor,
                       v_rows<T>(args.lora, chunk).from(row), pack_a<T>);
    }
}

template <typename T>
void dv(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
        const Chunk chunk = chunk_at(args.lora, c);
        const Slot<T> slot(args.lora.bank, chunk.slot);
        const Acc<T> factor = slot.scale * inverse_keep<T>(args.dropout);
        for (int64_t row = 0; row < chunk.len && slot.rank > 0; row += kRowBlock)
            project<T>(dy_rows<T>(args, chunk.rows + row), min(kRowBlock, chunk.len - row),
                       slot.out, nullptr, slot, factor, dv_rows<T>(args, chunk.rows + row),
                       pack_b<T>);
    }
}

// ------------------------------------------------------------------------------------------------
// dA, dB, dx: items are kColumns features of one adapter; adjacent items of a thread are walked as
// one band, as wide as the accumulators allow.
struct Band {
    int32_t slot;
    int64_t begin, width;  // features
    int64_t items;
};
Band band_at(const LoraTrainArgs& args, int64_t item, int64_t last, int64_t features) {
    const int64_t bands = blocks_of(features, kColumns), first = item % bands;
    const int64_t fitting =
        kAccumulators / (blocks_of(args.lora.bank.max_rank, 16) * 16 * kColumns);
    const int64_t items = min(min(bands - first, last - item), fitting);
    const int64_t begin = first * kColumns;
    return {static_cast<int32_t>(item / bands), begin, min(items * kColumns, features - begin),
            items};
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

template <typename T>
void db(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> sums[kAccumulators], left[kRowBlock * kColumns], right[kRowBlock * kMaxRank];
    const LoraBank& bank = args.lora.bank;
    for (Band band; begin < end; begin += band.items) {
        band = band_at(args, begin, end, bank.out_features);
        const Slot<T> slot(bank, band.slot);
        const int64_t wide = whole_vectors<T>(slot.rank);
        const Segment segment = segment_of(args.lora, band.slot);
        for (int64_t i = 0; i < band.width * wide; ++i) sums[i] = 0;
        for (int64_t row = 0; wide > 0 && row < segment.len; row += kRowBlock) {
            const int64_t rows = min(kRowBlock, segment.len - row);
            const Rows<const Acc<T>> v{static_cast<const Acc<T>*>(args.lora.v),
                                       args.lora.v_row_stride, segment.rows + row};
            const Rows<const T> dy = dy_rows<T>(args, segment.rows + row);
            pack_rows<T>(v, rows, 0, slot.rank, right, wide);
            for (int64_t o = 0; o < band.width; o += kColumns) {
                const int64_t outs = min(kColumns, band.width - o);
                pack_rows<T>(dy, rows, band.begin + o, outs, left, kColumns);
                add_product<T>(left, 1, kColumns, right, wide, rows, sums + o * wide, wide, outs,
                               wide);
            }
        }
        T* out = static_cast<T*>(args.db) +
                 (band.slot * int64_t{bank.out_features} + band.begin) * bank.max_rank;
        for (int64_t o = 0; o < band.width; ++o, out += bank.max_rank) {
            store_rounded<T>(out, sums + o * wide, slot.rank);
            for (int64_t r = slot.rank; r < bank.max_rank; ++r) out[r] = T{};
        }
    }
}

// dx[i][begin + c] += sum over ranks of left[i][r] * right[r][c], where kept; rounded once.
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

// Blocks of kColumns features, each dense: the accumulators of dA, and A itself.
template <typename T>
void da_dx(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> sums[kAccumulators], a[kAccumulators], xs[kRowBlock * kColumns],
        left[kRowBlock * kMaxRank];
    Masks<kColumns> masks;
    const LoraBank& bank = args.lora.bank;
    const DropoutKey key(args.dropout);
    const auto* kept = key.drops() ? &masks : nullptr;
    for (Band band; begin < end; begin += band.items) {
        band = band_at(args, begin, end, bank.in_features);
        const Slot<T> slot(bank, band.slot);
        const int64_t rank = slot.rank, left_row = whole_vectors<T>(rank);
        const Segment segment = segment_of(args.lora, band.slot);
        const auto for_blocks = [&](auto&& f) {
            for (int64_t c = 0; c < band.width; c += kColumns)
                f(c * rank, band.begin + c, min(kColumns, band.width - c));
        };
        for (int64_t i = 0; i < band.items * kColumns * rank; ++i) sums[i] = 0;
        if (args.dx && segment.len > 0)
            for_blocks([&](int64_t block, int64_t column, int64_t width) {
                const Rows<const T> ranks{slot.a, slot.a_row, nullptr};
                pack_rows<T>(ranks, rank, column, width, a + block, kColumns);
            });
        for (int64_t row = 0; rank > 0 && row < segment.len; row += kRowBlock) {
            const int64_t rows = min(kRowBlock, segment.len - row);
            const int32_t* index = segment.rows + row;
            pack_rows<T>(dv_rows<T>(args, index), rows, 0, rank, left, left_row);
            const Rows<const T> x{static_cast<const T*>(args.lora.x), args.lora.x_row_stride,
                                  index};
            const Rows<T> dx{static_cast<T*>(args.dx), args.dx_row_stride, index};
            for_blocks([&](int64_t block, int64_t column, int64_t width) {
                if (kept) masks.fill(key, index, rows, column, width);
                if (args.da) {
                    pack_rows<T>(x, rows, column, width, xs, kColumns, kept);
                    add_product<T>(left, 1, left_row, xs, kColumns, rows, sums + block, kColumns,
                                   rank, whole_vectors<T>(width));
                }
                if (args.dx)
                    add_to_dx<T>(dx, rows, column, width, left, left_row, a + block, rank, kept);
            });
        }
        if (!args.da) continue;
        T* out = static_cast<T*>(args.da) + band.slot * int64_t{bank.max_rank} * bank.in_features;
        for_blocks([&](int64_t block, int64_t column, int64_t width) {
            for (int64_t r = 0; r < bank.max_rank; ++r) {
                T* to = out + r * bank.in_features + column;
                if (r < rank)
                    store_rounded<T>(to, sums + block + r * kColumns, width);
                else
                    for (int64_t i = 0; i < width; ++i) to[i] = T{};
            }
        });
    }
}

// ------------------------------------------------------------------------------------------------
// Dropout alone
template <typename T>
void dropout(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    const DropoutKey key(args.dropout);
    const int64_t columns = args.lora.bank.in_features;
    const Vec<T> factor = broadcast<T>(inverse_keep<T>(args.dropout));
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.lora.x) + row * args.lora.x_row_stride;
        T* y = static_cast<T*>(args.lora.y) + row * args.lora.y_row_stride;
        for (int64_t block = 0; block < columns; block += kMaskColumns) {
            const uint64_t bits = keep_bits(key, static_cast<uint32_t>(row), block);
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
// The table
int64_t chunk_items(const LoraTrainArgs& args) {
    return args.lora.plan[kPlanNumChunks];
}
int64_t db_items(const LoraTrainArgs& args) {
    return args.lora.bank.num_adapters * blocks_of(args.lora.bank.out_features, kColumns);
}
int64_t da_dx_items(const LoraTrainArgs& args) {
    return args.lora.bank.num_adapters * blocks_of(args.lora.bank.in_features, kColumns);
}

}  // namespace

extern const LoraTrainCpu train_table;
const LoraTrainCpu train_table = {
    LX_ISA_NAME, chunk_items,     LX_BY_DTYPE(shrink), chunk_items,        LX_BY_DTYPE(dv),
    db_items,    LX_BY_DTYPE(db), da_dx_items,         LX_BY_DTYPE(da_dx), LX_BY_DTYPE(dropout)};

}  // namespace lora_ext::LX_ISA
