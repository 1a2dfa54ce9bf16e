// Dropout masks by Philox4x32-10, a vector of counters at a time: bit c of a row's mask says
// whether column c is kept. lora_train.h has the key, the counter and the threshold.
#pragma once

#include "lora_ext/lora_train.h"

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kMaskColumns = 4 * kF;  // of one call: a vector of counters, four words each

struct DropoutKey {
    uint32_t low, high, threshold;

    explicit DropoutKey(const LoraDropout& d) : low(0), high(0), threshold(d.threshold) {
        if (threshold == 0) return;
        low = static_cast<uint32_t>(*d.seed);
        high = static_cast<uint32_t>(static_cast<uint64_t>(*d.seed) >> 32);
    }
    bool drops() const { return threshold != 0; }
};

using Words = VecN<uint32_t, kF>;

LX_INLINE void multiply(uint32_t m, Words c, Words& high, Words& low) {
    using Wide = VecN<uint64_t, kF / 2>;
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32(m);
    const Wide even = (Wide)_mm512_mul_epu32((__m512i)c, factor);
    const Wide odd = (Wide)_mm512_mul_epu32(_mm512_srli_epi64((__m512i)c, 32), factor);
#elif defined(__AVX2__) && LX_VEC_BYTES == 32
    const __m256i factor = _mm256_set1_epi32(m);
    const Wide even = (Wide)_mm256_mul_epu32((__m256i)c, factor);
    const Wide odd = (Wide)_mm256_mul_epu32(_mm256_srli_epi64((__m256i)c, 32), factor);
#else
    const Wide even = (bit_cast<Wide>(c) & 0xffffffffu) * m, odd = (bit_cast<Wide>(c) >> 32) * m;
#endif
    const Wide upper = Wide{} + 0xffffffff00000000u;
    low = bit_cast<Words>((even & ~upper) | odd << 32);
    high = bit_cast<Words>(even >> 32 | (odd & upper));
}

// Bit l: lane l of `word` is at or above the threshold.
LX_INLINE uint32_t lanes_at_least(Words word, uint32_t threshold) {
    const auto at_least = word >= threshold;
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)at_least);
#elif defined(__AVX2__) && LX_VEC_BYTES == 32
    return _mm256_movemask_ps((__m256)at_least);
#else
    uint32_t bits = 0;
    for (int l = 0; l < kF; ++l) bits |= (at_least[l] & 1u) << l;
    return bits;
#endif
}

// Bit l of a 16-bit number to bit 4l.
LX_INLINE uint64_t spread(uint64_t bits) {
    bits = (bits | bits << 24) & 0x000000ff000000ffu;
    bits = (bits | bits << 12) & 0x000f000f000f000fu;
    bits = (bits | bits << 6) & 0x0303030303030303u;
    return (bits | bits << 3) & 0x1111111111111111u;
}

// The mask of kMaskColumns columns from `column` on, a multiple of four; bit 0 is the first.
LX_INLINE uint64_t keep_bits(const DropoutKey& key, uint32_t row, int64_t column) {
    Words c0 = Words{} + row, c1, c2 = {}, c3 = {};
    for (int l = 0; l < kF; ++l) c1[l] = static_cast<uint32_t>(column / 4) + l;
    uint32_t k0 = key.low, k1 = key.high;
    for (int round = 0; round < 10; ++round) {
        Words high0, low0, high1, low1;
        multiply(0xD2511F53u, c0, high0, low0);
        multiply(0xCD9E8D57u, c2, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return spread(lanes_at_least(c0, key.threshold)) |
           spread(lanes_at_least(c1, key.threshold)) << 1 |
           spread(lanes_at_least(c2, key.threshold)) << 2 |
           spread(lanes_at_least(c3, key.threshold)) << 3;
}

// The lanes whose bit is set; the others become zero, whatever they held.
template <typename T>
LX_INLINE Vec<T> keep_lanes(Vec<T> v, uint64_t bits) {
    using Lanes = decltype(v == v);
    Lanes bit;
    for (int l = 0; l < kLanes<T>; ++l) bit[l] = 1 << l;
    const Lanes mask = ((Lanes{} + static_cast<decltype(bit[0] + 0)>(bits & 0xffff)) & bit) != 0;
    return bit_cast<Vec<T>>(bit_cast<Lanes>(v) & mask);
}

// to[c] = from[c] where kept, else 0, for the columns [begin, end), begin a multiple of four.
template <typename T, typename Each>
LX_INLINE void for_kept(const DropoutKey& key, uint32_t row, int64_t begin, int64_t end,
                        Each&& each) {
    constexpr int L = kLanes<T>;
    for (int64_t c = begin; c < end; c += kMaskColumns) {
        const uint64_t bits = keep_bits(key, row, c);
        for (int64_t l = 0; l < kMaskColumns && c + l < end; l += L) each(c + l, bits >> l);
    }
}

}  // namespace
}  // namespace lora_ext::LX_ISA
