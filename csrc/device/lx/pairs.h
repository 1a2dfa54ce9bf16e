// Bytes and pairs of 16-bit numbers in a register, for kernels that widen small integers.
//
//   lx::byte_permute(a, b, selector)
//       returns four of the eight bytes of a (numbers 0 to 3) and b (4 to 7): bits 4i to 4i + 2 of
//       `selector` contain the number of the byte that becomes byte i of the result.
//   lx::and_or(a, mask, b)
//       returns (a & mask) | b in one instruction, if mask and b are in registers. With two
//       constants, the compiler would use two.
//   lx::subtract_pairs<T>(a, b)
//       returns a - b for pairs of numbers of type T, bf16 or f16, each rounded to nearest even.
//   lx::multiply_pairs<T>(a, b)
//       returns a * b, rounded in the same way; subnormals are not flushed to zero.
#pragma once

#include "lx/device.h"

namespace lx {

#ifdef LX_EMULATE

unsigned byte_permute(unsigned a, unsigned b, unsigned selector);
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t b) {
    return (a & mask) | b;
}
uint32_t subtract_bf16(uint32_t a, uint32_t b);
uint32_t subtract_f16(uint32_t a, uint32_t b);
uint32_t multiply_bf16(uint32_t a, uint32_t b);
uint32_t multiply_f16(uint32_t a, uint32_t b);

template <class T>
inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    return std::is_same_v<T, bf16> ? subtract_bf16(a, b) : subtract_f16(a, b);
}
template <class T>
inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    return std::is_same_v<T, bf16> ? multiply_bf16(a, b) : multiply_f16(a, b);
}

#else

LX_DEVICE unsigned byte_permute(unsigned a, unsigned b, unsigned selector) {
    return __byte_perm(a, b, selector);
}
LX_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t b) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(b));
    return y;
}

template <class T>
LX_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hsub2(bit_cast<Packed<T> >(a), bit_cast<Packed<T> >(b)));
}
template <class T>
LX_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmul2(bit_cast<Packed<T> >(a), bit_cast<Packed<T> >(b)));
}

#endif

}  // namespace lx
