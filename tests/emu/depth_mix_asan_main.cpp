// The kernels of mixes of hidden states in the asan flavour: both launchers, in buffers of exact
// size, are compared with the formulas of depth_mix.h in double. With the argument "overread", each
// hidden state is one element too short.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string_view>
#include <vector>

#include "lora_ext/depth_mix.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

bool overread = false;

struct Case {
    int rows, width, depths, pad;  // pad: elements between rows
    bool layer, betas, routed;
};

template <class T>
double value(const T& x) {
    return lx::to_float(x);
}

using Doubles = std::vector<double>;

// T is the type of values, G that of gamma and beta.
template <class T, class G>
struct Problem {
    const Case c;
    std::mt19937 random{7};
    std::vector<std::vector<T>> hidden, dhidden;
    std::vector<std::vector<G>> gamma, beta;
    std::vector<float> router, bias, weights, rinv, mean, dweights, dweights_in, partial, sums;
    std::vector<T> mixed, dmixed;
    DepthMixArgs args;

    template <class E>
    std::vector<E> numbers(int64_t n, double center = 0) {
        std::vector<E> v(n);
        for (E& x : v)
            x = lx::from_float<E>(
                static_cast<float>(center + static_cast<int>(random() % 33) / 16.0 - 1));
        return v;
    }
    int row_elements() const { return c.width + c.pad; }

    explicit Problem(const Case& made) : c(made) {
        const int64_t plane = int64_t{c.rows} * c.width, pairs = int64_t{c.rows} * c.depths;
        args.dtype = std::is_same_v<T, float>     ? DType::kFloat32
                     : std::is_same_v<T, lx::f16> ? DType::kFloat16
                                                  : DType::kBFloat16;
        args.wide_scales = std::is_same_v<G, float>;
        args.layer = c.layer, args.rows = c.rows, args.width = c.width, args.depths = c.depths;
        args.eps = 0.25;
        for (int e = 0; e < c.depths; ++e) {
            hidden.push_back(numbers<T>((c.rows - 1) * row_elements() + c.width - overread));
            gamma.push_back(numbers<G>(c.width, 1));
            if (c.betas) beta.push_back(numbers<G>(c.width));
            dhidden.emplace_back(plane);
        }
        router = numbers<float>(c.routed ? c.depths * c.width : 0);
        for (float& x : router) x /= static_cast<float>(c.width);
        bias = numbers<float>(c.routed ? c.depths : 0);
        weights = numbers<float>(pairs);
        dweights_in = numbers<float>(pairs);
        dmixed = numbers<T>(plane);
        rinv.resize(pairs), mean.resize(pairs), dweights.resize(pairs), mixed.resize(plane);
        for (int e = 0; e < c.depths; ++e) {
            args.hidden[e] = hidden[e].data(), args.hidden_stride[e] = row_elements();
            args.gamma[e] = gamma[e].data(), args.dhidden[e] = dhidden[e].data();
            if (c.betas) args.beta[e] = beta[e].data();
        }
        if (c.routed)
            args.router = router.data(), args.bias = bias.data(),
            args.dweights_in = dweights_in.data();
        args.weights = weights.data(), args.rinv = rinv.data();
        if (c.layer) args.mean = mean.data();
        args.mixed = mixed.data(), args.dmixed = dmixed.data(), args.dweights = dweights.data();
        sums.resize(mix_sums(args)), partial.resize(mix_parts(c.rows) * mix_sums(args));
        args.partial = partial.data(), args.sums = sums.data();
    }

    double gamma_at(int e, int j) const { return value(gamma[e][j]); }

    // Expected results of one row. `row_of` also adds its terms to sums over all rows.
    struct Row {
        Doubles mixed, dweights, dhidden;
    };
    Row row_of(int t, Doubles& totals) const {
        const int d = c.width, k = c.depths, last = k - 1;
        Doubles x(k * d), n(k * d), r(k), w(k), dl(k);
        for (int e = 0; e < k; ++e) {
            double m = 0, square = 0;
            const T* const h = hidden[e].data() + t * row_elements();
            for (int j = 0; c.layer && j < d; ++j) m += value(h[j]) / d;
            for (int j = 0; j < d; ++j) square += (value(h[j]) - m) * (value(h[j]) - m) / d;
            r[e] = 1 / std::sqrt(square + args.eps);
            for (int j = 0; j < d; ++j) {
                x[e * d + j] = (value(h[j]) - m) * r[e];
                n[e * d + j] = x[e * d + j] * gamma_at(e, j) + (c.betas ? value(beta[e][j]) : 0);
            }
        }
        double all = 0;
        for (int e = 0; e < k; ++e) {
            w[e] = weights[t * k + e];
            if (!c.routed) continue;
            double logit = bias[e];
            for (int j = 0; j < d; ++j) logit += router[e * d + j] * n[last * d + j];
            all += w[e] = std::exp(logit);
        }
        for (int e = 0; c.routed && e < k; ++e) w[e] /= all;
        Row row{Doubles(d), Doubles(k), Doubles(k * d)};
        const T* const g = dmixed.data() + t * d;
        double mean_of = 0;
        for (int e = 0; e < k; ++e) {
            for (int j = 0; j < d; ++j) {
                row.mixed[j] += w[e] * n[e * d + j];
                dl[e] += value(g[j]) * n[e * d + j];
            }
            if (c.routed) dl[e] += dweights_in[t * k + e];
            mean_of += w[e] * dl[e];
        }
        for (int e = 0; e < k; ++e)
            row.dweights[e] = dl[e] = c.routed ? w[e] * (dl[e] - mean_of) : dl[e];
        for (int e = 0; e < k; ++e) {
            Doubles up(d);
            double scaled = 0, plain = 0;
            for (int j = 0; j < d; ++j) {
                up[j] = w[e] * value(g[j]);
                for (int i = 0; c.routed && e == last && i < k; ++i)
                    up[j] += dl[i] * router[i * d + j];
                scaled += up[j] * gamma_at(e, j) * x[e * d + j] / d;
                plain += c.layer ? up[j] * gamma_at(e, j) / d : 0;
            }
            for (int j = 0; j < d; ++j) {
                row.dhidden[e * d + j] =
                    r[e] * (up[j] * gamma_at(e, j) - x[e * d + j] * scaled - plain);
                totals[e * d + j] += up[j] * x[e * d + j];
                if (c.betas) totals[mix_betas_at(args) + e * d + j] += up[j];
                if (c.routed) totals[mix_router_at(args) + e * d + j] += dl[e] * n[last * d + j];
            }
            if (c.routed) totals[mix_bias_at(args) + e] += dl[e];
        }
        return row;
    }

    // Return the largest error, relative to 1 + |value|.
    double run() {
        const std::vector<float> given = weights;
        for (const auto launch : {launch_depth_mix, launch_depth_mix_backward})
            if (const LaunchStatus status = launch(args, nullptr)) {
                std::printf("%s\n", lx::status_string(status));
                std::exit(2);
            }
        weights = given;  // with a router, the formulas compute their own weights
        double worst = 0;
        const auto compare = [&](double found, double expected) {
            const double gap = std::abs(found - expected) / (1 + std::abs(expected));
            worst = std::max(worst, std::isnan(gap) ? 1e9 : gap);
        };
        Doubles totals(sums.size());
        for (int t = 0; t < c.rows; ++t) {
            const Row row = row_of(t, totals);
            for (int j = 0; j < c.width; ++j) compare(value(mixed[t * c.width + j]), row.mixed[j]);
            for (int e = 0; e < c.depths; ++e) {
                compare(dweights[t * c.depths + e], row.dweights[e]);
                for (int j = 0; j < c.width; ++j)
                    compare(value(dhidden[e][t * c.width + j]), row.dhidden[e * c.width + j]);
            }
        }
        for (size_t i = 0; i < sums.size(); ++i) compare(sums[i], totals[i]);
        return worst;
    }
};

template <class T, class G>
void check(const Case& c, double allowed) {
    const double worst = Problem<T, G>(c).run();
    if (worst < allowed) return;
    std::printf("N %d, d %d, k %d, layer %d, betas %d, routed %d: off by %g\n", c.rows, c.width,
                c.depths, c.layer, c.betas, c.routed, worst);
    std::exit(1);
}

}  // namespace

int main(int count, char** words) {
    overread = count > 1 && std::string_view(words[1]) == "overread";
    for (const bool layer : {false, true})
        for (const bool betas : {false, true})
            for (const bool routed : {false, true})
                for (const auto& [rows, width, depths, pad] :
                     {std::tuple{1, 32, 1, 0}, {20, 64, 3, 8}, {18, 37, 2, 1}, {3, 8, 8, 0}}) {
                    const Case c{rows, width, depths, pad, layer, betas, routed};
                    check<float, float>(c, 1e-5);
                    check<lx::f16, lx::f16>(c, 1e-3);
                    check<lx::bf16, float>(c, 8e-3);
                }
    std::puts("exact");
}
