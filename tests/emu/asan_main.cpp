// A tf32 matrix product in the asan flavour, which must be exact. With any argument, buffer x is
// one element too short.
#include <cstdint>
#include <cstdio>
#include <memory>

#include "emu/emu.h"

extern "C" int matmul_tf32(const float* x, const float* w, float* y, int64_t m, int64_t n,
                           int64_t k);

int main(int count, char**) {
    constexpr int64_t kM = 17, kN = 9, kK = 12;
    const int64_t missing =
        count > 1 ? 1 : 0;  // the launcher declares the full size: only asan detects the overrun
    for (uint64_t seed = 0; seed < 3; ++seed) {
        lx::emu::set_seed(seed);
        auto x = std::make_unique<float[]>(kM * kK - missing);
        auto w = std::make_unique<float[]>(kN * kK);
        auto y = std::make_unique<float[]>(kM * kN);
        for (int64_t i = 0; i < kM * kK - missing; ++i) x[i] = static_cast<float>(i % 7 - 3);
        for (int64_t i = 0; i < kN * kK; ++i) w[i] = static_cast<float>(i % 5 - 2);
        if (matmul_tf32(x.get(), w.get(), y.get(), kM, kN, kK) != 0) return 2;
        for (int64_t i = 0; i < kM * kN; ++i) {
            float expected = 0;
            for (int64_t k = 0; k < kK; ++k) expected += x[i / kN * kK + k] * w[i % kN * kK + k];
            if (y[i] != expected) return 3;
        }
    }
    puts("exact");
}
