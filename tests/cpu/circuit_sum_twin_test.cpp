// Compares the CPU twins of the sum layers with loops, for every compiled instruction set.
#include <cstdio>

#include "circuit_sum_laws.h"
#include "lora_ext/lora.h"

using namespace lora_ext;

namespace {

struct Twin {
    static constexpr bool kHasFused = false;
    const LogSumCpu& cpu;

    static int64_t weight_items(const LogSumArgs& a) { return a.groups * a.sums; }
    static int64_t value_items(const LogSumArgs& a) { return a.groups * a.rows; }
    void weights(const LogSumArgs& a) const { cpu.weights(a, 0, weight_items(a)); }
    void fused(const LogSumArgs&) const {}
    void values(const LogSumArgs& a) const { cpu.values(a, 0, value_items(a)); }
    void forward(const LogSumArgs& a) const { cpu.forward(a, 0, cpu.forward_items(a)); }
    void ratios(const LogSumArgs& a) const { cpu.ratios(a, 0, value_items(a)); }
    void dvalues(const LogSumArgs& a) const { cpu.dvalues(a, 0, value_items(a)); }
    void dweights(const LogSumArgs& a) const { cpu.dweights(a, 0, weight_items(a)); }
    void per_row(const LogSumArgs& a) const { cpu.per_row(a, 0, value_items(a)); }
    void per_row_backward(const LogSumArgs& a) const { cpu.per_row_backward(a, 0, value_items(a)); }
    void max(const LogSumArgs& a) const {
        cpu.max(a, 0, a.w_row ? value_items(a) : weight_items(a));
    }
};

}  // namespace

namespace lora_ext {
namespace scalar {
extern const LogSumCpu log_sum_table;
}
#ifdef LX_WIDE_TABLE
namespace LX_WIDE_TABLE {
extern const LogSumCpu log_sum_table;
}
#endif
}  // namespace lora_ext

int main() {
    check_log_sums(Twin{scalar::log_sum_table});
#ifdef LX_WIDE_TABLE
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        check_log_sums(Twin{LX_WIDE_TABLE::log_sum_table});
#endif
    std::puts("exact");
    return 0;
}
