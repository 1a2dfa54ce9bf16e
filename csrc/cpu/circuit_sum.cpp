// Sum layers on the CPU: the choice of instruction set, as lora.cpp makes it.
#include "lora_ext/circuit_sum.h"

#include <cstring>
#include <initializer_list>

#include "lora_ext/lora.h"

namespace lora_ext {

// One per compilation of circuit_sum_isa.cpp.
namespace scalar {
extern const LogSumCpu log_sum_table;
}
namespace avx2 {
extern const LogSumCpu log_sum_table;
}
namespace avx512 {
extern const LogSumCpu log_sum_table;
}
namespace avx512bf16 {
extern const LogSumCpu log_sum_table;
}

const LogSumCpu* log_sum_cpu(const char* isa) {
    if (!lora_cpu(isa)) return nullptr;
#ifdef LX_X86_TABLES
    for (const LogSumCpu* table :
         {&avx2::log_sum_table, &avx512::log_sum_table, &avx512bf16::log_sum_table})
        if (!std::strcmp(isa, table->isa)) return table;
#endif
    return &scalar::log_sum_table;
}

}  // namespace lora_ext
