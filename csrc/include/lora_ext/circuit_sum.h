// Sum layers of probabilistic circuits in log space, and their max-product form.
//
//   out[g, b, o] = log sum_i W[g, b, o, i] exp(l[g, b, i])
//
// Letters: G groups, B rows, O sums, I terms. W is given as logits, log-weights or weights:
//   logits    W = softmax(w) over i
//   log       W = exp(w)
//   probs     W = w
// The stride of w over rows selects the regime. Zero: the rows share the weights, and the sum is a
// product of matrices,
//   W[o, i] = weight[o, i] exp(weight_shift[o]),   weight with row maximum 1
//   exp(l[b, i]) = value[b, i] exp(value_shift[b]), value with row maximum 1
//   s = value weight^T,   out = log s + weight_shift + value_shift
// On CUDA a library's GEMM computes the product s, or one fused kernel computes everything.
// Nonzero: each row has its own matrix, and each weight is read once.
//
// -inf is legal in l and in w. A row without possible terms has shift -inf and scaled entries 0,
// and out is -inf. A product that underflows although both rows have possible terms (s < 2^-80;
// double: 2^-900) is rescued: the terms w + l are summed again, shifted by their own maximum.
//
// Backward, from g = dout, with the terms' shares t_i = W_i exp(l_i - out), which sum to 1:
//   dl[b, i]    = sum_o g t_i
//   dlog W[o, i] = sum_b g t_i;   logits: minus softmax(w) sum_b g;   probs: divided by w
// With shared weights, g t_i = ratio weight value, where ratio = g / s, so the two sums are matrix
// products as well. If out is -inf, all gradients are 0. If s was rescued, ratio is 0 and the
// shares are added one by one.
//
// Source: expected flows, Darwiche 2003; the log-einsum-exp trick, Peharz et al. 2020.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

enum class WeightNorm : int32_t { kLogits, kLog, kProbs };

// In the comments below, float means double if the weights are float64. The last axis is always
// contiguous; a tensor without stride fields is contiguous.
struct LogSumArgs {
    DType dtype = DType::kFloat32;  // dtype of w and dw
    WeightNorm norm = WeightNorm::kLogits;
    int64_t groups = 0, rows = 0, sums = 0, terms = 0;
    const void* w = nullptr;
    int64_t w_group = 0, w_row = 0, w_sum = 0;  // strides
    const void* values = nullptr;               // float l
    int64_t values_group = 0, values_row = 0;
    void* out = nullptr;         // (G, B, O) float; shared: s on input, the result on output
    int32_t* indices = nullptr;  // (G, B, O), for the max-product form
    // Shared regime, float.
    bool scaled = false;           // true if weight and weight_shift are given
    void* weight = nullptr;        // (G, O, I)
    void* weight_shift = nullptr;  // (G, O)
    void* value = nullptr;         // (G, B, I); scratch in the per-row regime
    void* value_shift = nullptr;   // (G, B)
    void* ratio = nullptr;         // (G, B, O)
    // Backward.
    const void* dout = nullptr;  // (G, B, O) float
    void* dvalues = nullptr;     // (G, B, I) float; shared weights on CUDA: ratio weight on input
    // (G, O, I) float, overwritten. Shared weights, CUDA: ratio^T value on input. CPU: may be dw.
    void* flow = nullptr;
    void* dw = nullptr;  // layout of w, contiguous, dtype of w
};

// CPU twins: one table per instruction set, from isa.h. csrc/ops splits [0, items) over threads,
// and the split does not change the result.
struct LogSumCpu {
    const char* isa;
    // Shared regime. Items: (g, o) for weights and dweights, (g, b) for the other functions except
    // forward.
    void (*weights)(const LogSumArgs&, int64_t begin, int64_t end);  // w -> weight, weight_shift
    void (*values)(const LogSumArgs&, int64_t begin, int64_t end);   // l -> value, value_shift
    // value and w, or value and scaled weights -> out; with w also writes the scaled weights.
    int64_t (*forward_items)(const LogSumArgs&);
    void (*forward)(const LogSumArgs&, int64_t begin, int64_t end);
    void (*ratios)(const LogSumArgs&, int64_t begin, int64_t end);  // dout, out -> ratio
    void (*dvalues)(const LogSumArgs&, int64_t begin, int64_t end);
    void (*dweights)(const LogSumArgs&, int64_t begin, int64_t end);
    // One matrix per row; items are (g, b). Both use `value` as scratch, and the backward also
    // `weight`, each (G, B, I).
    void (*per_row)(const LogSumArgs&, int64_t begin, int64_t end);
    void (*per_row_backward)(const LogSumArgs&, int64_t begin, int64_t end);
    // Writes the maximum over i of log W + l to `out` and the lowest i that attains it to `indices`
    // (0 if the maximum is -inf). Items are (g, o) with shared weights, else (g, b).
    void (*max)(const LogSumArgs&, int64_t begin, int64_t end);
};

// CUDA launchers of the same steps: asynchronous, on `stream`, no allocation, no float64.
LaunchStatus launch_log_sum_weights(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_values(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_finish(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_ratios(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_dvalues(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_dweights(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_per_row(const LogSumArgs& args, void* stream);
LaunchStatus launch_log_sum_per_row_backward(const LogSumArgs& args, void* stream);
// Scales the values, multiplies them by the weights, and converts s to out in one kernel, on tensor
// cores. `high`: splits operands into bfloat16 parts instead of using scaled float16.
bool log_sum_fused_fits(const LogSumArgs& args);
LaunchStatus launch_log_sum_fused(const LogSumArgs& args, bool high, void* stream);
LaunchStatus launch_log_max(const LogSumArgs& args, void* stream);

}  // namespace lora_ext
