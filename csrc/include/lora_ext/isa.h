// Instruction sets of the CPU twins, and the choice among them.
//
// Every csrc/cpu/*_isa.cpp is compiled once per instruction set. Each object file defines one table
// of functions, in the namespace of its instruction set. csrc/cpu/isa.cpp chooses among the tables.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace lora_ext {

// In ascending order: a machine that supports an instruction set supports all sets before it.
enum class Isa : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

const char* isa_name(Isa isa);  // "scalar", "avx2", "avx512", "avx512bf16"
std::optional<Isa> isa_named(std::string_view name);
// Return whether this library has CPU twins for `isa` and this machine can run them.
bool isa_runs(Isa isa);
// Return the best instruction set that runs here; the choice is made once.
Isa best_isa();

// All families of CPU twins: the type of the table, defined by the family's header, and the table's
// name in the namespace of an instruction set. Families of the second list are also compiled for
// AVX-512-bf16, which multiplies pairs of bfloat16 (dot_pairs in vec.h) and, with the VNNI that
// every such processor has, four int8 at once. Those of the third list are also compiled for AMX,
// which multiplies tiles of bfloat16 and int8: on a processor that has it, this is their
// AVX-512-bf16 code.
#define LX_FAMILIES(X)                      \
    X(LoraTrainCpu, train_table)            \
    X(GramCpu, gram_table)                  \
    X(CircuitCpu, circuit_table)            \
    X(CircuitDecodeCpu, decode_table)       \
    X(LogSumCpu, log_sum_table)             \
    X(LayersCpu, layers_table)              \
    X(CircuitTableCpu, circuit_table_table) \
    X(DepthMixCpu, depth_mix_table)         \
    X(PointwiseCpu, pointwise_table)        \
    X(RowAttentionCpu, row_attention_table) \
    X(VocabCpu, vocab_table)
#define LX_FAMILIES_WITH_PAIRS(X) X(LoraCpu, lora_table)
#define LX_FAMILIES_WITH_TILES(X)       \
    X(PackedBitsCpu, packed_bits_table) \
    X(PackedLinearCpu, packed_linear_table)

// Return the table of one family for an instruction set that runs here, e.g.
// twins<LoraCpu>(best_isa()).
template <class Family>
const Family& twins(Isa isa);

#define LX_DECLARE_TWINS(Family, table) \
    struct Family;                      \
    template <>                         \
    const Family& twins<Family>(Isa isa);
LX_FAMILIES(LX_DECLARE_TWINS)
LX_FAMILIES_WITH_PAIRS(LX_DECLARE_TWINS)
LX_FAMILIES_WITH_TILES(LX_DECLARE_TWINS)
#undef LX_DECLARE_TWINS

}  // namespace lora_ext
