// Process-wide settings of the ops, and what this build can do.
#pragma once

#include <string>

#include "lora_ext/isa.h"

namespace lora_ext {

// The instruction set the CPU twins run on, and a way for tests to choose a lesser one ("" = best).
std::string cpu_isa();
void set_cpu_isa(const std::string& isa);
// True if the CUDA kernels were compiled into this module.
bool has_kernels();
// With debug on, a launch with an adapter id out of range synchronises and raises; twins always do.
void set_debug(bool on);
bool debug_mode();
Isa chosen_isa();
// The twins of one family for the chosen instruction set.
template <class Family>
const Family& chosen_twins() {
    return twins<Family>(chosen_isa());
}

}  // namespace lora_ext
