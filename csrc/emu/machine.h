// State of the emulated machine: one block at a time, one fiber per thread. The blocks of a
// resident launch take turns: a block that must wait for another block is suspended. Overlapping
// launches take turns as well (overlap.cpp). Internal to csrc/emu.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emu/emu.h"
#include "emu/fiber.h"
#include "lx/device.h"

namespace lx::emu {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr size_t kArenaBytes = 227 * 1024;  // maximum per block on an H100
constexpr size_t kArenaSlack = 16 * 1024;   // room for the gaps between allocations
constexpr size_t kGap = 64;                 // bytes between two shared allocations
constexpr size_t kStaticSharedBytes = 48 * 1024;

// A line of kernel source, given by a wrapper's default argument or by a code address.
struct Place {
    const char* file = nullptr;
    unsigned line = 0;
    const void* code = nullptr;

    Place() = default;
    Place(const Site& site) : file(site.file_name()), line(site.line()) {}
    explicit Place(const void* code) : code(code) {}
};

struct Warp;

// For each warp of another block, the clock up to which the warp's accesses precede a given point.
// BlockClocks maps the serial number of a block to its BlockClock.
using BlockClock = std::array<uint32_t, kMaxWarps>;
using BlockClocks = std::unordered_map<uint32_t, BlockClock>;

struct Copy {
    unsigned char* shared;
    const unsigned char* global;
    int bytes, source_bytes;
    Site site;
};

struct Thread {
    Self self;  // first member: threadIdx, blockIdx, ...
    Warp* warp;
    int rank, lane;
    Context context;
    Stack stack;
    const char* waits_in;
    Site site;
    bool live;
    bool dependency_met;  // dependent launch: grid_dependency_wait() has been called
    bool vote;
    std::vector<std::vector<Copy>> copy_groups;  // groups that have been committed
    std::vector<Copy> open_copies;
    // Release and acquire through a fence and an atomic, see checker.cpp.
    bool fenced;
    std::array<uint32_t, kMaxWarps> fence_clock;
    BlockClocks seen;  // clocks read by the atomics since the last fence
};

// Lanes of one warp that have arrived at one collective.
struct Slot {
    unsigned mask = 0, arrived = 0;
    const char* name = nullptr;
    void (*compute)(Warp&, const Slot&) = nullptr;
    std::array<void*, kWarpSize> operands;
};

struct Warp {
    int index;
    unsigned live;
    int num_slots;
    std::array<Slot, kWarpSize> slots;
    // Vector clock. Accesses of warp w up to clock[w] precede this warp's next access.
    std::array<uint32_t, kMaxWarps> clock;
    // Vector clocks between the lanes of this warp, advanced by syncwarp.
    std::array<std::array<uint32_t, kWarpSize>, kWarpSize> lane_clock;
};

struct NamedBarrier {
    int expected = 0, arrived = 0;
    bool dependency_met = false;
    std::array<uint32_t, kMaxWarps> clock{};
    std::vector<Thread*> waiting;
};

struct SharedArray {
    const void* key;
    const char* name;
    size_t begin, bytes;
};

struct Record {
    uint32_t block = 0;  // serial number, 0: no access
    uint32_t clock = 0, lane_clock = 0;
    uint16_t thread = 0;
    bool atomic = false;
    bool in_flight = false;  // writer: a cp.async without a completed wait
};
struct Cell {  // two bytes of memory
    Record writer, reader, reader_of_other_warp;
};

struct FreeDeleter {
    void operator()(void* p) const { free(p); }
};

struct Buffer {
    const char* name;
    uintptr_t begin, end;
    int64_t rows, row_bytes, row_stride;
    Access access;
    std::unique_ptr<Cell[], FreeDeleter> cells;  // writable buffers only, allocated on first use
};

// A thread that waits for other blocks, or for another launch.
struct Wait {
    Thread* thread;
    const unsigned* counter;
    unsigned least;
};

struct Block {
    uint32_t block_serial = 0;
    int live = 0;
    bool released = false;  // the block no longer keeps the next launch from starting
    int at_barrier = 0;
    BarrierVote barrier_vote{};
    std::vector<Thread*> barrier_waiting;
    int barrier_result = 0;
    std::array<NamedBarrier, 16> named;
    std::vector<Wait> waits;

    std::array<Thread*, kMaxThreads> ready;  // ring buffer
    uint32_t ready_head = 0, ready_tail = 0;

    std::unique_ptr<Thread[]> threads;
    std::unique_ptr<Warp[]> warps;
    unsigned char* arena = nullptr;  // kArenaBytes + kArenaSlack, 1024-byte aligned
    std::unique_ptr<Cell[], FreeDeleter> arena_cells;
};

// State of one of several overlapping launches, for the waits between them.
struct Overlap {
    const unsigned* before;   // `ended` of the previous launch
    unsigned ended = 0;       // 1 when all threads have ended
    unsigned may_go_on = 0;   // 1 when threads may pass grid_dependency_launch()
    uint64_t unreleased = 0;  // blocks that keep the next launch from starting
};

// A launch.
struct Grid {
    Launch launch;
    bool resident = false;  // whether all blocks run at once
    bool in_turns = false;  // whether blocks take turns
    void (*body)(void*);
    void* arguments;
    size_t argument_bytes;
    std::vector<Buffer> buffers;
    std::vector<SharedArray> shared_arrays;
    size_t shared_used;   // bytes of the arena
    size_t static_bytes;  // static arrays, without gaps
    bool any_dependency_wait;
    bool released_early;  // a thread let the next launch start, or ended, before it had waited
    uint64_t random_state;
    bool early_copies;
    int num_threads, num_warps;  // size of a block
    Overlap* overlap = nullptr;  // nullptr: the launch runs alone
};

struct Machine : Block, Grid {  // the running block, and its launch
    Options options;
    std::vector<std::string> reports;  // since the last take_reports()
    // Reports of this launch. Places are resolved after it ends: a fiber's stack may be too small.
    std::vector<std::pair<std::string, Place>> pending_reports;
    std::string last_error;  // reports of the last launch
    Counters counters;

    int num_reports;  // number for this launch, or for those that overlap
    bool stopped;
    std::vector<size_t> reported;  // hashes of (category, place)

    uint32_t last_serial = 0;  // number of the last block

    // Fibers
    Thread* current = nullptr;  // nullptr: not inside a kernel
    Context host;

    bool checked() const { return launch.instrumented && options.races; }
    uint64_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        return random_state ^= random_state << 17;
    }
};
extern Machine machine;
extern std::mutex launch_lock;

inline Thread& thread_of(const Warp& warp, int lane) {
    return machine.threads[warp.index * kWarpSize + lane];
}

// --- scheduler.cpp
void make_ready(Thread* thread);
void block(const char* what, Site site);  // waits until another thread calls make_ready
void yield();
// Suspends the thread until the counter, which another block or launch changes, is at least
// `least`.
void wait_for_blocks(const char* what, const unsigned* counter, unsigned least, Site site);
[[noreturn]] void stop_launch();  // returns to run(); no fiber continues

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719,
              kTooManyBlocks = 720;  // cudaError_t

void begin_reports();
// Makes a launch the current one of the machine. `declared` are the buffers that LX_BUF declared.
void prepare(const Launch& launch, bool resident, void (*body)(void*), void* arguments,
             size_t argument_bytes, std::vector<Buffer> declared);
int configuration_error();
void check_chain();   // called before the launch
void extend_chain();  // called before the next launch
void finish_grid();
uint64_t num_blocks();
// Calls f(index of the block) for all blocks, in the order of the seed, until the launch stops.
void for_each_block(const std::function<void(uint3)>& f);
// Blocks that take turns. add() makes a block ready to run, on the stacks from first_stack on.
struct Turns {
    std::vector<Block> blocks;
    size_t left = 0;  // blocks that have not ended

    void add(uint3 index, int first_stack);
    // Runs each block until it waits. Returns whether any block could run.
    bool run();
    void report_deadlock() const;
    void clear();
    ~Turns() { clear(); }
};

// --- overlap.cpp. The first three functions do nothing if the launch runs alone.
void wait_for_launch();           // waits until the previous launch has ended
void let_launch_start();          // lets the next launch run up to its wait
void release_next(Block& block);  // the block no longer keeps the next launch from starting
void enqueue(const Launch& launch, bool resident, void (*body)(void*), void* arguments,
             size_t argument_bytes, std::vector<Buffer> declared);

// Waits for the lanes of `mask`. The last lane to arrive computes for all lanes, with every lane's
// operand in the slot.
void collective(const char* name, unsigned mask, void* operand, void (*compute)(Warp&, const Slot&),
                Site site);

// --- reports.cpp
std::string describe(const Thread& thread);
std::string describe(const Place& place);
// Category: bounds, permission, alignment, initialisation, race, divergence, deadlock, asynchrony,
// dependency, resources, trap.
void report(const char* category, const Place& place, const std::string& text);
void finish_reports();
[[noreturn]] void fatal(const char* category, const Place& place, const std::string& text);

// --- checker.cpp
enum class Touch { kRead, kWrite, kAtomic };
// Checks an access before it happens: bounds, permission and alignment always, races and
// initialisation in the check flavour.
void touch(const void* p, size_t bytes, Touch how, bool must_align, const Place& place);
enum class AsyncStep { kIssue, kLand };
void touch_async(const void* shared, size_t bytes, AsyncStep step, const Place& place);
void check_shared(const void* p, size_t bytes, const char* instruction, const Place& place);
void order_block_barrier();
void order_arrive(NamedBarrier& barrier);
void order_wait(NamedBarrier& barrier, Thread& thread);
void order_syncwarp(Warp& warp, unsigned mask);
void order_atomic(const void* p);
// order_count: an atomic has stored `value` at p. order_waited: the current thread has waited for a
// value of at least `least` at p.
void order_count(const void* p, uint64_t value);
void order_waited(const void* p, uint64_t least);
void order_fence();
void forget_launch();

}  // namespace lx::emu
