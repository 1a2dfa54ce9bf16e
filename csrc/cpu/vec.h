// Vectors of kVecBytes for one instruction set, with GCC's vector extensions (clang has them too).
//
// Everything is in an unnamed namespace inside LX_ISA: nothing here may get a symbol that the
// linker could merge with the same function built for another instruction set. For the same reason
// no header of the C++ library is used.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Only tests set LX_VEC_BYTES, to run the 64-byte source on a machine with 32-byte vectors.
#ifndef LX_VEC_BYTES
#if defined(__AVX512F__)
#define LX_VEC_BYTES 64
#elif defined(__AVX2__)
#define LX_VEC_BYTES 32
#else
#define LX_VEC_BYTES 16
#endif
#endif

// Name of the instruction set, as stored in the tables.
#define LX_STRING_(x) #x
#define LX_STRING(x) LX_STRING_(x)
#define LX_ISA_NAME LX_STRING(LX_ISA)

namespace lora_ext::LX_ISA {
namespace {

#define LX_INLINE inline __attribute__((always_inline))

template <int kValue>
struct Int {
    static constexpr int value = kValue;
};
// Calls f(Int<n>) for n in [1, kMax].
template <int kMax, typename F>
LX_INLINE void with_constant(int64_t n, F&& f) {
    if constexpr (kMax == 1)
        f(Int<1>{});
    else if (n == kMax)
        f(Int<kMax>{});
    else
        with_constant<kMax - 1>(n, f);
}
LX_INLINE int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
LX_INLINE int64_t blocks_of(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

template <typename T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename E, int kCount>
struct VecOf {
    typedef E type __attribute__((vector_size(sizeof(E) * kCount)));
};
template <typename E, int kCount>
using VecN = typename VecOf<E, kCount>::type;

// Lanes and vector of the type in which T is computed: float, or double for double.
template <typename T>
constexpr int kLanes = LX_VEC_BYTES / sizeof(Acc<T>);
template <typename T>
using Vec = VecN<Acc<T>, kLanes<T>>;
constexpr int kF = LX_VEC_BYTES / 4;
template <typename T>
LX_INLINE int64_t whole_vectors(int64_t n) {
    return blocks_of(n, kLanes<T>) * kLanes<T>;
}

template <typename To, typename From>
LX_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}
template <typename V>
LX_INLINE V load_bits(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
template <typename V>
LX_INLINE V select(VecN<int32_t, sizeof(V) / 4> mask, V yes, V no) {
    using M = decltype(mask);
    return bit_cast<V>((mask & bit_cast<M>(yes)) | (~mask & bit_cast<M>(no)));
}

// ------------------------------------------------------------------------------------------------
// Explicit fused multiply-add with one rounding, if the hardware has it. If the compiler decided
// about contraction, it could fuse in one loop and not in another, and the bits of a row would
// depend on the loop that computes it.
template <typename V>
LX_INLINE V fma(V a, V b, V c) {
#if defined(__FMA__)
    constexpr bool kFloat = sizeof(a[0]) == 4;
    if constexpr (sizeof(V) == 32) {
        if constexpr (kFloat)
            return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
        else
            return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
    } else {
        static_assert(sizeof(V) == 64);
#if defined(__AVX512F__)
        if constexpr (kFloat)
            return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
        else
            return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
        struct Pair {
            VecN<float, 8> lo, hi;
        };
        using H = VecN<Acc<decltype(a[0] + a[0])>, 32 / sizeof(a[0])>;
        const Pair pa = bit_cast<Pair>(a), pb = bit_cast<Pair>(b), pc = bit_cast<Pair>(c);
        const Pair r = {(VecN<float, 8>)fma((H)pa.lo, (H)pb.lo, (H)pc.lo),
                        (VecN<float, 8>)fma((H)pa.hi, (H)pb.hi, (H)pc.hi)};
        return bit_cast<V>(r);
#endif
    }
#else
    return a * b + c;
#endif
}

// Products of bfloat16 pairs added to float lanes, if the hardware has them: lane l gains a[2l]
// b[2l] + a[2l+1] b[2l+1]. An instruction does twice as much work as with widened numbers.
// Subnormals count as zero.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<BFloat> = true;
typedef __m512bh Pairs;
LX_INLINE Vec<float> dot_pairs(Pairs a, Pairs b, Vec<float> acc) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, a, b);
}
#else
template <typename T>
constexpr bool kPairs = false;
struct Pairs {};
template <typename V>
LX_INLINE V dot_pairs(Pairs, Pairs, V acc) {
    return acc;
}
#endif

// ------------------------------------------------------------------------------------------------
// Loads widen to the accumulation type; stores round to nearest even, once.
LX_INLINE Vec<float> load(const float* p) {
    return load_bits<Vec<float>>(p);
}
LX_INLINE Vec<double> load(const double* p) {
    return load_bits<Vec<double>>(p);
}

template <int kCount = kF>
LX_INLINE VecN<float, kCount> widen_bfloat(VecN<uint16_t, kCount> bits) {
    using U = VecN<uint32_t, kCount>;
    using F = VecN<float, kCount>;
#if defined(__AVX2__)
    // GCC 12 splits a __builtin_convertvector of these types into more instructions: measured 1.7
    // times slower in shrink.
    if constexpr (kCount == 8)
        return bit_cast<F>((U)_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)) << 16);
#if defined(__AVX512F__)
    if constexpr (kCount == 16)
        return bit_cast<F>((U)_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)) << 16);
#endif
#endif
    return bit_cast<F>(__builtin_convertvector(bits, U) << 16);
}
template <int kCount = kF>
LX_INLINE VecN<float, kCount> widen_half(VecN<uint16_t, kCount> bits) {
#if defined(__F16C__)
    if constexpr (kCount == 8) return (VecN<float, 8>)_mm256_cvtph_ps((__m128i)bits);
#if defined(__AVX512F__)
    if constexpr (kCount == 16) return (VecN<float, 16>)_mm512_cvtph_ps((__m256i)bits);
#endif
#endif
    // Exponent and mantissa, shifted into place, represent a value 2^112 times too small. The
    // product with 2^112 is right for subnormals too.
    using F = VecN<float, kCount>;
    using U = VecN<uint32_t, kCount>;
    const U wide = __builtin_convertvector(bits, U), magnitude = wide & 0x7fffu;
    U u = bit_cast<U>(bit_cast<F>(magnitude << 13) * 0x1p112f);
    u |= (U)(magnitude >= 0x7c00u) & 0x7f800000u;
    return bit_cast<F>(u | (wide & 0x8000u) << 16);
}
LX_INLINE Vec<float> load(const BFloat* p) {
    return widen_bfloat(load_bits<VecN<uint16_t, kF>>(p));
}
LX_INLINE Vec<float> load(const Half* p) {
    return widen_half(load_bits<VecN<uint16_t, kF>>(p));
}

LX_INLINE void store(float* p, Vec<float> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}
LX_INLINE void store(double* p, Vec<double> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}
LX_INLINE void store(BFloat* p, Vec<float> v) {
    using U = VecN<uint32_t, kF>;
    const U u = bit_cast<U>(v);
    const U rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    const U nan = U{} + 0x7fc0u;
    const U wide = select<U>(v != v, nan, rounded);
#if defined(__AVX2__) && LX_VEC_BYTES == 32
    const __m256i packed = _mm256_packus_epi32((__m256i)wide, (__m256i)wide);
    const __m128i bits = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    const auto bits = __builtin_convertvector(wide, VecN<uint16_t, kF>);
#endif
    __builtin_memcpy(p, &bits, sizeof(bits));
}
LX_INLINE void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    struct Parts {
        __m256 part[LX_VEC_BYTES / 32];
    };
    struct {
        __m128i part[LX_VEC_BYTES / 32];
    } bits;
    const Parts parts = bit_cast<Parts>(v);
    for (int i = 0; i < LX_VEC_BYTES / 32; ++i)
        bits.part[i] = _mm256_cvtps_ph(parts.part[i], _MM_FROUND_TO_NEAREST_INT);
#else
    using U = VecN<uint32_t, kF>;
    using F = Vec<float>;
    const U u = bit_cast<U>(v), magnitude = u & 0x7fffffffu;
    const U normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
    // Below 2^-14 the addition rounds: the last place of 0.5 is 2^-24, fp16's subnormal step.
    const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    U h = select<U>(magnitude < 0x38800000u, subnormal, normal);
    h = select<U>(magnitude >= 0x477ff000u, U{} + 0x7c00u, h);
    h = select<U>(magnitude > 0x7f800000u, U{} + 0x7e00u, h);
    const auto bits = __builtin_convertvector(h | (u >> 16 & 0x8000u), VecN<uint16_t, kF>);
#endif
    __builtin_memcpy(p, &bits, sizeof(bits));
}

// Loads and stores of the first n lanes, 0 <= n <= kLanes. The other lanes of a load are zero; a
// store leaves the memory of the other lanes unchanged.
#if defined(__AVX512F__) && LX_VEC_BYTES == 64
LX_INLINE __mmask16 first_lanes(int64_t n) {
    return static_cast<__mmask16>((1u << n) - 1);
}
LX_INLINE Vec<double> load_n(const double* p, int64_t n) {
    return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
}
LX_INLINE Vec<float> load_n(const float* p, int64_t n) {
    return (Vec<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <typename T>
LX_INLINE Vec<T> load_n(const T* p, int64_t n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return load(reinterpret_cast<const T*>(&bits));
}
LX_INLINE void store_n(double* p, Vec<double> v, int64_t n) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), (__m512d)v);
}
LX_INLINE void store_n(float* p, Vec<float> v, int64_t n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
template <typename T>
LX_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
    T lanes[kLanes<T>];
    store(lanes, v);
    _mm256_mask_storeu_epi16(p, first_lanes(n), load_bits<__m256i>(lanes));
}
#else
template <typename T>
inline Vec<T> load_n(const T* p, int64_t n) {
    T lanes[kLanes<T>] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
template <typename T>
inline void store_n(T* p, Vec<T> v, int64_t n) {
    T lanes[kLanes<T>];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif

// Stores n numbers, each rounded once.
template <typename T>
LX_INLINE void store_rounded(T* to, const Acc<T>* from, int64_t n) {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + L <= n; i += L) store(to + i, load_bits<Vec<T>>(from + i));
    if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

template <typename T>
LX_INLINE Vec<T> broadcast(Acc<T> s) {
    return s - Vec<T>{};
}

// ------------------------------------------------------------------------------------------------
// Lane sums of four vectors in one fixed tree: halves down to four lanes, then (0+2) + (1+3).
template <typename T>
LX_INLINE void sum_lanes(const Vec<T>* v, Acc<T>* sums) {
    if constexpr (sizeof(Acc<T>) == 8) {
        for (int i = 0; i < 4; ++i) {
            double lane[kLanes<T>];
            __builtin_memcpy(lane, &v[i], sizeof(lane));
            for (int width = kLanes<T> / 2; width > 0; width /= 2)
                for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
            sums[i] = lane[0];
        }
    } else {
        using V4 = VecN<float, 4>;
        V4 s[4];
        for (int i = 0; i < 4; ++i) {
            V4 part[kF / 4];
            __builtin_memcpy(part, &v[i], sizeof(part));
            for (int width = kF / 8; width > 0; width /= 2)
                for (int l = 0; l < width; ++l) part[l] += part[l + width];
            s[i] = part[0];
        }
        const V4 even = __builtin_shufflevector(s[0], s[1], 0, 4, 1, 5) +
                        __builtin_shufflevector(s[0], s[1], 2, 6, 3, 7);
        const V4 odd = __builtin_shufflevector(s[2], s[3], 0, 4, 1, 5) +
                       __builtin_shufflevector(s[2], s[3], 2, 6, 3, 7);
        const V4 total = __builtin_shufflevector(even, odd, 0, 1, 4, 5) +
                         __builtin_shufflevector(even, odd, 2, 3, 6, 7);
        __builtin_memcpy(sums, &total, sizeof(total));
    }
}

}  // namespace
}  // namespace lora_ext::LX_ISA
