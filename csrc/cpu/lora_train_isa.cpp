// Training of batched LoRA on the CPU, compiled once per instruction set.
//
//   v[t, :]  = c * A (m * x[t, :])            shrink with dropout: dot products along I
//   dv[t, :] = c * dy[t, :] B                 vector lanes run over ranks
//   dB       = sum_t dy[t, :]^T v[t, :]       vector lanes run over ranks
//   dA       = sum_t dv[t, :]^T (m * x)[t, :] vector lanes run over inputs
//   dx[t, :] = dx[t, :] + m * (dv[t, :] A)    vector lanes run over inputs
//
// Order of every sum, so that no bit depends on threads or on the adapters beside it: v as in
// lora_shrink.h; dv one accumulator, outputs ascending, then times c; dA and dB one accumulator,
// the adapter's rows ascending; dx one accumulator, ranks ascending, then dx + sum, rounded once.
//
// All but v are products of two blocks of floats, packed (widened, masked, transposed to lanes)
// into stack buffers that stay in L1 or L2 while kTileRows x 2 vectors of the result sit in
// registers.
#include "dropout.h"
#include "lora_shrink.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = 6;              // x 2 vectors: 12 accumulators
constexpr int64_t kRowBlock = 64;         // rows of x or dy packed at a time
constexpr int64_t kColumns = 128;         // columns packed at a time
constexpr int64_t kRankBlock = 64;        // dv: ranks whose accumulators wait on the stack
constexpr int64_t kAccumulators = 16384;  // dA, dB: of one band
constexpr int64_t kItemColumns = 64;      // of an item; a multiple of every kMaskColumns
constexpr int64_t kMaxRank = 256;

template <typename T>
LX_INLINE int64_t whole_vectors(int64_t n) {
    return blocks_of(n, kLanes<T>) * kLanes<T>;
}

// ------------------------------------------------------------------------------------------------
// Products of packed blocks

// acc[i][c] += sum over k of left[i * left_row + k * left_step] * right[k * right_row + c]; the sum
// goes on from what acc holds.
template <typename T, int kRows, int kVecs>
LX_INLINE void product_tile(const Acc<T>* left, int64_t left_row, int64_t left_step,
                            const Acc<T>* right, int64_t right_row, int64_t depth, Acc<T>* acc,
                            int64_t acc_row) {
    constexpr int L = kLanes<T>;
    Vec<T> sum[kRows][kVecs];
    for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < kVecs; ++c) sum[i][c] = load_bits<Vec<T>>(acc + i * acc_row + c * L);
    for (int64_t k = 0; k < depth; ++k, left += left_step, right += right_row) {
        Vec<T> r[kVecs];
        for (int c = 0; c < kVecs; ++c) r[c] = load_bits<Vec<T>>(right + c * L);
        for (int i = 0; i < kRows; ++i) {
            const Vec<T> l = broadcast<T>(left[i * left_row]);
            for (int c = 0; c < kVecs; ++c) sum[i][c] = fma(r[c], l, sum[i][c]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < kVecs; ++c)
            __builtin_memcpy(acc + i * acc_row + c * L, &sum[i][c], sizeof(Vec<T>));
}

// The same for a block of `rows` x `columns`, columns a whole number of vectors.
template <typename T>
void product(const Acc<T>* left, int64_t left_row, int64_t left_step, const Acc<T>* right,
             int64_t right_row, int64_t depth, Acc<T>* acc, int64_t acc_row, int64_t rows,
             int64_t columns) {
    constexpr int L = kLanes<T>;
    for (int64_t c = 0, vecs; c < columns; c += vecs * L) {
        vecs = min(2, (columns - c) / L);
        for (int64_t row = 0, tiles = blocks_of(rows, kTileRows), n; row < rows; row += n) {
            n = blocks_of(rows - row, tiles--);
            with_constant<kTileRows>(n, [&](auto count) {
                const Acc<T>* l = left + row * left_row;
                Acc<T>* a = acc + row * acc_row + c;
                if (vecs == 2)
                    product_tile<T, count.value, 2>(l, left_row, left_step, right + c, right_row,
                                                    depth, a, acc_row);
                else
                    product_tile<T, count.value, 1>(l, left_row, left_step, right + c, right_row,
                                                    depth, a, acc_row);
            });
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Packing

// to[i][c] = from[i][begin + c], widened; zero up to a whole vector.
template <typename T, typename E>
void pack_rows(const Rows<E>& from, int64_t rows, int64_t begin, int64_t width, Acc<T>* to,
               int64_t to_row) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const auto* p = from[i] + begin;
        Acc<T>* q = to + i * to_row;
        int64_t c = 0;
        for (; c + L <= width; c += L) {
            const Vec<T> v = load(p + c);
            __builtin_memcpy(q + c, &v, sizeof(v));
        }
        if (c < width) {
            const Vec<T> v = load_n(p + c, width - c);
            __builtin_memcpy(q + c, &v, sizeof(v));
        }
    }
}

// pack_rows with dropout: the mask of row i goes to bits[i * kColumns / 64 ..].
template <typename T>
void pack_kept(const DropoutKey& key, const Rows<const T>& x, int64_t rows, int64_t begin,
               int64_t width, Acc<T>* to) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const T* p = x[i];
        Acc<T>* q = to + i * kColumns;
        for_kept<T>(key, static_cast<uint32_t>(x.index[i]), begin, begin + width,
                    [&](int64_t c, uint64_t bits) {
                        const int64_t n = begin + width - c;
                        const Vec<T> v =
                            keep_lanes<T>(n >= L ? load(p + c) : load_n(p + c, n), bits);
                        __builtin_memcpy(q + (c - begin), &v, sizeof(v));
                    });
    }
}

// ------------------------------------------------------------------------------------------------
// v with dropout: x is copied block by block, some of its elements replaced by zero.
template <typename T>
void shrink(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) T copy[kGroupRows][kDotBlock + kMaskColumns];
    const DropoutKey key(args.dropout);
    for (int64_t c = begin; c < end; ++c) {
        const Chunk chunk = chunk_at(args.lora, c);
        Slot<T> slot(args.lora.bank, chunk.slot);
        slot.scale *= static_cast<Acc<T>>(args.dropout.inverse_keep);
        const auto x = x_rows<T>(args.lora, chunk);
        const auto v = v_rows<T>(args.lora, chunk);
        if (!key.drops()) {
            shrink_rows<T>(slot, x, chunk.len, v);
            continue;
        }
        for (int64_t row = 0; row < chunk.len; row += kGroupRows) {
            const auto from = x.from(row);
            const auto kept = [&](int64_t i, int64_t k, int64_t k_end) -> const T* {
                for_kept<T>(key, static_cast<uint32_t>(from.index[i]), k, k_end,
                            [&](int64_t c, uint64_t bits) {
                                const int64_t n = min(k_end - c, kLanes<T>);
                                for (int64_t l = 0; l < n; ++l)
                                    copy[i][c - k + l] = bits >> l & 1 ? from[i][c + l] : T{};
                            });
                return copy[i] - k;
            };
            for (int64_t r = 0; r < slot.rank; r += kGroupRanks)
                shrink_group<T>(slot, kept, min(chunk.len - row, kGroupRows), r,
                                min(r + kGroupRanks, slot.rank), v.from(row));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// dv
template <typename T>
Rows<const T> dy_rows(const LoraTrainArgs& args, const int32_t* rows) {
    return {static_cast<const T*>(args.dy), args.dy_row_stride, rows};
}

// bt[o][r] = B[o][first + r], zero up to a whole vector.
template <typename T>
void pack_b(const Slot<T>& slot, int64_t o, int64_t outs, int64_t first, int64_t ranks, Acc<T>* to,
            int64_t to_row) {
    for (int64_t r = 0; r < ranks; r += 8) {
        const Rows<const T> page{slot.b_page((first + r) / 8) + o * slot.b_row, slot.b_row,
                                 nullptr};
        pack_rows<T>(page, outs, 0, min(8, ranks - r), to + r, to_row);
    }
}

template <typename T>
void dv(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> left[kRowBlock * kColumns], right[kColumns * kRankBlock],
        sums[kRowBlock * kRankBlock];
    for (int64_t c = begin; c < end; ++c) {
        const Chunk chunk = chunk_at(args.lora, c);
        const Slot<T> slot(args.lora.bank, chunk.slot);
        const Acc<T> factor = slot.scale * static_cast<Acc<T>>(args.dropout.inverse_keep);
        for (int64_t row = 0; row < chunk.len; row += kRowBlock)
            for (int64_t first = 0; first < slot.rank; first += kRankBlock) {
                const int64_t rows = min(kRowBlock, chunk.len - row);
                const int64_t ranks = min(kRankBlock, slot.rank - first);
                const int64_t wide = whole_vectors<T>(ranks);
                for (int64_t i = 0; i < rows * wide; ++i) sums[i] = 0;
                for (int64_t o = 0; o < slot.out; o += kColumns) {
                    const int64_t outs = min(kColumns, slot.out - o);
                    pack_rows<T>(dy_rows<T>(args, chunk.rows + row), rows, o, outs, left, kColumns);
                    pack_b<T>(slot, o, outs, first, ranks, right, wide);
                    product<T>(left, kColumns, 1, right, wide, outs, sums, wide, rows, wide);
                }
                for (int64_t i = 0; i < rows; ++i) {
                    Acc<T>* to = static_cast<Acc<T>*>(args.dv) +
                                 chunk.rows[row + i] * args.dv_row_stride + first;
                    for (int64_t r = 0; r < ranks; ++r) to[r] = factor * sums[i * wide + r];
                }
            }
    }
}

// ------------------------------------------------------------------------------------------------
// dA, dB, dx: items are bands of kItemColumns features of one adapter; adjacent items of a thread
// are walked as one band, as wide as the accumulators allow.
struct Band {
    int32_t slot;
    int64_t begin, end;  // features
    int64_t items;
};
Band band_at(const LoraTrainArgs& args, int64_t item, int64_t last, int64_t features) {
    const LoraBank& bank = args.lora.bank;
    const int64_t bands = blocks_of(features, kItemColumns), first = item % bands;
    const int64_t fitting = kAccumulators / (blocks_of(bank.max_rank, 16) * 16 * kItemColumns);
    const int64_t items = min(min(bands - first, last - item), fitting);
    return {static_cast<int32_t>(item / bands), first * kItemColumns,
            min((first + items) * kItemColumns, features), items};
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
void store_rounded(T* to, const Acc<T>* from, int64_t n) {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + L <= n; i += L) store(to + i, load_bits<Vec<T>>(from + i));
    if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

template <typename T>
void db(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> sums[kAccumulators], left[kRowBlock * kColumns], right[kRowBlock * kMaxRank];
    const LoraBank& bank = args.lora.bank;
    for (Band band; begin < end; begin += band.items) {
        band = band_at(args, begin, end, bank.out_features);
        const Slot<T> slot(bank, band.slot);
        const int64_t wide = whole_vectors<T>(slot.rank), width = band.end - band.begin;
        const Segment segment = segment_of(args.lora, band.slot);
        for (int64_t i = 0; i < width * wide; ++i) sums[i] = 0;
        for (int64_t row = 0; wide > 0 && row < segment.len; row += kRowBlock) {
            const int64_t rows = min(kRowBlock, segment.len - row);
            const Rows<const Acc<T>> v{static_cast<const Acc<T>*>(args.lora.v),
                                       args.lora.v_row_stride, segment.rows + row};
            pack_rows<T>(v, rows, 0, slot.rank, right, wide);
            for (int64_t o = 0; o < width; o += kColumns) {
                const int64_t outs = min(kColumns, width - o);
                pack_rows<T>(dy_rows<T>(args, segment.rows + row), rows, band.begin + o, outs, left,
                             kColumns);
                product<T>(left, 1, kColumns, right, wide, rows, sums + o * wide, wide, outs, wide);
            }
        }
        T* out = static_cast<T*>(args.db) +
                 (band.slot * int64_t{bank.out_features} + band.begin) * bank.max_rank;
        for (int64_t o = 0; o < width; ++o, out += bank.max_rank) {
            store_rounded<T>(out, sums + o * wide, slot.rank);
            for (int64_t r = slot.rank; r < bank.max_rank; ++r) out[r] = T{};
        }
    }
}

// dx[i][c] += deltas[i][c], rounded once; only kept columns change.
template <typename T>
void add_rows(const DropoutKey& key, const Rows<T>& dx, int64_t rows, int64_t begin, int64_t width,
              const Acc<T>* deltas) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        T* to = dx[i];
        const auto add = [&](int64_t c, Vec<T> delta) {
            const int64_t n = begin + width - c;
            if (n >= L)
                store(to + c, load(to + c) + delta);
            else
                store_n(to + c, load_n(to + c, n) + delta, n);
        };
        const auto delta = [&](int64_t c) {
            return load_bits<Vec<T>>(deltas + i * kColumns + c - begin);
        };
        if (key.drops())
            for_kept<T>(key, static_cast<uint32_t>(dx.index[i]), begin, begin + width,
                        [&](int64_t c, uint64_t bits) { add(c, keep_lanes<T>(delta(c), bits)); });
        else
            for (int64_t c = begin; c < begin + width; c += L) add(c, delta(c));
    }
}

template <typename T>
void da_dx(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    alignas(64) Acc<T> sums[kAccumulators], factor[kAccumulators], xs[kRowBlock * kColumns],
        deltas[kRowBlock * kColumns], left[kRowBlock * kMaxRank];
    const LoraBank& bank = args.lora.bank;
    const DropoutKey key(args.dropout);
    for (Band band; begin < end; begin += band.items) {
        band = band_at(args, begin, end, bank.in_features);
        const Slot<T> slot(bank, band.slot);
        const int64_t rank = slot.rank, width = band.end - band.begin;
        const int64_t wide = whole_vectors<T>(width);
        const Segment segment = segment_of(args.lora, band.slot);
        if (args.dx && segment.len > 0)
            pack_rows<T>(Rows<const T>{slot.a, slot.a_row, nullptr}, rank, band.begin, width,
                         factor, wide);
        for (int64_t i = 0; i < rank * wide; ++i) sums[i] = 0;
        for (int64_t row = 0; rank > 0 && row < segment.len; row += kRowBlock) {
            const int64_t rows = min(kRowBlock, segment.len - row);
            const int32_t* index = segment.rows + row;
            const Rows<const Acc<T>> dvs{static_cast<const Acc<T>*>(args.dv), args.dv_row_stride,
                                         index};
            const int64_t left_row = whole_vectors<T>(rank);
            pack_rows<T>(dvs, rows, 0, rank, left, left_row);
            const Rows<const T> x{static_cast<const T*>(args.lora.x), args.lora.x_row_stride,
                                  index};
            for (int64_t c = 0; c < width; c += kColumns) {
                const int64_t columns = min(kColumns, width - c), whole = whole_vectors<T>(columns);
                const int64_t at = band.begin + c;
                if (args.da) {
                    if (key.drops())
                        pack_kept<T>(key, x, rows, at, columns, xs);
                    else
                        pack_rows<T>(x, rows, at, columns, xs, kColumns);
                    product<T>(left, 1, left_row, xs, kColumns, rows, sums + c, wide, rank, whole);
                }
                if (args.dx) {
                    for (int64_t i = 0; i < rows * kColumns; ++i) deltas[i] = 0;
                    product<T>(left, left_row, 1, factor + c, wide, rank, deltas, kColumns, rows,
                               whole);
                    add_rows<T>(key, {static_cast<T*>(args.dx), args.dx_row_stride, index}, rows,
                                at, columns, deltas);
                }
            }
        }
        if (!args.da) continue;
        T* out = static_cast<T*>(args.da) + band.slot * int64_t{bank.max_rank} * bank.in_features +
                 band.begin;
        for (int64_t r = 0; r < bank.max_rank; ++r, out += bank.in_features) {
            if (r < rank)
                store_rounded<T>(out, sums + r * wide, width);
            else
                for (int64_t i = 0; i < width; ++i) out[i] = T{};
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Dropout alone
template <typename T>
void dropout(const LoraTrainArgs& args, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    const DropoutKey key(args.dropout);
    const int64_t columns = args.lora.bank.in_features;
    const Vec<T> factor = broadcast<T>(static_cast<Acc<T>>(args.dropout.inverse_keep));
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.lora.x) + row * args.lora.x_row_stride;
        T* y = static_cast<T*>(args.lora.y) + row * args.lora.y_row_stride;
        for_kept<T>(key, static_cast<uint32_t>(row), 0, columns, [&](int64_t c, uint64_t bits) {
            const int64_t n = columns - c;
            if (n >= L)
                store(y + c, keep_lanes<T>(load(x + c) * factor, bits));
            else
                store_n(y + c, keep_lanes<T>(load_n(x + c, n) * factor, bits), n);
        });
    }
}

// ------------------------------------------------------------------------------------------------
// The table
template <typename T>
struct Shrink {
    static constexpr auto run = shrink<T>;
};
template <typename T>
struct Dv {
    static constexpr auto run = dv<T>;
};
template <typename T>
struct Db {
    static constexpr auto run = db<T>;
};
template <typename T>
struct DaDx {
    static constexpr auto run = da_dx<T>;
};
template <typename T>
struct Drop {
    static constexpr auto run = dropout<T>;
};

int64_t chunk_items(const LoraTrainArgs& args) {
    return args.lora.plan[kPlanNumChunks];
}
int64_t db_items(const LoraTrainArgs& args) {
    return args.lora.bank.num_adapters * blocks_of(args.lora.bank.out_features, kItemColumns);
}
int64_t da_dx_items(const LoraTrainArgs& args) {
    return args.lora.bank.num_adapters * blocks_of(args.lora.bank.in_features, kItemColumns);
}

}  // namespace

#define LX_STRING_(x) #x
#define LX_STRING(x) LX_STRING_(x)
extern const LoraTrainCpu train_table;
const LoraTrainCpu train_table = {LX_STRING(LX_ISA), chunk_items,   by_dtype<Shrink>, chunk_items,
                                  by_dtype<Dv>,      db_items,      by_dtype<Db>,     da_dx_items,
                                  by_dtype<DaDx>,    by_dtype<Drop>};

}  // namespace lora_ext::LX_ISA
