// Shrink for many rows per adapter: v[t, :] = a[s] x[t, :].
//
// Block (chunk, split, rank group): the 64 or 128 rows of a chunk x split_width in-features x up to
// 64 ranks. Tiles of 128 bytes of each row of x and of each rank of A pass through a ring of four
// stages that cp.async fills; rows past the chunk, ranks past the adapter and in-features past the
// row are filled with zeros and never read. Four warps part the rows; ldmatrix feeds mma. Within a
// stage the 16-byte pieces of row r lie at piece ^ (r % 8), so that neither cp.async nor ldmatrix
// meets a bank twice. Bound: bytes of x, streamed once per 64 ranks.
//
// In units of 16-byte pieces float32 looks like the 16-bit types: a piece is four k instead of
// eight, and two pieces are one mma_step either way.
#include "lora_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kStages = 4;
constexpr int kPieces = 8;               // of a row in a stage
constexpr int kStageRow = kPieces * 16;  // bytes
constexpr int kGroupPages = 8;
constexpr int kGroupRanks = kGroupPages * kPageRanks;

// Ranks that a stage has room for: pages in pairs, as ldmatrix takes them.
constexpr int stage_ranks(int max_rank) {
    const int ranks = max_rank < kGroupRanks ? max_rank : kGroupRanks;
    return (ranks + 15) / 16 * 16;
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads)
    lora_shrink_prefill_kernel(const __grid_constant__ LoraArgs args,
                               const __grid_constant__ Tiling tiling,
                               const __grid_constant__ Partials v, int ranks_per_stage) {
    constexpr int kWarpTiles = kRows / kTileRows / kWarps;
    constexpr int kWidth = kPieces * kVec<T>;  // in-features of a stage
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const T*, page_of, kGroupPages);
    LX_DYN_SHARED(ring);
    const LoraBank& bank = args.bank;
    const int thread = lx::thread_rank(), lane = lx::lane_id(), warp = lx::warp_id();
    const RowTile tile = find_tile<kRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    const int first_page = static_cast<int>(blockIdx.z) * kGroupPages;
    const int ranks = lx::min(tile.rank - first_page * kPageRanks, kGroupRanks);
    if (ranks <= 0) return;
    const int pages = (ranks + kPageRanks - 1) / kPageRanks;
    const int page_pairs = (pages + 1) / 2;
    if (thread < pages) page_of[thread] = a_page<T>(bank, tile.slot, first_page + thread);
    lx::syncthreads();  // row_of, page_of

    const int begin = static_cast<int>(blockIdx.y) * v.split_width;
    const int end = lx::min(begin + v.split_width, bank.in_features);
    const int steps = lx::max(0, (end - begin + kWidth - 1) / kWidth);
    const int stage_bytes = (kRows + ranks_per_stage) * kStageRow;
    const T* x = static_cast<const T*>(args.x);
    const T* a = static_cast<const T*>(bank.a);

    // Every thread copies the same piece of every sixteenth row.
    auto fill = [&](int step) {
        unsigned char* stage = ring + step % kStages * stage_bytes;
        const int piece = thread % kPieces, k = begin + step * kWidth + piece * kVec<T>;
        auto copy = [&](unsigned char* rows, int row, const T* from, bool wanted) {
            lx::cp_async<16>(rows + row * kStageRow + (piece ^ (row % 8)) * 16, from,
                             wanted ? 16 : 0);
        };
#pragma unroll
        for (int i = 0; i < kRows * kPieces / kThreads; ++i) {
            const int row = thread / kPieces + i * (kThreads / kPieces);
            const bool wanted = row < tile.rows && k < end;
            copy(stage, row, wanted ? x + row_of[row] * args.x_row_stride + k : x, wanted);
        }
        for (int row = thread / kPieces; row < page_pairs * 16; row += kThreads / kPieces) {
            const T* page = row < ranks ? page_of[row / kPageRanks] : nullptr;
            const bool wanted = page && k < end;
            copy(stage + kRows * kStageRow, row,
                 wanted ? page + row % kPageRanks * bank.a_row_stride + k : a, wanted);
        }
    };

    float acc[kWarpTiles][kGroupPages][4] = {};
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) fill(s);
        lx::cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        lx::cp_async_wait_group<kStages - 2>();
        lx::syncthreads();  // this stage is complete, and the previous one has been read by all
        if (step + kStages - 1 < steps) fill(step + kStages - 1);
        lx::cp_async_commit();
        const unsigned char* x_rows = ring + step % kStages * stage_bytes;
        const unsigned char* a_rows = x_rows + kRows * kStageRow;
#pragma unroll
        for (int piece = 0; piece < kPieces; piece += 2) {
            uint32_t xf[kWarpTiles][4];
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m) {
                // Matrices: rows 0-7 and 8-15 of the first piece, then of the second.
                const int row = (warp * kWarpTiles + m) * kTileRows + lane % 16;
                lx::ldmatrix_x4(xf[m],
                                x_rows + row * kStageRow + ((piece + lane / 16) ^ (row % 8)) * 16);
            }
#pragma unroll
            for (int p = 0; p < kGroupPages; p += 2) {
                if (p < pages) {
                    // Matrices: both pieces of one page, then of the next.
                    uint32_t af[4];
                    const int row = p * kPageRanks + lane / 16 * 8 + lane % 8;
                    lx::ldmatrix_x4(
                        af, a_rows + row * kStageRow + ((piece + lane / 8 % 2) ^ (row % 8)) * 16);
#pragma unroll
                    for (int m = 0; m < kWarpTiles; ++m) {
                        mma_step<T>(acc[m][p], xf[m], {af[0], af[1]});
                        mma_step<T>(acc[m][p + 1], xf[m], {af[2], af[3]});
                    }
                }
            }
        }
    }
    lx::cp_async_wait_all();

    const float scale = v.scaled && bank.scale ? bank.scale[tile.slot] : 1.0f;
    const bool paired = ranks_paired(v.data, v.row_stride);
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = (warp * kWarpTiles + m) * kTileRows + 8 * h + lane / 4;
            if (row >= tile.rows) continue;
            float* out = v.data + blockIdx.y * v.split_stride + row_of[row] * v.row_stride +
                         first_page * kPageRanks;
#pragma unroll
            for (int p = 0; p < kGroupPages; ++p) {
                const int rank = p * kPageRanks + 2 * (lane % 4);
                store_ranks(out + rank, ranks - rank, paired, scale * acc[m][p][2 * h],
                            scale * acc[m][p][2 * h + 1]);
            }
        }
    }
}

int ring_bytes(int rows, int ranks) {
    return kStages * (rows + ranks) * kStageRow;
}

}  // namespace

LaunchStatus run_shrink_prefill(const LoraArgs& args, const Partials& v, void* stream) {
    const bool gemm = large_rank(args.bank);
    if (!gemm && !shrink_aligned(args)) {
        const Module module{args, v};
        return run_shrink_decode(std::span(&module, 1), stream);
    }
    declare_common(args);
    declare_a(args);
    declare_v(args, v, lx::Access::kWrite);
    if (gemm) return run_gemm_shrink(args, v, stream);
    return with_dtype(args.dtype, [&]<class T>() {
        auto launch = [&]<int kRows>() {
            const dim3 grid(num_tiles(args, kRows), static_cast<unsigned>(v.splits),
                            static_cast<unsigned>(ceil_div(args.bank.max_rank, kGroupRanks)));
            const int ranks = stage_ranks(args.bank.max_rank);
            return LX_LAUNCH((lora_shrink_prefill_kernel<T, kRows>), grid, kThreads,
                             ring_bytes(kRows, ranks), stream, args, tiling(args, kRows), v, ranks);
        };
        const bool wide = lora_chunk_rows(args.num_tokens) == 128 &&
                          ring_bytes(128, stage_ranks(args.bank.max_rank)) <= most_dynamic_bytes();
        return wide ? launch.template operator()<128>() : launch.template operator()<64>();
    });
}

}  // namespace lora_ext
