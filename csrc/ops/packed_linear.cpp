// Products with packed weights: checks, allocation, choice of CPU twin or CUDA kernel. Weights that
// are not rounded are packed only on the CPU.
#include "ops/packed_linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <c10/core/GradMode.h>
#include <c10/util/accumulate.h>

#include "lora_ext/packed_bits.h"
#include "lora_ext/packed_linear.h"
#include "ops/checks.h"
#include "ops/lora.h"
#include "ops/lora_args.h"
#include "ops/settings.h"
#include "ops/stream.h"

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

// ------------------------------------------------------------------------------------------------
// Weights of 8 and 4 bits

// Largest magnitude of a weight, so that scales and minima are finite in float16.
constexpr double kMaxWeight = 65504;

// With 4 bits the bytes of a block are on two axes, since a block of 8 bits with half the group has
// as many bytes.
at::DimVector block_sizes(const PackedBitsArgs& args) {
    const int64_t panels = ceil_div(args.out_features, kPanel);
    const int64_t groups = args.in_features / args.group, bytes = block_bytes(args);
    if (args.bits == 4) return {panels, groups, 2, bytes / 2};
    return {panels, groups, bytes};
}

// Runs a twin on all panels; `times` is its time divided by the time that reading the weight takes.
void for_blocks(const PackedBitsArgs& args, void (*twin)(const PackedBitsArgs&, int64_t, int64_t),
                int64_t times = 1) {
    for_items(ceil_div(args.out_features, kPanel),
              args.in_features / args.group * block_bytes(args) * times, kSerialBytes,
              [&](int64_t begin, int64_t end) { twin(args, begin, end); });
}

// Returns the dtype of a weight before it is rounded to 8 or 4 bits, or after it is unpacked, and
// checks its device.
DType bits_dtype(const char* op, const char* name, const Tensor& t) {
    return launches_kernels(t) ? dtype_of(op, name, t) : packed_dtype(op, name, t);
}

// Sets the layout of `packed`, which has the shape of a weight (out_features, in_features). The
// group follows from the number of blocks, and bits and minimum from the size of a block.
void read_layout(const char* op, const Tensor& packed, PackedBitsArgs& args) {
    require(packed.is_cpu() || packed.is_cuda(), op, "packed", expected("a tensor on CPU or CUDA"),
            found(packed.device()));
    require(packed.scalar_type() == at::kByte, op, "packed",
            expected("pack_weight() with bits=8 or 4, a uint8 tensor"),
            found(packed.scalar_type()));
    bool known = false;
    const int64_t groups = packed.dim() > 1 ? packed.size(1) : 0;
    for (const int64_t group : {32, 64, 128})
        for (const auto& [bits, minimum] : {std::pair{8, false}, {4, false}, {4, true}}) {
            PackedBitsArgs each = args;
            each.group = group;
            each.bits = bits;
            each.minimum = minimum;
            if (known || groups * group != args.in_features || packed.sizes() != block_sizes(each))
                continue;
            args = each;
            known = true;
        }
    require(known, op, "packed",
            expected("pack_weight() of a weight (", args.out_features, ", ", args.in_features,
                     ") with bits=8 or 4"),
            found(packed.sizes()));
    require(packed.is_contiguous(), op, "packed", expected("a contiguous tensor"),
            found("strides ", packed.strides()));
    args.packed = const_cast<uint8_t*>(packed.const_data_ptr<uint8_t>());
}

Tensor pack_bits(const Tensor& weight, int64_t bits, int64_t group, bool minimum) {
    const char* op = "pack_weight";
    PackedBitsArgs args;
    args.dtype = bits_dtype(op, "weight", weight);
    check_dim(op, "weight", weight, 2, "(O, I)");
    require(bits == 8 || bits == 4, op, "bits", expected("None, 8 or 4"), found(bits));
    require(group == 32 || group == 64 || group == 128, op, "group", expected("32, 64 or 128"),
            found(group));
    require(!minimum || bits == 4, op, "minimum", expected("False if bits is 8"), found("True"));
    args.out_features = weight.size(0);
    args.in_features = weight.size(1);
    require(args.in_features % group == 0, op, "group",
            expected("a divisor of the ", args.in_features, " in-features of weight"),
            found(group));
    args.bits = bits;
    args.group = group;
    args.minimum = minimum;
    Tensor packed = at::empty(block_sizes(args), weight.options().dtype(at::kByte));
    if (packed.numel() == 0) return packed;
    const auto [low, high] = at::aminmax(weight);
    const double least = low.item<double>(), most = high.item<double>();
    require(least >= -kMaxWeight && most <= kMaxWeight, op, "weight",
            expected("finite values of at most 65504"), found("values from ", least, " to ", most));
    const Tensor rows = rows_contiguous(weight);
    args.weight = const_cast<void*>(rows.const_data_ptr());
    args.weight_stride = rows.stride(0);
    args.packed = packed.mutable_data_ptr<uint8_t>();
    if (launches_kernels(weight)) {
        const c10::DeviceGuard guard(weight.device());
        check_launch(op, launch_pack_weight(args, current_stream(weight)));
    } else {
        for_blocks(args, chosen_twins<PackedBitsCpu>().pack);
    }
    return packed;
}

// Sets sizes and bias of a product. Returns the bias, which must outlive `args`.
template <class Args>
Tensor set_operands(const char* op, Args& args, const Tensor& x, const OptionalTensor& bias,
                    int64_t out_features) {
    check_dim(op, "x", x, 2, "(T, I)");
    require(out_features >= 0, op, "out_features", expected("at least 0"), found(out_features));
    args.rows = x.size(0);
    args.in_features = x.size(1);
    args.out_features = out_features;
    if (!bias) return {};
    check_like(op, "bias", *bias, x, "x");
    check_shape(op, "bias", *bias, "(O,)", {out_features}, x.device());
    const Tensor dense = bias->contiguous();
    args.bias = dense.const_data_ptr();
    return dense;
}

void launch_product(const char* op, PackedBitsArgs& args, const Tensor& x, const Tensor& packed,
                    Tensor& y) {
    // The kernel reads rows in pieces of 16 bytes, and has 32 bits for the bytes of all rows.
    const int64_t size = x.element_size(), apart = args.rows > 1 ? x.stride(0) : args.in_features;
    const bool fits = x.stride(1) == 1 && apart <= INT32_MAX / 64 / size &&
                      apart * size % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    const Tensor rows = fits ? x : at::empty(x.sizes(), x.options()).copy_(x);
    args.input = rows.const_data_ptr();
    args.x_stride = fits ? apart : args.in_features;
    // The kernel loads 16 bytes at once. Only views may start at other addresses.
    const bool aligned = reinterpret_cast<uintptr_t>(args.packed) % 16 == 0;
    const Tensor codes = aligned ? packed : packed.clone();
    args.packed = const_cast<uint8_t*>(codes.const_data_ptr<uint8_t>());
    args.y = y.mutable_data_ptr();
    const c10::DeviceGuard guard(x.device());
    Tensor parts;
    if (const int64_t bytes = packed_linear_workspace_bytes(args); bytes > 0) {
        parts = at::empty({bytes / 4}, x.options().dtype(at::kFloat));
        args.parts = parts.mutable_data_ptr<float>();
    }
    check_launch(op, launch_packed_linear(args, current_stream(x)));
}

Tensor product_of_bits(const char* op, const Tensor& x, const Tensor& packed,
                       const OptionalTensor& bias, int64_t out_features, bool int8) {
    PackedBitsArgs args;
    // Only a CPU twin supports rows rounded to 8 bits; the emulated build runs it, too.
    const bool kernel = launches_kernels(x) && !(int8 && x.is_cpu());
    require(!kernel || !int8, op, "int8", expected("False on CUDA"), found("True"));
    args.dtype = kernel ? dtype_of(op, "x", x) : packed_dtype(op, "x", x);
    const Tensor dense = set_operands(op, args, x, bias, out_features);
    check_device(op, "packed", packed, x.device());
    read_layout(op, packed, args);
    require(!kernel || args.rows <= kMostKernelRows, op, "x",
            expected("at most ", kMostKernelRows,
                     " rows on CUDA; multiply more by "
                     "unpack_weight() with torch, or use the layers of torchao or bitsandbytes"),
            found(args.rows));
    Tensor y = at::empty({args.rows, out_features}, x.options());
    if (y.numel() == 0) return y;
    if (kernel) {
        launch_product(op, args, x, packed, y);
        return y;
    }
    const Tensor wide = rows_contiguous(x.to(at::kFloat));
    args.x = wide.const_data_ptr<float>();
    args.x_stride = wide.stride(0);
    args.y = y.mutable_data_ptr();
    const PackedBitsCpu& twins = chosen_twins<PackedBitsCpu>();
    Tensor sums, codes, scales;
    const int64_t groups = args.in_features / args.group;
    if (args.minimum) {
        sums = at::empty({args.rows, groups}, wide.options());
        args.sums = sums.mutable_data_ptr<float>();
    }
    args.digits = int8 ? 1 : twins.float_digits;
    if (args.digits > 0) {
        codes = at::empty({args.rows, args.digits * args.in_features}, packed.options());
        scales = at::empty({args.rows, groups}, wide.options());
        args.codes = codes.mutable_data_ptr<uint8_t>();
        args.x_scales = scales.mutable_data_ptr<float>();
    }
    if (args.sums || args.digits > 0)
        for_items(args.rows, args.in_features * 4, kSerialBytes,
                  [&](int64_t begin, int64_t end) { twins.prepare(args, begin, end); });
    // Widening and multiplying codes takes longer than reading them, from about 4 rows on.
    for_blocks(args, twins.product, 1 + 2 * args.rows / args.bits);
    return y;
}

Tensor product(const char* op, const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
               int64_t out_features, bool int8) {
    if (packed.scalar_type() == at::kByte)
        return product_of_bits(op, x, packed, bias, out_features, int8);
    PackedLinearArgs args;
    args.dtype = packed_dtype(op, "x", x);
    const Tensor dense = set_operands(op, args, x, bias, out_features);
    require(!int8, op, "int8", expected("False for a weight that has no codes"), found("True"));
    check_like(op, "packed", packed, x, "x");
    require(packed.sizes() == packed_sizes(args), op, "packed",
            expected("pack_weight() of a weight (", out_features, ", ", args.in_features,
                     "), shape ", at::IntArrayRef(packed_sizes(args))),
            found(packed.sizes()));
    require(packed.is_contiguous(), op, "packed", expected("a contiguous tensor"),
            found("strides ", packed.strides()));
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

// Returns whether n values with a stride equal `copy`. It reads all values, since a branch for each
// would not let the loads overlap.
template <class T>
bool same_values(const T* values, int64_t stride, const T* copy, int64_t n) {
    T different = 0;
    for (int64_t i = 0; i < n; ++i) different |= values[i * stride] ^ copy[i];
    return different == 0;
}

}  // namespace

Tensor pack_weight(const Tensor& weight, std::optional<int64_t> bits, int64_t group, bool minimum) {
    const char* op = "pack_weight";
    if (bits) return pack_bits(weight, *bits, group, minimum);
    require(!minimum, op, "minimum", expected("False if bits is None"), found("True"));
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

Tensor unpack_weight(const Tensor& packed, int64_t out_features, int64_t in_features,
                     std::optional<at::ScalarType> dtype) {
    const char* op = "unpack_weight";
    require(out_features >= 0, op, "out_features", expected("at least 0"), found(out_features));
    require(in_features >= 0, op, "in_features", expected("at least 0"), found(in_features));
    PackedBitsArgs args;
    args.out_features = out_features;
    args.in_features = in_features;
    read_layout(op, packed, args);
    const bool kernel = launches_kernels(packed);
    const at::ScalarType wanted = dtype.value_or(at::kFloat), made = kernel ? wanted : at::kFloat;
    Tensor weight = at::empty({out_features, in_features}, packed.options().dtype(made));
    args.dtype = bits_dtype(op, "dtype", weight);
    args.weight = weight.mutable_data_ptr();
    if (weight.numel() == 0) return weight.to(wanted);
    if (kernel) {
        const c10::DeviceGuard guard(packed.device());
        check_launch(op, launch_unpack_weight(args, current_stream(packed)));
    } else {
        for_blocks(args, chosen_twins<PackedBitsCpu>().unpack);
    }
    return weight.to(wanted);
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                     int64_t out_features, bool int8) {
    return product("packed_linear", x, packed, bias, out_features, int8);
}

Tensor packed_lora_linear(const Tensor& x_in, const Tensor& packed, const OptionalTensor& bias,
                          int64_t out_features, bool int8, const Tensor& a, const Tensor& b,
                          const Tensor& adapter_ids, const OptionalTensor& scale,
                          const OptionalTensor& ranks, const OptionalTensor& page_table,
                          const OptionalTensor& plan, const OptionalTensor& weights,
                          const OptionalTensor& groups) {
    constexpr auto op = "packed_lora_linear";
    check_inference(op, {&x_in, &a, &b});
    require(x_in.dim() > 0, op, "x", expected("shape (..., I)"), found(x_in.sizes()));
    const at::AutoDispatchBelowADInplaceOrView no_views_are_recorded;
    at::DimVector sizes(x_in.sizes());
    const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
    const Tensor x = sizes.size() == 2 ? x_in : x_in.reshape({rows, sizes.back()});  // (T, I)
    Tensor y = product(op, x, packed, bias, out_features, int8);                     // (T, O)
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan, weights, groups);
    sizes.back() = out_features;
    y.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);  // A view would not be a new tensor.
    return y;
}

bool is_plain_product(const Tensor& x, const OptionalTensor& matrix, const OptionalTensor& bias,
                      int64_t out_features) {
    using c10::DispatchKey;
    if (!matrix || (!x.is_cpu() && !x.is_cuda()) || x.layout() != c10::kStrided) return false;
    const Tensor& weight = *matrix;
    if (weight.dim() != 2 || weight.size(0) != out_features) return false;
    if (x.scalar_type() != weight.scalar_type() || x.device() != weight.device()) return false;
    if (x.dim() == 0 || x.numel() == 0 || x.size(-1) != weight.size(-1)) return false;
    const bool requires_grad =
        x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad());
    if (requires_grad && c10::GradMode::is_enabled()) return false;
    const auto keys = c10::impl::tls_local_dispatch_key_set();
    const auto autocast = x.is_cuda() ? DispatchKey::AutocastCUDA : DispatchKey::AutocastCPU;
    constexpr c10::DispatchKeySet watching{DispatchKey::Tracer,
                                           DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           DispatchKey::FuncTorchDynamicLayerBackMode};
    return keys.excluded_.has(autocast) && !keys.included_.has_any(watching);
}

bool same_bits(const Tensor& t, const Tensor& copy) {
    const bool whole = t.is_contiguous();
    if (!(whole || t.dim() == 1) || t.sizes() != copy.sizes() || !copy.is_contiguous())
        return at::equal(t, copy);
    const int64_t stride = whole ? 1 : t.stride(0), n = t.numel();
    if (t.scalar_type() == at::kInt)
        return same_values(t.const_data_ptr<int32_t>(), stride, copy.const_data_ptr<int32_t>(), n);
    return same_values(t.const_data_ptr<int16_t>(), stride, copy.const_data_ptr<int16_t>(), n);
}

}  // namespace lora_ext
