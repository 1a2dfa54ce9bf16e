// The factors of v that differ between the rows or the pages of an adapter (lora.h: has_factors).
//
//   v[t, r]       = c * sum of the splits,  c = scale[s, r / 8] / (1 - p)
//   weighed[t, r] = v[t, r] * w,            w = weights[t, groups[s, r / 8]]
//
// and in the backward pass, where dv contains u = dy b[s] on entry,
//
//   dweights[t, g] += <u, v> over the ranks of group g
//   dv[t, r]       = (c * u[t, r]) * w
//
// A block processes 16 rows of one adapter. Bound: bytes of v.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 128;

// The results may overlap the splits, because a warp writes an element only after it has read the
// splits of this element.
__global__ void __launch_bounds__(kThreads)
    lora_weigh_kernel(const __grid_constant__ LoraArgs args, const __grid_constant__ Tiling tiling,
                      const __grid_constant__ Partials v, float inverse_keep,
                      const __grid_constant__ FloatRows scaled,
                      const __grid_constant__ FloatRows weighed) {
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kTileRows);
    const RowTile tile = find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    if (tile.rank == 0) {
        lx::grid_dependency_wait();  // the next grid waits only for this grid, not for earlier ones
        return;
    }
    lx::syncthreads();  // row_of is complete
    lx::grid_dependency_wait();
    const int count = tile.rows * tile.rank;
    for (int first = lx::warp_id() * lx::kWarpSize; first < count; first += kThreads) {
        const int at = first + lx::lane_id(), i = lx::min(at, count - 1);
        const int64_t row = row_of[i / tile.rank];
        const int rank = i % tile.rank, page = rank / kPageRanks;
        const float factor = inverse_keep * scale_of_page(args.bank, tile.slot, page);
        const float weight = weight_of_row(args, tile.slot, row, page);
        const float* p = v.data + row * v.row_stride + rank;
        float sum[1] = {};
        add_splits(v.splits, sum,
                   [&](int split, float (&part)[1]) { part[0] = p[split * v.split_stride]; });
        if (at >= count) continue;
        const float value = factor * sum[0];
        if (scaled.data) scaled.data[row * scaled.row_stride + rank] = value;
        if (weighed.data) weighed.data[row * weighed.row_stride + rank] = value * weight;
    }
}

__global__ void __launch_bounds__(kThreads)
    lora_weigh_back_kernel(const __grid_constant__ LoraTrainArgs args,
                           const __grid_constant__ Tiling tiling) {
    LX_SHARED(int32_t, row_of, kTileRows);
    const LoraArgs& lora = args.lora;
    const LoraBank& bank = lora.bank;
    const RowTile tile = find_tile<kTileRows>(lora, tiling, static_cast<int>(blockIdx.x), row_of);
    if (tile.rank == 0) return;
    lx::syncthreads();  // row_of is complete
    float* const dv = static_cast<float*>(args.dv);
    const float* const v = static_cast<const float*>(lora.v);
    if (args.dweights) {  // one thread for each row and group
        for (int i = lx::thread_rank(); i < tile.rows * bank.num_groups; i += kThreads) {
            const int64_t row = row_of[i / bank.num_groups];
            const int group = i % bank.num_groups;
            float sum = 0;
            for (int rank = 0; rank < tile.rank; ++rank) {
                if (group_of_page(bank, tile.slot, rank / kPageRanks) == group)
                    sum += dv[row * args.dv_row_stride + rank] * v[row * lora.v_row_stride + rank];
            }
            args.dweights[row * args.dweights_row_stride + group] += sum;
        }
        lx::syncthreads();  // u has been read
    }
    for (int i = lx::thread_rank(); i < tile.rows * tile.rank; i += kThreads) {
        const int64_t row = row_of[i / tile.rank];
        const int rank = i % tile.rank, page = rank / kPageRanks;
        float* const u = dv + row * args.dv_row_stride + rank;
        const float factor = args.dropout.inverse_keep * scale_of_page(bank, tile.slot, page);
        *u = factor * *u * weight_of_row(lora, tile.slot, row, page);
    }
}

}  // namespace

LaunchStatus run_weigh(const LoraArgs& args, const Partials& v, float inverse_keep,
                       FloatRows scaled, FloatRows weighed, bool dependent, void* stream) {
    declare_common(args);
    for (const FloatRows& rows : {scaled, weighed})
        if (rows.data)
            LX_BUF_ROWS(rows.data, args.num_tokens, args.bank.max_rank * 4, rows.row_stride * 4,
                        rows.data == v.data ? lx::Access::kReadWrite : lx::Access::kWrite);
    declare_v(args, v, lx::Access::kRead);
    const unsigned blocks = num_tiles(args, kTileRows);
    const Tiling tiles = tiling(args, kTileRows);
    return dependent ? LX_LAUNCH_PDL(lora_weigh_kernel, blocks, kThreads, 0, stream, args, tiles, v,
                                     inverse_keep, scaled, weighed)
                     : LX_LAUNCH(lora_weigh_kernel, blocks, kThreads, 0, stream, args, tiles, v,
                                 inverse_keep, scaled, weighed);
}

LaunchStatus run_weigh_back(const LoraTrainArgs& args, void* stream) {
    const LoraArgs& lora = args.lora;
    declare_common(lora);
    LX_BUF_ROWS(lora.v, lora.num_tokens, lora.bank.max_rank * 4, lora.v_row_stride * 4,
                lx::Access::kConstant);
    LX_BUF_ROWS(args.dv, lora.num_tokens, lora.bank.max_rank * 4, args.dv_row_stride * 4,
                lx::Access::kReadWrite);
    if (args.dweights)
        LX_BUF_ROWS(args.dweights, lora.num_tokens, lora.bank.num_groups * 4,
                    args.dweights_row_stride * 4, lx::Access::kReadWrite);
    return LX_LAUNCH(lora_weigh_back_kernel, num_tiles(lora, kTileRows), kThreads, 0, stream, args,
                     tiling(lora, kTileRows));
}

}  // namespace lora_ext
