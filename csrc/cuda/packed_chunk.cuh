// Operands and products of a chunk of packed weights of 8 or 4 bits. A chunk is 32 outputs x 32
// in-features, and one warp multiplies it.
//
// The 16 bytes of a lane are four outputs x four in-features (8 bits) or eight (4 bits). They
// become operand A of m16n8k16, with outputs on the M side and rows of x on the N side. Lane (g,
// t), g = lane / 4, t = lane % 4, has outputs 4g to 4g + 3, of which tile m of two has 4g + 2m and
// 4g + 2m + 1, and in-features 8t to 8t + 7 of the chunk, which are 16 contiguous bytes of a row of
// x (float32: 32). Codes become 16-bit floats exactly: the code becomes the mantissa of a number
// with a fixed exponent, and the resulting offset is subtracted. A float32 x is the sum of three
// bfloat16, each of which is multiplied. A product of x with ones gives the sums that a minimum
// needs.
#pragma once

#include <type_traits>

#include "lx/device.h"
#include "lx/pairs.h"

namespace lora_ext {

// Type of the operands of a product.
template <class T>
using OperandType = std::conditional_t<std::is_same_v<T, lx::f16>, lx::f16, lx::bf16>;

// ------------------------------------------------------------------------------------------------
// Codes

// Returns the four codes of 8 bits of a word as two pairs of numbers.
template <class H>
LX_DEVICE void widen_bytes(uint32_t word, uint32_t (&pair)[2]) {
    if constexpr (std::is_same_v<H, lx::f16>) {  // 1024 + (q + 128)
        const uint32_t flipped = word ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            pair[i] = lx::subtract_pairs<H>(
                lx::byte_permute(flipped, 0x64646464u, i ? 0x5342 : 0x5140), 0x64806480u);
    } else {  // 128 + the lower 7 bits, minus 128 or, if the sign is set, 256
        const uint32_t low = word & 0x7f7f7f7fu, sign = word & 0x80808080u;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned selector = i ? 0x5342 : 0x5140;
            pair[i] = lx::subtract_pairs<H>(lx::byte_permute(low, 0x43434343u, selector),
                                            lx::byte_permute(sign, 0x43434343u, selector));
        }
    }
}
// Returns the eight codes of 4 bits of a word, centred: in-features (0, 2), (1, 3), (4, 6), (5, 7).
template <class H>
LX_DEVICE void widen_nibbles(uint32_t word, uint32_t (&pair)[4]) {
    constexpr bool kHalf = std::is_same_v<H, lx::f16>;
    constexpr uint32_t kOver = kHalf ? 0x64006400u : 0x43004300u;  // 1024 or 128
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t shifted = word >> (4 * (i / 2) + 8 * (i % 2));
        pair[i] =
            lx::subtract_pairs<H>(lx::and_or(shifted, 0x000f000fu, kOver), kOver + 0x00080008u);
    }
}

// Operand A of the products of a chunk for a tile of outputs: [step of 16 in-features][register].
using Codes = uint32_t[2][4];

template <class H, int kBits>
LX_DEVICE void widen(const uint4 (&words)[kBits / 4], int tile, Codes& a) {
    constexpr int kPairs = 16 / kBits;
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
        const uint32_t outputs[2] = {tile ? words[i].z : words[i].x,
                                     tile ? words[i].w : words[i].y};
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            uint32_t pair[kPairs];
            if constexpr (kBits == 8)
                widen_bytes<H>(outputs[o], pair);
            else
                widen_nibbles<H>(outputs[o], pair);
#pragma unroll
            for (int k = 0; k < kPairs; ++k) a[kBits == 8 ? i : k / 2][o + 2 * (k % 2)] = pair[k];
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Rows of x

// Pieces of 16 bytes in eight elements of a row.
template <class T>
constexpr int kPieces = static_cast<int>(sizeof(T)) / 2;

// Operand B: [part, smallest first][step][register]; the sum of the parts is x.
template <class T>
using Rows = uint32_t[sizeof(T) == 2 ? 1 : 3][2][2];

template <class T, int kBits>
LX_DEVICE void row_operand(const uint4 (&words)[kPieces<T>], Rows<T>& b) {
    if constexpr (sizeof(T) == 2) {
        const uint32_t w[4] = {words[0].x, words[0].y, words[0].z, words[0].w};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint32_t low = w[2 * step], high = w[2 * step + 1];
            // In-features (0, 2), (1, 3) of four, in the order of the codes of 4 bits.
            b[0][step][0] = kBits == 8 ? low : lx::byte_permute(low, high, 0x5410);
            b[0][step][1] = kBits == 8 ? high : lx::byte_permute(low, high, 0x7632);
        }
    } else {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint4& w = words[step];
            const float v[4] = {lx::bit_cast<float>(w.x), lx::bit_cast<float>(w.y),
                                lx::bit_cast<float>(w.z), lx::bit_cast<float>(w.w)};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float first = v[kBits == 8 ? 2 * k : k], second = v[kBits == 8 ? 2 * k + 1 : k + 2];
#pragma unroll
                for (int part = 2; part >= 0; --part) {
                    const uint32_t pair = lx::pack_floats<lx::bf16>(first, second);
                    b[part][step][k] = pair;
                    first -= lx::bit_cast<float>(pair << 16);
                    second -= lx::bit_cast<float>(pair & 0xffff0000u);
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Products

// Calls f(step, part) for the products of a chunk.
template <class T, class F>
LX_DEVICE void for_products(F&& f) {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int part = 0; part < static_cast<int>(std::extent_v<Rows<T>>); ++part) f(step, part);
}

// Adds the products of a chunk with all rows to `total`. Accumulator i of tile m of outputs belongs
// to output 4g + 2m + i / 2 and, in a tile of rows, to row 2t + i % 2.
template <class T, int kBits, bool kMinimum, int kTiles>
LX_DEVICE void add_chunk(const uint4 (&words)[kBits / 4], const Rows<T> (&b)[kTiles],
                         const float (&scale)[4], const float (&centre)[4],
                         float (&total)[kTiles][2][4]) {
    using H = OperandType<T>;
    float inputs[kTiles][4] = {};  // sums of the rows
    if constexpr (kMinimum) {
        constexpr uint32_t kOnes = std::is_same_v<H, lx::f16> ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            for_products<T>([&](int step, int part) {
                lx::mma_m16n8k16<H>(inputs[tile], {kOnes, kOnes, kOnes, kOnes},
                                    b[tile][part][step]);
            });
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        Codes a;
        widen<H, kBits>(words, m, a);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float sum[4] = {};
            for_products<T>([&](int step, int part) {
                lx::mma_m16n8k16<H>(sum, a[step], b[tile][part][step]);
            });
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& t = total[tile][m][i];
                t = fmaf(scale[2 * m + i / 2], sum[i], t);
                if constexpr (kMinimum) t = fmaf(centre[2 * m + i / 2], inputs[tile][i], t);
            }
        }
    }
}

}  // namespace lora_ext
