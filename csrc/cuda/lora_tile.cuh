// Code shared by the LoRA kernels: the rows and pages of a block, and 16-byte loads whose words are
// mma operands without conversion.
//
// In mma.m16n8k16, lane (g, t), with g = lane / 4 and t = lane % 4, passes the pairs of elements
// that start at k = 2t and k = 2t + 8, of row g of A and of column g of B. A contraction may visit
// k in any order. The kernels number k so that these pairs are the first two words of the 16 bytes
// that lane t reads; the last two words are operands of a second mma. Four lanes read 64 contiguous
// bytes of one row, and no data passes through shared memory. For float32, the same words are
// operands of two mma.m16n8k8.
#pragma once

#include "lora_ext/lora.h"
#include "lx/device.h"
#include "lx/pairs.h"

namespace lora_ext {

constexpr int kTileRows = 16;  // rows of an mma
constexpr int kPageRanks = 8;
// Banks of a larger rank use the kernels of lora_gemm.cuh, whose rank is not limited.
constexpr int kFusedRank = 256;
constexpr int kFusedPages = kFusedRank / kPageRanks;

template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte load

// v, or its partial sums: element (split, row, rank) is data[split * split_stride + row *
// row_stride + rank].
struct Partials {
    float* data;
    int64_t row_stride, split_stride;
    int splits;
    int split_width;  // in-features per split
    int row_floats;   // floats per row that may be read, including those beyond the rank
    bool scaled;      // scale[slot] is already applied
};

constexpr int kMaxSplits = 16;
constexpr int kSplitBatch = 8;  // splits of v whose loads are in flight together

// The division of the chunks of a plan into row tiles.
struct Tiling {
    int per_chunk;      // tiles of a full chunk, a power of two
    int log_per_chunk;  // used instead of a division in decode kernels
    int64_t perm;       // start of perm in the plan
};

// ------------------------------------------------------------------------------------------------
// Rows

// Returns the adapter of a row, or -1. Sets `bad` to whether the row's adapter id is out of range.
LX_DEVICE int adapter_of_row(const LoraPlanArgs& ids, int64_t row, int64_t num_valid, bool& bad) {
    bad = false;
    if (row >= num_valid) return -1;
    const int64_t id = ids.ids_are_int64 ? static_cast<const int64_t*>(ids.adapter_ids)[row]
                                         : static_cast<const int32_t*>(ids.adapter_ids)[row];
    bad = id < -1 || id >= ids.num_adapters;
    return bad ? -1 : static_cast<int>(id);
}

LX_DEVICE int64_t valid_rows(const LoraPlanArgs& ids) {
    return ids.num_valid ? lx::min<int64_t>(*ids.num_valid, ids.num_tokens) : ids.num_tokens;
}

// Up to kRows rows of the same adapter. If `rank` is 0, there is nothing to compute.
struct RowTile {
    int slot, rows, rank;
    int first;  // with a plan: start of its rows in perm
};

// Finds tile `index` of the plan. Without a plan there are at most 32 ids, and every warp groups
// them by adapter. All threads of the block must call this. row_of[0 .. rows) is complete after the
// next barrier.
template <int kRows>
LX_DEVICE RowTile find_tile(const LoraArgs& args, const Tiling& tiling, int index,
                            int32_t (&row_of)[kRows]) {
    RowTile tile{-1, 0, 0, 0};
    const int thread = lx::thread_rank();
    if (args.plan) {
        const int chunk = index / tiling.per_chunk;
        const int skip = index % tiling.per_chunk * kRows;
        // Each block has an entry in the plan, even if it is unused, so the entry is loaded without
        // waiting for the number of used entries.
        const int32_t* entry = args.plan + kPlanHeader + int64_t{4} * chunk;
        const int num_chunks = args.plan[kPlanNumChunks];
        const int slot = entry[0], start = entry[1], len = entry[2];
        if (chunk >= num_chunks || len <= skip) return tile;
        tile.slot = slot;
        tile.rows = lx::min(kRows, len - skip);
        tile.first = start + skip;
        const int32_t* perm = args.plan + tiling.perm + tile.first;
        for (int i = thread; i < tile.rows; i += static_cast<int>(blockDim.x)) row_of[i] = perm[i];
    } else {
        const int lane = thread % lx::kWarpSize;
        bool bad;
        const int id = adapter_of_row(args.ids, lane, valid_rows(args.ids), bad);
        const unsigned group = lx::match_any_sync(lx::kFullMask, id);
        const int order = lx::popc(group & ((1u << lane) - 1));
        // A tile starts at every kRows-th row of a group, that is, of the rows of one adapter.
        unsigned starts = lx::ballot_sync(lx::kFullMask, id >= 0 && order % kRows == 0);
        for (int i = 0; i < index; ++i) starts &= starts - 1;
        if (starts == 0) return tile;
        const int leader = lx::ffs(starts) - 1;
        tile.slot = lx::shfl_sync(lx::kFullMask, id, leader);
        const int place = order - lx::shfl_sync(lx::kFullMask, order, leader);
        const bool mine = id == tile.slot && place >= 0 && place < kRows;
        tile.rows = lx::popc(lx::ballot_sync(lx::kFullMask, mine));
        if (mine && thread < lx::kWarpSize) row_of[place] = lane;
    }
    const LoraBank& bank = args.bank;
    // Ranks are in device memory, so the host has not checked them.
    tile.rank =
        bank.ranks ? lx::min(lx::max(bank.ranks[tile.slot], 0), bank.max_rank) : bank.max_rank;
    return tile;
}

// Variant of find_tile for decode, where no other work hides the latency of its loads. The variant
// takes two memory round trips. The first loads the chunk's entry, or the ids. The second loads
// everything that depends on the slot: rows, rank, and what also(slot) loads, such as page numbers
// and a scale. Within a round trip, no load waits for another: syncwarp keeps the compiler from
// moving loads down to save registers. (Kernels that use the variant without `also` have no
// registers for this, but other work hides the latency.) A block must have at least kRows threads.
template <int kRows, class Also>
LX_DEVICE RowTile find_tile(const LoraArgs& args, const Tiling& tiling, int index,
                            int32_t (&row_of)[kRows], Also&& also) {
    RowTile tile{-1, 0, 0, 0};
    const int thread = lx::thread_rank();
    const LoraBank& bank = args.bank;
    int rank = 0;
    const auto ask = [&] {
        rank = bank.ranks ? bank.ranks[tile.slot] : bank.max_rank;
        also(tile.slot);
        lx::syncwarp();
    };
    if (args.plan) {
        const int chunk = index >> tiling.log_per_chunk;
        const int skip = (index - (chunk << tiling.log_per_chunk)) * kRows;
        const int32_t* entry = args.plan + kPlanHeader + int64_t{4} * chunk;
        const int num_chunks = args.plan[kPlanNumChunks];
        const int slot = entry[0], start = entry[1], len = entry[2];
        lx::syncwarp();
        if (chunk >= num_chunks || len <= skip) return tile;
        tile.slot = slot;
        tile.rows = lx::min(kRows, len - skip);
        tile.first = start + skip;
        const int32_t row = args.plan[tiling.perm + tile.first + lx::min(thread, tile.rows - 1)];
        ask();
        if (thread < tile.rows) row_of[thread] = row;
    } else {
        const int lane = thread % lx::kWarpSize;
        const LoraPlanArgs& ids = args.ids;
        // The id is loaded together with the number of valid rows, not after it.
        const int64_t at = lx::min<int64_t>(lane, ids.num_tokens - 1);
        const int64_t asked = ids.ids_are_int64 ? static_cast<const int64_t*>(ids.adapter_ids)[at]
                                                : static_cast<const int32_t*>(ids.adapter_ids)[at];
        const bool is_none = lane >= valid_rows(ids) || asked < -1 || asked >= ids.num_adapters;
        const int id = is_none ? -1 : static_cast<int>(asked);
        const unsigned group = lx::match_any_sync(lx::kFullMask, id);
        const int order = lx::popc(group & ((1u << lane) - 1));
        // A tile starts at every kRows-th row of a group, that is, of the rows of one adapter.
        unsigned starts = lx::ballot_sync(lx::kFullMask, id >= 0 && order % kRows == 0);
        for (int i = 0; i < index; ++i) starts &= starts - 1;
        if (starts == 0) return tile;
        const int leader = lx::ffs(starts) - 1;
        tile.slot = lx::shfl_sync(lx::kFullMask, id, leader);
        ask();
        const int place = order - lx::shfl_sync(lx::kFullMask, order, leader);
        const bool mine = id == tile.slot && place >= 0 && place < kRows;
        tile.rows = lx::popc(lx::ballot_sync(lx::kFullMask, mine));
        if (mine && thread < lx::kWarpSize) row_of[place] = lane;
    }
    // Ranks are in device memory, so the host has not checked them.
    tile.rank = lx::min(lx::max(rank, 0), bank.max_rank);
    return tile;
}

// Stores two adjacent ranks of v, of which n exist. `paired`: p is aligned to eight bytes.
LX_DEVICE void store_ranks(float* p, int n, bool paired, float first, float second) {
    if (paired && n >= 2) {
        *reinterpret_cast<float2*>(p) = {first, second};
    } else {
        if (n >= 1) p[0] = first;
        if (n >= 2) p[1] = second;
    }
}
LX_DEVICE bool ranks_paired(const float* data, int64_t row_stride) {
    return reinterpret_cast<uintptr_t>(data) % 8 == 0 && row_stride % 2 == 0;
}

// Adds to `sum`, split by split, the values that load(split, part) writes to `part`. The whole warp
// must call this. Up to eight splits, rounded up to a power of two, are loaded at once without a
// condition: instead of splits beyond the last, the last one is loaded again and not used.
template <int kBatch = 1, int kCount, class Load>
LX_DEVICE void add_splits(int splits, float (&sum)[kCount], Load&& load) {
    if constexpr (kBatch < kSplitBatch) {
        if (splits > kBatch) return add_splits<2 * kBatch>(splits, sum, load);
    }
    constexpr int kMost = kBatch < kSplitBatch ? kBatch : kMaxSplits;
#pragma unroll
    for (int first = 0; first < kMost; first += kBatch) {
        if (first > 0 && first >= splits) return;
        float part[kBatch][kCount];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) load(lx::min(first + k, splits - 1), part[k]);
        lx::syncwarp();  // keeps the compiler from moving loads down to save registers
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (first + k < splits) sum[i] += part[k][i];
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Pages. An address is nullptr if the page table has no such page; its ranks count as zero.

LX_DEVICE int64_t page_offset(const LoraBank& bank, int slot, int page, int64_t slot_stride,
                              int64_t page_stride) {
    if (!bank.page_table) return slot * slot_stride + page * page_stride;
    const int entry = bank.page_table[int64_t{slot} * bank.pages_per_slot + page];
    const bool absent = static_cast<uint32_t>(entry) >= static_cast<uint32_t>(bank.num_pages);
    return absent ? -1 : entry * page_stride;
}
template <class T>
LX_DEVICE const T* a_page(const LoraBank& bank, int slot, int page) {
    const int64_t at = page_offset(bank, slot, page, bank.a_slot_stride, bank.a_page_stride);
    return at < 0 ? nullptr : static_cast<const T*>(bank.a) + at;
}
template <class T>
LX_DEVICE const T* b_page(const LoraBank& bank, int slot, int page) {
    const int64_t at = page_offset(bank, slot, page, bank.b_slot_stride, bank.b_page_stride);
    return at < 0 ? nullptr : static_cast<const T*>(bank.b) + at;
}

// First of two steps that compute the address of a page. Returns the page's number, that is, its
// entry in the page table. If `page` is outside the slot's entries, the nearest entry is returned.
// Without a table, returns `page` and reads nothing.
LX_DEVICE int page_number(const LoraBank& bank, int slot, int page) {
    if (!bank.page_table) return page;
    const int here = lx::max(lx::min(page, bank.pages_per_slot - 1), 0);
    return bank.page_table[int64_t{slot} * bank.pages_per_slot + here];
}
// Returns p + n * stride. kNarrow: the stride in bytes fits in 32 bits, and the address takes one
// instruction instead of four.
template <bool kNarrow, class T>
LX_DEVICE T* row_at(T* p, int n, int64_t stride) {
    if constexpr (kNarrow) return lx::element(p, n, static_cast<int>(stride * int64_t{sizeof(T)}));
    return p + n * stride;
}
// Second step: returns the address of page `number` in `base`, or nullptr if the number is invalid.
template <class T, bool kNarrow>
LX_DEVICE const T* page_at(const LoraBank& bank, const void* base, int slot, int number,
                           int64_t slot_stride, int64_t page_stride) {
    const T* const p = static_cast<const T*>(base);
    if (!bank.page_table)
        return row_at<kNarrow>(row_at<kNarrow>(p, slot, slot_stride), number, page_stride);
    const bool absent = static_cast<uint32_t>(number) >= static_cast<uint32_t>(bank.num_pages);
    return absent ? nullptr : row_at<kNarrow>(p, number, page_stride);
}

// ------------------------------------------------------------------------------------------------
// Factors of v that differ between pages or rows (lora.h: has_factors).

LX_DEVICE float scale_of_page(const LoraBank& bank, int slot, int page) {
    if (!bank.scale) return 1.0f;
    return bank.scale[bank.scale_per_page ? int64_t{slot} * bank.pages_per_slot + page : slot];
}
// Groups are in device memory, so the host has not checked them.
LX_DEVICE int group_of_page(const LoraBank& bank, int slot, int page) {
    if (!bank.groups) return 0;
    const int group = bank.groups[int64_t{slot} * bank.pages_per_slot + page];
    return lx::min(lx::max(group, 0), bank.num_groups - 1);
}
LX_DEVICE float weight_of_row(const LoraArgs& args, int slot, int64_t row, int page) {
    if (!args.weights) return 1.0f;
    return args.weights[row * args.weights_row_stride + group_of_page(args.bank, slot, page)];
}

// ------------------------------------------------------------------------------------------------
// Words

// Returns `words` with all but the first n elements set to zero, even if they are NaN.
template <class T>
LX_DEVICE uint4 keep_elements(uint4 words, int n) {
    uint32_t w[4] = {words.x, words.y, words.z, words.w};
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (n <= i * kPerWord) {
            w[i] = 0;
        } else if (kPerWord == 2 && n == i * kPerWord + 1) {
            w[i] &= 0xffff;
        }
    }
    return {w[0], w[1], w[2], w[3]};
}

template <class T>
LX_DEVICE uint4 words_of(const T (&e)[kVec<T>]) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
            w[i] = lx::pack(e[2 * i], e[2 * i + 1]);
        } else {
            w[i] = lx::bit_cast<uint32_t>(e[i]);
        }
    }
    return {w[0], w[1], w[2], w[3]};
}

// Template arguments of kernels that read pages of float8_e4m3fn and rows of T.
struct Float8F16 {};
struct Float8BF16 {};
template <class T>
using Float8 = std::conditional_t<std::is_same_v<T, lx::f16>, Float8F16, Float8BF16>;
template <class P>
struct PagesOf {
    using Row = P;
    using Element = P;
    using Words = uint4;  // the elements of a lane, kVec<Row>
};
template <class T>
struct Float8Pages {
    using Row = T;
    using Element = uint8_t;
    using Words = uint2;
};
template <>
struct PagesOf<Float8F16> : Float8Pages<lx::f16> {};
template <>
struct PagesOf<Float8BF16> : Float8Pages<lx::bf16> {};

// Returns the elements of a lane as operands of mma, in T. float8 has four bits of exponent (bias
// 7) and three of mantissa: shifted into place they represent a number that is 2^8 (float16) or
// 2^120 times too small. The product is exact, for subnormals too. (NaN becomes 480.)
template <class T>
LX_DEVICE uint4 widen_float8(const uint2& bytes) {
    constexpr bool kHalf = std::is_same_v<T, lx::f16>;
    constexpr uint32_t kPower = kHalf ? 0x5c005c00u : 0x7b807b80u;
    const uint32_t four[2] = {bytes.x, bytes.y};
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = lx::byte_permute(four[i / 2], 0, i % 2 ? 0x3424 : 0x1404);
        const uint32_t magnitude = (pair & 0x7f007f00u) >> (kHalf ? 1 : 4);
        w[i] = lx::multiply_pairs<T>(lx::and_or(pair, 0x80008000u, magnitude), kPower);
    }
    return {w[0], w[1], w[2], w[3]};
}

// Returns the n elements at p, n clamped to [0, kVec], followed by zeros, and loads only these. If
// kAligned and n > 0, loads and returns all 16 bytes.
template <class T, bool kAligned>
LX_DEVICE uint4 load_words(const T* p, int n) {
    if constexpr (kAligned) {
        return n > 0 ? lx::load_nc(reinterpret_cast<const uint4*>(p)) : uint4{0, 0, 0, 0};
    } else {
        T e[kVec<T>];
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) e[i] = i < n ? lx::load_nc(p + i) : lx::from_float<T>(0);
        return words_of(e);
    }
}

// Returns lx::unpack_floats<T>(pair), for bfloat16 in two instructions instead of three.
template <class T>
LX_DEVICE float2 floats_of(uint32_t pair) {
    if constexpr (std::is_same_v<T, lx::f16>) return lx::unpack_floats<T>(pair);
    return {lx::bit_cast<float>(pair << 16), lx::bit_cast<float>(pair & 0xffff0000u)};
}

// Returns 16 bytes of y + d, each element rounded once from float.
template <class T>
LX_DEVICE uint4 add_to_words(const uint4& words, const float (&d)[kVec<T>]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
            const float2 y = floats_of<T>(w[i]);
            out[i] = lx::pack_floats<T>(y.x + d[2 * i], y.y + d[2 * i + 1]);
        } else {
            out[i] = lx::bit_cast<uint32_t>(lx::bit_cast<float>(w[i]) + d[i]);
        }
    }
    return {out[0], out[1], out[2], out[3]};
}

// ------------------------------------------------------------------------------------------------
// Products

// Computes d += part, rounded to nearest. A tensor core rounds its sum toward zero, so products
// whose result must keep all bits of a float start a new sum, `part`, in every step.
LX_DEVICE void add_part(float (&d)[4], const float (&part)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i];
}

// Computes d += a b for one step of k: 16 elements of a 16-bit type, or 8 of float32. float32 uses
// three tf32 products, x = high + low, 11 bits each; the dropped product is below 2^-22 |a| |b|.
template <class T>
LX_DEVICE void mma_step(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 2) {
        lx::mma_m16n8k16<T>(d, a, b);
    } else {
        uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
        auto split = [](uint32_t bits, uint32_t& high, uint32_t& low) {
            const float x = lx::bit_cast<float>(bits);
            high = lx::to_tf32(x);
            low = lx::to_tf32(x - lx::bit_cast<float>(high));
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
        float part[4] = {};
        lx::mma_m16n8k8_tf32(part, a_low, b_high);
        lx::mma_m16n8k8_tf32(part, a_high, b_low);
        lx::mma_m16n8k8_tf32(part, a_high, b_high);
        add_part(d, part);
    }
}

// Computes d += a b over the 16 bytes that a lane holds of rows g and g + 8 of A and column g of B.
template <class T>
LX_DEVICE void mma_words(float (&d)[4], const uint4& a, const uint4& a8, const uint4& b) {
    mma_step<T>(d, {a.x, a8.x, a.y, a8.y}, {b.x, b.y});
    mma_step<T>(d, {a.z, a8.z, a.w, a8.w}, {b.z, b.w});
}

}  // namespace lora_ext
