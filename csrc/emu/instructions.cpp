// Host bodies of the special instructions. Notation of the fragment layouts: lane L, g = L / 4, t =
// L % 4.
#include <algorithm>
#include <cstring>

#include "emu/machine.h"

namespace lx {
namespace emu {

namespace {

Thread& thread_of(const Warp& warp, int lane) {
    return machine.threads[warp.index * kWarpSize + lane];
}

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
                       std::to_string(source) + ", which does not take part");
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

uint64_t atomic(Atomic op, void* p, int bytes, bool is_signed, uint64_t x, uint64_t expected,
                Site site) {
    touch(p, static_cast<size_t>(bytes), Touch::kAtomic, true, Place(site));
    order_atomic(p);
    const uint64_t old =
        bytes == 4 ? atomic_step<uint32_t, int32_t>(op, p, is_signed, static_cast<uint32_t>(x),
                                                    static_cast<uint32_t>(expected))
                   : atomic_step<uint64_t, int64_t>(op, p, is_signed, x, expected);
    yield();
    return old;
}

void fence() {
    order_fence();
}

// ------------------------------------------------------------------------------------------------
// ldmatrix and mma

namespace {

struct LdmatrixOperand {
    uint32_t* r;
    const unsigned char* row;
    int matrices;
    bool transposed;
    Site site;
};

void compute_ldmatrix(Warp& warp, const Slot& slot) {
    const auto& o0 = *static_cast<LdmatrixOperand*>(slot.operands[0]);
    Thread* const current = machine.current;
    uint16_t rows[32][8];
    for (int lane = 0; lane < 8 * o0.matrices; ++lane) {
        const auto& o = *static_cast<LdmatrixOperand*>(slot.operands[lane]);
        machine.current = &thread_of(warp, lane);  // the lane that gave the address reads
        check_shared(o.row, 16, "ldmatrix", Place(o.site));
        touch(o.row, 16, Touch::kRead, true, Place(o.site));
        memcpy(rows[lane], o.row, 16);
    }
    machine.current = current;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto& o = *static_cast<LdmatrixOperand*>(slot.operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < o0.matrices; ++i) {
            const uint16_t low = o0.transposed ? rows[8 * i + 2 * t][g] : rows[8 * i + g][2 * t];
            const uint16_t high =
                o0.transposed ? rows[8 * i + 2 * t + 1][g] : rows[8 * i + g][2 * t + 1];
            o.r[i] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

float bf16_value(uint32_t bits) {
    return bit_cast<float>(bits << 16);
}

float f16_value(uint32_t bits) {
    const uint32_t magnitude = (bits & 0x7fff) << 13;
    // Exponent bias 15 to 127, for subnormals too; infinity and NaN keep the largest exponent.
    uint32_t value = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    if (magnitude >= 0x7c00u << 13) value = magnitude | 0x7f800000u;
    return bit_cast<float>(value | (bits & 0x8000) << 16);
}

struct MmaOperand {
    float* d;
    const uint32_t *a, *b;
};

// d += a b for kColumns = 8 and all lanes; element k of A and B come in registers of the layouts
// below.
template <int kDepth>
void multiply(const Slot& slot, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
    float d[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const float* from = static_cast<MmaOperand*>(slot.operands[lane])->d;
        const int g = lane / 4, t = lane % 4;
        d[g][2 * t] = from[0];
        d[g][2 * t + 1] = from[1];
        d[g + 8][2 * t] = from[2];
        d[g + 8][2 * t + 1] = from[3];
    }
    for (int k = 0; k < kDepth; ++k) {
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        float* to = static_cast<MmaOperand*>(slot.operands[lane])->d;
        const int g = lane / 4, t = lane % 4;
        to[0] = d[g][2 * t];
        to[1] = d[g][2 * t + 1];
        to[2] = d[g + 8][2 * t];
        to[3] = d[g + 8][2 * t + 1];
    }
}

template <float (*kValue)(uint32_t)>
void compute_mma_16(Warp&, const Slot& slot) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto& o = *static_cast<MmaOperand*>(slot.operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r) {  // rows g, g + 8; columns 2t.., 2t + 8..
            const int row = g + 8 * (r % 2), column = 2 * t + 8 * (r / 2);
            a[row][column] = kValue(o.a[r] & 0xffff);
            a[row][column + 1] = kValue(o.a[r] >> 16);
        }
        for (int r = 0; r < 2; ++r) {
            const int row = 2 * t + 8 * r;
            b[row][g] = kValue(o.b[r] & 0xffff);
            b[row + 1][g] = kValue(o.b[r] >> 16);
        }
    }
    multiply(slot, a, b);
}

void compute_mma_tf32(Warp&, const Slot& slot) {
    auto value = [](uint32_t bits) { return bit_cast<float>(bits & ~0x1fffu); };
    float a[16][8], b[8][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto& o = *static_cast<MmaOperand*>(slot.operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = value(o.a[r]);
        for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = value(o.b[r]);
    }
    multiply(slot, a, b);
}

// ldmatrix and mma are .sync.aligned: all 32 lanes, none of them gone.
void require_whole_warp(const char* name, Site site) {
    Thread& t = *machine.current;
    if (t.warp->live != kFullMask) {
        fatal("divergence", Place(site),
              describe(t) + " executes " + name + " in a warp that misses lanes");
    }
}

void mma(const char* name, float* d, const uint32_t* a, const uint32_t* b,
         void (*compute)(Warp&, const Slot&), Site site) {
    require_whole_warp(name, site);
    MmaOperand o{d, a, b};
    collective(name, kFullMask, &o, compute, site);
}

}  // namespace

void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed, Site site) {
    static const char* const names[] = {"ldmatrix_x1",       "ldmatrix_x2",
                                        "ldmatrix_x4",       "ldmatrix_x1_trans",
                                        "ldmatrix_x2_trans", "ldmatrix_x4_trans"};
    const char* name = names[matrices / 2 + (transposed ? 3 : 0)];
    require_whole_warp(name, site);
    LdmatrixOperand o{r, static_cast<const unsigned char*>(row), matrices, transposed, site};
    collective(name, kFullMask, &o, compute_ldmatrix, site);
}
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    mma("mma_m16n8k16<bf16>", d, a, b, compute_mma_16<bf16_value>, site);
}
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    mma("mma_m16n8k16<f16>", d, a, b, compute_mma_16<f16_value>, site);
}
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    mma("mma_m16n8k8_tf32", d, a, b, compute_mma_tf32, site);
}

// ------------------------------------------------------------------------------------------------
// cp.async

namespace {

void land(const Copy& c) {
    touch_async(c.shared, static_cast<size_t>(c.bytes), AsyncStep::kLand, Place(c.site));
    if (machine.early_copies) return;
    memcpy(c.shared, c.global, static_cast<size_t>(c.source_bytes));
    memset(c.shared + c.source_bytes, 0, static_cast<size_t>(c.bytes - c.source_bytes));
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Site site) {
    const Place place(site);
    if (source_bytes < 0 || source_bytes > bytes) {
        fatal("bounds", place,
              describe(*machine.current) + " gives cp.async a source size of " +
                  std::to_string(source_bytes) + " of " + std::to_string(bytes) + " bytes");
    }
    check_shared(shared, static_cast<size_t>(bytes), "cp.async", place);
    const auto from = reinterpret_cast<uintptr_t>(global);
    if (from % static_cast<size_t>(bytes) != 0) {
        report("alignment", place,
               describe(*machine.current) + " gives cp.async a global address that is not " +
                   std::to_string(bytes) + "-byte aligned");
    }
    if (source_bytes > 0) {
        touch(global, static_cast<size_t>(source_bytes), Touch::kRead, false, place);
    }
    touch_async(shared, static_cast<size_t>(bytes), AsyncStep::kIssue, place);
    Copy c{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
           source_bytes, site};
    if (machine.early_copies) {
        memcpy(c.shared, c.global, static_cast<size_t>(source_bytes));
        memset(c.shared + source_bytes, 0, static_cast<size_t>(bytes - source_bytes));
    } else {
        memset(c.shared, 0xff, static_cast<size_t>(bytes));  // undefined until they land
    }
    machine.current->open_copies.push_back(c);
}

}  // namespace emu

void cp_async_commit() {
    emu::Thread& t = *emu::machine.current;
    t.copy_groups.push_back(std::move(t.open_copies));
    t.open_copies.clear();
}

void cp_async_wait(int pending) {
    emu::Thread& t = *emu::machine.current;
    const int landing = static_cast<int>(t.copy_groups.size()) - pending;
    if (landing <= 0) return;
    for (int i = 0; i < landing; ++i) {
        for (const emu::Copy& c : t.copy_groups[i]) emu::land(c);
    }
    t.copy_groups.erase(t.copy_groups.begin(), t.copy_groups.begin() + landing);
}

void cp_async_wait_all() {
    cp_async_commit();
    cp_async_wait(0);
}

void syncwarp(unsigned mask, emu::Site site) {
    emu::collective("syncwarp", mask, nullptr, emu::compute_syncwarp, site);
}

unsigned ballot_sync(unsigned mask, bool p, emu::Site site) {
    emu::Value v{p};
    emu::collective("vote_sync", mask, &v, emu::compute_ballot, site);
    return static_cast<unsigned>(v.result);
}

void grid_dependency_wait() {
    emu::machine.current->dependency_met = true;
    emu::machine.any_dependency_wait = true;
}
void grid_dependency_launch() {
}  // the emulator starts nothing early; the dependent kernel is checked

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

void trap(emu::Site site) {
    emu::fatal("trap", emu::Place(site), emu::describe(*emu::machine.current));
}

}  // namespace lx
