// What the circuit ops have in common: tensors checked and turned into the structs of
// lora_ext/circuit.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "lora_ext/circuit.h"
#include "ops/call.h"

namespace lora_ext {

// The tensor itself if each row of its batch is contiguous, whatever lies between the rows, or a
// copy.
Tensor batch_of_rows(const Tensor& t);

// Values in [least, most): on the CPU, and in debug mode anywhere.
void check_range(const char* op, const char* name, const Tensor& t, int64_t least, int64_t most);
// Float32 or float64 in [0, 1], looked at likewise: 1 is what a double below it may round to.
void check_uniforms(const char* op, const Tensor& uniforms);

// Refuses x that is not (B, K) int64 in [-1, vocab).
void check_tokens(const char* op, const Tensor& x, int64_t rows, int64_t n_token, int64_t vocab,
                  at::Device device);

// Structure, prior and transitions of one op, and the tensors that keep their memory alive. `leaf`
// is (B, K, C) or (B, K, C, V).
struct CircuitWeights {
    CircuitParams params;
    Tensor prior, trans;
};
CircuitWeights circuit_weights(const char* op, std::string_view kind, const Tensor& leaf,
                               const char* leaf_name, const OptionalTensor& prior,
                               const OptionalTensor& trans);

}  // namespace lora_ext
