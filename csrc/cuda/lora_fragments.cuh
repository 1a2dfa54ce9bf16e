// Fragments of v, the operands of mma that the warps of an expand read from shared memory.
//
// v is float32. For a 16-bit type, v is split into high + low, each of this type. The two products
// keep 16 bits of v (bfloat16) or 22 bits (float16). With float16, the largest entry of each row is
// first scaled to [2^14, 2^15) by a power of two, so that a large v does not overflow and a small v
// does not lose its low part.
#pragma once

#include "lora_kernels.cuh"

namespace lora_ext {

// A block of ranks: the ranks that four lanes load together. A lane loads the eight ranks of one
// page row, or half of them (float32).
template <class T>
constexpr int kBlockRanks = 4 * kVec<T>;
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;  // high and low part of v, or the float itself

template <class T, int kRows>
constexpr int fragment_bytes(int max_rank) {
    return kRows / kTileRows * static_cast<int>(ceil_div(max_rank, kBlockRanks<T>)) * kParts<T> *
           2 * 32 * 16;
}

// Returns fragment (row tile, block, part, half) of v: 16 bytes per lane, the operand of mma_step
// for words 2 half and 2 half + 1 of the lane's ranks in rows g and g + 8.
template <class T>
LX_DEVICE uint4* fragment(unsigned char* fragments, int blocks, int tile, int block, int part,
                          int half) {
    return reinterpret_cast<uint4*>(fragments) +
           (((tile * blocks + block) * kParts<T> + part) * 2 + half) * 32;
}

// Sums the splits of v, scales the sums and stores them as fragments. unscale[row] is the inverse
// of the row's power of two. kFactors: pages and rows have separate factors, instead of `scale`.
template <class T, int kRows, bool kFactors>
LX_DEVICE void build_fragments(const LoraArgs& args, const Partials& v, const RowTile& tile,
                               float scale, const int32_t (&row_of)[kRows],
                               unsigned char* fragments, unsigned (&row_max)[kRows],
                               float (&unscale)[kRows]) {
    constexpr bool kNormalise = std::is_same_v<T, lx::f16>;
    const int blocks = (tile.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    if constexpr (kNormalise) {
        for (int i = lx::thread_rank(); i < kRows; i += static_cast<int>(blockDim.x))
            row_max[i] = 0;
        lx::syncthreads();
    }
    // An item (row, block, t) consists of the ranks of one row and block that lane t of four loads.
    // A thread stores four ranks (a quad) at a time: a whole item of float32, or half of a 16-bit
    // item.
    constexpr unsigned kHalves = kVec<T> / 4;
    struct Quad {
        int row, block, t, half;
    };
    const unsigned quads =
        (tile.rows + kTileRows - 1) / kTileRows * kTileRows * blocks * 4 * kHalves;
    const auto quad_of = [&](unsigned number) -> Quad {
        const unsigned item = number / kHalves, of_row = item / 4 / blocks;
        return {static_cast<int>(of_row), static_cast<int>(item / 4 - of_row * blocks),
                static_cast<int>(item % 4), static_cast<int>(number % kHalves)};
    };
    // The four words of a quad are at words_of(quad)[word(i)]: two of high and two of low parts, or
    // floats.
    const auto words_of = [&](const Quad& q) {
        uint4* const at = fragment<T>(fragments, blocks, q.row / kTileRows, q.block, 0, q.half);
        return reinterpret_cast<uint32_t*>(at + q.row % 8 * 4 + q.t) + q.row / 8 % 2;
    };
    const auto word = [](int i) { return i / 2 * static_cast<int>(kHalves) * 32 * 4 + i % 2 * 2; };
    const auto store = [&](uint32_t* at, const float (&value)[4]) {
        if constexpr (kHalves == 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) at[word(i)] = lx::bit_cast<uint32_t>(value[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t high = lx::pack_floats<T>(value[2 * i], value[2 * i + 1]);
                const float2 h = lx::unpack_floats<T>(high);
                at[word(i)] = high;
                at[word(2 + i)] = lx::pack_floats<T>(value[2 * i] - h.x, value[2 * i + 1] - h.y);
            }
        }
    };
    const bool wide = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.row_floats % 4 == 0 &&
                      v.row_stride % 4 == 0 && v.split_stride % 4 == 0;
    const unsigned first = static_cast<unsigned>(lx::thread_rank());
    for (unsigned number = first; number < quads; number += blockDim.x) {  // multiple of 32
        const Quad quad = quad_of(number);
        const int row = quad.row;
        const int rank = quad.block * kBlockRanks<T> + quad.t * kVec<T> + quad.half * 4;
        // For a missing row or rank, the first row or rank of the tile is read instead.
        const int n = row < tile.rows ? tile.rank - rank : 0;
        const float* p = v.data + row_of[n > 0 ? row : 0] * v.row_stride + (n > 0 ? rank : 0);
        float value[4] = {};
        float weight = 1;
        if constexpr (kFactors) {  // the four ranks are in one page
            const int page = (n > 0 ? rank : 0) / kPageRanks;
            scale = scale_of_page(args.bank, tile.slot, page);
            weight = weight_of_row(args, tile.slot, row_of[n > 0 ? row : 0], page);
        }
        if (wide) {
            add_splits(v.splits, value, [&](int split, float (&part)[4]) {
                const float4 four = *reinterpret_cast<const float4*>(p + split * v.split_stride);
                part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
            });
        } else {
#pragma unroll 1
            for (int split = 0; split < v.splits; ++split, p += v.split_stride) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i < n) value[i] += p[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            value[i] = i < n ? value[i] * scale : 0.0f;
            if constexpr (kFactors) value[i] = i < n ? value[i] * weight : 0.0f;
        }
        if constexpr (kNormalise) {
            // Scaling needs the row's largest entry. Until this entry is known, the floats are
            // stored where the high and low parts will be.
            const float largest = fmaxf(fmaxf(fabsf(value[0]), fabsf(value[1])),
                                        fmaxf(fabsf(value[2]), fabsf(value[3])));
            // The bits of nonnegative floats, compared as integers, have the same order as the
            // floats.
            lx::atomic_max(&row_max[row], lx::bit_cast<unsigned>(largest));
            uint32_t* const at = words_of(quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) at[word(i)] = lx::bit_cast<uint32_t>(value[i]);
        } else {
            store(words_of(quad), value);
        }
    }
    if constexpr (kNormalise) {
        lx::syncthreads();
        for (unsigned number = first; number < quads; number += blockDim.x) {
            const Quad quad = quad_of(number);
            const int exponent = static_cast<int>(row_max[quad.row] >> 23);  // 255: not finite
            const int shift = exponent == 255 ? 0 : lx::min(127 + 14 - exponent, 126);
            const float up = lx::bit_cast<float>(static_cast<unsigned>(127 + shift) << 23);
            if (quad.block == 0 && quad.t == 0 && quad.half == 0)
                unscale[quad.row] = lx::bit_cast<float>(static_cast<unsigned>(127 - shift) << 23);
            uint32_t* const at = words_of(quad);
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) value[i] = up * lx::bit_cast<float>(at[word(i)]);
            store(at, value);
        }
    }
}

}  // namespace lora_ext
