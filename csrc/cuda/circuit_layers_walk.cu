// Draws walks from a root of a circuit to a leaf of every variable, or computes the most probable
// ones. The formulas are in circuit_layers.h.
//
// There is one launch with one warp per walk. The warp searches the nodes from the last to the
// first, 32 at a time, for nodes that the walk has reached. Its lanes share the terms of a node and
// compute them twice: for their maximum, and for the sums of a draw. Walks are independent. Bound:
// 32 bytes (one sector) from L2 for each value that a term contains, and the latency of one node
// after another.
#include "circuit_decode.cuh"
#include "circuit_layers.cuh"

namespace lora_ext {
namespace {

constexpr int kWalkWarps = 4;

struct WarpWalk : LayerTile {
    int64_t walk, variables;
    int row, lane;

    LX_DEVICE WarpWalk(const LayersArgs& args, int64_t walk, int64_t variables)
        : LayerTile(args, 0),
          walk(walk),
          variables(variables),
          row(static_cast<int>(walk / args.walks_per_row)),
          lane(lx::lane_id()) {}

    LX_DEVICE int32_t& chosen(int64_t n) const { return args.chosen[n * args.walks + walk]; }
    LX_DEVICE void take(int owner, int column) const {
        if (owner < 0)
            args.leaves[walk * variables - 1 - owner] = column;
        else
            chosen(owner) = column - program.nodes()[owner].out;
    }
    LX_DEVICE void start() const {
        for (int64_t n = lane; n < program.num_nodes(); n += lx::kWarpSize) chosen(n) = -1;
        for (int64_t v = lane; v < variables; v += lx::kWarpSize)
            args.leaves[walk * variables + v] = -1;
        lx::syncwarp();
        const int64_t root = args.root[row];
        const bool possible = root >= 0 && root < program.num_roots();  // not yet checked on a GPU
        if (lane == 0 && possible)
            take(program.owners()[program.num_children() + root], program.roots()[root]);
        lx::syncwarp();
    }
    // Returns the term of sum o that the walk takes: a drawn one or, without uniforms, the largest.
    LX_DEVICE int choose(const LayersNode& node, int64_t n, int o) const {
        const LayersMatrix m = program.matrices()[node.matrix];
        const float* w = weights_of(m, o);
        float heaviest = kImpossible, top = kImpossible;
        for (int i = lane; i < m.width; i += lx::kWarpSize) heaviest = fmaxf(heaviest, w[i]);
        const float base = lora_ext::shift_of(reduce_lanes(heaviest, lx::kWarpSize, larger));
        int index = 0x7fffffff;
        for_terms(node, row, lane, m.width, lx::kWarpSize, [&](int i, float l) {
            const float term = w[i] - base + l;
            if (term > top) top = term, index = i;
        });
        const Largest largest = largest_among(m.width, top, index);
        if (!args.uniforms) return largest.index;
        const int64_t at = walk * args.uniforms_row + program.draws()[n];
        const double uniform = args.wide_uniforms ? static_cast<const double*>(args.uniforms)[at]
                                                  : static_cast<const float*>(args.uniforms)[at];
        const float shift = lora_ext::shift_of(largest.value);
        int part = node.part_begin;
        const Place place = find_among(m.width, uniform, [&](int first) -> double {
            const int i = first + lane;
            if (i >= m.width) return 0;
            part = part_of(node, i, first == 0 ? node.part_begin : part);
            const LayersPart own = program.parts()[part];
            const float l = term_of(own, program.children() + own.child_begin, i - own.term, row);
            return expf(w[i] - base + l - shift);
        });
        return lx::max(place.index, 0);
    }
    // Returns the part of term i, searching from `part` on.
    LX_DEVICE int part_of(const LayersNode& node, int i, int part) const {
        while (part + 1 < node.part_end && program.parts()[part + 1].term <= i) ++part;
        return part;
    }
    LX_DEVICE void descend(const LayersNode& node, int term) const {
        const LayersPart part = program.parts()[part_of(node, term, node.part_begin)];
        const int k = term - part.term;
        for (int c = part.child_begin + lane; c < part.child_end; c += lx::kWarpSize) {
            int unit = k;
            if (part.kronecker) {
                const int pairs = program.children()[part.child_end - 1].units;
                unit = c == part.child_begin ? k / pairs : k % pairs;
            }
            take(program.owners()[c], program.children()[c].column + unit);
        }
    }
};

__global__ void __launch_bounds__(kWalkWarps * 32, 4)
    layers_walk_kernel(const __grid_constant__ LayersArgs args, int64_t variables) {
    const int64_t number = int64_t{blockIdx.x} * kWalkWarps + lx::warp_id();
    if (number >= args.walks) return;
    const WarpWalk walk(args, number, variables);
    walk.start();
    for (int64_t end = args.program.num_nodes(); end > 0;) {
        const int64_t n = end - 1 - walk.lane;
        const int at = n >= 0 ? walk.chosen(n) : -1;
        lx::syncwarp();  // all lanes have read the units before any lane writes one
        const unsigned reached = lx::ballot_sync(lx::kFullMask, at >= 0);
        if (!reached) {
            end -= lx::kWarpSize;
            continue;
        }
        const int first = lx::ffs(reached) - 1;
        const int unit = lx::shfl_sync(lx::kFullMask, at, first);
        end -= first + 1;
        const LayersNode node = args.program.nodes()[end];
        walk.descend(node, node.matrix < 0 ? unit : walk.choose(node, end, unit));
        lx::syncwarp();  // makes the reached units visible to the next search
    }
}

}  // namespace

LaunchStatus launch_layers_walk(const LayersArgs& args, void* stream) {
    if (ceil_div(args.walks, kWalkWarps) > kMaxGridX) return kInvalidValue;
    const int64_t variables = args.plan.variables();
    declare_layers(args);
    declare_floats(args.w, args.num_weights, lx::Access::kConstant);
    declare_units(args, args.val, lx::Access::kConstant);
    LX_BUF(args.root, args.rows * 8, lx::Access::kConstant);
    if (args.uniforms) {
        [[maybe_unused]] const int64_t size = args.wide_uniforms ? 8 : 4;
        declare_batch(args.uniforms, args.walks, args.plan.draws() * size, args.uniforms_row * size,
                      lx::Access::kConstant);
    }
    LX_BUF(args.chosen, args.plan.nodes() * args.walks * 4, lx::Access::kWrite);
    LX_BUF(args.leaves, args.walks * variables * 8, lx::Access::kWrite);
    return LX_LAUNCH(layers_walk_kernel, static_cast<unsigned>(ceil_div(args.walks, kWalkWarps)),
                     kWalkWarps * 32, 0, stream, args, variables);
}

}  // namespace lora_ext
