// Host implementation of the instructions that move and multiply tiles. Notation of the fragment
// layouts: lane L, g = L / 4, t = L % 4.
#include <cmath>
#include <cstring>

#include "emu/machine.h"

namespace lx {
namespace emu {

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
        machine.current = &thread_of(warp, lane);  // reports name the lane of the address
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
    // Changes the exponent bias from 15 to 127; infinity and NaN keep the largest exponent.
    uint32_t value = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    if (magnitude >= 0x7c00u << 13) value = magnitude | 0x7f800000u;
    return bit_cast<float>(value | (bits & 0x8000) << 16);
}

struct MmaOperand {
    float* d;
    const uint32_t *a, *b;
};

// Returns x rounded toward zero, as a tensor core rounds its sum; too large values are infinite.
float toward_zero(double x) {
    const float nearest = static_cast<float>(x);
    const bool away = std::fabs(nearest) > std::fabs(x) && std::isfinite(nearest);
    return away ? bit_cast<float>(bit_cast<uint32_t>(nearest) - 1) : nearest;
}

// Computes d += a b for 8 columns and all lanes. The callers gather A and B from the registers by
// the layouts below. Products are exact in double, and the error of their sum is negligible.
template <int kDepth>
void multiply(const Slot& slot, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
    double d[16][8];
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
            for (int j = 0; j < 8; ++j) d[i][j] += double{a[i][k]} * b[k][j];
        }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        float* to = static_cast<MmaOperand*>(slot.operands[lane])->d;
        const int g = lane / 4, t = lane % 4;
        to[0] = toward_zero(d[g][2 * t]);
        to[1] = toward_zero(d[g][2 * t + 1]);
        to[2] = toward_zero(d[g + 8][2 * t]);
        to[3] = toward_zero(d[g + 8][2 * t + 1]);
    }
}

template <float (*kValue)(uint32_t)>
void compute_mma_16(Warp&, const Slot& slot) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto& o = *static_cast<MmaOperand*>(slot.operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r) {  // rows g, g + 8; columns 2t, 2t + 1, 2t + 8, 2t + 9
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

// Stops the launch unless all 32 lanes are live: ldmatrix and mma are .sync.aligned.
void require_whole_warp(const char* name, Site site) {
    Thread& t = *machine.current;
    if (t.warp->live != kFullMask) {
        fatal("divergence", Place(site),
              describe(t) + " executes " + name + " in a warp with fewer than 32 live lanes");
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
              describe(*machine.current) + " passes cp.async a source size of " +
                  std::to_string(source_bytes) + "; expected 0 to " + std::to_string(bytes) +
                  " bytes");
    }
    check_shared(shared, static_cast<size_t>(bytes), "cp.async", place);
    const auto from = reinterpret_cast<uintptr_t>(global);
    if (from % static_cast<size_t>(bytes) != 0) {
        report("alignment", place,
               describe(*machine.current) + " passes cp.async a global address that is not " +
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
        memset(c.shared, 0xff, static_cast<size_t>(bytes));  // undefined until the copies complete
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

}  // namespace lx
