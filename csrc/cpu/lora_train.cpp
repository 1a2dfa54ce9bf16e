// Training of batched LoRA on the CPU: the choice of instruction set, as lora.cpp makes it.
#include "lora_ext/lora_train.h"

#include <cstring>
#include <initializer_list>

namespace lora_ext {

// One per compilation of lora_train_isa.cpp.
namespace scalar {
extern const LoraTrainCpu train_table;
}
namespace avx2 {
extern const LoraTrainCpu train_table;
}
namespace avx512 {
extern const LoraTrainCpu train_table;
}
namespace avx512bf16 {
extern const LoraTrainCpu train_table;
}

const LoraTrainCpu* lora_train_cpu(const char* isa) {
    if (!lora_cpu(isa)) return nullptr;
#ifdef LX_X86_TABLES
    for (const LoraTrainCpu* table :
         {&avx2::train_table, &avx512::train_table, &avx512bf16::train_table})
        if (!std::strcmp(isa, table->isa)) return table;
#endif
    return &scalar::train_table;
}

const LoraTrainCpu& lora_train_cpu() {
    return *lora_train_cpu(lora_cpu().isa);
}

}  // namespace lora_ext
