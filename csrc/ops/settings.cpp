#include "ops/settings.h"

#include <atomic>

#include "ops/require.h"

namespace lora_ext {
namespace {

std::atomic<bool> debugging{false};
std::atomic<Isa> chosen{best_isa()};

}  // namespace

Isa chosen_isa() {
    return chosen.load(std::memory_order_relaxed);
}

std::string cpu_isa() {
    return isa_name(chosen_isa());
}

void set_cpu_isa(const std::string& name) {
    const std::optional<Isa> isa = name.empty() ? best_isa() : isa_named(name);
    require(isa && isa_runs(*isa), "set_cpu_isa", "isa",
            expected("an instruction set that this machine and this build support"),
            found("'", name, "'"));
    chosen = *isa;
}

void set_debug(bool on) {
    debugging = on;
}

bool debug_mode() {
    return debugging;
}

}  // namespace lora_ext
