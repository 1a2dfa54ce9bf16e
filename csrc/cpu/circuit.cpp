// Circuits on the CPU: the choice of instruction set, as lora.cpp makes it.
#include "lora_ext/circuit.h"

#include <cstring>
#include <initializer_list>

#include "lora_ext/lora.h"

namespace lora_ext {

// One per compilation of circuit_isa.cpp.
namespace scalar {
extern const CircuitCpu circuit_table;
}
namespace avx2 {
extern const CircuitCpu circuit_table;
}
namespace avx512 {
extern const CircuitCpu circuit_table;
}
namespace avx512bf16 {
extern const CircuitCpu circuit_table;
}

const CircuitCpu* circuit_cpu(const char* isa) {
    if (!lora_cpu(isa)) return nullptr;
#ifdef LX_X86_TABLES
    for (const CircuitCpu* table :
         {&avx2::circuit_table, &avx512::circuit_table, &avx512bf16::circuit_table})
        if (!std::strcmp(isa, table->isa)) return table;
#endif
    return &scalar::circuit_table;
}

}  // namespace lora_ext
