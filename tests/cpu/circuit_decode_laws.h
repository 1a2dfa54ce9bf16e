// Laws of drafting and verifying, which the twins (CPU kernels) and the CUDA launchers must keep.
// Buffers have their exact size, so that a sanitizer detects an access to the first byte beyond.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "lora_ext/circuit_decode.h"
#include "twin_test.h"

namespace lora_ext {

struct Decoder {
    const char* name;
    std::function<void(const CircuitSampleArgs&)> sample;
    std::function<void(const CircuitConditionalArgs&)> conditional_dist;
    std::function<void(const CircuitArgmaxArgs&)> argmax;
    std::function<void(const SpecVerifyArgs&)> verify;
};

struct Shape {
    CircuitKind kind;
    int64_t rows, n_token, components, vocabulary;
    int64_t shift;  // elements between the allocated address and the first one used
};

template <typename S>
struct Exact {
    std::unique_ptr<S[]> memory;
    int64_t shift;
    explicit Exact(int64_t n, int64_t shift = 0) : memory(new S[n + shift]), shift(shift) {}
    S* data() const { return memory.get() + shift; }
    S& operator[](int64_t i) const { return data()[i]; }
};

template <DType kLeaf, DType kWeight>
void check_laws(const Decoder& decoder, const Shape& s) {
    using L = Type<kLeaf>;
    using W = Type<kWeight>;
    using A = typename L::Acc;
    const int64_t B = s.rows, K = s.n_token, C = s.components, V = s.vocabulary;
    const int64_t M = circuit_num_transitions(s.kind, K);
    const double slack = kLeaf == DType::kFloat64 ? 1e-10 : 1e-4;
    Exact<typename L::S> leaf(B * K * C * V, s.shift), target(B * (K + 1) * V, s.shift);
    Exact<typename W::S> prior(B * C, s.shift), trans(B * M * C * C, s.shift);
    for (int64_t i = 0; i < B * K * C * V; ++i) leaf[i] = L::put(3 * uniform());
    for (int64_t i = 0; i < B * (K + 1) * V; ++i) target[i] = L::put(3 * uniform());
    for (int64_t i = 0; i < B * C; ++i) prior[i] = W::put(3 * uniform());
    for (int64_t i = 0; i < B * M * C * C; ++i) trans[i] = W::put(3 * uniform());
    CircuitLogits logits;
    logits.circuit = {s.kind, kWeight, B, K, C, prior.data(), C, trans.data(), M * C * C};
    logits.dtype = kLeaf;
    logits.vocabulary = V;
    logits.leaf = leaf.data();
    logits.leaf_stride = K * C * V;
    const auto where = [&] {
        static char text[128];
        std::snprintf(text, sizeof(text), "%s %s/%s kind %d B%d K%d C%d V%d", decoder.name,
                      name_of(kLeaf), name_of(kWeight), int(s.kind), int(B), int(K), int(C),
                      int(V));
        return text;
    };

    // Draw samples. In some rows, the first token is given as evidence.
    Exact<A> uniforms(B * K * 2), conditional(B * K), posterior(B * K * C);
    Exact<int64_t> evidence(B * K), tokens(B * K);
    for (int64_t i = 0; i < B * K * 2; ++i) uniforms[i] = static_cast<A>((uniform() + 1) / 2.001);
    for (int64_t i = 0; i < B * K; ++i) evidence[i] = i % K == 0 && i / K % 2 ? below(V) : -1;
    CircuitSampleArgs sample{logits,        uniforms.data(),    evidence.data(),
                             tokens.data(), conditional.data(), posterior.data()};
    decoder.sample(sample);
    std::vector<double> joint(B, 0);
    for (int64_t i = 0; i < B * K; ++i) {
        EXPECT(tokens[i] >= 0 && tokens[i] < V, "%s: token %d", where(), int(tokens[i]));
        EXPECT(evidence[i] < 0 || tokens[i] == evidence[i], "%s: evidence changed", where());
        double sum = 0;
        for (int64_t z = 0; z < C; ++z) sum += posterior[i * C + z];
        EXPECT(std::fabs(sum - 1) < slack, "%s: a posterior sums to %g", where(), sum);
        joint[i / K] += conditional[i];
    }

    // The distribution at a random position sums to one and agrees with the sampled token's.
    Exact<int64_t> k(B);
    Exact<A> dist(B * V);
    for (int64_t b = 0; b < B; ++b) k[b] = below(K);
    decoder.conditional_dist({logits, tokens.data(), k.data(), dist.data()});
    for (int64_t b = 0; b < B; ++b) {
        double sum = 0;
        for (int64_t v = 0; v < V; ++v) sum += std::exp(double(dist[b * V + v]));
        EXPECT(std::fabs(sum - 1) < slack, "%s: a distribution sums to %g", where(), sum);
        const double got = dist[b * V + tokens[b * K + k[b]]], want = conditional[b * K + k[b]];
        EXPECT(std::fabs(got - want) < slack * (1 + std::fabs(want)), "%s: %g is %g", where(), got,
               want);
    }

    // The best latents have at most the window's probability, and at most that of the best window.
    Exact<A> value(B), best(B);
    Exact<int64_t> modes(B * K);
    decoder.argmax({logits, tokens.data(), modes.data(), value.data()});
    decoder.argmax({logits, nullptr, modes.data(), best.data()});
    for (int64_t b = 0; b < B; ++b) {
        EXPECT(value[b] <= joint[b] + slack * (1 - joint[b]), "%s: best latents above all",
               where());
        EXPECT(best[b] >= value[b] - slack * (1 - value[b]), "%s: a better window", where());
    }
    decoder.argmax({logits, modes.data(), tokens.data(), value.data()});
    for (int64_t b = 0; b < B; ++b)
        EXPECT(std::fabs(value[b] - best[b]) < slack * (1 - best[b]), "%s: modes given", where());

    // Uniforms of 0 accept all tokens, unless greedy. No uniform rejects the given tokens.
    decoder.sample(sample);
    Exact<A> tests(B * (K + 1));
    Exact<int64_t> given(B), accepted(B), next(B);
    for (int64_t b = 0; b < B; ++b) given[b] = below(K + 1);
    SpecVerifyArgs verify;
    verify.target_dtype = verify.leaf_dtype = kLeaf;
    verify.rows = B, verify.n_token = K, verify.components = C, verify.vocabulary = V;
    verify.target = target.data(), verify.target_stride = (K + 1) * V;
    verify.leaf = leaf.data(), verify.leaf_stride = K * C * V;
    verify.tokens = tokens.data(), verify.conditional = conditional.data();
    verify.posterior = posterior.data(), verify.uniforms = tests.data();
    verify.num_evidence = given.data();
    verify.accepted = accepted.data(), verify.next_token = next.data();
    for (double inverse_temperature : {1.0, 0.5, 0.0})
        for (double u : {0.0, 0.5, 1 - 0x1p-24}) {
            verify.inverse_temperature = inverse_temperature;
            for (int64_t i = 0; i < B * (K + 1); ++i) tests[i] = static_cast<A>(u);
            decoder.verify(verify);
            for (int64_t b = 0; b < B; ++b) {
                EXPECT(accepted[b] >= given[b] && accepted[b] <= K, "%s: accepted %d", where(),
                       int(accepted[b]));
                EXPECT(next[b] >= 0 && next[b] < V, "%s: next token %d", where(), int(next[b]));
                EXPECT(u > 0 || inverse_temperature == 0 || accepted[b] == K,
                       "%s: rejected by a uniform of 0", where());
            }
        }
}

inline void check_all(const Decoder& decoder, const std::vector<Shape>& shapes) {
    for (const Shape& s : shapes) {
        check_laws<DType::kFloat32, DType::kFloat32>(decoder, s);
        check_laws<DType::kFloat16, DType::kBFloat16>(decoder, s);
        check_laws<DType::kBFloat16, DType::kFloat16>(decoder, s);
    }
}

// As in csrc/ops, kCP replaces a kind that would have no transition matrix.
inline const std::vector<Shape> kDecodeShapes = {
    {CircuitKind::kCP, 1, 1, 1, 1, 0},     {CircuitKind::kCP, 3, 4, 5, 37, 1},
    {CircuitKind::kHMM, 2, 3, 7, 40, 0},   {CircuitKind::kHMM, 2, 2, 33, 9, 3},
    {CircuitKind::kBTree, 2, 7, 3, 16, 1}, {CircuitKind::kBTree, 1, 3, 36, 129, 0},
    {CircuitKind::kCP, 1, 2, 2, 5000, 0},  {CircuitKind::kCP, 1, 2, 2, 70000, 0},
};

}  // namespace lora_ext
