// Weighted mix of the normalised hidden states of several depths, with weights per row.
//
//   n_e   = gamma_e (h_e - m_e) r_e + beta_e      r_e = 1 / sqrt(mean((h_e - m_e)^2) + eps)
//   mixed = sum_e w_e n_e
//
// per row, e = 0 .. k-1; m_e is the mean of h_e ("layer") or 0 ("rms"). With a router the weights
// are computed here, from the last hidden state: w = softmax(R n_{k-1} + c).
//
// Backward, from g = dmixed, with x_e = (h_e - m_e) r_e and G_e the gradient of n_e:
//   G_e      = w_e g;  routed, e = k-1: plus sum_i dl_i R_i
//   dw_e     = sum_j g n_e
//   dl_e     = w_e (dw_e - sum_i w_i dw_i)        dw includes the incoming gradient of the weights
//   dh_e     = r_e (G_e gamma_e - x_e mean(G_e gamma_e x_e) - ["layer"] mean(G_e gamma_e))
//   dgamma_e = sum_rows G_e x_e     dbeta_e = sum_rows G_e
//   dR_e     = sum_rows dl_e n_{k-1}     dc_e = sum_rows dl_e
// The sums over rows (dgamma, dbeta, dR, dc) have two stages: over the rows of each part of the
// batch, ascending, then over the parts. The size of a part depends only on the number of rows, so
// the number of threads does not change the result.
//
// Source: mixture-of-depths ensembles (arXiv 2410.13077), mixed before the head.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

constexpr int64_t kMaxDepths = 8;

// Below, float means double for float64. Rows of each h_e are strided; all else is contiguous.
struct DepthMixArgs {
    DType dtype = DType::kFloat32;  // dtype of h_e, mixed, dmixed, dh_e
    bool wide_scales = false;       // gamma_e and beta_e are float, required by twins; else `dtype`
    bool layer = false;             // "layer" norm, else "rms"
    int64_t rows = 0, width = 0;    // shape of every h_e
    int32_t depths = 0;             // k
    double eps = 0;
    const void* hidden[kMaxDepths] = {};
    int64_t hidden_stride[kMaxDepths] = {};  // elements between rows
    const void* gamma[kMaxDepths] = {};      // (d,)
    const void* beta[kMaxDepths] = {};       // (d,), or all nullptr
    const void* router = nullptr;            // (k, d) float, or nullptr
    const void* bias = nullptr;              // (k,) float, with a router
    void* weights = nullptr;                 // (N, k) float; the forward writes them with a router
    void* rinv = nullptr;                    // (N, k) float
    void* mean = nullptr;                    // (N, k) float, for "layer"
    void* mixed = nullptr;                   // (N, d)
    // Backward.
    const void* dmixed = nullptr;       // (N, d)
    const void* dweights_in = nullptr;  // (N, k) float, with a router; nullptr: zero
    void* dweights = nullptr;        // (N, k) float; with a router the gradients dl of its logits
    void* dhidden[kMaxDepths] = {};  // (N, d), or all nullptr
    void* partial = nullptr;         // (parts, mix_sums()) float
    void* sums = nullptr;            // (mix_sums(),) float: dgamma (k, d); with betas dbeta (k, d);
                                     // with a router dR (k, d) and dc (k,)
};

// Return the number of rows that one part of the sums over rows contains.
LX_HOST_DEVICE constexpr int64_t mix_part_rows(int64_t rows) {
    return rows <= 16 * 256 ? 16 : (rows + 255) / 256;
}
LX_HOST_DEVICE constexpr int64_t mix_parts(int64_t rows) {
    return (rows + mix_part_rows(rows) - 1) / mix_part_rows(rows);
}
// Layout of `sums`: offset of each gradient, and the total size.
LX_HOST_DEVICE inline int64_t mix_betas_at(const DepthMixArgs& args) {
    return args.depths * args.width;
}
LX_HOST_DEVICE inline int64_t mix_router_at(const DepthMixArgs& args) {
    return mix_betas_at(args) * (args.beta[0] ? 2 : 1);
}
LX_HOST_DEVICE inline int64_t mix_bias_at(const DepthMixArgs& args) {
    return mix_router_at(args) + mix_betas_at(args);
}
LX_HOST_DEVICE inline int64_t mix_sums(const DepthMixArgs& args) {
    return args.router ? mix_bias_at(args) + args.depths : mix_router_at(args);
}

// CPU twins. The split of items over threads does not change the result.
struct DepthMixCpu {
    void (*forward)(const DepthMixArgs&, int64_t begin, int64_t end);  // items: rows
    // Items are parts. `scratch` has backward_scratch() bytes per thread.
    void (*backward)(const DepthMixArgs&, void* scratch, int64_t begin, int64_t end);
    int64_t (*backward_scratch)(const DepthMixArgs&);
    void (*sums)(const DepthMixArgs&, int64_t begin, int64_t end);  // items: elements of `sums`
};

// CUDA launchers: asynchronous, on `stream`, no allocation, no float64; one call per backward.
LaunchStatus launch_depth_mix(const DepthMixArgs& args, void* stream);
LaunchStatus launch_depth_mix_backward(const DepthMixArgs& args, void* stream);

}  // namespace lora_ext
