// Widens float8_e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa, no infinity.
// float, Half and BFloat can represent every value, so widening is exact. Compiled per instruction
// set like vec.h.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

LX_INLINE Vec<float> widen_float8(VecN<uint8_t, kF> bits) {
    using U = VecN<uint32_t, kF>;
#if defined(__AVX512F__) && LX_VEC_BYTES == 64
    const U wide = (U)_mm512_cvtepu8_epi32((__m128i)bits);
#else
    const U wide = __builtin_convertvector(bits, U);
#endif
    const U magnitude = wide & 0x7fu;
    const U normal = (magnitude << 20) + (120u << 23);
    // No intermediate float is subnormal, because the processor may be set to flush these to 0.
    const Vec<float> step = __builtin_convertvector((VecN<int32_t, kF>)magnitude, Vec<float>);
    U u = select<U>(magnitude < 8u, bit_cast<U>(step * 0x1p-9f), normal);
    u = select<U>(magnitude == 0x7fu, U{} + 0x7fc00000u, u);
    return bit_cast<Vec<float>>(u | (wide & 0x80u) << 24);
}

// to[i] = from[i] for n numbers.
template <typename T>
void widen_float8(const uint8_t* from, int64_t n, T* to) {
    if constexpr (sizeof(Acc<T>) == 4) {
        using Bytes = VecN<uint8_t, kF>;
        int64_t i = 0;
        for (; i + kF <= n; i += kF) store(to + i, widen_float8(load_bits<Bytes>(from + i)));
        if (i == n) return;
        uint8_t rest[kF] = {};
        for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
        store_n(to + i, widen_float8(load_bits<Bytes>(rest)), n - i);
    }
}

}  // namespace
}  // namespace lora_ext::LX_ISA
