// Sum layers on the CPU, compiled once per instruction set; formulas in circuit_sum.h.
//
// Lanes run over the terms i of a row, except in functions that process a row of sums.
#include "lora_ext/circuit_sum.h"

#include "by_dtype.h"
#include "sum_rows.h"
#include "tiles.h"

namespace lora_ext::LX_ISA {
namespace {

template <typename T>
LX_INLINE const T* weights_of(const LogSumArgs& args, int64_t g, int64_t b, int64_t o) {
    return static_cast<const T*>(args.w) + g * args.w_group + b * args.w_row + o * args.w_sum;
}
template <typename A>
LX_INLINE const A* values_of(const LogSumArgs& args, int64_t g, int64_t b) {
    return static_cast<const A*>(args.values) + g * args.values_group + b * args.values_row;
}

// ------------------------------------------------------------------------------------------------
// Shared weights

template <typename T>
void weights(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    for (int64_t item = begin; item < end; ++item)
        static_cast<A*>(args.weight_shift)[item] =
            scale_row(weights_of<T>(args, item / args.sums, 0, item % args.sums), args.terms,
                      args.norm, static_cast<A*>(args.weight) + item * args.terms);
}

template <typename T>
void values(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    for (int64_t item = begin; item < end; ++item)
        static_cast<A*>(args.value_shift)[item] =
            scale_row(values_of<A>(args, item / args.rows, item % args.rows), args.terms,
                      WeightNorm::kLog, static_cast<A*>(args.value) + item * args.terms);
}

constexpr int64_t kSums = 16;     // sums per item of forward
constexpr int64_t kTogether = 4;  // items that share one pass over the rows

// out[b, o] = value[b] . weight[o] for rows of `terms` numbers
template <typename A>
void multiply(const A* value, int64_t rows, const A* weight, int64_t sums, int64_t terms, A* out,
              int64_t out_row) {
    for (int64_t b = 0, tiles = blocks_of(rows, kDotRows), n; b < rows; b += n) {
        n = blocks_of(rows - b, tiles--);
        with_constant<kDotRows>(n, [&](auto count) {
            const A* x[count.value];
            for (int i = 0; i < count.value; ++i) x[i] = value + (b + i) * terms;
            for (int64_t o = 0; o < sums; o += kDotRanks)
                with_constant<kDotRanks>(min(sums - o, kDotRanks), [&](auto columns) {
                    Vec<A> acc[count.value][columns.value] = {};
                    dot_tile<A, count.value, columns.value>(x, weight + o * terms, terms, 0, terms,
                                                            acc);
                    for_sums<A>(acc, [&](int i, int j, A sum) __attribute__((always_inline)) {
                        out[(b + i) * out_row + o + j] = sum;
                    });
                });
        });
    }
}

// Converts s to out, for the sums [o, o_end) of one row.
template <typename T>
void finish(const LogSumArgs& args, int64_t g, int64_t b, int64_t o, int64_t o_end) {
    using A = Acc<T>;
    A* out = static_cast<A*>(args.out) + (g * args.rows + b) * args.sums + o;
    const A* shifts = static_cast<const A*>(args.weight_shift) + g * args.sums + o;
    const A shift = static_cast<const A*>(args.value_shift)[g * args.rows + b];
    for_vectors<A>(0, o_end - o, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<A> s = load_part(out + i, count);
        store_part(out + i, log(s) + load_part(shifts + i, count) + shift, count);
        for (int64_t j = i; j < i + count; ++j) {
            if (!(s[j - i] < kTiny<A>) || shift == -kInfinity<A> || shifts[j] == -kInfinity<A>)
                continue;
            const WeightRow<T> row(weights_of<T>(args, g, 0, o + j), args.terms, args.norm);
            out[j] = rescue(row, values_of<A>(args, g, b), args.terms, shifts[j]);
        }
    });
}

// Scales weights just before their use, so that they stay in L2 until all rows have used them.
template <typename T>
void forward(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const int64_t blocks = blocks_of(args.sums, kSums);
    for (int64_t item = begin; item < end;) {
        const int64_t g = item / blocks, o = item % blocks * kSums;
        const int64_t together = min(kTogether, min(blocks - item % blocks, end - item));
        const int64_t o_end = min(o + together * kSums, args.sums);
        item += together;
        if (!args.scaled) weights<T>(args, g * args.sums + o, g * args.sums + o_end);
        multiply(static_cast<const A*>(args.value) + g * args.rows * args.terms, args.rows,
                 static_cast<const A*>(args.weight) + (g * args.sums + o) * args.terms, o_end - o,
                 args.terms, static_cast<A*>(args.out) + g * args.rows * args.sums + o, args.sums);
        for (int64_t b = 0; b < args.rows; ++b) finish<T>(args, g, b, o, o_end);
    }
}

int64_t forward_items(const LogSumArgs& args) {
    return args.groups * blocks_of(args.sums, kSums);
}

template <typename T>
void ratios(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    for (int64_t item = begin; item < end; ++item) {
        const A* out = static_cast<const A*>(args.out) + item * args.sums;
        const A* dout = static_cast<const A*>(args.dout) + item * args.sums;
        const A* shifts = static_cast<const A*>(args.weight_shift) + item / args.rows * args.sums;
        const A shift = static_cast<const A*>(args.value_shift)[item];
        A* ratio = static_cast<A*>(args.ratio) + item * args.sums;
        for_vectors<A>(0, args.sums, [&](int64_t o, int64_t count) __attribute__((always_inline)) {
            const Vec<A> y = load_part(out + o, count);
            const Vec<A> depth = shift + load_part(shifts + o, count) - y;
            const auto none = (y == -kInfinity<A>) | (depth >= kTrust<A>);
            const Vec<A> q = load_part(dout + o, count) * exp(depth);
            store_part(ratio + o, none ? Vec<A>{} : q, count);
        });
    }
}

// Converts the sums of ratio * weight of one row to dl.
template <typename T>
void scale_dvalues(const LogSumArgs& args, int64_t item) {
    using A = Acc<T>;
    const int64_t g = item / args.rows, b = item % args.rows;
    A* d = static_cast<A*>(args.dvalues) + item * args.terms;
    const A* value = static_cast<const A*>(args.value) + item * args.terms;
    for_vectors<A>(0, args.terms, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        store_part(d + i, load_part(d + i, count) * load_part(value + i, count), count);
    });
    const A* shifts = static_cast<const A*>(args.weight_shift) + g * args.sums;
    const A shift = static_cast<const A*>(args.value_shift)[item];
    const A* out = static_cast<const A*>(args.out) + item * args.sums;
    const A* dout = static_cast<const A*>(args.dout) + item * args.sums;
    for (int64_t o = 0; o < args.sums; ++o) {
        if (!was_rescued(shift, shifts[o], out[o])) continue;
        const WeightRow<T> row(weights_of<T>(args, g, 0, o), args.terms, args.norm);
        add_shares(row, values_of<A>(args, g, b), args.terms, shifts[o], out[o], dout[o], d);
    }
}

constexpr int64_t kDepth = 128;  // rows of a strip of b copied at a time, to stay in L1

// Computes kVecs vectors of columns of the product in multiply_across; the last vector has `count`
// lanes.
template <int kVecs, typename A, typename S>
LX_INLINE void multiply_strip(int64_t rows, int64_t depth, S&& s, const A* b, int64_t columns,
                              int64_t count, A* out) {
    constexpr int L = kLanes<A>;
    alignas(64) A block[kDepth * kVecs * L];
    for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t steps = min(kDepth, depth - k);
        for (int64_t i = 0; i < steps; ++i)
            for (int c = 0; c < kVecs; ++c)
                store(block + (i * kVecs + c) * L,
                      load_part(b + (k + i) * columns + c * L, kVecs == 1 ? count : L));
        for (int64_t m = 0, tiles = blocks_of(rows, kDotRows), size; m < rows; m += size) {
            size = blocks_of(rows - m, tiles--);
            with_constant<kDotRows>(size, [&](auto tile) {
                constexpr int kRows = tile.value;
                Vec<A> acc[kRows][kVecs] = {};
                A* to = out + m * columns;
                if (k > 0)
                    for (int i = 0; i < kRows; ++i)
                        for (int c = 0; c < kVecs; ++c)
                            acc[i][c] = load_part(to + i * columns + c * L, kVecs == 1 ? count : L);
                sum_tile<A, kRows, kVecs>(
                    block, kVecs * L, steps,
                    [&](int i, int64_t j)
                        __attribute__((always_inline)) { return s(m + i, k + j); },
                    acc);
                for (int i = 0; i < kRows; ++i)
                    for (int c = 0; c < kVecs; ++c)
                        store_part(to + i * columns + c * L, acc[i][c], kVecs == 1 ? count : L);
            });
        }
    }
}

// out[m, n] = sum over k of s(m, k) b[k, n]
template <typename A, typename S>
void multiply_across(int64_t rows, int64_t depth, S&& s, const A* b, int64_t columns, A* out) {
    constexpr int L = kLanes<A>;
    int64_t n = 0;
    for (; n + 4 * L <= columns; n += 4 * L)
        multiply_strip<4>(rows, depth, s, b + n, columns, L, out + n);
    for (; n < columns; n += L)
        multiply_strip<1>(rows, depth, s, b + n, columns, min(L, columns - n), out + n);
}

template <typename T>
void dvalues(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const int64_t n = args.terms;
    for (int64_t item = begin; item < end;) {
        const int64_t g = item / args.rows, rows = min((g + 1) * args.rows, end) - item;
        const A* ratio = static_cast<const A*>(args.ratio) + item * args.sums;
        A* first = static_cast<A*>(args.dvalues) + item * n;
        multiply_across(
            rows, args.sums,
            [&](int64_t b, int64_t o)
                __attribute__((always_inline)) { return ratio[b * args.sums + o]; },
            static_cast<const A*>(args.weight) + g * args.sums * n, n, first);
        for (const int64_t stop = item + rows; item < stop; ++item) scale_dvalues<T>(args, item);
    }
}

// Converts dlog W of one row to dw. For logits, scaled * factor is softmax(w) times the sum of
// dout.
template <typename T>
LX_INLINE void store_dw(T* dw, const T* w, WeightNorm norm, int64_t n, const Acc<T>* flow,
                        const Acc<T>* scaled, Acc<T> factor) {
    for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        Vec<T> d = load_part(flow + i, count);
        if (norm == WeightNorm::kLogits) {
            d -= load_part(scaled + i, count) * factor;
        } else if (norm == WeightNorm::kProbs) {
            const Vec<T> v = load_part(w + i, count);
            d = v > Vec<T>{} ? d / v : Vec<T>{};
        }
        store_part(dw + i, d, count);
    });
}

// Converts the sums of ratio * value of one row to dw.
template <typename T>
void scale_dweights(const LogSumArgs& args, int64_t item) {
    using A = Acc<T>;
    const int64_t n = args.terms, g = item / args.sums, o = item % args.sums;
    const T* w = weights_of<T>(args, g, 0, o);
    A* flow = static_cast<A*>(args.flow) + item * n;
    const A* weight = static_cast<const A*>(args.weight) + item * n;
    const A shift = static_cast<const A*>(args.weight_shift)[item];
    for_vectors<A>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        store_part(flow + i, load_part(flow + i, count) * load_part(weight + i, count), count);
    });
    A total = 0;
    for (int64_t b = 0; b < args.rows; ++b) {
        const int64_t at = g * args.rows + b;
        const A out = static_cast<const A*>(args.out)[at * args.sums + o];
        const A dout = static_cast<const A*>(args.dout)[at * args.sums + o];
        if (out == -kInfinity<A>) continue;
        total += dout;
        if (!was_rescued(static_cast<const A*>(args.value_shift)[at], shift, out)) continue;
        const WeightRow<T> row(w, n, args.norm);
        add_shares(row, values_of<A>(args, g, b), n, shift, out, dout, flow);
    }
    store_dw(static_cast<T*>(args.dw) + item * n, w, args.norm, n, flow, weight,
             shift == -kInfinity<A> ? A(0) : total * exp_of(shift));
}

template <typename T>
void dweights(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const int64_t n = args.terms;
    for (int64_t item = begin; item < end;) {
        const int64_t g = item / args.sums, stop = min((g + 1) * args.sums, end);
        const A* ratio =
            static_cast<const A*>(args.ratio) + g * args.rows * args.sums + item % args.sums;
        multiply_across(
            stop - item, args.rows,
            [&](int64_t o, int64_t b)
                __attribute__((always_inline)) { return ratio[b * args.sums + o]; },
            static_cast<const A*>(args.value) + g * args.rows * n, n,
            static_cast<A*>(args.flow) + item * n);
        for (; item < stop; ++item) scale_dweights<T>(args, item);
    }
}

// ------------------------------------------------------------------------------------------------
// One matrix per row

constexpr int64_t kBand = 64;  // sums whose logarithms are computed together

template <typename T>
void per_row(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const int64_t n = args.terms;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t g = item / args.rows, b = item % args.rows;
        const A* l = values_of<A>(args, g, b);
        A* value = static_cast<A*>(args.value) + item * n;
        A* out = static_cast<A*>(args.out) + item * args.sums;
        const A shift = scale_row(l, n, WeightNorm::kLog, value);
        for (int64_t first = 0; first < args.sums; first += kBand) {
            const int64_t band = args.sums - first < kBand ? args.sums - first : kBand;
            A sums[kBand], totals[kBand], lifted[kBand];
            for (int64_t j = 0; j < band; ++j) {
                const WeightRow<T> row(weights_of<T>(args, g, b, first + j), n, args.norm);
                Vec<T> sum{}, total{};
                for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    const Vec<T> e = row.scaled(i, count);
                    total += e;
                    sum = fma(e, load_part(value + i, count), sum);
                });
                sums[j] = lane_sum(sum);
                totals[j] = lane_sum(total);
                lifted[j] = row.lifted;
            }
            for_vectors<A>(0, band, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
                const Vec<A> z = load_part(totals + j, count);
                Vec<A> norm =
                    args.norm == WeightNorm::kLogits ? -log(z) : load_part(lifted + j, count);
                norm = z == Vec<A>{} ? splat<Vec<A>>(-kInfinity<A>) : norm;
                store_part(totals + j, norm, count);
                store_part(out + first + j, log(load_part(sums + j, count)) + norm + shift, count);
            });
            for (int64_t j = 0; j < band; ++j) {
                if (!(sums[j] < kTiny<A>) || shift == -kInfinity<A> || totals[j] == -kInfinity<A>)
                    continue;
                const WeightRow<T> row(weights_of<T>(args, g, b, first + j), n, args.norm);
                out[first + j] = rescue(row, l, n, totals[j]);
            }
        }
    }
}

template <typename T>
void per_row_backward(const LogSumArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const int64_t n = args.terms;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t g = item / args.rows, b = item % args.rows;
        const A* l = values_of<A>(args, g, b);
        A* value = static_cast<A*>(args.value) + item * n;
        A* scaled = static_cast<A*>(args.weight) + item * n;
        A* flow = static_cast<A*>(args.flow) + item * n;
        A* d = static_cast<A*>(args.dvalues) + item * n;
        const A* out = static_cast<const A*>(args.out) + item * args.sums;
        const A* dout = static_cast<const A*>(args.dout) + item * args.sums;
        const A value_shift = scale_row(l, n, WeightNorm::kLog, value);
        for_vectors<A>(0, n, [&](int64_t i, int64_t count) { store_part(d + i, Vec<A>{}, count); });
        for (int64_t o = 0; o < args.sums; ++o) {
            const T* w = weights_of<T>(args, g, b, o);
            T* dw = static_cast<T*>(args.dw) + (item * args.sums + o) * n;
            if (out[o] == -kInfinity<A>) {
                for_vectors<T>(
                    0, n, [&](int64_t i, int64_t count) { store_part(dw + i, Vec<T>{}, count); });
                continue;
            }
            const WeightRow<T> row(w, n, args.norm);
            Vec<T> total{};
            for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                const Vec<T> e = row.scaled(i, count);
                total += e;
                store_part(scaled + i, e, count);
            });
            const A shift = row.shift(lane_sum(total));
            const A depth = depth_of(value_shift, shift, out[o]);
            const bool rescued = depth >= kTrust<A>;
            const A ratio = rescued ? A(0) : dout[o] * exp_of(depth);
            for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                const Vec<T> f = ratio * load_part(scaled + i, count) * load_part(value + i, count);
                store_part(flow + i, f, count);
            });
            if (rescued) add_shares(row, l, n, shift, out[o], dout[o], flow);
            for_vectors<A>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                store_part(d + i, load_part(d + i, count) + load_part(flow + i, count), count);
            });
            store_dw(dw, w, args.norm, n, flow, scaled, dout[o] * exp_of(shift));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Max-product

template <typename T>
LX_INLINE void max_of(const LogSumArgs& args, int64_t g, int64_t b, int64_t o, const T* w,
                      Acc<T> normaliser) {
    using A = Acc<T>;
    const A* l = values_of<A>(args, g, b);
    const auto [best, index] =
        best_of<T>(args.terms, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            Vec<T> v = load_or(w + i, count, -kInfinity<A>);
            if (args.norm == WeightNorm::kProbs) v = log(v <= Vec<T>{} ? Vec<T>{} : v);
            return v + load_or(l + i, count, -kInfinity<A>);
        });
    const int64_t to = (g * args.rows + b) * args.sums + o;
    static_cast<A*>(args.out)[to] = best != -kInfinity<A> ? best - normaliser : best;
    args.indices[to] = static_cast<int32_t>(index);
}

// Return log sum exp of logits; 0 for other norms.
template <typename T>
Acc<T> normaliser_of(const LogSumArgs& args, const T* w) {
    using A = Acc<T>;
    if (args.norm != WeightNorm::kLogits) return A(0);
    const WeightRow<T> row(w, args.terms, args.norm);
    Vec<T> total{};
    for_vectors<T>(0, args.terms, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        total += row.scaled(i, count);
    });
    return row.base + log_of(lane_sum(total));
}

template <typename T>
void max_product(const LogSumArgs& args, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        if (args.w_row == 0) {
            const int64_t g = item / args.sums, o = item % args.sums;
            const T* w = weights_of<T>(args, g, 0, o);
            const Acc<T> normaliser = normaliser_of(args, w);
            for (int64_t b = 0; b < args.rows; ++b) max_of(args, g, b, o, w, normaliser);
        } else {
            const int64_t g = item / args.rows, b = item % args.rows;
            for (int64_t o = 0; o < args.sums; ++o) {
                const T* w = weights_of<T>(args, g, b, o);
                max_of(args, g, b, o, w, normaliser_of(args, w));
            }
        }
    }
}

}  // namespace

extern const LogSumCpu log_sum_table;
const LogSumCpu log_sum_table = {LX_ISA_NAME,
                                 LX_BY_DTYPE(weights),
                                 LX_BY_DTYPE(values),
                                 forward_items,
                                 LX_BY_DTYPE(forward),
                                 LX_BY_DTYPE(ratios),
                                 LX_BY_DTYPE(dvalues),
                                 LX_BY_DTYPE(dweights),
                                 LX_BY_DTYPE(per_row),
                                 LX_BY_DTYPE(per_row_backward),
                                 LX_BY_DTYPE(max_product)};

}  // namespace lora_ext::LX_ISA
