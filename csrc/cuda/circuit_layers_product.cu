// The products of one stage of a circuit, on tensor cores. circuit_layers.h has the formulas;
// circuit_layers_parts.cuh defines the tile, and how numbers are split into 16-bit parts.
//
//   up        s[o, lane] = sum_i W[o, i] E[i, lane], then its logarithm
//   down      d[i, lane] = E[i, lane] sum_o W[o, i] R[o, lane]: flows of the products of a node
//   weights   f[o, i] = sum over lanes of R[o, lane] E[i, lane], over the nodes that share a matrix
//
// with E = exp(term - the node's maximum) and R = flow / s, which circuit_layers_terms.cu computes.
// There is one block per (tile of columns, tile of rows, node). If a result is too small for the
// precision of the parts, its thread recomputes it in float32. The order of k does not depend on
// the tile, so the result of a row does not depend on its batch. Bound: tensor cores, and at 512
// states the latency of a stage.
//
// Each launch may start before the previous one ends, and may load its weights at once, because a
// launch before the first stage has split them into parts. Results of earlier stages are read only
// after grid_dependency_wait().
#include "circuit_layers_parts.cuh"

namespace lora_ext {
namespace {

template <LayersProduct kProduct, int kParts, bool kLarge>
using Shape = ProductShape<kParts, kProduct == LayersProduct::kDown,
                           kProduct != LayersProduct::kWeights, kLarge>;

// A node of a stage, and the addresses of its weights, terms and ratios, each split into parts.
struct ProductNode {
    LayersNode node;
    LayersMatrix m;
    const uint16_t *weight = nullptr, *term = nullptr, *ratio = nullptr;
    int weight_row = 0;
    int64_t slot;  // index of the node's first term among the terms of the stage

    LX_DEVICE ProductNode(const LayersArgs& args, const LayersStage& stage, int64_t n)
        : node(args.program.nodes()[n]), m{}, slot((n - stage.begin) * stage.width) {
        if (node.matrix < 0) return;
        m = args.program.matrices()[node.matrix];
        const int64_t lane_parts = args.lanes * args.parts;
        weight = static_cast<const uint16_t*>(args.weight_parts) + first_part(m) * args.parts;
        weight_row = static_cast<int>(part_width(m.width));
        term = static_cast<const uint16_t*>(args.term_parts) + slot * lane_parts;
        ratio = static_cast<const uint16_t*>(args.ratio_parts) +
                (n - stage.begin) * stage.units * lane_parts;
    }
};

template <class G>
LX_DEVICE void finish_down(const LayersArgs& args, const LayersStage& stage, int64_t n, int row0,
                           int64_t lane0, const typename G::Sums& sums) {
    const ProductNode own(args, stage, n);
    const LayerTile tile(args, 0);
    const float* flags = tile.at(args.lost, n * kNodeShares);
    // Addresses of E and of the flow for the thread's first result. The offsets to its other
    // results are compile-time constants.
    const int64_t first_lane = lane0 + G::column_of(0);
    const uint16_t* term_parts =
        own.term + (row0 + G::row_of(0)) * args.lanes * 3 + part_at<3>(first_lane);
    float* flows = tile.at(args.terms, own.slot + row0 + G::row_of(0)) + first_lane;
#pragma unroll
    for (int i = 0; i < G::kOwn; i += 2) {
        const int down = G::row_of(i) - G::row_of(0), across = G::column_of(i) - G::column_of(0);
        if (i % 8 == 0) lx::syncwarp();  // keeps the compiler from loading all E at once
        if (row0 + G::row_of(i) >= own.m.width || first_lane + across >= args.lanes) continue;
        const float2 e = joined_pair(term_parts + down * args.lanes * 3 + across * 3);
        *reinterpret_cast<float2*>(flows + down * args.lanes + across) = {G::at(sums, i) * e.x,
                                                                          G::at(sums, i + 1) * e.y};
    }
#pragma unroll 1
    for (int i = 0; i < G::kOwn; ++i) {
        const int term = row0 + G::row_of(i);
        const int lane = static_cast<int>(lane0) + G::column_of(i);
        if (term >= own.m.width || lane >= args.lanes) continue;
        bool lost = false;
        for (int z = 0; z < kNodeShares; ++z) lost = lost || flags[z * args.lanes + lane] != 0;
        if (!lost) continue;
        const float top = tile.at(args.tops, n)[lane];
        tile.for_terms(own.node, lane, term, term + 1, 1, [&](int, float l) {
            tile.at(args.terms, own.slot + term)[lane] +=
                tile.owed_flow(own.node, own.m, term, lane, l, top);
        });
    }
}

// Range [begin, end) of the users of a matrix (nodes, in ascending order) that belong to a stage.
struct Users {
    int begin, end;

    LX_DEVICE Users(const LayersArgs& args, const LayersMatrix& m, const LayersStage& stage)
        : begin(m.user_begin), end(m.user_begin) {
#pragma unroll 1
        for (int u = m.user_begin; u < m.user_end; u += lx::kWarpSize) {
            const int own = u + lx::lane_id();
            const int64_t n = own < m.user_end ? args.program.users()[own] : stage.end;
            begin += lx::popc(lx::ballot_sync(lx::kFullMask, n < stage.begin));
            end += lx::popc(lx::ballot_sync(lx::kFullMask, n < stage.end));
        }
    }
};

template <class G>
LX_DEVICE void finish_weights(const LayersArgs& args, const ProductNode& own, bool first, int row0,
                              int column0, const typename G::Sums& sums) {
#pragma unroll
    for (int i = 0; i < G::kOwn; ++i) {
        const int o = row0 + G::row_of(i), term = column0 + G::column_of(i);
        if (o >= own.m.units || term >= own.m.width) continue;
        float* dw = static_cast<float*>(args.dw) + own.m.weight + int64_t{o} * own.m.width + term;
        *dw = first ? G::at(sums, i) : *dw + G::at(sums, i);
    }
}

template <LayersProduct kProduct, int kParts, bool kLarge>
__global__ void __launch_bounds__(kProductThreads, 2)
    layers_product_kernel(const __grid_constant__ LayersArgs args,
                          const __grid_constant__ LayersStage stage) {
    using G = Shape<kProduct, kParts, kLarge>;
    LX_DYN_SHARED(ring);
    lx::grid_dependency_launch();
    const int64_t column0 = int64_t{blockIdx.x} * G::kColumns;
    const int row0 = static_cast<int>(blockIdx.y) * G::kRows;
    const int lanes = static_cast<int>(args.lanes);
    for (int64_t n = stage.begin + blockIdx.z; n < stage.end; n += gridDim.z) {
        const ProductNode own(args, stage, n);
        const LayersMatrix& m = own.m;
        if (own.node.matrix < 0) continue;
        typename G::Sums sums = {};
        if constexpr (kProduct == LayersProduct::kUp) {
            if (row0 >= m.units) continue;
            G::add_product(
                sums, ring,
                {own.weight + int64_t{row0} * own.weight_row * kParts, own.weight_row,
                 m.units - row0, own.weight_row},
                {own.term + column0 * kParts, lanes, m.width, lanes - static_cast<int>(column0)},
                m.width);
            const ProductNode again(args, stage, n);  // reloaded to save registers
            finish_up<G>(args, again.node, again.m, row0, column0,
                         LayerTile(args, column0).at(args.tops, n), sums);
        } else if constexpr (kProduct == LayersProduct::kDown) {
            if (row0 >= m.width) continue;
            G::add_product(
                sums, ring,
                {own.weight + int64_t{row0} * kParts, own.weight_row, m.units,
                 own.weight_row - row0},
                {own.ratio + column0 * kParts, lanes, m.units, lanes - static_cast<int>(column0)},
                m.units);
            finish_down<G>(args, stage, n, row0, column0, sums);
        } else {
            if (row0 >= m.units || column0 >= m.width) continue;
            const Users users(args, m, stage);
            if (args.program.users()[users.begin] != n) continue;
            lx::grid_dependency_wait();
            for (int u = users.begin; u < users.end; ++u) {
                const ProductNode user(args, stage, args.program.users()[u]);
                G::add_product(
                    sums, ring,
                    {user.ratio + row0 * args.lanes * kParts, args.lanes, m.units - row0, lanes},
                    {user.term + column0 * args.lanes * kParts, args.lanes,
                     m.width - static_cast<int>(column0), lanes},
                    lanes);
            }
            const bool first = users.end == m.user_end;  // backward starts with the last stage
            finish_weights<G>(args, own, first, row0, static_cast<int>(column0), sums);
        }
    }
    lx::grid_dependency_wait();  // the next grid waits only for this grid, not for earlier ones
}

template <LayersProduct kProduct, int kParts, bool kLarge>
LaunchStatus launch_shape(const LayersArgs& args, const LayersStage& stage, int64_t rows,
                          int64_t columns, void* stream) {
    using G = Shape<kProduct, kParts, kLarge>;
    if (ceil_div(rows, G::kRows) > kMaxGridY) return kInvalidValue;
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, G::kColumns)),
                    static_cast<unsigned>(ceil_div(rows, G::kRows)),
                    along_grid(stage.end - stage.begin));
    return LX_LAUNCH_PDL((layers_product_kernel<kProduct, kParts, kLarge>), grid, kProductThreads,
                         G::kRingBytes, stream, args, stage);
}

// Uses the large tile if it gives at least three blocks for every four multiprocessors. The results
// of both tiles are bitwise equal.
template <LayersProduct kProduct, int kParts>
LaunchStatus launch_parts(const LayersArgs& args, const LayersStage& stage, void* stream) {
    const int64_t rows = kProduct == LayersProduct::kDown ? stage.width : stage.units;
    const int64_t columns = kProduct == LayersProduct::kWeights ? stage.width : args.lanes;
    using G = Shape<kProduct, kParts, true>;
    const int64_t blocks =
        ceil_div(rows, G::kRows) * ceil_div(columns, G::kColumns) * (stage.end - stage.begin);
    if (4 * blocks >= 3 * int64_t{lx::multiprocessors()})
        return launch_shape<kProduct, kParts, true>(args, stage, rows, columns, stream);
    return launch_shape<kProduct, kParts, false>(args, stage, rows, columns, stream);
}

}  // namespace

LaunchStatus launch_layers_product(const LayersArgs& args, const LayersStage& stage,
                                   LayersProduct product, void* stream) {
    declare_layers(args);
    declare_floats(args.w, args.num_weights, lx::Access::kConstant);
    declare_floats(args.shift, args.plan.rows(), lx::Access::kConstant);
    declare_floats(args.tops, args.plan.nodes() * args.lanes, lx::Access::kRead);
    declare_parts(args.weight_parts, stored_weights(args), lx::Access::kConstant);
    declare_parts(args.term_parts, stored_terms(args), lx::Access::kRead);
    declare_units(args, args.val,
                  product == LayersProduct::kUp ? lx::Access::kReadWrite : lx::Access::kRead);
    if (product == LayersProduct::kUp) {
        switch (args.parts) {
            case 1:
                return launch_parts<LayersProduct::kUp, 1>(args, stage, stream);
            case 2:
                return launch_parts<LayersProduct::kUp, 2>(args, stage, stream);
            default:
                return launch_parts<LayersProduct::kUp, 3>(args, stage, stream);
        }
    }
    declare_parts(args.ratio_parts, stored_ratios(args), lx::Access::kRead);
    declare_units(args, args.grad, lx::Access::kRead);
    if (product == LayersProduct::kWeights) {
        declare_floats(args.dw, args.num_weights, lx::Access::kReadWrite);
        return launch_parts<LayersProduct::kWeights, 3>(args, stage, stream);
    }
    declare_floats(args.lost, args.plan.nodes() * kNodeShares * args.lanes, lx::Access::kRead);
    declare_floats(args.terms, args.plan.most_terms() * args.lanes, lx::Access::kReadWrite);
    return launch_parts<LayersProduct::kDown, 3>(args, stage, stream);
}

}  // namespace lora_ext
