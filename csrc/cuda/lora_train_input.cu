// dx[t, :] = round(dx[t, :] + mask * (dv[t, :] a[s])), in place; a dropped element keeps its bits.
//
// A block has 64 rows of one adapter and a range of columns. Of its eight warps, four are along the
// rows and two along the columns of a band of 256 bytes. The rows of dv stay in shared memory. The
// ranks of A for the next band are loaded by cp.async while the current band is written. If shared
// memory is too small for all ranks, the ranks of A and dv are loaded in stages, in order, so that
// the result does not depend on the size of shared memory. The product is written to shared memory
// as floats, so that a thread updates 16 adjacent bytes of dx. This takes one load, issued before
// the product, two Philox calls for the mask, one rounding and one store.
//   bfloat16   dv = high + low, two m16n8k16
//   float16    A is exact in tf32, dv = high + low in tf32
//   float32    A and dv as high + low in tf32, three products
// Bound: bytes of dx, read and written once.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsN = 2;      // warps along the columns; the other factor, 4, is along the rows
constexpr int kRangeBands = 4;  // bands per block
template <class T>
constexpr int kWarpColumns = kBandColumns<T> / kWarpsN;
template <class T>
constexpr int kDeltaRow = kBandColumns<T> + 8;  // in floats; float2 stores have no bank conflict

struct Width {
    int range;  // columns per block
    int pages;  // pages per stage, even: those of the largest rank, or as many as fit
    bool dv_aligned, a_aligned, dx_aligned;
};

template <class T>
constexpr int shared_bytes(int pages) {
    return kTrainRows * v_row_bytes(pages) + pages * kPageRanks * kBandRow +
           kTrainRows * kDeltaRow<T> * 4;
}

// Minimum blocks per multiprocessor. With float16 on Blackwell, two blocks would spill registers.
// If the ranks are loaded in stages, shared memory has room for only one block anyway. Otherwise
// the loop over pages is unrolled only twice, which takes fewer registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, bool kStaged>
constexpr int kMinBlocks = std::is_same_v<T, lx::f16> && kStaged ? 1 : 2;
template <class T, bool kStaged>
constexpr int kPageUnroll = std::is_same_v<T, lx::f16> && !kStaged ? 2 : 1;
#else
template <class T, bool kStaged>
constexpr int kMinBlocks = 2;
#endif

// kStaged: shared memory does not hold all ranks, so they are loaded in several stages.
template <class T, bool kStaged>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kStaged>)
    lora_train_input_kernel(const __grid_constant__ LoraTrainArgs args,
                            const __grid_constant__ Tiling tiling,
                            const __grid_constant__ Width width) {
    LX_SHARED(int32_t, row_of, kTrainRows);
    LX_DYN_SHARED(shared);
    const LoraBank& bank = args.lora.bank;
    const int thread = lx::thread_rank(), lane = lx::lane_id(), warp = lx::warp_id();
    const RowTile tile =
        find_tile<kTrainRows>(args.lora, tiling, static_cast<int>(blockIdx.x), row_of);
    if (tile.rank == 0) return;
    lx::syncthreads();  // row_of is complete

    const int all_pages = (tile.rank + 15) / 16 * 2;
    const int stages = kStaged ? (all_pages + width.pages - 1) / width.pages : 1;
    const auto pages_of = [&](int stage) {
        return kStaged ? lx::min(all_pages - stage * width.pages, width.pages) : all_pages;
    };
    const VTile<T> dv(shared, width.pages);
    unsigned char* const a_band = shared + kTrainRows * dv.row_bytes;
    float* const delta = reinterpret_cast<float*>(a_band + width.pages * kPageRanks * kBandRow);
    const T* a = static_cast<const T*>(bank.a) + tile.slot * bank.a_slot_stride;
    const int piece = thread % kBandPieces, first_row = thread / kBandPieces;
    constexpr int kRowStep = kThreads / kBandPieces;
    constexpr int kRowsPerThread = kTrainRows / kRowStep;

    const int begin = static_cast<int>(blockIdx.y) * width.range;
    const int end =
        static_cast<int>(lx::min<int64_t>(int64_t{begin} + width.range, bank.in_features));
    auto fill_a = [&](int column0, int stage) {
        const int column = column0 + piece * kVec<T>;
        for (int own = first_row; own < pages_of(stage) * kPageRanks; own += kRowStep) {
            const int rank = stage * width.pages * kPageRanks + own;
            const int n = rank < tile.rank ? end - column : 0;
            copy_piece<T>(a_band + own * kBandRow + piece * kPieceBytes,
                          n > 0 ? a + rank / kPageRanks * bank.a_page_stride +
                                      rank % kPageRanks * bank.a_row_stride + column
                                : static_cast<const T*>(bank.a),
                          n, width.a_aligned);
        }
    };
    const float* dv_rows = static_cast<const float*>(args.dv);
    const int padded_rows = (tile.rows + 15) / 16 * 16;
    auto fill_dv = [&](int stage) {
        const int pages = pages_of(stage);
        for (int i = thread; i < padded_rows * pages; i += kThreads) {
            const int row = i / pages, rank = (stage * width.pages + i % pages) * kPageRanks;
            const int n = row < tile.rows ? tile.rank - rank : 0;
            dv.copy(row, i % pages,
                    n > 0 ? dv_rows + row_of[row] * args.dv_row_stride + rank : dv_rows, n,
                    width.dv_aligned);
        }
    };
    auto split_dv = [&](int stage) {
        const int pages = pages_of(stage);
        if constexpr (std::is_same_v<T, lx::bf16>) {
            for (int i = thread; i < padded_rows * pages; i += kThreads)
                dv.split(i / pages, i % pages);
        }
    };
    fill_dv(0);
    fill_a(begin, 0);
    if constexpr (!kStaged) {
        lx::cp_async_wait_all();
        split_dv(0);
    }
    const Mask mask = mask_of(args.dropout, args.lora, tiling, tile);
    const int warp_row = warp / kWarpsN * kTileRows;
    const bool has_rows = warp_row < tile.rows;
    const int warp_column = warp % kWarpsN * kWarpColumns<T>;
    constexpr int kTiles = kWarpColumns<T> / 8;

    for (int column0 = begin; column0 < end; column0 += kBandColumns<T>) {
        const int column = column0 + piece * kVec<T>;
        const int n = end - column;
        uint4 words[kRowsPerThread] = {};
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
            const int row = first_row + i * kRowStep;
            if (row < tile.rows && n > 0)
                words[i] = load_piece(
                    static_cast<const T*>(args.dx) + row_of[row] * args.dx_row_stride + column, n,
                    width.dx_aligned);
        }

        float acc[kTiles][4] = {};
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            if (stage > 0) {
                lx::syncthreads();  // the previous stage has been read
                fill_dv(stage);
                fill_a(column0, stage);
            }
            lx::cp_async_wait_all();
            if constexpr (kStaged) split_dv(stage);
            lx::syncthreads();  // dv and this band of A are complete, delta has been read
            const int pages = has_rows ? pages_of(stage) : 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#pragma unroll(kPageUnroll<T, kStaged>)
#endif
            for (int page = 0; page < pages; page += std::is_same_v<T, lx::bf16> ? 2 : 1) {
                if constexpr (std::is_same_v<T, lx::bf16>) {
                    // ldmatrix loads rows 0-7 and 8-15 of one page, then of the next.
                    uint32_t high[4], low[4];
                    const unsigned char* p = dv.at(warp_row + lane % 16, page + lane / 16);
                    lx::ldmatrix_x4(high, p);
                    lx::ldmatrix_x4(low, p + kPieceBytes);
#pragma unroll
                    for (int j = 0; j < kTiles; j += 2) {
                        // ldmatrix loads and transposes both pages of eight columns, then of
                        // eight more.
                        uint32_t af[4];
                        lx::ldmatrix_x4_trans(af, a_band +
                                                      (page * kPageRanks + lane % 16) * kBandRow +
                                                      (warp_column + 8 * (j + lane / 16)) * 2);
                        lx::mma_m16n8k16<T>(acc[j], low, {af[0], af[1]});
                        lx::mma_m16n8k16<T>(acc[j + 1], low, {af[2], af[3]});
                        lx::mma_m16n8k16<T>(acc[j], high, {af[0], af[1]});
                        lx::mma_m16n8k16<T>(acc[j + 1], high, {af[2], af[3]});
                    }
                } else {
                    // Lane t passes ranks 2t and 2t + 1 of the page as k = t and t + 4 of an mma.
                    const int rank = 2 * (lane % 4);
                    const float2 upper =
                        reinterpret_cast<const float2*>(dv.at(warp_row + lane / 4, page))[lane % 4];
                    const float2 lower = reinterpret_cast<const float2*>(
                        dv.at(warp_row + lane / 4 + 8, page))[lane % 4];
                    const float v[4] = {upper.x, lower.x, upper.y, lower.y};
                    const unsigned char* const a_page_rows = a_band + page * kPageRanks * kBandRow;
                    if constexpr (sizeof(T) == 2) {
#pragma unroll
                        for (int j = 0; j < kTiles; j += 4) {
                            // ldmatrix loads and transposes four groups of eight columns.
                            uint32_t af[4];
                            lx::ldmatrix_x4_trans(af, a_page_rows + lane % 8 * kBandRow +
                                                          (warp_column + 8 * (j + lane / 8)) * 2);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const float2 pair = lx::unpack_floats<T>(af[i]);
                                mma_floats<false, true>(acc[j + i], v, {pair.x, pair.y});
                            }
                        }
                    } else {
#pragma unroll
                        for (int j = 0; j < kTiles; ++j) {
                            const unsigned char* p = a_page_rows + rank * kBandRow +
                                                     (warp_column + 8 * j + lane / 4) * 4;
                            mma_floats<false, false>(
                                acc[j], v,
                                {*reinterpret_cast<const float*>(p),
                                 *reinterpret_cast<const float*>(p + kBandRow)});
                        }
                    }
                }
            }
        }
        if (has_rows) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                float* p = delta + (warp_row + lane / 4) * kDeltaRow<T> + warp_column + 8 * j +
                           2 * (lane % 4);
                *reinterpret_cast<float2*>(p) = {acc[j][0], acc[j][1]};
                *reinterpret_cast<float2*>(p + 8 * kDeltaRow<T>) = {acc[j][2], acc[j][3]};
            }
        }
        lx::syncthreads();  // delta is complete, A has been read
        if (column0 + kBandColumns<T> < end) {
            if constexpr (kStaged) fill_dv(0);
            fill_a(column0 + kBandColumns<T>, 0);
        }
        lx::cp_async_commit();

#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
            const int row = first_row + i * kRowStep;
            if (row >= tile.rows || n <= 0) continue;
            bool keep[kVec<T>];
            if (args.dropout.threshold != 0) {
                keep_elements_of(mask, mask.row(row, row_of[row]), column, keep);
            } else {
#pragma unroll
                for (int e = 0; e < kVec<T>; ++e) keep[e] = true;
            }
            const float4* from =
                reinterpret_cast<const float4*>(delta + row * kDeltaRow<T>) + piece * (kVec<T> / 4);
            float d[kVec<T>];
#pragma unroll
            for (int q = 0; q < kVec<T> / 4; ++q) {
                const float4 part = from[q];
                const float four[4] = {part.x, part.y, part.z, part.w};
                // Adding -0 leaves every number unchanged, even another -0.
#pragma unroll
                for (int e = 0; e < 4; ++e) d[4 * q + e] = keep[4 * q + e] ? four[e] : -0.0f;
            }
            const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
            uint32_t out[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if constexpr (sizeof(T) == 2) {
                    const float2 y = lx::unpack_floats<T>(w[k]);
                    out[k] = lx::pack_floats<T>(y.x + d[2 * k], y.y + d[2 * k + 1]);
                } else {
                    out[k] = lx::bit_cast<uint32_t>(lx::bit_cast<float>(w[k]) + d[k]);
                }
            }
            store_piece(static_cast<T*>(args.dx) + row_of[row] * args.dx_row_stride + column, n,
                        width.dx_aligned, {out[0], out[1], out[2], out[3]});
        }
    }
}

}  // namespace

LaunchStatus run_input_gradient(const LoraTrainArgs& args, void* stream) {
    const LoraArgs& lora = args.lora;
    const LoraBank& bank = lora.bank;
    const int64_t size = element_size(lora.dtype);
    Width width{};
    width.pages = static_cast<int>(ceil_div(lx::min(bank.max_rank, kFusedRank), 16)) * 2;
    width.dv_aligned = aligned_16(args.dv, {args.dv_row_stride}, 4);
    width.a_aligned =
        aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, size);
    width.dx_aligned = aligned_16(args.dx, {args.dx_row_stride}, size);
    width.range = static_cast<int>(kRangeBands * kBandBytes / size);
    while (ceil_div(bank.in_features, width.range) > kMaxGridY) width.range *= 2;

    const LoraPlanLayout layout{lora.num_tokens, bank.num_adapters};
    const Tiling tiles = tiling(layout, kTrainRows);
    const dim3 grid(static_cast<unsigned>(layout.max_chunks() * tiles.per_chunk),
                    static_cast<unsigned>(ceil_div(bank.in_features, width.range)));
    declare_common(lora);
    LoraArgs weights = lora;  // used to declare the pages of a, with dx as x
    weights.x = args.dx;
    weights.x_row_stride = args.dx_row_stride;
    declare_a(weights);
    LX_BUF_ROWS(args.dv, lora.num_tokens, bank.max_rank * 4, args.dv_row_stride * 4,
                lx::Access::kRead);
    LX_BUF_ROWS(args.dx, lora.num_tokens, bank.in_features * size, args.dx_row_stride * size,
                lx::Access::kReadWrite);
    declare_seed(args.dropout, bank.num_adapters);
    if (takes_gemm(lora)) return run_gemm_input_gradient(args, stream);
    return with_dtype(lora.dtype, [&]<class T>() {
        while (width.pages > 2 && shared_bytes<T>(width.pages) > most_dynamic_bytes())
            width.pages -= 2;
        const int bytes = shared_bytes<T>(width.pages);
        return width.pages * kPageRanks < bank.max_rank
                   ? LX_LAUNCH((lora_train_input_kernel<T, true>), grid, kThreads, bytes, stream,
                               args, tiles, width)
                   : LX_LAUNCH((lora_train_input_kernel<T, false>), grid, kThreads, bytes, stream,
                               args, tiles, width);
    });
}

}  // namespace lora_ext
