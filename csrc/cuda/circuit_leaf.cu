// Leaves of circuits: e = log softmax(logits)[x] of each row of V logits, and the backward pass,
// dlogit[v] = de (1[v = x] - softmax(logits)[v]). Logits (B, K, C, V); x (B, K); e, de (B, K, C).
//
// One warp per row of V logits, 16 bytes per lane and load. Maximum and sum are updated online, so
// the logits are read once. The gradient is written once; if de is zero, the logits are not read.
// Bound: bytes of the logits, forward once, backward twice.
#include "circuit_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 8;
constexpr int kBatch = 2;  // loads in flight per lane
// Minimum blocks per multiprocessor. The forward requests as many as fit; the backward requests
// fewer, since it uses more registers.
constexpr int kMinBlocks = 8, kMinBlocksBackward = 5;

// The row of V logits of a warp, and its token.
struct LeafRow {
    int64_t index, at;  // index: row of logits; at: index in e, top and log_sum
    int64_t logits;     // offset of the first logit
    int64_t token;      // -1: no valid token
};
LX_DEVICE bool find_row(const CircuitLeafArgs& args, LeafRow& row) {
    row.index = int64_t{blockIdx.x} * kWarps + lx::warp_id();
    const int64_t per_row = args.n_token * args.components;
    if (row.index >= args.rows * per_row) return false;
    const int64_t b = row.index / per_row, rest = row.index % per_row;
    row.at = b * args.e_stride + rest;
    row.logits = b * args.logits_stride + rest * args.vocab;
    row.token = args.x[b * args.x_stride + rest / args.components];
    if (row.token < 0 || row.token >= args.vocab) row.token = -1;
    return true;
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks)
    circuit_leaf_kernel(const __grid_constant__ CircuitLeafArgs args, bool aligned) {
    LeafRow row;
    if (!find_row(args, row)) return;
    float e = 0, shift = 0, log_sum = 0;
    if (row.token >= 0) {
        const T* logits = static_cast<const T*>(args.logits) + row.logits;
        OnlineSum mine;
        for_pieces<kBatch>(logits, static_cast<int>(args.vocab), aligned, lx::lane_id(),
                           lx::kWarpSize, [&](int, const auto& v) { mine.add(v); });
        const WarpTeam warp(nullptr);
        shift = shift_of(warp.reduce(mine.top, larger));
        const float sum = warp.reduce(mine.sum * lx::exp_approx(mine.top - shift), add);
        log_sum = logf(sum);
        e = sum == 0 ? kImpossible : lx::to_float(logits[row.token]) - shift - log_sum;
    }
    if (lx::lane_id() == 0) {
        static_cast<float*>(args.e)[row.at] = e;
        static_cast<float*>(args.top)[row.at] = shift;
        static_cast<float*>(args.log_sum)[row.at] = log_sum;
    }
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocksBackward)
    circuit_leaf_backward_kernel(const __grid_constant__ CircuitLeafArgs args, bool aligned) {
    LeafRow row;
    if (!find_row(args, row)) return;
    const int vocab = static_cast<int>(args.vocab), lane = lx::lane_id();
    T* out = static_cast<T*>(args.dlogits) + row.index * vocab;
    const float g = row.token < 0 ? 0 : static_cast<const float*>(args.de)[row.at];
    if (g == 0) {
        const float zero[kPiece<T>] = {};
        for (int i = lane * kPiece<T>; i < vocab; i += lx::kWarpSize * kPiece<T>)
            store_values(out + i, vocab - i, aligned, zero);
        return;
    }
    const float top = static_cast<const float*>(args.top)[row.at];
    const float log_sum = static_cast<const float*>(args.log_sum)[row.at];
    const int token = static_cast<int>(row.token);
    const T* logits = static_cast<const T*>(args.logits) + row.logits;
    for_pieces<kBatch>(logits, vocab, aligned, lane, lx::kWarpSize, [&](int i, const auto& v) {
        float d[kPiece<T>];
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j)
            d[j] = g * ((i + j == token ? 1.0f : 0.0f) - lx::exp_approx(v[j] - top - log_sum));
        store_values(out + i, vocab - i, aligned, d);
    });
}

// Returns whether rows of V logits allow 16-byte accesses.
bool rows_aligned(const CircuitLeafArgs& args, const void* logits, int64_t stride) {
    return aligned_16(logits, {stride, args.vocab}, element_size(args.dtype));
}

template <class Launch>
LaunchStatus run(const CircuitLeafArgs& args, Launch&& launch) {
    const int64_t per_row = args.n_token * args.components;
    const int64_t blocks = ceil_div(args.rows * per_row, kWarps);
    if (blocks == 0) return 0;
    if (blocks > INT32_MAX || args.vocab > INT32_MAX - 1024) return kInvalidValue;
    declare_batch(args.logits, args.rows, per_row * args.vocab * element_size(args.dtype),
                  args.logits_stride * element_size(args.dtype), lx::Access::kConstant);
    declare_batch(args.x, args.rows, args.n_token * 8, args.x_stride * 8, lx::Access::kConstant);
    const bool back = args.dlogits != nullptr;
    const auto declare_e = [&](const void* p, lx::Access access) {
        declare_batch(p, args.rows, per_row * 4, args.e_stride * 4, access);
    };
    for (const void* norm : {args.top, args.log_sum})
        declare_e(norm, back ? lx::Access::kRead : lx::Access::kWrite);
    if (back)
        declare_e(args.de, lx::Access::kRead);
    else
        declare_e(args.e, lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return launch.template operator()<T>(static_cast<unsigned>(blocks));
    });
}

}  // namespace

LaunchStatus launch_circuit_leaf(const CircuitLeafArgs& args, void* stream) {
    const bool aligned = rows_aligned(args, args.logits, args.logits_stride);
    return run(args, [&]<class T>(unsigned blocks) {
        return LX_LAUNCH(circuit_leaf_kernel<T>, blocks, kWarps * 32, 0, stream, args, aligned);
    });
}

LaunchStatus launch_circuit_leaf_backward(const CircuitLeafArgs& args, void* stream) {
    const bool aligned =
        rows_aligned(args, args.logits, args.logits_stride) && rows_aligned(args, args.dlogits, 0);
    return run(args, [&]<class T>(unsigned blocks) {
        LX_BUF(args.dlogits,
               args.rows * args.n_token * args.components * args.vocab * element_size(args.dtype),
               lx::Access::kReadWrite);
        return LX_LAUNCH(circuit_leaf_backward_kernel<T>, blocks, kWarps * 32, 0, stream, args,
                         aligned);
    });
}

}  // namespace lora_ext
