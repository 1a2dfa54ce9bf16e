// Gradients of the adapters as sums over the rows t of each adapter s:
//   db[s] = sum_t dy[t, :]^T v[t, :]            da[s] = sum_t dv[t, :]^T (mask * x[t, :])
// Both are columns of x (or dy) times ranks of v (or dv), contracted over the rows. With kProject
// the same pass over dy also computes
//   dv[t, :] = c * dy[t, :] b[s]                with c = scale[s] / (1 - p)
//
// A block of eight warps has a range of an adapter's rows, a slice of 1024 bytes of columns, and 16
// or 64 ranks. Shared memory has two stages of 32 rows of x and v; cp.async fills one while the
// other is used, and perm is read two steps ahead. A thread then prepares the elements that it
// copied: it applies the dropout mask to x, and splits v into high and low bfloat16. ldmatrix.trans
// transposes both. A warp sums 16 columns of each band of 128, for all ranks, over the whole range.
//   bfloat16   v = high + low, two m16n8k16: 16 bits of v
//   float16    x is exact in tf32, v = high + low in tf32 (with the range of float32), two m16n8k8
//   float32    x and v as high + low in tf32, three products
// The rows of an adapter are divided into ranges of a fixed length, counted from its first row. The
// sum of a range starts at zero, and the ranges are added in order. Each range has a block, and a
// second kernel adds the ranges of each adapter that has several. The bits therefore depend only on
// the rows of the adapter.
//
// For dv (lora_train_weights_project.cuh), the block's columns of B stay in shared memory. In a
// step a warp computes 16 rows and one or two pages of ranks, summed over its slice of the columns.
// The slices are added in order, with the same bits as in lora_train_project.cu. Bound: bytes of x
// or dy, read once.
#include "lora_train_weights_project.cuh"

namespace lora_ext {
namespace {

constexpr int kStages = 2;
constexpr int kRowSlots = 4;  // steps whose row numbers are kept
constexpr int kPieces = kPassBytes / kPieceBytes;
// A thread copies one piece of every fourth row.
constexpr int kRowStep = kGradientThreads / kPieces;
template <int kPages>
constexpr int kStageBytes = kPassStepRows * (kPassRow + v_row_bytes(kPages));

template <class T, int kPages>
using Sums = BandSums<kPages>[kGradientBands<T>];

// Adds the products of 16 rows of a stage to `sums`. `pages` is even.
template <class T, int kPages>
LX_DEVICE void multiply(Sums<T, kPages>& sums, const unsigned char* x, const VTile<T>& v, int row,
                        int pages) {
    const int lane = lx::lane_id(), warp = lx::warp_id();
    const auto has = [&](int page) { return kPages == 2 || page < pages; };
    if constexpr (std::is_same_v<T, lx::bf16>) {
        constexpr int kTogether = lx::min(kPages, 4);  // pages in registers at a time
#pragma unroll
        for (int first = 0; first < kPages; first += kTogether) {
            // ldmatrix loads and transposes high parts of rows 0-7 and 8-15, then low parts.
            uint32_t vf[kTogether][4];
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
                if (has(first + j))
                    lx::ldmatrix_x4_trans(
                        vf[j], v.at(row + lane % 16, first + j) + lane / 16 * kPieceBytes);
#pragma unroll
            for (int m = 0; m < kGradientBands<T>; ++m) {
                if (!has(first)) continue;
                // ldmatrix loads and transposes rows 0-7 of columns 0-7 and 8-15, then rows 8-15
                // of both.
                uint32_t xf[4];
                lx::ldmatrix_x4_trans(
                    xf, x + (row + lane / 16 * 8 + lane % 8) * kPassRow +
                            (m * kBandPieces + 2 * warp + lane / 8 % 2) * kPieceBytes);
#pragma unroll
                for (int j = 0; j < kTogether; ++j)
                    if (has(first + j))
                        lx::mma_m16n8k16<T>(sums[m][first + j], xf, {vf[j][2], vf[j][3]});
#pragma unroll
                for (int j = 0; j < kTogether; ++j)
                    if (has(first + j))
                        lx::mma_m16n8k16<T>(sums[m][first + j], xf, {vf[j][0], vf[j][1]});
            }
        }
    } else {
        // Two steps of eight rows. Lane t passes rows 2t and 2t + 1 as k = t and t + 4 of an mma.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int first = row + 8 * half + 2 * (lane % 4);
            float a[kGradientBands<T>]
                   [4];  // columns g and g + 8 of a band, then the next row of both
            if constexpr (sizeof(T) == 2) {
#pragma unroll
                for (int m = 0; m < kGradientBands<T>; m += 2) {
                    // ldmatrix loads and transposes columns 0-7 and 8-15 of a band, then of the
                    // next.
                    uint32_t xf[4];
                    lx::ldmatrix_x4_trans(
                        xf, x + (row + 8 * half + lane % 8) * kPassRow +
                                ((m + lane / 16) * kBandPieces + 2 * warp + lane / 8 % 2) *
                                    kPieceBytes);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = lx::unpack_floats<T>(xf[i]);
                        a[m + i / 2][i % 2] = pair.x;
                        a[m + i / 2][i % 2 + 2] = pair.y;
                    }
                }
            } else {
#pragma unroll
                for (int m = 0; m < kGradientBands<T>; ++m) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned char* p =
                            x + first * kPassRow +
                            (m * kGradientBand + 16 * warp + 8 * i + lane / 4) * 4;
                        a[m][i] = *reinterpret_cast<const float*>(p);
                        a[m][i + 2] = *reinterpret_cast<const float*>(p + kPassRow);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < kPages; ++j) {
                if (!has(j)) continue;
                const float b[2] = {reinterpret_cast<const float*>(v.at(first, j))[lane / 4],
                                    reinterpret_cast<const float*>(v.at(first + 1, j))[lane / 4]};
#pragma unroll
                for (int m = 0; m < kGradientBands<T>; ++m)
                    mma_floats<sizeof(T) == 2, false>(sums[m][j], a[m], b);
            }
        }
    }
}

// Minimum blocks per multiprocessor. The sums of 64 ranks, and float16, need twice the registers of
// other blocks.
template <class T, int kPages>
constexpr int kBlocks = kPages == 2 && !std::is_same_v<T, lx::f16> ? 2 : 1;

template <class T, int kPages, bool kProject>
__global__ void __launch_bounds__(kGradientThreads, kBlocks<T, kPages>)
    lora_train_weights_kernel(const __grid_constant__ Gradient args,
                              const __grid_constant__ Projection to,
                              const __grid_constant__ Slices slices,
                              const __grid_constant__ GradientShape shape) {
    LX_SHARED(int32_t, row_of, kRowSlots* kPassStepRows);  // its own ring, filled a step before x
    LX_DYN_SHARED(ring);
    GradientBlock block = find_block<T, kPages>(args, shape, blockIdx.x, true);
    const int thread = lx::thread_rank();
    const int first = block.range * shape.range_rows;
    const bool empty = block.num_rows <= first || block.ranks == 0;
    if (empty && block.range > 0) return;  // the block of the first range writes the zeros
    const bool partial = !empty && block.num_rows > shape.range_rows;
    const int num_rows = empty ? 0 : lx::min(block.num_rows - first, shape.range_rows);
    const int32_t* const rows_from = block.rows + first;

    const int pages = (block.ranks + 15) / 16 * 2;
    const int steps = (num_rows + kPassStepRows - 1) / kPassStepRows;
    const T* x = static_cast<const T*>(args.x);
    const Mask mask = mask_of(args.dropout, block.slot, first);
    unsigned char* const factor_b = ring + kStages * kStageBytes<kPages>;

    // A thread copies one piece of every fourth row of x and at most one item (row, page) of v.
    const int piece = thread % kPieces, first_row = thread / kPieces;
    const int column = block.column + piece * kVec<T>;
    const int v_row = thread / kPages, v_page = thread % kPages;
    const int v_ranks = block.ranks - v_page * kPageRanks;
    const bool has_item = v_row < kPassStepRows && v_page < pages;
    const float* const v_from = args.v + block.first_rank + v_page * kPageRanks;
    auto rows_of_step = [&](int step) {
        return lx::min(num_rows - step * kPassStepRows, kPassStepRows);
    };
    auto x_stage = [&](int step) { return ring + step % kStages * kStageBytes<kPages>; };
    auto v_stage = [&](int step) {
        return VTile<T>(x_stage(step) + kPassStepRows * kPassRow, kPages);
    };
    auto numbers = [&](int step) { return row_of + step % kRowSlots * kPassStepRows; };
    auto row_index = [&](int step) {
        const int row = step * kPassStepRows + thread;
        return thread < kPassStepRows && row < num_rows ? lx::load_nc(rows_from + row) : 0;
    };
    auto keep_row_index = [&](int step, int32_t row) {
        if (thread < kPassStepRows) numbers(step)[thread] = row;
    };
    // For a missing row, the index is 0 and the count 0, so that the copy writes zeros.
    const int x_count = lx::min(lx::max(args.width - column, 0), kVec<T>);
    const T* const x_from = x_count > 0 ? x + column : x;
    auto fill = [&](int step) {
        const int rows = rows_of_step(step);
        const int32_t* const from = numbers(step);
        unsigned char* const to_x = x_stage(step) + first_row * kPassRow + piece * kPieceBytes;
        if (shape.x_aligned) {
#pragma unroll
            for (int i = 0; i < kPassStepRows; i += kRowStep)
                lx::cp_async<kPieceBytes>(
                    to_x + i * kPassRow, x_from + from[first_row + i] * args.x_row_stride,
                    first_row + i < rows ? x_count * static_cast<int>(sizeof(T)) : 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kPassStepRows; i += kRowStep)
                copy_piece<T>(to_x + i * kPassRow, x_from + from[first_row + i] * args.x_row_stride,
                              first_row + i < rows ? x_count : 0, false);
        }
        if (has_item)
            v_stage(step).copy(v_row, v_page,
                               v_ranks > 0 ? v_from + from[v_row] * args.v_row_stride : args.v,
                               v_row < rows ? v_ranks : 0, shape.v_aligned);
    };
    auto prepare = [&](int step) {
        const int rows = rows_of_step(step);
        if (!kProject && args.dropout.threshold != 0) {
#pragma unroll 1
            for (int row = first_row; row < rows; row += kRowStep)
                drop_piece<T>(x_stage(step) + row * kPassRow + piece * kPieceBytes, mask,
                              mask.row(step * kPassStepRows + row, numbers(step)[row]), column);
        }
        if (has_item) v_stage(step).split(v_row, v_page);
    };

    for (int s = 0; s < kStages; ++s) keep_row_index(s, row_index(s));
    lx::syncthreads();
    const Ring<kStages> stages{steps};
    stages.fill([&](int step) {
        fill(step);
        if constexpr (kProject)
            fill_factor<T, kPages>(factor_b, to.lora.bank, block, slices.w_aligned);
    });
    Sums<T, kPages> sums = {};
    float factor = 1.0f;
    if (kProject && slices.finished) factor = projection_factor(to, block.slot);
    const bool paired = kProject && ranks_paired(to.out, to.out_row_stride);
    for (int step = 0; step < steps; ++step) {
        const int32_t next_row = row_index(step + kStages);
        stages.consume(step, fill, prepare);
        const int rows = rows_of_step(step);
#pragma unroll
        for (int row = 0; row < kPassStepRows; row += kTileRows)
            if (row < rows) multiply<T, kPages>(sums, x_stage(step), v_stage(step), row, pages);
        if constexpr (kProject) {
            const Projecting<T, kPages> own;
            if (own.row < rows && own.page < pages) {
                float acc[Projecting<T, kPages>::kOwn][4] = {};
                own.multiply(acc, x_stage(step), factor_b);
                own.store(acc, to, slices, block, numbers(step), rows, factor, paired);
            }
        }
        keep_row_index(step + kStages, next_row);
    }
    lx::cp_async_wait_all();

    if (partial) {
        float4* out = parts_of<T, kPages>(
            shape, block, blockIdx.x % static_cast<unsigned>(shape.slices * shape.groups));
#pragma unroll
        for (int m = 0; m < kGradientBands<T>; ++m) {
#pragma unroll
            for (int j = 0; j < kPages; ++j) {
                const float (&s)[4] = sums[m][j];
                if (kPages == 2 || j < pages)
                    out[(m * kPages + j) * kGradientThreads] = {s[0], s[1], s[2], s[3]};
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < kGradientBands<T>; ++m)
            store_band<T, kPages>(args, block, m, sums[m], reinterpret_cast<float*>(ring));
    }
}

int dynamic_bytes(int pages, bool project) {
    const int ring = kStages * kPassStepRows * (kPassRow + v_row_bytes(pages));
    const int factor = project ? kPassBytes / 2 * (pages + 1) * kPieceBytes : 0;
    return lx::max(ring + factor, kGradientBand * store_row(pages) * 4);
}

GradientShape shape_of(const Gradient& args) {
    GradientShape shape{};
    shape.slices = static_cast<int>(ceil_div(args.width * element_size(args.dtype), kPassBytes));
    shape.groups = static_cast<int>(ceil_div(args.max_rank, pages_of(args) * kPageRanks));
    // With 8192 rows and at least eight tiles, there are at least 128 blocks for the 132
    // multiprocessors of an H100. The range is the same for every device, because it determines the
    // order of the sums.
    const int tiles = shape.slices * shape.groups;
    shape.range_rows = tiles >= 32 ? 2048 : tiles >= 16 ? 1024 : 512;
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    shape.perm = layout.perm();
    shape.slot_begin = layout.slot_begin();
    return shape;
}
int64_t part_bytes(const Gradient& args, const GradientShape& shape) {
    if (args.num_tokens <= shape.range_rows) return 0;
    return 2 * (args.num_tokens / shape.range_rows) * shape.slices * shape.groups * pages_of(args) *
           (kPassBytes / element_size(args.dtype) / kGradientBand) * kGradientThreads *
           int64_t{sizeof(float4)};
}

}  // namespace

int64_t gradient_workspace(const Gradient& args) {
    return gradient_takes_gemm(args) ? 0 : part_bytes(args, shape_of(args));
}

int64_t one_pass_workspace(const Gradient& args, const LoraArgs& side_b) {
    return gradient_workspace(args) + slices_bytes(projection_slices(side_b, true, true));
}
bool takes_one_pass(const Gradient& args, const LoraArgs& side_b) {
    return pass_sliced(side_b, true) && args.num_tokens > 0 && args.width > 0 &&
           dynamic_bytes(pages_of(args), true) <= most_dynamic_bytes() &&
           one_pass_workspace(args, side_b) <= kMostParts;
}

LaunchStatus run_gradient(const Gradient& args, void* workspace, void* stream,
                          const Projection* beside) {
    GradientShape shape = shape_of(args);
    const int64_t size = element_size(args.dtype), parts = gradient_workspace(args);
    shape.x_aligned = aligned_16(args.x, {args.x_row_stride}, size);
    shape.v_aligned = aligned_16(args.v, {args.v_row_stride}, 4);
    shape.partials = static_cast<float4*>(workspace);
    const bool gemm = gradient_takes_gemm(args);
    const int64_t tiles = int64_t{shape.slices} * shape.groups;
    const int64_t blocks = tiles * (args.num_tokens / shape.range_rows + args.num_adapters);
    if (blocks == 0) return 0;
    if (!gemm && 4 * blocks > kMaxGridX) return kInvalidValue;

    auto declare = [&] {
        if (args.num_tokens > 0)
            LX_BUF(args.plan, (LoraPlanLayout{args.num_tokens, args.num_adapters}.size()) * 4,
                   lx::Access::kConstant);
        if (args.ranks) LX_BUF(args.ranks, args.num_adapters * 4, lx::Access::kConstant);
    };
    auto declare_out = [&] {
        LX_BUF(args.out, int64_t{args.num_adapters} * args.max_rank * args.width * size,
               lx::Access::kWrite);
    };
    Slices slices{};
    Projection to{};
    if (beside) {
        slices = projection_slices(beside->lora, true, true);
        to = projection_step(*beside, slices, static_cast<char*>(workspace) + parts);
        declare_projection(to, slices, true);
    } else {
        declare();
        LX_BUF_ROWS(args.x, args.num_tokens, args.width * size, args.x_row_stride * size,
                    lx::Access::kConstant);
        declare_seed(args.dropout, args.num_adapters);
    }
    LX_BUF_ROWS(args.v, args.num_tokens, args.max_rank * 4, args.v_row_stride * 4,
                lx::Access::kRead);
    if (parts) LX_BUF(workspace, parts, lx::Access::kWrite);
    declare_out();
    if (gemm) return run_gemm_gradient(args, stream);
    LaunchStatus status = with_pages(args, [&]<class T, int kPages>() -> LaunchStatus {
        const int bytes = dynamic_bytes(kPages, beside != nullptr);
        if constexpr (sizeof(T) == 2) {
            if (beside)
                return LX_LAUNCH((lora_train_weights_kernel<T, kPages, true>),
                                 static_cast<unsigned>(blocks), kGradientThreads, bytes, stream,
                                 args, to, slices, shape);
        }
        return LX_LAUNCH((lora_train_weights_kernel<T, kPages, false>),
                         static_cast<unsigned>(blocks), kGradientThreads, bytes, stream, args, to,
                         slices, shape);
    });
    if (!status && parts) {
        declare();
        LX_BUF(workspace, parts, lx::Access::kRead);
        declare_out();
        status = add_ranges(args, shape, stream);
    }
    return status || !beside ? status : sum_slices(*beside, to, slices, stream);
}

}  // namespace lora_ext
