// Checks of tensors that every family shares. Each raises before memory is touched, in the words of
// require.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "lora_ext/common.h"
#include "ops/call.h"
#include "ops/require.h"

namespace lora_ext {

// The largest number of rows, features or pages: kernels count in int32, and a little beyond the
// end.
constexpr int64_t kMaxSize = (int64_t{1} << 31) - (1 << 16);

// The dtype of a tensor of values; float64 is refused where kernels run.
DType dtype_of(const char* op, const char* name, const Tensor& t);
void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype);
void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape);
// Shape and device; `letters` are those of the sizes, as in "(B, K)".
void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 at::IntArrayRef sizes, at::Device device);
void check_device(const char* op, const char* name, const Tensor& t, at::Device device);
// Device and dtype are those of x.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name);
// Below autograd a tangent would be dropped without a word.
void check_no_tangents(const char* op, std::initializer_list<const Tensor*> tensors);
void check_launch(const char* op, LaunchStatus status);

// Rows (T, O) that are added to in place: each contiguous, none overlapping another.
void check_output(const char* op, const Tensor& y);
// Another argument of an op in place, by its name.
struct Argument {
    const char* name;
    const Tensor* tensor;  // nullptr: not given

    Argument(const char* name, const Tensor& t) : name(name), tensor(&t) {}
    Argument(const char* name, const OptionalTensor& t) : name(name), tensor(t ? &*t : nullptr) {}
};
// y, which check_output has seen, shares no byte with any of the arguments.
void check_apart(const char* op, const Tensor& y, std::initializer_list<Argument> others);

// Small integer and scale vectors that sit beside the weights.
template <class T>
const T* vector_data(const char* op, const char* name, const Tensor& t, int64_t size,
                     at::ScalarType dtype, at::Device device) {
    check_dtype(op, name, t, dtype);
    require(t.dim() == 1 && t.size(0) == size, op, name, expected("shape (", size, ",)"),
            found(t.sizes()));
    check_device(op, name, t, device);
    require(t.is_contiguous(), op, name, expected("contiguous numbers"),
            found("stride ", t.stride(0)));
    return t.const_data_ptr<T>();
}

// One number beside the tensors of values.
void check_one(const char* op, const char* name, const Tensor& t, at::ScalarType dtype,
               at::Device device);

// The tensor itself if each row is contiguous, else a copy.
Tensor rows_contiguous(const Tensor& t);

}  // namespace lora_ext
