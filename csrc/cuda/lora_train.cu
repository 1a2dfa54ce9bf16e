// Not written yet: every launcher says so by the code of cudaErrorNotSupported.
#include "lora_ext/lora_train.h"

namespace lora_ext {

constexpr LaunchStatus kNotSupported = 801;

int64_t lora_train_workspace_bytes(const LoraTrainArgs&) {
    return 0;
}
LaunchStatus launch_lora_train_shrink(const LoraTrainArgs&, void*) {
    return kNotSupported;
}
LaunchStatus launch_lora_train_backward(const LoraTrainArgs&, void*) {
    return kNotSupported;
}
LaunchStatus launch_lora_dropout(const LoraTrainArgs&, void*, void*) {
    return kNotSupported;
}

}  // namespace lora_ext
