// Functions of one number, y[i] = f(x[i]), on the CPU.
//
// The bits of y[i] depend only on x[i]. torch's bits also depend on position and threads: it uses
// one approximation for the whole vectors of a thread's range and another for the rest.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

enum class Pointwise : int32_t {
    kCos,  // cos and sin: arguments up to 2^24 in magnitude, NaN above
    kSin,
    kGelu,      // x Phi(x), Phi the standard normal distribution function
    kGeluTanh,  // x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
    kRsqrt,     // 1 / sqrt(x)
    kSigmoid,   // 1 / (1 + exp(-x))
    kSilu,      // x / (1 + exp(-x))
    kSoftplus,  // log(1 + exp(x))
    kTanh,
};
inline constexpr const char* kPointwiseNames[] = {
    "cos", "sin", "gelu", "gelu_tanh", "rsqrt", "sigmoid", "silu", "softplus", "tanh"};

struct PointwiseArgs {
    DType dtype = DType::kFloat32;  // dtype of x and y: kFloat32 or kBFloat16
    Pointwise function = Pointwise::kCos;
    const void* x = nullptr;
    void* y = nullptr;  // may be the memory of x
};

// CPU twin. Items are numbers; the split into ranges does not change any bit.
struct PointwiseCpu {
    void (*apply)(const PointwiseArgs&, int64_t begin, int64_t end);
};

}  // namespace lora_ext
