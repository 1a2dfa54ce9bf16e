// Runs launches, their blocks and threads, and implements barriers and warp collectives.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "emu/machine.h"
#include "lx/resident.h"

namespace lx::emu {

Machine machine;
std::mutex launch_lock;

namespace {

thread_local std::vector<Buffer> declared;  // from LX_BUF, for this thread's next launch

Thread* next_ready() {
    Machine& m = machine;
    if (m.options.seed != 0) {
        const uint32_t pick = m.ready_head + m.random() % (m.ready_tail - m.ready_head);
        std::swap(m.ready[pick % kMaxThreads], m.ready[m.ready_head % kMaxThreads]);
    }
    return m.ready[m.ready_head++ % kMaxThreads];
}

void run_next() {
    Machine& m = machine;
    Thread* from = m.current;
    if (m.ready_head == m.ready_tail && !m.waits.empty()) {  // switch to another block
        m.current = nullptr;
        fiber_switch(&from->context, &m.host, nullptr);
        return;
    }
    if (m.ready_head == m.ready_tail) {
        std::string text = "no thread can run;";
        int shown = 0;
        for (int i = 0; i < m.num_threads && shown < 4; ++i) {
            const Thread& t = m.threads[i];
            if (!t.live) continue;
            text += (shown++ ? ", " : " ") + describe(t) + " waits in " + t.waits_in + " at " +
                    describe(Place(t.site));
        }
        if (m.live > shown) text += ", and " + std::to_string(m.live - shown) + " more";
        fatal("deadlock", Place(), text);
    }
    Thread* to = next_ready();
    m.current = to;
    if (to != from) fiber_switch(&from->context, &to->context, &to->stack);
}

void complete_block_barrier() {
    Machine& m = machine;
    for (const Thread* t : m.barrier_waiting) {
        const Thread* first = nullptr;  // first waiting thread of the same warp
        for (const Thread* u : m.barrier_waiting) {
            if (u->warp == t->warp) {
                first = u;
                break;
            }
        }
        if (first->site.line() != t->site.line() ||
            strcmp(first->site.file_name(), t->site.file_name()) != 0) {
            report("divergence", Place(t->site),
                   describe(*t) + " waits in this barrier, while " + describe(*first) +
                       " of the same warp waits in the one at " + describe(Place(first->site)));
            break;
        }
    }
    bool any_met = false;
    int votes = 0;
    for (const Thread* t : m.barrier_waiting) {
        any_met |= t->dependency_met;
        votes += t->vote;
    }
    m.barrier_result = m.barrier_vote == BarrierVote::kOr    ? votes > 0
                       : m.barrier_vote == BarrierVote::kAnd ? votes == m.at_barrier
                                                             : votes;
    order_block_barrier();
    for (Thread* t : m.barrier_waiting) {
        t->dependency_met |= any_met;
        if (t != m.current) make_ready(t);
    }
    m.barrier_waiting.clear();
    m.at_barrier = 0;
}

// Completes each collective in which only lanes that have ended are missing.
void release_collectives(Warp& warp);

[[noreturn]] void exit_thread() {
    Machine& m = machine;
    Thread& t = *m.current;
    m.released_early |= !t.dependency_met;
    if (!t.open_copies.empty()) {
        report("asynchrony", Place(t.open_copies.front().site),
               describe(t) + " ends with a cp.async that it has not committed");
    }
    t.live = false;
    t.warp->live &= ~(1u << t.lane);
    --m.live;
    if (m.live == 0) {
        release_next(m);
        m.current = nullptr;
        Context unused;
        fiber_switch(&unused, &m.host, nullptr);
    }
    release_collectives(*t.warp);
    if (m.at_barrier == m.live) complete_block_barrier();
    run_next();
    __builtin_unreachable();
}

void thread_main() {
    fiber_entered();
    machine.body(machine.arguments);
    exit_thread();
}

void allocate(Block& block) {
    block.threads = std::make_unique<Thread[]>(kMaxThreads);
    block.warps = std::make_unique<Warp[]>(kMaxWarps);
    block.arena = static_cast<unsigned char*>(aligned_alloc(1024, kArenaBytes + kArenaSlack));
}

// Makes the block at `index` ready to run, on the stacks from first_stack on.
void prepare_block(uint3 index, int first_stack) {
    Machine& m = machine;
    m.block_serial = ++m.last_serial;
    // Uninitialised shared memory reads as NaN in every float type and as an invalid index
    // otherwise. Blocks that take turns share array offsets, and any of them may allocate an array,
    // so the whole arena of each block is filled.
    memset(m.arena, 0xff, m.in_turns ? kArenaBytes + kArenaSlack : m.shared_used);
    m.waits.clear();
    m.released = false;
    m.live = m.num_threads;
    m.at_barrier = 0;
    m.barrier_waiting.clear();
    m.ready_head = m.ready_tail = 0;
    for (NamedBarrier& b : m.named) b = NamedBarrier();
    for (int i = 0; i < m.num_warps; ++i) {
        Warp& w = m.warps[i];
        w.index = i;
        const int lanes = std::min(kWarpSize, m.num_threads - i * kWarpSize);
        w.live = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
        w.num_slots = 0;
        if (m.checked()) {
            w.clock.fill(0);
            w.clock[i] = 1;
            for (auto& row : w.lane_clock) row.fill(0);
            for (int lane = 0; lane < kWarpSize; ++lane) w.lane_clock[lane][lane] = 1;
        }
    }
    const dim3 size = m.launch.block;
    for (int i = 0; i < m.num_threads; ++i) {
        Thread& t = m.threads[i];
        t.self.thread_idx = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        t.self.block_idx = index;
        t.self.block_dim = size;
        t.self.grid_dim = m.launch.grid;
        t.warp = &m.warps[i / kWarpSize];
        t.rank = i;
        t.lane = i % kWarpSize;
        t.stack = fiber_stack(first_stack + i);
        t.live = true;
        t.dependency_met = !m.launch.dependent;
        t.copy_groups.clear();
        t.open_copies.clear();
        t.fenced = false;
        t.seen.clear();
        fiber_prepare(&t.context, t.stack, thread_main);
        make_ready(&t);
    }
}

// Runs the current block until it ends or waits for other blocks.
void enter_block() {
    Machine& m = machine;
    m.current = next_ready();
    fiber_switch(&m.host, &m.current->context, &m.current->stack);
    m.current = nullptr;
    if (m.stopped || m.live > 0) return;
    for (int id = 1; id < 16; ++id) {
        if (m.named[id].arrived != 0) {
            report("divergence", Place(),
                   "the block ends while named barrier " + std::to_string(id) + " has " +
                       std::to_string(m.named[id].arrived) + " of " +
                       std::to_string(m.named[id].expected) + " arrivals");
        }
    }
}

}  // namespace

void Turns::add(uint3 index, int first_stack) {
    Block& block = blocks.emplace_back();
    allocate(block);
    std::swap(static_cast<Block&>(machine), block);
    prepare_block(index, first_stack);
    std::swap(static_cast<Block&>(machine), block);
    ++left;
}

bool Turns::run() {
    Machine& m = machine;
    bool moved = false;
    for (Block& block : blocks) {
        if (block.live == 0 || m.stopped) continue;
        std::swap(static_cast<Block&>(m), block);
        std::erase_if(m.waits, [](const Wait& wait) {
            const bool met = *wait.counter >= wait.least;
            if (met) make_ready(wait.thread);
            return met;
        });
        if (m.ready_head != m.ready_tail) {
            enter_block();
            moved = true;
            left -= m.live == 0;
        }
        std::swap(static_cast<Block&>(m), block);
    }
    return moved;
}

void Turns::report_deadlock() const {
    for (const Block& block : blocks) {
        if (block.waits.empty()) continue;
        const Thread& thread = *block.waits.front().thread;
        report("deadlock", Place(thread.site),
               describe(thread) + " waits for other blocks, and no block can run");
        return;
    }
}

void Turns::clear() {
    for (Block& block : blocks) free(block.arena);
    blocks.clear();
}

int configuration_error() {
    const Launch& l = machine.launch;
    const uint64_t threads = uint64_t{l.block.x} * l.block.y * l.block.z;
    const uint64_t blocks = uint64_t{l.grid.x} * l.grid.y * l.grid.z;
    if (threads == 0 || threads > kMaxThreads || l.block.z > 64) {
        report("resources", Place(),
               "a block of " + std::to_string(threads) +
                   " threads; expected 1 to 1024, at most 64 of them along z");
        return kInvalidConfiguration;
    }
    if (blocks == 0 || l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535) {
        report("resources", Place(),
               "a grid of " + std::to_string(l.grid.x) + " x " + std::to_string(l.grid.y) + " x " +
                   std::to_string(l.grid.z) +
                   " blocks; expected at least 1, at most 65535 along y and along z");
        return kInvalidConfiguration;
    }
    if (machine.resident && blocks > static_cast<uint64_t>(resident_blocks(l.dynamic_bytes))) {
        report("resources", Place(),
               std::to_string(blocks) + " blocks at once, the limit is " +
                   std::to_string(resident_blocks(l.dynamic_bytes)));
        return kTooManyBlocks;
    }
    const auto most = static_cast<size_t>(machine.options.shared_memory);
    if (l.dynamic_bytes > most) {
        report("resources", Place(),
               std::to_string(l.dynamic_bytes) + " bytes of dynamic shared memory, the limit is " +
                   std::to_string(most));
        return kInvalidValue;
    }
    return 0;
}

void begin_reports() {
    Machine& m = machine;
    m.num_reports = 0;
    m.stopped = false;
    m.reported.clear();
    m.last_error.clear();
}

void prepare(const Launch& launch, bool resident, void (*body)(void*), void* arguments,
             size_t argument_bytes, std::vector<Buffer> declared) {
    Machine& m = machine;
    if (!m.threads) allocate(m);
    static_cast<Grid&>(m) = {};
    m.launch = launch;
    m.resident = m.in_turns = resident;
    m.body = body;
    m.arguments = arguments;
    m.argument_bytes = argument_bytes;
    m.buffers = std::move(declared);
    if (launch.dynamic_bytes > 0) {
        m.shared_arrays.push_back({nullptr, "dynamic shared memory", 0, launch.dynamic_bytes});
        m.shared_used = launch.dynamic_bytes;
    }
    m.random_state = (m.options.seed + 1) * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 8; ++i) m.random();
    m.early_copies = m.options.cp_async == CpAsync::kEarly ||
                     (m.options.cp_async == CpAsync::kBySeed && m.options.seed % 2 == 1);
    m.num_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    m.num_warps = (m.num_threads + kWarpSize - 1) / kWarpSize;
}

uint64_t num_blocks() {
    const dim3& grid = machine.launch.grid;
    return uint64_t{grid.x} * grid.y * grid.z;
}

void for_each_block(const std::function<void(uint3)>& f) {
    Machine& m = machine;
    const dim3 grid = m.launch.grid;
    const uint64_t blocks = num_blocks();
    // Blocks in random order, without a list of them: the step is coprime to their number.
    uint64_t step = 1, start = 0;
    if (m.options.seed != 0 && blocks > 1) {
        start = m.random() % blocks;
        do {
            step = 1 + m.random() % (blocks - 1);
        } while (std::gcd(step, blocks) != 1);
    }
    for (uint64_t i = 0; i < blocks && !m.stopped; ++i) {
        const uint64_t b = (start + i * step) % blocks;
        f({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
           static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))});
    }
}

namespace {

// The chain: earlier launches that a dependent launch may overlap, because they need not have ended
// when it starts. A launch starts a new chain if it is not dependent, or if all of its threads wait
// before they let the next launch start: all launches before it have then ended. Buffers that
// launches of the chain write are not constant for the dependent launch.
struct Written {
    std::string by;
    uintptr_t begin, end;
};
std::vector<Written> written_in_chain;

bool covers(const Buffer& b, uintptr_t begin, uintptr_t end) {
    return b.begin < end && begin < b.end;
}

}  // namespace

void check_chain() {
    if (!machine.launch.dependent) written_in_chain.clear();
    for (const Buffer& b : machine.buffers) {
        if (b.access != Access::kConstant) continue;
        for (const Written& w : written_in_chain) {
            if (!covers(b, w.begin, w.end)) continue;
            report("dependency", Place(),
                   std::string("a dependent launch may read ") + b.name +
                       " before grid_dependency_wait(), while " + w.by +
                       " may still be running and writes there");
            break;
        }
    }
}
void extend_chain() {
    const Launch& launch = machine.launch;
    if (launch.dependent && !machine.released_early) written_in_chain.clear();
    for (const Buffer& b : machine.buffers)
        if (b.access == Access::kWrite || b.access == Access::kReadWrite)
            written_in_chain.push_back({launch.kernel, b.begin, b.end});
}

void finish_grid() {
    Machine& m = machine;
    ++m.counters.launches;
    m.counters.threads += static_cast<int64_t>(num_blocks()) * m.num_threads;
    if (m.launch.dependent && !m.any_dependency_wait && !m.stopped) {
        report("dependency", Place(),
               "a dependent launch in which no thread calls grid_dependency_wait()");
    }
}

namespace {

int run_as(bool resident, const Launch& launch, void (*body)(void*), void* arguments,
           size_t argument_bytes) {
    std::lock_guard<std::mutex> guard(launch_lock);
    Machine& m = machine;
    if (m.options.overlapping != Overlapping::kNone) {
        enqueue(launch, resident, body, arguments, argument_bytes, std::move(declared));
        declared.clear();
        return 0;
    }
    begin_reports();
    prepare(launch, resident, body, arguments, argument_bytes, std::move(declared));
    declared.clear();
    check_chain();
    if (const int error = configuration_error()) {
        finish_reports();
        return error;
    }
    if (resident) {
        Turns turns;
        for_each_block(
            [&](uint3 index) { turns.add(index, static_cast<int>(turns.left) * m.num_threads); });
        while (turns.left > 0 && !m.stopped) {
            if (turns.run()) continue;
            turns.report_deadlock();
            break;
        }
    } else {
        for_each_block([](uint3 index) {
            prepare_block(index, 0);
            enter_block();
        });
    }
    finish_grid();
    extend_chain();
    forget_launch();
    finish_reports();
    return m.num_reports ? kLaunchFailure : 0;
}

}  // namespace

int run(const Launch& launch, void (*body)(void*), void* arguments, size_t argument_bytes) {
    return run_as(false, launch, body, arguments, argument_bytes);
}
int run_resident(const Launch& launch, void (*body)(void*), void* arguments,
                 size_t argument_bytes) {
    return run_as(true, launch, body, arguments, argument_bytes);
}

void declare(const char* name, const void* pointer, int64_t rows, int64_t row_bytes,
             int64_t row_stride_bytes, Access access) {
    if (!pointer || rows <= 0 || row_bytes <= 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    const auto end = begin + static_cast<uintptr_t>((rows - 1) * row_stride_bytes + row_bytes);
    if (rows == 1 || row_stride_bytes < row_bytes) row_stride_bytes = row_bytes;
    declared.push_back({name, begin, end, rows, row_bytes, row_stride_bytes, access, nullptr});
}

// Returns one block per multiprocessor, since the emulator does not model the occupancy of an H100.
int resident_blocks(size_t dynamic_bytes) {
    const bool fits = dynamic_bytes <= static_cast<size_t>(machine.options.shared_memory);
    return fits ? machine.options.multiprocessors : 0;
}

const Self& self() {
    return machine.current->self;
}

void* shared_array(const void* key, const char* name, size_t bytes) {
    Machine& m = machine;
    for (const SharedArray& a : m.shared_arrays) {
        if (a.key == key) return m.arena + a.begin;
    }
    const size_t begin = (m.shared_used + kGap + 15) / 16 * 16;
    m.static_bytes += (bytes + 15) / 16 * 16;
    if (m.static_bytes > kStaticSharedBytes) {
        fatal("resources", Place(),
              std::string("static shared memory exceeds 48 KiB with array ") + name);
    }
    const auto most = static_cast<size_t>(m.options.shared_memory);
    if (m.static_bytes + m.launch.dynamic_bytes > most ||
        begin + bytes > kArenaBytes + kArenaSlack) {
        fatal("resources", Place(),
              "shared memory exceeds " + std::to_string(most) + " bytes with array " + name);
    }
    m.shared_arrays.push_back({key, name, begin, bytes});
    memset(m.arena + m.shared_used, 0xff, begin + bytes - m.shared_used);
    m.shared_used = begin + bytes;
    return m.arena + begin;
}

unsigned char* dynamic_shared() {
    return machine.arena;
}

void make_ready(Thread* thread) {
    machine.ready[machine.ready_tail++ % kMaxThreads] = thread;
}

void block(const char* what, Site site) {
    machine.current->waits_in = what;
    machine.current->site = site;
    run_next();
}

void wait_for_blocks(const char* what, const unsigned* counter, unsigned least, Site site) {
    machine.waits.push_back({machine.current, counter, least});
    block(what, site);
}

void yield() {
    if (machine.options.seed == 0) return;
    make_ready(machine.current);
    run_next();
}

void stop_launch() {
    machine.stopped = true;
    machine.current = nullptr;
    Context unused;
    fiber_switch(&unused, &machine.host, nullptr);
    __builtin_unreachable();
}

// ------------------------------------------------------------------------------------------------
// Barriers

int block_barrier(BarrierVote vote, bool p, Site site) {
    Machine& m = machine;
    Thread& t = *m.current;
    t.vote = p;
    t.site = site;
    if (m.at_barrier == 0) {
        m.barrier_vote = vote;
    } else if (m.barrier_vote != vote) {
        fatal("divergence", Place(site),
              describe(t) + " and others wait in different kinds of syncthreads");
    }
    ++m.at_barrier;
    m.barrier_waiting.push_back(&t);
    if (m.at_barrier == m.live) {
        complete_block_barrier();
        const int result = m.barrier_result;
        yield();
        return result;
    }
    block("syncthreads", site);
    return m.barrier_result;
}

void named_barrier(int id, int threads, bool wait, Site site) {
    Machine& m = machine;
    Thread& t = *m.current;
    if (id < 1 || id > 15 || threads <= 0 || threads % kWarpSize != 0) {
        fatal("divergence", Place(site),
              "barrier " + std::to_string(id) + " for " + std::to_string(threads) +
                  " threads; expected an id of 1 to 15 and a multiple of 32 threads");
    }
    NamedBarrier& b = m.named[id];
    if (b.arrived == 0) {
        b.expected = threads;
    } else if (b.expected != threads) {
        fatal("divergence", Place(site),
              describe(t) + " joins barrier " + std::to_string(id) + " for " +
                  std::to_string(threads) + " threads, others expect " +
                  std::to_string(b.expected));
    }
    order_arrive(b);
    b.dependency_met |= t.dependency_met;
    if (wait) b.waiting.push_back(&t);
    if (++b.arrived == b.expected) {
        NamedBarrier done = std::move(b);
        b = NamedBarrier();
        for (Thread* waiter : done.waiting) {
            order_wait(done, *waiter);
            waiter->dependency_met |= done.dependency_met;
            if (waiter != &t) make_ready(waiter);
        }
        yield();
    } else if (wait) {
        block("bar_sync", site);
    }
}

// ------------------------------------------------------------------------------------------------
// Warp collectives

namespace {

void finish_collective(Warp& warp, Slot& slot) {
    Slot done = slot;
    slot.arrived = 0;
    done.compute(warp, done);
    for (unsigned lanes = done.arrived; lanes != 0; lanes &= lanes - 1) {
        Thread* t = &machine.threads[warp.index * kWarpSize + ffs(lanes) - 1];
        if (t != machine.current) make_ready(t);
    }
}

void release_collectives(Warp& warp) {
    for (int i = 0; i < warp.num_slots; ++i) {
        Slot& slot = warp.slots[i];
        if (slot.arrived != 0 && slot.arrived == (slot.mask & warp.live)) {
            finish_collective(warp, slot);
        }
    }
}

}  // namespace

void collective(const char* name, unsigned mask, void* operand, void (*compute)(Warp&, const Slot&),
                Site site) {
    Thread& t = *machine.current;
    Warp& w = *t.warp;
    const unsigned bit = 1u << t.lane;
    if (!(mask & bit)) {
        fatal("divergence", Place(site), describe(t) + " is not in its mask of " + name);
    }
    Slot* slot = nullptr;
    Slot* empty = nullptr;
    for (int i = 0; i < w.num_slots; ++i) {
        Slot& s = w.slots[i];
        if (s.arrived == 0) {
            empty = &s;
        } else if (s.mask == mask) {
            slot = &s;
            break;
        }
    }
    if (!slot) {
        slot = empty ? empty : &w.slots[w.num_slots++];
        slot->mask = mask;
        slot->name = name;
        slot->compute = compute;
    } else if (slot->name != name) {
        fatal("divergence", Place(site),
              "lanes of one warp wait in different warp instructions: " + describe(t) + " in " +
                  name + ", others in " + slot->name);
    }
    slot->arrived |= bit;
    slot->operands[t.lane] = operand;
    if (slot->arrived == (mask & w.live)) {
        finish_collective(w, *slot);
        yield();
    } else {
        block(name, site);
    }
}

}  // namespace lx::emu
