// Losses over a vocabulary of V tokens whose logits come in chunks of columns, each computed by a
// library's GEMM, read here, and forgotten.
//
// A hidden state e of row n has the logits z[e, n, v] = softcap(raw[e, n, v]) / tau, where softcap
// is x -> c tanh(x / c), or nothing. With q = softmax(z):
//
//   cross entropy, k = 1      loss[n] = log sum_v exp z[n, v] - z[n, y_n]
//   divergence, teacher k-1   loss[n] = tau^2 mean_{e < k-1} KL(q[k-1, n] || q[e, n])
//
// update   takes one chunk up into the running state of its rows (FlashAttention's online softmax):
//          the largest logit, the sum of exp(z - top), and z[y] or sum_v exp(z_k - top_k) (z_k -
//          z_e). With `products` it leaves the weights exp(z - top) dz/draw in place of the logits,
//          and fades what the products with W have come to: the caller adds weights W to them. Of
//          cross entropy, sum and weights leave the label's own column out: q - 1 would cancel.
// finish   makes loss and lse of the state, and of the products dloss/dhidden.
// gradient turns logits that were computed again into dloss/draw, in place; teachers keep theirs.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

struct VocabArgs {
    DType dtype = DType::kFloat32;   // of the logits; all other numbers are float, or double
    int64_t rows = 0, hiddens = 1;   // N, k
    int64_t first = 0, columns = 0;  // the chunk: columns [first, first + columns) of V
    int64_t width = 0;               // d
    double softcap = 0;              // 0: none
    double tau = 1;
    const int64_t* labels = nullptr;  // (N,), cross entropy
    int64_t ignore_index = -100;      // rows with this label have loss and gradient 0
    const bool* mask = nullptr;       // (N,), divergence: other rows have loss and gradient 0
    void* logits = nullptr;           // (k, N, columns) contiguous
    void* state = nullptr;            // (3, k, N): top; sum; target, or cross
    void* products = nullptr;         // (k, N, d), or none wanted
    const void* targets = nullptr;    // (N, d), rows y_n of W; beside products of cross entropy
    void* loss = nullptr;             // (N,)
    void* lse = nullptr;              // (k, N)
};

// Rows [begin, end); no result depends on how the rows are split.
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
