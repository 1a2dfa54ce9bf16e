#include "lora_kernels.cuh"
namespace lora_ext {
LaunchStatus run_shrink_prefill(const LoraArgs& args, const Partials& v, void* stream) {
    return run_shrink_decode(args, v, stream);
}
}  // namespace lora_ext
