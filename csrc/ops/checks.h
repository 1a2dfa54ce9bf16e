// Checks of tensors that all families share. Each raises before memory is accessed; see require.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "lora_ext/common.h"
#include "ops/call.h"
#include "ops/require.h"

namespace lora_ext {

// Largest number of rows, features or pages: kernels use int32 indices, which may run slightly past
// the end.
constexpr int64_t kMaxSize = (int64_t{1} << 31) - (1 << 16);

// Return the dtype of a tensor of values; raise if it is float64 and ops on t launch kernels.
DType dtype_of(const char* op, const char* name, const Tensor& t);
void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype);
void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape);
// Checks shape and device; `letters` are the names of the sizes, as in "(B, K)".
void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 at::IntArrayRef sizes, at::Device device);
void check_device(const char* op, const char* name, const Tensor& t, at::Device device);
// Checks that t has the device and dtype of x.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name);
// Raises if a tensor has a forward-mode tangent, which ops below autograd would drop silently.
void check_no_tangents(const char* op, std::initializer_list<const Tensor*> tensors);
void check_launch(const char* op, LaunchStatus status);

// Checks the rows (T, O) of an output that is added to in place: each row must be contiguous, and
// no two rows may overlap.
void check_output(const char* op, const Tensor& y);
// Argument of an in-place op other than its output, with the argument's name.
struct Argument {
    const char* name;
    const Tensor* tensor;  // nullptr: not given

    Argument(const char* name, const Tensor& t) : name(name), tensor(&t) {}
    Argument(const char* name, const OptionalTensor& t) : name(name), tensor(t ? &*t : nullptr) {}
};
// Checks that y, which passed check_output, shares no byte with any of the arguments.
void check_apart(const char* op, const Tensor& y, std::initializer_list<Argument> others);

// Checks a vector of `size` integers or scales on the device of the weights, and returns its data.
template <class T>
const T* vector_data(const char* op, const char* name, const Tensor& t, int64_t size,
                     at::ScalarType dtype, at::Device device) {
    check_dtype(op, name, t, dtype);
    require(t.dim() == 1 && t.size(0) == size, op, name, expected("shape (", size, ",)"),
            found(t.sizes()));
    check_device(op, name, t, device);
    require(t.is_contiguous(), op, name, expected("a contiguous tensor"),
            found("stride ", t.stride(0)));
    return t.const_data_ptr<T>();
}

// Checks that t has a single number, of the given dtype and on the given device.
void check_one(const char* op, const char* name, const Tensor& t, at::ScalarType dtype,
               at::Device device);

// Return t itself if each row is contiguous, else a copy.
Tensor rows_contiguous(const Tensor& t);

}  // namespace lora_ext
