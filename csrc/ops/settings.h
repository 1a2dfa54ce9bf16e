// Process-wide settings of the ops, and properties of the build.
#pragma once

#include <string>

#include "lora_ext/isa.h"

namespace lora_ext {

// Instruction set of the CPU twins. Tests may select a less capable one; "" selects the best.
std::string cpu_isa();
void set_cpu_isa(const std::string& isa);
// True if the CUDA kernels were compiled into this module.
bool has_kernels();
// In debug mode, a launch with an id out of range synchronises and raises; the CPU always raises.
void set_debug(bool on);
bool debug_mode();
Isa chosen_isa();
// Return the CPU twins of one family for the chosen instruction set.
template <class Family>
const Family& chosen_twins() {
    return twins<Family>(chosen_isa());
}

}  // namespace lora_ext
