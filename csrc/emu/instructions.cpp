// Host implementation of the special instructions: warp collectives, atomics and others. matrix.cpp
// contains ldmatrix, mma and cp.async.
#include <algorithm>
#include <cstring>

#include "emu/machine.h"
#include "lx/pairs.h"
#include "lx/resident.h"

namespace lx {
namespace emu {

namespace {

template <class F>
void for_lanes(unsigned lanes, F f) {
    for (; lanes != 0; lanes &= lanes - 1) f(ffs(lanes) - 1);
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// Shuffles, votes, reductions

namespace {

struct ShuffleOperand {
    Shuffle kind;
    void* value;
    int bytes, operand, width;
    uint64_t before;
    Site site;
};

void compute_shuffle(Warp&, const Slot& slot) {
    for_lanes(slot.arrived, [&](int lane) {
        auto& o = *static_cast<ShuffleOperand*>(slot.operands[lane]);
        o.before = 0;
        memcpy(&o.before, o.value, static_cast<size_t>(o.bytes));
    });
    for_lanes(slot.arrived, [&](int lane) {
        auto& o = *static_cast<ShuffleOperand*>(slot.operands[lane]);
        const int first = lane & ~(o.width - 1), last = first + o.width - 1;
        int source = lane;
        switch (o.kind) {
            case Shuffle::kIndex:
                source = first | (o.operand & (o.width - 1));
                break;
            case Shuffle::kUp:
                source = lane - o.operand < first ? lane : lane - o.operand;
                break;
            case Shuffle::kDown:
                source = lane + o.operand > last ? lane : lane + o.operand;
                break;
            case Shuffle::kXor:  // may reach an earlier segment, not a later one
                source = (lane ^ o.operand) > last ? lane : lane ^ o.operand;
                break;
        }
        if (!(slot.arrived >> source & 1)) {
            report("divergence", Place(o.site),
                   "lane " + std::to_string(lane) + " shuffles from lane " +
                       std::to_string(source) + ", which does not participate");
            memset(o.value, 0xff, static_cast<size_t>(o.bytes));
            return;
        }
        memcpy(o.value, &static_cast<ShuffleOperand*>(slot.operands[source])->before,
               static_cast<size_t>(o.bytes));
    });
}

struct Value {
    uint64_t x;
    uint64_t result = 0;
    int op = 0;
    bool is_signed = false;
};

void compute_ballot(Warp&, const Slot& slot) {
    unsigned votes = 0;
    for_lanes(slot.arrived, [&](int lane) {
        if (static_cast<Value*>(slot.operands[lane])->x) votes |= 1u << lane;
    });
    for_lanes(slot.arrived,
              [&](int lane) { static_cast<Value*>(slot.operands[lane])->result = votes; });
}

void compute_match(Warp&, const Slot& slot) {
    for_lanes(slot.arrived, [&](int lane) {
        auto& mine = *static_cast<Value*>(slot.operands[lane]);
        for_lanes(slot.arrived, [&](int other) {
            if (static_cast<Value*>(slot.operands[other])->x == mine.x) {
                mine.result |= uint64_t{1} << other;
            }
        });
    });
}

uint32_t combine(Reduce op, bool is_signed, uint32_t a, uint32_t b) {
    const bool less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
    switch (op) {
        case Reduce::kAdd:
            return a + b;
        case Reduce::kMin:
            return less ? a : b;
        case Reduce::kMax:
            return less ? b : a;
        case Reduce::kAnd:
            return a & b;
        case Reduce::kOr:
            return a | b;
        case Reduce::kXor:
            return a ^ b;
    }
    return 0;
}

void compute_reduce(Warp&, const Slot& slot) {
    auto& first = *static_cast<Value*>(slot.operands[ffs(slot.arrived) - 1]);
    auto total = static_cast<uint32_t>(first.x);
    for_lanes(slot.arrived & (slot.arrived - 1), [&](int lane) {
        const auto x = static_cast<uint32_t>(static_cast<Value*>(slot.operands[lane])->x);
        total = combine(static_cast<Reduce>(first.op), first.is_signed, total, x);
    });
    for_lanes(slot.arrived,
              [&](int lane) { static_cast<Value*>(slot.operands[lane])->result = total; });
}

void compute_syncwarp(Warp& warp, const Slot& slot) {
    order_syncwarp(warp, slot.arrived);
    bool met = false;
    for_lanes(slot.arrived, [&](int lane) { met |= thread_of(warp, lane).dependency_met; });
    for_lanes(slot.arrived, [&](int lane) { thread_of(warp, lane).dependency_met = met; });
}

}  // namespace

void shuffle(Shuffle kind, unsigned mask, void* value, int bytes, int operand, int width,
             Site site) {
    static const char* const names[] = {"shfl_sync", "shfl_up_sync", "shfl_down_sync",
                                        "shfl_xor_sync"};
    ShuffleOperand o{kind, value, bytes, operand, width, 0, site};
    collective(names[static_cast<int>(kind)], mask, &o, compute_shuffle, site);
}

unsigned match_any(unsigned mask, uint64_t bits, Site site) {
    Value v{bits};
    collective("match_any_sync", mask, &v, compute_match, site);
    return static_cast<unsigned>(v.result);
}

uint32_t reduce(Reduce op, bool is_signed, unsigned mask, uint32_t x, Site site) {
    static const char* const names[] = {"reduce_add_sync", "reduce_min_sync", "reduce_max_sync",
                                        "reduce_and_sync", "reduce_or_sync",  "reduce_xor_sync"};
    Value v{x, 0, static_cast<int>(op), is_signed};
    collective(names[static_cast<int>(op)], mask, &v, compute_reduce, site);
    return static_cast<uint32_t>(v.result);
}

// ------------------------------------------------------------------------------------------------
// Atomics and fences

namespace {

template <class U, class S>
uint64_t atomic_step(Atomic op, void* p, bool is_signed, U x, U expected) {
    U old, next = x;
    memcpy(&old, p, sizeof old);
    const bool less = is_signed ? static_cast<S>(x) < static_cast<S>(old) : x < old;
    switch (op) {
        case Atomic::kAdd:
            next = old + x;
            break;
        case Atomic::kMin:
            next = less ? x : old;
            break;
        case Atomic::kMax:
            next = less ? old : x;
            break;
        case Atomic::kAnd:
            next = old & x;
            break;
        case Atomic::kOr:
            next = old | x;
            break;
        case Atomic::kExchange:
            break;
        case Atomic::kCompareExchange:
            next = old == expected ? x : old;
            break;
    }
    memcpy(p, &next, sizeof next);
    return old;
}

}  // namespace

void wait_at_least(const unsigned* counter, unsigned least, Site site) {
    if (!machine.resident)
        fatal("deadlock", Place(site),
              describe(*machine.current) +
                  " waits for other blocks; launch the kernel with LX_LAUNCH_RESIDENT");
    touch(counter, sizeof(unsigned), Touch::kAtomic, true, Place(site));
    while (*counter < least) wait_for_blocks("wait_at_least", counter, least, site);
    order_waited(counter, least);
}

uint64_t atomic(Atomic op, void* p, int bytes, bool is_signed, uint64_t x, uint64_t expected,
                Site site) {
    touch(p, static_cast<size_t>(bytes), Touch::kAtomic, true, Place(site));
    order_atomic(p);
    const uint64_t old =
        bytes == 4 ? atomic_step<uint32_t, int32_t>(op, p, is_signed, static_cast<uint32_t>(x),
                                                    static_cast<uint32_t>(expected))
                   : atomic_step<uint64_t, int64_t>(op, p, is_signed, x, expected);
    order_count(p, bytes == 4 ? *static_cast<uint32_t*>(p) : *static_cast<uint64_t*>(p));
    yield();
    return old;
}

void fence() {
    order_fence();
}

}  // namespace emu

void syncwarp(unsigned mask, emu::Site site) {
    emu::collective("syncwarp", mask, nullptr, emu::compute_syncwarp, site);
}

unsigned ballot_sync(unsigned mask, bool p, emu::Site site) {
    emu::Value v{p};
    emu::collective("vote_sync", mask, &v, emu::compute_ballot, site);
    return static_cast<unsigned>(v.result);
}

// Without overlapping launches no dependent kernel starts early, but its accesses are checked.
void grid_dependency_wait() {
    emu::wait_for_launch();
    emu::machine.current->dependency_met = true;
    emu::machine.any_dependency_wait = true;
}
void grid_dependency_launch() {
    emu::machine.released_early |= !emu::machine.current->dependency_met;
    emu::let_launch_start();
}

uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emu::machine.arena);
}

uint32_t to_tf32(float x) {
    const auto bits = bit_cast<uint32_t>(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits & ~0x1fffu;  // infinity, NaN
    return (bits + 0x1000u) & ~0x1fffu;
}

unsigned brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}

unsigned byte_permute(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    unsigned y = 0;
    for (int i = 0; i < 4; ++i)
        y |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return y;
}

namespace {
// For numbers of p bits, a float has at least 2p + 2 bits. Rounding their difference to float and
// then to p bits therefore gives the same result as rounding it once.
template <class T>
uint32_t subtract(uint32_t a, uint32_t b) {
    const float2 x = unpack_floats<T>(a), y = unpack_floats<T>(b);
    return pack_floats<T>(x.x - y.x, x.y - y.y);
}
template <class T>
uint32_t multiply(uint32_t a, uint32_t b) {
    const float2 x = unpack_floats<T>(a), y = unpack_floats<T>(b);
    return pack_floats<T>(x.x * y.x, x.y * y.y);
}
}  // namespace
uint32_t subtract_bf16(uint32_t a, uint32_t b) {
    return subtract<bf16>(a, b);
}
uint32_t subtract_f16(uint32_t a, uint32_t b) {
    return subtract<f16>(a, b);
}
uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    return multiply<bf16>(a, b);
}
uint32_t multiply_f16(uint32_t a, uint32_t b) {
    return multiply<f16>(a, b);
}

void trap(emu::Site site) {
    emu::fatal("trap", emu::Place(site), emu::describe(*emu::machine.current));
}

}  // namespace lx
