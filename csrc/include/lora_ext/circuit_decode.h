// Drafting from a circuit and verifying the draft: the part of the interface beyond circuit.h.
//
//   sample            z ~ posterior_k, x_k ~ leaf_{k,z}, position by position; evidence is kept
//   conditional_dist  log q(v | x_<k) = log sum_z posterior_k[z] softmax(leaf_{k,z})[v]
//   argmax            the most probable tokens and latents jointly, by max-product
//   verify            accept x_k while u_k < p_k(x_k) / q(x_k | x_<k), never if q is 0; then
//                     draw a token from max(0, p - q), or from p after the last position
//
// A draw returns the smallest index whose running sum of weights exceeds u * total. The weight of
// this index is not zero. If rounding leaves no such index, it returns the last index of nonzero
// weight, or 0 if all weights are zero. Sums are double, so that small weights are not lost in
// the sum. Weights are float32, and exponentials of a CPU twin and of a CUDA kernel differ in
// their last bits. The two may therefore draw different indices, but only if
// |sum - u * total| <= 1e-5 total for some running sum.
//
// A row of the batch is one item (CPU) or one thread block (CUDA), and its result does not depend
// on other rows. Results have the accumulator's type: float32, or float64 for float64 logits.
//
// Sources: arXiv 2511.11346; speculative sampling (Leviathan et al. 2023; Chen et al. 2023).
#pragma once

#include "lora_ext/circuit.h"

namespace lora_ext {

// Circuit with the logits of its leaves. With a stride of 0, all rows of the batch share the
// logits.
struct CircuitLogits {
    CircuitParams circuit;
    DType dtype = DType::kFloat32;
    int64_t vocabulary = 0;
    const void* leaf = nullptr;  // (B, K, C, V), each row of the batch contiguous
    int64_t leaf_stride = 0;
    void* workspace = nullptr;  // circuit_workspace_bytes(); CUDA only
};

struct CircuitSampleArgs {
    CircuitLogits logits;
    const void* uniforms = nullptr;     // (B, K, 2) in [0, 1): one for the state, one for the token
    const int64_t* evidence = nullptr;  // (B, K), -1: to be drawn; nullptr: draw all
    int64_t* tokens = nullptr;          // (B, K)
    void* conditional = nullptr;        // (B, K)
    void* posterior = nullptr;          // (B, K, C)
};

struct CircuitConditionalArgs {
    CircuitLogits logits;
    const int64_t* x = nullptr;  // (B, K), -1: marginalised; entries from k on are not read
    const int64_t* k = nullptr;  // (B,)
    void* out = nullptr;         // (B, V)
};

struct CircuitArgmaxArgs {
    CircuitLogits logits;
    const int64_t* evidence = nullptr;  // (B, K) or nullptr
    int64_t* tokens = nullptr;          // (B, K)
    void* value = nullptr;              // (B,)
};

struct SpecVerifyArgs {
    DType target_dtype = DType::kFloat32, leaf_dtype = DType::kFloat32;  // both float64 or neither
    int64_t rows = 0, n_token = 0, components = 0, vocabulary = 0;
    const void* target = nullptr;  // (B, K + 1, V) logits, each row of the batch contiguous
    const void* leaf = nullptr;    // (B, K, C, V) logits, each row of the batch contiguous
    int64_t target_stride = 0, leaf_stride = 0;
    const int64_t* tokens = nullptr;        // (B, K)
    const void* conditional = nullptr;      // (B, K)
    const void* posterior = nullptr;        // (B, K, C)
    const void* uniforms = nullptr;         // (B, K + 1)
    const int64_t* num_evidence = nullptr;  // (B,) or nullptr
    double inverse_temperature = 1;         // 0: greedy, without a draw
    int64_t* accepted = nullptr;            // (B,)
    int64_t* next_token = nullptr;          // (B,)
    void* workspace = nullptr;              // spec_verify_workspace_bytes(); CUDA only
};

// Children of a latent: adjacent positions, up to two latents. A latent has the number of the
// matrix that leads into it (root: -1); child latents have larger numbers than their parent.
struct CircuitLatent {
    int64_t first_leaf, num_leaves;
    int64_t inner[2];  // -1: no latent
};
LX_HOST_DEVICE constexpr CircuitLatent circuit_latent(CircuitKind kind, int64_t n_token,
                                                      int64_t matrix) {
    if (kind == CircuitKind::kHMM)
        return {matrix + 1, 1, {matrix + 2 < n_token ? matrix + 1 : -1, -1}};
    if (kind != CircuitKind::kBTree) return {0, n_token, {-1, -1}};
    CircuitNode node{0, n_token, -1};
    while (node.matrix != matrix) node = node.child(matrix >= node.child(true).matrix);
    const CircuitNode left = node.child(false), right = node.child(true);
    const int64_t leaves = left.is_leaf() + right.is_leaf();  // a left leaf implies a right leaf
    return {node.hi - leaves,
            leaves,
            {left.is_leaf() ? -1 : left.matrix, right.is_leaf() ? -1 : right.matrix}};
}

// CPU twins: one table per instruction set, from isa.h. Items are rows of the batch; `scratch`
// is 64-byte aligned.
struct CircuitDecodeCpu {
    const char* isa;
    int64_t (*sample_scratch)(const CircuitLogits&);  // bytes, for sample and conditional_dist
    void (*sample)(const CircuitSampleArgs&, int64_t begin, int64_t end, void* scratch);
    void (*conditional_dist)(const CircuitConditionalArgs&, int64_t begin, int64_t end,
                             void* scratch);
    int64_t (*argmax_scratch)(const CircuitLogits&);
    void (*argmax)(const CircuitArgmaxArgs&, int64_t begin, int64_t end, void* scratch);
    int64_t (*verify_scratch)(const SpecVerifyArgs&);
    void (*verify)(const SpecVerifyArgs&, int64_t begin, int64_t end, void* scratch);
};

// CUDA launchers: asynchronous, no allocation. Each launches one kernel. If the leaves of a row
// occupy many bytes, another kernel first computes their norms on all multiprocessors. Verifying
// more than 32768 logits per row takes four kernels, each on all multiprocessors.
int64_t circuit_workspace_bytes(const CircuitLogits& logits);  // reads sizes only
// Bytes of shared memory: those available to a block on the current device, those that sample and
// conditional_dist need for a row, and those that argmax needs for a row.
int64_t circuit_block_bytes();
int64_t circuit_row_bytes(const CircuitLogits& logits);
int64_t circuit_argmax_bytes(const CircuitLogits& logits);
LaunchStatus launch_circuit_sample(const CircuitSampleArgs& args, void* stream);
LaunchStatus launch_circuit_conditional_dist(const CircuitConditionalArgs& args, void* stream);
LaunchStatus launch_circuit_argmax(const CircuitArgmaxArgs& args, void* stream);
// Reads only the sizes in `args`. The workspace must be aligned to 16 bytes.
int64_t spec_verify_workspace_bytes(const SpecVerifyArgs& args);
LaunchStatus launch_spec_verify(const SpecVerifyArgs& args, void* stream);

}  // namespace lora_ext
