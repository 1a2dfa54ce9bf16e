// Functions of one number, in whole vectors only. The last numbers of a range are copied into a
// separate vector and computed with the same instructions.
#include "lora_ext/pointwise.h"

#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

using V = Vec<float>;
using D = Vec<double>;
constexpr int kHalf = kF / 2;

LX_INLINE V magnitude(V x) {
    return bit_cast<V>(bit_cast<Words<V>>(x) & 0x7fffffffu);
}
// Return the magnitude of y with the sign of x.
LX_INLINE V with_sign_of(V x, V y) {
    return bit_cast<V>(bit_cast<Words<V>>(magnitude(y)) | (bit_cast<Words<V>>(x) & 0x80000000u));
}

// exp(-u) - 1 for u >= 0. Below log(2) / 2 the polynomial of exp without its constant term 1 keeps
// the digits that the difference would lose.
LX_INLINE V expm1_of_negative(V u) {
    const V r = -u;
    constexpr int kTerms = sizeof(Float<float>::kExp) / sizeof(float);
    V q = splat<V>(Float<float>::kExp[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) q = fma(q, r, splat<V>(Float<float>::kExp[i]));
    const V small = fma(q, r * r, r), large = exp(r) - 1;
    return u < splat<V>(0.34657359f) ? small : large;
}

// Return the probability that a standard normal variable is below -t, t >= 0: exp(-t^2 / 2) s P(s)
// with s = 1 / (1 + 0.35 t). The polynomial P is interpolated at Chebyshev nodes for t up to 14.5,
// and accurate to 4e-8.
LX_INLINE V normal_tail(V t) {
    constexpr float kTail[] = {0x1.1df06p-3f,   0x1.1e8b68p-3f,  0x1.e92a4ap-4f,
                               0x1.b72474p-4f,  -0x1.bfa466p-6f, 0x1.52f6fep-3f,
                               -0x1.0baf34p-2f, 0x1.2c9d16p-3f,  -0x1.e7223p-6f};
    const V s = 1 / fma(splat<V>(0.35f), t, splat<V>(1));
    V p = splat<V>(kTail[8]);
    for (int i = 7; i >= 0; --i) p = fma(p, s, splat<V>(kTail[i]));
    const V square = t * t;
    return p * s * exp(square * -0.5f);
}

// Cosine, or sine, in double: x = n pi / 2 + r with |r| <= pi / 4, then a Taylor series.
template <bool kSine>
LX_INLINE VecN<double, kHalf> circular(VecN<double, kHalf> x) {
    using W = VecN<uint64_t, kHalf>;
    const D shifted = fma(x, splat<D>(0.63661977236758134308), splat<D>(Float<double>::kMagic));
    const D n = shifted - Float<double>::kMagic;
    D r = fma(n, splat<D>(-0x1.921fb544p+0), x);  // pi / 2 in two parts
    r = fma(n, splat<D>(-0x1.0b4611a626331p-34), r);
    const D z = r * r;
    constexpr double kSin[] = {1, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800};
    constexpr double kCos[] = {1,           -1.0 / 2,       1.0 / 24,       -1.0 / 720,
                               1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600};
    D odd = splat<D>(kSin[5]), even = splat<D>(kCos[6]);
    for (int i = 4; i >= 0; --i) odd = fma(odd, z, splat<D>(kSin[i]));
    for (int i = 5; i >= 0; --i) even = fma(even, z, splat<D>(kCos[i]));
    odd = odd * r;
    // The low bits of `shifted` contain the quadrant. A sine is a cosine shifted by one quadrant.
    const W quarter = bit_cast<W>(shifted) + (kSine ? 3 : 0);
    const D y = (quarter & 1) != 0 ? odd : even;
    const W sign = ((quarter + 1) & 2) << 62;
    return bit_cast<D>(bit_cast<W>(y) ^ sign);
}
template <bool kSine>
LX_INLINE V circular(V x) {
    struct {
        VecN<float, kHalf> low, high;
    } halves;
    __builtin_memcpy(&halves, &x, sizeof(x));
    halves.low = __builtin_convertvector(circular<kSine>(__builtin_convertvector(halves.low, D)),
                                         VecN<float, kHalf>);
    halves.high = __builtin_convertvector(circular<kSine>(__builtin_convertvector(halves.high, D)),
                                          VecN<float, kHalf>);
    V y;
    __builtin_memcpy(&y, &halves, sizeof(y));
    return magnitude(x) <= splat<V>(0x1p24f) ? y : splat<V>(__builtin_nanf(""));
}

template <Pointwise kFunction>
LX_INLINE V value(V x) {
    if constexpr (kFunction == Pointwise::kCos) return circular<false>(x);
    if constexpr (kFunction == Pointwise::kSin) return circular<true>(x);
    if constexpr (kFunction == Pointwise::kGelu) {
        const V tail = normal_tail(magnitude(x));
        return x * (x > V{} ? 1 - tail : tail);
    }
    if constexpr (kFunction == Pointwise::kGeluTanh) {
        constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
        const V inner = fma(x * x, splat<V>(0.044715f), splat<V>(1)) * x;
        return x / (exp(inner * -kTwice) + 1);
    }
    if constexpr (kFunction == Pointwise::kRsqrt) {
        for (int i = 0; i < kF; ++i) x[i] = __builtin_sqrtf(x[i]);
        return 1 / x;
    }
    if constexpr (kFunction == Pointwise::kSigmoid) return 1 / (exp(-x) + 1);
    if constexpr (kFunction == Pointwise::kSilu) return x / (exp(-x) + 1);
    if constexpr (kFunction == Pointwise::kSoftplus) {
        // log(1 + e) loses the rounding error of 1 + e; the quotient restores it.
        const V e = exp(-magnitude(x)), sum = e + 1, lost = e - (sum - 1);
        return (x < V{} ? V{} : x) + (log(sum) + lost / sum);
    }
    if constexpr (kFunction == Pointwise::kTanh) {
        const V less = expm1_of_negative(magnitude(x) * 2.0f);
        return with_sign_of(x, -less / (less + 2));
    }
}

// Not inlined, and called with counts that the compiler cannot see, so that every vector is
// computed by the same code.
template <typename T, Pointwise kFunction>
__attribute__((noinline)) void vectors(const T* x, T* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store(y + i * kF, value<kFunction>(load(x + i * kF)));
}

template <typename T, Pointwise kFunction>
void range(const PointwiseArgs& args, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(args.x) + begin;
    T* y = static_cast<T*>(args.y) + begin;
    const int64_t whole = (end - begin) / kF, rest = (end - begin) % kF;
    vectors<T, kFunction>(x, y, whole);
    T lanes[kF] = {};
    for (int64_t i = 0; i < rest; ++i) lanes[i] = x[whole * kF + i];
    vectors<T, kFunction>(lanes, lanes, blocks_of(rest, kF));
    for (int64_t i = 0; i < rest; ++i) y[whole * kF + i] = lanes[i];
}

template <typename T>
void by_function(const PointwiseArgs& args, int64_t begin, int64_t end) {
    switch (args.function) {
#define LX_CASE(f)     \
    case Pointwise::f: \
        return range<T, Pointwise::f>(args, begin, end);
        LX_CASE(kCos)
        LX_CASE(kSin)
        LX_CASE(kGelu)
        LX_CASE(kGeluTanh)
        LX_CASE(kRsqrt)
        LX_CASE(kSigmoid)
        LX_CASE(kSilu)
        LX_CASE(kSoftplus)
        LX_CASE(kTanh)
#undef LX_CASE
    }
}

void apply(const PointwiseArgs& args, int64_t begin, int64_t end) {
    args.dtype == DType::kFloat32 ? by_function<float>(args, begin, end)
                                  : by_function<BFloat>(args, begin, end);
}

}  // namespace

extern const PointwiseCpu pointwise_table;
const PointwiseCpu pointwise_table = {apply};

}  // namespace lora_ext::LX_ISA
