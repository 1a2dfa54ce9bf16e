// Products of few rows with a packed weight of 8 or 4 bits: y[t] = W x[t] + bias.
//
// W (O, I) is stored in blocks of kPanel outputs x `group` in-features, (ceil(O / kPanel),
// I / group, block_bytes). A block contains codes in steps of kPanel x 4 bytes, then kPanel scales
// and, with `minimum`, kPanel minima, all float16. Four bytes of a step belong to one output:
//   8 bits: byte f is the code q of in-feature f of the step's 4, W = scale q, -127 <= q <= 127;
//   4 bits: the low half of byte f is the code of in-feature f of the step's 8, the high half that
//   of in-feature 4 + f. W = scale (q - 8), or scale q + minimum, 0 <= q <= 15.
// Rows beyond O are zero codes with zero scales. All instruction sets and CUDA use this layout. In
// a tensor, a block of 4 bits has two axes, (2, block_bytes / 2). The codes of GGUF's blocks Q8_0,
// Q4_0 and Q4_1 can be stored without a change.
#pragma once

#include "lora_ext/common.h"
#include "lora_ext/packed_linear.h"

namespace lora_ext {

struct PackedBitsArgs {
    // dtype of bias, y and weight: kFloat32, kBFloat16 or, in kernels, kFloat16
    DType dtype = DType::kFloat32;
    int64_t rows = 0, in_features = 0, out_features = 0;
    int64_t bits = 8, group = 64;
    bool minimum = false;
    int digits = 0;              // bytes per element of codes; 0 if products read x
    const float* x = nullptr;    // (T, I), widened to float32, for twins
    int64_t x_stride = 0;        // elements between rows of x or input
    const void* bias = nullptr;  // (O,), or nullptr
    void* y = nullptr;           // (T, O)
    void* weight = nullptr;      // (O, I): read by pack, written by unpack (twin: as float32)
    int64_t weight_stride = 0;   // elements between rows
    uint8_t* packed = nullptr;   // written by pack, read by product and unpack
    float* sums = nullptr;       // (T, I / group) sums of x, written by prepare; or nullptr
    uint8_t* codes = nullptr;    // (T, I / group, digits, group) x as integers, written by prepare
    float* x_scales = nullptr;   // (T, I / group) units of these integers
    const void* input =
        nullptr;             // (T, I) of the dtype above, rows aligned to 16 bytes: x for kernels
    float* parts = nullptr;  // workspace of launch_packed_linear
};

LX_HOST_DEVICE constexpr int64_t code_bytes(const PackedBitsArgs& args) {
    return kPanel * args.group * args.bits / 8;
}
LX_HOST_DEVICE constexpr int64_t block_bytes(const PackedBitsArgs& args) {
    return code_bytes(args) + kPanel * (args.minimum ? 4 : 2);
}

// CPU twins. Items of prepare are rows, items of the others are panels; their split over threads
// does not change the result. The bits of a row depend only on that row, W and bias. An element
// starts at the bias. For each group in order, it adds scale times the sum of the products with the
// codes (those of 4 bits are centred: q - 8), and then (minimum + 8 scale) times the sum of the
// group's inputs.
//
// Without digits, the sum of a group is a float32 sum in ascending order. With digits, inputs are
// integers times a unit, so their sum is exact, and is rounded to float32. With one digit, a row
// has one unit, 1 / 127 of its largest magnitude. With three, a group has one: a power of two, at
// most 2^-22 of its largest magnitude, or 2^-126. Digits are base 256, the least significant one
// first, and 128 is added to the last one. A row that is not finite gives NaN.
struct PackedBitsCpu {
    void (*pack)(const PackedBitsArgs&, int64_t begin, int64_t end);
    void (*unpack)(const PackedBitsArgs&, int64_t begin, int64_t end);
    void (*prepare)(const PackedBitsArgs&, int64_t begin, int64_t end);
    void (*product)(const PackedBitsArgs&, int64_t begin, int64_t end);
    int float_digits;  // digits with which product computes float inputs, 0 or 3
};

// CUDA. Codes, scales and minima have the same bits as the twins'. A product takes at most
// kMostKernelRows rows; the bits of a row depend only on that row, W and bias. In-features are
// processed in chunks of 32. Tensor cores add the products of a chunk with the codes in float32, to
// a sum that starts at 0, and the sum is multiplied by the scale. Chunk c belongs to slice c % 16.
// A slice adds its chunks in order, and the terms of the minimum as the twins do. A part is the sum
// of four slices in order, and an element starts at the bias and adds its four parts in order.
constexpr int64_t kMostKernelRows = 64;
LaunchStatus launch_pack_weight(const PackedBitsArgs& args, void* stream);
LaunchStatus launch_unpack_weight(const PackedBitsArgs& args, void* stream);
// Return the bytes of args.parts; may be 0.
int64_t packed_linear_workspace_bytes(const PackedBitsArgs& args);
LaunchStatus launch_packed_linear(const PackedBitsArgs& args, void* stream);

}  // namespace lora_ext
