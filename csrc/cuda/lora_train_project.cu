// The projections to the ranks, with c = scale[s] / (1 - p):
//   side A:  v[t, :]  = c * a[s] (mask * x[t, :])      lora_shrink.cu
//   side B:  dv[t, :] = c * dy[t, :] b[s]              here
//
// As in lora_shrink_kernel, a block computes 64 ranks of a row tile over one or all slices.
// cp.async fills a ring of four stages with 128 bytes of each row and the same outputs of each page
// of B. The differences are:
// * Pages of B contain eight ranks of one output side by side; ldmatrix.trans transposes them.
// * The outputs are divided into slices of fixed width. The sum of a slice starts at zero, and the
//   slices are added in order. Either one block iterates over all slices of its rows, or each slice
//   has a block and a second kernel adds the slices.
//   dv therefore does not depend on the number of rows, and no gradient depends on the other rows
//   of the batch.
// Bound: bytes of dy, streamed once per 64 ranks.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kStages = 4;
constexpr int kPieces = 8;                              // pieces of a row per stage
constexpr int kStageRow = (kPieces + 1) * kPieceBytes;  // odd number of pieces: no bank conflicts
// Bytes of a page: 1024, plus 64 so that reads of a pair of pages have no bank conflict.
constexpr int kStagePage = kPieces * 128 + 64;
constexpr int kGroupPages = 8;

template <class T, int kRows>
__global__ void __launch_bounds__(kRows * 2, 2)
    lora_train_project_kernel(const __grid_constant__ Projection args,
                              const __grid_constant__ Tiling tiling,
                              const __grid_constant__ Slices slices) {
    constexpr int kThreads = kRows * 2;        // a warp per 16 rows
    constexpr int kWidth = kPieces * kVec<T>;  // columns of dy per stage
    LX_SHARED(int32_t, row_of, kRows);
    LX_DYN_SHARED(ring);
    const LoraArgs& lora = args.lora;
    const LoraBank& bank = lora.bank;
    const int thread = lx::thread_rank(), lane = lx::lane_id(), warp = lx::warp_id();
    const RowTile tile = find_tile<kRows>(lora, tiling, static_cast<int>(blockIdx.x), row_of);
    const int first_page = static_cast<int>(blockIdx.z) * kGroupPages;
    const int ranks = lx::min(tile.rank - first_page * kPageRanks, kProjectedRanks);
    if (ranks <= 0) return;
    const int pages = (ranks + kPageRanks - 1) / kPageRanks;
    const int page_pairs = (pages + 1) / 2;
    const int fill_rows = (tile.rows + kTileRows - 1) / kTileRows * kTileRows;
    lx::syncthreads();  // row_of is complete

    const int begin = static_cast<int>(blockIdx.y) * slices.per_block * slices.width;
    const int end = static_cast<int>(lx::min<int64_t>(
        int64_t{begin} + int64_t{slices.per_block} * slices.width, bank.out_features));
    const int steps = lx::max(0, (end - begin + kWidth - 1) / kWidth);
    const int stage_bytes = (kRows + slices.ranks_per_stage) * kStageRow;
    const T* x = static_cast<const T*>(lora.x);
    const T* w = b_page<T>(bank, tile.slot, first_page);

    // Every thread copies the same piece of every (kThreads / 8)-th row.
    const int piece = thread % kPieces, first_row = thread / kPieces;
    constexpr int kRowStep = kThreads / kPieces;
    auto x_piece = [&](int step, int row) {
        return ring + step % kStages * stage_bytes + row * kStageRow + piece * kPieceBytes;
    };
    auto fill = [&](int step) {
        const int k0 = begin + step * kWidth, k = k0 + piece * kVec<T>;
        for (int row = first_row; row < fill_rows; row += kRowStep) {
            const int n = row < tile.rows ? end - k : 0;
            copy_piece<T>(x_piece(step, row), n > 0 ? x + row_of[row] * lora.x_row_stride + k : x,
                          n, slices.x_aligned);
        }
        unsigned char* const w_stage = ring + step % kStages * stage_bytes + kRows * kStageRow;
        // A page of the stage has kWidth outputs of 8 ranks, in one piece per output (float32:
        // two). Neighbouring lanes read an output's ranks in two pages adjacent in memory.
        constexpr int kPerRow = kPageRanks / kVec<T>, kPairPieces = 2 * kWidth * kPerRow;
        for (int i = thread; i < page_pairs * kPairPieces; i += kThreads) {
            const int row = i % kPairPieces / (2 * kPerRow), at = i % (2 * kPerRow);
            const int page = i / kPairPieces * 2 + at / kPerRow, part = at % kPerRow;
            const int rank = page * kPageRanks + part * kVec<T>, output = k0 + row;
            // Whole page rows may contain ranks past the adapter's, whose sums are not stored.
            int n = lx::min(ranks - rank, kPageRanks);
            if (n > 0 && slices.w_aligned) n = kVec<T>;
            if (output >= end) n = 0;
            copy_piece<T>(w_stage + page * kStagePage + (row * kPerRow + part) * kPieceBytes,
                          n > 0 ? w + page * bank.b_page_stride + output * bank.b_row_stride +
                                      rank % kPageRanks
                                : static_cast<const T*>(bank.b),
                          n, slices.w_aligned);
        }
    };

    float acc[kGroupPages][4] = {}, total[kGroupPages][4] = {};
    const Ring<kStages> stages{steps};
    stages.fill(fill);
    const bool has_rows = warp * kTileRows < tile.rows;
    const int steps_per_slice = slices.width / kWidth;
    for (int step = 0; step < steps; ++step) {
        stages.consume(step, fill);
        if (!has_rows) continue;
        const unsigned char* x_stage = ring + step % kStages * stage_bytes;
        const unsigned char* w_stage = x_stage + kRows * kStageRow;
#pragma unroll
        for (int p = 0; p < kPieces; p += 2) {
            // ldmatrix loads rows 0-7 and 8-15 of the first piece, then of the second.
            uint32_t xf[4];
            lx::ldmatrix_x4(xf, x_stage + (warp * kTileRows + lane % 16) * kStageRow +
                                    (p + lane / 16) * kPieceBytes);
#pragma unroll
            for (int page = 0; page < kGroupPages; page += 2) {
                if (page >= pages) continue;
                // ldmatrix, or the loads of float32, load k of both pieces of one page, then of the
                // next.
                uint32_t wf[4];
                if constexpr (sizeof(T) == 2) {
                    lx::ldmatrix_x4_trans(wf, w_stage + (page + lane / 16) * kStagePage +
                                                  (p * kVec<T> + lane % 16) * kPieceBytes);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int output = (p + i % 2) * kVec<T> + lane % 4;
                        wf[i] = reinterpret_cast<const uint32_t*>(
                            w_stage + (page + i / 2) * kStagePage)[output * kPageRanks + lane / 4];
                    }
                }
                mma_step<T>(acc[page], xf, {wf[0], wf[1]});
                mma_step<T>(acc[page + 1], xf, {wf[2], wf[3]});
            }
        }
        if ((step + 1) % steps_per_slice == 0 || step + 1 == steps) {
#pragma unroll
            for (int page = 0; page < kGroupPages; ++page) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[page][i] += acc[page][i];
                    acc[page][i] = 0;
                }
            }
        }
    }
    lx::cp_async_wait_all();

    const float factor = slices.finished ? projection_factor(args, tile.slot) : 1.0f;
    const bool paired = ranks_paired(args.out, args.out_row_stride);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp * kTileRows + 8 * h + lane / 4;
        if (row >= tile.rows) continue;
        float* out = args.out + blockIdx.y * slices.split_stride +
                     row_of[row] * args.out_row_stride + first_page * kPageRanks;
#pragma unroll
        for (int page = 0; page < kGroupPages; ++page) {
            const int rank = page * kPageRanks + 2 * (lane % 4);
            store_ranks(out + rank, ranks - rank, paired, factor * total[page][2 * h],
                        factor * total[page][2 * h + 1]);
        }
    }
}

// Computes out[t, j] = c * (sum of the slices, in order).
__global__ void __launch_bounds__(128)
    lora_train_project_reduce_kernel(const __grid_constant__ Projection args,
                                     const __grid_constant__ Tiling tiling, const float* partials,
                                     int64_t row_stride, int64_t split_stride, int splits) {
    LX_SHARED(int32_t, row_of, kTileRows);
    const RowTile tile =
        find_tile<kTileRows>(args.lora, tiling, static_cast<int>(blockIdx.x), row_of);
    if (tile.rank == 0) return;
    lx::syncthreads();  // row_of is complete
    const float factor = projection_factor(args, tile.slot);
    for (int i = lx::thread_rank(); i < tile.rows * tile.rank; i += 128) {
        const int64_t row = row_of[i / tile.rank];
        const int rank = i % tile.rank;
        const float* p = partials + row * row_stride + rank;
        float sum = 0;
        for (int s = 0; s < splits; ++s) sum += p[s * split_stride];
        args.out[row * args.out_row_stride + rank] = factor * sum;
    }
}

int ring_bytes(int rows, int ranks) {
    return kStages * (rows + ranks) * kStageRow;
}

template <class T, int kRows>
LaunchStatus launch(const Projection& args, const Slices& slices, void* stream) {
    const LoraArgs& lora = args.lora;
    const dim3 grid(num_tiles(lora, kRows), static_cast<unsigned>(slices.count / slices.per_block),
                    static_cast<unsigned>(ceil_div(lora.bank.max_rank, kProjectedRanks)));
    return LX_LAUNCH((lora_train_project_kernel<T, kRows>), grid, kRows * 2,
                     ring_bytes(kRows, slices.ranks_per_stage), stream, args, tiling(lora, kRows),
                     slices);
}

}  // namespace

// A slice's width depends only on the side, the length of the sum, the largest rank and the dtype.
Slices projection_slices(const LoraArgs& args, bool side_b, bool in_pass) {
    const LoraBank& bank = args.bank;
    const int64_t features = side_b ? bank.out_features : bank.in_features;
    const int64_t size = element_size(args.dtype);
    Slices s{};
    s.width = static_cast<int>(lx::max<int64_t>(1024, ceil_div(ceil_div(features, 16), 64) * 64));
    if (pass_sliced(args, side_b)) s.width = pass_slice(bank.max_rank);
    if (!side_b && !large_rank(bank)) s.width = sum_order(features).width;
    s.count = static_cast<int>(lx::max<int64_t>(1, ceil_div(features, s.width)));
    int64_t tiles = ceil_div(args.num_tokens, lora_chunk_rows(args.num_tokens));
    if (takes_gemm(args)) {
        tiles *= ceil_div(bank.max_rank, kGemmColumns);
    } else if (!side_b) {  // lora_shrink.cu loops over slices in tiles of 64 rows
        tiles *= lx::max(1, lora_chunk_rows(args.num_tokens) / kTrainRows) *
                 ceil_div(bank.max_rank, kProjectedRanks);
    }
    // A block loops over all slices of its rows if each multiprocessor still has two blocks then.
    const bool walk = s.count == 1 || (!in_pass && tiles >= 2 * lx::max(1, lx::multiprocessors()));
    s.per_block = walk ? s.count : 1;
    s.finished = walk;
    s.split_stride = walk ? 0 : args.num_tokens * kPageRanks * bank.pages_per_slot;
    s.x_aligned = aligned_16(args.x, {args.x_row_stride}, size);
    s.w_aligned =
        side_b
            ? bank.full_pages &&
                  aligned_16(bank.b, {bank.b_slot_stride, bank.b_page_stride, bank.b_row_stride},
                             size)
            : aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, size);
    s.ranks_per_stage =
        static_cast<int>(ceil_div(lx::min(bank.max_rank, kProjectedRanks), 16)) * 16;
    return s;
}

int64_t slices_bytes(const Slices& slices) {
    return slices.finished ? 0 : slices.count * slices.split_stride * int64_t{sizeof(float)};
}
int64_t projection_workspace(const LoraArgs& args, bool side_b) {
    return slices_bytes(projection_slices(args, side_b));
}

Projection projection_step(const Projection& args, const Slices& slices, void* workspace) {
    Projection step = args;
    if (!slices.finished) {
        step.out = static_cast<float*>(workspace);
        step.out_row_stride = int64_t{kPageRanks} * args.lora.bank.pages_per_slot;
    }
    return step;
}

namespace {
void declare_slices([[maybe_unused]] const Projection& step, const Slices& slices,
                    [[maybe_unused]] lx::Access access) {
    const LoraArgs& lora = step.lora;
    // Partial sums are read in whole pages.
    [[maybe_unused]] const int64_t ranks =
        access == lx::Access::kRead ? step.out_row_stride : lora.bank.max_rank;
    for (int s = 0; s < slices.count / slices.per_block; ++s)
        LX_BUF_ROWS(step.out + s * slices.split_stride, lora.num_tokens, ranks * 4,
                    step.out_row_stride * 4, access);
}
}  // namespace

void declare_projection(const Projection& step, const Slices& slices, bool side_b) {
    const LoraArgs& lora = step.lora;
    [[maybe_unused]] const int64_t size = element_size(lora.dtype);
    declare_common(lora);
    if (side_b) {
        LX_BUF_ROWS(lora.x, lora.num_tokens, lora.bank.out_features * size,
                    lora.x_row_stride * size, lx::Access::kConstant);
        declare_b(lora);
    } else {
        declare_a(lora);
        declare_seed(step.dropout, lora.bank.num_adapters);
    }
    declare_slices(step, slices, lx::Access::kWrite);
}

LaunchStatus sum_slices(const Projection& args, const Projection& step, const Slices& slices,
                        void* stream) {
    if (slices.finished) return 0;
    const LoraArgs& lora = args.lora;
    declare_common(lora);
    declare_slices(step, slices, lx::Access::kRead);
    LX_BUF_ROWS(args.out, lora.num_tokens, lora.bank.max_rank * 4, args.out_row_stride * 4,
                lx::Access::kWrite);
    if (large_rank(lora.bank)) {
        LoraArgs sum = lora;
        sum.v = args.out;
        sum.v_row_stride = args.out_row_stride;
        const Partials partials{step.out,     step.out_row_stride, slices.split_stride,
                                slices.count, slices.width,        lora.bank.max_rank,
                                false};
        return run_gemm_reduce(sum, partials, args.dropout.inverse_keep, false, stream);
    }
    return LX_LAUNCH(lora_train_project_reduce_kernel, num_tiles(lora, kTileRows), 128, 0, stream,
                     args, tiling(lora, kTileRows), step.out, step.out_row_stride,
                     slices.split_stride, slices.count);
}

LaunchStatus run_projection(const Projection& args, bool side_b, void* workspace, void* stream) {
    const LoraArgs& lora = args.lora;
    const Slices slices = projection_slices(lora, side_b);
    const Projection step = projection_step(args, slices, workspace);
    LaunchStatus status = 0;
    if (!side_b) {
        status = run_shrink_rows(step, slices, stream);
    } else {
        declare_projection(step, slices, true);
        status = with_dtype(lora.dtype, [&]<class T>() {
            if (takes_gemm(lora)) return run_gemm_projection(step, true, slices, stream);
            // The ring of 128 rows may exceed the shared memory per block of some devices.
            const bool wide = lora_chunk_rows(lora.num_tokens) == 128 &&
                              ring_bytes(128, slices.ranks_per_stage) <= most_dynamic_bytes();
            return wide ? launch<T, 128>(step, slices, stream)
                        : launch<T, 64>(step, slices, stream);
        });
    }
    return status ? status : sum_slices(args, step, slices, stream);
}

}  // namespace lora_ext
