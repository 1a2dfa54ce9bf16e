// Computes the values of all units of a circuit from the values of its leaves. The formulas are in
// circuit_layers.h.
//
//   weights   a warp per row of weights scales the row to maximum 1, as the sum layers do
//   leaves    transposes the values of the leaves, so that rows of data become lanes
//   up        a block per tile of 16 lanes computes all nodes in order. It reads only values that
//             it has written itself, so no block waits for another. If a node has more than 2^14
//             weights, and in lower precisions, stages run one after another on tensor cores
//             instead (circuit_layers_{terms,product,run}.cu), with weights in 16-bit parts. The
//             max-product of such circuits also uses this kernel, but with one launch per stage, in
//             which each block computes a share of a node's results
//
// A product reads its terms from shared memory and its weights from L2; a thread computes one sum
// for four lanes. Bound: the bytes of the weights from L2 per tile, and the latency of the nodes.
#include "circuit_layers_parts.cuh"

namespace lora_ext {
namespace {

constexpr int kRowWarps = 4;

// kParts: number of 16-bit parts of a weight, or 0 if weights remain floats.
template <int kParts>
__global__ void __launch_bounds__(kRowWarps * 32, 4)
    layers_weights_kernel(const __grid_constant__ LayersArgs args) {
    const int64_t row = int64_t{blockIdx.x} * kRowWarps + lx::warp_id();
    if (row >= args.program.rows()) return;
    const LayersMatrix m = matrix_of_row(args.program, row);
    const int64_t at = m.weight + (row - m.row) * m.width;
    LogSumArgs as_sum;
    as_sum.norm = args.norm;
    const bool aligned =
        m.width % 4 == 0 && at % 4 == 0 && reinterpret_cast<uintptr_t>(args.w) % 16 == 0;
    WarpWeights<float> weights(as_sum, static_cast<const float*>(args.w) + at, m.width, aligned);
    weights.find_top();
    float total = 0;
    if constexpr (kParts == 0) {
        float* to = static_cast<float*>(args.weight) + at;
        weights.for_own([&](int i, const float (&v)[4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float e = weights.scaled(v[j]);
                total += e;
                if (i + j < m.width) to[i + j] = args.max_product ? v[j] - weights.base : e;
            }
        });
    } else {
        uint16_t* to = static_cast<uint16_t*>(args.weight_parts) +
                       (first_part(m) + (row - m.row) * part_width(m.width)) * kParts;
        weights.for_own([&](int i, const float (&v)[4]) {
            float e[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) total += e[j] = weights.scaled(v[j]);
            store_parts<kParts>(to, i, e[0], e[1], e[2], e[3]);
        });
        const int end = (m.width + 3) / 4 * 4;  // end of the last four weights stored above
        if (end < part_width(m.width) && lx::lane_id() == 0)
            store_parts<kParts>(to, end, 0, 0, 0, 0);
    }
    total = WarpTeam(nullptr).reduce(total, add);
    if (lx::lane_id() == 0) static_cast<float*>(args.shift)[row] = weights.shift(total);
}

__global__ void __launch_bounds__(kLayerThreads, 4)
    layers_leaves_kernel(const __grid_constant__ LayersArgs args, int64_t arrivals) {
    // All values of a tile belong to one unit, and the number of a tile has 32 bits.
    const int64_t at = int64_t{blockIdx.x} * kLayerThreads + threadIdx.x;
    const unsigned tile = static_cast<unsigned>(at / kTile);
    const unsigned tiles = static_cast<unsigned>(args.lanes / kTile), unit = tile / tiles;
    const int lane = static_cast<int>((tile - unit * tiles) * kTile + threadIdx.x % kTile);
    for (int64_t i = at; i < arrivals; i += int64_t{gridDim.x} * kLayerThreads)
        args.arrivals[i] = 0;
    if (unit >= static_cast<unsigned>(kFirstLeaf + args.program.leaves())) return;
    float l = unit == 1 ? kImpossible : 0.0f;
    if (unit >= kFirstLeaf && lane < args.rows)
        l = static_cast<const float*>(
            args.leaf)[lane * args.leaf_row + (unit - kFirstLeaf) * args.leaf_unit];
    static_cast<float*>(args.val)[at] = l;
}

// A block computes share blockIdx.z of the results of each of its nodes, which are begin +
// blockIdx.y, begin + blockIdx.y + gridDim.y, ... below `end`. kMax: max-product, in which terms
// and weights remain logarithms.
template <bool kMax>
__global__ void __launch_bounds__(kLayerThreads, 2)
    layers_up_kernel(const __grid_constant__ LayersArgs args, int64_t begin, int64_t end) {
    LX_SHARED(float, chunk, kChunk* kTile);
    LX_SHARED(float, partial, kLayerWarps* kTile);
    LX_SHARED(float, tops, kTile);
    const LayerTile tile(args, int64_t{blockIdx.x} * kTile);
    const int rank = lx::thread_rank(), lane = rank % kTile, quad = rank % kQuads * 4;
    for (int64_t n = begin + blockIdx.y; n < end; n += gridDim.y) {
        const LayersNode node = args.program.nodes()[n];
        if (node.matrix < 0) {
            if (blockIdx.z == 0) tile.copy_products(node);
            lx::syncthreads();
            continue;
        }
        const LayersMatrix m = args.program.matrices()[node.matrix];
        float base = 0;
        if constexpr (!kMax) {
            const float top = tile.top_of(node, partial);
            if (rank < kTile) tops[rank] = top;
            base = shift_of(top);
        }
        const int64_t parts = int64_t{gridDim.z} * kGroups;
        const int64_t share = (m.units + parts - 1) / parts * kGroups;
        const int64_t first = blockIdx.z * share;
        unsigned lost = 0;  // one bit per result, set if the result must be recomputed
        layer_product<kMax>(
            static_cast<const float*>(args.weight) + m.weight, m.width, 1,
            m.width % 4 == 0 && m.weight % 4 == 0, first, lx::min<int64_t>(first + share, m.units),
            m.width, chunk,
            [&](int64_t k0, int count) {
                const int from = static_cast<int>(k0);
                tile.for_terms(node, lane, from + rank / kTile, from + count, kLayerThreads / kTile,
                               [&](int i, float l) {
                                   chunk[(i - from) * kTile + lane] =
                                       kMax ? l : lx::exp_approx(l - base);
                               });
            },
            [&](int64_t o, int number, const float (&sums)[4]) {
                const float shift = tile.shift_of(m, o);
                float out[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (kMax) {
                        out[j] = sums[j] + shift;
                        continue;
                    }
                    const float own = tops[quad + j];
                    out[j] = logf(sums[j]) + shift + own;
                    if (sums[j] < kSumTrusted && own != kImpossible && shift != kImpossible)
                        lost |= 1u << (4 * number + j);
                }
                *reinterpret_cast<float4*>(tile.at(args.val, node.out + o) + quad) = {
                    out[0], out[1], out[2], out[3]};
            },
            [&](int64_t result) {
#pragma unroll 1
                while (lost) {
                    const int bit = lx::ffs(lost) - 1;
                    lost &= lost - 1;
                    const int64_t o = result + bit / 4 * kGroups;
                    const int own = quad + bit % 4;
                    tile.at(args.val, node.out + o)[own] = tile.rescued_sum(node, m, o, own);
                }
            });
    }
}

}  // namespace

LaunchStatus launch_layers_weights(const LayersArgs& args, void* stream) {
    if (args.plan.rows() == 0) return 0;
    declare_layers(args);
    declare_floats(args.w, args.num_weights, lx::Access::kConstant);
    declare_floats(args.shift, args.plan.rows(), lx::Access::kWrite);
    const auto launch = [&](auto kernel) {
        return LX_LAUNCH(kernel, static_cast<unsigned>(ceil_div(args.plan.rows(), kRowWarps)),
                         kRowWarps * 32, 0, stream, args);
    };
    if (args.parts == 0) {
        declare_floats(args.weight, args.num_weights, lx::Access::kWrite);
        return launch(layers_weights_kernel<0>);
    }
    declare_parts(args.weight_parts, stored_weights(args), lx::Access::kWrite);
    return args.parts == 1   ? launch(layers_weights_kernel<1>)
           : args.parts == 2 ? launch(layers_weights_kernel<2>)
                             : launch(layers_weights_kernel<3>);
}

LaunchStatus launch_layers_forward(const LayersArgs& args, void* stream) {
    const int64_t leaves = (kFirstLeaf + args.plan.leaves()) * args.lanes;
    const int64_t blocks = ceil_div(leaves, kLayerThreads);
    if (blocks * (kLayerThreads / kTile) > int64_t{UINT32_MAX}) return kInvalidValue;
    declare_layers(args);
    declare_strided(args.leaf, args.rows, args.leaf_row, args.plan.leaves(), args.leaf_unit);
    declare_units(args, args.val, lx::Access::kWrite);
    const int64_t arrivals = args.arrivals ? stored_arrivals(args) : 0;
    if (arrivals) LX_BUF(args.arrivals, arrivals * 4, lx::Access::kWrite);
    LaunchStatus status = LX_LAUNCH(layers_leaves_kernel, static_cast<unsigned>(blocks),
                                    kLayerThreads, 0, stream, args, arrivals);
    const auto up = [&](int64_t begin, int64_t end, unsigned nodes, unsigned parts) {
        declare_layers(args);
        declare_layer_weights(args);
        declare_units(args, args.val, lx::Access::kReadWrite);
        const dim3 grid(static_cast<unsigned>(lane_tiles(args)), nodes, parts);
        if (args.max_product)
            return LX_LAUNCH(layers_up_kernel<true>, grid, kLayerThreads, 0, stream, args, begin,
                             end);
        return LX_LAUNCH(layers_up_kernel<false>, grid, kLayerThreads, 0, stream, args, begin, end);
    };
    if (args.parts == 0 && !(args.max_product && !args.plan.small_nodes()))
        return status ? status : up(0, args.plan.nodes(), 1, 1);
    for (int64_t s = 0; s < args.plan.num_stages() && status == 0; ++s) {
        if (const int64_t end = args.max_product ? s : end_of_run(args, s); end > s) {
            status = launch_layers_run(args, s, end, stream);
            s = end - 1;
            continue;
        }
        const LayersStage stage = args.plan.stage(s);
        if (args.max_product) {
            status = up(stage.begin, stage.end, along_grid(stage.end - stage.begin),
                        along_grid(ceil_div(stage.units, kGroups)));
            continue;
        }
        status = launch_layers_terms(args, stage, false, stream);
        if (status == 0) status = launch_layers_product(args, stage, LayersProduct::kUp, stream);
    }
    return status;
}

}  // namespace lora_ext
