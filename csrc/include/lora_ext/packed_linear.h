// Products of few rows with a weight that is laid out for them: y[t] = W x[t] + bias, on the CPU.
//
// Such a product is bound by the bytes of W, which it reads once. W (O, I) is kept in panels of
// kPanel outputs, one after the other: (ceil(O / kPanel), I, kPanel) in float32; in bfloat16 two
// in-features stand together, (ceil(O / kPanel), ceil(I / 2), kPanel, 2), the last two axes as one
// where I is odd. What is beyond O or I is zero. The layout is that of every instruction set.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

constexpr int64_t kPanel = 32;

struct PackedLinearArgs {
    DType dtype = DType::kFloat32;  // or kBFloat16: of everything here
    int64_t rows = 0, in_features = 0, out_features = 0;
    const void* x = nullptr;       // (T, I)
    int64_t x_stride = 0;          // elements between rows
    const void* bias = nullptr;    // (O,), or nullptr
    void* y = nullptr;             // (T, O)
    const void* weight = nullptr;  // (O, I), of pack
    int64_t weight_stride = 0;     // elements between rows
    void* packed = nullptr;        // written by pack, read by product
};

// Steps that a panel takes along I, kPanel x 4 bytes each.
constexpr int64_t panel_steps(const PackedLinearArgs& args) {
    return args.dtype == DType::kFloat32 ? args.in_features : ceil_div(args.in_features, 2);
}

// CPU twins. Items are panels; no bit depends on how they are split. A row's bits depend on that
// row, W and bias alone: each element starts at the bias and takes up its products in ascending
// order, in float32, and is rounded once.
struct PackedLinearCpu {
    void (*pack)(const PackedLinearArgs&, int64_t begin, int64_t end);
    void (*product)(const PackedLinearArgs&, int64_t begin, int64_t end);
};

}  // namespace lora_ext
