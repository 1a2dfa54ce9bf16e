// Laws of the circuit ops, checked in buffers of exact size: circuit_twin_test.cpp runs them on the
// twins (CPU kernels), and tests/emu/circuit_asan_main.cpp runs them on the CUDA kernels.
//
// A random circuit whose positions are all marginalised has log-probability 0; each conditional is
// the difference of prefixes; the gradients of logits sum to zero along a softmax.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "lora_ext/circuit.h"
#include "twin_test.h"

namespace lora_ext {

// Buffer of exactly n elements; a sanitizer detects an access to the next byte.
template <typename S>
struct Exact {
    std::unique_ptr<S[]> memory;
    int64_t size;
    explicit Exact(int64_t n) : memory(new S[n]()), size(n) {}
    S* data() const { return memory.get(); }
    S& operator[](int64_t i) const { return memory[i]; }
};

struct CircuitShape {
    CircuitKind kind;
    int64_t rows, n_token, components, vocab;
};

// `Run` has the functions leaf, leaf_backward, scan and scan_backward, called with arguments.
template <DType kType, typename Run>
void check_circuit(const CircuitShape& s, Run&& run) {
    using T = Type<kType>;
    using S = typename T::S;
    using A = typename T::Acc;
    const int64_t b = s.rows, k = s.n_token, c = s.components, v = s.vocab;
    const int64_t matrices = circuit_num_transitions(s.kind, k);
    const CircuitKind kind = matrices > 0 ? s.kind : CircuitKind::kCP;
    const auto logits = [](int64_t n) {
        Exact<S> t(n);
        for (int64_t i = 0; i < n; ++i) t[i] = T::put(below(20) == 0 ? -INFINITY : 3 * uniform());
        return t;
    };
    const Exact<S> leaf = logits(b * k * c * v), prior = logits(b * c),
                   trans = logits(b * matrices * c * c), dleaf(leaf.size), dprior(prior.size),
                   dtrans(trans.size);
    Exact<int64_t> x(b * k);
    for (int64_t i = 0; i < x.size; ++i) x[i] = below(v + 1) - 1;
    const Exact<A> e(b * k * c), top(e.size), log_sum(e.size), posterior(e.size), de(e.size);
    const Exact<A> prefix(b * k), conditional(b * k), dprefix(b * k), dconditional(b * k);
    const Exact<A> states(b * circuit_num_states(kind, k) * c);
    for (int64_t i = 0; i < b * k; ++i)
        dprefix[i] = static_cast<A>(uniform()), dconditional[i] = static_cast<A>(uniform());

    CircuitLeafArgs l;
    l.dtype = kType;
    l.rows = b, l.n_token = k, l.components = c, l.vocab = v;
    l.logits = leaf.data(), l.logits_stride = k * c * v;
    l.x = x.data(), l.x_stride = k;
    l.e = e.data(), l.top = top.data(), l.log_sum = log_sum.data(), l.e_stride = k * c;
    run.leaf(l);
    CircuitScanArgs a;
    a.params = {kind, kType, b, k, c, prior.data(), c, trans.data(), matrices * c * c};
    a.e = e.data(), a.e_stride = k * c;
    a.prefix = prefix.data(), a.conditional = conditional.data(), a.posterior = posterior.data();
    a.states = states.data();
    run.scan(a);
    const double near = kType == DType::kFloat64 ? 1e-12 : 1e-4;
    for (int64_t i = 0; i < b * k; ++i) {
        const double before = i % k ? prefix[i - 1] : 0;
        EXPECT(!std::isnan(prefix[i]) && prefix[i] <= before + near, "prefix %g after %g",
               double(prefix[i]), before);
        // Rows that are all -inf lose mass, so the difference of prefixes is only a lower bound.
        EXPECT(!(conditional[i] < prefix[i] - before - near), "conditional %g, prefixes %g %g",
               double(conditional[i]), before, double(prefix[i]));
        double sum = 0;
        for (int64_t z = 0; z < c; ++z) sum += posterior[i * c + z];
        EXPECT(std::fabs(sum - 1) < near || sum == 0, "posterior sums to %g", sum);
    }

    a.dprefix = dprefix.data(), a.dconditional = dconditional.data();
    a.de = de.data(), a.dprior = dprior.data();
    if (matrices > 0) a.dtrans = dtrans.data();
    run.scan_backward(a);
    l.de = de.data(), l.dlogits = dleaf.data();
    run.leaf_backward(l);
    const auto sums_to_zero = [&](const Exact<S>& t, int64_t width, const char* what) {
        for (int64_t row = 0; row < t.size / width; ++row) {
            double sum = 0, size = 1;
            for (int64_t i = 0; i < width; ++i) {
                const double g = T::get(t[row * width + i]);
                sum += g, size += std::fabs(g);
            }
            EXPECT(std::fabs(sum) <= (near + 2 * T::kUnit) * 4 * size, "%s: row %d sums to %g",
                   what, int(row), sum);
        }
    };
    sums_to_zero(dleaf, v, "dleaf");
    sums_to_zero(dprior, c, "dprior");
    sums_to_zero(dtrans, c, "dtrans");
}

template <DType kType, typename Run>
void check_circuits(Run&& run) {
    using enum CircuitKind;
    for (CircuitKind kind : {kCP, kHMM, kBTree})
        for (const CircuitShape& s :
             {CircuitShape{kind, 1, 1, 1, 1}, CircuitShape{kind, 3, 2, 5, 7},
              CircuitShape{kind, 2, 5, 8, 16}, CircuitShape{kind, 5, 7, 17, 33},
              CircuitShape{kind, 1, 4, 40, 70}})
            check_circuit<kType>(s, run);
    check_circuit<kType>({kFF, 2, 6, 1, 5000}, run);
}

}  // namespace lora_ext
