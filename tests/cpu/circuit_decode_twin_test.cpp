// Checks that the decoding twins keep circuit_decode_laws.h, with a workspace of exact size.
#include "circuit_decode_laws.h"

using namespace lora_ext;

namespace lora_ext {
namespace scalar {
extern const CircuitDecodeCpu decode_table;
}
#ifdef LX_WIDE_TABLE  // namespace of a table for 64-byte vectors
namespace LX_WIDE_TABLE {
extern const CircuitDecodeCpu decode_table;
}
#endif
}  // namespace lora_ext

namespace {

void check(const CircuitDecodeCpu& cpu) {
    const auto scratch = [](int64_t bytes) {
        return std::unique_ptr<void, void (*)(void*)>(std::aligned_alloc(64, bytes), std::free);
    };
    const auto on_circuit = [&](auto f, auto bytes) {
        return [=](const auto& args) {
            f(args, 0, args.logits.circuit.rows, scratch(bytes(args.logits)).get());
        };
    };
    const Decoder decoder{
        cpu.isa, on_circuit(cpu.sample, cpu.sample_scratch),
        on_circuit(cpu.conditional_dist, cpu.sample_scratch),
        on_circuit(cpu.argmax, cpu.argmax_scratch), [&](const SpecVerifyArgs& args) {
            cpu.verify(args, 0, args.rows, scratch(cpu.verify_scratch(args)).get());
        }};
    check_all(decoder, kDecodeShapes);
    for (const Shape& s : kDecodeShapes) check_laws<DType::kFloat64, DType::kFloat64>(decoder, s);
}

}  // namespace

int main() {
    check(scalar::decode_table);
#ifdef LX_WIDE_TABLE
    if (__builtin_cpu_supports("avx2")) check(LX_WIDE_TABLE::decode_table);
#endif
    std::printf("%d failures\n", failures);
    return failures != 0;
}
