// The sums of a sum layer on tensor cores: operands of two precisions, and the product of 16 rows
// of values with the weights of a warp.
//
//   fp16s  both operands times 2^14 in float16: 11 bits, terms below 2^-38 of the largest vanish
//   high   each operand is high + low in bfloat16, three products: 16 bits, the range of float32
//
// A row of values in shared memory has 64 bytes more than a multiple of 128, so that eight lanes
// that access 16 bytes each have no bank conflict. Weights become operands in registers, eight per
// lane (see lora_tile.cuh for the order of k).
#pragma once

#include "circuit_sum.cuh"

namespace lora_ext {

constexpr int kMmaRows = 16;
constexpr int kTileSums = 8;
constexpr int kWarpTiles = 2;
constexpr int kWarpSums = kWarpTiles * kTileSums;  // sums per warp in one product
constexpr int kStep = 32;                          // terms that four lanes read together
constexpr float kHalfScale = 0x1p14f;

template <bool kHigh>
using MmaHalf = std::conditional_t<kHigh, lx::bf16, lx::f16>;

// Returns the distance between rows of values, in bytes: a whole number of steps, and not a
// multiple of 128, so that there are no bank conflicts.
LX_HOST_DEVICE constexpr int value_row_bytes(int64_t terms) {
    const int bytes = (static_cast<int>(terms) + kStep - 1) / kStep * kStep * 2;
    return bytes % 128 == 0 ? bytes + 64 : bytes;
}

// Eight numbers as operands of mma; `low` is the rounding error of `high` (zero unless kHigh).
template <bool kHigh>
struct Operand {
    uint4 high, low;

    LX_DEVICE explicit Operand(const float (&v)[8]) {
        using Half = MmaHalf<kHigh>;
        uint32_t h[4], r[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float a = kHigh ? v[2 * i] : v[2 * i] * kHalfScale;
            const float b = kHigh ? v[2 * i + 1] : v[2 * i + 1] * kHalfScale;
            h[i] = lx::pack_floats<Half>(a, b);
            if constexpr (kHigh) {
                const float2 rounded = lx::unpack_floats<Half>(h[i]);
                r[i] = lx::pack_floats<Half>(a - rounded.x, b - rounded.y);
            }
        }
        high = {h[0], h[1], h[2], h[3]};
        low = {r[0], r[1], r[2], r[3]};
    }
};

// Loads the eight numbers from index k on, with zeros beyond n.
LX_DEVICE void load_eight(const float* p, int k, int n, bool aligned, float (&v)[8]) {
    if (aligned && k + 8 <= n) {
        const float4 a = lx::load_nc(reinterpret_cast<const float4*>(p + k));
        const float4 b = lx::load_nc(reinterpret_cast<const float4*>(p + k + 4));
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = k + j < n ? lx::load_nc(p + k + j) : 0.0f;
    }
}

// Adds to acc the products of the 16 rows of values in `shared`, high parts then low parts, with
// the weights (sums, n) of the sums from `first_sum` on. Result i of a lane belongs to row
// mma_row(i) and to sum mma_sum(i, first_sum).
template <bool kHigh>
LX_DEVICE void mma_products(const unsigned char* shared, const float* weight, int n, int sums,
                            int first_sum, bool aligned, float (&acc)[kWarpTiles][4]) {
    const int row_bytes = value_row_bytes(n), lane = lx::lane_id();
    for (int step = 0; step < (n + kStep - 1) / kStep; ++step) {
        const int k = step * kStep + 8 * (lane % 4);
        const auto words = [&](int row, int part) {
            return *reinterpret_cast<const uint4*>(shared + (part * kMmaRows + row) * row_bytes +
                                                   2 * k);
        };
        const uint4 a = words(lane / 4, 0), a8 = words(lane / 4 + 8, 0);
        uint4 a_low{}, a8_low{};
        if constexpr (kHigh) a_low = words(lane / 4, 1), a8_low = words(lane / 4 + 8, 1);
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; ++tile) {
            const int o = first_sum + tile * kTileSums + lane / 4;
            float v[8];
            load_eight(weight + int64_t{o} * n, k, o < sums ? n : 0, aligned, v);
            const Operand<kHigh> b(v);
            if constexpr (kHigh) {
                mma_words<MmaHalf<kHigh>>(acc[tile], a_low, a8_low, b.high);
                mma_words<MmaHalf<kHigh>>(acc[tile], a, a8, b.low);
            }
            mma_words<MmaHalf<kHigh>>(acc[tile], a, a8, b.high);
        }
    }
}
LX_DEVICE int mma_row(int i) {
    return lx::lane_id() / 4 + 8 * (i / 2 % 2);
}
LX_DEVICE int mma_sum(int i, int first_sum) {
    return first_sum + i / 4 * kTileSums + 2 * (lx::lane_id() % 4) + i % 2;
}
template <bool kHigh>
LX_DEVICE float mma_result(const float (&acc)[kWarpTiles][4], int i) {
    return kHigh ? acc[i / 4][i % 4] : acc[i / 4][i % 4] * 0x1p-28f;
}
// Returns the bound above which a sum of n terms is accurate; smaller sums are recomputed.
template <bool kHigh>
LX_DEVICE float mma_trusted(int n) {
    return kHigh ? kSumTrusted : static_cast<float>(n) * 0x1p-28f;
}
inline int mma_shared_bytes(bool high, int64_t terms) {
    return (high ? 2 : 1) * kMmaRows * value_row_bytes(terms);
}

}  // namespace lora_ext
