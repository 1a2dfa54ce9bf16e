// Decoding on the CPU: the choice of instruction set, as lora.cpp makes it.
#include "lora_ext/circuit_decode.h"

#include <cstring>
#include <initializer_list>

#include "lora_ext/lora.h"

namespace lora_ext {

// One per compilation of circuit_decode_isa.cpp.
namespace scalar {
extern const CircuitDecodeCpu decode_table;
}
namespace avx2 {
extern const CircuitDecodeCpu decode_table;
}
namespace avx512 {
extern const CircuitDecodeCpu decode_table;
}
namespace avx512bf16 {
extern const CircuitDecodeCpu decode_table;
}

const CircuitDecodeCpu* circuit_decode_cpu(const char* isa) {
    if (!lora_cpu(isa)) return nullptr;
#ifdef LX_X86_TABLES
    for (const CircuitDecodeCpu* table :
         {&avx2::decode_table, &avx512::decode_table, &avx512bf16::decode_table})
        if (!std::strcmp(isa, table->isa)) return table;
#endif
    return &scalar::decode_table;
}

}  // namespace lora_ext
