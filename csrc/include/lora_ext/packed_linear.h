// Products of few rows with a prepacked weight on the CPU: y[t] = W x[t] + bias.
//
// Such a product is bound by the bytes of W, which are read once. W (O, I) is stored in consecutive
// panels of kPanel outputs: (ceil(O / kPanel), I, kPanel) in float32. In bfloat16 two in-features
// are adjacent, (ceil(O / kPanel), ceil(I / 2), kPanel, 2); if I is odd, the last two axes are
// merged. Entries beyond O or I are zero. All instruction sets use this layout.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

constexpr int64_t kPanel = 32;

struct PackedLinearArgs {
    DType dtype = DType::kFloat32;  // dtype of all tensors: kFloat32 or kBFloat16
    int64_t rows = 0, in_features = 0, out_features = 0;
    const void* x = nullptr;       // (T, I)
    int64_t x_stride = 0;          // elements between rows
    const void* bias = nullptr;    // (O,), or nullptr
    void* y = nullptr;             // (T, O)
    const void* weight = nullptr;  // (O, I), input of pack
    int64_t weight_stride = 0;     // elements between rows
    void* packed = nullptr;        // written by pack, read by product
};

// Return the number of steps of a panel along I, kPanel x 4 bytes each.
constexpr int64_t panel_steps(const PackedLinearArgs& args) {
    return args.dtype == DType::kFloat32 ? args.in_features : ceil_div(args.in_features, 2);
}

// CPU twins. Items are panels; their split over threads does not change the result. The bits of a
// row depend only on that row, W and bias: each element starts at the bias, adds its products in
// ascending order of in-features, in float32, and is rounded once. With AMX, the products of 32
// in-features are summed first, those of even and of odd in-features separately; the total of these
// two sums is then added to the element.
struct PackedLinearCpu {
    void (*pack)(const PackedLinearArgs&, int64_t begin, int64_t end);
    void (*product)(const PackedLinearArgs&, int64_t begin, int64_t end);
};

}  // namespace lora_ext
