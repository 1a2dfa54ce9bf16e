// Products with packed weights: checks and allocation. CPU only.
#include "ops/packed_linear.h"

#include <ATen/ops/empty.h>

#include "lora_ext/packed_linear.h"
#include "ops/checks.h"
#include "ops/settings.h"

namespace lora_ext {
namespace {

// Minimum number of bytes of the weight that each thread reads.
constexpr int64_t kSerialBytes = 128 * 1024;

DType packed_dtype(const char* op, const char* name, const Tensor& t) {
    require(t.is_cpu(), op, name, expected("a tensor on the CPU"), found(t.device()));
    const bool wide = t.scalar_type() == at::kFloat;
    require(wide || t.scalar_type() == at::kBFloat16, op, name, expected("float32 or bfloat16"),
            found(t.scalar_type()));
    return wide ? DType::kFloat32 : DType::kBFloat16;
}

// With odd I the bfloat16 shape has one axis fewer, which distinguishes it from the shape for I +
// 1.
at::DimVector packed_sizes(const PackedLinearArgs& args) {
    const int64_t panels = ceil_div(args.out_features, kPanel), steps = panel_steps(args);
    if (args.dtype == DType::kFloat32) return {panels, steps, kPanel};
    if (args.in_features % 2) return {panels, steps, 2 * kPanel};
    return {panels, steps, kPanel, 2};
}

void for_panels(const PackedLinearArgs& args,
                void (*twin)(const PackedLinearArgs&, int64_t, int64_t)) {
    for_items(ceil_div(args.out_features, kPanel), panel_steps(args) * kPanel * 4, kSerialBytes,
              [&](int64_t begin, int64_t end) { twin(args, begin, end); });
}

}  // namespace

Tensor pack_weight(const Tensor& weight) {
    const char* op = "pack_weight";
    PackedLinearArgs args;
    args.dtype = packed_dtype(op, "weight", weight);
    check_dim(op, "weight", weight, 2, "(O, I)");
    args.out_features = weight.size(0);
    args.in_features = weight.size(1);
    Tensor packed = at::empty(packed_sizes(args), weight.options());
    if (packed.numel() == 0) return packed;
    const Tensor rows = rows_contiguous(weight);
    args.weight = rows.const_data_ptr();
    args.weight_stride = rows.stride(0);
    args.packed = packed.mutable_data_ptr();
    for_panels(args, chosen_twins<PackedLinearCpu>().pack);
    return packed;
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                     int64_t out_features) {
    const char* op = "packed_linear";
    PackedLinearArgs args;
    args.dtype = packed_dtype(op, "x", x);
    check_dim(op, "x", x, 2, "(T, I)");
    require(out_features >= 0, op, "out_features", expected("at least 0"), found(out_features));
    args.rows = x.size(0);
    args.in_features = x.size(1);
    args.out_features = out_features;
    check_like(op, "packed", packed, x, "x");
    require(packed.sizes() == packed_sizes(args), op, "packed",
            expected("pack_weight() of a weight (", out_features, ", ", args.in_features,
                     "), shape ", at::IntArrayRef(packed_sizes(args))),
            found(packed.sizes()));
    require(packed.is_contiguous(), op, "packed", expected("a contiguous tensor"),
            found("strides ", packed.strides()));
    Tensor dense;
    if (bias) {
        check_like(op, "bias", *bias, x, "x");
        check_shape(op, "bias", *bias, "(O,)", {out_features}, x.device());
        dense = bias->contiguous();
        args.bias = dense.const_data_ptr();
    }
    Tensor y = at::empty({args.rows, out_features}, x.options());
    if (y.numel() == 0) return y;
    const Tensor rows = rows_contiguous(x);
    args.x = rows.const_data_ptr();
    args.x_stride = rows.stride(0);
    args.packed = const_cast<void*>(packed.const_data_ptr());
    args.y = y.mutable_data_ptr();
    for_panels(args, chosen_twins<PackedLinearCpu>().product);
    return y;
}

}  // namespace lora_ext
