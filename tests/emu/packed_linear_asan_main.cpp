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

double worst_of(int rows, int inputs, int outputs, int group, int bits, bool minimum) {
    std::mt19937 random(static_cast<unsigned>(rows + 7 * inputs));
    const auto numbers = [&](int count) {
        std::vector<float> found(count);
        for (float& x : found) x = static_cast<int>(random() % 2000) / 500.0f - 2;
        return found;
    };
    auto weight = numbers(outputs * inputs);
    const auto x = numbers(rows * inputs), bias = numbers(outputs);
    std::vector<float> y(rows * outputs), rounded(outputs * inputs);

    PackedBitsArgs args;
    args.rows = rows, args.in_features = inputs, args.out_features = outputs;
    args.bits = bits, args.group = group, args.minimum = minimum;
    std::vector<uint8_t> packed(ceil_div(outputs, kPanel) * (inputs / group) * block_bytes(args));
    args.packed = packed.data();
    args.weight = weight.data(), args.weight_stride = inputs;
    require_launched(launch_pack_weight(args, nullptr));
    args.weight = rounded.data();
    require_launched(launch_unpack_weight(args, nullptr));
    args.input = x.data(), args.x_stride = inputs;
    args.bias = bias.data(), args.y = y.data();
    std::vector<float> parts(packed_linear_workspace_bytes(args) / 4);
    args.parts = parts.data();
    require_launched(launch_packed_linear(args, nullptr));

    double worst = 0;
    const double step = bits == 8 ? 2 / 127.0 : minimum ? 4 / 15.0 : 2 / 7.0;
    for (int i = 0; i < outputs * inputs; ++i) {
        const double gap = std::abs(rounded[i] - weight[i]);
        worst = gap < 0.51 * step ? worst : std::max(worst, std::isnan(gap) ? 1 : gap);
    }
    for (int t = 0; t < rows; ++t)
        for (int o = 0; o < outputs; ++o) {
            double expected = bias[o];
            for (int i = 0; i < inputs; ++i)
                expected += x[t * inputs + i] * static_cast<double>(rounded[o * inputs + i]);
            const double gap = std::abs(y[t * outputs + o] - expected);
            worst = gap < 1e-3 ? worst : std::max(worst, std::isnan(gap) ? 1 : gap);
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
        for (int form = 0; form < 3; ++form) {
            const double worst =
                worst_of(rows, inputs, outputs, group, form == 0 ? 8 : 4, form == 2);
            if (worst == 0) continue;
            std::printf("T %d, I %d, O %d: off by %g\n", rows, inputs, outputs, worst);
            return 1;
        }
    std::puts("exact");
    return 0;
}
