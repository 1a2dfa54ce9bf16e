// Whole circuits on the CPU, compiled once per instruction set; formulas in circuit_layers.h.
//
// A thread runs the whole program for a block of lanes, so that the terms of these lanes stay in
// the thread's cache.
#include "lora_ext/circuit_layers.h"

#include "circuit_block.h"
#include "draw.h"
#include "transpose.h"

namespace lora_ext::LX_ISA {
namespace {

template <typename A>
void weights(const LayersArgs& args, int64_t begin, int64_t end) {
    const LayersMatrix* m = args.program.matrices();
    A* shift = static_cast<A*>(args.shift);
    const bool logits = args.norm == WeightNorm::kLogits;
    for (int64_t row = begin; row < end;) {
        while (row >= m->row + m->units) ++m;
        const int64_t stop = min(end, m->row + m->units);
        const int64_t at = m->weight + (row - m->row) * m->width;
        const A* w = static_cast<const A*>(args.w) + at;
        A* to = static_cast<A*>(args.weight) + at;
        scale_rows(w, stop - row, m->width, args.max_product ? nullptr : to,
                   logits ? nullptr : shift + row, logits ? shift + row : nullptr);
        if (args.max_product)
            for (; row < stop; ++row, w += m->width, to += m->width) {
                const WeightRow<A> weight(w, m->width, WeightNorm::kLog);
                for_vectors<A>(0, m->width,
                               [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                                   store_part(to + i, weight.log_scaled(i, n), n);
                               });
            }
        row = stop;
    }
    if (logits) shifts_of(shift + begin, end - begin);
}

// ------------------------------------------------------------------------------------------------

// Copies rows of data to lanes, one row per lane; lanes beyond the data are zero.
template <typename A, int kVecs>
void load_leaves(const Block<A, kVecs>& block) {
    constexpr int kWidth = Block<A, kVecs>::kWidth, L = kLanes<A>;
    const LayersArgs& args = block.args;
    const int64_t rows = min(args.rows - block.lane, kWidth);
    for (int64_t u = 0; u < args.program.leaves(); ++u) {
        const A* from =
            static_cast<const A*>(args.leaf) + u * args.leaf_unit + block.lane * args.leaf_row;
        A* to = block.at(args.val, kFirstLeaf + u);
        if (args.leaf_row == 1 && rows == kWidth) {
            for (int x = 0; x < kWidth; x += L) store(to + x, load(from + x));
        } else {
            for (int64_t b = 0; b < kWidth; ++b) to[b] = b < rows ? from[b * args.leaf_row] : A(0);
        }
    }
}

template <typename A>
void forward(const LayersArgs& args, int64_t begin, int64_t end, void* scratch) {
    for_blocks<A>(begin, end, [&](auto vecs, int64_t lane) {
        const Block<A, vecs.value> block(args, lane);
        for (int64_t b = 0; b < block.kWidth; ++b) {
            block.at(args.val, 0)[b] = 0;
            block.at(args.val, 1)[b] = -kInfinity<A>;
        }
        load_leaves(block);
        for (int64_t n = 0; n < args.program.num_nodes(); ++n)
            block.forward(args.program.nodes()[n], static_cast<A*>(scratch));
    });
}

template <typename A>
void backward(const LayersArgs& args, int64_t begin, int64_t end, void* scratch) {
    for_blocks<A>(begin, end, [&](auto vecs, int64_t lane) {
        const Block<A, vecs.value> block(args, lane);
        constexpr int kWidth = Block<A, vecs.value>::kWidth;
        for (int64_t u = 0; u < args.program.units(); ++u) {
            A* to = block.at(args.grad, u);
            for (int64_t b = 0; b < kWidth; ++b) to[b] = 0;
        }
        const int64_t roots = args.program.num_roots();
        for (int64_t r = 0; r < roots; ++r) {
            A* to = block.at(args.grad, args.program.roots()[r]);
            for (int64_t b = 0; b < min(args.rows - lane, kWidth); ++b)
                to[b] += static_cast<const A*>(args.droots)[(lane + b) * roots + r];
        }
        A* p = static_cast<A*>(scratch);
        A *d = p + args.max_width * kWidth, *ratio = d + args.max_width * kWidth;  // max_units rows
        for (int64_t n = args.program.num_nodes() - 1; n >= 0; --n)
            block.backward(args.program.nodes()[n], p, d, ratio);
    });
}

// ------------------------------------------------------------------------------------------------
// Flows of weights: sums over the lanes, block by block, with vectors along the terms

// Splits n columns into panels of 4, 2 or 1 vectors, and calls f(first column, Int<vectors>) for
// each. The last panel may extend beyond n.
template <typename A, typename F>
LX_INLINE void for_panels(int64_t n, F&& f) {
    constexpr int L = kLanes<A>;
    int64_t i = 0;
    for (; i + 3 * L < n; i += 4 * L) f(i, Int<4>{});
    for (; i + L < n; i += 2 * L) f(i, Int<2>{});
    if (i < n) f(i, Int<1>{});
}
template <typename A>
LX_INLINE int64_t padded(int64_t width) {
    return blocks_of(width, 4 * kLanes<A>) * 4 * kLanes<A>;
}

// Flows of the weights of one matrix: rows [o, o_end), summed over all nodes that use it.
template <typename A>
struct Flows {
    static constexpr int64_t kDepth = kMostVecs * kLanes<A>;  // maximum lanes of a block
    static constexpr int64_t kPanel = 4 * kLanes<A>;          // maximum columns of a panel
    const LayersArgs& args;
    const LayersMatrix& m;
    int64_t o, o_end, row;  // row: stride of the flows
    A *p, *across, *flow;

    LX_INLINE Flows(const LayersArgs& args, const LayersMatrix& m, int64_t o, int64_t o_end,
                    void* scratch)
        : args(args), m(m), o(o), o_end(o_end), row(padded<A>(m.width)) {
        p = static_cast<A*>(scratch);
        across = p + whole_vectors<A>(m.width) * kDepth;
        flow = across + kPanel * kDepth;
    }

    void run() const {
        alignas(64) A total[kBandRows] = {};
        bool first = true;
        for (int64_t u = m.user_begin; u < m.user_end; ++u) {
            const LayersNode& node = args.program.nodes()[args.program.users()[u]];
            for_blocks<A>(0, args.lanes / kLaneGroup, [&](auto vecs, int64_t lane) {
                add<vecs.value>(node, lane, !first), first = false;
            });
            for (int64_t r = o; r < o_end; ++r) total[r - o] += total_of(node, r);
        }
        finish(total);
    }
    // Return the sum of the flows of row r over the lanes whose value is not -inf.
    A total_of(const LayersNode& node, int64_t r) const {
        const A* out = static_cast<const A*>(args.val) + (node.out + r) * args.lanes;
        const A* g = static_cast<const A*>(args.grad) + (node.out + r) * args.lanes;
        Vec<A> sum = {};
        for (int64_t b = 0; b < args.lanes; b += kLanes<A>)
            sum += load(out + b) == -kInfinity<A> ? Vec<A>{} : load(g + b);
        return lane_sum(sum);
    }
    template <int kVecs>
    void add(const LayersNode& node, int64_t lane, bool to_flow) const {
        constexpr int L = kLanes<A>;
        const Block<A, kVecs> block(args, lane);
        Vec<A> tops[kVecs];
        block.scaled_terms(node, p, tops);
        const int64_t rows = whole_vectors<A>(m.width);
        for (A* rest = p + m.width * kVecs * L; rest < p + rows * kVecs * L; ++rest) *rest = 0;
        const A* ratio = block.at(args.ratio, node.out + o);
        for_panels<A>(m.width, [&](int64_t first, auto panel) {
            for (int i = 0; i < panel.value; ++i)
                for (int v = 0; v < kVecs; ++v)
                    transpose(p + ((first + i * L) * kVecs + v) * L, kVecs * L,
                              across + (v * L * panel.value + i) * L, panel.value * L);
            multiply<A, panel.value>(ratio, args.lanes, 1, o_end - o, kVecs * L, across,
                                     flow + first, row, to_flow);
        });
    }
    void finish(const A* total) const {
        for (int64_t r = o; r < o_end; ++r) {
            A* f = flow + (r - o) * row;
            const int64_t at = m.weight + r * m.width;
            const A* scaled = static_cast<const A*>(args.weight) + at;
            const A shift = static_cast<const A*>(args.shift)[m.row + r];
            const bool logits = args.norm == WeightNorm::kLogits && shift != -kInfinity<A>;
            const A factor = logits ? total[r - o] * exp_of(shift) : A(0);
            A* dw = static_cast<A*>(args.dw) + at;
            for_vectors<A>(0, m.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                const Vec<A> weight = load_part(scaled + i, n);
                store_part(dw + i, weight * (load_part(f + i, n) - factor), n);
            });
            for (int64_t u = m.user_begin; u < m.user_end; ++u)
                add_rescued(args.program.nodes()[args.program.users()[u]], r, dw);
        }
    }
    // Adds the flows of row r in the lanes whose sum rescue() computed. There ratio is zero,
    // although the flow is nonzero and the value is finite.
    void add_rescued(const LayersNode& node, int64_t r, A* dw) const {
        constexpr int L = kLanes<A>;
        const int64_t at = (node.out + r) * args.lanes;
        const A* out = static_cast<const A*>(args.val) + at;
        const A* g = static_cast<const A*>(args.grad) + at;
        const A* ratio = static_cast<const A*>(args.ratio) + at;
        for (int64_t first = 0; first < args.lanes; first += L) {
            const auto none = load(out + first) == -kInfinity<A>;
            const auto flows = load(g + first) != 0, lost = load(ratio + first) == 0;
            if (!any(flows & lost & ~none)) continue;
            const Block<A, 1> block(args, first);
            Vec<A> tops[1];
            block.terms(node, p, tops);
            const A shift = static_cast<const A*>(args.shift)[m.row + r];
            const A* w = block.weights_of(m, r);
            const A base = block.base_of(w, m.width);
            for (int64_t b = 0; b < L; ++b) {
                const A own = out[first + b], flow = g[first + b];
                if (flow == 0 || ratio[first + b] != 0 || own == -kInfinity<A>) continue;
                if (!(tops[0][b] + shift - own >= kTrust<A>)) continue;
                for (int64_t i = 0; i < m.width; ++i)
                    dw[i] += flow * exp_of(w[i] - base + p[i * L + b] + (shift - own));
            }
        }
    }
};

template <typename A>
void dweights(const LayersArgs& args, int64_t begin, int64_t end, void* scratch) {
    int64_t item = 0;
    for (int64_t i = 0; i < args.program.num_matrices() && item < end; ++i) {
        const LayersMatrix& m = args.program.matrices()[i];
        for (int64_t o = 0; o < m.units; o += kBandRows, ++item)
            if (item >= begin && item < end)
                Flows<A>(args, m, o, min(o + kBandRows, m.units), scratch).run();
    }
}

// ------------------------------------------------------------------------------------------------
// Walks. All walks of a range visit a node before any visits the next node, so that they share the
// node's terms and weights.

template <typename A>
struct Walks {
    const LayersArgs& args;
    const LayersProgram program;
    A *across, *l, *p;  // terms of a vector of rows; terms of one row; weights of a draw

    LX_INLINE Walks(const LayersArgs& args, void* scratch)
        : args(args), program(args.program), across(static_cast<A*>(scratch)) {
        l = across + args.max_width * kLanes<A>;
        p = l + whole_vectors<A>(args.max_width);
    }

    void run(int64_t begin, int64_t end) const {
        const int64_t variables = args.plan.variables();
        for (int64_t i = begin * variables; i < end * variables; ++i) args.leaves[i] = -1;
        for (int64_t n = 0; n < program.num_nodes(); ++n)
            for (int64_t walk = begin; walk < end; ++walk) chosen(n)[walk] = -1;
        for (int64_t walk = begin; walk < end; ++walk) {
            const int64_t root = args.root[walk / args.walks_per_row];
            take(walk, program.owners()[program.num_children() + root], program.roots()[root]);
        }
        for (int64_t n = program.num_nodes() - 1; n >= 0; --n) visit(n, begin, end);
    }

  private:
    int32_t* chosen(int64_t n) const { return args.chosen + n * args.walks; }
    void take(int64_t walk, int64_t owner, int64_t column) const {
        if (owner < 0)
            args.leaves[walk * args.plan.variables() - 1 - owner] = column;
        else
            chosen(owner)[walk] = static_cast<int32_t>(column - program.nodes()[owner].out);
    }
    void visit(int64_t n, int64_t begin, int64_t end) const {
        constexpr int L = kLanes<A>;
        const LayersNode& node = program.nodes()[n];
        int64_t vector = -1, known = -1;
        for (int64_t walk = begin; walk < end; ++walk) {
            int64_t term = chosen(n)[walk];
            if (term < 0) continue;
            if (node.matrix >= 0) {
                const int64_t row = walk / args.walks_per_row;
                if (row / L != vector) {
                    Vec<A> tops[1];
                    vector = row / L;
                    Block<A, 1>(args, vector * L).terms(node, across, tops);
                }
                if (row != known)
                    for (int64_t i = 0; i < node.width; ++i) l[i] = across[i * L + row % L];
                known = row;
                term = choose(node, term, walk * args.uniforms_row + program.draws()[n]);
            }
            descend(node, term, walk);
        }
    }
    // Return the chosen term of sum o; l holds the log-values of the terms.
    int64_t choose(const LayersNode& node, int64_t o, int64_t uniform) const {
        const LayersMatrix& m = program.matrices()[node.matrix];
        const WeightRow<A> w(static_cast<const A*>(args.w) + m.weight + o * m.width, m.width,
                             WeightNorm::kLog);
        const auto term = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            return w.log_scaled(i, count) + load_or(l + i, count, -kInfinity<A>);
        };
        if (!args.uniforms) return best_of<A>(m.width, term).index;
        Vec<A> tops = broadcast<A>(-kInfinity<A>);
        for_vectors<A>(0, m.width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            const Vec<A> t = term(i, count);
            tops = max(tops, t);
            store(p + i, t);
        });
        const A top = max_lane(tops), base = top == -kInfinity<A> ? A(0) : top;
        for_vectors<A>(0, m.width, [&](int64_t i, int64_t) __attribute__((always_inline)) {
            store(p + i, exp<false>(load(p + i) - broadcast<A>(base)));
        });
        const double u = args.wide_uniforms ? static_cast<const double*>(args.uniforms)[uniform]
                                            : static_cast<const float*>(args.uniforms)[uniform];
        return draw(p, m.width, u);
    }
    void descend(const LayersNode& node, int64_t term, int64_t walk) const {
        int64_t i = node.part_begin;
        while (i + 1 < node.part_end && program.parts()[i + 1].term <= term) ++i;
        const LayersPart part = program.parts()[i];
        const int64_t k = term - part.term;
        for (int64_t c = part.child_begin; c < part.child_end; ++c) {
            int64_t unit = k;
            if (part.kronecker) {
                const int64_t pairs = program.children()[part.child_end - 1].units;
                unit = c == part.child_begin ? k / pairs : k % pairs;
            }
            take(walk, program.owners()[c], program.children()[c].column + unit);
        }
    }
};

template <typename A>
void walk(const LayersArgs& args, int64_t begin, int64_t end, void* scratch) {
    Walks<A>(args, scratch).run(begin, end);
}

template <typename A>
int64_t scratch_of(const LayersArgs& args) {
    constexpr int64_t kDepth = Flows<A>::kDepth;
    const int64_t backward = (2 * args.max_width + args.max_units) * kDepth;
    const int64_t flows = (whole_vectors<A>(args.max_width) + Flows<A>::kPanel) * kDepth +
                          min(kBandRows, args.max_units) * padded<A>(args.max_width);
    return (backward > flows ? backward : flows) * static_cast<int64_t>(sizeof(A));
}

// ------------------------------------------------------------------------------------------------

template <auto kFloat, auto kDouble>
constexpr auto by_dtype = [](const auto& args, auto... rest) {
    return args.dtype == DType::kFloat64 ? kDouble(args, rest...) : kFloat(args, rest...);
};
#define LX_EITHER(f) by_dtype<f<float>, f<double>>

}  // namespace

extern const LayersCpu layers_table;
const LayersCpu layers_table = {LX_ISA_NAME,        LX_EITHER(weights),  LX_EITHER(scratch_of),
                                LX_EITHER(forward), LX_EITHER(backward), LX_EITHER(dweights),
                                LX_EITHER(walk)};

}  // namespace lora_ext::LX_ISA
