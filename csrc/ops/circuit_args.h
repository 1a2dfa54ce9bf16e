// What the circuit ops have in common: tensors checked and turned into the structs of
// lora_ext/circuit.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "lora_ext/circuit.h"

namespace lora_ext {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

// float32, or float64 for float64.
at::ScalarType accumulator_of(const Tensor& t);
// The tensor itself if each row of its batch is contiguous, whatever lies between the rows, or a
// copy.
Tensor batch_of_rows(const Tensor& t);

void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 at::IntArrayRef sizes, at::Device device);
void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype);
// Values in [least, most): on the CPU, and in debug mode anywhere.
void check_range(const char* op, const char* name, const Tensor& t, int64_t least, int64_t most);

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
