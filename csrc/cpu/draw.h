// Draws an index with a probability proportional to its weight. Shared by all ops that sample.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int64_t kDrawn = 32;  // weights summed at once

template <typename A>
LX_INLINE double sum_of(const A* p, int64_t n) {
    double sums[8] = {};
    for (int64_t i = 0; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += p[i + j];
    for (int64_t i = n / 8 * 8; i < n; ++i) sums[i % 8] += p[i];
    for (int width = 4; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
    return sums[0];
}

// Return the first index whose running sum exceeds uniform * total; its weight is never zero. If
// rounding leaves no such index, return the last index of nonzero weight, or 0. Sums are double, so
// that small weights are not lost in the sum.
template <typename A>
int64_t draw(const A* p, int64_t n, double uniform) {
    const auto sum_from = [&](int64_t i) { return sum_of(p + i, min(kDrawn, n - i)); };
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; i += kDrawn) total += sum_from(i);
    const double limit = uniform * total;
    int64_t end = n;
    for (int64_t i = 0; i < n; i += kDrawn) {
        const double next = sum + sum_from(i);
        if (next > limit) {
            end = min(i + kDrawn, n);
            for (; i < end; ++i) {
                sum += p[i];
                if (p[i] > 0 && sum > limit) return i;
            }
            break;
        }
        sum = next;
    }
    for (int64_t i = end - 1; i > 0; --i)
        if (p[i] > 0) return i;
    return 0;
}

}  // namespace
}  // namespace lora_ext::LX_ISA
