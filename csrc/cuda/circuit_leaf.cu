// Leaves of circuits: e = log softmax(logits)[x] of each row of V logits, and the backward pass,
// dlogit[v] = de (1[v = x] - softmax(logits)[v]). Logits (B, K, C, V); x (B, K); e, de (B, K, C).
//
// Forward: a group of lanes per row of V logits, as many lanes as in the decoding kernels, so that
// each has a few loads. Backward: a warp per row. A lane loads 16 bytes at a time. Maximum and sum
// are updated online, so the logits are read once. The gradient is written once; if de is zero, the
// logits are not read. Bound: bytes of the logits, forward once, backward twice.
#include "circuit_decode.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 8;
constexpr int kBatch = 2;  // loads in flight per lane
// Minimum blocks per multiprocessor. The forward kernel requests as many as fit: 2048 threads, or
// 1536 on sm_120. The backward kernel requests fewer, since it uses more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMinBlocks = 6;
#else
constexpr int kMinBlocks = 8;
#endif
constexpr int kMinBlocksBackward = 5;

// A row of V logits, and its token: kNoToken if the token is invalid, kNoRow beyond the last row.
constexpr int kNoToken = -1, kNoRow = -2;
struct LeafRow {
    unsigned index;      // index of the row of logits
    int64_t at, logits;  // index in e, top and log_sum; offset of the first logit
    int token;
};
LX_DEVICE LeafRow find_row(const CircuitLeafArgs& args, unsigned index) {
    const auto components = static_cast<unsigned>(args.components);
    const unsigned per_row = static_cast<unsigned>(args.n_token) * components;
    if (index >= static_cast<unsigned>(args.rows) * per_row) return {index, 0, 0, kNoRow};
    const unsigned b = index / per_row, rest = index % per_row;
    const int64_t token = args.x[b * args.x_stride + rest / components];
    return {index, b * args.e_stride + rest, b * args.logits_stride + rest * args.vocab,
            token >= 0 && token < args.vocab ? static_cast<int>(token) : kNoToken};
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks)
    circuit_leaf_kernel(const __grid_constant__ CircuitLeafArgs args, int log_lanes, bool aligned) {
    const int lanes = 1 << log_lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const unsigned rows_per_block = kWarps * lx::kWarpSize >> log_lanes;
    const LeafRow row = find_row(args, blockIdx.x * rows_per_block + (threadIdx.x >> log_lanes));
    const T* const logits = static_cast<const T*>(args.logits) + row.logits;
    OnlineSum mine;
    if (row.token >= 0)
        for_pieces<kBatch>(logits, static_cast<int>(args.vocab), aligned, lane, lanes,
                           [&](int, const auto& v) { mine.add(v); });
    const Norm norm = norm_of(mine, lanes);  // called by all lanes of the warp: it exchanges sums
    if (lane != 0 || row.token == kNoRow) return;
    const bool given = row.token != kNoToken;
    static_cast<float*>(args.e)[row.at] =
        given ? norm.log_p(lx::to_float(logits[row.token])) : 0.0f;
    static_cast<float*>(args.top)[row.at] = given ? norm.top : 0.0f;
    static_cast<float*>(args.log_sum)[row.at] = given ? norm.log_sum : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocksBackward)
    circuit_leaf_backward_kernel(const __grid_constant__ CircuitLeafArgs args, bool aligned) {
    const LeafRow row = find_row(args, blockIdx.x * kWarps + lx::warp_id());
    if (row.token == kNoRow) return;
    const int vocab = static_cast<int>(args.vocab), lane = lx::lane_id();
    T* out = static_cast<T*>(args.dlogits) + int64_t{row.index} * vocab;
    const float g = row.token < 0 ? 0 : static_cast<const float*>(args.de)[row.at];
    if (g == 0) {
        const float zero[kPiece<T>] = {};
        for (int i = lane * kPiece<T>; i < vocab; i += lx::kWarpSize * kPiece<T>)
            store_values(out + i, vocab - i, aligned, zero);
        return;
    }
    const float top = static_cast<const float*>(args.top)[row.at];
    const float log_sum = static_cast<const float*>(args.log_sum)[row.at];
    const int token = row.token;
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
    const int64_t per_row = args.n_token * args.components, count = args.rows * per_row;
    if (count == 0) return 0;
    // Row numbers have 32 bits, including the numbers that lanes beyond the last row compute.
    if (count > UINT32_MAX - 1024 || args.vocab > INT32_MAX - 1024) return kInvalidValue;
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
    return with_dtype(args.dtype, [&]<class T>() { return launch.template operator()<T>(count); });
}

}  // namespace

LaunchStatus launch_circuit_leaf(const CircuitLeafArgs& args, void* stream) {
    const bool aligned = rows_aligned(args, args.logits, args.logits_stride);
    return run(args, [&]<class T>(int64_t count) {
        const int log_lanes = log_lanes_of_row<T>(static_cast<int>(args.vocab));
        const auto blocks = static_cast<unsigned>(ceil_div(count << log_lanes, kWarps * 32));
        return LX_LAUNCH(circuit_leaf_kernel<T>, blocks, kWarps * 32, 0, stream, args, log_lanes,
                         aligned);
    });
}

LaunchStatus launch_circuit_leaf_backward(const CircuitLeafArgs& args, void* stream) {
    const bool aligned =
        rows_aligned(args, args.logits, args.logits_stride) && rows_aligned(args, args.dlogits, 0);
    return run(args, [&]<class T>(int64_t count) {
        const auto blocks = static_cast<unsigned>(ceil_div(count, kWarps));
        LX_BUF(args.dlogits, count * args.vocab * element_size(args.dtype), lx::Access::kReadWrite);
        return LX_LAUNCH(circuit_leaf_backward_kernel<T>, blocks, kWarps * 32, 0, stream, args,
                         aligned);
    });
}

}  // namespace lora_ext
