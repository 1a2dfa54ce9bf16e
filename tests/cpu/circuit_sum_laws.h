// Laws of the sum layers for twins (CPU kernels) and CUDA kernels, in buffers of exact size: the
// output and both gradients must equal loops in double. In half of the rows, the largest term has
// weight zero, and the other terms would underflow relative to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "lora_ext/circuit_sum.h"

namespace lora_ext {

// Buffer of exactly `size` elements on the heap, `shift` elements past a 16-byte boundary.
template <class T>
struct ExactBuffer {
    std::unique_ptr<T[]> memory;
    int64_t shift, size;

    explicit ExactBuffer(int64_t n, int64_t shift = 0)
        : memory(new T[n + shift]), shift(shift), size(n) {}
    T* data() const { return memory.get() + shift; }
    T& operator[](int64_t i) const { return data()[i]; }
};

struct LogSumShape {
    int64_t groups, rows, sums, terms;
    bool per_row;
    int64_t shift;
};

// `uint16_t` stands for bfloat16, which represents the numbers of these tests exactly.
template <class T>
T from_number(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<T>(bits >> 16);
}
inline float to_number(float x) {
    return x;
}
inline float to_number(uint16_t x) {
    const uint32_t bits = uint32_t{x} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// Substitute for the library's GEMM: computes c = a b for strided a and b.
inline void library_product(const float* a, const float* b, float* c, int64_t rows, int64_t columns,
                            int64_t depth, int64_t a_row, int64_t a_step, int64_t b_step,
                            int64_t b_column) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k) {
            float sum = 0;
            for (int64_t d = 0; d < depth; ++d)
                sum += a[r * a_row + d * a_step] * b[d * b_step + k * b_column];
            c[r * columns + k] = sum;
        }
}

// `Steps` has one function for each step of LogSumCpu, which takes only a LogSumArgs.
template <class T, class Steps>
void check_log_sum(const LogSumShape& s, WeightNorm norm, const Steps& steps) {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    const bool probs = norm == WeightNorm::kProbs;
    const int64_t matrices = s.per_row ? s.rows : s.groups;
    uint32_t state = 1;
    const auto below = [&](int n) {
        state = state * 1664525u + 1013904223u;
        return static_cast<int>((state >> 8) % static_cast<uint32_t>(n));
    };
    ExactBuffer<T> w(matrices * s.sums * s.terms, s.shift), dw(w.size);
    ExactBuffer<float> values(s.groups * s.rows * s.terms, s.shift),
        out(s.groups * s.rows * s.sums), dout(out.size), dvalues(values.size), value(values.size),
        value_shift(s.groups * s.rows), weight(s.per_row ? values.size : w.size), flow(weight.size),
        weight_shift(s.groups * s.sums), ratio(out.size);
    ExactBuffer<int32_t> indices(out.size);
    for (int64_t i = 0; i < w.size; ++i) {
        const float logit = 0.25f * static_cast<float>(below(16));
        const bool open = i % s.terms != 0 && below(5) != 0;  // term 0 has weight zero
        w[i] = from_number<T>(open ? (probs ? 0.25f + logit : logit) : probs ? 0.0f : kNever);
    }
    for (int64_t i = 0; i < values.size; ++i) {
        values[i] = -0.5f * static_cast<float>(below(16)) - (i / s.terms % 2 ? 200.0f : 0.0f);
        if (i % s.terms == 0) values[i] = 0;
    }
    for (int64_t i = 0; i < dout.size; ++i) dout[i] = static_cast<float>(below(5) - 2);

    LogSumArgs args;
    args.dtype = std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16;
    args.norm = norm;
    args.groups = s.groups, args.rows = s.rows, args.sums = s.sums, args.terms = s.terms;
    args.w = w.data(), args.w_sum = s.terms;
    (s.per_row ? args.w_row : args.w_group) = s.sums * s.terms;
    args.values = values.data();
    args.values_row = s.terms, args.values_group = s.rows * s.terms;
    args.out = out.data(), args.indices = indices.data();
    args.weight = weight.data(), args.weight_shift = weight_shift.data();
    args.value = value.data(), args.value_shift = value_shift.data(), args.ratio = ratio.data();
    args.dout = dout.data(), args.dvalues = dvalues.data(), args.flow = flow.data();
    args.dw = dw.data();

    // Compute the expected results with loops in double.
    std::vector<double> want(out.size), want_dw(w.size), want_dvalues(values.size), best(out.size);
    std::vector<int32_t> want_index(out.size);
    for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t b = 0; b < s.rows; ++b)
            for (int64_t o = 0; o < s.sums; ++o) {
                const int64_t row = g * s.rows + b, at = row * s.sums + o;
                const int64_t first = ((s.per_row ? b : g) * s.sums + o) * s.terms;
                const float* l = values.data() + row * s.terms;
                double normaliser = 0, sum = 0, top = kNever;
                const auto log_w = [&](int64_t i) {
                    const double v = to_number(w[first + i]);
                    return probs ? std::log(v) : v;
                };
                for (int64_t i = 0; i < s.terms; ++i) {
                    if (norm == WeightNorm::kLogits) normaliser += std::exp(log_w(i));
                    sum += std::exp(log_w(i) + l[i]);
                    if (log_w(i) + l[i] > top)
                        top = log_w(i) + l[i], want_index[at] = static_cast<int32_t>(i);
                }
                const double shift = norm == WeightNorm::kLogits ? std::log(normaliser) : 0;
                want[at] = sum > 0 ? std::log(sum) - shift : kNever;
                best[at] = sum > 0 ? top - shift : kNever;
                for (int64_t i = 0; sum > 0 && i < s.terms; ++i) {
                    const double share = dout[at] * std::exp(log_w(i) + l[i] - std::log(sum));
                    want_dvalues[row * s.terms + i] += share;
                    const double softmax = std::exp(log_w(i)) / normaliser;
                    want_dw[first + i] += norm == WeightNorm::kLogits ? share - dout[at] * softmax
                                          : !probs                    ? share
                                          : log_w(i) > kNever         ? share / std::exp(log_w(i))
                                                                      : 0;
                }
            }
    const auto require = [&](double got, double expected, const char* what, int64_t at) {
        if (got == expected || std::abs(got - expected) < 2e-3 * (1 + std::abs(expected))) return;
        std::printf("%s[%d]: %g, expected %g; G=%d B=%d O=%d I=%d norm %d\n", what,
                    static_cast<int>(at), got, expected, static_cast<int>(s.groups),
                    static_cast<int>(s.rows), static_cast<int>(s.sums), static_cast<int>(s.terms),
                    static_cast<int>(norm));
        std::exit(3);
    };
    const auto check_out = [&](const char* what) {
        for (int64_t i = 0; i < out.size; ++i) require(out[i], want[i], what, i);
    };

    steps.max(args);
    for (int64_t i = 0; i < out.size; ++i) {
        require(out[i], best[i], "max", i);
        require(indices[i], want_index[i], "index", i);
    }
    if (s.per_row) {
        steps.per_row(args);
        check_out("per row");
        steps.per_row_backward(args);
    } else {
        steps.values(args);
        steps.forward(args);
        check_out("shared");
        args.scaled = true;
        std::fill_n(out.data(), out.size, 0.0f);
        steps.forward(args);
        check_out("shared, scaled before");
        if (steps.kHasFused) {
            steps.fused(args);
            check_out("fused");
        }
        steps.ratios(args);
        steps.dvalues(args);
        steps.dweights(args);
    }
    for (int64_t i = 0; i < values.size; ++i) require(dvalues[i], want_dvalues[i], "dvalues", i);
    const double coarse = std::is_same_v<T, float> ? 1 : 0.25;  // looser: dw is rounded to bfloat16
    for (int64_t i = 0; i < w.size; ++i)
        require(coarse * to_number(dw[i]), coarse * want_dw[i], "dw", i);
}

template <class Steps>
void check_log_sums(const Steps& steps) {
    const LogSumShape shapes[] = {
        {1, 3, 5, 7, false, 0},  {2, 18, 9, 40, false, 0}, {1, 2, 3, 33, false, 1},
        {1, 5, 12, 64, true, 0}, {1, 3, 70, 9, true, 0},   {1, 2, 3, 130, true, 1},
    };
    for (const LogSumShape& shape : shapes)
        for (const WeightNorm norm : {WeightNorm::kLogits, WeightNorm::kLog, WeightNorm::kProbs}) {
            check_log_sum<float>(shape, norm, steps);
            check_log_sum<uint16_t>(shape, norm, steps);
        }
}

}  // namespace lora_ext
