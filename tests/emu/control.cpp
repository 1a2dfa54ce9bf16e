// C interface to emu.h for ctypes.
#include "emu/emu.h"

#include <cstring>

#define LX_EXPORT extern "C" __attribute__((visibility("default")))

LX_EXPORT void emu_configure(uint64_t seed, int cp_async, int max_reports) {
    lx::emu::Options options;
    options.seed = seed;
    options.cp_async = static_cast<lx::emu::CpAsync>(cp_async);
    options.max_reports = max_reports;
    lx::emu::set_options(options);
}

// Writes the reports, separated by newlines and truncated to `size`.
LX_EXPORT void emu_take_reports(char* text, int64_t size) {
    std::string all;
    for (const std::string& report : lx::emu::take_reports()) all += report + "\n";
    strncpy(text, all.c_str(), static_cast<size_t>(size) - 1);
    text[size - 1] = '\0';
}

LX_EXPORT int64_t emu_threads() {
    return lx::emu::counters().threads;
}
