// Helpers of the tests of the CPU twins: failures, random numbers and storage types.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

#include "lora_ext/common.h"

namespace lora_ext {

inline int failures = 0;
#define EXPECT(condition, ...)                          \
    do {                                                \
        if (!(condition)) {                             \
            std::printf("%s:%d: ", __FILE__, __LINE__); \
            std::printf(__VA_ARGS__);                   \
            std::printf("\n");                          \
            if (++failures > 20) std::exit(1);          \
        }                                               \
    } while (0)

inline std::mt19937_64 rng(20240229);
inline double uniform() {
    return std::uniform_real_distribution<double>(-1, 1)(rng);
}
inline int64_t below(int64_t n) {
    return std::uniform_int_distribution<int64_t>(0, n - 1)(rng);
}

// ------------------------------------------------------------------------------------------------
// Storage types, converted through float64 by definition rather than by bit tricks.
template <DType>
struct Type;

template <typename Storage>
struct Plain {
    using S = Storage;
    using Acc = Storage;
    static double get(S s) { return s; }
    static S put(double d) { return static_cast<S>(d); }
    static S nan() { return std::numeric_limits<S>::quiet_NaN(); }
};
template <>
struct Type<DType::kFloat32> : Plain<float> {
    static constexpr double kUnit = 0x1p-24, kTiny = 0x1p-149, kSum = 0x1p-24;
};
template <>
struct Type<DType::kFloat64> : Plain<double> {
    static constexpr double kUnit = 0x1p-53, kTiny = 0, kSum = 0x1p-53;
};

template <int kExponentBits, int kMantissaBits>
struct Small {
    using S = uint16_t;
    using Acc = float;
    static constexpr int kBias = (1 << (kExponentBits - 1)) - 1, kTop = (1 << kExponentBits) - 1;
    static double get(S s) {
        const int exponent = s >> kMantissaBits & kTop, mantissa = s & ((1 << kMantissaBits) - 1);
        const double sign = s >> 15 ? -1 : 1;
        if (exponent == kTop) return mantissa ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * std::ldexp(mantissa, 1 - kBias - kMantissaBits);
        return sign * std::ldexp(mantissa + (1 << kMantissaBits), exponent - kBias - kMantissaBits);
    }
    // Rounds to nearest even: nearbyint rounds the number in units of the last place.
    static S put(double d) {
        const S sign = std::signbit(d) ? 0x8000 : 0;
        if (std::isnan(d)) return nan();
        if (std::isinf(d)) return sign | kTop << kMantissaBits;
        int exponent = d == 0 ? 1 - kBias : std::max(std::ilogb(d), 1 - kBias);
        double units = std::nearbyint(std::ldexp(std::fabs(d), kMantissaBits - exponent));
        if (units >= (2 << kMantissaBits)) units /= 2, ++exponent;
        if (exponent + kBias >= kTop) return sign | kTop << kMantissaBits;
        const int low = static_cast<int>(units);
        const bool normal = low >= 1 << kMantissaBits;
        return sign | (normal ? (exponent + kBias - 1) * (1 << kMantissaBits) + low : low);
    }
    static S nan() { return (kTop << kMantissaBits) | 1 << (kMantissaBits - 1); }
};
template <>
struct Type<DType::kFloat16> : Small<5, 10> {
    static constexpr double kUnit = 0x1p-11, kTiny = 0x1p-24, kSum = 0x1p-24;
};
template <>
struct Type<DType::kBFloat16> : Small<8, 7> {
    static constexpr double kUnit = 0x1p-8, kTiny = 0x1p-133, kSum = 0x1p-24;
};

inline const char* name_of(DType t) {
    return t == DType::kFloat32    ? "f32"
           : t == DType::kFloat16  ? "f16"
           : t == DType::kBFloat16 ? "bf16"
                                   : "f64";
}

}  // namespace lora_ext
