#include "ops/settings.h"

#include <atomic>

#include "ops/checks.h"

namespace lora_ext {
namespace {

std::atomic<bool> debugging{false};
std::atomic<const LoraCpu*> chosen_twin{nullptr};

}  // namespace

const LoraCpu& lora_twin() {
    const LoraCpu* chosen = chosen_twin.load(std::memory_order_relaxed);
    return chosen ? *chosen : lora_cpu();
}

std::string cpu_isa() {
    return lora_twin().isa;
}

void set_cpu_isa(const std::string& isa) {
    const LoraCpu* chosen = isa.empty() ? nullptr : lora_cpu(isa.c_str());
    LX_CHECK(isa.empty() || chosen, "set_cpu_isa: this machine or build has no instruction set '",
             isa, "'");
    chosen_twin = chosen;
}

bool has_kernels() {
#if defined(LORA_EXT_WITH_CUDA)
    return true;
#else
    return false;
#endif
}

void set_debug(bool on) {
    debugging = on;
}

bool debug_mode() {
    return debugging;
}

}  // namespace lora_ext
