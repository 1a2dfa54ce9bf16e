// Gradients of adapters of large ranks, sums over the rows t of one adapter:
//   db[s] = sum_t dy[t, :]^T v[t, :]            da[s] = sum_t dv[t, :]^T (mask * x[t, :])
//
// The kernel differs from lora_train_weights_kernel in its tiles, which are so large that
// arithmetic is the bound, as in lora_gemm.cuh. A block has four warps of 64 x 64 and computes 128
// columns of x or dy times 128 ranks of v or dv of one adapter. A stage is 32 rows, gathered
// through the plan. cp.async fills a ring of four stages, and the row numbers are read one stage
// earlier. ldmatrix.trans transposes x to operand A; the floats of v are split into operand B in
// registers:
//   bfloat16   v = high + low, two m16n8k16
//   float16    x is exact in tf32, v = high + low in tf32 (with the range of float32)
//   float32    x and v as high + low in tf32, three products
// Splitting a float into two tf32 needs more registers, so float16 and float32 use 64 columns.
//
// An element is one sum over all rows of the adapter, in order. The choice between this kernel and
// lora_train_weights_kernel depends only on (R, width), so a gradient depends only on its adapter's
// rows.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 128;
constexpr int kRanks = kGemmColumns;
constexpr int kStep = 32;  // rows per stage
constexpr int kStages = 4;
constexpr int kRowSlots = 8;  // stages whose row numbers are kept, at least kStages + 1
constexpr int kTilesN = 8;    // tiles of eight ranks per warp
constexpr int kVPieces = kRanks / 4;
constexpr int kVRow = kVPieces * kPieceBytes;
constexpr int kStoreRow = kRanks + 1;  // floats per row

template <class T>
struct Shape {
    static constexpr bool kTf32 = !std::is_same_v<T, lx::bf16>;
    static constexpr int kColumns = gradient_columns(kTf32);
    static constexpr int kXPieces = kColumns / kVec<T>;
    static constexpr int kXRow = kXPieces * kPieceBytes;
    static constexpr int kStageBytes = kStep * (kXRow + kVRow);
    static constexpr int kRingBytes = kStages * kStageBytes;
    static constexpr int kTilesM = kColumns / 2 / 16;  // tiles of 16 columns per warp
    static constexpr int kUnroll = kTf32 ? 1 : 2;
    using Sums = float[kTilesM][kTilesN][4];
    static_assert(kColumns * kStoreRow * 4 <= kRingBytes && kRingBytes <= 98304);

    // Positions of pieces in a row that avoid bank conflicts: ldmatrix reads 16 bytes of eight rows
    // at once; a load of floats reads 32 bytes of four rows, two rows apart.
    __host__ __device__ static constexpr int x_piece(int row, int piece) {
        return piece ^ (sizeof(T) == 2 ? row % 8 : row & 6);
    }
    __host__ __device__ static constexpr int v_piece(int row, int piece) {
        return piece ^ (row & 6);
    }
};

struct Grid {
    int bands, groups;  // block (adapter, band, group); groups vary fastest, as they share x
    bool x_aligned, v_aligned;
    int64_t perm, slot_begin;  // offsets in the plan
};

LX_DEVICE float float_at(const unsigned char* row, int piece, int element) {
    return reinterpret_cast<const float*>(row + piece * kPieceBytes)[element];
}

// Adds the products of the rows [0, rows) of a stage to `sums`. `rows` is a multiple of sixteen;
// missing rows contain zeros.
template <class T>
LX_DEVICE void multiply(typename Shape<T>::Sums& sums, const unsigned char* x,
                        const unsigned char* v, int rows, int warp_column, int warp_rank) {
    using S = Shape<T>;
    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4;
    const auto v_at = [&](int row, int rank) {
        return float_at(v + row * kVRow, S::v_piece(row, rank / 4), rank % 4);
    };
#pragma unroll(S::kUnroll)
    for (int k = 0; k < kStep; k += 16) {
        if (k >= rows) break;
        uint32_t xf[S::kTilesM][4] = {};
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int m = 0; m < S::kTilesM; ++m) {
                // ldmatrix loads and transposes rows 0-7 of columns 0-7 and 8-15, then rows 8-15
                // of both.
                const int row = k + lane / 16 * 8 + lane % 8;
                const int piece = warp_column / 8 + 2 * m + lane / 8 % 2;
                lx::ldmatrix_x4_trans(xf[m],
                                      x + row * S::kXRow + S::x_piece(row, piece) * kPieceBytes);
            }
        }
        if constexpr (!S::kTf32) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
                const int rank = warp_rank + 8 * j + g;
                uint32_t high[2], low[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = k + 8 * half + 2 * t;
                    const float first = v_at(row, rank), second = v_at(row + 1, rank);
                    high[half] = lx::pack_floats<T>(first, second);
                    const float2 h = lx::unpack_floats<T>(high[half]);
                    low[half] = lx::pack_floats<T>(first - h.x, second - h.y);
                }
#pragma unroll
                for (int m = 0; m < S::kTilesM; ++m) lx::mma_m16n8k16<T>(sums[m][j], xf[m], low);
#pragma unroll
                for (int m = 0; m < S::kTilesM; ++m) lx::mma_m16n8k16<T>(sums[m][j], xf[m], high);
            }
        } else {
            // Two steps of eight rows. Lane t passes rows 2t and 2t + 1 as k = t and t + 4 of an
            // mma.
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = k + 8 * half + 2 * t;
                float a[S::kTilesM][4];
#pragma unroll
                for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {  // columns g and g + 8
                        if constexpr (sizeof(T) == 2) {
                            const float2 pair = lx::unpack_floats<T>(xf[m][2 * half + i]);
                            a[m][i] = pair.x;
                            a[m][i + 2] = pair.y;
                        } else {
                            const int column = warp_column + 16 * m + 8 * i + g;
                            a[m][i] = float_at(x + row * S::kXRow, S::x_piece(row, column / 4),
                                               column % 4);
                            a[m][i + 2] = float_at(x + (row + 1) * S::kXRow,
                                                   S::x_piece(row + 1, column / 4), column % 4);
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) {
                    const int rank = warp_rank + 8 * j + g;
                    const float b[2] = {v_at(row, rank), v_at(row + 1, rank)};
#pragma unroll
                    for (int m = 0; m < S::kTilesM; ++m)
                        mma_floats<sizeof(T) == 2, false>(sums[m][j], a[m], b);
                }
            }
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    lora_gemm_weights_kernel(const __grid_constant__ Gradient args,
                             const __grid_constant__ Grid grid) {
    using S = Shape<T>;
    LX_SHARED(int32_t, row_of, kRowSlots* kStep);
    LX_DYN_SHARED(ring);
    const int thread = lx::thread_rank(), lane = lx::lane_id(), warp = lx::warp_id();
    unsigned index = blockIdx.x;
    const int first_rank = static_cast<int>(index % grid.groups) * kRanks;
    index /= grid.groups;
    const int first_column = static_cast<int>(index % grid.bands) * S::kColumns;
    const int slot = static_cast<int>(index / grid.bands);
    const int rank =
        args.ranks ? lx::min(lx::max(args.ranks[slot], 0), args.max_rank) : args.max_rank;
    // Number of the adapter's ranks in this block.
    const int ranks = lx::min(lx::max(rank - first_rank, 0), kRanks);
    const int columns = lx::min(args.width - first_column, S::kColumns);
    const int32_t* rows = nullptr;
    int num_rows = 0;
    if (args.num_tokens > 0 && ranks > 0) {
        const int32_t* const slot_begin = args.plan + grid.slot_begin + slot;
        num_rows = slot_begin[1] - slot_begin[0];
        rows = args.plan + grid.perm + slot_begin[0];
    }
    const int steps = (num_rows + kStep - 1) / kStep;

    const T* const x = static_cast<const T*>(args.x);
    const int x_piece = thread % S::kXPieces, x_row = thread / S::kXPieces;
    const int column = x_piece * kVec<T>;
    constexpr int kXRowStep = kThreads / S::kXPieces;
    const int fill_ranks = (ranks + 63) / 64 * 64;
    const auto x_stage = [&](int step) { return ring + step % kStages * S::kStageBytes; };
    const auto rows_of_step = [&](int step) { return lx::min(num_rows - step * kStep, kStep); };
    const auto padded = [](int count) { return (count + 15) / 16 * 16; };
    const auto x_at = [&](int step, int row) {
        return x_stage(step) + row * S::kXRow + S::x_piece(row, x_piece) * kPieceBytes;
    };
    const auto row_index = [&](int step) {
        const int row = step * kStep + thread;
        return thread < kStep && row < num_rows ? lx::load_nc(rows + row) : 0;
    };
    const auto keep_row_index = [&](int step, int32_t row) {
        if (thread < kStep) row_of[step % kRowSlots * kStep + thread] = row;
    };
    const auto fill = [&](int step) {
        const int count = rows_of_step(step);
        const int32_t* const from = row_of + step % kRowSlots * kStep;
        for (int row = x_row; row < padded(count); row += kXRowStep) {
            const int n = row < count ? columns - column : 0;
            copy_piece<T>(x_at(step, row),
                          n > 0 ? x + from[row] * args.x_row_stride + first_column + column : x, n,
                          grid.x_aligned);
        }
        unsigned char* const v_stage = x_stage(step) + kStep * S::kXRow;
        if (lane * 4 >= fill_ranks) return;
        for (int row = warp; row < padded(count); row += kThreads / lx::kWarpSize) {
            const int n = row < count ? ranks - lane * 4 : 0;
            copy_piece<float>(
                v_stage + row * kVRow + S::v_piece(row, lane) * kPieceBytes,
                n > 0 ? args.v + from[row] * args.v_row_stride + first_rank + lane * 4 : args.v, n,
                grid.v_aligned);
        }
    };
    // The thread that copied elements of x applies the dropout mask to them.
    const auto drop = [&](int step) {
        if (args.dropout.threshold == 0) return;
        const Mask mask = mask_of(args.dropout, slot, 0);
        const int count = rows_of_step(step);
#pragma unroll 1
        for (int row = x_row; row < count; row += kXRowStep)
            drop_piece<T>(x_at(step, row), mask,
                          mask.row(step * kStep + row, row_of[step % kRowSlots * kStep + row]),
                          first_column + column);
    };

    const int warp_column = warp % 2 * (S::kTilesM * 16), warp_rank = warp / 2 * (kTilesN * 8);
    const bool active = warp_column < columns && warp_rank < ranks;
    for (int s = 0; s < kStages; ++s) keep_row_index(s, row_index(s));
    lx::syncthreads();
    const Ring<kStages> stages{steps};
    stages.fill(fill);
    typename S::Sums sums = {};
    for (int step = 0; step < steps; ++step) {
        const int32_t next_row = row_index(step + kStages);
        stages.consume(step, fill, drop);
        if (active)
            multiply<T>(sums, x_stage(step), x_stage(step) + kStep * S::kXRow,
                        padded(rows_of_step(step)), warp_column, warp_rank);
        keep_row_index(step + kStages, next_row);
    }
    lx::cp_async_wait_all();
    lx::syncthreads();  // the ring has been read

    // The result is stored through shared memory, so that neighbouring threads write neighbouring
    // elements.
    float* const delta = reinterpret_cast<float*>(ring);
    if (active) {
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    delta[(warp_column + 16 * m + lane / 4 + i / 2 * 8) * kStoreRow + warp_rank +
                          8 * j + 2 * (lane % 4) + i % 2] = sums[m][j][i];
            }
        }
    }
    lx::syncthreads();
    const int all_ranks = lx::min(args.max_rank - first_rank, kRanks);
    T* const out = static_cast<T*>(args.out) + int64_t{slot} * args.max_rank * args.width;
    for (int i = thread; i < all_ranks * columns; i += kThreads) {
        const int at_column = args.rank_major ? i % columns : i / all_ranks;
        const int at_rank = args.rank_major ? i / columns : i % all_ranks;
        const int64_t at =
            args.rank_major
                ? int64_t{first_rank + at_rank} * args.width + first_column + at_column
                : int64_t{first_column + at_column} * args.max_rank + first_rank + at_rank;
        // Gradients beyond the adapter's rank are zero.
        out[at] =
            lx::from_float<T>(at_rank < ranks ? delta[at_column * kStoreRow + at_rank] : 0.0f);
    }
}

}  // namespace

LaunchStatus run_gemm_gradient(const Gradient& args, void* stream) {
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    Grid grid{};
    grid.groups = static_cast<int>(ceil_div(args.max_rank, kRanks));
    grid.x_aligned = aligned_16(args.x, {args.x_row_stride}, element_size(args.dtype));
    grid.v_aligned = aligned_16(args.v, {args.v_row_stride}, 4);
    grid.perm = layout.perm();
    grid.slot_begin = layout.slot_begin();
    return with_dtype(args.dtype, [&]<class T>() {
        grid.bands = static_cast<int>(ceil_div(args.width, Shape<T>::kColumns));
        const int64_t blocks = int64_t{grid.bands} * grid.groups * args.num_adapters;
        if (blocks > kMaxGridX) return kInvalidValue;
        return LX_LAUNCH(lora_gemm_weights_kernel<T>, static_cast<unsigned>(blocks), kThreads,
                         Shape<T>::kRingBytes, stream, args, grid);
    });
}

}  // namespace lora_ext
