// Mixes of normalised hidden states on the CPU, compiled once per instruction set.
//
// Vector lanes run along a row. Up to four rows are processed together, so that gamma and the sums
// over rows are loaded once for all four. Each hidden state is read from memory once, for its mean
// square; the second read is from a cache.
//
// Order of every sum: along a row, one vector of sums, then its lanes in a fixed tree; over depths,
// ascending; over the rows of a part (mix_part_rows), four at a time, then over the parts.
#include "lora_ext/depth_mix.h"

#include "by_dtype.h"
#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTogether = 4;
constexpr int64_t kTile = 512;  // columns mixed at a time, so that they stay in L1
constexpr int kMax = kMaxDepths;
// A mix of at least this many bytes is written with stores that bypass the caches, since the mix
// would not fit in the caches. Ordinary stores would first read each cache line; with three hidden
// states these reads are a fifth of all memory traffic. Measured: bypassing is 1.3 times faster.
constexpr int64_t kStreamed = 4 << 20;
constexpr int64_t kAhead = 256;  // prefetch distance in elements of a row; measured gain 8 %

// ------------------------------------------------------------------------------------------------
// Rows of any width: whole vectors, then a partial one

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
// Stores a whole vector at an aligned address, bypassing the caches; 16-bit values use ordinary
// stores.
template <typename T>
LX_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4 && sizeof(v) == 64) return _mm512_stream_ps((float*)p, (__m512)v);
    if constexpr (sizeof(T) == 8 && sizeof(v) == 64)
        return _mm512_stream_pd((double*)p, (__m512d)v);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4 && sizeof(v) == 32) return _mm256_stream_ps((float*)p, (__m256)v);
    if constexpr (sizeof(T) == 8 && sizeof(v) == 32)
        return _mm256_stream_pd((double*)p, (__m256d)v);
#endif
    store(p, v);
}
LX_INLINE void end_streams() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}
// Zeroes the lanes beyond the last column.
template <typename T>
LX_INLINE Vec<T> only(Vec<T> v, Whole) {
    return v;
}
template <typename T>
LX_INLINE Vec<T> only(Vec<T> v, int64_t n) {
    for (int64_t i = n; i < kLanes<T>; ++i) v[i] = 0;
    return v;
}
// Calls f(column, Whole) for whole vectors, f(column, n) for the remaining n columns.
template <typename T, typename F>
LX_INLINE void for_vectors(int64_t width, F&& f) {
    int64_t c = 0;
    for (; c + kLanes<T> <= width; c += kLanes<T>) f(c, Whole{});
    if (c < width) f(c, width - c);
}

// Sums the lanes of each of up to four vectors, one vector per row.
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
// kRows rows from `first` on; T is the type of values, A the type of gamma, beta, and sums.
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
    // Return the entry for row i and depth e of an array (N, k).
    LX_INLINE A& at(const void* numbers, int e, int i) const {
        return static_cast<A*>(const_cast<void*>(numbers))[(first + i) * depths + e];
    }
    LX_INLINE A mean(int e, int i) const { return args.layer ? at(args.mean, e, i) : A(0); }

    // Local copies of the row pointers of depth e, the pointers to prefetch, and the means, so that
    // the compiler does not reload them after stores.
    struct Hidden {
        const T *row[kRows], *ahead[kRows];
        V mean[kRows];

        LX_INLINE Hidden(const Rows& rows, int e) {
            const int next = rows.first + kRows < rows.args.rows ? kRows : 0;
            for (int i = 0; i < kRows; ++i) {
                row[i] = rows.hidden(e, i);
                ahead[i] = rows.hidden(e, i + next);
                mean[i] = broadcast<T>(rows.mean(e, i));
            }
        }
    };

    // Writes mean and rinv of depth e.
    LX_INLINE void measure(int e) const {
        const T* row[kRows];
        for (int i = 0; i < kRows; ++i) row[i] = hidden(e, i);
        A sums[kTogether];
        V means[kRows] = {}, sum[kRows] = {};
        if (args.layer) {
            for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
                for (int i = 0; i < kRows; ++i) sum[i] += take(row[i] + c, n);
            });
            total<T>(sum, sums);
            for (int i = 0; i < kRows; ++i) {
                at(args.mean, e, i) = sums[i] / A(width);
                means[i] = broadcast<T>(sums[i] / A(width));
                sum[i] = V{};
            }
        }
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            for (int i = 0; i < kRows; ++i) {
                const V h = only<T>(take(row[i] + c, n) - means[i], n);
                __builtin_prefetch(row[i] + c + kAhead, 0, 2);
                sum[i] = fma(h, h, sum[i]);
            }
        });
        total<T>(sum, sums);
        for (int i = 0; i < kRows; ++i)
            at(args.rinv, e, i) = A(1) / square_root(sums[i] / A(width) + A(args.eps));
    }

    // Calls f(i, column, n, normalised) for the vectors of n_e.
    template <typename F>
    LX_INLINE void for_normed(int e, F&& f) const {
        const Hidden h(*this, e);
        V rinv[kRows];
        for (int i = 0; i < kRows; ++i) rinv[i] = broadcast<T>(at(args.rinv, e, i));
        const A *const scales = gamma(e), *const shifts = beta(e);
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(scales + c, n);
            for (int i = 0; i < kRows; ++i) {
                const V x = (take(h.row[i] + c, n) - h.mean[i]) * rinv[i];
                f(i, c, n, shifts ? fma(x, scale, take(shifts + c, n)) : x * scale);
            }
        });
    }

    // Computes the mixing weights: the softmax of the router's logits for n_{k-1}.
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
        alignas(64) A tile[kRows][kTile];
        const bool streams = args.rows * width * int64_t{sizeof(T)} >= kStreamed;
        for (int64_t begin = 0; begin < width; begin += kTile) {
            const int64_t columns = min(kTile, width - begin);
            for (int i = 0; i < kRows; ++i)
                for (int64_t c = 0; c < columns; c += kLanes<T>) store(tile[i] + c, V{});
            for (int e = 0; e < depths; ++e) add_depth(e, begin, columns, tile);
            for (int i = 0; i < kRows; ++i) {
                T* const out = static_cast<T*>(args.mixed) + (first + i) * width + begin;
                const bool past = streams && (uintptr_t)out % sizeof(V) == 0;
                for_vectors<T>(columns, [&](int64_t c, auto n) __attribute__((always_inline)) {
                    const V v = load_bits<V>(tile[i] + c);
                    if constexpr (__is_same(decltype(n), Whole))
                        if (past) return stream(out + c, v);
                    give(out + c, v, n);
                });
            }
        }
    }

    // Adds the normalised depth e, times its weight, to the tile of columns from `begin` on.
    // Prefetches the next rows, because memory would otherwise be idle.
    LX_INLINE void add_depth(int e, int64_t begin, int64_t columns, A (&tile)[kRows][kTile]) const {
        const Hidden h(*this, e);
        V weight[kRows], factor[kRows];
        for (int i = 0; i < kRows; ++i) {
            weight[i] = broadcast<T>(at(args.weights, e, i));
            factor[i] = weight[i] * broadcast<T>(at(args.rinv, e, i));
        }
        const A* const scales = gamma(e) + begin;
        for_vectors<T>(columns, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(scales + c, n);
            for (int i = 0; i < kRows; ++i) {
                __builtin_prefetch(h.ahead[i] + begin + c, 0, 2);
                const V x = (take(h.row[i] + begin + c, n) - h.mean[i]) * factor[i];
                store(tile[i] + c, fma(x, scale, load_bits<V>(tile[i] + c)));
            }
        });
        if (!beta(e)) return;
        const A* const shifts = beta(e) + begin;
        for_vectors<T>(columns, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V shift = take(shifts + c, n);
            for (int i = 0; i < kRows; ++i)
                store(tile[i] + c, fma(weight[i], shift, load_bits<V>(tile[i] + c)));
        });
    }

    // --------------------------------------------------------------------------------------------
    // Backward. g is dmixed or the gradient of n_e, with g_row elements between rows.

    // Sums along each row: of g gamma (h - m), of g gamma ("layer"), and of g beta.
    struct Products {
        A scaled[kTogether] = {}, plain[kTogether] = {}, shifted[kTogether] = {};
    };
    template <typename U>
    LX_INLINE Products products(const U* g, int64_t g_row, int e) const {
        V scaled[kRows] = {}, plain[kRows] = {}, shifted[kRows] = {};
        const Hidden h(*this, e);
        const A *const scales = gamma(e), *const shifts = beta(e);
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(scales + c, n);
            for (int i = 0; i < kRows; ++i) {
                const V t = take(g + i * g_row + c, n) * scale;
                scaled[i] = fma(t, take(h.row[i] + c, n) - h.mean[i], scaled[i]);
                plain[i] += t;
            }
        });
        if (shifts)
            for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
                const V shift = take(shifts + c, n);
                for (int i = 0; i < kRows; ++i)
                    shifted[i] = fma(take(g + i * g_row + c, n), shift, shifted[i]);
            });
        Products sums;
        total<T>(scaled, sums.scaled);
        if (args.layer) total<T>(plain, sums.plain);
        if (shifts) total<T>(shifted, sums.shifted);
        return sums;
    }

    // Writes dh_e for G_e = weight g, and adds the terms of these rows to dgamma_e and dbeta_e of
    // their part.
    template <typename U>
    LX_INLINE void finish(const U* g, int64_t g_row, int e, const A (&weight)[kRows],
                          const Products& sums, A* dgamma, A* dbeta) const {
        V factor[kRows], slope[kRows], level[kRows], share[kRows];
        for (int i = 0; i < kRows; ++i) {
            const A r = at(args.rinv, e, i), f = weight[i] * r;
            share[i] = broadcast<T>(weight[i]);
            factor[i] = broadcast<T>(f);
            slope[i] = broadcast<T>(f * (r * (r * (sums.scaled[i] / A(width)))));
            level[i] = broadcast<T>(f * (sums.plain[i] / A(width)));
        }
        const Hidden h(*this, e);
        const Hidden next(*this, e + 1 < depths ? e + 1 : 0);
        const A* const scales = gamma(e);
        T* out[kRows] = {};
        for (int i = 0; args.dhidden[e] && i < kRows; ++i)
            out[i] = static_cast<T*>(args.dhidden[e]) + (first + i) * width;
        const bool wraps = e + 1 == depths;
        const T* const* const ahead = wraps ? next.ahead : next.row;
        for_vectors<T>(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const V scale = take(scales + c, n);
            V of_gamma = take(dgamma + c, n), of_beta = {};
            if (dbeta) of_beta = take(dbeta + c, n);
            for (int i = 0; i < kRows; ++i) {
                __builtin_prefetch(ahead[i] + c, 0, 2);
                const V up = take(g + i * g_row + c, n);
                const V x = take(h.row[i] + c, n) - h.mean[i], t = up * factor[i];
                of_gamma = fma(t, x, of_gamma);
                of_beta = fma(up, share[i], of_beta);
                if (out[i]) give(out[i] + c, fma(t, scale, -fma(x, slope[i], level[i])), n);
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
        // The gradient of n_{k-1} has two terms, from the mix and from the router.
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

    // Converts gradients of the weights to gradients of the router's logits.
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
    end_streams();
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
const DepthMixCpu depth_mix_table = {LX_BY_DTYPE(forward), LX_BY_DTYPE(backward), backward_scratch,
                                     sums_any};

}  // namespace lora_ext::LX_ISA
