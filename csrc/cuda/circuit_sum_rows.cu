// Sum layers with one matrix per row: out[b, o] = log sum_i W[b, o, i] exp(l[b, i]).
//
// Forward: one block per (row, band of sums). The block keeps exp(l - max) in shared memory. A warp
// computes a sum and reads its weights once, 16 bytes per lane, with a running maximum. Bound:
// bytes of W.
//
// Backward: one block per row, because dl sums over o. A warp reads its weights twice, the second
// time from L1, writes dw once and accumulates its part of dl in shared memory; the warps' parts
// are added in order. Bound: bytes of W and dw.
//
// The arithmetic of a sum depends only on its row, so a row's bits do not depend on its batch.
#include "circuit_sum.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBand = 64;  // sums per forward block

// Writes exp(l - maximum) to `value`, in shared memory. Returns the maximum to all threads.
LX_DEVICE float scale_values(const float* l, int n, float* value, float* partial) {
    const BlockTeam block(partial);
    float top = kImpossible;
    for (int i = block.rank(); i < n; i += block.size()) top = fmaxf(top, l[i]);
    top = block.reduce(top, larger);
    const float shift = shift_of(top);
    for (int i = block.rank(); i < n; i += block.size()) value[i] = lx::exp_approx(l[i] - shift);
    lx::syncthreads();
    return top;
}

// Running sum W_i value_i and sum W_i, shifted by the running maximum of the weights.
template <class T>
struct OnlineDot {
    float top = kImpossible, dot = 0, total = 0;

    LX_DEVICE void add_piece(const WarpWeights<T>& row, const float* value, int i,
                             const float (&v)[kPiece<T>]) {
        float most = top;
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) most = fmaxf(most, v[j]);
        if (!row.probs) {
            const float faded = fade(top, shift_of(most));
            dot *= faded;
            total *= faded;
        }
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) {
            const float e =
                row.probs ? (v[j] <= 0 ? 0.0f : v[j]) : lx::exp_approx(v[j] - shift_of(most));
            total += e;
            if (i + j < row.n) dot += e * value[i + j];
        }
        top = most;
    }
    // Merges the sums of the warp's lanes and sets the base of the row. The merged sums are
    // relative to this base.
    LX_DEVICE void merge(WarpWeights<T>& row) {
        const WarpTeam warp(nullptr);
        row.set_top(warp.reduce(top, larger));
        const float faded = row.probs ? row.inverse : fade(top, row.base);
        dot = warp.reduce(dot * faded, add);
        total = warp.reduce(total * faded, add);
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_rows_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    LX_DYN_SHARED(shared);
    LX_SHARED(float, partial, BlockTeam::kScratch);
    float* value = reinterpret_cast<float*>(shared);
    const int n = static_cast<int>(args.terms), sums = static_cast<int>(args.sums);
    const int64_t b = blockIdx.x;
    const float* l = values_of(args, 0, b);
    const float value_shift = scale_values(l, n, value, partial);
    const int first = static_cast<int>(blockIdx.y) * kBand;
    const int last = lx::min(first + kBand, sums);
    for (int o = first + lx::warp_id(); o < last; o += kWarps) {
        WarpWeights<T> row(args, weights_of<T>(args, 0, b, o), n, aligned);
        OnlineDot<T> online;
        row.for_own(
            [&](int i, const float (&v)[kPiece<T>]) { online.add_piece(row, value, i, v); });
        online.merge(row);
        const float shift = row.shift(online.total);
        float out = logf(online.dot) + shift + value_shift;
        if (online.dot < kSumTrusted && shift != kImpossible && value_shift != kImpossible)
            out = row.rescue(l, shift);
        if (lx::lane_id() == 0) static_cast<float*>(args.out)[b * sums + o] = out;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    log_sum_rows_backward_kernel(const __grid_constant__ LogSumArgs args, bool aligned) {
    LX_DYN_SHARED(shared);
    LX_SHARED(float, partial, BlockTeam::kScratch);
    const int n = static_cast<int>(args.terms), sums = static_cast<int>(args.sums);
    const int warps = static_cast<int>(blockDim.x) / lx::kWarpSize, lane = lx::lane_id();
    float* value = reinterpret_cast<float*>(shared);
    float* parts = value + n;
    float* flow = parts + lx::warp_id() * 2 * n;  // flow of the current sum
    float* d = flow + n;                          // flow of all sums of this warp
    const int64_t b = blockIdx.x;
    const float* l = values_of(args, 0, b);
    const float value_shift = scale_values(l, n, value, partial);
    for (int i = lane; i < n; i += lx::kWarpSize) d[i] = 0;
    for (int o = lx::warp_id(); o < sums; o += warps) {
        const T* w = weights_of<T>(args, 0, b, o);
        T* dw = static_cast<T*>(args.dw) + (b * sums + o) * n;
        const float out = static_cast<const float*>(args.out)[b * sums + o];
        const float dout = static_cast<const float*>(args.dout)[b * sums + o];
        if (out == kImpossible) {
            for (int i = lane; i < n; i += lx::kWarpSize) dw[i] = lx::from_float<T>(0);
            continue;
        }
        WarpWeights<T> row(args, w, n, aligned);
        OnlineDot<T> online;
        row.for_own(
            [&](int i, const float (&v)[kPiece<T>]) { online.add_piece(row, value, i, v); });
        online.merge(row);
        const float shift = row.shift(online.total);
        const bool rescued = was_rescued(value_shift, shift, out);
        const float ratio = rescued ? 0.0f : dout * expf(value_shift + shift - out);
        const float factor = dout * expf(shift);
        lx::syncwarp();  // the flow of the previous sum has been read
        row.for_own([&](int i, const float (&v)[kPiece<T>]) {
            for (int j = 0; j < kPiece<T> && i + j < n; ++j)
                flow[i + j] = ratio * row.scaled(v[j]) * value[i + j];
        });
        if (rescued) row.add_shares(l, shift, out, dout, flow);
        row.for_own([&](int i, const float (&v)[kPiece<T>]) {
            T e[kPiece<T>];
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j) {
                const float f = i + j < n ? flow[i + j] : 0.0f;
                store_dw(&e[j], f, v[j], row.scaled(v[j]), factor, args.norm);
                if (i + j < n) d[i + j] += f;
            }
            if (aligned) {
                *reinterpret_cast<uint4*>(dw + i) = words_of(e);
            } else {
                for (int j = 0; j < kPiece<T> && i + j < n; ++j) dw[i + j] = e[j];
            }
        });
    }
    lx::syncthreads();
    for (int i = lx::thread_rank(); i < n; i += static_cast<int>(blockDim.x)) {
        float total = 0;
        for (int warp = 0; warp < warps; ++warp) total += parts[(2 * warp + 1) * n + i];
        static_cast<float*>(args.dvalues)[b * n + i] = total;
    }
}

int64_t backward_bytes(int64_t terms, int64_t warps) {
    return (1 + 2 * warps) * terms * int64_t{sizeof(float)};
}

}  // namespace

LaunchStatus launch_log_sum_per_row(const LogSumArgs& args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args.rows),
                    static_cast<unsigned>(ceil_div(args.sums, kBand)));
    if (args.terms * int64_t{sizeof(float)} > most_dynamic_bytes() || grid.y > kMaxGridY ||
        args.rows > kMaxGridX)
        return kInvalidValue;
    declare_weights(args);
    declare_values(args);
    declare_floats(args.out, args.rows * args.sums, lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_sum_rows_kernel<T>, grid, kThreads, args.terms * sizeof(float), stream,
                         args, weights_aligned(args));
    });
}

LaunchStatus launch_log_sum_per_row_backward(const LogSumArgs& args, void* stream) {
    int64_t warps = kWarps;
    while (warps > 1 && backward_bytes(args.terms, warps) > most_dynamic_bytes()) warps /= 2;
    if (backward_bytes(args.terms, warps) > most_dynamic_bytes() || args.rows > kMaxGridX)
        return kInvalidValue;
    declare_weights(args);
    declare_values(args);
    declare_floats(args.out, args.rows * args.sums, lx::Access::kConstant);
    declare_floats(args.dout, args.rows * args.sums, lx::Access::kConstant);
    declare_floats(args.dvalues, args.rows * args.terms, lx::Access::kWrite);
    LX_BUF(args.dw, args.rows * args.sums * args.terms * element_size(args.dtype),
           lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return LX_LAUNCH(log_sum_rows_backward_kernel<T>, static_cast<unsigned>(args.rows),
                         static_cast<unsigned>(warps * lx::kWarpSize),
                         backward_bytes(args.terms, warps), stream, args, weights_aligned(args));
    });
}

}  // namespace lora_ext
