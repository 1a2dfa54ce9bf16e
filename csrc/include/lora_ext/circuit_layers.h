// Circuits over region graphs: all sums and products of one circuit in one call, and the tables of
// its finite input distributions.
//
//   up     log-values l[u] of all units u, from those of the leaves
//   down   flows dl[u] of the units, and flows of the weights, from the flows of the roots
//   walk   from a root to a leaf of every variable, choosing one term of every sum on the way
//
// A program of int32 numbers describes the computation. Its nodes are regions, children before
// parents. A node has products, each the sum of log-values of child units, and sums over them:
//
//   l[out + o] = log sum_i W[o, i] exp(term[i])     W, -inf and underflow: see circuit_sum.h
//
// or, for the max-product, max_i (log W[o, i] + term[i]).
//
// The units of a node without a matrix are its products. Products consist of parts: `hadamard`,
// unit by unit over any number of children, or `kronecker`, all pairs of the units of two children.
// Nodes of one stage do not read each other's values. Values are unit-major, val (U, L): lanes are
// the rows of data, padded with rows of zeros to a multiple of kLaneGroup. Unit 0 always has the
// value 0, unit 1 always -inf, and the leaves begin at unit kFirstLeaf.
//
// At sum o a walk weighs its terms by W[o, i] exp(term[i]). It takes the heaviest term (the first,
// if several are equal), or draws one: the first whose running sum exceeds its uniform times the
// total, whose weight is never zero. If rounding leaves no such term, it takes the last term of
// nonzero weight.
//
// The bits of a row's results depend neither on the other rows nor on the number of threads. Flows
// of weights are sums over the rows of data and add the lanes in order.
//
// Source: expected flows, Darwiche 2003; layers of one shape, Peharz et al. 2020.
#pragma once

#include "lora_ext/circuit_sum.h"

namespace lora_ext {

constexpr int64_t kLaneGroup = 16;
constexpr int32_t kFirstLeaf = 2;

struct LayersNode {
    int32_t out, units, width, matrix, part_begin, part_end;
};
struct LayersPart {
    int32_t term, kronecker, child_begin, child_end;  // term: index of the part's first product
};
struct LayersChild {
    int32_t column, units;
};
struct LayersMatrix {
    int32_t weight, units, width, row, user_begin, user_end;  // row: index of its first row among
                                                              // the rows of all matrices
};

// The int32 numbers of a program, in order.
struct LayersProgram {
    static constexpr int32_t kHeader = 10;
    const int32_t* at;

    LX_HOST_DEVICE int32_t units() const { return at[0]; }
    LX_HOST_DEVICE int32_t leaves() const { return at[1]; }
    LX_HOST_DEVICE int32_t rows() const { return at[2]; }  // number of rows of all matrices
    LX_HOST_DEVICE int32_t num_nodes() const { return at[3]; }
    LX_HOST_DEVICE int32_t num_parts() const { return at[4]; }
    LX_HOST_DEVICE int32_t num_children() const { return at[5]; }
    LX_HOST_DEVICE int32_t num_matrices() const { return at[6]; }
    LX_HOST_DEVICE int32_t num_users() const { return at[7]; }
    LX_HOST_DEVICE int32_t num_roots() const { return at[8]; }
    LX_HOST_DEVICE int32_t num_stages() const { return at[9]; }

    template <class Item>
    LX_HOST_DEVICE const Item* items(int64_t offset) const {
        return reinterpret_cast<const Item*>(at + offset);
    }
    LX_HOST_DEVICE int64_t parts_at() const { return kHeader + int64_t{6} * num_nodes(); }
    LX_HOST_DEVICE int64_t children_at() const { return parts_at() + int64_t{4} * num_parts(); }
    LX_HOST_DEVICE int64_t matrices_at() const {
        return children_at() + int64_t{2} * num_children();
    }
    LX_HOST_DEVICE int64_t users_at() const { return matrices_at() + int64_t{6} * num_matrices(); }
    LX_HOST_DEVICE int64_t roots_at() const { return users_at() + num_users(); }
    LX_HOST_DEVICE int64_t stages_at() const { return roots_at() + num_roots(); }
    LX_HOST_DEVICE int64_t owners_at() const { return stages_at() + num_stages() + 1; }
    LX_HOST_DEVICE int64_t draws_at() const { return owners_at() + num_children() + num_roots(); }
    LX_HOST_DEVICE int64_t size() const { return draws_at() + num_nodes(); }

    LX_HOST_DEVICE const LayersNode* nodes() const { return items<LayersNode>(kHeader); }
    LX_HOST_DEVICE const LayersPart* parts() const { return items<LayersPart>(parts_at()); }
    LX_HOST_DEVICE const LayersChild* children() const { return items<LayersChild>(children_at()); }
    LX_HOST_DEVICE const LayersMatrix* matrices() const {
        return items<LayersMatrix>(matrices_at());
    }
    LX_HOST_DEVICE const int32_t* users() const { return at + users_at(); }    // nodes, by matrix
    LX_HOST_DEVICE const int32_t* roots() const { return at + roots_at(); }    // columns of val
    LX_HOST_DEVICE const int32_t* stages() const { return at + stages_at(); }  // their first nodes
    // For each child, then for each root: the node that owns its units, or -1 - v if they are
    // leaves of variable v.
    LX_HOST_DEVICE const int32_t* owners() const { return at + owners_at(); }
    // For each node with a matrix, the index of its uniform among the uniforms of a walk.
    LX_HOST_DEVICE const int32_t* draws() const { return at + draws_at(); }
};

// Numbers of a program's launch plan (LayersPlan), in host memory: the counts of units, leaves,
// rows, nodes, matrices, roots, numbers of the program, stages, variables, and uniforms of a walk;
// then the four numbers of LayersStage for each stage.
struct LayersStage {
    int64_t begin, end, units, width;  // range of nodes; largest units and width of a node
};
constexpr int64_t kWalkedWeights = 1 << 14;  // maximum per node if one launch runs all nodes
struct LayersPlan {
    static constexpr int64_t kHeader = 10;
    const int64_t* at;

    int64_t units() const { return at[0]; }
    int64_t leaves() const { return at[1]; }
    int64_t rows() const { return at[2]; }
    int64_t nodes() const { return at[3]; }
    int64_t matrices() const { return at[4]; }
    int64_t roots() const { return at[5]; }
    int64_t numbers() const { return at[6]; }  // size of the program
    int64_t num_stages() const { return at[7]; }
    int64_t variables() const { return at[8]; }
    int64_t draws() const { return at[9]; }
    int64_t size() const { return kHeader + 4 * num_stages(); }
    int64_t most_terms() const {  // largest total of terms of a stage
        return most([](const LayersStage& s) { return (s.end - s.begin) * s.width; });
    }
    int64_t most_sums() const {
        return most([](const LayersStage& s) { return (s.end - s.begin) * s.units; });
    }
    // Return whether every node has at most kWalkedWeights weights.
    bool small_nodes() const {
        return most([](const LayersStage& s) { return s.units * s.width; }) <= kWalkedWeights;
    }
    template <class F>
    int64_t most(F&& f) const {
        int64_t found = 0;
        for (int64_t s = 0; s < num_stages(); ++s) {
            const int64_t own = f(stage(s));
            found = own > found ? own : found;
        }
        return found;
    }
    LayersStage stage(int64_t i) const {
        const int64_t* s = at + kHeader + 4 * i;
        return {s[0], s[1], s[2], s[3]};
    }
};

// Precision of sums when kernels run stage by stage. A number is split into three bfloat16 parts,
// which hold all 24 bits of a float (kFloat32), or two (kHigh), or is stored as one scaled float16
// (kHalf). CPU twins, and the flows on all devices, have only one precision.
enum class LayersPrecision { kFloat32, kHigh, kHalf };
constexpr int parts_of(LayersPrecision precision) {
    return precision == LayersPrecision::kFloat32 ? 3 : precision == LayersPrecision::kHigh ? 2 : 1;
}

// Kernels run stage by stage, on tensor cores, if nodes are too large for one launch that runs all
// nodes. They store numbers as 16-bit parts; the parts of eight adjacent numbers of a row are
// contiguous. A row of weights has part_width numbers, a multiple of eight, and a matrix begins at
// number first_part.
LX_HOST_DEVICE constexpr int64_t part_width(int64_t width) {
    return (width + 7) / 8 * 8;
}
LX_HOST_DEVICE inline int64_t first_part(const LayersMatrix& m) {
    return (m.weight + int64_t{7} * m.row + 7) / 8 * 8;
}
constexpr int kNodeShares = 4;  // number of blocks that share the terms of a node

// All tensors except leaf and uniforms are contiguous. Values are float or double, see `dtype`.
struct LayersArgs {
    DType dtype = DType::kFloat32;
    WeightNorm norm = WeightNorm::kLogits;
    bool max_product = false;
    LayersPrecision precision = LayersPrecision::kFloat32;  // forward only
    LayersProgram program = {nullptr};                      // numbers on the device of the values
    LayersPlan plan = {nullptr};
    int64_t rows = 0, lanes = 0;
    const void* leaf = nullptr;  // (B, N)
    int64_t leaf_row = 0, leaf_unit = 0;
    const void* w = nullptr;  // flat, each matrix (O, I)
    int64_t num_weights = 0;
    void* weight = nullptr;  // layout of w, each row with maximum 1; max-product: its logarithm
    void* shift = nullptr;   // one per row
    void* val = nullptr;     // (U, L)
    int64_t max_width = 0, max_units = 0;  // largest of any node
    // Backward.
    const void* droots = nullptr;  // (B, roots)
    void* grad = nullptr;          // (U, L)
    void* ratio = nullptr;         // (U, L), set for units that are sums
    void* dw = nullptr;            // layout of w
    // Kernels only.
    void* terms = nullptr;  // (plan.most_terms(), L), for a backward
    void* tops = nullptr;   // (nodes, L)
    // 16-bit parts per number if kernels run stage by stage; 0 if one launch runs all nodes.
    int parts = 0;
    void* weight_parts = nullptr;  // stored_weights() numbers
    void* term_parts = nullptr;    // stored_terms() numbers
    void* ratio_parts = nullptr;   // stored_ratios() numbers, for a backward
    void* lost = nullptr;          // (nodes, kNodeShares, L), for a backward
    void* next_parts = nullptr;    // layout of term_parts, for a forward
    float* run_tops = nullptr;     // stored_run_tops() numbers, for a forward
    uint32_t* arrivals = nullptr;  // stored_arrivals() numbers, for a forward
    // Walks; the walks of one row of data are consecutive.
    int64_t walks = 0, walks_per_row = 0;
    const int64_t* root = nullptr;   // (B,) in [0, roots)
    const void* uniforms = nullptr;  // (walks, plan.draws()); nullptr: take the heaviest terms
    int64_t uniforms_row = 0;
    bool wide_uniforms = false;  // uniforms are double
    int32_t* chosen = nullptr;   // (nodes, walks), scratch: the current unit of a walk, or -1
    int64_t* leaves = nullptr;   // (walks, plan.variables()): columns of val, or -1
};

// Return the count of 16-bit numbers of each array of parts, with the padding of first_part.
inline int64_t stored_weights(const LayersArgs& args) {
    return args.parts * ((args.num_weights + 7 * args.plan.rows() + 7) / 8 * 8);
}
inline int64_t stored_terms(const LayersArgs& args) {
    return args.parts * args.plan.most_terms() * args.lanes;
}
inline int64_t stored_ratios(const LayersArgs& args) {
    return args.parts * args.plan.most_sums() * args.lanes;
}

// Consecutive stages of one node each run in one launch if all blocks of a lane tile can be
// resident. A block computes kRunTerms sums and terms on kRunLanes lanes. stored_run_tops counts
// maxima per block and lane, in two buffers; stored_arrivals counts barriers per stage and tile.
constexpr int kRunTerms = 64, kRunLanes = 32;
inline int64_t stored_run_tops(const LayersArgs& args) {
    return 2 * ((args.plan.most_terms() + kRunTerms - 1) / kRunTerms) * args.lanes;
}
inline int64_t stored_arrivals(const LayersArgs& args) {
    return args.plan.num_stages() * ((args.lanes + kRunLanes - 1) / kRunLanes);
}

// CPU twins: csrc/ops splits [0, items) over threads, and the split does not change the result.
// `scratch` has scratch_bytes bytes per thread.
struct LayersCpu {
    const char* isa;
    void (*weights)(const LayersArgs&, int64_t begin, int64_t end);  // items: rows of matrices
    int64_t (*scratch_bytes)(const LayersArgs&);
    // Items: groups of lanes. backward writes the `ratio` that dweights reads.
    void (*forward)(const LayersArgs&, int64_t begin, int64_t end, void* scratch);
    void (*backward)(const LayersArgs&, int64_t begin, int64_t end, void* scratch);
    // Items: bands of kBandRows rows of a matrix; no band contains rows of two matrices.
    void (*dweights)(const LayersArgs&, int64_t begin, int64_t end, void* scratch);
    void (*walk)(const LayersArgs&, int64_t begin, int64_t end, void* scratch);  // items: walks
};
constexpr int64_t kBandRows = 128;

// CUDA launchers: asynchronous, on `stream`, no allocation, no float64.
LaunchStatus launch_layers_weights(const LayersArgs& args, void* stream);
LaunchStatus launch_layers_forward(const LayersArgs& args, void* stream);
// Computes the flows of units and ratio. If kernels run stage by stage and `dw` is given, it also
// starts the flows of weights; dweights finishes them.
LaunchStatus launch_layers_backward(const LayersArgs& args, void* stream);
LaunchStatus launch_layers_dweights(const LayersArgs& args, void* stream);
LaunchStatus launch_layers_walk(const LayersArgs& args, void* stream);

// Leaves with finite distributions: e[b, m, j] = log p[row[m] + j, x[b, m]], or 0 if x is -1. m
// counts blocks of `block` units; every row[m] is a multiple of `block`. With norm kLog the table
// holds log p. With kLogits log p = table - base + shift, the log-softmax of its rows.
struct CircuitTableArgs {
    DType dtype = DType::kFloat32;
    WeightNorm norm = WeightNorm::kLog;
    int64_t rows = 0, lanes = 0, blocks = 0, block = 0;
    int64_t table_rows = 0, values = 0;
    const void* table = nullptr;   // (R, V) float or double; the backward reads it only for logits
    const int64_t* x = nullptr;    // (B, M)
    const int64_t* row = nullptr;  // (M,)
    void* base = nullptr;          // (R,) for logits: the largest entry, or 0 for rows of -inf
    void* shift = nullptr;         // (R,) for logits
    void* e = nullptr;             // (M * block, L), 0 in lanes beyond the rows of data
    // Backward.
    const void* de = nullptr;  // (B, M * block), strided
    int64_t de_row = 0, de_unit = 0;
    void* dtable = nullptr;  // (R, V); the caller fills it with zeros
};
// For logits the caller runs `norms` before `forward`, and `finish` after `backward`.
struct CircuitTableCpu {
    const char* isa;
    void (*norms)(const CircuitTableArgs&, int64_t begin, int64_t end);    // items: rows
    void (*forward)(const CircuitTableArgs&, int64_t begin, int64_t end);  // items: blocks
    int64_t (*scratch_bytes)(const CircuitTableArgs&);
    // Items: kLaneGroup units of every block.
    void (*backward)(const CircuitTableArgs&, int64_t begin, int64_t end, void* scratch);
    // Items: rows.
    void (*finish)(const CircuitTableArgs&, int64_t begin, int64_t end, void* scratch);
};
LaunchStatus launch_circuit_table(const CircuitTableArgs& args, void* stream);
LaunchStatus launch_circuit_table_backward(const CircuitTableArgs& args, void* stream);

}  // namespace lora_ext
