// Computes the flows of all units and weights of a circuit from the flows of its roots. The
// formulas are in circuit_layers.h.
//
//   terms     for each node, from the last to the first: ratio = g / s of each sum s with flow g,
//             and the flows of the node's products, stored in a separate buffer
//   children  a block per tile of lanes adds these flows to the units below, one product after
//             another, so that units with several parents receive their flows in a fixed order
//   weights   a block per tile of 32 x 32 weights iterates over the lanes in order
//
// Circuits of small nodes use one launch that computes terms and children of node after node, as in
// the forward pass. Other circuits run stage after stage on tensor cores, each stage in four steps:
// terms, two products, children (circuit_layers_terms.cu, circuit_layers_product.cu).
#include "circuit_layers.cuh"

namespace lora_ext {
namespace {

constexpr int kSide = 32;  // side of a tile of weights, and lanes per step

LX_DEVICE float shift_or_zero(float top) {
    return top == kImpossible ? 0.0f : top;
}

struct DownTile : LayerTile {
    using LayerTile::LayerTile;

    // Computes the flows of the products of a node.
    LX_DEVICE void terms(const LayersNode& node, int64_t n, float* chunk, float* partial,
                         float* tops) const {
        const int rank = lx::thread_rank(), lane = rank % kTile, quad = rank % kQuads * 4;
        constexpr int kStep = kLayerThreads / kTile;
        float* d = at(args.terms, 0);
        if (node.matrix < 0) {
            for (int64_t i = rank / kTile; i < node.width; i += kStep)
                d[i * args.lanes + lane] = at(args.grad, node.out + i)[lane];
            return;
        }
        const LayersMatrix m = program.matrices()[node.matrix];
        const float top = top_of(node, partial);
        if (rank < kTile) {
            tops[rank] = top;
            at(args.tops, n)[rank] = top;
        }
        bool lost = false;
        const auto ratio = [&](int64_t o) {
            const float out = at(args.val, node.out + o)[lane], shift = shift_of(m, o);
            const bool deep = lost_sum(top, shift, out);
            lost = lost || deep;
            const float g = at(args.grad, node.out + o)[lane];
            return out == kImpossible || deep ? 0.0f : g * expf(top + shift - out);
        };
        for (int64_t o = rank / kTile; o < m.units; o += kStep)
            at(args.ratio, node.out + o)[lane] = ratio(o);
        layer_product(
            static_cast<const float*>(args.weight) + m.weight, 1, m.width, false, 0, m.width,
            m.units, chunk,
            [&](int64_t o0, int count) {
                for (int o = rank / kTile; o < count; o += kStep)
                    chunk[o * kTile + lane] = ratio(o0 + o);
            },
            [&](int64_t i, int, const float (&sums)[4]) {
                *reinterpret_cast<float4*>(d + i * args.lanes + quad) = {sums[0], sums[1], sums[2],
                                                                         sums[3]};
            },
            [](int64_t) {});
        const bool rescued = lx::syncthreads_or(lost);
        const float base = shift_or_zero(top);
        for_terms(node, lane, rank / kTile, m.width, kStep, [&](int i, float l) {
            float flow = d[i * args.lanes + lane] * lx::exp_approx(l - base);
            if (rescued) flow += owed_flow(node, m, i, lane, l, top);
            d[i * args.lanes + lane] = flow;
        });
    }
    // Adds the flows of a node's products to its children. Within a part, one thread adds to each
    // child unit; parts are processed one after another, because they may share children.
    LX_DEVICE void children(const LayersNode& node) const {
        const int rank = lx::thread_rank(), lane = rank % kTile;
        constexpr int kStep = kLayerThreads / kTile;
        for (int p = node.part_begin; p < node.part_end; ++p) {
            const LayersPart part = program.parts()[p];
            const float* d = at(args.terms, part.term) + lane;
            lx::syncthreads();  // all threads have added the previous part
            for_children(program, part, [&](const LayersChild& child, const ChildTerms& terms) {
                for (int u = rank / kTile; u < child.units; u += kStep)
                    at(args.grad, child.column + u)[lane] += terms.sum(d, u, args.lanes);
            });
        }
    }
};

__global__ void __launch_bounds__(kLayerThreads, 4)
    layers_roots_kernel(const __grid_constant__ LayersArgs args) {
    const int64_t lane = int64_t{blockIdx.x} * kLayerThreads + threadIdx.x;
    if (lane >= args.rows) return;
    const int roots = args.program.num_roots();
    for (int r = 0; r < roots; ++r)
        static_cast<float*>(args.grad)[args.program.roots()[r] * args.lanes + lane] +=
            static_cast<const float*>(args.droots)[lane * roots + r];
}

__global__ void __launch_bounds__(kLayerThreads, 2)
    layers_down_kernel(const __grid_constant__ LayersArgs args) {
    LX_SHARED(float, chunk, kChunk* kTile);
    LX_SHARED(float, partial, kLayerWarps* kTile);
    LX_SHARED(float, tops, kTile);
    const DownTile tile(args, int64_t{blockIdx.x} * kTile);
    for (int n = args.program.num_nodes() - 1; n >= 0; --n) {
        const LayersNode node = args.program.nodes()[n];
        tile.terms(node, n, chunk, partial, tops);
        lx::syncthreads();
        tile.children(node);
        lx::syncthreads();
    }
}

// There is one block per (tile of sums, tile of terms, matrix). A thread computes the gradients of
// four of the 32 x 32 weights, all in one column.
__global__ void __launch_bounds__(kLayerThreads, 2)
    layers_dweights_kernel(const __grid_constant__ LayersArgs args) {
    LX_SHARED(float, ratios, kSide*(kSide + 1));
    LX_SHARED(float, values, kSide*(kSide + 1));
    LX_SHARED(float, owed, kSide*(kSide + 1));    // flows of rescued sums
    LX_SHARED(float, depths, kSide*(kSide + 1));  // top + shift - out of these
    LX_SHARED(float, totals, kSide);
    LX_SHARED(float, bases, kSide);
    const LayersProgram program = args.program;
    const int rank = lx::thread_rank(), column = rank % kSide, row = rank / kSide;
    constexpr int kStep = kLayerThreads / kSide, kOwn = kSide / kStep;
    for (int64_t number = blockIdx.z; number < program.num_matrices(); number += gridDim.z) {
        const LayersMatrix m = program.matrices()[number];
        const int64_t o0 = int64_t{blockIdx.x} * kSide, i0 = int64_t{blockIdx.y} * kSide;
        if (o0 >= m.units || i0 >= m.width) continue;
        const float* w = static_cast<const float*>(args.w) + m.weight;
        if (rank < kSide)
            bases[rank] = o0 + rank < m.units ? row_base(w + (o0 + rank) * m.width, m.width) : 0;
        float acc[kOwn] = {}, extra[kOwn] = {}, total[kOwn] = {};
        for (int64_t u = m.user_begin; u < m.user_end; ++u) {
            const int64_t n = program.users()[u];
            const LayersNode node = program.nodes()[n];
            for (int64_t first = 0; first < args.lanes; first += kSide) {
                const int64_t lane = first + column;
                const bool inside = lane < args.lanes;
                const LayerTile tile(args, inside ? lane : 0);
                const float top = inside ? tile.at(args.tops, n)[0] : kImpossible;
                lx::syncthreads();  // the numbers of the previous step have been read
                bool lost = false;
#pragma unroll
                for (int j = 0; j < kOwn; ++j) {
                    const int64_t o = o0 + row + j * kStep;
                    const int i = static_cast<int>(i0) + row + j * kStep;
                    float ratio = 0, debt = 0, depth = 0, value = 0;
                    if (inside && o < m.units) {
                        const float out = tile.at(args.val, node.out + o)[0];
                        const float g = tile.at(args.grad, node.out + o)[0];
                        const float shift = tile.shift_of(m, o);
                        ratio = tile.at(args.ratio, node.out + o)[0];
                        if (out != kImpossible) total[j] += g;
                        depth = top + shift - out;
                        debt = lost_sum(top, shift, out) ? g : 0.0f;
                        lost = lost || debt != 0;
                    }
                    if (inside && i < m.width)
                        tile.for_terms(node, 0, i, i + 1, 1,
                                       [&](int, float l) { value = l - shift_or_zero(top); });
                    ratios[(row + j * kStep) * (kSide + 1) + column] = ratio;
                    owed[(row + j * kStep) * (kSide + 1) + column] = debt;
                    depths[(row + j * kStep) * (kSide + 1) + column] = depth;
                    values[(row + j * kStep) * (kSide + 1) + column] = value;
                }
                const bool rescued = lx::syncthreads_or(lost);
                const int64_t own = i0 + column;
                for (int k = 0; k < kSide; ++k) {
                    const float l = values[column * (kSide + 1) + k];
                    const float p = own < m.width ? lx::exp_approx(l) : 0.0f;
#pragma unroll
                    for (int j = 0; j < kOwn; ++j) {
                        acc[j] = fmaf(ratios[(row + j * kStep) * (kSide + 1) + k], p, acc[j]);
                        if (!rescued) continue;
                        const int at = (row + j * kStep) * (kSide + 1) + k;
                        const float debt = owed[at];
                        const int64_t o = o0 + row + j * kStep;
                        if (debt != 0 && own < m.width)
                            extra[j] += debt * expf(w[o * m.width + own] - bases[row + j * kStep] +
                                                    l + depths[at]);
                    }
                }
            }
        }
        lx::syncthreads();
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const float sum = WarpTeam(nullptr).reduce(total[j], add);
            if (column == 0) totals[row + j * kStep] = sum;
        }
        lx::syncthreads();
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const int64_t o = o0 + row + j * kStep, i = i0 + column;
            if (o >= m.units || i >= m.width) continue;
            const int64_t at = m.weight + o * m.width + i;
            const float scaled = static_cast<const float*>(args.weight)[at];
            const float shift = static_cast<const float*>(args.shift)[m.row + o];
            const bool logits = args.norm == WeightNorm::kLogits && shift != kImpossible;
            const float factor = logits ? totals[row + j * kStep] * expf(shift) : 0.0f;
            static_cast<float*>(args.dw)[at] = acc[j] * scaled + extra[j] - scaled * factor;
        }
        lx::syncthreads();  // bases and totals have been read
    }
}

void declare_down(const LayersArgs& args) {
    declare_layers(args);
    declare_layer_weights(args);
    declare_units(args, args.val, lx::Access::kConstant);
    declare_units(args, args.grad, lx::Access::kReadWrite);
    declare_units(args, args.ratio, lx::Access::kReadWrite);
    declare_floats(args.terms, args.plan.most_terms() * args.lanes, lx::Access::kReadWrite);
    declare_floats(args.tops, args.plan.nodes() * args.lanes, lx::Access::kReadWrite);
}

}  // namespace

LaunchStatus launch_layers_backward(const LayersArgs& args, void* stream) {
    const int64_t bytes = args.plan.units() * args.lanes * 4;
    LaunchStatus status = lx::fill_bytes(args.grad, 0, static_cast<size_t>(bytes), stream);
    if (status) return status;
    declare_layers(args);
    declare_floats(args.droots, args.rows * args.plan.roots(), lx::Access::kConstant);
    declare_units(args, args.grad, lx::Access::kReadWrite);
    status =
        LX_LAUNCH(layers_roots_kernel, static_cast<unsigned>(ceil_div(args.rows, kLayerThreads)),
                  kLayerThreads, 0, stream, args);
    if (args.parts == 0) {
        if (status) return status;
        declare_down(args);
        return LX_LAUNCH(layers_down_kernel, dim3(static_cast<unsigned>(lane_tiles(args))),
                         kLayerThreads, 0, stream, args);
    }
    for (int64_t s = args.plan.num_stages() - 1; s >= 0 && status == 0; --s) {
        const LayersStage stage = args.plan.stage(s);
        status = launch_layers_terms(args, stage, true, stream);
        for (const auto product : {LayersProduct::kDown, LayersProduct::kWeights})
            if (status == 0 && (args.dw || product == LayersProduct::kDown))
                status = launch_layers_product(args, stage, product, stream);
        if (status == 0) status = launch_layers_children(args, stage, stream);
    }
    return status;
}

LaunchStatus launch_layers_dweights(const LayersArgs& args, void* stream) {
    if (args.num_weights == 0) return 0;
    if (args.parts != 0) return launch_layers_owed(args, stream);
    int64_t units = 0, width = 0;
    for (int64_t s = 0; s < args.plan.num_stages(); ++s) {
        units = lx::max(units, args.plan.stage(s).units);
        width = lx::max(width, args.plan.stage(s).width);
    }
    if (ceil_div(width, kSide) > kMaxGridY) return kInvalidValue;
    declare_down(args);
    declare_floats(args.dw, args.num_weights, lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(ceil_div(units, kSide)),
                    static_cast<unsigned>(ceil_div(width, kSide)),
                    along_grid(args.plan.matrices()));
    return LX_LAUNCH(layers_dweights_kernel, grid, kLayerThreads, 0, stream, args);
}

}  // namespace lora_ext
