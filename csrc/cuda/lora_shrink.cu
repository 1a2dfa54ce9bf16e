// Shrink for many rows per adapter, and for training: v[t, :] = c a[s] (mask * x[t, :]), where s is
// the adapter of row t, and c is scale[s] / (1 - p) if this kernel completes the sum of the row,
// otherwise 1.
//
// A block computes 64 ranks of 64 or 128 rows, over one slice of the in-features, or over all
// slices one after another. 128 bytes of each row of x and of each rank of A pass through a ring of
// four stages filled by cp.async. For rows past the tile, ranks past the adapter's and in-features
// past the end of a row, the ring is filled with zeros and global memory is not read. Four warps
// divide the rows. Bound: bytes of x, streamed once per 64 ranks.
//
// A row of v has the same bits as in lora_shrink_decode.cu, in any batch (see sum_order):
// * a lane reads 16 bytes of a row of x or of A as mma operands, as decode does from global memory.
//   In odd rows, pieces i and i + 4 are swapped, so that eight lanes that read at the same time,
//   from two rows, have no bank conflict;
// * a segment is one chain of mma; segments are added in order, and so are slices.
// The thread that copied a piece also applies the mask, before the barrier that makes the piece
// visible to the other threads. Philox is called once for every four elements, and no call is
// repeated.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kStages = 4;
constexpr int kPieces = 8;  // pieces of 16 bytes per row and stage
constexpr int kStageRow = kPieces * kPieceBytes;
constexpr int kGroupPages = 8;

LX_DEVICE int place_of(int row, int piece) {
    return row * kStageRow + (piece ^ row % 2 * 4) * kPieceBytes;
}

// kWalk: the block computes all slices of a row, one after another; otherwise only one slice.
template <class T, int kRows, bool kWalk>
__global__ void __launch_bounds__(kThreads, 2)
    lora_shrink_kernel(const __grid_constant__ Projection args,
                       const __grid_constant__ Tiling tiling,
                       const __grid_constant__ Slices slices) {
    constexpr int kWarpTiles = kRows / kTileRows / kWarps;
    constexpr int kWidth = kPieces * kVec<T>;  // in-features per stage
    constexpr int kRowStep = kThreads / kPieces;
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const T*, page_of, kGroupPages);
    LX_DYN_SHARED(ring);
    const LoraArgs& lora = args.lora;
    const LoraBank& bank = lora.bank;
    const int thread = lx::thread_rank(), lane = lx::lane_id(), warp = lx::warp_id();
    const RowTile tile = find_tile<kRows>(lora, tiling, static_cast<int>(blockIdx.x), row_of);
    const int first_page = static_cast<int>(blockIdx.z) * kGroupPages;
    const int ranks = lx::min(tile.rank - first_page * kPageRanks, kProjectedRanks);
    if (ranks <= 0) return;
    const int pages = (ranks + kPageRanks - 1) / kPageRanks;
    if (thread < pages) page_of[thread] = a_page<T>(bank, tile.slot, first_page + thread);
    lx::syncthreads();  // row_of and page_of are complete

    const int begin = static_cast<int>(blockIdx.y) * slices.per_block * slices.width;
    const int end = kWalk ? bank.in_features : lx::min(begin + slices.width, bank.in_features);
    const int steps = lx::max(0, (end - begin + kWidth - 1) / kWidth);
    const int stage_bytes = (kRows + slices.ranks_per_stage) * kStageRow;
    const T* x = static_cast<const T*>(lora.x);
    const T* a = static_cast<const T*>(bank.a);
    const Mask mask = mask_of(args.dropout, lora, tiling, tile);

    // Every thread copies the same piece of every sixteenth row.
    const int piece = thread % kPieces, first_row = thread / kPieces;
    const auto fill = [&](int step) {
        unsigned char* const stage = ring + step % kStages * stage_bytes;
        const int k = begin + step * kWidth + piece * kVec<T>, n = end - k;
        const auto copy_x = [&](int row, bool aligned) {
            const bool wanted = row < tile.rows && n > 0;
            copy_piece<T>(stage + place_of(row, piece),
                          wanted ? x + row_of[row] * lora.x_row_stride + k : x, wanted ? n : 0,
                          aligned);
        };
        if (slices.x_aligned) {
#pragma unroll
            for (int i = 0; i < kRows / kRowStep; ++i) copy_x(first_row + i * kRowStep, true);
        } else {
#pragma unroll 1
            for (int row = first_row; row < kRows; row += kRowStep) copy_x(row, false);
        }
        for (int row = first_row; row < pages * kPageRanks; row += kRowStep) {
            const T* const page = row < ranks ? page_of[row / kPageRanks] : nullptr;
            const bool wanted = page && n > 0;
            copy_piece<T>(stage + kRows * kStageRow + place_of(row, piece),
                          wanted ? page + row % kPageRanks * bank.a_row_stride + k : a,
                          wanted ? n : 0, slices.w_aligned);
        }
    };
    const auto drop = [&](int step) {
        if (args.dropout.threshold == 0) return;
        unsigned char* const stage = ring + step % kStages * stage_bytes;
        const int k = begin + step * kWidth + piece * kVec<T>;
#pragma unroll 1
        for (int row = first_row; row < tile.rows; row += kRowStep)
            drop_piece<T>(stage + place_of(row, piece), mask, mask.row(row, row_of[row]), k);
    };

    using Sums = float[kWarpTiles][kGroupPages][4];
    Sums acc = {}, slice_sum = {}, total = {};
    const auto add = [&](Sums& to, Sums& from) {
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
            for (int p = 0; p < kGroupPages; ++p) {
#pragma unroll
                for (int i = 0; i < 4; ++i) to[m][p][i] += from[m][p][i], from[m][p][i] = 0;
            }
        }
    };
    const Ring<kStages> stages{steps};
    stages.fill(fill);
    const bool has_rows = warp * kWarpTiles * kTileRows < tile.rows;
    const int per_slice = slices.width / kWidth, per_segment = per_slice / kSliceSegments;
    for (int step = 0; step < steps; ++step) {
        stages.consume(step, fill, drop);
        if (!has_rows) continue;
        const unsigned char* const x_rows = ring + step % kStages * stage_bytes;
        const unsigned char* const a_rows = x_rows + kRows * kStageRow;
        const auto words = [&](const unsigned char* rows, int row, int half) {
            return *reinterpret_cast<const uint4*>(rows + place_of(row, 4 * half + lane % 4));
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 low[kWarpTiles], high[kWarpTiles];
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m) {
                const int row = (warp * kWarpTiles + m) * kTileRows + lane / 4;
                low[m] = words(x_rows, row, half);
                high[m] = words(x_rows, row + 8, half);
            }
#pragma unroll
            for (int p = 0; p < kGroupPages; ++p) {
                if (p < pages) {
                    const uint4 af = words(a_rows, p * kPageRanks + lane / 4, half);
#pragma unroll
                    for (int m = 0; m < kWarpTiles; ++m)
                        mma_words<T>(acc[m][p], low[m], high[m], af);
                }
            }
        }
        const bool last = step + 1 == steps;
        if (last || (step + 1) % per_segment == 0) add(slice_sum, acc);
        if (kWalk && (last || (step + 1) % per_slice == 0)) add(total, slice_sum);
    }
    lx::cp_async_wait_all();

    const float factor = slices.finished ? projection_factor(args, tile.slot) : 1.0f;
    const Sums& sums = kWalk ? total : slice_sum;
    const bool paired = ranks_paired(args.out, args.out_row_stride);
    bool here[kGroupPages];  // sums of an absent page are set to 0: they are NaN if x is inf
#pragma unroll
    for (int p = 0; p < kGroupPages; ++p) here[p] = p < pages && page_of[p];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = (warp * kWarpTiles + m) * kTileRows + 8 * h + lane / 4;
            if (row >= tile.rows) continue;
            float* const out = args.out + blockIdx.y * slices.split_stride +
                               row_of[row] * args.out_row_stride + first_page * kPageRanks;
#pragma unroll
            for (int p = 0; p < kGroupPages; ++p) {
                const int rank = p * kPageRanks + 2 * (lane % 4);
                const float first = here[p] ? factor * sums[m][p][2 * h] : 0.0f;
                const float second = here[p] ? factor * sums[m][p][2 * h + 1] : 0.0f;
                store_ranks(out + rank, ranks - rank, paired, first, second);
            }
        }
    }
}

int ring_bytes(int rows, int ranks) {
    return kStages * (rows + ranks) * kStageRow;
}

template <class T, int kRows, bool kWalk>
LaunchStatus launch(const Projection& args, const Slices& slices, void* stream) {
    const LoraArgs& lora = args.lora;
    const dim3 grid(num_tiles(lora, kRows), static_cast<unsigned>(slices.count / slices.per_block),
                    static_cast<unsigned>(ceil_div(lora.bank.max_rank, kProjectedRanks)));
    return LX_LAUNCH((lora_shrink_kernel<T, kRows, kWalk>), grid, kThreads,
                     ring_bytes(kRows, slices.ranks_per_stage), stream, args, tiling(lora, kRows),
                     slices);
}

}  // namespace

LaunchStatus run_shrink_rows(const Projection& args, const Slices& slices, void* stream) {
    declare_projection(args, slices, false);
    const LoraArgs& lora = args.lora;
    if (large_rank(lora.bank)) return run_gemm_projection(args, false, slices, stream);
    return with_dtype(lora.dtype, [&]<class T>() {
        // 128 rows need too many registers with three sums per element, in float32 even with two.
        if (slices.per_block > 1) return launch<T, 64, true>(args, slices, stream);
        if constexpr (sizeof(T) == 2) {
            const bool wide = lora_chunk_rows(lora.num_tokens) == 128 &&
                              ring_bytes(128, slices.ranks_per_stage) <= most_dynamic_bytes();
            if (wide) return launch<T, 128, false>(args, slices, stream);
        }
        return launch<T, 64, false>(args, slices, stream);
    });
}

}  // namespace lora_ext
