// The kernels of the sum layers in the asan flavour: every launcher, in buffers of exact size,
// compared with loops.
#include <cstdio>
#include <cstdlib>

#include "../cpu/circuit_sum_laws.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

void launched(LaunchStatus status) {
    if (status == 0) return;
    std::printf("%s\n", lx::status_string(status));
    std::exit(2);
}

struct Kernels {
    static constexpr bool kHasFused = true;

    void weights(const LogSumArgs& a) const { launched(launch_log_sum_weights(a, nullptr)); }
    void fused(const LogSumArgs& a) const {
        launched(launch_log_sum_fused(a, /*high=*/true, nullptr));
        launched(launch_log_sum_fused(a, /*high=*/false, nullptr));
    }
    void values(const LogSumArgs& a) const { launched(launch_log_sum_values(a, nullptr)); }
    void forward(const LogSumArgs& a) const {
        if (!a.scaled) launched(launch_log_sum_weights(a, nullptr));
        for (int64_t g = 0; g < a.groups; ++g)
            library_product(static_cast<const float*>(a.value) + g * a.rows * a.terms,
                            static_cast<const float*>(a.weight) + g * a.sums * a.terms,
                            static_cast<float*>(a.out) + g * a.rows * a.sums, a.rows, a.sums,
                            a.terms, a.terms, 1, 1, a.terms);
        launched(launch_log_sum_finish(a, nullptr));
    }
    void ratios(const LogSumArgs& a) const { launched(launch_log_sum_ratios(a, nullptr)); }
    void dvalues(const LogSumArgs& a) const {
        for (int64_t g = 0; g < a.groups; ++g)
            library_product(static_cast<const float*>(a.ratio) + g * a.rows * a.sums,
                            static_cast<const float*>(a.weight) + g * a.sums * a.terms,
                            static_cast<float*>(a.dvalues) + g * a.rows * a.terms, a.rows, a.terms,
                            a.sums, a.sums, 1, a.terms, 1);
        launched(launch_log_sum_dvalues(a, nullptr));
    }
    void dweights(const LogSumArgs& a) const {
        for (int64_t g = 0; g < a.groups; ++g)
            library_product(static_cast<const float*>(a.ratio) + g * a.rows * a.sums,
                            static_cast<const float*>(a.value) + g * a.rows * a.terms,
                            static_cast<float*>(a.flow) + g * a.sums * a.terms, a.sums, a.terms,
                            a.rows, 1, a.sums, a.terms, 1);
        launched(launch_log_sum_dweights(a, nullptr));
    }
    void per_row(const LogSumArgs& a) const { launched(launch_log_sum_per_row(a, nullptr)); }
    void per_row_backward(const LogSumArgs& a) const {
        launched(launch_log_sum_per_row_backward(a, nullptr));
    }
    void max(const LogSumArgs& a) const { launched(launch_log_max(a, nullptr)); }
};

}  // namespace

// A grid with too many blocks must be rejected before anything is declared or accessed.
void refuses_grids_beyond_the_limit() {
    constexpr LaunchStatus kInvalidValue = 1;
    LogSumArgs a;
    a.groups = 1;
    a.rows = int64_t{1} << 40;
    a.sums = a.terms = 1;
    for (const LaunchStatus status :
         {launch_log_sum_finish(a, nullptr), launch_log_sum_ratios(a, nullptr),
          launch_log_sum_dvalues(a, nullptr), launch_log_max(a, nullptr),
          launch_log_sum_per_row(a, nullptr), launch_log_sum_per_row_backward(a, nullptr)}) {
        if (status == kInvalidValue) continue;
        std::printf("a grid for 2^40 rows was not refused: %d\n", status);
        std::exit(2);
    }
}

int main() {
    refuses_grids_beyond_the_limit();
    check_log_sums(Kernels{});
    std::puts("exact");
    return 0;
}
