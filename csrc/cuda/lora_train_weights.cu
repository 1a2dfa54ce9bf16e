// Gradients of the adapters, sums over the rows t of one adapter:
//   db[s] = sum_t dy[t, :]^T v[t, :]            da[s] = sum_t dv[t, :]^T (mask * x[t, :])
// Both are columns of x (or dy) times ranks of v (or dv), contracted over the rows. With kProject
// the same pass over dy also computes
//   dv[t, :] = c * dy[t, :] b[s]                with c = scale[s] / (1 - p)
//
// Block (range of an adapter's rows, slice of 1024 bytes of columns, 16 or 64 ranks), eight warps.
// Shared memory has two stages of 32 rows of x and v; cp.async fills one while the other is used,
// and perm is read two steps ahead. A thread then prepares the elements that it copied: it drops
// elements of x, and splits v into high and low bfloat16. ldmatrix.trans transposes both. A warp
// sums 16 columns of each band of 128, for all ranks, over the whole range.
//   bfloat16   v = high + low, two m16n8k16: 16 bits of v
//   float16    x as floats, exact in tf32; v = high + low in tf32, two m16n8k8: any magnitude of v
//   float32    x and v as high + low in tf32, three products
// The rows of an adapter are summed in ranges of a fixed length counted from its first row, each
// range starting at zero, the ranges in order. Each range has a block, and a second kernel adds the
// ranges of each adapter that has several. The bits therefore depend only on the rows of the
// adapter.
//
// For dv, the block's columns of B stay in shared memory. In a step a warp computes 16 rows and one
// or two pages of ranks, summed over its slice of the columns. The slices are added in order, with
// the same bits as in lora_train_project.cu. Bound: bytes of x or dy, read once.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / lx::kWarpSize;
constexpr int kStages = 2;
constexpr int kStepRows = 32;
constexpr int kRowSlots = 4;  // steps whose row numbers are kept
constexpr int kPieces = kPassBytes / kPieceBytes;
constexpr int kPassRow = kPassBytes + kPieceBytes;  // an odd number of pieces, like kBandRow
constexpr int kBand = 16 * kWarps;                  // columns, 16 per warp
constexpr int kRowStep = kThreads / kPieces;        // a thread copies one piece of every fourth row
template <class T>
constexpr int kColumns = kPassBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kBands = kColumns<T> / kBand;
template <int kPages>
constexpr int kStageBytes = kStepRows * (kPassRow + v_row_bytes(kPages));
// Bytes of a row of B in shared memory; each output has a row.
template <int kPages>
constexpr int kFactorRow = (kPages + 1) * kPieceBytes;

struct Shape {
    int slices, groups, range_rows;
    bool x_aligned, v_aligned;
    int64_t perm, slot_begin;  // in the plan
    float4* partials;          // for adapters with several ranges
};

// The work of a block, of the kernel of ranges or of the kernel that adds ranges.
struct Block {
    int slot, range, first_rank, ranks, column;  // ranks: number here; column: the first
    const int32_t* rows;                         // rows of the adapter
    int num_rows, first_row;                     // number of `rows`; index of the first in perm
};

// Returns the slot of range `index`. The indices of slot s start at slot_begin[s] / range_rows + s,
// which leaves one for each of its ceil(n / range_rows) ranges, or one if it has no rows. The warp
// searches 32 slots at a time.
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

// Returns the work of block `index`: groups of ranks vary fastest, then slices, then ranges/slots.
template <class T, int kPages>
LX_DEVICE Block find_block(const Gradient& args, const Shape& shape, unsigned index,
                           bool of_range) {
    Block block{};
    block.first_rank = static_cast<int>(index % shape.groups) * kPages * kPageRanks;
    index /= shape.groups;
    block.column = static_cast<int>(index % shape.slices) * kColumns<T>;
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
template <class T, int kPages>
using Sums = BandSums<kPages>[kBands<T>];

// Returns the address of a block's partial sums. Only adapters of n > range_rows rows store them;
// these have fewer than 2 n / range_rows ranges, the first at 2 (slot_begin / range_rows).
template <class T, int kPages>
LX_DEVICE float4* parts_of(const Shape& shape, const Block& block, unsigned tile) {
    const int first = 2 * (block.first_row / shape.range_rows) + block.range;
    const int64_t tiles = int64_t{shape.slices} * shape.groups;
    return shape.partials + (first * tiles + tile) * (kBands<T> * kPages * kThreads) +
           lx::thread_rank();
}

__host__ __device__ constexpr int store_row(int pages) {
    return pages * kPageRanks + 1;
}

// Stores a band of results through shared memory, so that adjacent threads write adjacent elements.
template <class T, int kPages>
LX_DEVICE void store(const Gradient& args, const Block& block, int band,
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
    const int first = block.column + band * kBand;
    T* out = static_cast<T*>(args.out) + int64_t{block.slot} * args.max_rank * args.width;
    for (int i = lx::thread_rank(); i < ranks * kBand; i += kThreads) {
        const int column = args.rank_major ? i % kBand : i / ranks;
        const int rank = args.rank_major ? i / kBand : i % ranks;
        if (first + column >= args.width) continue;
        const int64_t at = args.rank_major
                               ? int64_t{block.first_rank + rank} * args.width + first + column
                               : int64_t{first + column} * args.max_rank + block.first_rank + rank;
        // Beyond the adapter's rank the sum is 0 * x, which is NaN if x is not finite.
        out[at] = lx::from_float<T>(rank < block.ranks ? columns[column * kRow + rank] : 0.0f);
    }
}

// sums += 16 rows of a stage. `pages` is even.
template <class T, int kPages>
LX_DEVICE void multiply(Sums<T, kPages>& sums, const unsigned char* x, const VTile<T>& v, int row,
                        int pages) {
    const int lane = lx::lane_id(), warp = lx::warp_id();
    const auto has = [&](int page) { return kPages == 2 || page < pages; };
    if constexpr (std::is_same_v<T, lx::bf16>) {
        constexpr int kTogether = lx::min(kPages, 4);  // pages in registers at a time
#pragma unroll
        for (int first = 0; first < kPages; first += kTogether) {
            // Matrices of this load: high parts of rows 0-7 and 8-15, then low parts; transposed.
            uint32_t vf[kTogether][4];
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
                if (has(first + j))
                    lx::ldmatrix_x4_trans(
                        vf[j], v.at(row + lane % 16, first + j) + lane / 16 * kPieceBytes);
#pragma unroll
            for (int m = 0; m < kBands<T>; ++m) {
                if (!has(first)) continue;
                // Matrices of this load: rows 0-7 of columns 0-7 and 8-15, then rows 8-15 of both;
                // transposed.
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
            float a[kBands<T>][4];  // columns g and g + 8 of a band, then the next row of both
            if constexpr (sizeof(T) == 2) {
#pragma unroll
                for (int m = 0; m < kBands<T>; m += 2) {
                    // Matrices of this load: columns 0-7 and 8-15 of a band, then of the next;
                    // transposed.
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
                for (int m = 0; m < kBands<T>; ++m) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned char* p =
                            x + first * kPassRow + (m * kBand + 16 * warp + 8 * i + lane / 4) * 4;
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
                for (int m = 0; m < kBands<T>; ++m)
                    mma_floats<sizeof(T) == 2, false>(sums[m][j], a[m], b);
            }
        }
    }
}

// Computes dv of the rows of a step: a warp sums 16 rows and its pages over its slice of columns.
template <class T, int kPages>
struct Projecting {
    static constexpr int kShares = kPages == 2 ? 2 : 1;  // slices per block
    static constexpr int kOwn = kPages == 2 ? 1 : 2;     // pages per warp
    static constexpr int kWidth = kColumns<T> / kShares;
    static_assert(kStepRows / kTileRows * kShares * kPages / kOwn == kWarps);
    static_assert(kWidth == pass_slice(kPages * kPageRanks));

    int row, page, share;

    LX_DEVICE Projecting()
        : row(lx::warp_id() % 2 * kTileRows),
          page(lx::warp_id() / 2 % (kPages / kOwn) * kOwn),
          share(lx::warp_id() / (2 * kPages / kOwn)) {}

    LX_DEVICE void multiply(float (&acc)[kOwn][4], const unsigned char* x,
                            const unsigned char* b) const {
        const int lane = lx::lane_id();
        constexpr int kStep = kOwn == 1 ? 32 : 16;  // columns of one ldmatrix of B
#pragma unroll
        for (int k0 = 0; k0 < kWidth; k0 += kStep) {
            const int k = share * kWidth + k0;
            // Matrices of this load: 32 columns of one page; or 16 of one page, then of the next;
            // transposed.
            uint32_t bf[4];
            lx::ldmatrix_x4_trans(bf, b + (k + lane % kStep) * kFactorRow<kPages> +
                                          (page + lane / kStep) * kPieceBytes);
#pragma unroll
            for (int i = 0; i < kStep / 16; ++i) {
                // Matrices of this load: rows 0-7 and 8-15 of eight columns, then of the next
                // eight.
                uint32_t xf[4];
                lx::ldmatrix_x4(xf, x + (row + lane % 16) * kPassRow +
                                        (k / kVec<T> + 2 * i + lane / 16) * kPieceBytes);
                lx::mma_m16n8k16<T>(acc[0], xf, {bf[2 * i], bf[2 * i + 1]});
                if constexpr (kOwn == 2) lx::mma_m16n8k16<T>(acc[1], xf, {bf[2], bf[3]});
            }
        }
    }

    // Stores dv. row_of[0, rows) are the indices in the batch of the rows of the step.
    LX_DEVICE void store(const float (&acc)[kOwn][4], const Projection& to, const Slices& slices,
                         const Block& block, const int32_t* row_of, int rows, float factor,
                         bool paired) const {
        const int slice = block.column / kWidth + share, lane = lx::lane_id();
        if (slice >= slices.count) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = row + 8 * h + lane / 4;
            if (at >= rows) continue;
            float* const out =
                to.out + slice * slices.split_stride + row_of[at] * to.out_row_stride;
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
                const int rank = (page + j) * kPageRanks + 2 * (lane % 4);
                store_ranks(out + rank, block.ranks - rank, paired, factor * acc[j][2 * h],
                            factor * acc[j][2 * h + 1]);
            }
        }
    }
};

// Copies the block's outputs of B, with zeros for missing outputs or ranks. Whole page rows may
// contain ranks past the adapter's, whose sums are not stored.
template <class T, int kPages>
LX_DEVICE void fill_factor(unsigned char* to, const LoraBank& bank, const Block& block,
                           bool aligned) {
    const T* const b = static_cast<const T*>(bank.b) + block.slot * bank.b_slot_stride;
    for (int i = lx::thread_rank(); i < kColumns<T> * kPages; i += kThreads) {
        const int page = i % kPages, output = block.column + i / kPages;
        int n = lx::min(block.ranks - page * kPageRanks, kPageRanks);
        if (n > 0 && aligned) n = kPageRanks;
        if (output >= bank.out_features) n = 0;
        copy_piece<T>(to + i / kPages * kFactorRow<kPages> + page * kPieceBytes,
                      n > 0 ? b + page * bank.b_page_stride + output * bank.b_row_stride : b, n,
                      aligned);
    }
}

// Blocks per multiprocessor. The sums of 64 ranks, or float16, need the registers of two blocks.
template <class T, int kPages>
constexpr int kBlocks = kPages == 2 && !std::is_same_v<T, lx::f16> ? 2 : 1;

template <class T, int kPages, bool kProject>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kPages>)
    lora_train_weights_kernel(const __grid_constant__ Gradient args,
                              const __grid_constant__ Projection to,
                              const __grid_constant__ Slices slices,
                              const __grid_constant__ Shape shape) {
    LX_SHARED(int32_t, row_of, kRowSlots* kStepRows);  // a separate ring, filled a step early
    LX_DYN_SHARED(ring);
    Block block = find_block<T, kPages>(args, shape, blockIdx.x, true);
    const int thread = lx::thread_rank();
    const int first = block.range * shape.range_rows;
    const bool empty = block.num_rows <= first || block.ranks == 0;
    if (empty && block.range > 0) return;  // the block of the first range writes the zeros
    const bool partial = !empty && block.num_rows > shape.range_rows;
    const int num_rows = empty ? 0 : lx::min(block.num_rows - first, shape.range_rows);
    const int32_t* const rows_from = block.rows + first;

    const int pages = (block.ranks + 15) / 16 * 2;
    const int steps = (num_rows + kStepRows - 1) / kStepRows;
    const T* x = static_cast<const T*>(args.x);
    const Mask mask = mask_of(args.dropout, block.slot, first);
    unsigned char* const factor_b = ring + kStages * kStageBytes<kPages>;

    // A thread has one piece of every fourth row of x and at most one item (row, page) of v.
    const int piece = thread % kPieces, first_row = thread / kPieces;
    const int column = block.column + piece * kVec<T>;
    const int v_row = thread / kPages, v_page = thread % kPages;
    const int v_ranks = block.ranks - v_page * kPageRanks;
    const bool has_item = v_row < kStepRows && v_page < pages;
    const float* const v_from = args.v + block.first_rank + v_page * kPageRanks;
    auto rows_of_step = [&](int step) { return lx::min(num_rows - step * kStepRows, kStepRows); };
    auto x_stage = [&](int step) { return ring + step % kStages * kStageBytes<kPages>; };
    auto v_stage = [&](int step) { return VTile<T>(x_stage(step) + kStepRows * kPassRow, kPages); };
    auto numbers = [&](int step) { return row_of + step % kRowSlots * kStepRows; };
    auto row_index = [&](int step) {
        const int row = step * kStepRows + thread;
        return thread < kStepRows && row < num_rows ? lx::load_nc(rows_from + row) : 0;
    };
    auto keep_row_index = [&](int step, int32_t row) {
        if (thread < kStepRows) numbers(step)[thread] = row;
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
            for (int i = 0; i < kStepRows; i += kRowStep)
                lx::cp_async<kPieceBytes>(
                    to_x + i * kPassRow, x_from + from[first_row + i] * args.x_row_stride,
                    first_row + i < rows ? x_count * static_cast<int>(sizeof(T)) : 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kStepRows; i += kRowStep)
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
                              mask.row(step * kStepRows + row, numbers(step)[row]), column);
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
        for (int row = 0; row < kStepRows; row += kTileRows)
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
        for (int m = 0; m < kBands<T>; ++m) {
#pragma unroll
            for (int j = 0; j < kPages; ++j) {
                const float (&s)[4] = sums[m][j];
                if (kPages == 2 || j < pages)
                    out[(m * kPages + j) * kThreads] = {s[0], s[1], s[2], s[3]};
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < kBands<T>; ++m)
            store<T, kPages>(args, block, m, sums[m], reinterpret_cast<float*>(ring));
    }
}

// Adds the ranges of each adapter that has several ranges, one band of 128 columns per block.
template <class T, int kPages>
__global__ void __launch_bounds__(kThreads, 3)
    lora_train_weights_reduce_kernel(const __grid_constant__ Gradient args,
                                     const __grid_constant__ Shape shape) {
    LX_DYN_SHARED(columns);
    const int band = static_cast<int>(blockIdx.x % kBands<T>);
    const unsigned index = blockIdx.x / kBands<T>;
    const Block block = find_block<T, kPages>(args, shape, index, false);
    if (block.num_rows <= shape.range_rows || block.ranks == 0) return;
    const int pages = (block.ranks + 15) / 16 * 2;
    const int ranges = (block.num_rows + shape.range_rows - 1) / shape.range_rows;
    const int64_t tiles = int64_t{shape.slices} * shape.groups;
    const float4* from = parts_of<T, kPages>(shape, block, index % static_cast<unsigned>(tiles)) +
                         band * kPages * kThreads;
    const int64_t stride = tiles * (kBands<T> * kPages * kThreads);
    // Eight loads are in flight together. A missing page or range is replaced by another, whose
    // value is not used.
    constexpr int kBatch = 8 / kPages;
    BandSums<kPages> total = {};
#pragma unroll 1
    for (int first = 0; first < ranges; first += kBatch) {
        float4 part[kBatch][kPages];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
#pragma unroll
            for (int j = 0; j < kPages; ++j)
                part[k][j] = from[lx::min(first + k, ranges - 1) * stride +
                                  (kPages == 2 || j < pages ? j : 0) * kThreads];
        }
        lx::syncwarp();  // keeps the compiler from moving loads down
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
#pragma unroll
            for (int j = 0; j < kPages; ++j) {
                if (first + k >= ranges || (kPages > 2 && j >= pages)) continue;
                total[j][0] += part[k][j].x;
                total[j][1] += part[k][j].y;
                total[j][2] += part[k][j].z;
                total[j][3] += part[k][j].w;
            }
        }
    }
    store<T, kPages>(args, block, band, total, reinterpret_cast<float*>(columns));
}

int pages_of(const Gradient& args) {
    return args.max_rank <= 16 ? 2 : 8;
}
int dynamic_bytes(int pages, bool project) {
    const int ring = kStages * kStepRows * (kPassRow + v_row_bytes(pages));
    const int factor = project ? kPassBytes / 2 * (pages + 1) * kPieceBytes : 0;
    return lx::max(ring + factor, kBand * store_row(pages) * 4);
}

Shape shape_of(const Gradient& args) {
    Shape shape{};
    shape.slices = static_cast<int>(ceil_div(args.width * element_size(args.dtype), kPassBytes));
    shape.groups = static_cast<int>(ceil_div(args.max_rank, pages_of(args) * kPageRanks));
    // With 8192 rows there are at least 128 blocks, for the 132 multiprocessors of an H100. The
    // range is the same for every device, because it determines the order of the sums.
    const int tiles = shape.slices * shape.groups;
    shape.range_rows = tiles >= 32 ? 2048 : tiles >= 16 ? 1024 : 512;
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    shape.perm = layout.perm();
    shape.slot_begin = layout.slot_begin();
    return shape;
}
int64_t part_bytes(const Gradient& args, const Shape& shape) {
    if (args.num_tokens <= shape.range_rows) return 0;
    return 2 * (args.num_tokens / shape.range_rows) * shape.slices * shape.groups * pages_of(args) *
           (kPassBytes / element_size(args.dtype) / kBand) * kThreads * int64_t{sizeof(float4)};
}

// Calls f.template operator()<T, kPages>().
template <class F>
LaunchStatus with_pages(const Gradient& args, F&& f) {
    return with_dtype(args.dtype, [&]<class T>() {
        return pages_of(args) == 2 ? f.template operator()<T, 2>() : f.template operator()<T, 8>();
    });
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
    Shape shape = shape_of(args);
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
                                 static_cast<unsigned>(blocks), kThreads, bytes, stream, args, to,
                                 slices, shape);
        }
        return LX_LAUNCH((lora_train_weights_kernel<T, kPages, false>),
                         static_cast<unsigned>(blocks), kThreads, bytes, stream, args, to, slices,
                         shape);
    });
    if (!status && parts) {
        declare();
        LX_BUF(workspace, parts, lx::Access::kRead);
        declare_out();
        status = with_pages(args, [&]<class T, int kPages>() {
            const unsigned grid = static_cast<unsigned>(tiles * args.num_adapters * kBands<T>);
            return LX_LAUNCH((lora_train_weights_reduce_kernel<T, kPages>), grid, kThreads,
                             kBand * store_row(kPages) * 4, stream, args, shape);
        });
    }
    return status || !beside ? status : sum_slices(*beside, to, slices, stream);
}

}  // namespace lora_ext
