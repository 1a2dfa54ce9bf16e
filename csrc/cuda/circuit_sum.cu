// Sum layers with shared weights: the steps before and after the matrix products, which a library
// computes. Bound of each step: its inputs are read and its outputs written once. A warp owns row
// (g, o) of the weights or (g, b) of the values. In a sum, a lane adds its pieces in order, and a
// fixed tree adds the lanes, so the result does not depend on the launch.
#include "circuit_sum.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

LX_DEVICE int64_t warp_item() {
    return int64_t{blockIdx.x} * kWarps + lx::warp_id();
}
dim3 grid_of(int64_t items) {
    return dim3(static_cast<unsigned>(ceil_div(items, kWarps)));
}
bool fits_grid(int64_t items) {
    return ceil_div(items, kWarps) <= kMaxGridX;
}

// Writes scaled weights and the shift of each row of w. launch_log_sum_values passes values as
// weights of norm kLog.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_scale_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    const int64_t item = warp_item();
    if (item >= args.groups * args.sums) return;
    const int n = static_cast<int>(args.terms);
    WarpWeights<T> row(args, weights_of<T>(args, item / args.sums, 0, item % args.sums), n,
                       aligned);
    row.find_top();
    float* to = static_cast<float*>(args.weight) + item * n;
    float total = 0;
    row.for_own([&](int i, const float (&v)[kPiece<T>]) {
        float e[kPiece<T>];
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) {
            e[j] = row.scaled(v[j]);
            total += e[j];
        }
        if (aligned) {
#pragma unroll
            for (int j = 0; j < kPiece<T>; j += 4)
                *reinterpret_cast<float4*>(to + i + j) = {e[j], e[j + 1], e[j + 2], e[j + 3]};
        } else {
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j)
                if (i + j < n) to[i + j] = e[j];
        }
    });
    total = WarpTeam(nullptr).reduce(total, add);
    if (lx::lane_id() == 0) static_cast<float*>(args.weight_shift)[item] = row.shift(total);
}

// Replaces the sums in `out` by their logarithms, and recomputes those that are too small.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_finish_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    const int64_t item = warp_item();
    if (item >= args.groups * args.rows) return;
    const int64_t g = item / args.rows;
    const int n = static_cast<int>(args.terms), sums = static_cast<int>(args.sums);
    float* out = static_cast<float*>(args.out) + item * sums;
    const float* shifts = static_cast<const float*>(args.weight_shift) + g * sums;
    const float shift = static_cast<const float*>(args.value_shift)[item];
    const float* l = values_of(args, g, item % args.rows);
    for (int first = 0; first < sums; first += lx::kWarpSize) {
        const int o = first + lx::lane_id();
        const float s = o < sums ? out[o] : 1.0f, own = o < sums ? shifts[o] : 0.0f;
        float result = logf(s) + own + shift;
        unsigned lost = lx::ballot_sync(
            lx::kFullMask, s < kSumTrusted && shift != kImpossible && own != kImpossible);
        while (lost) {
            const int lane = lx::ffs(lost) - 1;
            lost &= lost - 1;
            WarpWeights<T> row(args, weights_of<T>(args, g, 0, first + lane), n, aligned);
            row.find_top();
            const float exact = row.rescue(l, lx::shfl_sync(lx::kFullMask, own, lane));
            if (lx::lane_id() == lane) result = exact;
        }
        if (o < sums) out[o] = result;
    }
}

// Computes ratio = dout / s for each sum s, or 0 if the sum is zero or was rescued.
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_ratios_kernel(const __grid_constant__ LogSumArgs args) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= args.groups * args.rows * args.sums) return;
    const int64_t item = at / args.sums, o = at % args.sums;
    const float out = static_cast<const float*>(args.out)[at];
    const float depth =
        static_cast<const float*>(args.value_shift)[item] +
        static_cast<const float*>(args.weight_shift)[item / args.rows * args.sums + o] - out;
    const bool none = out == kImpossible || depth >= kTrustLog;
    static_cast<float*>(args.ratio)[at] =
        none ? 0.0f : static_cast<const float*>(args.dout)[at] * expf(depth);
}

// Multiplies dvalues by value and adds the shares of rescued sums to the products.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_dvalues_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    const int64_t item = warp_item();
    if (item >= args.groups * args.rows) return;
    const int64_t g = item / args.rows;
    const int n = static_cast<int>(args.terms), sums = static_cast<int>(args.sums);
    float* d = static_cast<float*>(args.dvalues) + item * n;
    const float* value = static_cast<const float*>(args.value) + item * n;
    for (int i = lx::lane_id(); i < n; i += lx::kWarpSize) d[i] *= value[i];
    lx::syncwarp();  // add_shares and this loop assign the terms to different lanes
    const float* shifts = static_cast<const float*>(args.weight_shift) + g * sums;
    const float shift = static_cast<const float*>(args.value_shift)[item];
    const float* out = static_cast<const float*>(args.out) + item * sums;
    const float* dout = static_cast<const float*>(args.dout) + item * sums;
    for (int first = 0; first < sums; first += lx::kWarpSize) {
        const int own = first + lx::lane_id();
        unsigned lost =
            lx::ballot_sync(lx::kFullMask, own < sums && was_rescued(shift, shifts[own], out[own]));
        while (lost) {
            const int o = first + lx::ffs(lost) - 1;
            lost &= lost - 1;
            WarpWeights<T> row(args, weights_of<T>(args, g, 0, o), n, aligned);
            row.find_top();
            row.add_shares(values_of(args, g, item % args.rows), shifts[o], out[o], dout[o], d);
        }
    }
}

// Multiplies flow by weight, adds the shares of rescued sums, and computes dw from the result.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_dweights_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    const int64_t item = warp_item();
    if (item >= args.groups * args.sums) return;
    const int64_t g = item / args.sums, o = item % args.sums;
    const int n = static_cast<int>(args.terms), rows = static_cast<int>(args.rows);
    float* flow = static_cast<float*>(args.flow) + item * n;
    const float* weight = static_cast<const float*>(args.weight) + item * n;
    for (int i = lx::lane_id(); i < n; i += lx::kWarpSize) flow[i] *= weight[i];
    lx::syncwarp();
    const float shift = static_cast<const float*>(args.weight_shift)[item];
    const T* w = weights_of<T>(args, g, 0, o);
    WarpWeights<T> row(args, w, n, aligned);
    row.find_top();
    const float* value_shifts = static_cast<const float*>(args.value_shift) + g * rows;
    const float* out = static_cast<const float*>(args.out) + g * rows * args.sums + o;
    const float* dout = static_cast<const float*>(args.dout) + g * rows * args.sums + o;
    float total = 0;
    for (int first = 0; first < rows; first += lx::kWarpSize) {
        const int own = first + lx::lane_id();
        const float y = own < rows ? out[own * args.sums] : kImpossible;
        if (y != kImpossible) total += dout[own * args.sums];
        unsigned lost =
            lx::ballot_sync(lx::kFullMask, own < rows && was_rescued(value_shifts[own], shift, y));
        while (lost) {
            const int b = first + lx::ffs(lost) - 1;
            lost &= lost - 1;
            row.add_shares(values_of(args, g, b), shift, out[b * args.sums], dout[b * args.sums],
                           flow);
        }
    }
    total = WarpTeam(nullptr).reduce(total, add);
    const float factor = shift == kImpossible ? 0.0f : total * expf(shift);
    T* dw = static_cast<T*>(args.dw) + item * n;
    lx::syncwarp();
    for (int i = lx::lane_id(); i < n; i += lx::kWarpSize)
        store_dw(dw + i, flow[i], lx::to_float(w[i]), weight[i], factor, args.norm);
}

// Finds the largest term of each sum, and the lowest index of a term of that value.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_max_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    const int64_t at = warp_item();
    if (at >= args.groups * args.rows * args.sums) return;
    const int64_t item = at / args.sums, g = item / args.rows, b = item % args.rows;
    const int n = static_cast<int>(args.terms);
    const float* l = values_of(args, g, b);
    const WarpWeights<T> row(args, weights_of<T>(args, g, b, at % args.sums), n, aligned);
    float best = kImpossible;
    int index = 0;
    OnlineSum norm;
    row.for_own([&](int i, const float (&v)[kPiece<T>]) {
        if (row.logits) norm.add(v);
        for (int j = 0; j < kPiece<T> && i + j < n; ++j) {
            const float term = (row.probs ? logf(v[j] <= 0 ? 0.0f : v[j]) : v[j]) + l[i + j];
            if (term > best) best = term, index = i + j;
        }
    });
#pragma unroll
    for (int mask = lx::kWarpSize / 2; mask > 0; mask /= 2) {
        const float other = lx::shfl_xor_sync(lx::kFullMask, best, mask);
        const int other_index = lx::shfl_xor_sync(lx::kFullMask, index, mask);
        if (other > best || (other == best && other_index < index))
            best = other, index = other_index;
    }
    const WarpTeam warp(nullptr);
    const float top = shift_of(warp.reduce(norm.top, larger));
    const float total = warp.reduce(norm.sum * fade(norm.top, top), add);
    if (lx::lane_id() != 0) return;
    const bool possible = best != kImpossible;
    static_cast<float*>(args.out)[at] =
        possible ? best - (row.logits ? logf(total) + top : 0.0f) : kImpossible;
    args.indices[at] = possible ? index : 0;
}

int64_t weight_items(const LogSumArgs& args) {
    return args.groups * args.sums;
}
int64_t value_items(const LogSumArgs& args) {
    return args.groups * args.rows;
}
// Declares the buffers that backward and finish read.
void declare_shifts(const LogSumArgs& args) {
    declare_weights(args);
    declare_values(args);
    declare_floats(args.weight_shift, weight_items(args), lx::Access::kConstant);
    declare_floats(args.value_shift, value_items(args), lx::Access::kConstant);
}
void declare_results(const LogSumArgs& args) {
    declare_floats(args.out, value_items(args) * args.sums, lx::Access::kConstant);
    declare_floats(args.dout, value_items(args) * args.sums, lx::Access::kConstant);
}

}  // namespace

LaunchStatus launch_log_sum_weights(const LogSumArgs& args, void* stream) {
    if (!fits_grid(weight_items(args))) return kInvalidValue;
    declare_weights(args);
    declare_floats(args.weight, weight_items(args) * args.terms, lx::Access::kWrite);
    declare_floats(args.weight_shift, weight_items(args), lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_sum_scale_kernel<T>, grid_of(weight_items(args)), kThreads, 0, stream,
                         args, weights_aligned(args));
    });
}

LaunchStatus launch_log_sum_values(const LogSumArgs& args, void* stream) {
    LogSumArgs as_weights = args;
    as_weights.dtype = DType::kFloat32;
    as_weights.norm = WeightNorm::kLog;
    as_weights.sums = args.rows;
    as_weights.w = args.values;
    as_weights.w_group = args.values_group;
    as_weights.w_row = 0;
    as_weights.w_sum = args.values_row;
    as_weights.weight = args.value;
    as_weights.weight_shift = args.value_shift;
    return launch_log_sum_weights(as_weights, stream);
}

LaunchStatus launch_log_sum_finish(const LogSumArgs& args, void* stream) {
    if (!fits_grid(value_items(args))) return kInvalidValue;
    declare_shifts(args);
    declare_floats(args.out, value_items(args) * args.sums, lx::Access::kReadWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_sum_finish_kernel<T>, grid_of(value_items(args)), kThreads, 0, stream,
                         args, weights_aligned(args));
    });
}

LaunchStatus launch_log_sum_ratios(const LogSumArgs& args, void* stream) {
    const int64_t count = value_items(args) * args.sums;
    if (ceil_div(count, kThreads) > kMaxGridX) return kInvalidValue;
    declare_shifts(args);
    declare_results(args);
    declare_floats(args.ratio, count, lx::Access::kWrite);
    return LX_LAUNCH(log_sum_ratios_kernel, static_cast<unsigned>(ceil_div(count, kThreads)),
                     kThreads, 0, stream, args);
}

LaunchStatus launch_log_sum_dvalues(const LogSumArgs& args, void* stream) {
    if (!fits_grid(value_items(args))) return kInvalidValue;
    declare_shifts(args);
    declare_results(args);
    const int64_t count = value_items(args) * args.terms;
    declare_floats(args.value, count, lx::Access::kConstant);
    declare_floats(args.dvalues, count, lx::Access::kReadWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_sum_dvalues_kernel<T>, grid_of(value_items(args)), kThreads, 0, stream,
                         args, weights_aligned(args));
    });
}

LaunchStatus launch_log_sum_dweights(const LogSumArgs& args, void* stream) {
    if (!fits_grid(weight_items(args))) return kInvalidValue;
    declare_shifts(args);
    declare_results(args);
    const int64_t count = weight_items(args) * args.terms;
    declare_floats(args.weight, count, lx::Access::kConstant);
    declare_floats(args.flow, count, lx::Access::kReadWrite);
    LX_BUF(args.dw, count * element_size(args.dtype), lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_sum_dweights_kernel<T>, grid_of(weight_items(args)), kThreads, 0,
                         stream, args, weights_aligned(args));
    });
}

LaunchStatus launch_log_max(const LogSumArgs& args, void* stream) {
    const int64_t count = value_items(args) * args.sums;
    if (!fits_grid(count)) return kInvalidValue;
    declare_weights(args);
    declare_values(args);
    declare_floats(args.out, count, lx::Access::kWrite);
    declare_floats(args.indices, count, lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_max_kernel<T>, grid_of(count), kThreads, 0, stream, args,
                         weights_aligned(args));
    });
}

}  // namespace lora_ext
