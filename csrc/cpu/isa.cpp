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
constexpr int kBuilt = 1;
#else
LX_DECLARE_TABLES(avx2)
constexpr int kBuilt = LX_X86_TABLES;
#if LX_X86_TABLES == 2
#define LX_EACH_ISA(table) &scalar::table, &avx2::table
#else
LX_DECLARE_TABLES(avx512)
LX_DECLARE_TABLES(avx512bf16)
#define LX_EACH_ISA(table) &scalar::table, &avx2::table, &avx512::table, &avx512bf16::table
#endif
#endif

#define LX_TWINS(Family, table)                                         \
    template <>                                                         \
    const Family& twins<Family>(Isa isa) {                              \
        static constexpr const Family* tables[] = {LX_EACH_ISA(table)}; \
        return *tables[static_cast<int>(isa)];                          \
    }
LX_TWINS(LoraCpu, lora_table)
LX_TWINS(LoraTrainCpu, train_table)
LX_TWINS(GramCpu, gram_table)
LX_TWINS(CircuitCpu, circuit_table)
LX_TWINS(CircuitDecodeCpu, decode_table)
LX_TWINS(LogSumCpu, log_sum_table)
LX_TWINS(LayersCpu, layers_table)
LX_TWINS(CircuitTableCpu, circuit_table_table)
LX_TWINS(DepthMixCpu, depth_mix_table)
LX_TWINS(PackedLinearCpu, packed_linear_table)
LX_TWINS(PointwiseCpu, pointwise_table)
LX_TWINS(RowAttentionCpu, row_attention_table)
LX_TWINS(VocabCpu, vocab_table)

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
