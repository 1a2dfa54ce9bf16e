// Checks that the CPU twins of every linked instruction set keep the laws of circuit_laws.h.
#include <cstdlib>

#include "circuit_laws.h"

namespace lora_ext {
namespace scalar {
extern const CircuitCpu circuit_table;
}
#ifdef LX_WIDE_TABLE
namespace LX_WIDE_TABLE {
extern const CircuitCpu circuit_table;
}
#endif

struct Twin {
    const CircuitCpu& cpu;
    void leaf(const CircuitLeafArgs& a) const { cpu.leaf(a, 0, a.rows * a.n_token); }
    void leaf_backward(const CircuitLeafArgs& a) const {
        cpu.leaf_backward(a, 0, a.rows * a.n_token);
    }
    void with_scratch(const CircuitScanArgs& a, decltype(CircuitCpu::scan) f) const {
        void* scratch = std::malloc(static_cast<size_t>(cpu.scan_scratch(a)));
        f(a, 0, a.params.rows, scratch);
        std::free(scratch);
    }
    void scan(const CircuitScanArgs& a) const { with_scratch(a, cpu.scan); }
    void scan_backward(const CircuitScanArgs& a) const { with_scratch(a, cpu.scan_backward); }
};

void check_table(const CircuitCpu& cpu) {
    const Twin twin{cpu};
    check_circuits<DType::kFloat32>(twin);
    check_circuits<DType::kFloat16>(twin);
    check_circuits<DType::kBFloat16>(twin);
    check_circuits<DType::kFloat64>(twin);
}

}  // namespace lora_ext

int main() {
    lora_ext::check_table(lora_ext::scalar::circuit_table);
#ifdef LX_WIDE_TABLE
    lora_ext::check_table(lora_ext::LX_WIDE_TABLE::circuit_table);
#endif
    return lora_ext::failures != 0;
}
