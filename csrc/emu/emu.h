// Public interface of the emulator. docs/notes/emulator.md explains runs and reports.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lx::emu {

// When a cp.async writes its bytes. kLate: as late as its wait allows, so that a kernel without a
// wait reads poison. kEarly: when it is issued, so that a kernel that still reads the old bytes of
// a stage reads new ones. kBySeed: one of the two, chosen by the seed.
enum class CpAsync { kBySeed, kLate, kEarly };

// Which launches may run at the same time. kNone: each launch runs to its end at once. Otherwise,
// launches are queued until synchronize(), and a dependent launch runs up to its wait before a
// thread of the previous launch returns from grid_dependency_launch(): with kDeep as soon as the
// previous launch allows it, so that several launches may overlap; with kShallow only after the
// launches before the previous one have ended.
enum class Overlapping { kNone, kDeep, kShallow };

struct Options {
    uint64_t seed =
        0;  // 0: threads run first in, first out; otherwise threads and blocks run in random order
    CpAsync cp_async = CpAsync::kBySeed;  // even seeds late, odd seeds early
    bool races = true;                    // report races, uninitialised reads; check flavour only
    int max_reports = 20;                 // maximum per launch
    int multiprocessors = 132;            // return value of lx::multiprocessors()
    int shared_memory = 227 * 1024;       // bytes per block, at most 227 KiB
    Overlapping overlapping = Overlapping::kNone;
};

// Options of the following launches. The state is global to the process, and a launch holds a lock.
void set_options(const Options& options);
Options options();
inline void set_shared_memory(int bytes) {
    Options changed = options();
    changed.shared_memory = bytes < 227 * 1024 ? bytes : 227 * 1024;  // capacity of the arena
    set_options(changed);
}
inline void set_seed(uint64_t seed) {
    Options changed = options();
    changed.seed = seed;
    set_options(changed);
}

// Runs the queued launches. Returns 0 or the code of the first error. The caller must not change or
// free the buffers of a queued launch before this call.
int synchronize();

// Returns the reports of all launches since the last call. A launch with a report returns an error,
// and lx::status_string() of that error repeats its reports until the next launch.
std::vector<std::string> take_reports();

// Numbers of launches and of CUDA threads run: a test can check that its kernel was emulated.
struct Counters {
    int64_t launches = 0, threads = 0;
};
Counters counters();

}  // namespace lx::emu
