// Choice of the instruction set for the CPU twins of every family.
#include "lora_ext/isa.h"

#if defined(LX_X86_TABLES) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "lora_ext/circuit.h"
#include "lora_ext/circuit_decode.h"
#include "lora_ext/circuit_layers.h"
#include "lora_ext/circuit_sum.h"
#include "lora_ext/depth_mix.h"
#include "lora_ext/lora.h"
#include "lora_ext/lora_gram.h"
#include "lora_ext/lora_train.h"
#include "lora_ext/packed_bits.h"
#include "lora_ext/packed_linear.h"
#include "lora_ext/pointwise.h"
#include "lora_ext/row_attention.h"
#include "lora_ext/vocab.h"

namespace lora_ext {

// Tables defined by the *_isa.cpp files in the namespace of an instruction set.
#define LX_DECLARE_TABLE(Family, table) extern const Family table;
#define LX_DECLARE_TABLES(isa)               \
    namespace isa {                          \
    LX_FAMILIES(LX_DECLARE_TABLE)            \
    LX_FAMILIES_WITH_PAIRS(LX_DECLARE_TABLE) \
    LX_FAMILIES_WITH_TILES(LX_DECLARE_TABLE) \
    }

namespace {

// Return whether the processor has AMX tiles of bfloat16 and int8 and Linux lets this process use
// them. A process must request the permission, which this function does.
[[maybe_unused]] bool has_tiles() {
#if defined(LX_X86_TABLES) && defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // CPUID leaf 7, EDX
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

// Tables in the order of Isa. LX_X86_TABLES is the number of instruction sets of an x86 build.
LX_DECLARE_TABLES(scalar)
#ifndef LX_X86_TABLES
#define LX_EACH_ISA(table) &scalar::table
#define LX_EACH_ISA_WITH_PAIRS(table) LX_EACH_ISA(table)
#define LX_EACH_ISA_WITH_TILES(table) LX_EACH_ISA(table)
constexpr int kBuilt = 1;
#else
LX_DECLARE_TABLES(avx2)
constexpr int kBuilt = LX_X86_TABLES;
#if LX_X86_TABLES == 2
#define LX_EACH_ISA(table) &scalar::table, &avx2::table
#define LX_EACH_ISA_WITH_PAIRS(table) LX_EACH_ISA(table)
#define LX_EACH_ISA_WITH_TILES(table) LX_EACH_ISA(table)
#else
LX_DECLARE_TABLES(avx512)
LX_DECLARE_TABLES(avx512bf16)
LX_DECLARE_TABLES(amx)
// A family that multiplies no pairs of bfloat16 would have the same code for AVX-512-bf16, so its
// AVX-512 table is registered twice.
#define LX_EACH_ISA(table) &scalar::table, &avx2::table, &avx512::table, &avx512::table
#define LX_EACH_ISA_WITH_PAIRS(table) \
    &scalar::table, &avx2::table, &avx512::table, &avx512bf16::table
#define LX_EACH_ISA_WITH_TILES(table) \
    &scalar::table, &avx2::table, &avx512::table, has_tiles() ? &amx::table : &avx512bf16::table
#endif
#endif

#define LX_DEFINE_TWINS(Family, ...)                         \
    template <>                                              \
    const Family& twins<Family>(Isa isa) {                   \
        static const Family* const tables[] = {__VA_ARGS__}; \
        return *tables[static_cast<int>(isa)];               \
    }
#define LX_TWINS(Family, table) LX_DEFINE_TWINS(Family, LX_EACH_ISA(table))
#define LX_TWINS_WITH_PAIRS(Family, table) LX_DEFINE_TWINS(Family, LX_EACH_ISA_WITH_PAIRS(table))
LX_FAMILIES(LX_TWINS)
#define LX_TWINS_WITH_TILES(Family, table) LX_DEFINE_TWINS(Family, LX_EACH_ISA_WITH_TILES(table))
LX_FAMILIES_WITH_PAIRS(LX_TWINS_WITH_PAIRS)
LX_FAMILIES_WITH_TILES(LX_TWINS_WITH_TILES)

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
    if (isa >= Isa::kAvx512Bf16 &&
        !(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")))
        return false;
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
