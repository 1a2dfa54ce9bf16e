// Losses over a vocabulary of V tokens. Logits are processed in chunks of columns: a library's GEMM
// computes a chunk, a function below reads it, and it is then discarded.
//
// Row n of hidden state e has the logits z[e, n, v] = softcap(raw[e, n, v]) / tau, where softcap is
// x -> c tanh(x / c), or the identity. With q = softmax(z):
//
//   cross entropy, k = 1      loss[n] = log sum_v exp z[n, v] - z[n, y_n]
//   divergence, teacher k-1   loss[n] = tau^2 mean_{e < k-1} KL(q[k-1, n] || q[e, n])
//
// update   adds one chunk to the running state of its rows (FlashAttention's online softmax): the
//          largest logit, the sum of exp(z - top), and z[y] or sum_v exp(z_k - top_k) (z_k - z_e).
//          With `products` it replaces the logits by the weights exp(z - top) dz/draw and rescales
//          the products so far; the caller then adds the product of weights and W, the chunk of the
//          output matrix, to them. For cross entropy, sum and weights exclude the label's column,
//          since digits of q - 1 would be lost to cancellation.
// finish   computes loss and lse from the state, and dloss/dhidden from the products.
// gradient replaces recomputed logits by dloss/draw, except the teacher's.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

struct VocabArgs {
    DType dtype = DType::kFloat32;   // dtype of the logits; other numbers are float or double
    int64_t rows = 0, hiddens = 1;   // N, k
    int64_t first = 0, columns = 0;  // the chunk: columns [first, first + columns) of V
    int64_t width = 0;               // d
    double softcap = 0;              // 0: no softcap
    double tau = 1;
    const int64_t* labels = nullptr;  // (N,), cross entropy
    int64_t ignore_index = -100;      // rows with this label have loss and gradient 0
    const bool* mask = nullptr;       // (N,), divergence: rows with false have loss and gradient 0
    void* logits = nullptr;           // (k, N, columns) contiguous
    void* state = nullptr;            // (3, k, N): top; sum; z[y], or the cross sum
    void* products = nullptr;         // (k, N, d); nullptr: not wanted
    const void* targets = nullptr;    // (N, d), rows y_n of W; with products of cross entropy
    void* loss = nullptr;             // (N,)
    void* lse = nullptr;              // (k, N)
};

// Items are rows; their split over threads does not change the result.
struct VocabCpu {
    void (*cross_entropy_update)(const VocabArgs&, int64_t begin, int64_t end);
    void (*cross_entropy_finish)(const VocabArgs&, int64_t begin, int64_t end);
    void (*cross_entropy_gradient)(const VocabArgs&, int64_t begin, int64_t end);
    void (*kl_update)(const VocabArgs&, int64_t begin, int64_t end);
    void (*kl_finish)(const VocabArgs&, int64_t begin, int64_t end);
    void (*kl_gradient)(const VocabArgs&, int64_t begin, int64_t end);
};

LaunchStatus launch_cross_entropy_update(const VocabArgs& args, void* stream);
LaunchStatus launch_cross_entropy_finish(const VocabArgs& args, void* stream);
LaunchStatus launch_cross_entropy_gradient(const VocabArgs& args, void* stream);
LaunchStatus launch_kl_update(const VocabArgs& args, void* stream);
LaunchStatus launch_kl_finish(const VocabArgs& args, void* stream);
LaunchStatus launch_kl_gradient(const VocabArgs& args, void* stream);

}  // namespace lora_ext
