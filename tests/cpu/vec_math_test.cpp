// Compares exp, exp_below and log of csrc/cpu/vec_math.h with long double, in one instruction set:
// for a sample of the floats or, with any command-line argument, for every float.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/vec_math.h"

using namespace lora_ext::LX_ISA;

namespace {

double worst_exp = 0, worst_log = 0;

template <typename E>
void check(E x, E got, long double exact, double limit, double& worst, const char* what) {
    E rounded = static_cast<E>(exact);
    if (std::isnan(x) || std::isinf(rounded) || std::isnan(rounded) || rounded == 0) {
        const bool same = std::isnan(rounded) ? std::isnan(got) : got == rounded;
        if (same) return;
    }
    const E spacing =
        std::nextafter(std::fabs(rounded), std::numeric_limits<E>::infinity()) - std::fabs(rounded);
    const double error = static_cast<double>(std::fabs(got - exact) / spacing);
    if (!(error <= limit)) {
        std::printf("%s(%a) = %a, exactly %La: %.3f units\n", what, double(x), double(got), exact,
                    error);
        std::exit(1);
    }
    worst = std::fmax(worst, error);
}

template <typename E>
using Wide = VecN<E, LX_VEC_BYTES / sizeof(E)>;

template <typename E>
void run(const E* x, double limit) {
    constexpr int kCount = LX_VEC_BYTES / sizeof(E);
    Wide<E> v;
    std::memcpy(&v, x, sizeof(v));
    const Wide<E> e = lora_ext::LX_ISA::exp(v), l = lora_ext::LX_ISA::log(v);
    for (int i = 0; i < kCount; ++i) {
        const long double a = x[i];
        long double exact = std::exp(a);
        if (x[i] < Float<E>::kLowest) exact = 0;
        if (x[i] > Float<E>::kHighest) exact = INFINITY;
        check<E>(x[i], e[i], exact, limit, worst_exp, "exp");
        check<E>(x[i], l[i], std::log(a), limit, worst_log, "log");
    }
}

template <typename E>
void special() {
    constexpr int kCount = LX_VEC_BYTES / sizeof(E);
    const E inf = std::numeric_limits<E>::infinity();
    const E cases[] = {-inf,
                       inf,
                       E(0),
                       E(-0.0),
                       E(NAN),
                       std::numeric_limits<E>::denorm_min(),
                       std::numeric_limits<E>::min(),
                       std::numeric_limits<E>::max(),
                       std::numeric_limits<E>::lowest(),
                       Float<E>::kLowest,
                       Float<E>::kHighest,
                       E(-1),
                       E(1)};
    for (E value : cases) {
        E x[kCount];
        for (E& lane : x) lane = value;
        run(x, 1.5);
    }
}

// The relative error of exp_below may grow linearly with the distance from the shift, because the
// term shrinks exponentially. At distances above 85, any value from 0 to 1e-36 is right.
template <typename E>
void check_below(E x, E shift) {
    const E got = exp_below(splat<Wide<E>>(x), splat<Wide<E>>(shift))[0];
    const double distance = double(shift) - double(x), exact = std::exp(-distance);
    const double unit = std::numeric_limits<E>::epsilon();
    const bool fits = distance > 85 ? got >= 0 && got < 1e-36
                                    : std::fabs(got - exact) <= exact * unit * (2 + distance);
    if (!fits || (distance == 0 && got != 1)) {
        std::printf("exp_below(%a, %a) = %a, exactly %a\n", double(x), double(shift), double(got),
                    exact);
        std::exit(1);
    }
}
template <typename E>
void below() {
    const E shifts[] = {E(0), E(-3.25), E(77), E(1e6)};
    for (E shift : shifts)
        for (E distance = 0; distance < 200; distance += E(1.0 / 128))
            check_below<E>(shift - distance, shift);
    check_below<E>(-std::numeric_limits<E>::infinity(), 0);
    if (!std::isnan(exp_below(splat<Wide<E>>(NAN), splat<Wide<E>>(0))[0])) {
        std::printf("exp_below loses NaN\n");
        std::exit(1);
    }
}

}  // namespace

int main(int count, char**) {
    const uint32_t step = count > 1 ? 1 : 997;
    constexpr int kCount = LX_VEC_BYTES / 4;
    for (uint64_t first = 0; first <= 0xffffffffu; first += uint64_t{step} * kCount) {
        float x[kCount];
        for (int i = 0; i < kCount; ++i) {
            const uint32_t bits = static_cast<uint32_t>(first + uint64_t{step} * i);
            std::memcpy(&x[i], &bits, 4);
        }
        run(x, 1.5);
    }
    std::printf("float  exp %.3f  log %.3f\n", worst_exp, worst_log);
    special<float>();
    worst_exp = worst_log = 0;
    uint64_t state = 1;
    for (int n = count > 1 ? 1 << 24 : 1 << 18; n > 0; --n) {
        double x[LX_VEC_BYTES / 8];
        for (double& lane : x) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            const double unit = static_cast<double>(state >> 11) * 0x1p-53;
            // Half of the numbers have a finite, nonzero exp; the others have any exponent.
            lane = n % 2 ? 1420 * unit - 709 : std::ldexp(unit + 1, int(state % 2046) - 1022);
        }
        run(x, 1.5);
    }
    std::printf("double exp %.3f  log %.3f\n", worst_exp, worst_log);
    special<double>();
    below<float>();
    below<double>();
}
