// Losses over a vocabulary, computed in chunks of vocabulary entries: the loss per row, and the
// gradients.
//
// softcap 0 means no softcap. `dtype` is the dtype of the products with the weight; sums are in
// float32, or float64 for float64. If with_gradient is true, the same pass computes dloss/dhidden,
// for a backward that needs no gradients of weight and bias; otherwise dloss/dhidden is an empty
// one-dimensional tensor.
#pragma once

#include <tuple>

#include "ops/call.h"

namespace lora_ext {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// hidden (N, d) -> loss (N,), lse (N,), dhidden (N, d).
ThreeTensors vocab_cross_entropy(const Tensor& hidden, const Tensor& weight,
                                 const OptionalTensor& bias, const Tensor& labels, int64_t chunk,
                                 int64_t ignore_index, double softcap, at::ScalarType dtype,
                                 bool with_gradient);
// dloss (N,) -> dhidden (N, d), dweight (V, d), dbias (V,).
ThreeTensors vocab_cross_entropy_backward(const Tensor& dloss, const Tensor& hidden,
                                          const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& labels, const Tensor& lse,
                                          const Tensor& dhidden, int64_t chunk,
                                          int64_t ignore_index, double softcap,
                                          at::ScalarType dtype, bool need_dhidden,
                                          bool need_dweight, bool need_dbias);

// hiddens (k, N, d), the teacher last -> loss (N,), lse (k, N), dhiddens (k - 1, N, d).
ThreeTensors vocab_kl(const Tensor& hiddens, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& mask, double tau, int64_t chunk, double softcap,
                      at::ScalarType dtype, bool with_gradient);
// dloss (N,) -> dhiddens (k, N, d), zero for the teacher, dweight (V, d), dbias (V,).
ThreeTensors vocab_kl_backward(const Tensor& dloss, const Tensor& hiddens, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mask,
                               const Tensor& lse, const Tensor& dhiddens, double tau, int64_t chunk,
                               double softcap, at::ScalarType dtype, bool need_dhiddens,
                               bool need_dweight, bool need_dbias);

}  // namespace lora_ext
