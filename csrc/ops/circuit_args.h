// Helpers of the circuit ops that check tensors and convert them to structs of lora_ext/circuit.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "lora_ext/circuit.h"
#include "ops/call.h"

namespace lora_ext {

// Returns t itself if each row of its batch is contiguous, with any batch stride, else a copy.
Tensor batch_of_rows(const Tensor& t);

// Checks that values are in [least, most): always on the CPU, and in debug mode on a device.
void check_range(const char* op, const char* name, const Tensor& t, int64_t least, int64_t most);
// Checks that float32 or float64 uniforms are in [0, 1], under the same conditions. 1 is allowed
// because a double below 1 may round to 1 in float32.
void check_uniforms(const char* op, const Tensor& uniforms);

// Raises unless x is (B, K) int64 in [-1, vocab).
void check_tokens(const char* op, const Tensor& x, int64_t rows, int64_t n_token, int64_t vocab,
                  at::Device device);

// Structure, prior and transitions of one circuit, and the tensors that own their memory. The shape
// of `leaf` is (B, K, C) or (B, K, C, V).
struct CircuitWeights {
    CircuitParams params;
    Tensor prior, trans;
};
CircuitWeights circuit_weights(const char* op, std::string_view kind, const Tensor& leaf,
                               const char* leaf_name, const OptionalTensor& prior,
                               const OptionalTensor& trans);

}  // namespace lora_ext
