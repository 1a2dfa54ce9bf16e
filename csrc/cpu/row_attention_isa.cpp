// Attention of one query row at a time on the CPU, compiled once per instruction set.
//
// A block contains adjacent query rows and all heads that share keys. It passes over the keys
// twice, in chunks that stay in the L1 cache: for the scores, with keys in lanes, and for the
// values, with features in lanes. In between, it computes the weights of each row separately. The
// rows of a tile share the loads of keys and values. Each element is one chain of multiply-adds in
// the order of its own row's keys, so it does not depend on the other rows of the tile.
#include "lora_ext/row_attention.h"

#include "by_dtype.h"
#include "transpose.h"
#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = LX_VEC_BYTES == 64 ? 8 : 6;  // two vectors of sums per row in registers
constexpr int64_t kChunkBytes = 16 * 1024;
template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;  // keys, or features of values

template <typename A>
LX_INLINE int64_t whole_panels(int64_t n) {
    return blocks_of(n, kPanel<A>) * kPanel<A>;
}

// Sizes of a block, and offsets in the scratch memory of a thread.
template <typename A>
struct Room {
    int64_t alike, rows, chunk, features, score_stride;  // alike: heads per group
    int64_t q, scores, panels, values, sums, totals, packed, numbers;

    LX_INLINE explicit Room(const RowAttentionArgs& args) {
        alike = args.heads / args.groups;
        rows = attention_block(args) * alike;
        features = whole_panels<A>(args.value_width);
        const int64_t wide = args.width > features ? args.width : features;
        const int64_t fit = kChunkBytes / (static_cast<int64_t>(sizeof(A)) * (wide > 0 ? wide : 1));
        chunk = fit < kPanel<A> ? kPanel<A> : fit / kPanel<A> * kPanel<A>;
        // A chunk may begin at any key, and the last vector of a row ends beyond its last score.
        score_stride = whole_panels<A>(args.keys) + 2 * kPanel<A>;
        int64_t at = 0;
        const auto take = [&](int64_t numbers) {
            const int64_t here = at;
            at += blocks_of(numbers * sizeof(A), 64) * 64 / static_cast<int64_t>(sizeof(A));
            return here;
        };
        q = take(rows * args.width);
        scores = take(rows * score_stride);
        panels = take(chunk * args.width);
        values = take(chunk * features);
        sums = take(rows * features);
        totals = take(rows);
        packed = take(score_stride);
        numbers = at;
    }
};

// scores (kCount x kPanel) = scale q . k, for rows of q and one panel of keys (D, kPanel).
template <typename A, int kCount>
LX_INLINE void score_tile(const A* q, int64_t width, const A* panel, A scale, A* scores,
                          int64_t stride) {
    constexpr int L = kLanes<A>;
    Vec<A> sum[kCount][2] = {};
    for (int64_t d = 0; d < width; ++d, panel += kPanel<A>) {
        const Vec<A> k0 = load(panel), k1 = load(panel + L);
        for (int i = 0; i < kCount; ++i) {
            const Vec<A> x = broadcast<A>(q[i * width + d]);
            sum[i][0] = fma(x, k0, sum[i][0]);
            sum[i][1] = fma(x, k1, sum[i][1]);
        }
    }
    const Vec<A> factor = broadcast<A>(scale);
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < 2; ++j) store(scores + i * stride + j * L, sum[i][j] * factor);
}

// sums (kCount x kVecs vectors) += p v, key by key.
template <typename A, int kCount, int kVecs>
LX_INLINE void value_tile(const A* p, int64_t p_stride, const A* v, int64_t v_stride, int64_t keys,
                          A* sums, int64_t sums_stride) {
    constexpr int L = kLanes<A>;
    Vec<A> sum[kCount][kVecs];
    for (int i = 0; i < kCount; ++i)
        for (int c = 0; c < kVecs; ++c) sum[i][c] = load(sums + i * sums_stride + c * L);
    for (int64_t j = 0; j < keys; ++j, v += v_stride) {
        Vec<A> own[kVecs];
        for (int c = 0; c < kVecs; ++c) own[c] = load(v + c * L);
        for (int i = 0; i < kCount; ++i) {
            const Vec<A> x = broadcast<A>(p[i * p_stride + j]);
            for (int c = 0; c < kVecs; ++c) sum[i][c] = fma(x, own[c], sum[i][c]);
        }
    }
    for (int i = 0; i < kCount; ++i)
        for (int c = 0; c < kVecs; ++c) store(sums + i * sums_stride + c * L, sum[i][c]);
}

// Replaces scores by weights, e^(s - max), and returns the sum of the weights. The order of this
// sum depends only on the number of scores. Numbers after the last score, up to a whole vector, are
// overwritten. Not inlined, because the compiler could contract the sums of two copies differently.
template <typename A>
__attribute__((noinline)) A weigh(A* scores, int64_t count) {
    constexpr int L = kLanes<A>;
    const int64_t end = whole_vectors<A>(count);
    for (int64_t j = count; j < end; ++j) scores[j] = -A(__builtin_inf());
    Vec<A> top = splat<Vec<A>>(-A(__builtin_inf())), sum = {};
    for (int64_t j = 0; j < end; j += L) top = max(top, load(scores + j));
    top = splat<Vec<A>>(max_lane(top));
    for (int64_t j = 0; j < end; j += L) {
        const Vec<A> e = exp<false>(load(scores + j) - top);
        store(scores + j, e);
        sum += e;
    }
    return lane_sum(sum);
}

// Packs adjacent keys into consecutive panels; entries beyond the last key are zero.
template <typename T>
void lay_out(const T* k, int64_t stride, int64_t keys, int64_t width, Acc<T>* panels) {
    constexpr int L = kLanes<T>;
    for (int64_t j = 0; j < keys; j += kPanel<Acc<T>>, panels += kPanel<Acc<T>> * width)
        for (int half = 0; half < 2; ++half) {
            const int64_t from = j + half * L, here = from < keys ? min(keys - from, L) : 0;
            for (int64_t d = 0; d < width; d += 8) {
                const int64_t some = min(width - d, 8);
                Vec<T> turned[8];
                if (here == L && some == 8)
                    load_transposed(k + from * stride + d, stride, turned);
                else
                    load_transposed_part(k + (here ? from : 0) * stride + d, stride, here,
                                         static_cast<int>(some), turned);
                for (int64_t i = 0; i < some; ++i)
                    store(panels + (d + i) * kPanel<Acc<T>> + half * L, turned[i]);
            }
        }
}

// Widens rows to the type of sums; each row is padded with zeros.
template <typename T>
void widen(const T* from, int64_t from_stride, int64_t rows, int64_t width, Acc<T>* to,
           int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) {
        int64_t c = 0;
        for (; c + kLanes<T> <= width; c += kLanes<T>)
            store(to + i * to_stride + c, load(from + i * from_stride + c));
        if (c < width) {
            Acc<T> last[kLanes<T>];
            store(last, load_n(from + i * from_stride + c, width - c));
            for (int64_t j = c; j < to_stride; ++j)
                to[i * to_stride + j] = j < width ? last[j - c] : Acc<T>{};
        } else {
            for (; c < to_stride; ++c) to[i * to_stride + c] = Acc<T>{};
        }
    }
}

// Query rows t, ... of the heads of one group; rows of q, scores and sums are in order (t, head).
template <typename T>
struct Block {
    using A = Acc<T>;

    const RowAttentionArgs& args;
    const Room<A> room;
    A* const scratch;
    int64_t b = 0, g = 0, t = 0, times = 0;
    int64_t first_key = 0, end_key = 0;  // range over all rows of the block

    LX_INLINE Block(const RowAttentionArgs& args, void* scratch)
        : args(args), room(args), scratch(static_cast<A*>(scratch)) {}

    LX_INLINE const SeenKeys& seen(int64_t i) const {
        return args.seen[(args.seen_alike ? 0 : b * args.rows) + t + i];
    }
    LX_INLINE A* scores(int64_t row) const {
        return scratch + room.scores + row * room.score_stride;
    }
    LX_INLINE A* sums(int64_t row) const { return scratch + room.sums + row * room.features; }

    // Calls f(begin, end) for runs of the keys in [begin, end) that row t + i sees.
    template <typename F>
    LX_INLINE void for_runs(int64_t i, int64_t begin, int64_t end, F&& f) const {
        const SeenKeys& own = seen(i);
        begin = own.first > begin ? own.first : begin;
        end = min(own.end, end);
        if (begin >= end) return;
        if (!own.holes) return f(begin, end);
        const bool* mask = args.mask + b * args.mask_stride[0] + (t + i) * args.mask_stride[1];
        for (int64_t j = begin; j < end;) {
            if (!mask[j]) {
                ++j;
                continue;
            }
            const int64_t run = j;
            while (j < end && mask[j]) ++j;
            f(run, j);
        }
    }
    template <typename F>
    LX_INLINE void for_chunks(F&& f) const {
        for (int64_t j = first_key; j < end_key; j += room.chunk)
            f(j, min(j + room.chunk, end_key));
    }
    // Calls f(row, count) for tiles of rows [begin, end).
    template <typename F>
    static LX_INLINE void for_tiles(int64_t begin, int64_t end, F&& f) {
        for (int64_t left = blocks_of(end - begin, kTileRows), n; begin < end; begin += n) {
            n = blocks_of(end - begin, left--);
            f(begin, n);
        }
    }

    void run(int64_t item) {
        const int64_t size = attention_block(args), blocks = blocks_of(args.rows, size);
        t = item % blocks * size, g = item / blocks % args.groups;
        b = item / blocks / args.groups;
        times = min(size, args.rows - t);
        first_key = args.keys, end_key = 0;
        for (int64_t i = 0; i < times; ++i) {
            if (seen(i).first >= seen(i).end) continue;
            first_key = min(first_key, seen(i).first);
            end_key = seen(i).end > end_key ? seen(i).end : end_key;
        }
        const T* q = static_cast<const T*>(args.q) + b * args.q_stride[0] +
                     g * room.alike * args.q_stride[1] + t * args.q_stride[2];
        for (int64_t i = 0; i < times; ++i)
            widen(q + i * args.q_stride[2], args.q_stride[1], room.alike, args.width,
                  scratch + room.q + i * room.alike * args.width, args.width);
        for (int64_t i = 0; i < times * room.alike * room.features; ++i) sums(0)[i] = 0;
        for_chunks([&](int64_t begin, int64_t end) { score(begin, end); });
        for (int64_t i = 0; i < times; ++i) weigh_rows(i);
        for_chunks([&](int64_t begin, int64_t end) { add_values(begin, end); });
        for (int64_t i = 0; i < times; ++i) finish(i);
    }

    void score(int64_t begin, int64_t end) const {
        const T* k = static_cast<const T*>(args.k) + b * args.k_stride[0] + g * args.k_stride[1];
        A* const panels = scratch + room.panels;
        lay_out(k + begin * args.k_stride[2], args.k_stride[2], end - begin, args.width, panels);
        for_tiles(0, times * room.alike, [&](int64_t row, int64_t count) {
            int64_t from = end, to = begin;
            for (int64_t i = row / room.alike; i <= (row + count - 1) / room.alike; ++i) {
                from = min(from, seen(i).first);
                to = seen(i).end > to ? seen(i).end : to;
            }
            from = from > begin ? (from - begin) / kPanel<A> * kPanel<A> : 0;
            to = min(to, end) - begin;
            with_constant<kTileRows>(count, [&](auto rows) {
                for (int64_t j = from; j < to; j += kPanel<A>)
                    score_tile<A, rows.value>(scratch + room.q + row * args.width, args.width,
                                              panels + j * args.width, static_cast<A>(args.scale),
                                              scores(row) + begin + j, room.score_stride);
            });
        });
    }

    // Replaces the scores of all heads of row t + i by weights. If the row's keys have holes, its
    // scores are packed for the sum, and the weights are moved back to the positions of the keys.
    void weigh_rows(int64_t i) const {
        for (int64_t row = i * room.alike; row < (i + 1) * room.alike; ++row) {
            A *const own = scores(row), *const packed = scratch + room.packed;
            A& total = scratch[room.totals + row];
            if (!seen(i).holes) {
                total = weigh<A>(own + seen(i).first, seen(i).end - seen(i).first);
                continue;
            }
            int64_t count = 0;
            for_runs(i, 0, args.keys, [&](int64_t begin, int64_t end) {
                for (int64_t j = begin; j < end; ++j) packed[count++] = own[j];
            });
            total = weigh<A>(packed, count);
            count = 0;
            for_runs(i, 0, args.keys, [&](int64_t begin, int64_t end) {
                for (int64_t j = begin; j < end; ++j) own[j] = packed[count++];
            });
        }
    }

    void add_values(int64_t begin, int64_t end) const {
        const T* from = static_cast<const T*>(args.v) + b * args.v_stride[0] +
                        g * args.v_stride[1] + begin * args.v_stride[2];
        const A* v = scratch + room.values;
        int64_t v_stride = room.features;
        bool as_they_are = false;
        if constexpr (sizeof(T) == sizeof(A)) as_they_are = room.features == args.value_width;
        if (as_they_are)
            v = reinterpret_cast<const A*>(from), v_stride = args.v_stride[2];
        else
            widen(from, args.v_stride[2], end - begin, args.value_width, scratch + room.values,
                  room.features);
        const auto add = [&](int64_t row, int64_t count, int64_t run, int64_t run_end) {
            add_run(row, count, v + (run - begin) * v_stride, v_stride, run, run_end - run);
        };
        for_tiles(0, times * room.alike, [&](int64_t row, int64_t count) {
            // The keys that all rows of the tile see, without holes, are added for all rows at
            // once; the keys before and after this range are added row by row.
            const int64_t i_first = row / room.alike, i_last = (row + count - 1) / room.alike;
            int64_t common = begin, common_end = end;
            for (int64_t i = i_first; i <= i_last; ++i) {
                common = seen(i).first > common ? seen(i).first : common;
                common_end = seen(i).holes ? begin : min(common_end, seen(i).end);
            }
            if (common >= common_end) common = common_end = end;
            const auto by_itself = [&](int64_t from, int64_t to) {
                for (int64_t i = i_first; i <= i_last; ++i) {
                    const int64_t its = i == i_first ? row : i * room.alike;
                    const int64_t its_end = min(row + count, (i + 1) * room.alike);
                    for_runs(i, from, to, [&](int64_t run, int64_t run_end) {
                        add(its, its_end - its, run, run_end);
                    });
                }
            };
            by_itself(begin, common);
            if (common < common_end) add(row, count, common, common_end);
            by_itself(common_end, end);
        });
    }

    // sums of `count` rows += the weights of keys [key, key + keys) times v.
    LX_INLINE void add_run(int64_t row, int64_t count, const A* v, int64_t v_stride, int64_t key,
                           int64_t keys) const {
        constexpr int64_t L = kLanes<A>;
        with_constant<kTileRows>(count, [&](auto rows) {
            const A* const p = scores(row) + key;
            int64_t c = 0;
            if constexpr (rows.value <= 3)  // for more rows two vectors suffice to hide latency
                for (; c + 4 * L <= room.features; c += 4 * L)
                    value_tile<A, rows.value, 4>(p, room.score_stride, v + c, v_stride, keys,
                                                 sums(row) + c, room.features);
            for (; c < room.features; c += 2 * L)
                value_tile<A, rows.value, 2>(p, room.score_stride, v + c, v_stride, keys,
                                             sums(row) + c, room.features);
        });
    }

    void finish(int64_t i) const {
        T* out = static_cast<T*>(args.out) +
                 ((b * args.rows + t + i) * args.heads + g * room.alike) * args.value_width;
        for (int64_t head = 0; head < room.alike; ++head, out += args.value_width) {
            A* const own = sums(i * room.alike + head);
            const A total = scratch[room.totals + i * room.alike + head];
            // The largest weight is 1, so the total is 0 only if the row sees no key.
            const bool none = total == 0;
            for (int64_t c = 0; c < args.value_width; ++c) own[c] = none ? 0 : own[c] / total;
            store_rounded<T>(out, own, args.value_width);
        }
    }
};

template <typename T>
void attend(const RowAttentionArgs& args, int64_t begin, int64_t end, void* scratch) {
    Block<T> block(args, scratch);
    for (int64_t item = begin; item < end; ++item) block.run(item);
}

void see(const RowAttentionArgs& args, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
        const int64_t b = at / args.rows, t = at % args.rows;
        SeenKeys seen = span_of(args, b, t);
        if (args.mask) {
            const bool* own = args.mask + b * args.mask_stride[0] + t * args.mask_stride[1];
            while (seen.first < seen.end && !own[seen.first]) ++seen.first;
            while (seen.first < seen.end && !own[seen.end - 1]) --seen.end;
            for (int64_t j = seen.first; j < seen.end && !seen.holes; ++j) seen.holes = !own[j];
        }
        if (seen.first >= seen.end) seen = {};
        args.seen[at] = seen;
    }
}

int64_t scratch_bytes(const RowAttentionArgs& args) {
    return args.dtype == DType::kFloat64
               ? Room<double>(args).numbers * static_cast<int64_t>(sizeof(double))
               : Room<float>(args).numbers * static_cast<int64_t>(sizeof(float));
}

}  // namespace

extern const RowAttentionCpu row_attention_table;
const RowAttentionCpu row_attention_table = {see, LX_BY_DTYPE(attend), scratch_bytes};

}  // namespace lora_ext::LX_ISA
