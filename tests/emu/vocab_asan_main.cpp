// The kernels of losses over a vocabulary in the asan flavour: every launcher, in buffers of exact
// size, against loops in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "lora_ext/vocab.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

constexpr int kWidth = 5, kIgnored = 1;  // hidden width d; index of the ignored row

void launched(LaunchStatus status) {
    if (status == 0) return;
    std::printf("%s\n", lx::status_string(status));
    std::exit(2);
}

struct Problem {
    int rows, hiddens, vocab, chunk;
    double softcap;
    bool divergence, kept;
    std::vector<float> raw, weight;
    std::vector<int64_t> labels;
    std::vector<float> state, products, targets, loss, lse;
    double tau;
    double worst = 0;

    Problem(int rows, int hiddens, int vocab, int chunk, double softcap)
        : rows(rows),
          hiddens(hiddens),
          vocab(vocab),
          chunk(chunk),
          softcap(softcap),
          divergence(hiddens > 1),
          kept(!divergence || softcap == 0),
          raw(hiddens * rows * vocab),
          weight(vocab * kWidth),
          labels(rows),
          state(3 * hiddens * rows),
          products(hiddens * rows * kWidth),
          targets(rows * kWidth),
          loss(rows),
          lse(hiddens * rows),
          tau(divergence ? 2 : 1) {
        std::mt19937 random(vocab);
        for (float& x : raw) x = static_cast<int>(random() % 2000) / 250.0f - 4;
        for (float& x : weight) x = static_cast<int>(random() % 200) / 100.0f - 1;
        for (int n = 0; n < rows; ++n) {
            labels[n] = n == kIgnored ? -100 : static_cast<int64_t>(random() % vocab);
            for (int j = 0; j < kWidth; ++j)
                targets[n * kWidth + j] = weight[std::max<int64_t>(labels[n], 0) * kWidth + j];
        }
    }

    double z(int e, int n, int v) const {
        const double x = raw[(e * rows + n) * vocab + v];
        return (softcap > 0 ? softcap * std::tanh(x / softcap) : x) / tau;
    }
    double log_sum(int e, int n) const {
        double sum = 0;
        for (int v = 0; v < vocab; ++v) sum += std::exp(z(e, n, v));
        return std::log(sum);
    }
    // Expected loss of row n.
    double loss_of(int n) const {
        if (n == kIgnored) return 0;
        if (!divergence) return log_sum(0, n) - z(0, n, static_cast<int>(labels[n]));
        const int last = hiddens - 1;
        double total = 0;
        for (int e = 0; e < last; ++e)
            for (int v = 0; v < vocab; ++v) {
                const double log_p = z(last, n, v) - log_sum(last, n);
                total += std::exp(log_p) * (log_p - z(e, n, v) + log_sum(e, n));
            }
        return tau * tau * total / last;
    }
    double gradient_of(int e, int n, int v) const {
        if (n == kIgnored) return 0;
        const double t = z(e, n, v) * tau / (softcap > 0 ? softcap : 1);
        const double slope = softcap > 0 ? 1 - t * t : 1;
        const double q = std::exp(z(e, n, v) - log_sum(e, n));
        if (!divergence) return (q - (v == labels[n])) * slope;
        const int last = hiddens - 1;
        return (q - std::exp(z(last, n, v) - log_sum(last, n))) * slope * tau / last;
    }
    void compare(double found, double expected) {
        const double gap = std::abs(found - expected);
        worst = gap < 2e-5 ? worst : std::max(worst, std::isnan(gap) ? 1 : gap);
    }

    // Calls f(args, logits of the chunk) for each chunk of the vocabulary.
    template <class F>
    void sweep(VocabArgs& args, F&& f) {
        for (int first = 0; first < vocab; first += chunk) {
            const int columns = std::min(chunk, vocab - first);
            std::vector<float> logits;
            for (int row = 0; row < hiddens * rows; ++row)
                logits.insert(logits.end(), raw.begin() + row * vocab + first,
                              raw.begin() + row * vocab + first + columns);
            logits.shrink_to_fit();
            args.first = first, args.columns = columns, args.logits = logits.data();
            f(logits);
        }
    }

    double run() {
        std::vector<char> counts(rows, 1);
        counts[kIgnored] = 0;
        VocabArgs args;
        args.rows = rows, args.hiddens = hiddens, args.width = kWidth;
        args.softcap = softcap, args.tau = tau;
        if (divergence)
            args.mask = reinterpret_cast<const bool*>(counts.data());
        else
            args.labels = labels.data();
        args.state = state.data(), args.loss = loss.data(), args.lse = lse.data();
        if (kept) args.products = products.data();
        if (kept && !divergence) args.targets = targets.data();
        sweep(args, [&](const std::vector<float>& weights) {
            launched(divergence ? launch_kl_update(args, nullptr)
                                : launch_cross_entropy_update(args, nullptr));
            for (int row = 0; kept && row < hiddens * rows; ++row)
                for (int v = 0; v < args.columns; ++v)
                    for (int j = 0; j < kWidth; ++j)
                        products[row * kWidth + j] +=
                            weights[row * args.columns + v] * weight[(args.first + v) * kWidth + j];
        });
        launched(divergence ? launch_kl_finish(args, nullptr)
                            : launch_cross_entropy_finish(args, nullptr));
        const int students = std::max(1, hiddens - 1);
        for (int n = 0; n < rows; ++n) compare(loss[n], loss_of(n));
        for (int e = 0; kept && e < students; ++e)
            for (int n = 0; n < rows; ++n)
                for (int j = 0; j < kWidth; ++j) {
                    double sum = 0;
                    for (int v = 0; v < vocab; ++v)
                        sum += gradient_of(e, n, v) * weight[v * kWidth + j];
                    compare(products[(e * rows + n) * kWidth + j], sum);
                }
        sweep(args, [&](const std::vector<float>& d) {
            launched(divergence ? launch_kl_gradient(args, nullptr)
                                : launch_cross_entropy_gradient(args, nullptr));
            for (int e = 0; e < students; ++e)
                for (int n = 0; n < rows; ++n)
                    for (int v = 0; v < args.columns; ++v)
                        compare(d[(e * rows + n) * args.columns + v],
                                gradient_of(e, n, static_cast<int>(args.first) + v));
        });
        return worst;
    }
};

}  // namespace

int main() {
    for (const int hiddens : {1, 3})
        for (const double softcap : {0.0, 2.0})
            for (const auto& [vocab, chunk] : {std::pair{40, 16}, {37, 37}, {130, 100}}) {
                const double worst = Problem(3, hiddens, vocab, chunk, softcap).run();
                if (worst == 0) continue;
                std::printf("k %d, softcap %g, V %d, chunk %d: off by %g\n", hiddens, softcap,
                            vocab, chunk, worst);
                return 1;
            }
    std::puts("exact");
    return 0;
}
