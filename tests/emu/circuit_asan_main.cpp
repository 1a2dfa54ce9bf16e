// The circuit kernels in the asan flavour: the laws of circuit_laws.h in buffers of exact size.
// With the argument "overread" the leaf kernel receives a vocabulary with one token too many.
#include <string_view>

#include "../cpu/circuit_laws.h"
#include "emu/emu.h"
#include "lx/device.h"

namespace lora_ext {

bool overread = false;

struct Kernels {
    void done(LaunchStatus status) const {
        EXPECT(status == 0, "%s", launch_status_string(status));
    }
    void leaf(CircuitLeafArgs a) const {
        a.vocab += overread;
        done(launch_circuit_leaf(a, nullptr));
    }
    void leaf_backward(const CircuitLeafArgs& a) const {
        done(launch_circuit_leaf_backward(a, nullptr));
    }
    void scan(const CircuitScanArgs& a) const { done(launch_circuit_scan(a, nullptr)); }
    void scan_backward(const CircuitScanArgs& a) const {
        done(launch_circuit_scan_backward(a, nullptr));
    }
};

}  // namespace lora_ext

int main(int count, char** arguments) {
    using namespace lora_ext;
    overread = count > 1 && std::string_view(arguments[1]) == "overread";
    check_circuits<DType::kFloat32>(Kernels{});
    check_circuits<DType::kFloat16>(Kernels{});
    check_circuits<DType::kBFloat16>(Kernels{});
    if (failures == 0) std::printf("exact\n");
    return failures != 0;
}
