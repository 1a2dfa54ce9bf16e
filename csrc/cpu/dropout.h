// Dropout masks by Philox4x32-10: bit c of a 64-bit word is set if column c of 64 is kept.
// lora_train.h defines the key, the counter and the threshold.
#pragma once

#include "lora_ext/lora_train.h"

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int64_t kMaskColumns = 64;

// Dropout key of some rows of one adapter.
struct DropoutKey {
    uint32_t low = 0, high = 0, column, threshold;
    const int32_t* rows;  // row numbers in the batch; nullptr: row i is number first + i
    int64_t first;

    // `first`: the position of rows[0] among the adapter's rows.
    DropoutKey(const LoraDropout& d, int64_t slot, const int32_t* rows, int64_t first)
        : column(d.column),
          threshold(d.threshold),
          rows(d.per_adapter ? nullptr : rows),
          first(first) {
        if (threshold == 0) return;
        const uint64_t seed = static_cast<uint64_t>(d.seed[d.per_adapter ? slot : 0]);
        low = static_cast<uint32_t>(seed);
        high = static_cast<uint32_t>(seed >> 32);
    }
    bool drops() const { return threshold != 0; }
    uint32_t row(int64_t i) const { return static_cast<uint32_t>(rows ? rows[i] : first + i); }
};

// 1 / (1 - p) in the precision that T is computed in.
template <typename T>
LX_INLINE Acc<T> inverse_keep(const LoraDropout& d) {
    if constexpr (sizeof(Acc<T>) == 8)
        return d.inverse_keep_f64;
    else
        return d.inverse_keep;
}

// Each lane holds a counter word in its low half. Multiplications ignore the upper half.
constexpr int kCounters = kF / 2;
using Words = VecN<uint64_t, kCounters>;

LX_INLINE Words multiply_low(Words c, uint32_t m) {
#if defined(__AVX512F__)
    return (Words)_mm512_mul_epu32((__m512i)c, _mm512_set1_epi64(m));
#elif defined(__AVX2__) && LX_VEC_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)c, _mm256_set1_epi64x(m));
#else
    return (c & 0xffffffffu) * m;
#endif
}

// Return a mask: bit l is set if the low word of lane l is at or above the threshold.
LX_INLINE uint64_t lanes_at_least(Words words, uint32_t threshold) {
    const auto at_least = (words & 0xffffffffu) >= threshold;
#if defined(__AVX512F__)
    return _mm512_movepi64_mask((__m512i)at_least);
#elif defined(__AVX2__) && LX_VEC_BYTES == 32
    return _mm256_movemask_pd((__m256d)at_least);
#else
    uint64_t bits = 0;
    for (int l = 0; l < kCounters; ++l) bits |= (at_least[l] & 1u) << l;
    return bits;
#endif
}

// Moves bit l of a 16-bit number to bit 4l.
LX_INLINE uint64_t spread(uint64_t bits) {
    bits = (bits | bits << 24) & 0x000000ff000000ffu;
    bits = (bits | bits << 12) & 0x000f000f000f000fu;
    bits = (bits | bits << 6) & 0x0303030303030303u;
    return (bits | bits << 3) & 0x1111111111111111u;
}

// Return the mask of the columns [column, column + 64); column is a multiple of four.
inline uint64_t keep_bits(const DropoutKey& key, uint32_t row, int64_t column) {
    constexpr int kChains = kCounters < 8 ? 2 : 1;  // independent, to hide latency
    uint64_t kept[4] = {};
    for (int done = 0; done < 16; done += kChains * kCounters) {
        Words c0[kChains], c1[kChains], c2[kChains], c3[kChains] = {};
        for (int i = 0; i < kChains; ++i) {
            c0[i] = Words{} + row;
            c2[i] = Words{} + key.column;
            uint64_t quads[kCounters];
            for (int l = 0; l < kCounters; ++l) quads[l] = column / 4 + done + i * kCounters + l;
            c1[i] = load_bits<Words>(quads);
        }
        uint32_t k0 = key.low, k1 = key.high;
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            for (int i = 0; i < kChains; ++i) {
                const Words p0 = multiply_low(c0[i], 0xD2511F53u);
                const Words p1 = multiply_low(c2[i], 0xCD9E8D57u);
                c0[i] = p1 >> 32 ^ c1[i] ^ k0;
                c1[i] = p1;
                c2[i] = p0 >> 32 ^ c3[i] ^ k1;
                c3[i] = p0;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < kChains; ++i) {
            const int at = done + i * kCounters;
            kept[0] |= lanes_at_least(c0[i], key.threshold) << at;
            kept[1] |= lanes_at_least(c1[i], key.threshold) << at;
            kept[2] |= lanes_at_least(c2[i], key.threshold) << at;
            kept[3] |= lanes_at_least(c3[i], key.threshold) << at;
        }
    }
    return spread(kept[0]) | spread(kept[1]) << 1 | spread(kept[2]) << 2 | spread(kept[3]) << 3;
}

// Keeps lanes whose bit is set and zeroes the others, including NaN.
template <typename T>
LX_INLINE Vec<T> keep_lanes(Vec<T> v, uint64_t bits) {
    using Lanes = decltype(v == v);
    using Lane = decltype(Lanes{}[0] + 0);
    Lanes bit;
    for (int l = 0; l < kLanes<T>; ++l) bit[l] = Lane{1} << l;
    const Lanes mask = ((Lanes{} + static_cast<Lane>(bits & 0xffff)) & bit) != 0;
    return bit_cast<Vec<T>>(bit_cast<Lanes>(v) & mask);
}

}  // namespace
}  // namespace lora_ext::LX_ISA
