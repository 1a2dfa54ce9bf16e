// Shrink for few rows per adapter: v[t, :] = a[s] x[t, :], and the sum over its splits.
//
// Block (tile, split, rank group): up to 16 rows of one adapter x split_width in-features x 32
// ranks. Four warps share the in-features; a warp feeds mma from 16-byte loads as lora_tile.cuh
// explains: rows of x are A, the eight rows of an A page are B. Tensor cores serve one row as well
// as sixteen: at 16 bytes per load they save the unpacking, and a row's sum does not depend on its
// neighbours, so one kernel covers every batch. Bound: bytes of the A pages, each read once per
// tile.
//
// Splits come from (I) alone, so a row's v does not depend on the batch either. Partial sums go to
// the workspace and are added in the order of the splits, here or in the expand kernel.
#include "lora_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4;
constexpr int kGroupPages = 4;
constexpr int kUnroll = 2;  // 64-byte column blocks whose loads are in flight together

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32)
    lora_shrink_decode_kernel(const __grid_constant__ LoraArgs args,
                              const __grid_constant__ Tiling tiling,
                              const __grid_constant__ Partials v) {
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kTileRows);
    LX_SHARED(float, sums, kWarps * kGroupPages * kTileRows * kPageRanks);
    const LoraBank& bank = args.bank;
    const RowTile tile = find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    const int first_page = static_cast<int>(blockIdx.z) * kGroupPages;
    const int ranks = lx::min(tile.rank - first_page * kPageRanks, kGroupPages * kPageRanks);
    if (ranks <= 0) return;
    const int pages = (ranks + kPageRanks - 1) / kPageRanks;
    lx::syncthreads();  // row_of

    const int lane = lx::lane_id(), warp = lx::warp_id(), g = lane / 4, t = lane % 4;
    constexpr int kBlock = 4 * kVec<T>;  // in-features that a warp reads of a row at once
    const int width = v.split_width / kWarps;
    const int begin = static_cast<int>(blockIdx.y) * v.split_width + warp * width;
    const int end = lx::min(begin + width, bank.in_features);

    // Where this lane reads: rows g and g + 8 of x, rank row g of each page. n_*: 0 for "not at
    // all".
    const T* x[2];
    int n_x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = g + 8 * h;
        n_x[h] = row < tile.rows ? end : 0;
        x[h] =
            static_cast<const T*>(args.x) + (row < tile.rows ? row_of[row] * args.x_row_stride : 0);
    }
    const T* a[kGroupPages];
    int n_a[kGroupPages];
#pragma unroll
    for (int p = 0; p < kGroupPages; ++p) {
        a[p] = nullptr;
        if (p * kPageRanks + g < ranks) a[p] = a_page<T>(bank, tile.slot, first_page + p);
        n_a[p] = a[p] ? end : 0;
        if (a[p]) a[p] += g * bank.a_row_stride;
    }

    float acc[kGroupPages][4] = {};
    for (int k0 = begin; k0 < end; k0 += kUnroll * kBlock) {
        uint4 xw[kUnroll][2], aw[kUnroll][kGroupPages];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int k = k0 + u * kBlock + t * kVec<T>;
#pragma unroll
            for (int h = 0; h < 2; ++h) xw[u][h] = load_words<T, kAligned>(x[h] + k, n_x[h] - k);
#pragma unroll
            for (int p = 0; p < kGroupPages; ++p)
                aw[u][p] = load_words<T, kAligned>(a[p] + k, n_a[p] - k);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int p = 0; p < kGroupPages; ++p)
                if (p < pages) mma_words<T>(acc[p], xw[u][0], xw[u][1], aw[u][p]);
        }
    }

    // sums[warp][row][rank of the group]
    constexpr int kRanks = kGroupPages * kPageRanks;
    float* mine = sums + warp * kTileRows * kRanks;
#pragma unroll
    for (int p = 0; p < kGroupPages; ++p) {
        const int column = p * kPageRanks + 2 * t;
        *reinterpret_cast<float2*>(mine + g * kRanks + column) = {acc[p][0], acc[p][1]};
        *reinterpret_cast<float2*>(mine + (g + 8) * kRanks + column) = {acc[p][2], acc[p][3]};
    }
    lx::syncthreads();
    const float scale = v.scaled && bank.scale ? bank.scale[tile.slot] : 1.0f;
    for (int i = lx::thread_rank(); i < tile.rows * kRanks; i += kWarps * lx::kWarpSize) {
        const int row = i / kRanks, rank = i % kRanks;
        if (rank >= ranks) continue;
        float sum = sums[i];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum += sums[w * kTileRows * kRanks + i];
        v.data[blockIdx.y * v.split_stride + row_of[row] * v.row_stride + first_page * kPageRanks +
               rank] = scale * sum;
    }
}

// v[t, j] = scale[s] * sum of the splits, which v may lie in: a thread reads an element's splits
// and then writes it. For callers that want v itself, and before many blocks of expand.
__global__ void __launch_bounds__(128)
    lora_reduce_kernel(const __grid_constant__ LoraArgs args, const __grid_constant__ Tiling tiling,
                       const __grid_constant__ Partials v) {
    LX_SHARED(int32_t, row_of, kTileRows);
    const RowTile tile = find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    if (tile.rank == 0) {
        lx::grid_dependency_wait();  // the end of this grid must not come before that of its
                                     // producer
        return;
    }
    lx::syncthreads();  // row_of
    const float scale = args.bank.scale ? args.bank.scale[tile.slot] : 1.0f;
    lx::grid_dependency_wait();
    for (int i = lx::thread_rank(); i < tile.rows * tile.rank; i += 128) {
        const int64_t row = row_of[i / tile.rank];
        const int rank = i % tile.rank;
        const float* p = v.data + row * v.row_stride + rank;
        float sum = *p;
        for (int s = 1; s < v.splits; ++s) sum += p[s * v.split_stride];
        static_cast<float*>(args.v)[row * args.v_row_stride + rank] = scale * sum;
    }
}

}  // namespace

LaunchStatus run_shrink_decode(const LoraArgs& args, const Partials& v, void* stream) {
    const LoraBank& bank = args.bank;
    const bool aligned = shrink_aligned(args);
    const dim3 grid(num_tiles(args, kTileRows), static_cast<unsigned>(v.splits),
                    static_cast<unsigned>(ceil_div(bank.max_rank, kGroupPages * kPageRanks)));
    declare_common(args);
    declare_a(args);
    declare_v(args, v, lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return aligned ? LX_LAUNCH((lora_shrink_decode_kernel<T, true>), grid, kWarps * 32, 0,
                                   stream, args, tiling(args, kTileRows), v)
                       : LX_LAUNCH((lora_shrink_decode_kernel<T, false>), grid, kWarps * 32, 0,
                                   stream, args, tiling(args, kTileRows), v);
    });
}

LaunchStatus run_reduce(const LoraArgs& args, const Partials& v, void* stream) {
    declare_common(args);
    LX_BUF_ROWS(args.v, args.num_tokens, args.bank.max_rank * 4, args.v_row_stride * 4,
                args.v == v.data ? lx::Access::kReadWrite : lx::Access::kWrite);
    declare_v(args, v, lx::Access::kRead);
    return LX_LAUNCH_PDL(lora_reduce_kernel, num_tiles(args, kTileRows), 128, 0, stream, args,
                         tiling(args, kTileRows), v);
}

}  // namespace lora_ext
