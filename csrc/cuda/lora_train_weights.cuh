// The blocks that compute the gradients of adapters: their rows, columns and ranks, and the layout
// of their partial sums. One kernel computes partial sums over ranges of rows
// (lora_train_weights.cu), and another one adds them (lora_train_weights_reduce.cu).
#pragma once

#include "lora_train.cuh"

namespace lora_ext {

constexpr int kGradientThreads = 256;
constexpr int kGradientWarps = kGradientThreads / lx::kWarpSize;
constexpr int kGradientBand = 16 * kGradientWarps;  // columns, 16 per warp
template <class T>
constexpr int kGradientColumns = kPassBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kGradientBands = kGradientColumns<T> / kGradientBand;

struct GradientShape {
    int slices, groups, range_rows;
    bool x_aligned, v_aligned;
    int64_t perm, slot_begin;  // offsets in the plan
    float4* partials;          // for adapters with several ranges
};

// The work of a block, either of the kernel that sums ranges or of the kernel that adds them.
struct GradientBlock {
    int slot, range, first_rank, ranks, column;  // ranks: their number; column: the first one
    const int32_t* rows;                         // rows of the adapter
    int num_rows, first_row;                     // number of `rows`; index of the first in perm
};

// Returns the slot of range `index`. The indices of slot s start at slot_begin[s] / range_rows + s,
// which leaves at least one index for each of the ceil(n / range_rows) ranges of its n rows, and
// one if n is 0. The warp searches 32 slots at a time.
LX_DEVICE int slot_of_range(const int32_t* slot_begin, int range_rows, int num_adapters,
                            int index) {
    int low = 0;
    for (int left = num_adapters; left > 1;) {
        const int step = (left + 31) / 32;
        const int skip = lx::lane_id() * step;
        const bool at_or_after =
            skip < left && slot_begin[low + skip] / range_rows + low + skip <= index;
        const int found = lx::popc(lx::ballot_sync(lx::kFullMask, at_or_after)) - 1;
        low += found * step;
        left = lx::min(step, left - found * step);
    }
    return low;
}

// Returns the work of block `index`. Groups of ranks vary fastest, then slices, then ranges of rows
// (`of_range`) or adapters.
template <class T, int kPages>
LX_DEVICE GradientBlock find_block(const Gradient& args, const GradientShape& shape, unsigned index,
                                   bool of_range) {
    GradientBlock block{};
    block.first_rank = static_cast<int>(index % shape.groups) * kPages * kPageRanks;
    index /= shape.groups;
    block.column = static_cast<int>(index % shape.slices) * kGradientColumns<T>;
    block.slot = static_cast<int>(index / shape.slices);
    if (args.num_tokens > 0) {
        const int32_t* slot_begin = args.plan + shape.slot_begin;
        if (of_range) {
            const int range = block.slot;
            block.slot = slot_of_range(slot_begin, shape.range_rows, args.num_adapters, range);
            block.range = range - (slot_begin[block.slot] / shape.range_rows + block.slot);
        }
        block.first_row = slot_begin[block.slot];
        block.num_rows = slot_begin[block.slot + 1] - block.first_row;
        block.rows = args.plan + shape.perm + block.first_row;
    }
    const int rank =
        args.ranks ? lx::min(lx::max(args.ranks[block.slot], 0), args.max_rank) : args.max_rank;
    block.ranks = lx::min(lx::max(rank - block.first_rank, 0), kPages * kPageRanks);
    return block;
}

// The sums of a thread: element i of (band, page) belongs to column
// 128 band + 16 warp + lane / 4 + 8 (i / 2) and to rank 8 page + 2 (lane % 4) + i % 2 of the block.
template <int kPages>
using BandSums = float[kPages][4];

// Returns the address of a block's partial sums. Only an adapter with n > range_rows rows stores
// them. Such an adapter has fewer than 2 n / range_rows ranges, and its first range is at 2
// (slot_begin / range_rows).
template <class T, int kPages>
LX_DEVICE float4* parts_of(const GradientShape& shape, const GradientBlock& block, unsigned tile) {
    const int first = 2 * (block.first_row / shape.range_rows) + block.range;
    const int64_t tiles = int64_t{shape.slices} * shape.groups;
    return shape.partials +
           (first * tiles + tile) * (kGradientBands<T> * kPages * kGradientThreads) +
           lx::thread_rank();
}

__host__ __device__ constexpr int store_row(int pages) {
    return pages * kPageRanks + 1;
}

// Stores a band of results through shared memory, so that adjacent threads write adjacent elements.
template <class T, int kPages>
LX_DEVICE void store_band(const Gradient& args, const GradientBlock& block, int band,
                          const BandSums<kPages>& total, float* columns) {
    constexpr int kRow = store_row(kPages);
    const int lane = lx::lane_id();
    lx::syncthreads();  // `columns` has been read
#pragma unroll
    for (int j = 0; j < kPages; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = lx::warp_id() * 16 + lane / 4 + i / 2 * 8;
            columns[column * kRow + j * kPageRanks + 2 * (lane % 4) + i % 2] = total[j][i];
        }
    }
    lx::syncthreads();
    const int ranks = lx::min(args.max_rank - block.first_rank, kPages * kPageRanks);
    const int first = block.column + band * kGradientBand;
    T* out = static_cast<T*>(args.out) + int64_t{block.slot} * args.max_rank * args.width;
    for (int i = lx::thread_rank(); i < ranks * kGradientBand; i += kGradientThreads) {
        const int column = args.rank_major ? i % kGradientBand : i / ranks;
        const int rank = args.rank_major ? i / kGradientBand : i % ranks;
        if (first + column >= args.width) continue;
        const int64_t at = args.rank_major
                               ? int64_t{block.first_rank + rank} * args.width + first + column
                               : int64_t{first + column} * args.max_rank + block.first_rank + rank;
        // Beyond the adapter's rank the sum is 0 * x, which is NaN if x is not finite.
        out[at] = lx::from_float<T>(rank < block.ranks ? columns[column * kRow + rank] : 0.0f);
    }
}

inline int pages_of(const Gradient& args) {
    return args.max_rank <= 16 ? 2 : 8;
}
// Calls f.template operator()<T, kPages>().
template <class F>
LaunchStatus with_pages(const Gradient& args, F&& f) {
    return with_dtype(args.dtype, [&]<class T>() {
        return pages_of(args) == 2 ? f.template operator()<T, 2>() : f.template operator()<T, 8>();
    });
}

// For each adapter with several ranges, adds their partial sums and stores the gradient.
LaunchStatus add_ranges(const Gradient& args, const GradientShape& shape, void* stream);

}  // namespace lora_ext
