// The projections to large ranks, x -> v and dy -> dv (lora_gemm.cuh), and the sum of their splits.
#include "lora_gemm.cuh"

namespace lora_ext {
namespace {

// Computes v[t, j] = c * sum of the splits. v may overlap the splits, because a warp writes an
// element only after it has read the splits of this element. A block computes 128 ranks of 16 rows
// of one adapter. The loads of up to eight splits of an element are in flight together.
__global__ void __launch_bounds__(kGemmThreads)
    lora_gemm_reduce_kernel(const __grid_constant__ LoraArgs args,
                            const __grid_constant__ Tiling tiling,
                            const __grid_constant__ Partials v, float inverse_keep, bool aligned) {
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kTileRows);
    const RowTile tile = find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    const int first = static_cast<int>(blockIdx.y) * kGemmColumns;
    if (tile.rank <= first) {
        lx::grid_dependency_wait();  // the next grid waits only for this grid, not for earlier ones
        return;
    }
    lx::syncthreads();  // row_of is complete
    const float factor = inverse_keep * (args.bank.scale ? args.bank.scale[tile.slot] : 1.0f);
    // Each lane sums four ranks. Lanes without ranks read the first ranks of the block instead.
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
    Gemm gemm = gemm_of(args, args.x, args.x_row_stride, element_size(args.dtype));
    take_a(gemm);
    give(gemm, v.data, v.row_stride);
    gemm.slice_width = v.split_width;
    gemm.slice_count = 1;
    gemm.split_stride = v.split_stride;
    gemm.finished = v.scaled;
    return launch_gemm<Product::kShrink>(gemm, v.splits, false, stream);
}

LaunchStatus run_gemm_projection(const Projection& args, bool side_b, const Slices& slices,
                                 void* stream) {
    const LoraArgs& lora = args.lora;
    Gemm gemm = gemm_of(lora, lora.x, lora.x_row_stride, element_size(lora.dtype));
    side_b ? take_b(gemm) : take_a(gemm);
    give(gemm, args.out, args.out_row_stride);
    gemm.dropout = args.dropout;
    gemm.slice_width = slices.width;
    gemm.slice_count = slices.per_block;
    gemm.split_stride = slices.split_stride;
    gemm.finished = slices.finished;
    const int64_t splits = slices.count / slices.per_block;
    return side_b ? launch_gemm<Product::kProject>(gemm, splits, false, stream)
                  : launch_gemm<Product::kShrink>(gemm, splits, false, stream);
}

}  // namespace lora_ext
