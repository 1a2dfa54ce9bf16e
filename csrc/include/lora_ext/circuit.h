// Probabilistic circuits whose parameters are emitted per row by a network.
//
//   ff     p(x) = prod_k leaf_k(x_k); C = 1 and M = 0.
//   cp     p(x) = sum_z prior_z prod_k leaf_{k,z}(x_k): one latent for the whole window; M = 0.
//   hmm    A chain of latents; trans[k] is the transition from position k to k + 1; M = K - 1.
//   btree  A balanced binary tree with one latent per inner node, the parent of both children.
//          trans[m] is the transition into inner node m, in pre-order without the root; M = K - 2.
//
// Letters: B rows, K positions, C components (states), V vocabulary, M transition matrices.
// Layouts, row-major: leaf (B, K, C, V); prior (B, C); trans (B, M, C, C), row = parent state,
// column = child state. All are logits; the kernels normalise them over the last axis. The batch
// stride may be 0: all rows then share the parameters. x (B, K) int64, -1 = marginalised.
//
// All functions visit the positions in order, with cur[z] = log p(state at k = z, x_<k):
//
//   observe position k    L_k = logsumexp(cur + e_k), then cur += e_k
//   step of a chain       cur'[z'] = logsumexp_z(cur[z] + A[z, z'])
//   node of a tree        on the way down the same step, on the way up
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

// Return the number of positions of a tree node's left child: half, ties rounded to even.
LX_HOST_DEVICE constexpr int64_t circuit_left_size(int64_t length) {
    return length % 4 == 3 ? (length + 1) / 2 : length / 2;
}

// Node of the tree: its positions and, for an inner node, the matrix that leads into it. Matrices
// are numbered in pre-order: a subtree of n positions has n - 1 inner nodes.
struct CircuitNode {
    int64_t lo, hi;
    int64_t matrix;  // -1 for the root

    LX_HOST_DEVICE constexpr bool is_leaf() const { return hi - lo == 1; }
    LX_HOST_DEVICE constexpr int64_t middle() const { return lo + circuit_left_size(hi - lo); }
    LX_HOST_DEVICE constexpr CircuitNode child(bool right) const {
        return right ? CircuitNode{middle(), hi, matrix + middle() - lo}
                     : CircuitNode{lo, middle(), matrix + 1};
    }
    // Return the child that contains position k.
    LX_HOST_DEVICE constexpr CircuitNode toward(int64_t k) const { return child(k >= middle()); }
    // Return the node `level` steps below this one on the path to position k.
    LX_HOST_DEVICE constexpr CircuitNode below(int64_t k, int64_t level) const {
        CircuitNode node = *this;
        for (; level > 0; --level) node = node.toward(k);
        return node;
    }
};
// Return the number of levels of inner nodes of a tree over n_token positions.
LX_HOST_DEVICE constexpr int64_t circuit_tree_levels(int64_t n_token) {
    int64_t levels = 0;
    for (; n_token > 1; n_token = (n_token + 1) / 2) ++levels;
    return levels;
}

// A circuit without its leaves. A btree over at most two positions and an hmm over one position
// have no matrix. csrc/ops passes them as cp, because no function supports a tree without a matrix.
struct CircuitParams {
    CircuitKind kind = CircuitKind::kCP;
    DType dtype = DType::kFloat32;  // dtype of prior and trans; kFloat64 only with float64 leaves
    int64_t rows = 0, n_token = 0, components = 0;
    const void* prior = nullptr;  // (B, C), C contiguous; nullptr: uniform
    int64_t prior_stride = 0;
    const void* trans = nullptr;  // (B, M, C, C), each row of the batch contiguous
    int64_t trans_stride = 0;
};

// ------------------------------------------------------------------------------------------------
// Leaves: e = log softmax(logits)[x]; each row of V logits is read once. If x is -1, e is 0 and the
// logits are not read. Backward, from de:
//   dlogit[v] = de (1[v = x] - softmax(logits)[v]), every element written once; 0 where de is 0.
// The normaliser of a row is stored as two numbers, because their sum would lose digits of large
// logits: top, its maximum (0 if all logits are -inf), and log_sum = log sum exp(logit - top). In
// the fields below, float means double if the logits are float64.
struct CircuitLeafArgs {
    DType dtype = DType::kFloat32;
    int64_t rows = 0, n_token = 0, components = 0, vocab = 0;
    const void* logits = nullptr;  // (B, K, C, V); logits_stride elements between rows of the batch
    int64_t logits_stride = 0;
    const int64_t* x = nullptr;  // (B, K), each in [-1, V); x_stride elements between rows
    int64_t x_stride = 0;
    void* e = nullptr;                        // (B, K, C) float; e_stride elements between rows
    void *top = nullptr, *log_sum = nullptr;  // (B, K, C) float, strides as for e
    int64_t e_stride = 0;
    const void* de = nullptr;  // (B, K, C) float, strides as for e
    void* dlogits = nullptr;   // (B, K, C, V) contiguous, or the logits themselves
};

// Scan: prefix[k] = logsumexp(cur_k + e_k), posterior[k] = softmax(cur_k), conditional[k] =
// logsumexp(cur_k + e_k) - logsumexp(cur_k). Backward, from the gradients of prefix and
// conditional.
struct CircuitScanArgs {
    CircuitParams params;
    const void* e = nullptr;  // (B, K, C) float; e_stride elements between rows
    int64_t e_stride = 0;
    void* prefix = nullptr;         // (B, K) float
    void* conditional = nullptr;    // (B, K) float
    void* posterior = nullptr;      // (B, K, C) float
    void* states = nullptr;         // (B, circuit_num_states, C) float for the backward, or nullptr
    const void* dprefix = nullptr;  // (B, K) float, contiguous
    const void* dconditional = nullptr;  // (B, K) float, contiguous
    void* de = nullptr;                  // (B, K, C) float
    void* dprior = nullptr;              // (B, C), dtype of prior; nullptr if not wanted
    void* dtrans = nullptr;              // (B, M, C, C), as dprior; every element is written once
};
// Return the number of state vectors that the forward stores per row for the backward.
LX_HOST_DEVICE constexpr int64_t circuit_num_states(CircuitKind kind, int64_t n_token) {
    return kind == CircuitKind::kBTree ? 3 * (n_token - 2) : n_token;
}

// CPU twins: one table per instruction set, from isa.h. csrc/ops splits [0, items) over threads,
// and the split does not change the result. Items are positions (b, k) for the leaves and rows for
// the scan. Each thread has its own `scratch`.
struct CircuitCpu {
    const char* isa;
    void (*leaf)(const CircuitLeafArgs&, int64_t begin, int64_t end);
    void (*leaf_backward)(const CircuitLeafArgs&, int64_t begin, int64_t end);
    int64_t (*scan_scratch)(const CircuitScanArgs&);  // bytes, for scan and scan_backward
    void (*scan)(const CircuitScanArgs&, int64_t begin, int64_t end, void* scratch);
    void (*scan_backward)(const CircuitScanArgs&, int64_t begin, int64_t end, void* scratch);
};

// CUDA launchers: asynchronous, on `stream`, no allocation, no synchronisation, no float64.
LaunchStatus launch_circuit_leaf(const CircuitLeafArgs& args, void* stream);
LaunchStatus launch_circuit_leaf_backward(const CircuitLeafArgs& args, void* stream);
LaunchStatus launch_circuit_scan(const CircuitScanArgs& args, void* stream);
LaunchStatus launch_circuit_scan_backward(const CircuitScanArgs& args, void* stream);

}  // namespace lora_ext
