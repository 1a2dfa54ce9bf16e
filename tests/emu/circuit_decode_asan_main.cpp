// The decoding launchers on the emulator, under AddressSanitizer, in buffers of exact size. With
// the argument "overread" the launchers get a vocabulary with one token too many.
#include <string_view>

#include "../cpu/circuit_decode_laws.h"
#include "emu/emu.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

bool too_long = false;

void require(LaunchStatus status) {
    if (status == 0) return;
    std::printf("%s\n", lx::status_string(status));
    std::exit(3);
}

// Returns a function that calls the launcher with a workspace of the exact size.
template <class Args>
std::function<void(const Args&)> with_workspace(LaunchStatus (*launch)(const Args&, void*)) {
    return [launch](Args args) {
        const Exact<char> workspace(circuit_workspace_bytes(args.logits));
        if (circuit_workspace_bytes(args.logits) > 0) args.logits.workspace = workspace.data();
        args.logits.vocabulary += too_long;
        require(launch(args, nullptr));
    };
}

}  // namespace

// A fake stack per thread of a kernel would take ten times as long as everything else.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
    return "detect_stack_use_after_return=0";
}

int main(int count, char** words) {
    too_long = count > 1 && std::string_view(words[1]) == "overread";
    const Decoder decoder{"emulated", with_workspace(launch_circuit_sample),
                          with_workspace(launch_circuit_conditional_dist),
                          with_workspace(launch_circuit_argmax), [](SpecVerifyArgs args) {
                              const Exact<char> workspace(spec_verify_workspace_bytes(args));
                              if (spec_verify_workspace_bytes(args) > 0)
                                  args.workspace = workspace.data();
                              require(launch_spec_verify(args, nullptr));
                          }};
    for (uint64_t seed = 0; seed < 2; ++seed) {
        lx::emu::set_seed(seed);
        check_all(decoder, kDecodeShapes);
    }
    if (failures == 0) std::puts("exact");
    return failures != 0;
}
