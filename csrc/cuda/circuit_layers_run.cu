// Computes a run, that is, consecutive stages of one node each, in one launch. circuit_layers.h has
// the formulas, and circuit_layers_parts.cuh defines the tile.
//
// There is one block per (64 sums and 64 terms of every node, 32 lanes). Lanes are independent, so
// only blocks of the same lanes wait for each other, at most once per stage, for the terms of that
// stage:
//
//   terms     E[i, lane] = exp(term[i] - t_b) of block b's terms with maximum t_b, as parts in L2
//   product   s[o, lane] = sum over b of exp(t_b - t) (sum over i of b of W[o, i] E[i, lane])
//
// with t the maximum of all t_b. The block then computes its values and, if term i of the next node
// uses only sum i, as in a chain, its terms of the next node, without waiting. The block's rows of
// the weights stay in shared memory while consecutive stages share a matrix. Terms have two
// buffers, so a block can write terms of the next stage while another block still reads those of
// this one. A sum adds the blocks of terms in order, so the result of a row depends neither on its
// batch nor on the number of launches.
//
// Bound: tensor cores, and once per stage the latency of L2 for a counter and for terms.
#include "circuit_layers_parts.cuh"
#include "lx/resident.h"

namespace lora_ext {
namespace {

template <int kParts>
struct RunShape : ProductShape<kParts, false, true, false> {
    using Tile = ProductShape<kParts, false, true, false>;
    using Left = typename Tile::Left;
    using Right = typename Tile::Right;
    static constexpr int kStages = 4;
    static constexpr int kRingBytes = kStages * Right::kBytes;
    static constexpr int kSteps = kRunTerms / Tile::kStep;  // steps of k in the terms of a block
    static constexpr int kTermBytes = kRunTerms * kRunLanes * 4;
    static_assert(Tile::kRows == kRunTerms && Tile::kColumns == kRunLanes);

    // Layout of shared memory: the block's terms or, during a product, the ring of terms; then the
    // weights; then the factors.
    static constexpr int kWeightsAt = lx::max(kRingBytes, kTermBytes);
    LX_HOST_DEVICE static constexpr int blocks(int width) {
        return (width + kRunTerms - 1) / kRunTerms;
    }
    LX_HOST_DEVICE static constexpr int bytes(int width) {
        return kWeightsAt + blocks(width) * (kSteps * Left::kBytes + kRunLanes * 4);
    }
};

struct Run {
    int begin, end;      // stages
    int width;           // maximum number of terms of a node in the run
    int64_t first_lane;  // first lane of the launch
    int64_t lane_tiles;  // number of lane tiles of all launches
    int64_t tops_apart;  // distance between the two buffers of maxima, in floats
};

// Returns whether a block can compute its terms of a node without waiting. This is possible if term
// i uses, of the preceding node, only sum i, and otherwise only values of earlier stages.
LX_DEVICE bool of_own_sums(const LayersProgram& program, const LayersNode& node,
                           const LayersNode& before) {
    if (before.matrix < 0 || node.part_end - node.part_begin != 1) return false;
    const LayersPart part = program.parts()[node.part_begin];
    bool own = !part.kronecker;
    for (int c = part.child_begin; c < part.child_end; ++c) {
        const LayersChild child = program.children()[c];
        own = own && (child.column == before.out || child.column + child.units <= before.out);
    }
    return own;
}

struct RunNode {
    LayersNode node;
    LayersMatrix m;
    bool own;  // result of of_own_sums

    LX_DEVICE RunNode(const LayersProgram& program, int stage, const LayersNode& before)
        : node(program.nodes()[program.stages()[stage]]), m{} {
        if (node.matrix >= 0) m = program.matrices()[node.matrix];
        own = of_own_sums(program, node, before);
    }
};

template <int kParts>
struct RunBlock : QuadTile {
    using G = RunShape<kParts>;
    static constexpr int kLaneQuads = kRunLanes / 4;
    static constexpr int kRows = kProductThreads / kLaneQuads;  // rows of terms processed at a time

    const Run& run;
    unsigned char* shared;
    float *partial, *tops;  // (4, kRunLanes), maxima of each warp; (kRunLanes,)
    unsigned* arrivals;
    unsigned arrived = 0;
    int row0, matrix = -1;  // matrix: index of the matrix in shared memory

    LX_DEVICE RunBlock(const LayersArgs& args, const Run& run, unsigned char* shared,
                       float* partial, float* tops)
        : QuadTile(args, run.first_lane + int64_t{blockIdx.y} * kRunLanes),
          run(run),
          shared(shared),
          partial(partial),
          tops(tops),
          arrivals(args.arrivals + run.begin * run.lane_tiles + lane0 / kRunLanes),
          row0(static_cast<int>(blockIdx.x) * kRunTerms) {}

    LX_DEVICE float* factors() const {
        return reinterpret_cast<float*>(shared + G::kWeightsAt +
                                        G::blocks(run.width) * G::kSteps * G::Left::kBytes);
    }
    LX_DEVICE uint16_t* terms_of(int stage) const {
        return static_cast<uint16_t*>(stage % 2 ? args.next_parts : args.term_parts);
    }
    LX_DEVICE float* tops_of(int stage) const {
        return args.run_tops + stage % 2 * run.tops_apart + lane0;
    }

    // arrive() and wait() together are a barrier for all blocks of the same lanes. After wait(), a
    // block sees the data that the other blocks wrote before arrive().
    LX_DEVICE void arrive() {
        arrived += gridDim.x;
        lx::syncthreads();
        if (lx::thread_rank() != 0) return;
        lx::fence_device();
        lx::atomic_add(arrivals, 1u);
    }
    LX_DEVICE void wait() {
        if (lx::thread_rank() == 0) {
            lx::wait_at_least(arrivals, arrived);
            lx::fence_device();
        }
        lx::syncthreads();
    }

    LX_DEVICE void load_weights(const RunNode& of) {
        const LayersMatrix& m = of.m;
        if (of.node.matrix < 0 || of.node.matrix == matrix || row0 >= m.units) return;
        matrix = of.node.matrix;
        const int row = static_cast<int>(part_width(m.width));
        const auto* weight = static_cast<const uint16_t*>(args.weight_parts) +
                             (first_part(m) + int64_t{row0} * row) * kParts;
        typename G::Left left({weight, row, m.units - row0, row});
        unsigned char* to = shared + G::kWeightsAt;
        for (int k = 0; k < m.width; k += G::kStep, to += G::Left::kBytes) left.fill(to);
        lx::cp_async_commit();
    }

    // Computes the block's terms. If the node has no matrix, they are stored as its values.
    LX_DEVICE void make_terms(const LayersNode& node, int stage) {
        const int rank = lx::thread_rank(), quad = rank % kLaneQuads * 4;
        const int first = row0 + rank / kLaneQuads, end = lx::min(row0 + kRunTerms, node.width);
        const bool inside = lane0 + quad < args.lanes;
        float* kept = reinterpret_cast<float*>(shared) + quad;
        float top[4] = {kImpossible, kImpossible, kImpossible, kImpossible};
        if (inside)
            for_quads(node, quad, first, end, kRows, [&](int i, float4 l) {
                top[0] = fmaxf(top[0], l.x), top[1] = fmaxf(top[1], l.y);
                top[2] = fmaxf(top[2], l.z), top[3] = fmaxf(top[3], l.w);
                float* to = node.matrix < 0 ? at(args.val, node.out + i) + quad
                                            : kept + (i - row0) * kRunLanes;
                *reinterpret_cast<float4*>(to) = l;
            });
        if (node.matrix < 0) return;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int mask = kLaneQuads; mask < lx::kWarpSize; mask *= 2)
                top[j] = fmaxf(top[j], lx::shfl_xor_sync(lx::kFullMask, top[j], mask));
        }
        if (lx::lane_id() < kLaneQuads)
            *reinterpret_cast<float4*>(partial + lx::warp_id() * kRunLanes + quad) = {
                top[0], top[1], top[2], top[3]};
        lx::syncthreads();
        for (int w = 0; w < kProductThreads / lx::kWarpSize; ++w) {
            const float4 other = four_at(partial + w * kRunLanes + quad);
            top[0] = fmaxf(top[0], other.x), top[1] = fmaxf(top[1], other.y);
            top[2] = fmaxf(top[2], other.z), top[3] = fmaxf(top[3], other.w);
        }
        if (!inside) return;
        if (rank < kLaneQuads && row0 < node.width)
            *reinterpret_cast<float4*>(tops_of(stage) + blockIdx.x * args.lanes + quad) = {
                top[0], top[1], top[2], top[3]};
#pragma unroll
        for (int j = 0; j < 4; ++j) top[j] = ::lora_ext::shift_of(top[j]);
        uint16_t* to = terms_of(stage);
        for (int i = first; i < end; i += kRows) {
            const float4 l = four_at(kept + (i - row0) * kRunLanes);
            store_parts<kParts>(to + i * args.lanes * kParts, lane0 + quad,
                                lx::exp_approx(l.x - top[0]), lx::exp_approx(l.y - top[1]),
                                lx::exp_approx(l.z - top[2]), lx::exp_approx(l.w - top[3]));
        }
    }

    // Computes the largest term t of each lane, and the factor exp(t_b - t) of each block b.
    LX_DEVICE void make_factors(int stage, int blocks) {
        const int lane = lx::lane_id();
        const float* own = tops_of(stage) + lane;
        const bool inside = lane0 + lane < args.lanes;
        float top = kImpossible;
        for (int b = 0; inside && b < blocks; ++b)
            top = fmaxf(top, lx::load_l2(own + b * args.lanes));
        if (lx::warp_id() == 0) tops[lane] = top;
        const float base = ::lora_ext::shift_of(top);
        for (int b = lx::warp_id(); b < blocks; b += kProductThreads / lx::kWarpSize) {
            const float t = inside ? lx::load_l2(own + b * args.lanes) : kImpossible;
            factors()[b * kRunLanes + lane] = t == kImpossible ? 0.0f : lx::exp_approx(t - base);
        }
    }

    LX_DEVICE void product(const RunNode& of, int stage) {
        const LayersMatrix& m = of.m;
        constexpr int kBytes = G::Right::kBytes;
        const int lanes = static_cast<int>(args.lanes), blocks = G::blocks(m.width);
        const int steps = (m.width + G::kStep - 1) / G::kStep;
        typename G::Right right({terms_of(stage) + lane0 * kParts, args.lanes, m.width,
                                 lanes - static_cast<int>(lane0)});
        const Ring<G::kStages> ring{steps};
        ring.fill([&](int s) { right.fill(shared + s * kBytes); });
        make_factors(stage, blocks);
        typename G::Sums sums = {};
        const unsigned char* left = shared + G::kWeightsAt;
        int step = 0, now = 0, next = (G::kStages - 1) * kBytes;
        const auto fill = [&](int) {
            right.fill(shared + next);
            next = next == G::kRingBytes - kBytes ? 0 : next + kBytes;
        };
        for (int b = 0; b < blocks; ++b) {
            typename G::Sums part = {};
            for (const int end = lx::min(steps, step + G::kSteps); step < end; ++step) {
                ring.consume(step, fill);
                G::multiply(part, left, shared + now);
                left += G::Left::kBytes;
                now = now == G::kRingBytes - kBytes ? 0 : now + kBytes;
            }
#pragma unroll
            for (int j = 0; j < G::kTilesN; ++j) {
                const float2 f = *reinterpret_cast<const float2*>(factors() + b * kRunLanes +
                                                                  G::column_of(4 * j));
#pragma unroll
                for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        sums[i][j][k] = fmaf(part[i][j][k], k % 2 ? f.y : f.x, sums[i][j][k]);
                }
            }
        }
        lx::cp_async_wait_all();
        lx::syncthreads();  // the ring has been read
        finish_up<G>(args, of.node, m, row0, lane0, tops, sums);
    }
};

template <int kParts>
__global__ void __launch_bounds__(kProductThreads, 1)
    layers_run_kernel(const __grid_constant__ LayersArgs args, const __grid_constant__ Run run) {
    LX_DYN_SHARED(shared);
    LX_SHARED(float, partial, kProductThreads / 32 * kRunLanes);
    LX_SHARED(float, tops, kRunLanes);
    RunBlock<kParts> block(args, run, shared, partial, tops);
    LayersNode none{};
    none.matrix = -1;
    RunNode now(args.program, run.begin, none);
    for (int s = run.begin; s < run.end; ++s) {
        if (s > run.begin) {
            if (now.own) {
                lx::syncthreads();
            } else {
                block.arrive();
                block.wait();
            }
        }
        block.load_weights(now);
        block.make_terms(now.node, s);
        if (now.node.matrix >= 0) block.arrive();
        // The next node is loaded while this block waits for the other blocks.
        const RunNode next = s + 1 < run.end ? RunNode(args.program, s + 1, now.node) : now;
        if (now.node.matrix >= 0) {
            block.wait();
            if (block.row0 < now.m.units) block.product(now, s);
        }
        now = next;
    }
}

// Calls f with the number of parts as a template argument.
template <class F>
auto with_parts(int parts, F&& f) {
    return parts == 1   ? f.template operator()<1>()
           : parts == 2 ? f.template operator()<2>()
                        : f.template operator()<3>();
}

// Size of a run. `rows` blocks, each with bytes() bytes of shared memory, process the same lanes.
struct RunSize {
    int64_t rows = 0, width = 0;

    void add(const LayersStage& stage) {
        width = lx::max(width, stage.width);
        rows = lx::max(rows, ceil_div(lx::max(stage.width, stage.units), kRunTerms));
    }
    template <int kParts>
    size_t bytes() const {
        return static_cast<size_t>(RunShape<kParts>::bytes(static_cast<int>(width)));
    }
    bool fits(int parts) const {
        return width < 1 << 20 && rows <= kMaxGridY &&  // bytes() must fit in an int
               with_parts(
                   parts,
                   [&]<int kParts>() {
                       return static_cast<int64_t>(bytes<kParts>()) <= most_dynamic_bytes();
                   });
    }
    // Returns the maximum number of lane tiles of a launch, all of whose blocks must be resident.
    int64_t lane_tiles(int parts) const {
        return with_parts(parts, [&]<int kParts>() -> int64_t {
            return lx::resident_blocks(layers_run_kernel<kParts>, kProductThreads,
                                       bytes<kParts>()) /
                   rows;
        });
    }
};

}  // namespace

int64_t end_of_run(const LayersArgs& args, int64_t begin) {
    RunSize size;
    int64_t end = begin;
    for (; end < args.plan.num_stages(); ++end) {
        const LayersStage stage = args.plan.stage(end);
        RunSize larger = size;
        larger.add(stage);
        if (stage.end - stage.begin != 1 || !larger.fits(args.parts)) break;
        size = larger;
    }
    return end - begin > 1 && size.lane_tiles(args.parts) > 0 ? end : begin;
}

LaunchStatus launch_layers_run(const LayersArgs& args, int64_t begin, int64_t end, void* stream) {
    RunSize size;
    for (int64_t s = begin; s < end; ++s) size.add(args.plan.stage(s));
    const int64_t most = size.lane_tiles(args.parts);
    Run run{};
    run.begin = static_cast<int>(begin), run.end = static_cast<int>(end);
    run.width = static_cast<int>(size.width);
    run.lane_tiles = ceil_div(args.lanes, kRunLanes);
    run.tops_apart = stored_run_tops(args) / 2;
    LaunchStatus status = 0;
    for (int64_t tile = 0; tile < run.lane_tiles && status == 0; tile += most) {
        run.first_lane = tile * kRunLanes;
        declare_layers(args);
        declare_floats(args.w, args.num_weights, lx::Access::kConstant);
        declare_floats(args.shift, args.plan.rows(), lx::Access::kConstant);
        declare_parts(args.weight_parts, stored_weights(args), lx::Access::kConstant);
        declare_parts(args.term_parts, stored_terms(args), lx::Access::kWrite);
        declare_parts(args.next_parts, stored_terms(args), lx::Access::kWrite);
        declare_floats(args.run_tops, stored_run_tops(args), lx::Access::kWrite);
        declare_floats(args.arrivals, stored_arrivals(args), lx::Access::kReadWrite);
        declare_units(args, args.val, lx::Access::kReadWrite);
        const dim3 grid(static_cast<unsigned>(size.rows),
                        static_cast<unsigned>(lx::min(most, run.lane_tiles - tile)));
        status = with_parts(args.parts, [&]<int kParts>() -> LaunchStatus {
            return LX_LAUNCH_RESIDENT(layers_run_kernel<kParts>, grid, kProductThreads,
                                      size.template bytes<kParts>(), stream, args, run);
        });
    }
    return status;
}

}  // namespace lora_ext
