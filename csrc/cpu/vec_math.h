// exp and log of vectors with float and double lanes, compiled per instruction set like vec.h.
//
// Worst error in units in the last place over all instruction sets, measured on every float and on
// 2^24 vectors of doubles (tests/cpu/vec_math_test.cpp with an argument):
//             exp     log
//   float     1.09    0.93
//   double    1.01    0.85
// exp: -inf and all arguments below the logarithm of the smallest normal number give exactly 0.
// Arguments from slightly below the logarithm of the largest finite number (float 88.37, double
// 709.4) give infinity. log: 0 gives -inf, negative numbers NaN; subnormal numbers are handled. NaN
// propagates through both.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

// Constants that depend on the lane type.
template <typename E>
struct Float;
template <>
struct Float<float> {
    using Int = int32_t;
    using Unsigned = uint32_t;
    static constexpr int kMantissa = 23, kBias = 127;
    static constexpr float kLowest = -87.336544f, kHighest = 88.37f;  // range of exp
    static constexpr float kMagic = 0x1.8p23f;  // adding this number rounds to an integer
    static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
    // exp(r) = 1 + r + r^2 q(r) on |r| <= log(2) / 2; interpolated at Chebyshev nodes.
    static constexpr float kExp[] = {0x1p-1f, 0x1.5554dcp-3f, 0x1.555518p-5f, 0x1.120be2p-7f,
                                     0x1.6d117cp-10f};
    // log(1 + f) = f - f^2 / 2 + f^3 p(f) on [sqrt(1/2) - 1, sqrt(2) - 1], to 0.1 units. A division
    // would take longer than the terms that it saves.
    static constexpr float kLog[] = {0x1.555554p-2f,  -0x1.000228p-2f, 0x1.99a008p-3f,
                                     -0x1.547242p-3f, 0x1.22da28p-3f,  -0x1.0d856ep-3f,
                                     0x1.055b24p-3f,  -0x1.38b3dep-4f};
};
template <>
struct Float<double> {
    using Int = int64_t;
    using Unsigned = uint64_t;
    static constexpr int kMantissa = 52, kBias = 1023;
    static constexpr double kLowest = -708.3964185322641, kHighest = 709.4;
    static constexpr double kMagic = 0x1.8p52;
    static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
    // Taylor series: the next term is below 2^-58.
    static constexpr double kExp[] = {1.0 / 2,        1.0 / 6,         1.0 / 24,
                                      1.0 / 120,      1.0 / 720,       1.0 / 5040,
                                      1.0 / 40320,    1.0 / 362880,    1.0 / 3628800,
                                      1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    static constexpr int kLogTerms = 10;
};

template <typename V>
using Element = decltype(V{}[0] + V{}[0]);
template <typename V, typename E = Element<V>>
using Ints = VecN<typename Float<E>::Int, sizeof(V) / sizeof(E)>;
template <typename V, typename E = Element<V>>
using Words = VecN<typename Float<E>::Unsigned, sizeof(V) / sizeof(E)>;

template <typename V>
LX_INLINE V splat(Element<V> s) {
    return s - V{};
}
// Return the larger of a and b, or a if b is NaN.
template <typename V>
LX_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
    // GCC 12 compiles the line below to a comparison and a masked move.
    if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4)
        return (V)_mm512_max_ps((__m512)b, (__m512)a);
    else if constexpr (sizeof(V) == 64)
        return (V)_mm512_max_pd((__m512d)b, (__m512d)a);
#endif
    return b > a ? b : a;
}

// Return y 2^n, or 0 if x is below the logarithm of the smallest normal number. n is an integer,
// also held in the low bits of `shifted`.
template <typename V>
LX_INLINE V scale_exp(V x, V y, [[maybe_unused]] V n, [[maybe_unused]] V shifted) {
    using F = Float<Element<V>>;
    const V lowest = splat<V>(F::kLowest);
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
        if constexpr (sizeof(x[0]) == 4)
            return (V)_mm512_maskz_scalef_ps(
                _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ), (__m512)y, (__m512)n);
        else
            return (V)_mm512_maskz_scalef_pd(
                _mm512_cmp_pd_mask((__m512d)x, (__m512d)lowest, _CMP_NLT_UQ), (__m512d)y,
                (__m512d)n);
    }
#endif
    // n in [-126, 127] (double: [-1022, 1023]).
    const V scale = bit_cast<V>((bit_cast<Words<V>>(shifted) + F::kBias) << F::kMantissa);
    return x < lowest ? V{} : y * scale;
}

// kHigh: x may be large. Otherwise x must be NaN or small enough for a finite result.
template <bool kHigh = true, typename V>
LX_INLINE V exp(V x) {
    using E = Element<V>;
    using F = Float<E>;
    const V magic = splat<V>(F::kMagic);
    const V shifted = fma(x, splat<V>(E(1.4426950408889634074)), magic);
    const V n = shifted - magic;
    V r = fma(n, splat<V>(-F::kLn2High), x);
    r = fma(n, splat<V>(-F::kLn2Low), r);
    constexpr int kTerms = sizeof(F::kExp) / sizeof(E);
    V q = splat<V>(F::kExp[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) q = fma(q, r, splat<V>(F::kExp[i]));
    const V y = fma(q, r * r, r) + 1;
    const V out = scale_exp(x, y, n, shifted);
    if constexpr (!kHigh) return out;
    return x > splat<V>(F::kHighest) ? splat<V>(E(__builtin_inf())) : out;
}

// exp(x - shift), x <= shift, for a sum of such terms, with fewer operations than exp. It is exact
// at 0, else within 2 + shift - x units in the last place. The result for a term below e^-86 (0 for
// x = -inf) may be any number below 1e-37, which does not change a sum whose largest term is 1.
template <typename V>
LX_INLINE V exp_below(V x, V shift) {
    if constexpr (sizeof(x[0]) == 8) {
        return exp<false>(x - shift);
    } else {
        // Compute 2^t with t = n + r. The polynomial is the minimax polynomial of its degree.
        const V t = max((x - shift) * 1.44269504f, splat<V>(-124.0f));
        const auto power = [](V r) __attribute__((always_inline)) {
            V q = splat<V>(0x1.5bba12p-10f);
            q = fma(q, r, splat<V>(0x1.3cea8ap-7f));
            q = fma(q, r, splat<V>(0x1.c6b752p-5f));
            q = fma(q, r, splat<V>(0x1.ebf9bcp-3f));
            q = fma(q, r, splat<V>(0x1.62e42ap-1f));
            return fma(q, r, splat<V>(1));
        };
#if defined(__AVX512F__)
        if constexpr (sizeof(V) == 64) {
            const V n = (V)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
            return (V)_mm512_scalef_ps((__m512)power(t - n), (__m512)n);
        }
#endif
        using F = Float<float>;
        const V shifted = t + F::kMagic, n = shifted - F::kMagic;
        return power(t - n) * bit_cast<V>((bit_cast<Words<V>>(shifted) + F::kBias) << F::kMantissa);
    }
}

template <typename V>
LX_INLINE V log(V x) {
    using E = Element<V>;
    using F = Float<E>;
    using I = Ints<V>;
    constexpr E kNormal = sizeof(E) == 4 ? E(0x1p-126) : E(0x1p-1022);
    const V normal = x < splat<V>(kNormal) ? x * E(0x1p54) : x;
    // x = 2^n m, m in [sqrt(1/2), sqrt(2)).
    const I root = bit_cast<I>(splat<V>(E(0.70710678118654752)));
    const I i = bit_cast<I>(normal) - root;
    const V m = bit_cast<V>((i & ((typename F::Int{1} << F::kMantissa) - 1)) + root);
    V n = __builtin_convertvector(i >> F::kMantissa, V);
    n = x < splat<V>(kNormal) ? n - 54 : n;
    const V f = m - 1;
    V low;
    if constexpr (sizeof(E) == 4) {
        constexpr int kTerms = sizeof(F::kLog) / sizeof(E);
        const V z = f * f;
        V p = splat<V>(F::kLog[kTerms - 1]);
        for (int i = kTerms - 2; i >= 0; --i) p = fma(p, f, splat<V>(F::kLog[i]));
        low = fma(n, splat<V>(F::kLn2Low), fma(z, splat<V>(E(-0.5)), f * z * p));
    } else {
        // log(m) = 2 atanh(s), s = f / (2 + f), = f - s (f - z R(z)) with z = s^2.
        const V s = f / (f + 2), z = s * s;
        V tail = splat<V>(E(2.0 / (2 * F::kLogTerms + 1)));
        for (int k = F::kLogTerms - 1; k >= 1; --k)
            tail = fma(tail, z, splat<V>(E(2.0 / (2 * k + 1))));
        low = fma(n, splat<V>(F::kLn2Low), -(s * (f - z * tail)));
    }
    V out = fma(n, splat<V>(F::kLn2High), f + low);
    out = x == V{} ? splat<V>(E(-__builtin_inf())) : out;
    out = x < V{} ? splat<V>(E(__builtin_nan(""))) : out;
    // Infinity and NaN are returned unchanged.
    return x < splat<V>(E(__builtin_inf())) ? out : x;
}

// Folds all lanes by combining halves repeatedly, in one order per instruction set.
template <typename V, typename F>
LX_INLINE Element<V> fold_lanes(V v, F&& f) {
    constexpr int kCount = sizeof(V) / sizeof(Element<V>);
    if constexpr (kCount == 1) {
        return v[0];
    } else {
        using H = VecN<Element<V>, kCount / 2>;
        struct {
            H low, high;
        } halves;
        __builtin_memcpy(&halves, &v, sizeof(v));
        return fold_lanes(f(halves.low, halves.high), f);
    }
}
template <typename V>
LX_INLINE Element<V> max_lane(V v) {
    return fold_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return max(a, b); });
}
template <typename V>
LX_INLINE Element<V> lane_sum(V v) {
    return fold_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

}  // namespace
}  // namespace lora_ext::LX_ISA
