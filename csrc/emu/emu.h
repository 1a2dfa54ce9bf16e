// What a program that links the emulator may ask of it. docs/emulator.md explains runs and reports.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lx::emu {

// When the bytes of a cp.async land: as late as its wait allows (a forgotten wait leaves poison),
// at issue (a stage that others still read is overwritten), or one of the two, by the seed.
enum class CpAsync { kBySeed, kLate, kEarly };

struct Options {
    uint64_t seed =
        0;  // 0: threads run first in, first out; any other: in random order, blocks too
    CpAsync cp_async = CpAsync::kBySeed;  // even seeds late, odd seeds early
    bool races = true;                    // of the check flavour: races and initialisation
    int max_reports = 20;                 // per launch
    int multiprocessors = 132;            // what lx::multiprocessors() answers
    int shared_memory = 227 * 1024;       // bytes that a block may have; at most so many
};

// For the launches that follow. State is per process; a launch holds a lock.
void set_options(const Options& options);
Options options();
inline void set_shared_memory(int bytes) {
    Options changed = options();
    changed.shared_memory = bytes < 227 * 1024 ? bytes : 227 * 1024;  // there is no more
    set_options(changed);
}
inline void set_seed(uint64_t seed) {
    Options changed = options();
    changed.seed = seed;
    set_options(changed);
}

// The reports of all launches since the last call. A launch with a report has returned an error,
// and lx::status_string() of that error repeats its reports until the next launch.
std::vector<std::string> take_reports();

// Launches so far, and CUDA threads run: a test can make sure that its kernel was emulated at all.
struct Counters {
    int64_t launches = 0, threads = 0;
};
Counters counters();

}  // namespace lx::emu
