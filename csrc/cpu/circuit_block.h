// Forward and backward of one node of a circuit (products, then sums of them) on a block of lanes.
// lora_ext/circuit_layers.h has the formulas. Compiled per instruction set like sum_rows.h.
//
// Vectors run along the lanes, one row of data per lane, so that the maxima, exponentials and
// logarithms of a row do not involve other rows. A matrix product broadcasts each weight to all
// lanes.
#pragma once

#include "lora_ext/circuit_layers.h"
#include "sum_rows.h"
#include "tiles.h"

namespace lora_ext::LX_ISA {
namespace {

// kTileRows[n - 1]: rows of a tile that is n = 1, 2 or 4 vectors wide. The sums of a tile occupy at
// most 24 of the 32 registers of AVX-512, or 12 of 16.
constexpr int kMostVecs = 4;
#if defined(__AVX512F__)
constexpr int kTileRows[] = {12, 12, 0, 6};
#else
constexpr int kTileRows[] = {8, 6, 0, 3};
#endif

// Splits the lanes of groups [begin, end) into blocks of 4, 2 or 1 vectors, and calls
// f(Int<vectors>, first lane) for each block.
template <typename A, typename F>
LX_INLINE void for_blocks(int64_t begin, int64_t end, F&& f) {
    constexpr int L = kLanes<A>;
    const int64_t stop = end * kLaneGroup;
    for (int64_t lane = begin * kLaneGroup; lane < stop;) {
        const int64_t vectors = (stop - lane) / L;
        if (vectors >= 4)
            f(Int<4>{}, lane), lane += 4 * L;
        else if (vectors >= 2)
            f(Int<2>{}, lane), lane += 2 * L;
        else
            f(Int<1>{}, lane), lane += L;
    }
}

template <typename I>
LX_INLINE bool any(I mask) {
#if defined(__AVX512F__)
    if constexpr (sizeof(I) == 64) return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(I) == 32) return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#endif
    int64_t words[sizeof(I) / 8], found = 0;
    __builtin_memcpy(words, &mask, sizeof(I));
    for (const int64_t word : words) found |= word;
    return found != 0;
}

// acc[row][vector] = max(acc[row][vector], s(row, k) + b[k][vector]), k in [0, depth); skips NaN.
template <typename A, int kRows, int kVecs, typename S>
LX_INLINE void max_tile(const A* b, int64_t depth, S&& s, Vec<A> (&acc)[kRows][kVecs]) {
    for (int64_t k = 0; k < depth; ++k, b += kVecs * kLanes<A>)
        for (int i = 0; i < kRows; ++i) {
            const Vec<A> scalar = broadcast<A>(s(i, k));
            for (int v = 0; v < kVecs; ++v)
                acc[i][v] = max(acc[i][v], scalar + load(b + v * kLanes<A>));
        }
}

// Row m of c (kVecs vectors, stride c_row) = sum over k of a[m am + k ak] b[k], k ascending. If
// `add`, the sum is added to c. If kMax, it is the maximum over k of a[m am + k ak] + b[k] instead.
template <typename A, int kVecs, bool kMax = false>
LX_INLINE void multiply(const A* a, int64_t am, int64_t ak, int64_t rows, int64_t depth, const A* b,
                        A* c, int64_t c_row, bool add) {
    constexpr int L = kLanes<A>, kRows = kTileRows[kVecs - 1];
    for (int64_t m = 0, tiles = blocks_of(rows, kRows), size; m < rows; m += size) {
        size = blocks_of(rows - m, tiles--);
        with_constant<kRows>(size, [&](auto tile) {
            constexpr int kSize = tile.value;
            Vec<A> acc[kSize][kVecs] = {};
            A* to = c + m * c_row;
            if (add || kMax)
                for (int i = 0; i < kSize; ++i)
                    for (int v = 0; v < kVecs; ++v)
                        acc[i][v] =
                            kMax ? broadcast<A>(-kInfinity<A>) : load(to + i * c_row + v * L);
            const A* from = a + m * am;
            const auto scalar = [&](int i, int64_t k) __attribute__((always_inline)) {
                return from[i * am + k * ak];
            };
            if constexpr (kMax)
                max_tile<A, kSize, kVecs>(b, depth, scalar, acc);
            else
                sum_tile<A, kSize, kVecs>(b, kVecs * L, depth, scalar, acc);
            for (int i = 0; i < kSize; ++i)
                for (int v = 0; v < kVecs; ++v) store(to + i * c_row + v * L, acc[i][v]);
        });
    }
}

// ------------------------------------------------------------------------------------------------
// A node on a block of lanes

template <typename A, int kVecs>
struct Block {
    static constexpr int L = kLanes<A>, kWidth = kVecs * L;
    using V = Vec<A>;
    const LayersArgs& args;
    const LayersProgram program;
    int64_t lane;

    LX_INLINE Block(const LayersArgs& args, int64_t lane)
        : args(args), program(args.program), lane(lane) {}

    LX_INLINE A* at(void* values, int64_t unit) const {
        return static_cast<A*>(values) + unit * args.lanes + lane;
    }
    template <typename F>
    static LX_INLINE void each(F&& f) {
        for (int v = 0; v < kVecs; ++v) f(v, v * L);
    }

    // Writes the log-values of the products to l, kWidth lanes each, and their maximum per lane to
    // tops.
    void terms(const LayersNode& node, A* l, V (&tops)[kVecs]) const {
        for (int v = 0; v < kVecs; ++v) tops[v] = broadcast<A>(-kInfinity<A>);
        for (int64_t p = node.part_begin; p < node.part_end; ++p) {
            const LayersPart part = program.parts()[p];
            const LayersChild* child = program.children() + part.child_begin;
            A* to = l + part.term * kWidth;
            const auto keep = [&](int v, V x) __attribute__((always_inline)) {
                store(to + v * L, x);
                tops[v] = max(tops[v], x);
            };
            if (part.kronecker) {
                for (int64_t i = 0; i < child[0].units; ++i)
                    for (int64_t j = 0; j < child[1].units; ++j, to += kWidth) {
                        const A* left = at(args.val, child[0].column + i);
                        const A* right = at(args.val, child[1].column + j);
                        each([&](int v, int x) __attribute__((always_inline)) {
                            keep(v, load(left + x) + load(right + x));
                        });
                    }
                continue;
            }
            const int64_t count = part.child_end - part.child_begin;
            for (int64_t i = 0; i < child[0].units; ++i, to += kWidth) {
                V sum[kVecs];
                const A* first = at(args.val, child[0].column + i);
                each([&](int v, int x)
                         __attribute__((always_inline)) { sum[v] = load(first + x); });
                for (int64_t c = 1; c < count; ++c) {
                    const A* more = at(args.val, child[c].column + i);
                    each([&](int v, int x)
                             __attribute__((always_inline)) { sum[v] += load(more + x); });
                }
                each([&](int v, int) __attribute__((always_inline)) { keep(v, sum[v]); });
            }
        }
    }
    // Like terms(), but writes exp(term - maximum), a number between 0 and 1, to p.
    void scaled_terms(const LayersNode& node, A* p, V (&tops)[kVecs]) const {
        terms(node, p, tops);
        V base[kVecs];
        for (int v = 0; v < kVecs; ++v) base[v] = tops[v] == -kInfinity<A> ? V{} : tops[v];
        for (int64_t i = 0; i < node.width; ++i, p += kWidth)
            each([&](int v, int x) __attribute__((always_inline)) {
                store(p + x, exp<false>(load(p + x) - base[v]));
            });
    }
    // Adds the flow d of each product to the flows of all factors of the product.
    void add_to_children(const LayersNode& node, const A* d) const {
        for (int64_t p = node.part_begin; p < node.part_end; ++p) {
            const LayersPart part = program.parts()[p];
            const LayersChild* child = program.children() + part.child_begin;
            const A* from = d + part.term * kWidth;
            const auto add = [&](int64_t unit) __attribute__((always_inline)) {
                A* to = at(args.grad, unit);
                each([&](int, int x) __attribute__((always_inline)) {
                    store(to + x, load(to + x) + load(from + x));
                });
            };
            if (part.kronecker) {
                for (int64_t i = 0; i < child[0].units; ++i)
                    for (int64_t j = 0; j < child[1].units; ++j, from += kWidth) {
                        add(child[0].column + i);
                        add(child[1].column + j);
                    }
                continue;
            }
            const int64_t count = part.child_end - part.child_begin;
            for (int64_t i = 0; i < child[0].units; ++i, from += kWidth)
                for (int64_t c = 0; c < count; ++c) add(child[c].column + i);
        }
    }

    const A* weights_of(const LayersMatrix& m, int64_t o) const {
        return static_cast<const A*>(args.w) + m.weight + o * m.width;
    }
    const A* scaled_of(const LayersMatrix& m) const {
        return static_cast<const A*>(args.weight) + m.weight;
    }
    A shift_of(const LayersMatrix& m, int64_t o) const {
        return static_cast<const A*>(args.shift)[m.row + o];
    }

    void forward(const LayersNode& node, A* p) const {
        V tops[kVecs];
        if (node.matrix < 0) {
            terms(node, p, tops);
            for (int64_t o = 0; o < node.units; ++o)
                each([&](int, int x) {
                    store(at(args.val, node.out + o) + x, load(p + o * kWidth + x));
                });
            return;
        }
        const LayersMatrix& m = program.matrices()[node.matrix];
        A* out = at(args.val, node.out);
        if (args.max_product) {
            terms(node, p, tops);
            multiply<A, kVecs, true>(scaled_of(m), m.width, 1, node.units, node.width, p, out,
                                     args.lanes, false);
            for (int64_t o = 0; o < node.units; ++o, out += args.lanes)
                each([&](int, int x) __attribute__((always_inline)) {
                    store(out + x, load(out + x) + shift_of(m, o));
                });
            return;
        }
        scaled_terms(node, p, tops);
        multiply<A, kVecs>(scaled_of(m), m.width, 1, node.units, node.width, p, out, args.lanes,
                           false);
        bool expanded = false;
        for (int64_t o = 0; o < node.units; ++o, out += args.lanes) {
            const A shift = shift_of(m, o);
            Ints<V> lost = {};
            V s[kVecs], result[kVecs];
            each([&](int v, int x) __attribute__((always_inline)) {
                s[v] = load(out + x);
                result[v] = log(s[v]) + shift + tops[v];
                lost |= (s[v] < kTiny<A>)&(tops[v] != -kInfinity<A>);
                store(out + x, result[v]);
            });
            if (shift == -kInfinity<A> || !any(lost)) continue;
            if (!expanded) terms(node, p, tops), expanded = true;
            rescue(m, o, p, tops, s, out);
        }
    }
    // Recomputes log sum_i W_i exp(l_i) of sum o in the lanes in which s is below kTiny, with the
    // terms shifted by their own maximum.
    void rescue(const LayersMatrix& m, int64_t o, const A* l, const V (&tops)[kVecs],
                const V (&s)[kVecs], A* out) const {
        const A* w = weights_of(m, o);
        const A base = base_of(w, m.width), shift = shift_of(m, o);
        for (int v = 0; v < kVecs; ++v) {
            const auto lost = (s[v] < kTiny<A>)&(tops[v] != -kInfinity<A>);
            V top = broadcast<A>(-kInfinity<A>), sum = {};
            for (int64_t i = 0; i < m.width; ++i)
                top = max(top, (w[i] - base) + load(l + i * kWidth + v * L));
            const V safe = top == -kInfinity<A> ? V{} : top;
            for (int64_t i = 0; i < m.width; ++i)
                sum += exp<false>((w[i] - base) + load(l + i * kWidth + v * L) - safe);
            const V exact = top == -kInfinity<A> ? top : top + log(sum) + shift;
            store(out + v * L, lost ? exact : load(out + v * L));
        }
    }
    static A base_of(const A* w, int64_t n) {
        const A top = row_max(w, n);
        return top == -kInfinity<A> ? A(0) : top;
    }
    // Distributes the flow of the node, which must be complete, to its children. Stores `ratio`,
    // which dweights reads.
    void backward(const LayersNode& node, A* p, A* d, A* ratio) const {
        if (node.matrix < 0) {
            for (int64_t o = 0; o < node.units; ++o)
                each([&](int, int x) {
                    store(d + o * kWidth + x, load(at(args.grad, node.out + o) + x));
                });
            return add_to_children(node, d);
        }
        const LayersMatrix& m = program.matrices()[node.matrix];
        V tops[kVecs];
        scaled_terms(node, p, tops);
        bool rescued = false;
        for (int64_t o = 0; o < node.units; ++o) {
            Ints<V> lost = {};
            each([&](int v, int x) __attribute__((always_inline)) {
                const V out = load(at(args.val, node.out + o) + x);
                const V depth = tops[v] + shift_of(m, o) - out;
                const auto none = out == -kInfinity<A>, deep = depth >= kTrust<A>;
                const V q = load(at(args.grad, node.out + o) + x) * exp(depth);
                lost |= ~none & deep;
                const V kept = (none | deep) ? V{} : q;
                store(ratio + o * kWidth + x, kept);
                store(at(args.ratio, node.out + o) + x, kept);
            });
            rescued |= any(lost);
        }
        multiply<A, kVecs>(scaled_of(m), 1, m.width, node.width, node.units, ratio, d, kWidth,
                           false);
        for (int64_t i = 0; i < node.width * kWidth; i += L)
            store(d + i, load(d + i) * load(p + i));
        if (rescued) {
            terms(node, p, tops);
            for (int64_t o = 0; o < node.units; ++o) add_shares(node, m, o, p, tops, d);
        }
        add_to_children(node, d);
    }
    // d[i] += flow of sum o times the share of term i in it, in the lanes whose sum rescue()
    // computed.
    void add_shares(const LayersNode& node, const LayersMatrix& m, int64_t o, const A* l,
                    const V (&tops)[kVecs], A* d) const {
        const A* w = weights_of(m, o);
        const A base = base_of(w, m.width), shift = shift_of(m, o);
        each([&](int v, int x) {
            const V out = load(at(args.val, node.out + o) + x);
            const auto lost = (out != -kInfinity<A>)&(tops[v] + shift - out >= kTrust<A>);
            if (!any(lost)) return;
            const V g = lost ? load(at(args.grad, node.out + o) + x) : V{};
            const V back = lost ? shift - out : V{};
            for (int64_t i = 0; i < m.width; ++i) {
                A* to = d + i * kWidth + x;
                const V term = (w[i] - base) + load(l + i * kWidth + x);
                const V share = exp(lost ? term + back : broadcast<A>(-kInfinity<A>));
                store(to, load(to) + g * share);
            }
        });
    }
};

}  // namespace
}  // namespace lora_ext::LX_ISA
