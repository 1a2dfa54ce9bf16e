// Code shared by the kernels of whole circuits: nodes on a tile of lanes, and the product of a
// node.
//
// A block of 256 threads processes a tile of kTile lanes; a lane is a row of data. A thread that
// works on a single lane processes lane thread % kTile.
#pragma once

#include "circuit_sum.cuh"
#include "launch.cuh"
#include "lora_ext/circuit_layers.h"

namespace lora_ext {

constexpr int kTile = static_cast<int>(kLaneGroup);
constexpr int kLayerThreads = 256;
constexpr int kLayerWarps = kLayerThreads / 32;
constexpr int kQuads = kTile / 4;                // a thread of a product sums four lanes
constexpr int kGroups = kLayerThreads / kQuads;  // results computed at a time
constexpr int kChunk = 512;                      // terms in shared memory
constexpr int kOwnResults = 4;                   // results per thread in one pass
constexpr int kPass = kGroups * kOwnResults;

struct LayerTile {
    const LayersArgs& args;
    LayersProgram program;
    int64_t lane0;

    LX_DEVICE LayerTile(const LayersArgs& args, int64_t lane0)
        : args(args), program(args.program), lane0(lane0) {}

    LX_DEVICE float* at(void* values, int64_t unit) const {
        return static_cast<float*>(values) + unit * args.lanes + lane0;
    }
    LX_DEVICE const float* weights_of(const LayersMatrix& m, int64_t o) const {
        return static_cast<const float*>(args.w) + m.weight + o * m.width;
    }
    LX_DEVICE float shift_of(const LayersMatrix& m, int64_t o) const {
        return static_cast<const float*>(args.shift)[m.row + o];
    }
    // Returns term k of a part.
    LX_DEVICE float term_of(const LayersPart& part, const LayersChild* child, int k,
                            int lane) const {
        if (part.kronecker) {
            const int m = child[1].units;
            return at(args.val, child[0].column + k / m)[lane] +
                   at(args.val, child[1].column + k % m)[lane];
        }
        float l = at(args.val, child[0].column + k)[lane];
        for (int c = 1; c < part.child_end - part.child_begin; ++c)
            l += at(args.val, child[c].column + k)[lane];
        return l;
    }
    // Calls f(index, log-value) for the terms first, first + step, ... below `end` of one lane.
    template <class F>
    LX_DEVICE void for_terms(const LayersNode& node, int lane, int first, int end, int step,
                             F&& f) const {
        int i = first;
        for (int p = node.part_begin; p < node.part_end && i < end; ++p) {
            const LayersPart part = program.parts()[p];
            const LayersChild* child = program.children() + part.child_begin;
            const int m = part.kronecker ? child[1].units : 1;
            const int stop = lx::min(end, part.term + child[0].units * m);
#pragma unroll 1
            for (; i < stop; i += step) f(i, term_of(part, child, i - part.term, lane));
        }
    }
    // Returns the largest term of the thread's lane. All threads of the block must call this. A
    // barrier must separate two calls, so that every thread has read `partial` before the second
    // call writes it. layer_product ends with such a barrier, even if the block has no results.
    LX_DEVICE float top_of(const LayersNode& node, float* partial) const {
        const int rank = lx::thread_rank(), lane = rank % kTile;
        float top = kImpossible;
        for_terms(node, lane, rank / kTile, node.width, kLayerThreads / kTile,
                  [&](int, float l) { top = fmaxf(top, l); });
        top = fmaxf(top, lx::shfl_xor_sync(lx::kFullMask, top, kTile));
        if (lx::lane_id() < kTile) partial[lx::warp_id() * kTile + lane] = top;
        lx::syncthreads();
        for (int w = 0; w < kLayerWarps; ++w) top = fmaxf(top, partial[w * kTile + lane]);
        return top;
    }
    // Copies the products of a node that has no matrix, and therefore no sums, to its values.
    LX_DEVICE void copy_products(const LayersNode& node) const {
        const int rank = lx::thread_rank(), lane = rank % kTile;
        for_terms(node, lane, rank / kTile, node.width, kLayerThreads / kTile,
                  [&](int i, float l) { at(args.val, node.out + i)[lane] = l; });
    }
    // Recomputes log sum_i W_i exp(l_i) of sum `o` on a lane, with terms shifted by their maximum.
    LX_DEVICE float rescued_sum(const LayersNode& node, const LayersMatrix& m, int64_t o,
                                int lane) const;
    // Returns the flow to term i, of log-value l, from the rescued (recomputed) sums of a lane.
    LX_DEVICE float owed_flow(const LayersNode& node, const LayersMatrix& m, int64_t i, int lane,
                              float l, float top) const;
};

LX_DEVICE float4 added(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
LX_DEVICE float4 four_at(const float* p) {
    return *reinterpret_cast<const float4*>(p);
}

constexpr int kBatch = 4;  // terms per thread whose loads are in flight

// A tile with four lanes per thread.
struct QuadTile : LayerTile {
    using LayerTile::LayerTile;

    // Calls f(index, values on lanes quad to quad + 3) for terms first, first + step, ... below
    // `end`.
    template <class F>
    LX_DEVICE void for_quads(const LayersNode& node, int quad, int first, int end, int step,
                             F&& f) const {
        int i = first;
        for (int p = node.part_begin; p < node.part_end && i < end; ++p) {
            const LayersPart part = program.parts()[p];
            const LayersChild* child = program.children() + part.child_begin;
            const int count = part.child_end - part.child_begin;
            // The loads of two children are in flight at once. If a part has only one child, unit
            // 0, whose values are zeros, replaces the second.
            const LayersChild one = child[0], two = count > 1 ? child[1] : LayersChild{0, 0};
            const int pairs = part.kronecker ? two.units : 1;
            const int stop = lx::min(end, part.term + one.units * pairs);
            while (i < stop) {
                // Index of the batch's last valid term. Beyond it, this term is loaded again.
                const int last = lx::min(kBatch - 1, (stop - 1 - i) / step);
                float4 l[kBatch], r[kBatch];
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    const int k = i + lx::min(j, last) * step - part.term;
                    const int first_unit = part.kronecker ? k / pairs : k;
                    const int second_unit = part.kronecker ? k - first_unit * pairs : k;
                    l[j] = four_at(at(args.val, one.column + first_unit) + quad);
                    r[j] = four_at(at(args.val, two.column + (count > 1 ? second_unit : 0)) + quad);
                }
#pragma unroll
                for (int j = 0; j < kBatch; ++j) l[j] = added(l[j], r[j]);
                for (int c = 2; c < count; ++c) {
                    const int column = child[c].column + i - part.term;
#pragma unroll
                    for (int j = 0; j < kBatch; ++j)
                        l[j] = added(
                            l[j], four_at(at(args.val, column + lx::min(j, last) * step) + quad));
                }
#pragma unroll
                for (int j = 0; j < kBatch; ++j)
                    if (j <= last) f(i + j * step, l[j]);
                i += (last + 1) * step;
            }
        }
    }
};

// Returns `result` + w * term, by fused multiply-add, or the maximum of w + term and `result` if
// kMax.
template <bool kMax>
LX_DEVICE float meet(float w, float term, float result) {
    return kMax ? fmaxf(w + term, result) : fmaf(w, term, result);
}

// Computes results m in [begin, end) of a product and calls f(m, number, sums), in which sums[lane]
// = sum over k of a[m am + k ak] b(k, lane) for the thread's four lanes. fill(k0, count) writes b
// for `count` indices k from k0 on to the chunk in shared memory; k is ascending. In each pass a
// thread computes kOwnResults results, which `number` counts from 0, and then calls done(m of the
// first one). `vector`: ak is 1 and rows are aligned to 16 bytes. kMax: sums[lane] = max over k of
// a[..] + b(k, lane).
template <bool kMax = false, class Fill, class F, class Done>
LX_DEVICE void layer_product(const float* a, int64_t am, int64_t ak, bool vector, int64_t begin,
                             int64_t end, int64_t depth, float* chunk, Fill&& fill, F&& f,
                             Done&& done) {
    const int rank = lx::thread_rank(), group = rank / kQuads, quad = rank % kQuads * 4;
    for (int64_t pass = begin; pass < end; pass += kPass) {
        float acc[kOwnResults][4] = {};
        if constexpr (kMax) {
#pragma unroll
            for (int j = 0; j < kOwnResults; ++j)
                acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = kImpossible;
        }
        for (int64_t k0 = 0; k0 < depth; k0 += kChunk) {
            const int count = static_cast<int>(lx::min<int64_t>(kChunk, depth - k0));
            if (depth > kChunk || pass == begin) {
                lx::syncthreads();  // the previous chunk has been read
                fill(k0, count);
                lx::syncthreads();
            }
#pragma unroll
            for (int j = 0; j < kOwnResults; ++j) {
                const int64_t m = pass + group + j * kGroups;
                if (m >= end) continue;
                const float* row = a + m * am + k0 * ak;
                int k = 0;
                for (; k + 4 <= count; k += 4) {
                    float w[4];
                    if (vector) {
                        const float4 four =
                            lx::load_global(reinterpret_cast<const float4*>(row + k));
                        w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i) w[i] = lx::load_global(row + (k + i) * ak);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float4 b =
                            *reinterpret_cast<const float4*>(chunk + (k + i) * kTile + quad);
                        acc[j][0] = meet<kMax>(w[i], b.x, acc[j][0]);
                        acc[j][1] = meet<kMax>(w[i], b.y, acc[j][1]);
                        acc[j][2] = meet<kMax>(w[i], b.z, acc[j][2]);
                        acc[j][3] = meet<kMax>(w[i], b.w, acc[j][3]);
                    }
                }
                for (; k < count; ++k) {
                    const float w = lx::load_global(row + k * ak);
                    const float4 b = *reinterpret_cast<const float4*>(chunk + k * kTile + quad);
                    acc[j][0] = meet<kMax>(w, b.x, acc[j][0]);
                    acc[j][1] = meet<kMax>(w, b.y, acc[j][1]);
                    acc[j][2] = meet<kMax>(w, b.z, acc[j][2]);
                    acc[j][3] = meet<kMax>(w, b.w, acc[j][3]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kOwnResults; ++j) {
            const int64_t m = pass + group + j * kGroups;
            if (m < end) f(m, j, acc[j]);
        }
        done(pass + group);
    }
    lx::syncthreads();  // the last chunk has been read
}

// Returns whether the forward pass recomputed (rescued) this sum because its terms are too far
// below `top`.
LX_DEVICE bool lost_sum(float top, float shift, float out) {
    return out != kImpossible && top + shift - out >= kTrustLog;
}
// Returns the matrix that contains row `row`, where rows are counted over all matrices.
LX_DEVICE LayersMatrix matrix_of_row(const LayersProgram& program, int64_t row) {
    int low = 0, high = program.num_matrices() - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (program.matrices()[middle].row <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return program.matrices()[low];
}

// The terms of a part that contain unit u of a child: u * own + k * step for k in [0, count).
struct ChildTerms {
    int count, own, step;

    LX_DEVICE float sum(const float* d, int u, int64_t lanes) const {
        float sum = 0;
        for (int k = 0; k < count; ++k) sum += d[(u * own + k * step) * lanes];
        return sum;
    }
};
// Calls f(child, ChildTerms) for the children of a part.
template <class F>
LX_DEVICE void for_children(const LayersProgram& program, const LayersPart& part, F&& f) {
    const LayersChild* child = program.children() + part.child_begin;
    for (int side = 0; side < part.child_end - part.child_begin; ++side) {
        ChildTerms terms{1, 1, 1};
        if (part.kronecker) {
            const int m = child[1].units;
            terms = {child[1 - side].units, side == 0 ? m : 1, side == 0 ? 1 : m};
        }
        f(child[side], terms);
    }
}

// Returns the largest entry of a row of weights, or 0 if the row has no possible term.
LX_DEVICE float row_base(const float* w, int n) {
    float top = kImpossible;
    for (int i = 0; i < n; ++i) top = fmaxf(top, w[i]);
    return shift_of(top);
}

LX_DEVICE float LayerTile::rescued_sum(const LayersNode& node, const LayersMatrix& m, int64_t o,
                                       int lane) const {
    const float* w = weights_of(m, o);
    const float base = row_base(w, m.width);
    float top = kImpossible, sum = 0;
    for_terms(node, lane, 0, m.width, 1,
              [&](int i, float l) { top = fmaxf(top, w[i] - base + l); });
    if (top == kImpossible) return top;
    for_terms(node, lane, 0, m.width, 1,
              [&](int i, float l) { sum += expf(w[i] - base + l - top); });
    return top + logf(sum) + shift_of(m, o);
}

LX_DEVICE float LayerTile::owed_flow(const LayersNode& node, const LayersMatrix& m, int64_t i,
                                     int lane, float l, float top) const {
    float sum = 0;
    for (int64_t o = 0; o < m.units; ++o) {
        const float out = at(args.val, node.out + o)[lane], shift = shift_of(m, o);
        if (!lost_sum(top, shift, out)) continue;
        const float* w = weights_of(m, o);
        sum += at(args.grad, node.out + o)[lane] *
               expf(w[i] - row_base(w, m.width) + l + (shift - out));
    }
    return sum;
}

// Returns the number of blocks along an axis of the grid for `items` items (nodes of a stage, or
// results of a node).
inline unsigned along_grid(int64_t items) {
    return static_cast<unsigned>(lx::min<int64_t>(items, kMaxGridY));
}
inline int64_t lane_tiles(const LayersArgs& args) {
    return args.lanes / kTile;
}

// Launchers of the steps of a stage on tensor cores, which circuit_layers_terms.cu and
// circuit_layers_product.cu define.
enum class LayersProduct { kUp, kDown, kWeights };
LaunchStatus launch_layers_terms(const LayersArgs& args, const LayersStage& stage, bool down,
                                 void* stream);
LaunchStatus launch_layers_product(const LayersArgs& args, const LayersStage& stage,
                                   LayersProduct product, void* stream);
// Returns the end of the longest run of stages from `begin` that fits into one launch, or `begin`
// if fewer than two stages fit.
int64_t end_of_run(const LayersArgs& args, int64_t begin);
LaunchStatus launch_layers_run(const LayersArgs& args, int64_t begin, int64_t end, void* stream);
LaunchStatus launch_layers_children(const LayersArgs& args, const LayersStage& stage, void* stream);
// Converts flows of weights, which products have written to args.dw, to gradients.
LaunchStatus launch_layers_owed(const LayersArgs& args, void* stream);

// Declares to the emulator that a kernel reads float values (rows, columns) of any strides.
inline void declare_strided([[maybe_unused]] const void* values, int64_t rows, int64_t row,
                            int64_t columns, int64_t column) {
    if (row < column) return declare_strided(values, columns, column, rows, row);
    LX_BUF_ROWS(values, rows, ((columns - 1) * column + 1) * 4, row * 4, lx::Access::kConstant);
}
inline void declare_layers(const LayersArgs& args) {
    LX_BUF(args.program.at, args.plan.numbers() * 4, lx::Access::kConstant);
}
inline void declare_layer_weights(const LayersArgs& args) {
    declare_floats(args.w, args.num_weights, lx::Access::kConstant);
    declare_floats(args.weight, args.num_weights, lx::Access::kConstant);
    declare_floats(args.shift, args.plan.rows(), lx::Access::kConstant);
}
inline void declare_units(const LayersArgs& args, const void* units, lx::Access access) {
    declare_floats(units, args.plan.units() * args.lanes, access);
}

}  // namespace lora_ext
