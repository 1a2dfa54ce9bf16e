// Gradients of the adapters, sums over the rows t of one adapter alone:
//   db[s] = sum_t dy[t, :]^T v[t, :]            da[s] = sum_t dv[t, :]^T (mask * x[t, :])
// Both are columns of x (or dy) times ranks of v (or dv), with the rows as contraction.
//
// Block (adapter or range of its rows, band of 256 bytes of columns, 64 ranks), eight warps of 16
// columns each (float32: four, twice over the pages). A ring of three stages of 64 rows of x and v;
// cp.async fills it, perm is read three steps ahead. A thread then prepares what it copied itself:
// it drops elements of x, and parts v into high and low bfloat16. ldmatrix.trans turns both.
//   bfloat16   v = high + low, two m16n8k16: 16 bits of v
//   float16    as floats, exact in tf32; v = high + low in tf32, two m16n8k8: any size of v
//   float32    three tf32 products of parts
// The rows of an adapter are summed in ranges of 1024 (above rank 16: 2048) counted from its first,
// each range from zero, the ranges in order. One block walks over all of them, or, if there are
// enough rows and room for partial sums, each has a block and a second kernel adds those of
// adapters with several. The bits are the same, and depend on the adapter's own rows alone. Bound:
// bytes of x (dy), streamed once per 64 ranks.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;
constexpr int kGroupPages = 8;
constexpr int kGroupRanks = kGroupPages * kPageRanks;
constexpr int64_t kMostPartials = 64 << 20;  // bytes

template <class T>
constexpr int kWarpsM = kBandColumns<T> / 16;  // along the columns; the others part the pages
template <class T>
constexpr int kWarpsN = kWarps / kWarpsM<T>;
template <class T>
constexpr int kWarpPages = kGroupPages / kWarpsN<T>;

struct Shape {
    int bands, groups, pages;  // pages: of a group, at most
    int range_rows, ranges;    // ranges: blocks for all adapters together; 0: one per adapter
    bool x_aligned, v_aligned;
    int64_t perm, slot_begin;  // in the plan
    float4* partials;
};

// What a block of either kernel is about.
struct Block {
    int slot, range, first_rank, ranks, column;  // ranks that the adapter has here; first column
    const int32_t* rows;
    int num_rows;
};

// Range `index` of all: slot s owns those from slot_begin[s] / range_rows + s on, which leaves each
// of its ceil(n / range_rows) ranges a number of its own. The warp searches 32 slots at a time.
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

template <class T>
LX_DEVICE Block find_block(const Gradient& args, const Shape& shape, bool split) {
    unsigned index = blockIdx.x;
    Block block{};
    block.first_rank = static_cast<int>(index % shape.groups) * shape.pages * kPageRanks;
    index /= shape.groups;
    block.column = static_cast<int>(index % shape.bands) * kBandColumns<T>;
    block.slot = static_cast<int>(index / shape.bands);
    if (args.num_tokens > 0) {
        const int32_t* slot_begin = args.plan + shape.slot_begin;
        if (split) {
            const int range = block.slot;
            block.slot = slot_of_range(slot_begin, shape.range_rows, args.num_adapters, range);
            block.range = range - (slot_begin[block.slot] / shape.range_rows + block.slot);
        }
        const int first = slot_begin[block.slot];
        block.num_rows = slot_begin[block.slot + 1] - first;
        block.rows = args.plan + shape.perm + first;
    }
    const int rank =
        args.ranks ? lx::min(lx::max(args.ranks[block.slot], 0), args.max_rank) : args.max_rank;
    block.ranks = lx::min(lx::max(rank - block.first_rank, 0), shape.pages * kPageRanks);
    return block;
}

// The sums of a thread: element i of page j belongs to column 16 m + lane / 4 + 8 (i / 2) of the
// band and to rank 8 page + 2 (lane % 4) + i % 2, m = warp % kWarpsM, page = j kWarpsN + warp /
// kWarpsM.
template <class T>
using Sums = float[kWarpPages<T>][4];

template <class T>
LX_DEVICE int page_of(int j) {
    return j * kWarpsN<T> + lx::warp_id() / kWarpsM<T>;
}

// Through shared memory, so that neighbouring threads write neighbouring elements.
template <class T>
LX_DEVICE void store(const Gradient& args, const Block& block, int pages, const Sums<T>& total,
                     float* columns) {
    constexpr int kRow = kGroupRanks + 1;
    const int lane = lx::lane_id();
#pragma unroll
    for (int j = 0; j < kWarpPages<T>; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = lx::warp_id() % kWarpsM<T> * 16 + lane / 4 + i / 2 * 8;
            columns[column * kRow + page_of<T>(j) * kPageRanks + 2 * (lane % 4) + i % 2] =
                total[j][i];
        }
    }
    lx::syncthreads();
    const int ranks = lx::min(args.max_rank - block.first_rank, pages * kPageRanks);
    T* out = static_cast<T*>(args.out) + int64_t{block.slot} * args.max_rank * args.width;
    for (int i = lx::thread_rank(); i < ranks * kBandColumns<T>; i += kThreads) {
        const int column = args.rank_major ? i % kBandColumns<T> : i / ranks;
        const int rank = args.rank_major ? i / kBandColumns<T> : i % ranks;
        if (block.column + column >= args.width) continue;
        const int64_t at =
            args.rank_major
                ? int64_t{block.first_rank + rank} * args.width + block.column + column
                : int64_t{block.column + column} * args.max_rank + block.first_rank + rank;
        // Beyond the adapter's rank the sum is 0 * x, which is NaN where x is not finite.
        out[at] = lx::from_float<T>(rank < block.ranks ? columns[column * kRow + rank] : 0.0f);
    }
}
template <class T>
constexpr int kStoreBytes = kBandColumns<T> * (kGroupRanks + 1) * 4;

// sums += 16 rows of a stage.
template <class T>
LX_DEVICE void multiply(Sums<T>& sums, const unsigned char* x, const VTile<T>& v, int row,
                        int pages) {
    const int lane = lx::lane_id(), m = lx::warp_id() % kWarpsM<T>;
    uint32_t xf[4] = {};
    if constexpr (sizeof(T) == 2) {
        // Matrices: rows 0-7 of columns 0-7 and 8-15, then rows 8-15 of both; turned.
        lx::ldmatrix_x4_trans(xf, x + (row + lane / 16 * 8 + lane % 8) * kBandRow +
                                      (2 * m + lane / 8 % 2) * kPieceBytes);
    }
    if constexpr (std::is_same_v<T, lx::bf16>) {
#pragma unroll
        for (int j = 0; j < kWarpPages<T>; ++j) {
            if (page_of<T>(j) >= pages) continue;
            // Matrices: high parts of rows 0-7 and 8-15, then low parts; turned.
            uint32_t vf[4];
            lx::ldmatrix_x4_trans(vf,
                                  v.at(row + lane % 16, page_of<T>(j)) + lane / 16 * kPieceBytes);
            lx::mma_m16n8k16<T>(sums[j], xf, {vf[2], vf[3]});
            lx::mma_m16n8k16<T>(sums[j], xf, {vf[0], vf[1]});
        }
    } else {
        // Two steps of eight rows; slots k and k + 4 of an mma are rows 2k and 2k + 1.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int first = row + 8 * half + 2 * (lane % 4);
            float a[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {  // columns g and g + 8
                if constexpr (sizeof(T) == 2) {
                    const float2 pair = lx::unpack_floats<T>(xf[2 * half + i]);
                    a[i] = pair.x;
                    a[i + 2] = pair.y;
                } else {
                    const unsigned char* p = x + first * kBandRow + (16 * m + 8 * i + lane / 4) * 4;
                    a[i] = *reinterpret_cast<const float*>(p);
                    a[i + 2] = *reinterpret_cast<const float*>(p + kBandRow);
                }
            }
#pragma unroll
            for (int j = 0; j < kWarpPages<T>; ++j) {
                if (page_of<T>(j) >= pages) continue;
                const float b[2] = {
                    reinterpret_cast<const float*>(v.at(first, page_of<T>(j)))[lane / 4],
                    reinterpret_cast<const float*>(v.at(first + 1, page_of<T>(j)))[lane / 4]};
                mma_floats<sizeof(T) == 2, false>(sums[j], a, b);
            }
        }
    }
}

template <class T, bool kSplit>
__global__ void __launch_bounds__(kThreads, 2)
    lora_train_weights_kernel(const __grid_constant__ Gradient args,
                              const __grid_constant__ Shape shape) {
    LX_SHARED(int32_t, row_of, 4 * kTrainRows);  // a ring of its own, one step ahead of the other
    LX_DYN_SHARED(ring);
    Block block = find_block<T>(args, shape, kSplit);
    const int thread = lx::thread_rank();
    bool partial = false;
    if constexpr (kSplit) {
        partial = block.num_rows > shape.range_rows;
        const int first = block.range * shape.range_rows;
        block.num_rows = lx::min(block.num_rows - first, shape.range_rows);
        if (block.num_rows <= 0 || block.ranks == 0) return;
        block.rows += first;
    }
    if (block.ranks == 0) block.num_rows = 0;

    const int pages = (block.ranks + kPageRanks - 1) / kPageRanks;
    const int steps = (block.num_rows + kTrainRows - 1) / kTrainRows;
    const int stage_bytes = kTrainRows * (kBandRow + v_row_bytes(shape.pages));
    const T* x = static_cast<const T*>(args.x);
    const Mask mask = mask_of(args.dropout, block.slot, block.range * shape.range_rows);

    // Thread: one piece of every sixteenth row of x; of v, items of (row, page).
    const int piece = thread % kBandPieces, first_row = thread / kBandPieces;
    constexpr int kRowStep = kThreads / kBandPieces;
    const int column = block.column + piece * kVec<T>;
    auto rows_of_step = [&](int step) {
        return lx::min(block.num_rows - step * kTrainRows, kTrainRows);
    };
    auto padded = [](int rows) { return (rows + 15) / 16 * 16; };
    auto x_stage = [&](int step) { return ring + step % kStages * stage_bytes; };
    auto v_stage = [&](int step) {
        return VTile<T>(x_stage(step) + kTrainRows * kBandRow, shape.pages);
    };
    auto row_index = [&](int step) {
        const int row = step * kTrainRows + thread;
        return thread < kTrainRows && row < block.num_rows ? lx::load_nc(block.rows + row) : 0;
    };
    auto keep_row_index = [&](int step, int32_t row) {
        if (thread < kTrainRows) row_of[step % 4 * kTrainRows + thread] = row;
    };
    auto fill = [&](int step) {
        const int rows = rows_of_step(step);
        const int32_t* const from = row_of + step % 4 * kTrainRows;
        for (int row = first_row; row < padded(rows); row += kRowStep) {
            const int n = row < rows ? args.width - column : 0;
            copy_piece<T>(x_stage(step) + row * kBandRow + piece * kPieceBytes,
                          n > 0 ? x + from[row] * args.x_row_stride + column : x, n,
                          shape.x_aligned);
        }
        const VTile<T> v = v_stage(step);
        for (int i = thread; i < padded(rows) * pages; i += kThreads) {
            const int row = i / pages, rank = i % pages * kPageRanks;
            const bool wanted = row < rows;
            v.copy(
                row, i % pages,
                wanted ? args.v + from[row] * args.v_row_stride + block.first_rank + rank : args.v,
                wanted ? block.ranks - rank : 0, shape.v_aligned);
        }
    };
    auto prepare = [&](int step) {
        const int rows = rows_of_step(step);
        if (args.dropout.threshold != 0) {
            for (int row = first_row; row < rows; row += kRowStep)
                drop_piece<T>(
                    x_stage(step) + row * kBandRow + piece * kPieceBytes, mask,
                    mask.row(step * kTrainRows + row, row_of[step % 4 * kTrainRows + row]), column);
        }
        const VTile<T> v = v_stage(step);
        if constexpr (std::is_same_v<T, lx::bf16>) {
            for (int i = thread; i < padded(rows) * pages; i += kThreads)
                v.split(i / pages, i % pages);
        }
    };

    for (int s = 0; s < kStages; ++s) keep_row_index(s, row_index(s));
    lx::syncthreads();
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) fill(s);
        lx::cp_async_commit();
    }
    Sums<T> sums = {}, total = {};
    for (int step = 0; step < steps; ++step) {
        const int32_t next_row = row_index(step + kStages);
        lx::cp_async_wait_group<kStages - 2>();
        prepare(step);
        lx::syncthreads();  // this stage is ready, and the previous one has been read by all
        if (step + kStages - 1 < steps) fill(step + kStages - 1);
        lx::cp_async_commit();
        const int rows = rows_of_step(step);
        const VTile<T> v = v_stage(step);
        for (int row = 0; row < rows; row += 16) multiply<T>(sums, x_stage(step), v, row, pages);
        keep_row_index(step + kStages, next_row);
        if ((step + 1) * kTrainRows % shape.range_rows == 0 || step + 1 == steps) {
#pragma unroll
            for (int j = 0; j < kWarpPages<T>; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[j][i] += sums[j][i];
                    sums[j][i] = 0;
                }
            }
        }
    }
    lx::cp_async_wait_all();

    if (partial) {
        float4* out = shape.partials + int64_t{blockIdx.x} * shape.pages * kThreads + thread;
#pragma unroll
        for (int j = 0; j < kWarpPages<T>; ++j)
            if (page_of<T>(j) < pages)
                out[j * kThreads] = {total[j][0], total[j][1], total[j][2], total[j][3]};
    } else {
        lx::syncthreads();  // the ring has been read
        store<T>(args, block, shape.pages, total, reinterpret_cast<float*>(ring));
    }
}

// What the blocks of ranges have left: adapters of several ranges, and those without rows or ranks.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    lora_train_weights_reduce_kernel(const __grid_constant__ Gradient args,
                                     const __grid_constant__ Shape shape) {
    LX_DYN_SHARED(columns);
    const Block block = find_block<T>(args, shape, false);
    const int pages = (block.ranks + kPageRanks - 1) / kPageRanks;
    Sums<T> total = {};
    if (block.num_rows > 0 && pages > 0) {
        const int ranges = (block.num_rows + shape.range_rows - 1) / shape.range_rows;
        if (ranges == 1) return;
        const int first = args.plan[shape.slot_begin + block.slot] / shape.range_rows + block.slot;
        // The same band and ranks of its first range.
        const int tiles = shape.bands * shape.groups;
        const int64_t stride = int64_t{tiles} * shape.pages * kThreads;
        const float4* from =
            shape.partials + first * stride +
            int64_t{blockIdx.x % static_cast<unsigned>(tiles)} * shape.pages * kThreads +
            lx::thread_rank();
        for (int range = 0; range < ranges; ++range, from += stride) {
            float4 part[kWarpPages<T>];  // where a page is not there, the last one stands in
#pragma unroll
            for (int j = 0; j < kWarpPages<T>; ++j)
                part[j] = from[lx::min(j, shape.pages - 1) * kThreads];
            lx::syncwarp();  // the compiler moves no load beyond this
#pragma unroll
            for (int j = 0; j < kWarpPages<T>; ++j) {
                if (page_of<T>(j) >= pages) continue;
                total[j][0] += part[j].x;
                total[j][1] += part[j].y;
                total[j][2] += part[j].z;
                total[j][3] += part[j].w;
            }
        }
    }
    store<T>(args, block, shape.pages, total, reinterpret_cast<float*>(columns));
}

int ring_bytes(int pages) {
    return kStages * kTrainRows * (kBandRow + v_row_bytes(pages));
}

Shape shape_of(const Gradient& args) {
    Shape shape{};
    const int64_t columns = kBandBytes / element_size(args.dtype);
    shape.bands = static_cast<int>(ceil_div(args.width, columns));
    shape.pages = static_cast<int>(ceil_div(lx::min(args.max_rank, kGroupRanks), kPageRanks));
    while (shape.pages > 1 && ring_bytes(shape.pages) > most_dynamic_bytes()) --shape.pages;
    shape.groups = static_cast<int>(ceil_div(args.max_rank, shape.pages * kPageRanks));
    shape.range_rows = args.max_rank <= 16 ? 1024 : 2048;
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    shape.perm = layout.perm();
    shape.slot_begin = layout.slot_begin();
    const int64_t ranges = args.num_tokens / shape.range_rows + args.num_adapters;
    const int64_t bytes =
        ranges * shape.bands * shape.groups * shape.pages * kThreads * int64_t{sizeof(float4)};
    if (args.num_tokens > shape.range_rows && bytes <= kMostPartials)
        shape.ranges = static_cast<int>(ranges);
    return shape;
}

}  // namespace

int64_t gradient_workspace(const Gradient& args) {
    if (gradient_takes_gemm(args)) return 0;
    const Shape shape = shape_of(args);
    return int64_t{shape.ranges} * shape.bands * shape.groups * shape.pages * kThreads *
           int64_t{sizeof(float4)};
}

LaunchStatus run_gradient(const Gradient& args, void* workspace, void* stream) {
    Shape shape = shape_of(args);
    const int64_t size = element_size(args.dtype);
    shape.x_aligned = aligned_16(args.x, {args.x_row_stride}, size);
    shape.v_aligned = aligned_16(args.v, {args.v_row_stride}, 4);
    shape.partials = static_cast<float4*>(workspace);
    const bool gemm = gradient_takes_gemm(args), split = !gemm && shape.ranges > 0;
    const int64_t tiles = int64_t{shape.bands} * shape.groups;
    const int64_t blocks = tiles * args.num_adapters, range_blocks = tiles * shape.ranges;
    if (blocks == 0) return 0;
    if (lx::max(blocks, range_blocks) > INT32_MAX) return kInvalidValue;

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
    declare();
    LX_BUF_ROWS(args.x, args.num_tokens, args.width * size, args.x_row_stride * size,
                lx::Access::kConstant);
    LX_BUF_ROWS(args.v, args.num_tokens, args.max_rank * 4, args.v_row_stride * 4,
                lx::Access::kRead);
    declare_seed(args.dropout, args.num_adapters);
    if (split) LX_BUF(workspace, gradient_workspace(args), lx::Access::kWrite);
    declare_out();
    if (gemm) return run_gemm_gradient(args, stream);
    return with_dtype(args.dtype, [&]<class T>() {
        const int bytes = lx::max(ring_bytes(shape.pages), kStoreBytes<T>);
        if (!split)
            return LX_LAUNCH((lora_train_weights_kernel<T, false>), static_cast<unsigned>(blocks),
                             kThreads, bytes, stream, args, shape);
        const LaunchStatus status =
            LX_LAUNCH((lora_train_weights_kernel<T, true>), static_cast<unsigned>(range_blocks),
                      kThreads, bytes, stream, args, shape);
        if (status) return status;
        declare();
        LX_BUF(workspace, gradient_workspace(args), lx::Access::kRead);
        declare_out();
        return LX_LAUNCH(lora_train_weights_reduce_kernel<T>, static_cast<unsigned>(blocks),
                         kThreads, kStoreBytes<T>, stream, args, shape);
    });
}

}  // namespace lora_ext
