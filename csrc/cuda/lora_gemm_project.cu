// The projections onto large ranks, x -> v and dy -> dv (lora_gemm.cuh), and the sum over their
// splits.
#include "lora_gemm.cuh"

namespace lora_ext {
namespace {

template <Product kProduct>
LaunchStatus launch(const Gemm& args, int64_t splits, void* stream) {
    const LoraArgs& lora = args.lora;
    return with_dtype(lora.dtype, [&]<class T>() {
        return lora_chunk_rows(lora.num_tokens) == 128
                   ? launch_gemm<T, kProduct, kMostRows<T, kProduct>>(args, lora.bank.max_rank,
                                                                      splits, false, stream)
                   : launch_gemm<T, kProduct, 64>(args, lora.bank.max_rank, splits, false, stream);
    });
}

// v[t, j] = c * sum of the splits, which v may lie in: a warp reads the splits of its elements and
// then writes them. Block: 16 rows of one adapter, 128 ranks; the splits are on their way together.
__global__ void __launch_bounds__(kGemmThreads)
    lora_gemm_reduce_kernel(const __grid_constant__ LoraArgs args,
                            const __grid_constant__ Tiling tiling,
                            const __grid_constant__ Partials v, float inverse_keep, bool aligned) {
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kTileRows);
    const RowTile tile = find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    const int first = static_cast<int>(blockIdx.y) * kGemmColumns;
    if (tile.rank <= first) {
        lx::grid_dependency_wait();  // the end of this grid must not come before that of its
                                     // producer
        return;
    }
    lx::syncthreads();  // row_of
    const float factor = inverse_keep * (args.bank.scale ? args.bank.scale[tile.slot] : 1.0f);
    // Four ranks a lane. Where there are none, the block's first ones stand in.
    const int rank = first + lx::lane_id() * 4, n = tile.rank - rank;
    lx::grid_dependency_wait();
    for (int i = lx::warp_id(); i < tile.rows; i += kGemmThreads / lx::kWarpSize) {
        const int64_t row = row_of[i];
        const float* const p = v.data + row * v.row_stride + (n > 0 ? rank : first);
        float sum[4] = {};
        add_splits(v.splits, sum, [&](int split, float (&part)[4]) {
            const float4 four = *reinterpret_cast<const float4*>(p + split * v.split_stride);
            part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
        });
        float* const out = static_cast<float*>(args.v) + row * args.v_row_stride + rank;
        if (aligned && n >= 4) {
            *reinterpret_cast<float4*>(out) = {factor * sum[0], factor * sum[1], factor * sum[2],
                                               factor * sum[3]};
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < n) out[j] = factor * sum[j];
        }
    }
}

}  // namespace

LaunchStatus run_gemm_reduce(const LoraArgs& args, const Partials& v, float inverse_keep,
                             bool dependent, void* stream) {
    const dim3 grid(num_tiles(args, kTileRows),
                    static_cast<unsigned>(ceil_div(args.bank.max_rank, kGemmColumns)));
    const bool aligned = aligned_16(args.v, {args.v_row_stride}, 4);
    return dependent ? LX_LAUNCH_PDL(lora_gemm_reduce_kernel, grid, kGemmThreads, 0, stream, args,
                                     tiling(args, kTileRows), v, inverse_keep, aligned)
                     : LX_LAUNCH(lora_gemm_reduce_kernel, grid, kGemmThreads, 0, stream, args,
                                 tiling(args, kTileRows), v, inverse_keep, aligned);
}

LaunchStatus run_gemm_shrink(const LoraArgs& args, const Partials& v, void* stream) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype);
    Gemm gemm{};
    gemm.lora = args;
    gemm.left = args.x;
    gemm.left_row_stride = args.x_row_stride;
    gemm.width = bank.in_features;
    gemm.out = v.data;
    gemm.out_row_stride = v.row_stride;
    gemm.slice_width = v.split_width;
    gemm.slice_count = 1;
    gemm.split_stride = v.split_stride;
    gemm.finished = v.scaled;
    gemm.left_aligned = aligned_16(args.x, {args.x_row_stride}, size);
    gemm.right_aligned =
        aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, size);
    return launch<Product::kShrink>(gemm, v.splits, stream);
}

LaunchStatus run_gemm_projection(const Projection& args, bool side_b, const Slices& slices,
                                 void* stream) {
    Gemm gemm{};
    gemm.lora = args.lora;
    gemm.dropout = args.dropout;
    gemm.left = args.lora.x;
    gemm.left_row_stride = args.lora.x_row_stride;
    gemm.width = side_b ? args.lora.bank.out_features : args.lora.bank.in_features;
    gemm.out = args.out;
    gemm.out_row_stride = args.out_row_stride;
    gemm.slice_width = slices.width;
    gemm.slice_count = slices.per_block;
    gemm.split_stride = slices.split_stride;
    gemm.finished = slices.finished;
    gemm.left_aligned = slices.x_aligned;
    gemm.right_aligned = slices.w_aligned;
    const int64_t splits = slices.count / slices.per_block;
    return side_b ? launch<Product::kProject>(gemm, splits, stream)
                  : launch<Product::kShrink>(gemm, splits, stream);
}

}  // namespace lora_ext
