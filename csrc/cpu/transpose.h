// Transposes blocks in registers: square ones, with as many rows as a vector has lanes, and ones of
// eight ranks x one vector of outputs. Compiled per instruction set like vec.h.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct LanesBelow : LanesBelow<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesBelow<0, kLane...> {
    using type = LaneList<kLane...>;
};

// Exchanges the lanes of two rows whose indices differ in bit kBit, one step of a transposition.
template <int kBit, typename V, int... kLane>
LX_INLINE void exchange(V& low, V& high, LaneList<kLane...>) {
    constexpr int L = sizeof...(kLane);
    const V first =
        __builtin_shufflevector(low, high, (kLane & kBit ? (kLane ^ kBit) + L : kLane)...);
    high = __builtin_shufflevector(low, high, (kLane & kBit ? kLane + L : kLane ^ kBit)...);
    low = first;
}
template <int kBit, typename A>
LX_INLINE void exchange_rows(Vec<A> (&r)[kLanes<A>]) {
    constexpr int L = kLanes<A>;
    if constexpr (kBit < L) {
        for (int i = 0; i < L; ++i)
            if (!(i & kBit)) exchange<kBit>(r[i], r[i | kBit], typename LanesBelow<L>::type{});
        exchange_rows<2 * kBit, A>(r);
    }
}
// to[j][i] = from[i][j]; both strides count numbers.
template <typename A>
LX_INLINE void transpose(const A* from, int64_t from_row, A* to, int64_t to_row) {
    constexpr int L = kLanes<A>;
    Vec<A> r[L];
    for (int i = 0; i < L; ++i) r[i] = load(from + i * from_row);
    exchange_rows<1, A>(r);
    for (int i = 0; i < L; ++i) store(to + i * to_row, r[i]);
}

// ------------------------------------------------------------------------------------------------
// Interleaves the lower or the upper halves of every 128 bits of two vectors.
template <int kUpper, typename V, int... kLane>
LX_INLINE V interleave(V a, V b, LaneList<kLane...>) {
    constexpr int L = sizeof...(kLane), kPer = 16 * L / sizeof(V);
    return __builtin_shufflevector(
        a, b, (kLane / kPer * kPer + (kUpper * kPer + kLane % kPer) / 2 + (kLane % 2 ? L : 0))...);
}
// 4x4 transposes in every 128 bits of four vectors: of lanes in pairs, then of pairs of lanes.
template <typename V>
LX_INLINE void transpose_quads(const V* r, V* out) {
    using Pairs = VecN<uint64_t, sizeof(V) / 8>;
    constexpr typename LanesBelow<sizeof(V) / 4>::type lanes{};
    constexpr typename LanesBelow<sizeof(V) / 8>::type pairs{};
    const auto finish = [&](V first, V second, V* to) __attribute__((always_inline)) {
        const auto a = bit_cast<Pairs>(first), b = bit_cast<Pairs>(second);
        to[0] = bit_cast<V>(interleave<0>(a, b, pairs));
        to[1] = bit_cast<V>(interleave<1>(a, b, pairs));
    };
    finish(interleave<0>(r[0], r[1], lanes), interleave<0>(r[2], r[3], lanes), out);
    finish(interleave<1>(r[0], r[1], lanes), interleave<1>(r[2], r[3], lanes), out + 2);
}

// out[j][o] = b[o * stride + j]: eight ranks of one vector of outputs, transposed. Reads num_out
// rows and num_ranks of their eight ranks; the other entries are zero.
template <typename T>
inline void load_transposed_part(const T* b, int64_t stride, int64_t num_out, int num_ranks,
                                 Vec<T>* out) {
    T part[8][kLanes<T>] = {};
    for (int64_t o = 0; o < num_out; ++o)
        for (int j = 0; j < num_ranks; ++j) part[j][o] = b[o * stride + j];
    for (int j = 0; j < 8; ++j) out[j] = load(part[j]);
}

#if defined(__AVX2__)
// Loads the two halves of a vector separately: cheaper than shuffles across the halves.
LX_INLINE VecN<float, 8> load_half_rows(const float* low, const float* high) {
    return (VecN<float, 8>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)),
                                                _mm_loadu_ps(high), 1);
}
LX_INLINE VecN<float, 8> load_half_rows(const Half* low, const Half* high) {
    const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)low),
                                            _mm_loadl_epi64((const __m128i*)high));
    return (VecN<float, 8>)_mm256_cvtph_ps(both);
}
template <typename T>
LX_INLINE void transpose8(const T* b, int64_t stride, VecN<float, 8>* out) {
    VecN<float, 8> rows[4];
    for (int q = 0; q < 8; q += 4) {
        for (int i = 0; i < 4; ++i)
            rows[i] = load_half_rows(b + i * stride + q, b + (i + 4) * stride + q);
        transpose_quads(rows, out + q);
    }
}
// Two ranks make a 32-bit word: transpose words, then split them.
LX_INLINE void transpose8(const BFloat* b, int64_t stride, VecN<float, 8>* out) {
    using U = VecN<uint32_t, 8>;
    U rows[4], pairs[4];
    for (int i = 0; i < 4; ++i)
        rows[i] = (U)_mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(b + i * stride))),
            _mm_loadu_si128((const __m128i*)(b + (i + 4) * stride)), 1);
    transpose_quads(rows, pairs);
    for (int p = 0; p < 4; ++p) {
        out[2 * p] = bit_cast<VecN<float, 8>>(pairs[p] << 16);
        out[2 * p + 1] = bit_cast<VecN<float, 8>>(pairs[p] & 0xffff0000u);
    }
}
#endif

template <typename T>
LX_INLINE void load_transposed(const T* b, int64_t stride, Vec<T>* out) {
#if defined(__AVX2__)
    if constexpr (sizeof(Acc<T>) == 4) {
        if constexpr (kF == 8) {
            transpose8(b, stride, out);
        } else {
            VecN<float, 8> low[8], high[8];
            transpose8(b, stride, low);
            transpose8(b + 8 * stride, stride, high);
            for (int j = 0; j < 8; ++j)
                out[j] = __builtin_shufflevector(low[j], high[j], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                 11, 12, 13, 14, 15);
        }
        return;
    }
#endif
    load_transposed_part(b, stride, kLanes<T>, 8, out);
}

}  // namespace
}  // namespace lora_ext::LX_ISA
