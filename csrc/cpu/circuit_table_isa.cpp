// Tables of leaves with finite distributions on the CPU, compiled once per instruction set;
// formulas in circuit_layers.h.
//
// Forward, float with AVX-512: the table row of a unit, if it has up to 64 values, is held in four
// registers, and two permutations look up the values of 16 rows of data. Otherwise, one value is
// looked up at a time. Backward: vectors run along the units of a block, so that one addition per
// row of data updates a vector of units. The sums are transposed when they are added to the table's
// gradient.
#include "lora_ext/circuit_layers.h"

#include "sum_rows.h"
#include "transpose.h"

namespace lora_ext::LX_ISA {
namespace {

template <typename A>
void norms(const CircuitTableArgs& args, int64_t begin, int64_t end) {
    A *base = static_cast<A*>(args.base) + begin, *shift = static_cast<A*>(args.shift) + begin;
    scale_rows<A>(static_cast<const A*>(args.table) + begin * args.values, end - begin, args.values,
                  nullptr, base, shift);
    shifts_of(shift, end - begin);
    for (int64_t r = 0; r < end - begin; ++r) base[r] = base[r] == -kInfinity<A> ? A(0) : base[r];
}

// Entries of one row of a table; logits are converted to log-probabilities.
template <typename A>
struct Entries {
    const A* of;
    int64_t values;
    A base = 0, shift = 0;

    LX_INLINE Entries(const CircuitTableArgs& args, int64_t row)
        : of(static_cast<const A*>(args.table) + row * args.values), values(args.values) {
        if (args.norm != WeightNorm::kLogits) return;
        base = static_cast<const A*>(args.base)[row];
        shift = static_cast<const A*>(args.shift)[row];
    }
    template <typename V>
    LX_INLINE V relative(V v) const {
        return v - base + shift;
    }
};

// to[i] is entry at[i], or 0 if at[i] is negative; `count` is a multiple of kLaneGroup.
template <typename A>
LX_INLINE void look_up(const Entries<A>& row, const int32_t* at, int64_t count, A* to) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
        if (row.values <= 64) {
            __m512 r[4];
            for (int i = 0; i < 4; ++i) {
                const int64_t n = min(16, row.values - 16 * i);
                r[i] = n > 0 ? (__m512)row.relative(load_part(row.of + 16 * i, n)) : __m512{};
            }
            for (int64_t i = 0; i < count; i += 16) {
                const __m512i index = _mm512_loadu_si512(at + i);
                const __m512 low = _mm512_permutex2var_ps(r[0], index, r[1]);
                const __m512 high = _mm512_permutex2var_ps(r[2], index, r[3]);
                const __mmask16 there = _mm512_movepi32_mask(~index);
                const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
                _mm512_storeu_ps(
                    to + i, _mm512_maskz_mov_ps(there, _mm512_mask_blend_ps(upper, low, high)));
            }
            return;
        }
    }
#endif
    for (int64_t i = 0; i < count; ++i) to[i] = at[i] < 0 ? A(0) : row.relative(row.of[at[i]]);
}

template <typename A>
void forward(const CircuitTableArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t kChunk = 256;
    for (int64_t m = begin; m < end; ++m)
        for (int64_t b = 0; b < args.lanes; b += kChunk) {
            const int64_t count = min(args.lanes - b, kChunk);
            int32_t at[kChunk];
            for (int64_t i = 0; i < count; ++i)
                at[i] = b + i < args.rows ? static_cast<int32_t>(args.x[(b + i) * args.blocks + m])
                                          : -1;
            for (int64_t j = 0; j < args.block; ++j)
                look_up(Entries<A>(args, args.row[m] + j), at, count,
                        static_cast<A*>(args.e) + (m * args.block + j) * args.lanes + b);
        }
}

// ------------------------------------------------------------------------------------------------

// Sums of the flows of `count` units of a block: one row per value, one lane per unit.
template <typename A>
struct TableFlows {
    static constexpr int L = kLanes<A>;
    const CircuitTableArgs& args;
    int64_t j, count, padded;  // padded: number of values, rounded up to whole vectors
    A* sums;                   // (padded, L)

    void add(int64_t m) const {
        const A* de = static_cast<const A*>(args.de) + (m * args.block + j) * args.de_unit;
        alignas(64) A turned[L * L];
        for (int64_t b = 0; b < args.rows; b += L) {
            const int64_t rows = min(L, args.rows - b);
            if (args.de_row == 1 && count == L && rows == L) {
                transpose(de + b, args.de_unit, turned, L);
            } else {
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t u = 0; u < L; ++u)
                        turned[i * L + u] =
                            u < count ? de[(b + i) * args.de_row + u * args.de_unit] : A(0);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t x = args.x[(b + i) * args.blocks + m];
                if (x >= 0) store(sums + x * L, load(sums + x * L) + load(turned + i * L));
            }
        }
    }
    // Adds the sums to rows row + j, ... of the table's gradient and clears the sums.
    void flush(int64_t row) const {
        alignas(64) A turned[L * L];
        for (int64_t v = 0; v < args.values; v += L) {
            transpose(sums + v * L, L, turned, L);
            const int64_t n = min(L, args.values - v);
            for (int64_t u = 0; u < count; ++u) {
                A* to = static_cast<A*>(args.dtable) + (row + j + u) * args.values + v;
                store_part(to, load_part(to, n) + load(turned + u * L), n);
            }
        }
        clear();
    }
    void clear() const {
        for (int64_t i = 0; i < padded * L; i += L) store(sums + i, Vec<A>{});
    }
};

template <typename A>
void backward(const CircuitTableArgs& args, int64_t begin, int64_t end, void* scratch) {
    constexpr int L = kLanes<A>;
    const int64_t stop = min(args.block, end * kLaneGroup);
    for (int64_t j = begin * kLaneGroup; j < stop; j += L) {
        const TableFlows<A> flows = {args, j, min(L, stop - j), whole_vectors<A>(args.values),
                                     static_cast<A*>(scratch)};
        flows.clear();
        for (int64_t m = 0; m < args.blocks; ++m) {
            if (m > 0 && args.row[m] != args.row[m - 1]) flows.flush(args.row[m - 1]);
            flows.add(m);
        }
        if (args.blocks > 0) flows.flush(args.row[args.blocks - 1]);
    }
}

// Converts the flows d of each row to gradients of logits: d -= softmax(row of table) sum(d).
template <typename A>
void finish(const CircuitTableArgs& args, int64_t begin, int64_t end, void* scratch) {
    constexpr int64_t kRows = 4;
    A* scaled = static_cast<A*>(scratch);
    for (int64_t r = begin; r < end; r += kRows) {
        const int64_t rows = min(kRows, end - r), at = r * args.values;
        A total[kRows];
        scale_rows<A>(static_cast<const A*>(args.table) + at, rows, args.values, scaled, nullptr,
                      total);
        for (int64_t k = 0; k < rows; ++k) {
            A* d = static_cast<A*>(args.dtable) + at + k * args.values;
            const A* own = scaled + k * args.values;
            Vec<A> flow{};
            const auto for_all = [&](auto&& f) { for_vectors<A>(0, args.values, f); };
            for_all([&](int64_t i, int64_t n)
                        __attribute__((always_inline)) { flow += load_part(d + i, n); });
            const A share = total[k] == 0 ? A(0) : lane_sum(flow) / total[k];
            for_all([&](int64_t i, int64_t n) __attribute__((always_inline)) {
                store_part(d + i, load_part(d + i, n) - load_part(own + i, n) * share, n);
            });
        }
    }
}

template <typename A>
int64_t scratch_of(const CircuitTableArgs& args) {
    const int64_t most = kLanes<A> > 4 ? kLanes<A> : 4;  // lanes of backward, or rows of finish
    return whole_vectors<A>(args.values) * most * static_cast<int64_t>(sizeof(A));
}

template <auto kFloat, auto kDouble>
constexpr auto by_dtype = [](const auto& args, auto... rest) {
    return args.dtype == DType::kFloat64 ? kDouble(args, rest...) : kFloat(args, rest...);
};
#define LX_EITHER(f) by_dtype<f<float>, f<double>>

}  // namespace

extern const CircuitTableCpu circuit_table_table;
const CircuitTableCpu circuit_table_table = {LX_ISA_NAME,         LX_EITHER(norms),
                                             LX_EITHER(forward),  LX_EITHER(scratch_of),
                                             LX_EITHER(backward), LX_EITHER(finish)};

}  // namespace lora_ext::LX_ISA
