// The instruction sets that the CPU twins are compiled for, and the choice among them.
//
// Every csrc/cpu/*_isa.cpp is compiled once per instruction set, each time into a namespace of its
// own, and leaves one table of functions there. csrc/cpu/isa.cpp is the only file that knows them.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace lora_ext {

// From the least to the best. A machine that runs one of them runs all before it.
enum class Isa : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

const char* isa_name(Isa isa);  // "scalar", "avx2", "avx512", "avx512bf16"
std::optional<Isa> isa_named(std::string_view name);
// Whether this library was built with twins for it and this machine can run them.
bool isa_runs(Isa isa);
// The best that runs here; chosen once.
Isa best_isa();

struct LoraCpu;           // lora.h
struct LoraTrainCpu;      // lora_train.h
struct GramCpu;           // lora_gram.h
struct CircuitCpu;        // circuit.h
struct CircuitDecodeCpu;  // circuit_decode.h
struct LogSumCpu;         // circuit_sum.h
struct LayersCpu;         // circuit_layers.h
struct CircuitTableCpu;   // circuit_layers.h
struct DepthMixCpu;       // depth_mix.h
struct PackedLinearCpu;   // packed_linear.h
struct PointwiseCpu;      // pointwise.h
struct RowAttentionCpu;   // row_attention.h
struct VocabCpu;          // vocab.h

// The table of one family of twins, as in twins<LoraCpu>(best_isa()), for an instruction set that
// runs here.
template <class Family>
const Family& twins(Isa isa);

template <>
const LoraCpu& twins<LoraCpu>(Isa isa);
template <>
const LoraTrainCpu& twins<LoraTrainCpu>(Isa isa);
template <>
const GramCpu& twins<GramCpu>(Isa isa);
template <>
const CircuitCpu& twins<CircuitCpu>(Isa isa);
template <>
const CircuitDecodeCpu& twins<CircuitDecodeCpu>(Isa isa);
template <>
const LogSumCpu& twins<LogSumCpu>(Isa isa);
template <>
const LayersCpu& twins<LayersCpu>(Isa isa);
template <>
const CircuitTableCpu& twins<CircuitTableCpu>(Isa isa);
template <>
const DepthMixCpu& twins<DepthMixCpu>(Isa isa);
template <>
const PackedLinearCpu& twins<PackedLinearCpu>(Isa isa);
template <>
const PointwiseCpu& twins<PointwiseCpu>(Isa isa);
template <>
const RowAttentionCpu& twins<RowAttentionCpu>(Isa isa);
template <>
const VocabCpu& twins<VocabCpu>(Isa isa);

}  // namespace lora_ext
