// The kernel of row attention in the asan flavour, in exact buffers, compared with a double loop.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "lora_ext/row_attention.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

constexpr int kBatch = 2;

double worst_of(int heads, int groups, int rows, int keys, int width, int value_width) {
    std::mt19937 random(static_cast<unsigned>(rows + 7 * keys));
    const auto numbers = [&](int count) {
        std::vector<float> found(count);
        for (float& x : found) x = static_cast<int>(random() % 2000) / 500.0f - 2;
        return found;
    };
    const auto q = numbers(kBatch * heads * rows * width);
    const auto k = numbers(kBatch * groups * keys * width);
    const auto v = numbers(kBatch * groups * keys * value_width);
    std::vector<float> out(kBatch * rows * heads * value_width);
    std::vector<char> mask(kBatch * rows * keys);
    for (char& sees : mask) sees = random() % 3 != 0;
    std::vector<int64_t> spans(kBatch * rows * 2);
    for (int i = 0; i < kBatch * rows; ++i) {
        spans[2 * i] = static_cast<int>(random() % 5) - 2;
        spans[2 * i + 1] = spans[2 * i] + static_cast<int>(random() % (keys + 5));
    }

    RowAttentionArgs args;
    args.batch = kBatch, args.heads = heads, args.groups = groups;
    args.rows = rows, args.keys = keys, args.width = width, args.value_width = value_width;
    args.scale = 0.25, args.causal = true;
    args.q = q.data(), args.k = k.data(), args.v = v.data(), args.out = out.data();
    const auto dense = [](int64_t (&stride)[3], int64_t n, int64_t rows, int64_t width) {
        stride[0] = n * rows * width, stride[1] = rows * width, stride[2] = width;
    };
    dense(args.q_stride, heads, rows, width);
    dense(args.k_stride, groups, keys, width);
    dense(args.v_stride, groups, keys, value_width);
    args.spans = spans.data(), args.spans_stride = 2 * rows;
    args.mask = reinterpret_cast<const bool*>(mask.data());
    args.mask_stride[0] = rows * keys, args.mask_stride[1] = keys;
    if (const LaunchStatus status = launch_row_attention(args, nullptr); status != 0) {
        std::printf("%s\n", lx::status_string(status));
        std::exit(2);
    }

    double worst = 0;
    for (int at = 0; at < kBatch * rows * heads; ++at) {
        const int b = at / heads / rows, t = at / heads % rows, h = at % heads;
        const int g = h / (heads / groups);
        double total = 0;
        std::vector<double> sum(value_width);
        for (int j = 0; j < keys; ++j) {
            const int64_t* const span = &spans[2 * (b * rows + t)];
            const bool causal = j <= t + keys - rows;
            if (!causal || j < span[0] || j >= span[1] || !mask[(b * rows + t) * keys + j])
                continue;
            double score = 0;
            for (int d = 0; d < width; ++d)
                score += q[((b * heads + h) * rows + t) * width + d] *
                         static_cast<double>(k[((b * groups + g) * keys + j) * width + d]);
            total += std::exp(score / 4);
            for (int d = 0; d < value_width; ++d)
                sum[d] += std::exp(score / 4) * v[((b * groups + g) * keys + j) * value_width + d];
        }
        for (int d = 0; d < value_width; ++d) {
            const double expected = total == 0 ? 0 : sum[d] / total;
            const double gap = std::abs(out[at * value_width + d] - expected);
            worst = gap < 2e-5 ? worst : std::max(worst, std::isnan(gap) ? 1 : gap);
        }
    }
    return worst;
}

}  // namespace

int main() {
    constexpr int kShapes[][6] = {
        {1, 1, 1, 1, 1, 1},
        {6, 2, 7, 40, 20, 12},
        {3, 3, 17, 33, 70, 65},
        {4, 1, 5, 64, 64, 130},
    };
    for (const auto& [heads, groups, rows, keys, width, value_width] : kShapes) {
        const double worst = worst_of(heads, groups, rows, keys, width, value_width);
        if (worst == 0) continue;
        std::printf("H %d, T %d, L %d: off by %g\n", heads, rows, keys, worst);
        return 1;
    }
    std::puts("exact");
    return 0;
}
