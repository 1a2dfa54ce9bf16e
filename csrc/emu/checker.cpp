// Every access of a kernel calls touch(). Bounds, permission and alignment depend on the address
// only. Races and initialisation are checked with shadow memory: one Cell per two bytes.
//
// Order. Two accesses to a cell, at least one of them a write and not both atomic, must be ordered:
//   same thread             program order
//   lanes of one warp       syncwarp, by a vector clock over the warp's lanes
//   warps of one block      syncthreads and named barriers, by a vector clock over the block's
//                           warps
//   blocks of one launch    only fence_device and then an atomic in the earlier block (after a
//                           barrier, for accesses of its other warps), followed by an atomic on the
//                           same address and then fence_device in the later block
// Shuffles, votes, ldmatrix and mma order nothing. With respect to other warps, all lanes share the
// clock of their warp. The checker may therefore take an access by a lane after its bar_arrive for
// one before the bar_arrive of a later lane. This can hide a race, but it never causes a false
// report. (Correct writes of two threads to adjacent single bytes are reported, since the bytes
// share a Cell.)
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>

#include "emu/machine.h"

namespace lx::emu {

namespace {

constexpr size_t kCellBytes = 2;

std::string bytes_text(size_t bytes) {
    return std::to_string(bytes) + " bytes";
}
const char* verb(Touch how) {
    return how == Touch::kRead ? "reads" : how == Touch::kWrite ? "writes" : "atomically updates";
}

// --- Between blocks: clocks published by fence and atomic
// Clocks that each block has acquired; in an ordinary launch only those of the current block.
std::unordered_map<uint32_t, BlockClocks> acquired;
std::unordered_map<const void*, BlockClocks> released;  // key: address of the atomic
// Released clocks for each value of a counter. A thread that waits for a value is ordered after the
// atomics that led to this value, but not after later ones.
std::unordered_map<const void*, std::vector<std::pair<uint64_t, BlockClocks>>> counted;

bool ordered(const Record& before, const Thread& now) {
    const int warp = before.thread / kWarpSize;
    if (before.block != machine.block_serial) {
        const auto own = acquired.find(machine.block_serial);
        if (own == acquired.end()) return false;
        const auto found = own->second.find(before.block);
        return found != own->second.end() && before.clock <= found->second[warp];
    }
    if (before.thread == now.rank) return true;
    const Warp& w = *now.warp;
    if (warp != w.index) return before.clock <= w.clock[warp];
    return before.clock < w.clock[warp] ||
           before.lane_clock <= w.lane_clock[now.lane][before.thread % kWarpSize];
}

std::string describe_record(const Record& r) {
    const dim3 size = machine.launch.block;
    const unsigned i = r.thread;
    std::string text = "thread (" + std::to_string(i % size.x) + "," +
                       std::to_string(i / size.x % size.y) + "," +
                       std::to_string(i / (size.x * size.y)) + ")";
    if (r.block != machine.block_serial) text += " of another block";
    return text;
}

Record record_of(const Thread& t, bool atomic) {
    const Warp& w = *t.warp;
    return {machine.block_serial,          w.clock[w.index], w.lane_clock[t.lane][t.lane],
            static_cast<uint16_t>(t.rank), atomic,           false};
}

// Checks an access to cells [first, last] and records it. If `shared`, the cells are shared memory,
// for which records of earlier blocks do not count.
void shadow(Cell* cells, size_t first, size_t last, Touch how, bool shared, bool must_be_written,
            const char* name, const Place& place) {
    const Thread& t = *machine.current;
    const bool writes = how != Touch::kRead, atomic = how == Touch::kAtomic;
    const Record mine = record_of(t, atomic);
    auto exists = [&](const Record& r) {
        return r.block != 0 && (!shared || r.block == machine.block_serial);
    };
    auto conflict = [&](const Record& r, const char* earlier) {
        if (!exists(r) || (atomic && r.atomic) || ordered(r, t)) return;
        report("race", place,
               describe(t) + " " + verb(how) + " " + name + ", " + earlier + " by " +
                   describe_record(r) + " without synchronisation");
    };
    for (size_t i = first; i <= last; ++i) {
        Cell& c = cells[i];
        if (c.writer.in_flight && exists(c.writer)) {
            report("asynchrony", place,
                   describe(t) + " " + verb(how) + " " + name + " where a cp.async of " +
                       describe_record(c.writer) + " is still in flight");
        }
        if (must_be_written && how != Touch::kWrite && !exists(c.writer)) {
            report("initialisation", place,
                   describe(t) + " " + verb(how) + " " + name + " before a thread has written it");
        }
        conflict(c.writer, "written");
        if (writes) {
            conflict(c.reader, "read");
            conflict(c.reader_of_other_warp, "read");
            c.writer = mine;
        } else {
            const bool same_warp = c.reader.block == mine.block &&
                                   c.reader.thread / kWarpSize == mine.thread / kWarpSize;
            if (!same_warp) c.reader_of_other_warp = c.reader;
            c.reader = mine;
        }
    }
}

Cell* make_cells(size_t count) {
    return static_cast<Cell*>(calloc(count, sizeof(Cell)));  // untouched pages use no memory
}

const SharedArray* find_shared(size_t offset, size_t bytes) {
    for (const SharedArray& a : machine.shared_arrays) {
        if (offset >= a.begin && offset + bytes <= a.begin + a.bytes) return &a;
    }
    return nullptr;
}

bool in_one_row(const Buffer& b, uintptr_t p, size_t bytes) {
    if (p < b.begin || p + bytes > b.end) return false;
    if (b.rows == 1) return true;
    const auto within = static_cast<int64_t>(p - b.begin) % b.row_stride;
    return within + static_cast<int64_t>(bytes) <= b.row_bytes;
}

std::string nearest(uintptr_t p) {
    const Machine& m = machine;
    const auto arena = reinterpret_cast<uintptr_t>(m.arena);
    if (p >= arena && p < arena + kArenaBytes + kArenaSlack) {
        const SharedArray* best = nullptr;
        for (const SharedArray& a : m.shared_arrays) {
            if (arena + a.begin <= p && (!best || a.begin > best->begin)) best = &a;
        }
        if (!best) return "shared memory";
        return "shared " + std::string(best->name) + " + " +
               std::to_string(p - arena - best->begin) + " of " + bytes_text(best->bytes);
    }
    const Buffer* best = nullptr;
    intptr_t best_gap = 1 << 20;
    for (const Buffer& b : m.buffers) {
        const intptr_t gap = p < b.begin  ? static_cast<intptr_t>(b.begin - p)
                             : p >= b.end ? static_cast<intptr_t>(p - b.end)
                                          : 0;
        if (gap < best_gap) {
            best = &b;
            best_gap = gap;
        }
    }
    if (!best) return "an address that is not near a declared buffer";
    const auto offset = static_cast<intptr_t>(p - best->begin);
    return std::string(best->name) + (offset < 0 ? " - " : " + ") +
           std::to_string(std::abs(offset)) + " of " + bytes_text(best->end - best->begin) +
           (best->rows > 1 ? " (in rows of " + bytes_text(static_cast<size_t>(best->row_bytes)) +
                                 ", " + std::to_string(best->row_stride) + " apart)"
                           : "");
}

// Returns whether p is read-only data (tables, string literals) of the kernel's object file.
bool in_program(uintptr_t p, const void* code) {
    struct Query {
        uintptr_t code, p;
        bool found;
    } query{reinterpret_cast<uintptr_t>(code), p, false};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& q = *static_cast<Query*>(data);
            bool has_code = false, has_p = false;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& h = info->dlpi_phdr[i];
                if (h.p_type != PT_LOAD) continue;
                const uintptr_t begin = info->dlpi_addr + h.p_vaddr, end = begin + h.p_memsz;
                has_code |= begin <= q.code && q.code < end;
                has_p |= begin <= q.p && q.p < end;
            }
            q.found |= has_code && has_p;
            return 0;
        },
        &query);
    return query.found;
}

void check_dependency(const Buffer& b, Touch how, const Place& place) {
    if (b.access == Access::kConstant || machine.current->dependency_met) return;
    report("dependency", place,
           describe(*machine.current) + " " + verb(how) + " " + b.name +
               " before grid_dependency_wait() orders it after the previous kernel");
}

}  // namespace

void touch(const void* pointer, size_t bytes, Touch how, bool must_align, const Place& place) {
    Machine& m = machine;
    Thread& t = *m.current;
    const auto p = reinterpret_cast<uintptr_t>(pointer);
    const auto within = [&](const void* low, size_t size) {
        const auto begin = reinterpret_cast<uintptr_t>(low);
        return p >= begin && p + bytes <= begin + size;
    };
    if (within(t.stack.low, static_cast<size_t>(t.stack.high - t.stack.low))) return;
    const char* name = nullptr;
    Cell* cells = nullptr;
    uintptr_t base = 0;
    bool shared = false, must_be_written = false;
    if (within(m.arena, kArenaBytes + kArenaSlack)) {
        base = reinterpret_cast<uintptr_t>(m.arena);
        const SharedArray* a = find_shared(p - base, bytes);
        if (a) {
            name = a->name;
            shared = must_be_written = true;
            if (m.checked()) {
                if (!m.arena_cells) {
                    m.arena_cells.reset(make_cells((kArenaBytes + kArenaSlack) / kCellBytes));
                }
                cells = m.arena_cells.get();
            }
        }
    } else {
        if (how == Touch::kRead && (within(m.threads.get(), kMaxThreads * sizeof(Thread)) ||
                                    within(m.arguments, m.argument_bytes))) {
            return;
        }
        Buffer* found = nullptr;
        for (Buffer& b : m.buffers) {
            if (!in_one_row(b, p, bytes)) continue;
            const bool allowed =
                how == Touch::kRead || b.access == Access::kWrite || b.access == Access::kReadWrite;
            if (!found || allowed) found = &b;
            if (allowed) break;
        }
        if (found) {
            name = found->name;
            const bool writable =
                found->access == Access::kWrite || found->access == Access::kReadWrite;
            if (how != Touch::kRead && !writable) {
                fatal("permission", place,
                      describe(t) + " " + verb(how) + " " + bytes_text(bytes) + " of " +
                          found->name + ", which is declared read-only");
            }
            check_dependency(*found, how, place);
            if (writable && m.checked()) {
                if (!found->cells) {
                    found->cells.reset(make_cells((found->end - found->begin) / kCellBytes + 2));
                }
                cells = found->cells.get();
                base = found->begin & ~(kCellBytes - 1);
                must_be_written = found->access == Access::kWrite;
            }
        } else if (how == Touch::kRead && place.code && in_program(p, place.code)) {
            return;
        }
    }
    if (!name) {
        fatal("bounds", place,
              describe(t) + " " + verb(how) + " " + bytes_text(bytes) + " at " + nearest(p));
    }
    if (must_align && p % bytes != 0) {
        report("alignment", place,
               describe(t) + " " + verb(how) + " " + bytes_text(bytes) + " of " + name +
                   " at an address that is not aligned to this size");
    }
    if (cells) {
        shadow(cells, (p - base) / kCellBytes, (p + bytes - 1 - base) / kCellBytes, how, shared,
               must_be_written, name, place);
    }
}

void check_shared(const void* pointer, size_t bytes, const char* instruction, const Place& place) {
    const size_t offset =
        static_cast<size_t>(static_cast<const unsigned char*>(pointer) - machine.arena);
    if (offset >= kArenaBytes + kArenaSlack || !find_shared(offset, bytes)) {
        fatal("bounds", place,
              describe(*machine.current) + " passes " + instruction + " " + bytes_text(bytes) +
                  " at " + nearest(reinterpret_cast<uintptr_t>(pointer)) +
                  ", which is not inside shared memory");
    }
    if (offset % bytes != 0) {
        report("alignment", place,
               describe(*machine.current) + " passes " + instruction +
                   " a shared address that is not " + std::to_string(bytes) + "-byte aligned");
    }
}

void touch_async(const void* pointer, size_t bytes, AsyncStep step, const Place& place) {
    Machine& m = machine;
    if (!m.checked()) return;
    const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - m.arena);
    if (step == AsyncStep::kLand) {  // conflicts since the issue are reported separately
        for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
            m.arena_cells[i].writer.in_flight = false;
        }
    }
    touch(pointer, bytes, Touch::kWrite, false, place);
    if (step == AsyncStep::kIssue) {
        for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
            m.arena_cells[i].writer.in_flight = true;
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Order

namespace {

void join(BlockClock& into, const BlockClock& from) {
    for (int i = 0; i < kMaxWarps; ++i) into[i] = std::max(into[i], from[i]);
}
void join(BlockClocks& into, const BlockClocks& from) {
    for (const auto& [block, clock] : from) join(into[block], clock);
}
bool in_arena(const void* p) {
    const auto offset = static_cast<const unsigned char*>(p) - machine.arena;
    return offset >= 0 && offset < static_cast<ptrdiff_t>(kArenaBytes + kArenaSlack);
}

}  // namespace

void order_block_barrier() {
    Machine& m = machine;
    if (!m.checked()) return;
    BlockClock all{};
    for (int i = 0; i < m.num_warps; ++i) all[i] = m.warps[i].clock[i];
    for (int i = 0; i < m.num_warps; ++i) {
        m.warps[i].clock = all;
        ++m.warps[i].clock[i];
    }
}

void order_arrive(NamedBarrier& barrier) {
    if (!machine.checked()) return;
    Warp& w = *machine.current->warp;
    join(barrier.clock, w.clock);
    ++w.clock[w.index];
}

void order_wait(NamedBarrier& barrier, Thread& thread) {
    if (!machine.checked()) return;
    Warp& w = *thread.warp;
    const uint32_t own = w.clock[w.index];
    join(w.clock, barrier.clock);
    w.clock[w.index] = own;
}

void order_syncwarp(Warp& warp, unsigned mask) {
    if (!machine.checked()) return;
    std::array<uint32_t, kWarpSize> all{};
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!(mask >> lane & 1)) continue;
        for (int i = 0; i < kWarpSize; ++i) all[i] = std::max(all[i], warp.lane_clock[lane][i]);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!(mask >> lane & 1)) continue;
        warp.lane_clock[lane] = all;
        ++warp.lane_clock[lane][lane];
    }
}

void order_fence() {
    if (!machine.checked()) return;
    Thread& t = *machine.current;
    Warp& w = *t.warp;
    t.fenced = true;
    t.fence_clock = w.clock;
    ++w.clock[w.index];  // later accesses are not published
    if (!machine.in_turns && !acquired.count(machine.block_serial)) acquired.clear();
    join(acquired[machine.block_serial], t.seen);
    t.seen.clear();
}

void order_atomic(const void* p) {
    if (!machine.checked()) return;
    Thread& t = *machine.current;
    if (in_arena(p)) return;
    join(t.seen, released[p]);
    if (t.fenced) join(released[p][machine.block_serial], t.fence_clock);
}

void order_count(const void* p, uint64_t value) {
    if (machine.checked() && machine.resident && !in_arena(p))
        counted[p].emplace_back(value, released[p]);
}

void order_waited(const void* p, uint64_t least) {
    if (!machine.checked()) return;
    for (const auto& [value, clocks] : counted[p]) {
        if (value < least) continue;
        join(machine.current->seen, clocks);
        return;
    }
}

void forget_launch() {
    machine.buffers.clear();
    acquired.clear();
    released.clear();
    counted.clear();
}

}  // namespace lx::emu
