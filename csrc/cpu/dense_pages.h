// Transposes blocks of eight ranks x one vector of outputs in registers, for pages of B whose rows
// are adjacent in memory. Compiled per instruction set like vec.h.
#pragma once

#include "transpose.h"

namespace lora_ext::LX_ISA {
namespace {

// True for types with load_quick, a variant of load_transposed for adjacent outputs. load_quick
// loads whole vectors and needs fewer shuffles than joining two blocks of eight outputs; most of
// its shuffles stay within 128 bits. It permutes the outputs, and in_order() restores their order.
template <typename T>
constexpr bool kQuick = false;
#if LX_VEC_BYTES == 64
template <>
constexpr bool kQuick<float> = true;
template <>
constexpr bool kQuick<BFloat> = true;

LX_INLINE void load_quick(const float* b, Vec<float>* out) {
    using V = Vec<float>;
    V low[4], high[4];  // ranks 0-3 and 4-7 of rows 2i, 2i + 1, 2i + 8, 2i + 9
    for (int i = 0; i < 4; ++i) {
        const V r = load(b + 16 * i), s = load(b + 16 * (i + 4));
        low[i] =
            __builtin_shufflevector(r, s, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        high[i] = __builtin_shufflevector(r, s, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29,
                                          30, 31);
    }
    transpose_quads(low, out);
    transpose_quads(high, out + 4);
}
LX_INLINE void load_quick(const BFloat* b, Vec<float>* out) {
    using U = VecN<uint32_t, 16>;
    U rows[4], words[4];
    for (int i = 0; i < 4; ++i) rows[i] = load_bits<U>(b + 32 * i);
    transpose_quads(rows, words);
    for (int p = 0; p < 4; ++p) {  // two ranks form a 32-bit word
        out[2 * p] = bit_cast<Vec<float>>(words[p] << 16);
        out[2 * p + 1] = bit_cast<Vec<float>>(words[p] & 0xffff0000u);
    }
}
template <typename T>
LX_INLINE Vec<T> in_order(Vec<T> v) {
    if constexpr (sizeof(T) == 4)
        return __builtin_shufflevector(v, v, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    else
        return __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
#endif

}  // namespace
}  // namespace lora_ext::LX_ISA
