// The kernels of packed weights in the asan flavour, in exact buffers, compared with a double loop.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "lora_ext/packed_bits.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

void require_launched(LaunchStatus status) {
    if (status == 0) return;
    std::printf("%s\n", lx::status_string(status));
    std::exit(2);
}

// Values of at most eight bits, which are exact in bfloat16 too.
template <class T>
std::vector<T> numbers(std::mt19937& random, int count) {
    std::vector<T> found(count);
    for (T& x : found) x = static_cast<T>(static_cast<int>(random() % 256) / 64.0f - 2);
    return found;
}

template <class T>
double worst_of(int rows, int inputs, int outputs, int group, int bits, bool minimum) {
    std::mt19937 random(static_cast<unsigned>(rows + 7 * inputs));
    const auto given = numbers<T>(random, outputs * inputs);
    auto weight = given;
    const auto x = numbers<T>(random, rows * inputs), bias = numbers<T>(random, outputs);
    std::vector<T> y(rows * outputs);
    std::vector<float> rounded(outputs * inputs);

    PackedBitsArgs args;
    args.dtype = sizeof(T) == 2 ? DType::kBFloat16 : DType::kFloat32;
    args.rows = rows, args.in_features = inputs, args.out_features = outputs;
    args.bits = bits, args.group = group, args.minimum = minimum;
    std::vector<uint8_t> packed(ceil_div(outputs, kPanel) * (inputs / group) * block_bytes(args));
    args.packed = packed.data();
    args.weight = weight.data(), args.weight_stride = inputs;
    require_launched(launch_pack_weight(args, nullptr));
    args.weight = weight.data();
    require_launched(launch_unpack_weight(args, nullptr));
    PackedBitsArgs wide = args;
    wide.dtype = DType::kFloat32, wide.weight = rounded.data();
    require_launched(launch_unpack_weight(wide, nullptr));
    args.input = x.data(), args.x_stride = inputs;
    args.bias = bias.data(), args.y = y.data();
    std::vector<float> parts(packed_linear_workspace_bytes(args) / 4);
    args.parts = parts.data();
    require_launched(launch_packed_linear(args, nullptr));

    double worst = 0;
    const auto compare = [&](double found, double expected, double allowed) {
        const double gap = std::abs(found - expected);
        worst = gap < allowed ? worst : std::max(worst, std::isnan(gap) ? 1 : gap);
    };
    // With 4 bits, a value with the other sign than the largest one may be cut by a step.
    const double step = bits == 8 ? 2 / 127.0 : minimum ? 4 / 15.0 : 2 * 2 / 8.0;
    for (int i = 0; i < outputs * inputs; ++i) {
        compare(rounded[i], static_cast<float>(given[i]), 0.51 * step);
        compare(static_cast<float>(weight[i]), static_cast<float>(static_cast<T>(rounded[i])),
                1e-9);
    }
    for (int t = 0; t < rows; ++t)
        for (int o = 0; o < outputs; ++o) {
            double expected = static_cast<float>(bias[o]);
            for (int i = 0; i < inputs; ++i)
                expected += static_cast<double>(static_cast<float>(x[t * inputs + i])) *
                            rounded[o * inputs + i];
            const double last = sizeof(T) == 2 ? 0x1p-8 * std::abs(expected) : 0;
            compare(static_cast<float>(y[t * outputs + o]), expected, last + 1e-3);
        }
    return worst;
}

}  // namespace

int main() {
    constexpr int kShapes[][4] = {
        {1, 32, 1, 32},   {9, 640, 33, 64},    {17, 256, 130, 128},
        {64, 64, 40, 32}, {33, 32, 12577, 32},
    };
    for (const auto& [rows, inputs, outputs, group] : kShapes)
        for (int form = 0; form < 6; ++form) {
            const int bits = form / 2 == 0 ? 8 : 4;
            const auto worst = form % 2 ? worst_of<lx::bf16> : worst_of<float>;
            const double off = worst(rows, inputs, outputs, group, bits, form / 2 == 2);
            if (off == 0) continue;
            std::printf("T %d, I %d, O %d, form %d: off by %g\n", rows, inputs, outputs, form, off);
            return 1;
        }
    std::puts("exact");
    return 0;
}
