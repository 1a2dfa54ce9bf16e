#include "ops/checks.h"

#include <c10/core/GradMode.h>

#include "ops/stream.h"

namespace lora_ext {

DType dtype_of(const char* op, const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat:
            return DType::kFloat32;
        case at::kHalf:
            return DType::kFloat16;
        case at::kBFloat16:
            return DType::kBFloat16;
        case at::kDouble:
            require(!launches_kernels(t), op, name,
                    expected("float32, float16 or bfloat16 on this device"), found("float64"));
            return DType::kFloat64;
        default:
            refuse(op, name, expected("float32, float16, bfloat16 or float64 (CPU)"),
                   found(t.scalar_type()));
    }
}

void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype) {
    require(t.scalar_type() == dtype, op, name, expected(dtype), found(t.scalar_type()));
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
    require(t.dim() == dim, op, name, expected("shape ", shape), found(t.sizes()));
}

void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 at::IntArrayRef sizes, at::Device device) {
    require(t.sizes() == sizes, op, name, expected("shape ", letters, " = ", sizes),
            found(t.sizes()));
    check_device(op, name, t, device);
}

void check_device(const char* op, const char* name, const Tensor& t, at::Device device) {
    require(t.device() == device, op, name, expected("a tensor on ", device), found(t.device()));
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name) {
    require(t.device() == x.device(), op, name,
            expected("the device of ", x_name, ", ", x.device()), found(t.device()));
    require(t.scalar_type() == x.scalar_type(), op, name,
            expected("the dtype of ", x_name, ", ", x.scalar_type()), found(t.scalar_type()));
}

void check_no_tangents(const char* op, std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* t : tensors)
        TORCH_CHECK_NOT_IMPLEMENTED(!t->_fw_grad(0).defined(), op,
                                    " has no forward-mode derivative");
}

void check_launch(const char* op, LaunchStatus status) {
    TORCH_CHECK(status == 0, op, ": ", launch_status_string(status));
}

void check_output(const char* op, const Tensor& y) {
    check_dim(op, "y", y, 2, "(T, O)");
    require(y.size(1) <= 1 || y.stride(1) == 1, op, "y", expected("contiguous rows"),
            found("strides ", y.strides()));
    require(y.size(0) <= 1 || y.stride(0) >= y.size(1), op, "y",
            expected("rows that do not overlap"),
            found("shape ", y.sizes(), " with strides ", y.strides()));
}

namespace {

// Byte addresses that a tensor occupies: a strided lattice of elements from the first to the last.
struct Bytes {
    const Tensor& t;
    uintptr_t begin;
    uint64_t length;  // bytes from the first to the last, inclusive

    explicit Bytes(const Tensor& t)
        : t(t), begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())), length(t.element_size()) {
        for (int64_t d = 0; d < t.dim(); ++d) length += stride(d) * (t.size(d) - 1);
    }
    uint64_t stride(int64_t d) const { return t.stride(d) * t.element_size(); }

    // Return the length spanned by the dimensions whose stride is not a multiple of `period`.
    uint64_t length_within(uint64_t period) const {
        uint64_t within = t.element_size();
        for (int64_t d = 0; d < t.dim(); ++d)
            if (stride(d) % period != 0) within += stride(d) * (t.size(d) - 1);
        return within;
    }
};

// Returns whether a and b occupy different bytes within each period of some stride of `rows`, like
// columns of one packed buffer or interleaved rows.
bool interleaved(const Bytes& rows, const Bytes& a, const Bytes& b) {
    for (int64_t d = 0; d < rows.t.dim(); ++d) {
        const uint64_t period = rows.stride(d);
        if (rows.t.size(d) <= 1 || period == 0) continue;
        const uint64_t a_length = a.length_within(period), b_length = b.length_within(period);
        // Offset from the beginning of a to the beginning of b, modulo the period.
        const uint64_t behind = (b.begin % period + period - a.begin % period) % period;
        if (a_length <= behind && behind + b_length <= period) return true;
    }
    return false;
}

// Returns whether a and b share a byte. The answer is exact for two matrices with the same row
// stride. Without a common period, a and b are reported to overlap if their address ranges do.
bool overlap(const Bytes& a, const Bytes& b) {
    if (a.begin + a.length <= b.begin || b.begin + b.length <= a.begin) return false;
    return !interleaved(a, a, b) && !interleaved(b, a, b);
}

}  // namespace

void check_apart(const char* op, const Tensor& y, std::initializer_list<Argument> others) {
    if (y.numel() == 0) return;
    const Bytes bytes(y);
    for (const Argument& other : others) {
        if (!other.tensor || other.tensor->numel() == 0) continue;
        require(!overlap(bytes, Bytes(*other.tensor)), op, "y",
                expected("memory that does not overlap that of ", other.name), found("an overlap"));
    }
}

void check_one(const char* op, const char* name, const Tensor& t, at::ScalarType dtype,
               at::Device device) {
    require(t.scalar_type() == dtype && t.numel() == 1 && t.device() == device, op, name,
            expected("one number of dtype ", dtype, " on ", device),
            found(t.scalar_type(), " of shape ", t.sizes(), " on ", t.device()));
}

Tensor rows_contiguous(const Tensor& t) {
    return t.dim() == 0 || t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

}  // namespace lora_ext
