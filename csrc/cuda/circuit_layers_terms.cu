// The kernels before and after the products of one stage of a circuit. The formulas are in
// circuit_layers.h.
//
//   terms      E = exp(term - the node's maximum) of each lane, once, in 16-bit parts; in the
//              backward pass also R = flow / s of each sum. One block per (16 lanes, node, share)
//   children   adds flows of terms to the units below. One thread performs all additions to a unit,
//              so their order is fixed without a barrier. One block per (16 lanes, 16 units)
//   owed       converts flows of weights to gradients and adds the flows of rescued sums. One block
//              per row of a matrix
//
// Bound: bytes, and the latency of a node's maximum, which the block of every share computes again.
#include "circuit_layers_parts.cuh"

namespace lora_ext {
namespace {

constexpr int kSums = 2;  // sums per thread whose loads are in flight
constexpr int kOwedThreads = 128;

struct TermTile : QuadTile {
    using QuadTile::QuadTile;

    // Returns the largest term of each of the thread's four lanes. All threads must call this.
    LX_DEVICE float4 tops_of(const LayersNode& node, float* partial) const {
        const int rank = lx::thread_rank(), quad = rank % kQuads * 4;
        float top[4] = {kImpossible, kImpossible, kImpossible, kImpossible};
        for_quads(node, quad, rank / kQuads, node.width, kGroups, [&](int, float4 l) {
            top[0] = fmaxf(top[0], l.x), top[1] = fmaxf(top[1], l.y);
            top[2] = fmaxf(top[2], l.z), top[3] = fmaxf(top[3], l.w);
        });
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int mask = kQuads; mask < lx::kWarpSize; mask *= 2)
                top[j] = fmaxf(top[j], lx::shfl_xor_sync(lx::kFullMask, top[j], mask));
        }
        if (lx::lane_id() < kQuads)
            *reinterpret_cast<float4*>(partial + lx::warp_id() * kTile + quad) = {top[0], top[1],
                                                                                  top[2], top[3]};
        lx::syncthreads();
        for (int w = 0; w < kLayerWarps; ++w) {
            const float4 other = four_at(partial + w * kTile + quad);
            top[0] = fmaxf(top[0], other.x), top[1] = fmaxf(top[1], other.y);
            top[2] = fmaxf(top[2], other.z), top[3] = fmaxf(top[3], other.w);
        }
        return {top[0], top[1], top[2], top[3]};
    }
    // Computes R = flow / s of this block's share of a node's sums, and stores for each lane
    // whether any of these sums was rescued.
    LX_DEVICE void ratios(const LayersNode& node, const LayersMatrix& m, int64_t n, int64_t slot,
                          float4 top, float* partial) const {
        const int rank = lx::thread_rank(), quad = rank % kQuads * 4;
        const float tops[4] = {top.x, top.y, top.z, top.w};
        uint16_t* to = static_cast<uint16_t*>(args.ratio_parts) + slot * args.lanes * 3;
        float lost[4] = {};
        const int step = static_cast<int>(gridDim.z) * kGroups;
        for (int first = static_cast<int>(blockIdx.z) * kGroups + rank / kQuads; first < m.units;
             first += kSums * step) {
            float4 outs[kSums], flows[kSums];
            float shifts[kSums];
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                const int o = first + i * step < m.units ? first + i * step : first;
                outs[i] = four_at(at(args.val, node.out + o) + quad);
                flows[i] = four_at(at(args.grad, node.out + o) + quad);
                shifts[i] = shift_of(m, o);
            }
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                const int o = first + i * step;
                if (o >= m.units) continue;
                const float out[4] = {outs[i].x, outs[i].y, outs[i].z, outs[i].w};
                const float g[4] = {flows[i].x, flows[i].y, flows[i].z, flows[i].w};
                float r[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const bool deep = lost_sum(tops[j], shifts[i], out[j]);
                    if (deep) lost[j] = 1;
                    r[j] = g[j] * expf(tops[j] + shifts[i] - out[j]);
                    if (deep || out[j] == kImpossible) r[j] = 0;
                }
                store_parts<3>(to + o * args.lanes * 3, lane0 + quad, r[0], r[1], r[2], r[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int mask = kQuads; mask < lx::kWarpSize; mask *= 2)
                lost[j] = fmaxf(lost[j], lx::shfl_xor_sync(lx::kFullMask, lost[j], mask));
        }
        lx::syncthreads();  // the maxima have been read
        if (lx::lane_id() < kQuads)
            *reinterpret_cast<float4*>(partial + lx::warp_id() * kTile + quad) = {lost[0], lost[1],
                                                                                  lost[2], lost[3]};
        lx::syncthreads();
        if (rank >= kTile) return;
        float any = 0;
        for (int w = 0; w < kLayerWarps; ++w) any = fmaxf(any, partial[w * kTile + rank]);
        at(args.lost, n * kNodeShares + blockIdx.z)[rank] = any;
    }
};

template <int kParts, bool kDown>
__global__ void __launch_bounds__(kLayerThreads, 2)
    layers_terms_kernel(const __grid_constant__ LayersArgs args,
                        const __grid_constant__ LayersStage stage) {
    LX_SHARED(float, partial, kLayerWarps* kTile);
    lx::grid_dependency_launch();
    const TermTile tile(args, int64_t{blockIdx.x} * kTile);
    const int rank = lx::thread_rank(), quad = rank % kQuads * 4;
    for (int64_t n = stage.begin + blockIdx.y; n < stage.end; n += gridDim.y) {
        const LayersNode node = args.program.nodes()[n];
        lx::grid_dependency_wait();  // every block gets here, because every block has a node
        const int first = static_cast<int>(blockIdx.z) * kGroups + rank / kQuads;
        const int step = static_cast<int>(gridDim.z) * kGroups;
        if (node.matrix < 0) {
            if constexpr (!kDown)
                tile.for_quads(node, quad, first, node.width, step, [&](int i, float4 l) {
                    *reinterpret_cast<float4*>(tile.at(args.val, node.out + i) + quad) = l;
                });
            continue;
        }
        lx::syncthreads();  // the previous node's maxima have been read
        const float4 top = tile.tops_of(node, partial);
        if (blockIdx.z == 0 && rank < kQuads)
            *reinterpret_cast<float4*>(tile.at(args.tops, n) + quad) = top;
        const float base[4] = {shift_of(top.x), shift_of(top.y), shift_of(top.z), shift_of(top.w)};
        uint16_t* to = static_cast<uint16_t*>(args.term_parts) +
                       (n - stage.begin) * stage.width * args.lanes * kParts;
        tile.for_quads(node, quad, first, node.width, step, [&](int i, float4 l) {
            store_parts<kParts>(to + i * args.lanes * kParts, tile.lane0 + quad,
                                lx::exp_approx(l.x - base[0]), lx::exp_approx(l.y - base[1]),
                                lx::exp_approx(l.z - base[2]), lx::exp_approx(l.w - base[3]));
        });
        if constexpr (kDown)
            tile.ratios(node, args.program.matrices()[node.matrix], n,
                        (n - stage.begin) * stage.units, top, partial);
    }
}

__global__ void __launch_bounds__(kLayerThreads, 4)
    layers_children_kernel(const __grid_constant__ LayersArgs args,
                           const __grid_constant__ LayersStage stage) {
    lx::grid_dependency_launch();
    lx::grid_dependency_wait();
    const LayerTile tile(args, int64_t{blockIdx.x} * kTile);
    const int lane = lx::thread_rank() % kTile;
    constexpr int kColumns = kLayerThreads / kTile;
    const int step = static_cast<int>(gridDim.y) * kColumns;
    const int own = static_cast<int>(blockIdx.y) * kColumns + lx::thread_rank() / kTile;
    for (int64_t n = stage.end - 1; n >= stage.begin; --n) {
        const LayersNode node = args.program.nodes()[n];
        const int64_t slot = (n - stage.begin) * stage.width;
        for (int p = node.part_begin; p < node.part_end; ++p) {
            const LayersPart part = args.program.parts()[p];
            const float* d = (node.matrix < 0 ? tile.at(args.grad, node.out + part.term)
                                              : tile.at(args.terms, slot + part.term)) +
                             lane;
            // A thread owns all units whose index has the same remainder modulo `step`.
            for_children(
                args.program, part, [&](const LayersChild& child, const ChildTerms& terms) {
                    for (int u = (own + step - child.column % step) % step; u < child.units;
                         u += step)
                        tile.at(args.grad, child.column + u)[lane] += terms.sum(d, u, args.lanes);
                });
        }
    }
}

// Converts the flows of row o of a matrix to gradients, and adds the flows of rescued sums.
__global__ void __launch_bounds__(kOwedThreads, 8)
    layers_owed_kernel(const __grid_constant__ LayersArgs args) {
    LX_SHARED(float, debts, kOwedThreads);   // flows of rescued sums
    LX_SHARED(float, depths, kOwedThreads);  // shift - out of these sums
    LX_SHARED(float, parts, kOwedThreads / 32);
    constexpr int kAhead = 4;
    const LayersProgram program = args.program;
    const int rank = lx::thread_rank();
    const LayersMatrix m = matrix_of_row(program, blockIdx.x);
    const int64_t o = int64_t{blockIdx.x} - m.row;
    const LayerTile tile(args, 0);
    const float shift = tile.shift_of(m, o);
    float total = 0;
    bool lost = false;
    for (int u = m.user_begin; u < m.user_end; ++u) {
        const int64_t n = program.users()[u];
        const float* outs = tile.at(args.val, program.nodes()[n].out + o);
        const float* flows = tile.at(args.grad, program.nodes()[n].out + o);
        const float* tops = tile.at(args.tops, n);
        for (int64_t first = rank; first < args.lanes; first += kAhead * kOwedThreads) {
            float out[kAhead], g[kAhead], top[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                const int64_t at = first + j * kOwedThreads;
                const int64_t lane = at < args.lanes ? at : first;
                out[j] = outs[lane], g[j] = flows[lane], top[j] = tops[lane];
            }
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                if (first + j * kOwedThreads >= args.lanes) continue;
                if (out[j] != kImpossible) total += g[j];
                lost = lost || lost_sum(top[j], shift, out[j]);
            }
        }
    }
    total = WarpTeam(nullptr).reduce(total, add);
    if (lx::lane_id() == 0) parts[lx::warp_id()] = total;
    const bool rescued = lx::syncthreads_or(lost);
    total = 0;
    for (int w = 0; w < kOwedThreads / 32; ++w) total += parts[w];

    const uint16_t* scaled = static_cast<const uint16_t*>(args.weight_parts) +
                             (first_part(m) + o * part_width(m.width)) * 3;
    const auto weight = [&](int i) {
        const float2 pair = joined_pair(scaled + part_at<3>(i & ~1));
        return i % 2 == 0 ? pair.x : pair.y;
    };
    float* dw = static_cast<float*>(args.dw) + m.weight + o * m.width;
    for (int i = rank; i < m.width; i += kOwedThreads) dw[i] *= weight(i);
    if (rescued) {
        const float* w = tile.weights_of(m, o);
        const float base = row_base(w, m.width);
        for (int u = m.user_begin; u < m.user_end; ++u) {
            const int64_t n = program.users()[u];
            const LayersNode node = program.nodes()[n];
            for (int64_t first = 0; first < args.lanes; first += kOwedThreads) {
                float debt = 0, depth = 0;
                if (first + rank < args.lanes) {
                    const float out = tile.at(args.val, node.out + o)[first + rank];
                    const float top = tile.at(args.tops, n)[first + rank];
                    if (lost_sum(top, shift, out))
                        debt = tile.at(args.grad, node.out + o)[first + rank];
                    depth = shift - out;
                }
                lx::syncthreads();  // the previous lanes have been read
                debts[rank] = debt, depths[rank] = depth;
                if (!lx::syncthreads_or(debt != 0)) continue;
                for (int k = 0; k < kOwedThreads; ++k) {
                    if (debts[k] == 0) continue;
                    tile.for_terms(node, static_cast<int>(first) + k, rank, m.width, kOwedThreads,
                                   [&](int i, float l) {
                                       dw[i] += debts[k] * expf(w[i] - base + l + depths[k]);
                                   });
                }
            }
        }
    }
    if (args.norm != WeightNorm::kLogits || shift == kImpossible) return;
    const float factor = total * expf(shift);
    for (int i = rank; i < m.width; i += kOwedThreads) dw[i] -= weight(i) * factor;
}

}  // namespace

LaunchStatus launch_layers_terms(const LayersArgs& args, const LayersStage& stage, bool down,
                                 void* stream) {
    declare_layers(args);
    declare_units(args, args.val, down ? lx::Access::kRead : lx::Access::kReadWrite);
    declare_floats(args.tops, args.plan.nodes() * args.lanes, lx::Access::kWrite);
    declare_parts(args.term_parts, stored_terms(args), lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(lane_tiles(args)), along_grid(stage.end - stage.begin),
                    kNodeShares);
    if (down) {
        declare_floats(args.shift, args.plan.rows(), lx::Access::kConstant);
        declare_units(args, args.grad, lx::Access::kRead);
        declare_parts(args.ratio_parts, stored_ratios(args), lx::Access::kWrite);
        declare_floats(args.lost, args.plan.nodes() * kNodeShares * args.lanes, lx::Access::kWrite);
        return LX_LAUNCH_PDL((layers_terms_kernel<3, true>), grid, kLayerThreads, 0, stream, args,
                             stage);
    }
    switch (args.parts) {
        case 1:
            return LX_LAUNCH_PDL((layers_terms_kernel<1, false>), grid, kLayerThreads, 0, stream,
                                 args, stage);
        case 2:
            return LX_LAUNCH_PDL((layers_terms_kernel<2, false>), grid, kLayerThreads, 0, stream,
                                 args, stage);
        default:
            return LX_LAUNCH_PDL((layers_terms_kernel<3, false>), grid, kLayerThreads, 0, stream,
                                 args, stage);
    }
}

LaunchStatus launch_layers_children(const LayersArgs& args, const LayersStage& stage,
                                    void* stream) {
    declare_layers(args);
    declare_units(args, args.grad, lx::Access::kReadWrite);
    declare_floats(args.terms, args.plan.most_terms() * args.lanes, lx::Access::kRead);
    const dim3 grid(static_cast<unsigned>(lane_tiles(args)),
                    along_grid(ceil_div(stage.width, kLayerThreads / kTile)));
    return LX_LAUNCH_PDL(layers_children_kernel, grid, kLayerThreads, 0, stream, args, stage);
}

LaunchStatus launch_layers_owed(const LayersArgs& args, void* stream) {
    declare_layers(args);
    declare_floats(args.w, args.num_weights, lx::Access::kConstant);
    declare_floats(args.shift, args.plan.rows(), lx::Access::kConstant);
    declare_floats(args.tops, args.plan.nodes() * args.lanes, lx::Access::kConstant);
    declare_parts(args.weight_parts, stored_weights(args), lx::Access::kConstant);
    declare_units(args, args.val, lx::Access::kConstant);
    declare_units(args, args.grad, lx::Access::kConstant);
    declare_floats(args.dw, args.num_weights, lx::Access::kReadWrite);
    return LX_LAUNCH(layers_owed_kernel, static_cast<unsigned>(args.plan.rows()), kOwedThreads, 0,
                     stream, args);
}

}  // namespace lora_ext
