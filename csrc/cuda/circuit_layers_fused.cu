// Values of the units of one stage of a circuit on tensor cores; formulas in circuit_layers.h,
// operands and their precision in circuit_mma.cuh.
//
// Block (tile of 16 lanes, node, 128 sums), eight warps. Its threads make the terms of the node, as
// 16-bit numbers in shared memory, a lane to a row; then each warp takes two tiles of eight sums.
// Weights are the step before, scaled to maximum 1. Bound: bytes of weights from L2 per tile.
//
// A sum below what its mode can be trusted with is taken again by its thread, in float32.
#include "circuit_layers.cuh"
#include "circuit_mma.cuh"

namespace lora_ext {
namespace {

static_assert(kMmaRows == kTile);
constexpr int kBlockSums = kLayerWarps * kWarpSums;

// One term as operand words have it.
template <bool kHigh>
LX_DEVICE void store_term(unsigned char* high, unsigned char* low, float e) {
    using Half = MmaHalf<kHigh>;
    const Half rounded = lx::from_float<Half>(kHigh ? e : e * kHalfScale);
    *reinterpret_cast<Half*>(high) = rounded;
    if constexpr (kHigh)
        *reinterpret_cast<Half*>(low) = lx::from_float<Half>(e - lx::to_float(rounded));
}

template <bool kHigh>
__global__ void __launch_bounds__(kLayerThreads, 2)
    layers_fused_kernel(const __grid_constant__ LayersArgs args, int64_t begin, int64_t end) {
    LX_DYN_SHARED(shared);
    LX_SHARED(float, partial, kLayerWarps* kTile);
    LX_SHARED(float, tops, kTile);
    const LayerTile tile(args, int64_t{blockIdx.x} * kTile);
    const int rank = lx::thread_rank(), lane = rank % kTile;
    constexpr int kTermStep = kLayerThreads / kTile;
    for (int64_t n = begin + blockIdx.y; n < end; n += gridDim.y) {
        const LayersNode node = args.program.nodes()[n];
        if (node.matrix < 0) {
            if (blockIdx.z == 0) tile.copy_products(node);
            continue;
        }
        const LayersMatrix m = args.program.matrices()[node.matrix];
        const float own_top = tile.top_of(node, partial);
        if (rank < kTile) tops[rank] = own_top;
        const float base = shift_of(own_top);
        const int row_bytes = value_row_bytes(m.width);
        unsigned char *high = shared + lane * row_bytes, *low = high + kMmaRows * row_bytes;
        const auto store = [&](int i, float e) { store_term<kHigh>(high + 2 * i, low + 2 * i, e); };
        tile.for_terms(node, lane, rank / kTile, m.width, kTermStep,
                       [&](int i, float l) { store(i, lx::exp_approx(l - base)); });
        const int whole = (m.width + kStep - 1) / kStep * kStep;
        for (int i = m.width + rank / kTile; i < whole; i += kTermStep) store(i, 0);
        lx::syncthreads();

        const float* weight = static_cast<const float*>(args.weight) + m.weight;
        const bool aligned = m.width % 4 == 0 && m.weight % 4 == 0;
        int first = static_cast<int>(blockIdx.z) * kBlockSums + lx::warp_id() * kWarpSums;
        for (; first < m.units; first += static_cast<int>(gridDim.z) * kBlockSums) {
            float acc[kWarpTiles][4] = {};
            mma_products<kHigh>(shared, weight, m.width, m.units, first, aligned, acc);
            unsigned lost = 0;  // results that have to be taken again
#pragma unroll
            for (int i = 0; i < 4 * kWarpTiles; ++i) {
                const int row = mma_row(i), o = mma_sum(i, first);
                if (o >= m.units) continue;
                const float s = mma_result<kHigh>(acc, i), top = tops[row];
                const float shift = tile.shift_of(m, o);
                if (s < mma_trusted<kHigh>(m.width) && top != kImpossible && shift != kImpossible)
                    lost |= 1u << i;
                tile.at(args.val, node.out + o)[row] = logf(s) + shift + top;
            }
#pragma unroll 1
            while (lost) {
                const int i = lx::ffs(lost) - 1;
                lost &= lost - 1;
                const int row = mma_row(i), o = mma_sum(i, first);
                tile.at(args.val, node.out + o)[row] = tile.rescued_sum(node, m, o, row);
            }
        }
        lx::syncthreads();  // the terms have been read
    }
}

}  // namespace

LaunchStatus launch_layers_fused(const LayersArgs& args, const LayersStage& stage, void* stream) {
    declare_layers(args);
    declare_layer_weights(args);
    declare_units(args, args.val, lx::Access::kReadWrite);
    const dim3 grid(static_cast<unsigned>(lane_tiles(args)), along_grid(stage.end - stage.begin),
                    along_grid(ceil_div(stage.units, kBlockSums)));
    const bool high = args.precision == LayersPrecision::kHigh;
    const int bytes = mma_shared_bytes(high, stage.width);
    return high ? LX_LAUNCH(layers_fused_kernel<true>, grid, kLayerThreads, bytes, stream, args,
                            stage.begin, stage.end)
                : LX_LAUNCH(layers_fused_kernel<false>, grid, kLayerThreads, bytes, stream, args,
                            stage.begin, stage.end);
}

}  // namespace lora_ext
