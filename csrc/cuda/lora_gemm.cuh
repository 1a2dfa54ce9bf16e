// Products of gathered rows for large ranks (lora_kernels.cuh: large_rank). If the rank is as large
// as the width of a row, all four products are bound by arithmetic (s: adapter of row t; c:
// scale[s] / (1 - p)):
//
//   kShrink    v[t, :]  = c * a[s] (mask * x[t, :])                  columns are ranks
//   kProject   dv[t, :] = c * dy[t, :] b[s]                          columns are ranks
//   kExpand    y[t, :]  = round(y[t, :] + b[s] v[t, :])              columns are outputs
//   kInput     dx[t, :] = round(dx[t, :] + mask * (dv[t, :] a[s]))   columns are in-features
//
// One kernel template has four variants: left (x, dy, v or dv, its rows gathered through the plan)
// times right (a or b). A block computes 16, 64 or 128 rows of one adapter and 128 columns with
// four warps of up to 64 x 64. A stage holds 128 bytes of each row of left and the corresponding k
// of right. cp.async fills a ring of stages of at most 96 KiB, so that two blocks fit a
// multiprocessor and one fits any device. Ranks are iterated over or divided like any other axis:
// no array in registers or shared memory grows with the rank, and a block stops at the adapter's
// rank.
//
// Right has the same layout in shared memory as in global memory: column by column (a for kShrink,
// b for kExpand), or k by k (kProject, kInput), transposed by ldmatrix.trans. 16-byte pieces are
// permuted within a row so that neither cp.async nor the reads have bank conflicts.
//
// v and dv are float32. If right has 16 bits, each warp splits floats of left in registers:
//   bfloat16   v = high + low, two m16n8k16
//   float16    right is exact in tf32, v = high + low in tf32 (with the range of float32)
//
// The products of an element are added in the order of k to one sum per slice of k, and then the
// sums of the slices are added in order. The result therefore depends neither on the tile nor on
// the other rows of the batch.
#pragma once

#include "lora_gemm_tile.cuh"

namespace lora_ext {

struct Gemm {
    LoraArgs lora;        // the bank and the rows
    LoraDropout dropout;  // mask of x (kShrink) or dx (kInput); inverse_keep is a factor of c
    const void* left;     // rows of `width` elements (kShrink, kProject), or of ranks
    int64_t left_row_stride;
    int width;  // in- or out-features: k of a projection, columns of an update
    void* out;  // v or dv, or their partial sums; y or dx
    int64_t out_row_stride;
    int row_tiles;  // block x has row tile x % row_tiles and column tile x / row_tiles
    // Projections: a block sums slice_count slices of k, from slice blockIdx.y * slice_count on.
    int slice_width, slice_count;
    int64_t split_stride;  // elements between partial sums
    bool finished;         // no partial sums: the block applies c
    bool left_aligned, right_aligned, out_aligned;
};

template <class T, Product kProduct, int kRows>
__global__ void __launch_bounds__(kGemmThreads, (GemmShape<T, kProduct, kRows>::kMinBlocks))
    lora_gemm_kernel(const __grid_constant__ Gemm args, const __grid_constant__ Tiling tiling) {
    using G = GemmShape<T, kProduct, kRows>;
    using Left = typename G::Left;
    if constexpr (kProduct == Product::kShrink || kProduct == Product::kExpand)
        lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const Left*, left_of, kRows);      // rows of left; the first one for missing rows
    LX_SHARED(const T*, rank_of, kGemmColumns);  // kShrink: rows of a, or nullptr if missing
    LX_DYN_SHARED(ring);
    const LoraBank& bank = args.lora.bank;
    const int thread = lx::thread_rank(), lane = lx::lane_id(), warp = lx::warp_id();
    const int index = static_cast<int>(blockIdx.x);
    const RowTile tile = find_tile<kRows>(args.lora, tiling, index % args.row_tiles, row_of);
    const int first_column = index / args.row_tiles * kGemmColumns;
    const int columns = lx::min((G::kUpdate ? args.width : tile.rank) - first_column, kGemmColumns);
    if (tile.rank == 0 || columns <= 0) {
        // A block without work also waits: the next grid waits only for this grid, and therefore
        // this grid must not end before the grid that writes v.
        if constexpr (kProduct == Product::kExpand) lx::grid_dependency_wait();
        return;
    }
    lx::syncthreads();  // row_of is complete
    for (int row = thread; row < kRows; row += kGemmThreads)
        left_of[row] = static_cast<const Left*>(args.left) +
                       row_of[row < tile.rows ? row : 0] * args.left_row_stride;
    if constexpr (kProduct == Product::kShrink) {
        const T* const page = thread < columns
                                  ? a_page<T>(bank, tile.slot, (first_column + thread) / kPageRanks)
                                  : nullptr;
        rank_of[thread] = page ? page + thread % kPageRanks * bank.a_row_stride : nullptr;
    }
    // This barrier also makes left_of and rank_of visible to all threads.
    const bool all_ranks = lx::syncthreads_and(kProduct != Product::kShrink || rank_of[thread]);

    // This block sums k from begin to end.
    int begin = 0, end = tile.rank;
    if constexpr (!G::kUpdate) {
        const int64_t range = int64_t{args.slice_width} * args.slice_count;
        begin = static_cast<int>(blockIdx.y * range);
        end = static_cast<int>(lx::min<int64_t>(begin + range, args.width));
    }
    const int steps = lx::max(1, (end - begin + G::kStep - 1) / G::kStep);

    const int warp_row = warp % G::kWarpsM * G::kWarpRows;
    const int warp_column = warp / G::kWarpsM * G::kWarpColumns;
    const bool active = warp_row < tile.rows && warp_column < columns;

    // A thread copies the same piece of every kLeftRowStep-th row. The addresses of the rows are
    // computed once; each stage only adds its offset k. For rows beyond tile.rows, row 0 of the
    // tile is copied, and the results are not stored.
    const int left_piece = thread % G::kLeftPieces, left_row = thread / G::kLeftPieces;
    constexpr int kLeftRowStep = kGemmThreads / G::kLeftPieces;
    static_assert(kLeftRowStep % 8 == 0);  // same permutation for all rows of a thread
    const auto stage_of = [&](int step) { return ring + step % G::kStages * G::kStageBytes; };
    const auto left_at = [&](int step, int row) {
        return stage_of(step) + row * G::kLeftRow + G::left_piece(row, left_piece) * kPieceBytes;
    };
    const auto fill_left = [&](int step) {
        const int at = begin + step * G::kStep + left_piece * kVec<Left>;
        const int n = end - at, k = n > 0 ? at : 0;
        unsigned char* const to = left_at(step, left_row);
        copy_pieces<Left, kRows / kLeftRowStep>(
            n >= kVec<Left>, args.left_aligned,
            [&](int i) { return to + i * kLeftRowStep * G::kLeftRow; },
            [&](int i) { return Piece<Left>{left_of[left_row + i * kLeftRowStep] + k, n}; });
    };
    // Copies rows of a (kShrink) or of b (kExpand), one per column, or rows of b (kProject) or of a
    // (kInput), one per k.
    const auto fill_right = [&](int step) {
        const int piece = thread % G::kRightPieces, element = piece * kVec<T>;
        const int first_row = thread / G::kRightPieces;
        constexpr int kRowStep = kGemmThreads / G::kRightPieces;
        constexpr int kCopies = G::kRightRows / kRowStep;
        const int k0 = begin + step * G::kStep;
        unsigned char* const stage = stage_of(step) + kRows * G::kLeftRow;
        unsigned char* const to =
            stage + first_row * G::kRightRow + G::right_piece(first_row, piece) * kPieceBytes;
        const auto at = [&](int i) {
            if constexpr (kRowStep % 8 == 0) return to + i * kRowStep * G::kRightRow;
            const int row = first_row + i * kRowStep;
            return stage + row * G::kRightRow + G::right_piece(row, piece) * kPieceBytes;
        };
        const auto copy = [&](bool whole, auto&& piece_of) {
            copy_pieces<T, kCopies>(whole, args.right_aligned, at, piece_of);
        };
        const T* const a = static_cast<const T*>(bank.a);
        const T* const b = static_cast<const T*>(bank.b);
        if constexpr (kProduct == Product::kShrink) {
            const int n = end - k0 - element, k = n > 0 ? k0 + element : 0;
            copy(all_ranks && n >= kVec<T>, [&](int i) {
                const T* const rank = rank_of[first_row + i * kRowStep];
                return Piece<T>{(rank ? rank : a) + k, rank ? n : 0};
            });
        } else if constexpr (kProduct == Product::kExpand) {
            const int k = k0 + element;
            const T* const page = k < end ? b_page<T>(bank, tile.slot, k / kPageRanks) : nullptr;
            const int n = page ? end - k : 0;
            const T* const from =
                (page ? page + k % kPageRanks : b) + (first_column + first_row) * bank.b_row_stride;
            copy(columns == kGemmColumns && n >= kVec<T>, [&](int i) {
                const int row = first_row + i * kRowStep;
                return Piece<T>{from + i * kRowStep * bank.b_row_stride, row < columns ? n : 0};
            });
        } else {
            // Only training takes this branch. There a and b are ordinary tensors, not pages of a
            // pool, and have constant strides.
            constexpr bool kOfB = kProduct == Product::kProject;
            const int n = columns - element, k = k0 + first_row;
            const int64_t stride = kOfB ? bank.b_row_stride : bank.a_row_stride;
            const T* const from =
                (kOfB ? b + tile.slot * bank.b_slot_stride : a + tile.slot * bank.a_slot_stride) +
                first_column + element + k * stride;
            copy(k0 + G::kStep <= end && n >= kVec<T>, [&](int i) {
                return Piece<T>{from + i * kRowStep * stride, k + i * kRowStep < end ? n : 0};
            });
        }
    };
    // The thread that copied elements of x applies the dropout mask to them.
    const auto drop = [&](int step) {
        if (kProduct != Product::kShrink || args.dropout.threshold == 0) return;
        const Mask mask = mask_of(args.dropout, args.lora, tiling, tile);
        const int k = begin + step * G::kStep + left_piece * kVec<Left>;
#pragma unroll 1
        for (int row = left_row; row < tile.rows; row += kLeftRowStep)
            drop_piece<Left>(left_at(step, row), mask, mask.row(row, row_of[row]), k);
    };

    // Loads of right do not depend on v and are issued before the wait for v.
#pragma unroll
    for (int s = 0; s < G::kStages - 1; ++s)
        if (s < steps) fill_right(s);
    if constexpr (kProduct == Product::kExpand) lx::grid_dependency_wait();
    const Ring<G::kStages> stages{steps};
    stages.fill(fill_left);
    const auto fill = [&](int step) {
        fill_right(step);
        fill_left(step);
    };

    typename G::Sums sums = {};
    for (int slice = 0, step = 0; step < steps; ++slice) {
        lx::syncwarp();  // keeps the compiler from merging the two loops
        const int slice_end =
            G::kUpdate ? steps : lx::min(steps, step + args.slice_width / G::kStep);
        for (; step < slice_end; ++step) {
            stages.consume(step, fill, drop);
            const unsigned char* const stage = stage_of(step);
            if (active)
                multiply<G, T>(sums, stage, stage + kRows * G::kLeftRow, warp_row, warp_column);
        }
        // kShrink, kProject: store the sums of the slice, or add them to those of earlier slices.
        if constexpr (!G::kUpdate) {
            if (!active) continue;
            // The sum of the slices so far is stored in the output; only this lane reads it again.
            float factor = 1.0f;
            if (step == steps && args.finished)
                factor = args.dropout.inverse_keep * (bank.scale ? bank.scale[tile.slot] : 1.0f);
            const bool paired = ranks_paired(static_cast<float*>(args.out), args.out_row_stride);
#pragma unroll
            for (int m = 0; m < G::kTilesM; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = warp_row + m * kTileRows + 8 * h + lane / 4;
                    if (row >= tile.rows) continue;
                    float* const out = static_cast<float*>(args.out) +
                                       blockIdx.y * args.split_stride +
                                       row_of[row] * args.out_row_stride + first_column;
#pragma unroll
                    for (int j = 0; j < G::kTilesN; ++j) {
                        const int rank = warp_column + 8 * j + 2 * (lane % 4);
                        float part[2] = {sums[m][j][2 * h], sums[m][j][2 * h + 1]};
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            if (slice > 0 && rank + i < columns) part[i] += out[rank + i];
                            sums[m][j][2 * h + i] = 0;
                        }
                        store_ranks(out + rank, columns - rank, paired, factor * part[0],
                                    factor * part[1]);
                    }
                }
            }
        }
    }
    lx::cp_async_wait_all();

    // kExpand, kInput: the sums pass through shared memory, so that a thread updates whole pieces
    // of a row of out.
    if constexpr (G::kUpdate) {
        lx::syncthreads();  // the ring has been read
        float* const delta = reinterpret_cast<float*>(ring);
        if (active) {
#pragma unroll
            for (int m = 0; m < G::kTilesM; ++m) {
#pragma unroll
                for (int j = 0; j < G::kTilesN; ++j) {
                    float* const p = delta + (warp_row + m * kTileRows + lane / 4) * G::kDeltaRow +
                                     warp_column + 8 * j + 2 * (lane % 4);
                    *reinterpret_cast<float2*>(p) = {sums[m][j][0], sums[m][j][1]};
                    *reinterpret_cast<float2*>(p + 8 * G::kDeltaRow) = {sums[m][j][2],
                                                                        sums[m][j][3]};
                }
            }
        }
        lx::syncthreads();  // delta is complete
        const Mask mask = mask_of(args.dropout, args.lora, tiling, tile);
        // A thread updates 16 bytes of each of four rows at a time. The four loads are in flight
        // together, and each element is rounded once.
        constexpr int kPieces = kGemmColumns / kVec<T>, kRowStep = kGemmThreads / kPieces;
        constexpr int kBatch = 4;
        const int piece = thread % kPieces, column = first_column + piece * kVec<T>;
        const int n = columns - piece * kVec<T>;
        T* const out = static_cast<T*>(args.out) + column;
#pragma unroll 1
        for (int first = thread / kPieces; first < tile.rows && n > 0; first += kBatch * kRowStep) {
            uint4 words[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                // Past the last row, reload the thread's first row, which no other thread writes.
                const int row = first + i * kRowStep < tile.rows ? first + i * kRowStep : first;
                words[i] = load_piece(out + row_of[row] * args.out_row_stride, n, args.out_aligned);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int row = first + i * kRowStep;
                if (row >= tile.rows) continue;
                float d[kVec<T>];
#pragma unroll
                for (int q = 0; q < kVec<T> / 4; ++q) {
                    const float4 four = *reinterpret_cast<const float4*>(
                        delta + row * G::kDeltaRow + piece * kVec<T> + 4 * q);
                    d[4 * q] = four.x, d[4 * q + 1] = four.y;
                    d[4 * q + 2] = four.z, d[4 * q + 3] = four.w;
                }
                if constexpr (kProduct == Product::kInput) {
                    if (args.dropout.threshold != 0) {
                        bool keep[kVec<T>];
                        keep_elements_of(mask, mask.row(row, row_of[row]), column, keep);
                        // Adding -0 leaves every number unchanged, even another -0.
#pragma unroll
                        for (int e = 0; e < kVec<T>; ++e) d[e] = keep[e] ? d[e] : -0.0f;
                    }
                }
                store_piece(out + row_of[row] * args.out_row_stride, n, args.out_aligned,
                            add_to_words<T>(words[i], d));
            }
        }
    }
}

// Maximum rows per tile: 128, or 64 if floats are split into two tf32, which takes registers.
template <class T, Product kProduct>
constexpr int kMostRows = GemmShape<T, kProduct, 64>::kTf32 ? 64 : 128;

// ------------------------------------------------------------------------------------------------
// Host side: functions that set left, right and out of a Gemm, and its launch.

inline Gemm gemm_of(const LoraArgs& lora, const void* left, int64_t left_row_stride,
                    int64_t left_element) {
    Gemm gemm{};
    gemm.lora = lora;
    gemm.left = left;
    gemm.left_row_stride = left_row_stride;
    gemm.left_aligned = aligned_16(left, {left_row_stride}, left_element);
    return gemm;
}
inline void take_a(Gemm& gemm) {
    const LoraBank& bank = gemm.lora.bank;
    gemm.width = bank.in_features;
    gemm.right_aligned =
        aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride},
                   element_size(gemm.lora.dtype));
}
inline void take_b(Gemm& gemm) {
    const LoraBank& bank = gemm.lora.bank;
    gemm.width = bank.out_features;
    gemm.right_aligned =
        aligned_16(bank.b, {bank.b_slot_stride, bank.b_page_stride, bank.b_row_stride},
                   element_size(gemm.lora.dtype));
}
inline void give(Gemm& gemm, void* out, int64_t out_row_stride) {
    gemm.out = out;
    gemm.out_row_stride = out_row_stride;
    gemm.out_aligned = aligned_16(out, {out_row_stride}, element_size(gemm.lora.dtype));
}

template <class T, Product kProduct, int kRows>
LaunchStatus launch_tile(Gemm args, int64_t splits, bool dependent, void* stream) {
    using G = GemmShape<T, kProduct, kRows>;
    args.row_tiles = static_cast<int>(num_tiles(args.lora, kRows));
    const int64_t columns = G::kUpdate ? args.width : args.lora.bank.max_rank;
    const int64_t blocks = args.row_tiles * ceil_div(columns, kGemmColumns);
    if (blocks > kMaxGridX || splits > kMaxGridY) return kInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
    return dependent ? LX_LAUNCH_PDL((lora_gemm_kernel<T, kProduct, kRows>), grid, kGemmThreads,
                                     G::kRingBytes, stream, args, tiling(args.lora, kRows))
                     : LX_LAUNCH((lora_gemm_kernel<T, kProduct, kRows>), grid, kGemmThreads,
                                 G::kRingBytes, stream, args, tiling(args.lora, kRows));
}

// For up to 256 rows, expand uses a tile of 16 rows. The only other product of so few rows is the
// shrink of training, which uses a tile of 64.
template <Product kProduct>
LaunchStatus launch_gemm(const Gemm& args, int64_t splits, bool dependent, void* stream) {
    return with_dtype(args.lora.dtype, [&]<class T>() {
        const auto launch = [&]<int kRows>() {
            return launch_tile<T, kProduct, kRows>(args, splits, dependent, stream);
        };
        const int32_t rows = lora_chunk_rows(args.lora.num_tokens);
        if constexpr (kProduct == Product::kExpand)
            if (rows == 16) return launch.template operator()<16>();
        return rows == 128 ? launch.template operator()<kMostRows<T, kProduct>>()
                           : launch.template operator()<64>();
    });
}

}  // namespace lora_ext
