#include "ops/checks.h"

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
            LX_CHECK(!launches_kernels(t), op, ": ", name,
                     " must be float32, float16 or bfloat16 on this device, got float64");
            return DType::kFloat64;
        default:
            LX_CHECK(false, op, ": ", name,
                     " must be float32, float16, bfloat16 or float64 (CPU), got ", t.scalar_type());
    }
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name) {
    LX_CHECK(t.device() == x.device(), op, ": ", name, " must be on the device of ", x_name, ", ",
             x.device(), ", got ", t.device());
    LX_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of ", x_name,
             ", ", x.scalar_type(), ", got ", t.scalar_type());
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
    LX_CHECK(t.dim() == dim, op, ": ", name, " must have shape ", shape, ", got ", t.sizes());
}

void check_output(const char* op, const Tensor& y) {
    check_dim(op, "y", y, 2, "(T, O)");
    LX_CHECK(y.size(1) <= 1 || y.stride(1) == 1, op,
             ": y must be contiguous in its last dimension, "
             "got strides ",
             y.strides());
    LX_CHECK(y.size(0) <= 1 || y.stride(0) >= y.size(1), op,
             ": rows of y must not overlap, got shape ", y.sizes(), " with strides ", y.strides());
}

void check_no_tangents(const char* op, std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* t : tensors)
        TORCH_CHECK_NOT_IMPLEMENTED(!t->_fw_grad(0).defined(), op,
                                    " has no forward-mode derivative");
}

void check_launch(const char* op, LaunchStatus status) {
    TORCH_CHECK(status == 0, op, ": ", launch_status_string(status));
}

Tensor rows_contiguous(const Tensor& t) {
    return t.dim() == 0 || t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

}  // namespace lora_ext
