// The kernels of whole circuits in the asan flavour, in buffers of exact size. Values, flows and
// gradients are compared with loops in double, for one launch and for one launch per stage. Also
// tests tables of leaves, and walks that choose the largest terms or draw terms at random.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/circuit_sum_laws.h"
#include "lora_ext/circuit_layers.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

void launched(LaunchStatus status) {
    if (status == 0) return;
    std::printf("%s\n", lx::status_string(status));
    std::exit(2);
}

template <class T>
ExactBuffer<T> exact(const std::vector<T>& values) {
    ExactBuffer<T> copy(static_cast<int64_t>(values.size()));
    std::copy(values.begin(), values.end(), copy.data());
    return copy;
}

// Buffers of the kernels that evaluate a circuit stage by stage, for one precision.
struct Parts {
    ExactBuffer<int16_t> weights, terms, next_terms, ratios;
    ExactBuffer<float> lost, run_tops;
    ExactBuffer<uint32_t> arrivals;

    Parts(LayersArgs& a, LayersPrecision precision)
        : weights((a.parts = parts_of(precision), stored_weights(a))),
          terms(stored_terms(a)),
          next_terms(stored_terms(a)),
          ratios(stored_ratios(a)),
          lost(a.plan.nodes() * kNodeShares * a.lanes),
          run_tops(stored_run_tops(a)),
          arrivals(stored_arrivals(a)) {
        a.weight_parts = weights.data(), a.term_parts = terms.data();
        a.next_parts = next_terms.data();
        a.ratio_parts = ratios.data(), a.lost = lost.data();
        a.run_tops = run_tops.data(), a.arrivals = arrivals.data();
    }
};

float number(int64_t i) {
    return static_cast<float>(i * 7919 % 31) / 8 - 2;
}

void close(const char* what, double found, double expected, double bound = 2e-4) {
    if (std::abs(found - expected) <= bound * (1 + std::abs(expected))) return;
    std::printf("%s: %g instead of %g\n", what, found, expected);
    std::exit(1);
}

// Checks a circuit with leaf regions l and r of n units each, m sums s over the products l[i] r[i],
// a root that sums over all pairs of s and the first two units of l, and a copy of the root.
void check_layers(int32_t n, int32_t m, int64_t rows) {
    const int32_t l = kFirstLeaf, r = l + n, s = r + n, root = s + m, copy = root + 1;
    const int32_t units = copy + 1, q = n < 2 ? n : 2;
    const int32_t pairs = m * q, leaves = 2 * n;
    // clang-format off
    const auto program = exact<int32_t>({
        units, leaves, m + 1, 3,    3,     5,      2,         2, 1, 3,  // header
        s,     m,      n,     0,    0,     1,                           // nodes
        root,  1,      pairs, 1,    1,     2,                           //
        copy,  1,      1,     -1,   2,     3,                           //
        0,     0,      0,     2,    0,     1,      2,         4, 0, 0, 4, 5,  // parts
        l,     n,      r,     n,    s,     m,      l,         q, root, 1,  // children
        0,     m,      n,     0,    0,     1,                           // matrices
        m * n, 1,      pairs, m,    1,     2,                           //
        0,     1,      copy,  0,    1,     2,      3,                   // users, roots, stages
        -1,    -2,     0,     -3,   1,     2,      0,         1, -1,    // owners, draws
    });
    const auto plan = exact<int64_t>({
        units, leaves, m + 1, 3,    2,     1,      program.size, 3, 3, 2,  // sizes
        0,     1,      m,     n,    1,     2,      1,         pairs,    // stages
        2,     3,      1,     1,
    });
    // clang-format on
    const int64_t lanes = (rows + kLaneGroup - 1) / kLaneGroup * kLaneGroup;
    LayersArgs a;
    a.norm = WeightNorm::kLog;
    a.program = {program.data()};
    a.plan = {plan.data()};
    a.rows = rows, a.lanes = lanes;
    a.num_weights = m * n + pairs;
    const ExactBuffer<float> leaf(rows * leaves), w(a.num_weights), weight(a.num_weights);
    const ExactBuffer<float> shift(m + 1), val(units * lanes), droots(rows), grad(units * lanes);
    const ExactBuffer<float> ratio(units * lanes), dw(a.num_weights);
    const ExactBuffer<float> terms(a.plan.most_terms() * lanes), tops(3 * lanes);
    for (int64_t i = 0; i < leaf.size; ++i) leaf[i] = number(i);
    for (int64_t i = 0; i < w.size; ++i) w[i] = number(i + 5);
    for (int64_t i = 0; i < rows; ++i) droots[i] = 1 + number(i);
    a.leaf = leaf.data(), a.leaf_row = leaves, a.leaf_unit = 1;
    a.w = w.data(), a.weight = weight.data(), a.shift = shift.data(), a.val = val.data();
    a.droots = droots.data(), a.grad = grad.data(), a.ratio = ratio.data(), a.dw = dw.data();
    a.terms = terms.data(), a.tops = tops.data();
    LayersArgs staged = a;
    const Parts parts(staged, LayersPrecision::kFloat32);
    if (!a.plan.small_nodes()) a = staged;
    launched(launch_layers_weights(a, nullptr));
    launched(launch_layers_forward(a, nullptr));
    launched(launch_layers_backward(a, nullptr));
    launched(launch_layers_dweights(a, nullptr));

    std::vector<double> weights(static_cast<size_t>(a.num_weights));
    for (int64_t b = 0; b < rows; ++b) {
        const auto at = [&](const ExactBuffer<float>& t, int32_t unit) -> double {
            return t[unit * lanes + b];
        };
        std::vector<double> sum(static_cast<size_t>(m)), dleaf(static_cast<size_t>(leaves));
        double total = 0;
        for (int32_t o = 0; o < m; ++o) {
            for (int32_t i = 0; i < n; ++i)
                sum[o] += std::exp(double{w[o * n + i]} + leaf[b * leaves + i] +
                                   leaf[b * leaves + n + i]);
            close("sum", at(val, s + o), std::log(sum[o]));
            for (int32_t i = 0; i < q; ++i)
                total += sum[o] * std::exp(double{w[m * n + o * q + i]} + leaf[b * leaves + i]);
        }
        close("root", at(val, copy), std::log(total));
        for (int32_t o = 0; o < m; ++o) {
            double flow = 0;
            for (int32_t i = 0; i < q; ++i) {
                const double own = sum[o] / total * droots[b] *
                                   std::exp(double{w[m * n + o * q + i]} + leaf[b * leaves + i]);
                flow += own, dleaf[i] += own, weights[m * n + o * q + i] += own;
            }
            close("flow", at(grad, s + o), flow);
            for (int32_t i = 0; i < n; ++i) {
                const double own = flow / sum[o] *
                                   std::exp(double{w[o * n + i]} + leaf[b * leaves + i] +
                                            leaf[b * leaves + n + i]);
                dleaf[i] += own, dleaf[n + i] += own, weights[o * n + i] += own;
            }
        }
        for (int32_t i = 0; i < leaves; ++i) close("leaf", at(grad, l + i), dleaf[i]);
    }
    for (int64_t i = 0; i < a.num_weights; ++i) close("weight", dw[i], weights[i]);

    for (const auto precision : {LayersPrecision::kHigh, LayersPrecision::kHalf}) {
        LayersArgs low = a;
        const ExactBuffer<float> found(units * lanes);
        const Parts halves(low, precision);
        low.val = found.data();
        launched(launch_layers_weights(low, nullptr));
        launched(launch_layers_forward(low, nullptr));
        const double bound = precision == LayersPrecision::kHigh ? 5e-5 : 2e-3;
        for (int32_t u = s; u < units; ++u)
            for (int64_t b = 0; b < rows; ++b)
                close("low precision", found[u * lanes + b], val[u * lanes + b], bound);
    }

    // A walk chooses a pair (s, l) of the root, then a pair (l, r) of s. l has two variables.
    for (const bool drawn : {false, true}) {
        a.walks_per_row = drawn ? 2 : 1;
        a.walks = rows * a.walks_per_row;
        const ExactBuffer<int64_t> start(rows), leaf_of(a.walks * 3);
        const ExactBuffer<float> uniforms(a.walks * 2);
        const ExactBuffer<int32_t> chosen(3 * a.walks);
        for (int64_t b = 0; b < rows; ++b) start[b] = 0;
        for (int64_t i = 0; i < uniforms.size; ++i) uniforms[i] = (number(i) + 2) / 4;
        a.root = start.data(), a.leaves = leaf_of.data(), a.chosen = chosen.data();
        a.uniforms = drawn ? uniforms.data() : nullptr;
        a.uniforms_row = 2;
        launched(launch_layers_walk(a, nullptr));
        for (int64_t walk = 0; walk < a.walks; ++walk) {
            const int64_t b = walk / a.walks_per_row;
            // Checks that term i is the largest of `terms` or, if drawn, the one for `uniform`.
            const auto taken = [&](const std::vector<double>& terms, int64_t i, float uniform) {
                double total = 0, below = 0, most = 0;
                for (const double term : terms) total += term, most = std::max(most, term);
                if (!drawn) return close("heaviest", terms[i], most);
                for (int64_t j = 0; j < i; ++j) below += terms[j];
                const double limit = uniform * total, slack = 1e-5 * total;
                if (below > limit + slack || below + terms[i] < limit - slack)
                    close("drawn", limit, below);
            };
            const auto exp = [&](int64_t weight, int32_t left, int32_t right) {
                return std::exp(double{w[weight]} + val[left * lanes + b] + val[right * lanes + b]);
            };
            const int64_t o = chosen[walk], i = leaf_of[walk * 3] - l,
                          j = leaf_of[walk * 3 + 2] - l;
            std::vector<double> of_root, of_sum;
            for (int32_t k = 0; k < pairs; ++k)
                of_root.push_back(exp(m * n + k, s + k / q, l + k % q));
            for (int32_t k = 0; k < n; ++k) of_sum.push_back(exp(o * n + k, l + k, r + k));
            taken(of_root, o * q + j, uniforms[walk * 2 + 1]);
            taken(of_sum, i, uniforms[walk * 2]);
            close("sides", leaf_of[walk * 3 + 1], r + i);
        }
    }
    a.max_product = true, a.parts = 0;
    launched(launch_layers_weights(a, nullptr));
    launched(launch_layers_forward(a, nullptr));
    for (int64_t b = 0; b < rows; ++b)
        for (int32_t o = 0; o < m; ++o) {
            double most = -1e30;
            for (int32_t i = 0; i < n; ++i)
                most = std::max(
                    most, double{w[o * n + i]} + leaf[b * leaves + i] + leaf[b * leaves + n + i]);
            close("most", val[(s + o) * lanes + b], most);
        }
}

void check_tables(WeightNorm norm) {
    const int64_t rows = 19, block = 3, values = 5;
    const auto row = exact<int64_t>({3, 0, 3});
    const int64_t blocks = row.size, units = blocks * block;
    const ExactBuffer<int64_t> x(rows * blocks);
    const ExactBuffer<float> table(6 * values), dtable(6 * values), e(units * 32), de(rows * units);
    const ExactBuffer<float> base(6), shift(6);
    for (int64_t i = 0; i < x.size; ++i) x[i] = i * 11 % (values + 1) - 1;
    for (int64_t i = 0; i < table.size; ++i) table[i] = number(i);
    for (int64_t i = 0; i < de.size; ++i) de[i] = number(i);
    CircuitTableArgs a;
    a.rows = rows, a.lanes = 32, a.blocks = blocks, a.block = block;
    a.table_rows = 6, a.values = values, a.norm = norm;
    a.base = base.data(), a.shift = shift.data();
    a.table = table.data(), a.x = x.data(), a.row = row.data(), a.e = e.data();
    a.de = de.data(), a.de_row = units, a.de_unit = 1, a.dtable = dtable.data();
    launched(launch_circuit_table(a, nullptr));
    launched(launch_circuit_table_backward(a, nullptr));
    const bool logits = norm == WeightNorm::kLogits;
    std::vector<double> flows(static_cast<size_t>(dtable.size)), total(6), used(6);
    for (int64_t i = 0; i < table.size; ++i) total[i / values] += std::exp(double{table[i]});
    for (int64_t b = 0; b < rows; ++b)
        for (int64_t u = 0; u < units; ++u) {
            const int64_t v = x[b * blocks + u / block];
            const int64_t at = (row[u / block] + u % block) * values + v;
            const double norm = logits ? std::log(total[row[u / block] + u % block]) : 0;
            close("table", e[u * 32 + b], v < 0 ? 0 : table[at] - norm);
            if (v >= 0) flows[at] += de[b * units + u], used[at / values] += de[b * units + u];
        }
    for (int64_t i = 0; i < dtable.size; ++i) {
        const double softmax = std::exp(double{table[i]}) / total[i / values];
        close("dtable", dtable[i], flows[i] - (logits ? softmax * used[i / values] : 0));
    }
}

}  // namespace

int main() {
    check_layers(1, 1, 1);
    check_layers(5, 7, 19);     // evaluated in one launch
    check_layers(129, 128, 3);  // evaluated in one launch per stage
    check_tables(WeightNorm::kLog);
    check_tables(WeightNorm::kLogits);
    std::puts("exact");
    return 0;
}
