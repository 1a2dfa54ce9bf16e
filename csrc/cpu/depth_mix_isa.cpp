// Mixes of normed hidden states on the CPU, compiled once per instruction set.
//
// Vector lanes run along a row. Up to four rows go together: gamma, and what is summed over rows, is
// then met once for four of them. Each hidden state comes from memory once, when its mean square
// is taken; the second time it is in a cache.
//
// Order of every sum: over a row, one vector of sums, then its lanes in a fixed tree; over depths
// ascending; over the rows of a part ascending, four at a time, then over the parts.
#include "lora_ext/depth_mix.h"

#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTogether = 4;
constexpr int kMax = kMaxDepths;

// ------------------------------------------------------------------------------------------------
// Rows of any width: whole vectors, then the rest of one

struct Whole {};
template <typename T>
LX_INLINE Vec<T> take(const T* p, Whole) {
    return load(p);
}
template <typename T>
LX_INLINE Vec<T> take(const T* p, int64_t n) {
    return load_n(p, n);
}
template <typename T>
LX_INLINE void give(T* p, Vec<T> v, Whole) {
    store(p, v);
}
template <typename T>
LX_INLINE void give(T* p, Vec<T> v, int64_t n) {
    store_n(p, v, n);
}
// Zero where there is no column.
template <typename T>
LX_INLINE Vec<T> only(Vec<T> v, Whole) {
    return v;
}
template <typename T>
LX_INLINE Vec<T> only(Vec<T> v, int64_t n) {
    for (int64_t i = n; i < kLanes<T>; ++i) v[i] = 0;
    return v;
}
// Calls f(column, Whole) for whole vectors, f(column, n) for what is left.
template <typename T, typename F>
LX_INLINE void for_vectors(int64_t width, F&& f) {
    int64_t c = 0;
    for (; c + kLanes<T> <= width; c += kLanes<T>) f(c, Whole{});
    if (c < width) f(c, width - c);
}

// Up to four sums over rows.
template <typename T, int kRows>
LX_INLINE void total(const Vec<T> (&sum)[kRows], Acc<T> (&out)[kTogether]) {
    Vec<T> all[kTogether] = {};
    for (int i = 0; i < kRows; ++i) all[i] = sum[i];
    sum_lanes<T>(all, out);
}

LX_INLINE float square_root(float x) {
    return __builtin_sqrtf(x);
}
LX_INLINE double square_root(double x) {
    return __builtin_sqrt(x);
}

// ------------------------------------------------------------------------------------------------
// kRows rows from `first` on; T of values, A of gamma, beta, and sums.
template <typename T, int kRows>
struct Rows {
    using A = Acc<T>;
    using V = Vec<T>;
    const DepthMixArgs& args;
    const int64_t first, width;
    const int depths;

    LX_INLINE Rows(const DepthMixArgs& args, int64_t first)
        : args(args), first(first), width(args.width), depths(args.depths) {}

    LX_INLINE const T* hidden(int e, int i) const {
        return static_cast<const T*>(args.hidden[e]) + (first + i) * args.hidden_stride[e];
    }
    LX_INLINE const A* gamma(int e) const { return static_cast<const A*>(args.gamma[e]); }
    LX_INLINE const A* beta(int e) const { return static_cast<const A*>(args.beta[e]); }
    LX_INLINE const A* router(int e) const {
        return static_cast<const A*>(args.router) + e * width;
    }
    // Numbers (N, k) of row i and depth e.
    LX_INLINE A& at(const void* numbers, int e, int i) const {
        return static_cast<A*>(const_cast<void*>(numbers))[(first + i) * depths + e];
    }
    LX_INLINE A mean(int e, int i) const { return args.layer ? at(args.mean, e, i) : A(0); }

    // Writes mean and rinv of depth e.
    LX_INLINE void measure(int e) const {
        A sums[kTogether], means[kTogether] = {};
        if (args.layer) {
            V sum[kRows] = {};
            for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
                for (int i = 0; i < kRows; ++i) sum[i] += take(hidden(e, i) + c, n);
            });
            total<T>(sum, sums);
            for (int i = 0; i < kRows; ++i) at(args.mean, e, i) = means[i] = sums[i] / A(width);
        }
        V sum[kRows] = {};
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            for (int i = 0; i < kRows; ++i) {
                const V h = only<T>(take(hidden(e, i) + c, n) - broadcast<T>(means[i]), n);
                sum[i] = fma(h, h, sum[i]);
            }
        });
        total<T>(sum, sums);
        for (int i = 0; i < kRows; ++i)
            at(args.rinv, e, i) = A(1) / square_root(sums[i] / A(width) + A(args.eps));
    }

    // Calls f(i, column, n, normed) for the vectors of n_e.
    template <typename F>
    LX_INLINE void for_normed(int e, F&& f) const {
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(gamma(e) + c, n);
            for (int i = 0; i < kRows; ++i) {
                const V x = (take(hidden(e, i) + c, n) - broadcast<T>(mean(e, i))) *
                            broadcast<T>(at(args.rinv, e, i));
                f(i, c, n, beta(e) ? fma(x, scale, take(beta(e) + c, n)) : x * scale);
            }
        });
    }

    // Writes the weights that the router chooses.
    LX_INLINE void route() const {
        V sum[kMax][kRows] = {};
        for_normed(depths - 1,
                   [&](int i, int64_t c, auto n, V normed) __attribute__((always_inline)) {
                       for (int e = 0; e < depths; ++e)
                           sum[e][i] = fma(normed, take(router(e) + c, n), sum[e][i]);
                   });
        A logits[kMax][kTogether];
        for (int e = 0; e < depths; ++e) {
            total<T>(sum[e], logits[e]);
            for (int i = 0; i < kRows; ++i) logits[e][i] += static_cast<const A*>(args.bias)[e];
        }
        for (int i = 0; i < kRows; ++i) {
            A top = logits[0][i];
            for (int e = 1; e < depths; ++e) top = logits[e][i] > top ? logits[e][i] : top;
            A all = 0;
            for (int e = 0; e < depths; ++e) {
                const A share = exp(broadcast<T>(logits[e][i] - top))[0];
                at(args.weights, e, i) = share;
                all += share;
            }
            for (int e = 0; e < depths; ++e) at(args.weights, e, i) /= all;
        }
    }

    LX_INLINE void forward() const {
        for (int e = 0; e < depths; ++e) measure(e);
        if (args.router) route();
        A factor[kMax][kRows], weight[kMax][kRows], means[kMax][kRows];
        for (int e = 0; e < depths; ++e)
            for (int i = 0; i < kRows; ++i) {
                weight[e][i] = at(args.weights, e, i);
                factor[e][i] = weight[e][i] * at(args.rinv, e, i);
                means[e][i] = mean(e, i);
            }
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            V sum[kRows] = {};
            for (int e = 0; e < depths; ++e) {
                const V scale = take(gamma(e) + c, n);
                for (int i = 0; i < kRows; ++i) {
                    const V h = take(hidden(e, i) + c, n) - broadcast<T>(means[e][i]);
                    sum[i] = fma(h * broadcast<T>(factor[e][i]), scale, sum[i]);
                }
                if (!beta(e)) continue;
                const V shift = take(beta(e) + c, n);
                for (int i = 0; i < kRows; ++i)
                    sum[i] = fma(broadcast<T>(weight[e][i]), shift, sum[i]);
            }
            for (int i = 0; i < kRows; ++i)
                give(static_cast<T*>(args.mixed) + (first + i) * width + c, sum[i], n);
        });
    }

    // --------------------------------------------------------------------------------------------
    // Backward. g is a gradient, rows g_row elements apart: dmixed, or that of n_e itself.

    // Over each row, of g gamma times (h - m), of g gamma ("layer"), and of g beta.
    struct Products {
        A scaled[kTogether] = {}, plain[kTogether] = {}, shifted[kTogether] = {};
    };
    template <typename U>
    LX_INLINE Products products(const U* g, int64_t g_row, int e) const {
        V scaled[kRows] = {}, plain[kRows] = {}, shifted[kRows] = {};
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(gamma(e) + c, n);
            for (int i = 0; i < kRows; ++i) {
                const V up = take(g + i * g_row + c, n), t = up * scale;
                const V h = take(hidden(e, i) + c, n) - broadcast<T>(mean(e, i));
                scaled[i] = fma(t, h, scaled[i]);
                if (args.layer) plain[i] += t;
                if (beta(e)) shifted[i] = fma(up, take(beta(e) + c, n), shifted[i]);
            }
        });
        Products sums;
        total<T>(scaled, sums.scaled);
        if (args.layer) total<T>(plain, sums.plain);
        if (beta(e)) total<T>(shifted, sums.shifted);
        return sums;
    }

    // dh_e where G_e = weight g, and what the rows add to dgamma_e and dbeta_e of their part.
    template <typename U>
    LX_INLINE void finish(const U* g, int64_t g_row, int e, const A (&weight)[kRows],
                          const Products& sums, A* dgamma, A* dbeta) const {
        A factor[kRows], slope[kRows], level[kRows], means[kRows];
        for (int i = 0; i < kRows; ++i) {
            const A r = at(args.rinv, e, i);
            factor[i] = weight[i] * r;
            slope[i] = factor[i] * (r * (r * (sums.scaled[i] / A(width))));
            level[i] = factor[i] * (sums.plain[i] / A(width));
            means[i] = mean(e, i);
        }
        T* const out = static_cast<T*>(args.dhidden[e]);
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(gamma(e) + c, n);
            V of_gamma = take(dgamma + c, n), of_beta = {};
            if (dbeta) of_beta = take(dbeta + c, n);
            for (int i = 0; i < kRows; ++i) {
                const V up = take(g + i * g_row + c, n);
                const V h = take(hidden(e, i) + c, n) - broadcast<T>(means[i]);
                const V t = up * broadcast<T>(factor[i]);
                of_gamma = fma(t, h, of_gamma);
                if (dbeta) of_beta = fma(up, broadcast<T>(weight[i]), of_beta);
                if (!out) continue;
                const V d = fma(t, scale, -fma(h, broadcast<T>(slope[i]), broadcast<T>(level[i])));
                give(out + (first + i) * width + c, d, n);
            }
            give(dgamma + c, of_gamma, n);
            if (dbeta) give(dbeta + c, of_beta, n);
        });
    }

    LX_INLINE void backward(A* part, A* scratch) const {
        const T* const g = static_cast<const T*>(args.dmixed) + first * width;
        const int last = depths - 1;
        for (int e = 0; e < depths; ++e) {
            const Products sums = products(g, width, e);
            A weight[kRows];
            for (int i = 0; i < kRows; ++i) {
                weight[i] = at(args.weights, e, i);
                at(args.dweights, e, i) =
                    fma_one(at(args.rinv, e, i), sums.scaled[i], sums.shifted[i]);
            }
            if (args.router && e == last) break;
            finish(g, width, e, weight, sums, dgamma(part, e), dbeta(part, e));
        }
        if (!args.router) return;
        turn_to_logits();
        add_router(part);
        // The gradient of n_{k-1}, which comes on two ways.
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            for (int i = 0; i < kRows; ++i) {
                V up = take(g + i * width + c, n) * broadcast<T>(at(args.weights, last, i));
                for (int e = 0; e < depths; ++e)
                    up = fma(take(router(e) + c, n), broadcast<T>(at(args.dweights, e, i)), up);
                give(scratch + i * width + c, up, n);
            }
        });
        A ones[kRows];
        for (int i = 0; i < kRows; ++i) ones[i] = 1;
        finish(scratch, width, last, ones, products(scratch, width, last), dgamma(part, last),
               dbeta(part, last));
    }

    static LX_INLINE A fma_one(A a, A b, A c) { return a * b + c; }
    LX_INLINE A* dgamma(A* part, int e) const { return part + e * width; }
    LX_INLINE A* dbeta(A* part, int e) const {
        return beta(e) ? part + mix_betas_at(args) + e * width : nullptr;
    }

    // Gradients of the weights become those of the router's logits.
    LX_INLINE void turn_to_logits() const {
        for (int i = 0; i < kRows; ++i) {
            A mean_of = 0;
            for (int e = 0; e < depths; ++e) {
                A& d = at(args.dweights, e, i);
                if (args.dweights_in) d += at(args.dweights_in, e, i);
                mean_of += at(args.weights, e, i) * d;
            }
            for (int e = 0; e < depths; ++e) {
                A& d = at(args.dweights, e, i);
                d = at(args.weights, e, i) * (d - mean_of);
            }
        }
    }
    LX_INLINE void add_router(A* part) const {
        for (int e = 0; e < depths; ++e)
            for (int i = 0; i < kRows; ++i) part[mix_bias_at(args) + e] += at(args.dweights, e, i);
        A* const rows = part + mix_router_at(args);
        for_normed(
            depths - 1, [&](int i, int64_t c, auto n, V normed) __attribute__((always_inline)) {
                for (int e = 0; e < depths; ++e) {
                    A* const to = rows + e * width + c;
                    give(to, fma(normed, broadcast<T>(at(args.dweights, e, i)), take(to, n)), n);
                }
            });
    }
};

// Calls f(Rows) for the rows of [begin, end), four at a time, then one by one.
template <typename T, typename F>
LX_INLINE void for_rows(const DepthMixArgs& args, int64_t begin, int64_t end, F&& f) {
    int64_t row = begin;
    for (; row + kTogether <= end; row += kTogether) f(Rows<T, kTogether>(args, row));
    for (; row < end; ++row) f(Rows<T, 1>(args, row));
}

template <typename T>
void forward(const DepthMixArgs& args, int64_t begin, int64_t end) {
    for_rows<T>(args, begin, end,
                [](const auto& rows) __attribute__((always_inline)) { rows.forward(); });
}

template <typename T>
void backward(const DepthMixArgs& args, void* scratch, int64_t begin, int64_t end) {
    const int64_t sums = mix_sums(args), part_rows = mix_part_rows(args.rows);
    for (int64_t p = begin; p < end; ++p) {
        Acc<T>* const part = static_cast<Acc<T>*>(args.partial) + p * sums;
        for (int64_t i = 0; i < sums; ++i) part[i] = 0;
        for_rows<T>(args, p * part_rows, min((p + 1) * part_rows, args.rows),
                    [&](const auto& rows) __attribute__((always_inline)) {
                        rows.backward(part, static_cast<Acc<T>*>(scratch));
                    });
    }
}

template <typename A>
void add_parts(const DepthMixArgs& args, int64_t begin, int64_t end) {
    const int64_t count = mix_sums(args), parts = mix_parts(args.rows);
    const A* const partial = static_cast<const A*>(args.partial);
    A* const out = static_cast<A*>(args.sums);
    for_vectors<A>(end - begin, [&](int64_t c, auto n) __attribute__((always_inline)) {
        Vec<A> sum = {};
        for (int64_t p = 0; p < parts; ++p) sum += take(partial + p * count + begin + c, n);
        give(out + begin + c, sum, n);
    });
}

// Calls f(T{}) for the type of values.
template <typename F>
LX_INLINE void with_type(const DepthMixArgs& args, F&& f) {
    switch (args.dtype) {
        case DType::kFloat32:
            return f(float{});
        case DType::kFloat16:
            return f(Half{});
        case DType::kBFloat16:
            return f(BFloat{});
        case DType::kFloat64:
            return f(double{});
    }
}

void forward_any(const DepthMixArgs& args, int64_t begin, int64_t end) {
    with_type(args, [&]<typename T>(T) { forward<T>(args, begin, end); });
}
void backward_any(const DepthMixArgs& args, void* scratch, int64_t begin, int64_t end) {
    with_type(args, [&]<typename T>(T) { backward<T>(args, scratch, begin, end); });
}
int64_t backward_scratch(const DepthMixArgs& args) {
    return args.router ? kTogether * args.width * (args.dtype == DType::kFloat64 ? 8 : 4) : 0;
}
void sums_any(const DepthMixArgs& args, int64_t begin, int64_t end) {
    if (args.dtype == DType::kFloat64)
        add_parts<double>(args, begin, end);
    else
        add_parts<float>(args, begin, end);
}

}  // namespace

extern const DepthMixCpu depth_mix_table;
const DepthMixCpu depth_mix_table = {forward_any, backward_any, backward_scratch, sums_any};

}  // namespace lora_ext::LX_ISA
