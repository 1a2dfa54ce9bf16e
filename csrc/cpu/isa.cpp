// The choice of instruction set, for the twins of every family.
#include "lora_ext/isa.h"

#include "lora_ext/circuit.h"
#include "lora_ext/circuit_decode.h"
#include "lora_ext/circuit_layers.h"
#include "lora_ext/circuit_sum.h"
#include "lora_ext/depth_mix.h"
#include "lora_ext/lora.h"
#include "lora_ext/lora_gram.h"
#include "lora_ext/lora_train.h"
#include "lora_ext/packed_linear.h"
#include "lora_ext/pointwise.h"
#include "lora_ext/row_attention.h"
#include "lora_ext/vocab.h"

namespace lora_ext {

// What the *_isa.cpp leave in the namespace of an instruction set.
#define LX_DECLARE_TABLES(isa)                        \
    namespace isa {                                   \
    extern const LoraCpu lora_table;                  \
    extern const LoraTrainCpu train_table;            \
    extern const GramCpu gram_table;                  \
    extern const CircuitCpu circuit_table;            \
    extern const CircuitDecodeCpu decode_table;       \
    extern const LogSumCpu log_sum_table;             \
    extern const LayersCpu layers_table;              \
    extern const CircuitTableCpu circuit_table_table; \
    extern const DepthMixCpu depth_mix_table;         \
    extern const PackedLinearCpu packed_linear_table; \
    extern const PointwiseCpu pointwise_table;        \
    extern const RowAttentionCpu row_attention_table; \
    extern const VocabCpu vocab_table;                \
    }

// In the order of Isa; LX_X86_TABLES is how many of them an x86 build has.
LX_DECLARE_TABLES(scalar)
#ifndef LX_X86_TABLES
#define LX_EACH_ISA(table) &scalar::table
#define LX_EACH_ISA_WITH_PAIRS(table) LX_EACH_ISA(table)
constexpr int kBuilt = 1;
#else
LX_DECLARE_TABLES(avx2)
constexpr int kBuilt = LX_X86_TABLES;
#if LX_X86_TABLES == 2
#define LX_EACH_ISA(table) &scalar::table, &avx2::table
#define LX_EACH_ISA_WITH_PAIRS(table) LX_EACH_ISA(table)
#else
LX_DECLARE_TABLES(avx512)
LX_DECLARE_TABLES(avx512bf16)
// AVX-512-bf16 adds products of pairs of bfloat16 (dot_pairs in vec.h). A family that does not use
// them would have the same code for both, so it is compiled for AVX-512 and registered twice.
#define LX_EACH_ISA(table) &scalar::table, &avx2::table, &avx512::table, &avx512::table
#define LX_EACH_ISA_WITH_PAIRS(table) \
    &scalar::table, &avx2::table, &avx512::table, &avx512bf16::table
#endif
#endif

#define LX_TWINS(Family, ...)                                    \
    template <>                                                  \
    const Family& twins<Family>(Isa isa) {                       \
        static constexpr const Family* tables[] = {__VA_ARGS__}; \
        return *tables[static_cast<int>(isa)];                   \
    }
LX_TWINS(LoraCpu, LX_EACH_ISA_WITH_PAIRS(lora_table))
LX_TWINS(PackedLinearCpu, LX_EACH_ISA_WITH_PAIRS(packed_linear_table))
LX_TWINS(LoraTrainCpu, LX_EACH_ISA(train_table))
LX_TWINS(GramCpu, LX_EACH_ISA(gram_table))
LX_TWINS(CircuitCpu, LX_EACH_ISA(circuit_table))
LX_TWINS(CircuitDecodeCpu, LX_EACH_ISA(decode_table))
LX_TWINS(LogSumCpu, LX_EACH_ISA(log_sum_table))
LX_TWINS(LayersCpu, LX_EACH_ISA(layers_table))
LX_TWINS(CircuitTableCpu, LX_EACH_ISA(circuit_table_table))
LX_TWINS(DepthMixCpu, LX_EACH_ISA(depth_mix_table))
LX_TWINS(PointwiseCpu, LX_EACH_ISA(pointwise_table))
LX_TWINS(RowAttentionCpu, LX_EACH_ISA(row_attention_table))
LX_TWINS(VocabCpu, LX_EACH_ISA(vocab_table))

namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};
constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};

bool machine_has([[maybe_unused]] Isa isa) {
#ifdef LX_X86_TABLES
    if (isa >= Isa::kAvx2 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("f16c")))
        return false;
    if (isa >= Isa::kAvx512 &&
        !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return false;
    if (isa >= Isa::kAvx512Bf16 && !__builtin_cpu_supports("avx512bf16")) return false;
#endif
    return true;
}

}  // namespace

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

std::optional<Isa> isa_named(std::string_view name) {
    for (const Isa isa : kAll)
        if (name == isa_name(isa)) return isa;
    return std::nullopt;
}

bool isa_runs(Isa isa) {
    return static_cast<int>(isa) < kBuilt && machine_has(isa);
}

Isa best_isa() {
    static const Isa best = [] {
        Isa found = Isa::kScalar;
        for (const Isa isa : kAll)
            if (isa_runs(isa)) found = isa;
        return found;
    }();
    return best;
}

}  // namespace lora_ext
