// Checks of tensors that every family shares. Each raises before memory is touched and names op,
// argument, expected and found.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "lora_ext/common.h"

namespace lora_ext {

using at::Tensor;

#define LX_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

// Of rows, features and pages: kernels count in int32, and a little beyond the end.
constexpr int64_t kMaxSize = (int64_t{1} << 31) - (1 << 16);

// The dtype of a tensor of values; float64 is refused where kernels run.
DType dtype_of(const char* op, const char* name, const Tensor& t);
// Device and dtype are those of x.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name);
void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape);
// Rows (T, O) that are added to in place: contiguous in themselves, not overlapping.
void check_output(const char* op, const Tensor& y);
// Below autograd a tangent would be dropped without a word.
void check_no_tangents(const char* op, std::initializer_list<const Tensor*> tensors);
void check_launch(const char* op, LaunchStatus status);

// Small integer and scale vectors that sit beside the weights.
template <class T>
const T* vector_data(const char* op, const char* name, const Tensor& t, int64_t size,
                     at::ScalarType dtype, at::Device device) {
    LX_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ",
             t.scalar_type());
    LX_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have shape (", size,
             ",), got ", t.sizes());
    LX_CHECK(t.device() == device, op, ": ", name, " must be on ", device, ", got ", t.device());
    LX_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
    return t.const_data_ptr<T>();
}

// The tensor itself if each row is contiguous, else a copy.
Tensor rows_contiguous(const Tensor& t);

}  // namespace lora_ext
