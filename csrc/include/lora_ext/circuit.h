// Probabilistic circuits whose parameters a network emits per row: kinds, structure, layouts.
//
//   ff     p(x) = prod_k leaf_k(x_k); C = 1 and M = 0.
//   cp     p(x) = sum_z prior_z prod_k leaf_{k,z}(x_k): one latent for the whole window; M = 0.
//   hmm    A chain of latents; trans[k] leads from position k to k + 1; M = K - 1.
//   btree  A balanced binary tree of latents, one per inner node, seen by both its children;
//          trans[m] leads from a parent into inner node m, pre-order without the root; M = K - 2.
//
// Letters: B rows, K positions, C components (states), V vocabulary, M transition matrices.
// Layouts, row-major: leaf (B, K, C, V); prior (B, C); trans (B, M, C, C), row = parent state,
// column = child state; all logits, normalised over the last axis inside the kernels. The stride of
// a batch may be 0: one set of parameters for all rows. x (B, K) int64, -1 = marginalised.
//
// Everything is one walk from left to right that keeps cur[z] = log p(state at k = z, x_<k):
//
//   observe position k    L_k = logsumexp(cur + e_k), then cur += e_k
//   step of a chain       cur'[z'] = logsumexp_z(cur[z] + A[z, z'])
//   node of a tree        go down with the same step, come back with
//                         u[z] = logsumexp_z'(A[z, z'] + up[z'])
//
// Source: "Fast and Expressive Multi-Token Prediction with Probabilistic Circuits" (2511.11346).
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

enum class CircuitKind : int32_t { kFF, kCP, kHMM, kBTree };

LX_HOST_DEVICE constexpr int64_t circuit_num_transitions(CircuitKind kind, int64_t n_token) {
    const int64_t steps = kind == CircuitKind::kHMM     ? n_token - 1
                          : kind == CircuitKind::kBTree ? n_token - 2
                                                        : 0;
    return steps > 0 ? steps : 0;
}

// Positions of a tree node that go to its left child: half, rounded to even at a tie.
LX_HOST_DEVICE constexpr int64_t circuit_left_size(int64_t length) {
    return length % 4 == 3 ? (length + 1) / 2 : length / 2;
}

// A node of the tree: its positions, and the matrix that leads into it if it is an inner one.
// The numbers are those of a pre-order: a subtree of n positions has n - 1 inner nodes.
struct CircuitNode {
    int64_t lo, hi;
    int64_t matrix;  // -1: the root

    LX_HOST_DEVICE constexpr bool is_leaf() const { return hi - lo == 1; }
    LX_HOST_DEVICE constexpr int64_t middle() const { return lo + circuit_left_size(hi - lo); }
    LX_HOST_DEVICE constexpr CircuitNode child(bool right) const {
        return right ? CircuitNode{middle(), hi, matrix + middle() - lo}
                     : CircuitNode{lo, middle(), matrix + 1};
    }
    // The child that holds position k.
    LX_HOST_DEVICE constexpr CircuitNode toward(int64_t k) const { return child(k >= middle()); }
    // The node `level` steps below this one on the way to position k.
    LX_HOST_DEVICE constexpr CircuitNode below(int64_t k, int64_t level) const {
        CircuitNode node = *this;
        for (; level > 0; --level) node = node.toward(k);
        return node;
    }
};
// Levels of inner nodes of a tree over n_token positions.
LX_HOST_DEVICE constexpr int64_t circuit_tree_levels(int64_t n_token) {
    int64_t levels = 0;
    for (; n_token > 1; n_token = (n_token + 1) / 2) ++levels;
    return levels;
}

// What the walk reads. btree over two positions or fewer, and hmm over one, have no matrix and are
// cp: csrc/ops says so, the walks know no tree without a matrix.
struct CircuitParams {
    CircuitKind kind = CircuitKind::kCP;
    DType dtype = DType::kFloat32;  // of prior and trans; kFloat64 only beside float64 leaves
    int64_t rows = 0, n_token = 0, components = 0;
    const void* prior = nullptr;  // (B, C), C contiguous; nullptr: all states alike
    int64_t prior_stride = 0;
    const void* trans = nullptr;  // (B, M, C, C), each row of the batch contiguous
    int64_t trans_stride = 0;
};

// ------------------------------------------------------------------------------------------------
// Leaves: e = log softmax(logits)[x], one reading of each row of V logits. Where x is -1: e = 0,
// and the logits are not read. Backward, from de:
//   dlogit[v] = de (1[v = x] - softmax(logits)[v]), every element written once; 0 where de is 0.
// What a row is normalised by is kept as top, its maximum (0 for one of nothing but -inf), and
// log_sum = log sum exp(logit - top): their sum would lose the digits of large logits.
// "float" below is double for float64 logits.
struct CircuitLeafArgs {
    DType dtype = DType::kFloat32;
    int64_t rows = 0, n_token = 0, components = 0, vocab = 0;
    const void* logits = nullptr;  // (B, K, C, V), rows of the batch `logits_stride` apart
    int64_t logits_stride = 0;
    const int64_t* x = nullptr;  // (B, K), rows x_stride apart, each in [-1, V)
    int64_t x_stride = 0;
    void* e = nullptr;                        // (B, K, C) float, rows e_stride apart
    void *top = nullptr, *log_sum = nullptr;  // likewise
    int64_t e_stride = 0;
    const void* de = nullptr;  // likewise
    void* dlogits = nullptr;   // (B, K, C, V) contiguous, or the logits themselves
};

// The scan: prefix[k] = logsumexp(cur_k + e_k), posterior[k] = softmax(cur_k), conditional[k] =
// logsumexp(cur_k + e_k) - logsumexp(cur_k); backward from the gradients of prefix and conditional.
struct CircuitScanArgs {
    CircuitParams params;
    const void* e = nullptr;  // (B, K, C) float, rows e_stride apart
    int64_t e_stride = 0;
    void* prefix = nullptr;         // (B, K) float
    void* conditional = nullptr;    // (B, K) float
    void* posterior = nullptr;      // (B, K, C) float
    void* states = nullptr;         // (B, circuit_num_states, C) float for the backward, or nullptr
    const void* dprefix = nullptr;  // (B, K) float, contiguous
    const void* dconditional = nullptr;  // likewise
    void* de = nullptr;                  // (B, K, C) float
    void* dprior = nullptr;              // (B, C) of the dtype of prior; nullptr: not wanted
    void* dtrans = nullptr;              // (B, M, C, C) likewise, every element written once
};
// Vectors of states that a backward wants of each row: see the walks.
LX_HOST_DEVICE constexpr int64_t circuit_num_states(CircuitKind kind, int64_t n_token) {
    return kind == CircuitKind::kBTree ? 3 * (n_token - 2) : n_token;
}

// CPU twins: one table per instruction set, from isa.h. ops splits [0, items) over threads, where
// items are positions (b, k) of the leaves and rows of the scan; no bit depends on how. `scratch`
// belongs to one thread.
struct CircuitCpu {
    const char* isa;
    void (*leaf)(const CircuitLeafArgs&, int64_t begin, int64_t end);
    void (*leaf_backward)(const CircuitLeafArgs&, int64_t begin, int64_t end);
    int64_t (*scan_scratch)(const CircuitScanArgs&);  // bytes, of scan and of scan_backward
    void (*scan)(const CircuitScanArgs&, int64_t begin, int64_t end, void* scratch);
    void (*scan_backward)(const CircuitScanArgs&, int64_t begin, int64_t end, void* scratch);
};

// CUDA launchers: asynchronous, on `stream`, no allocation, no synchronisation, no float64.
LaunchStatus launch_circuit_leaf(const CircuitLeafArgs& args, void* stream);
LaunchStatus launch_circuit_leaf_backward(const CircuitLeafArgs& args, void* stream);
LaunchStatus launch_circuit_scan(const CircuitScanArgs& args, void* stream);
LaunchStatus launch_circuit_scan_backward(const CircuitScanArgs& args, void* stream);

}  // namespace lora_ext
