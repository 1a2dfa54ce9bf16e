// Sum layers with shared weights in one kernel, for up to 256 sums and terms, on tensor cores:
//   out[b, o] = log(sum_i value[b, i] weight[o, i]) + weight_shift[o] + value_shift[b]
// where the block computes value = exp(l - its maximum), and a previous launch has computed weight.
//
// There is one block of eight warps per (16 rows, 128 sums, group). Each warp computes two rows of
// values, as 16-bit numbers in shared memory, then two tiles of eight sums: every weight is read
// from L2 once per block (circuit_mma.cuh). Bound: bytes of weights from L2, until there are enough
// rows to occupy all multiprocessors.
//
// If a sum is too small to be accurate in its mode (fp16s or high), the warp recomputes it in
// float32 from shifted terms. Scaled operands and this recomputation are our choice
// (docs/notes/circuit_engine.md).
#include "circuit_mma.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockSums = kWarps * kWarpSums;

template <class T, bool kHigh>
__global__ void __launch_bounds__(kThreads, 2)
    log_sum_fused_kernel(const __grid_constant__ LogSumArgs args, bool w_aligned) {
    LX_DYN_SHARED(shared);
    LX_SHARED(float, value_shift, kMmaRows);
    const int n = static_cast<int>(args.terms), sums = static_cast<int>(args.sums);
    const int64_t g = blockIdx.z, first_row = int64_t{blockIdx.x} * kMmaRows;
    const int rows = static_cast<int>(lx::min<int64_t>(kMmaRows, args.rows - first_row));
    const int row_bytes = value_row_bytes(n), part_bytes = kMmaRows * row_bytes;
    const int warp = lx::warp_id(), lane = lx::lane_id();
    const int steps = (n + kStep - 1) / kStep;

    for (int row = warp; row < kMmaRows; row += kWarps) {
        const float* l = values_of(args, g, first_row + row);
        float top = kImpossible;
        if (row < rows)
            for (int i = lane; i < n; i += lx::kWarpSize) top = fmaxf(top, l[i]);
        top = WarpTeam(nullptr).reduce(top, larger);
        const float shift = shift_of(top);
        if (lane == 0) value_shift[row] = top;
        unsigned char* to = shared + row * row_bytes;
        for (int k = 8 * lane; k < steps * kStep; k += 8 * lx::kWarpSize) {
            float e[8];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                e[j] = row < rows && k + j < n ? lx::exp_approx(l[k + j] - shift) : 0.0f;
            const Operand<kHigh> words(e);
            *reinterpret_cast<uint4*>(to + 2 * k) = words.high;
            if constexpr (kHigh) *reinterpret_cast<uint4*>(to + part_bytes + 2 * k) = words.low;
        }
    }
    lx::syncthreads();

    const int first_sum = static_cast<int>(blockIdx.y) * kBlockSums + warp * kWarpSums;
    float acc[kWarpTiles][4] = {};
    mma_products<kHigh>(shared, static_cast<const float*>(args.weight) + g * sums * n, n, sums,
                        first_sum, n % 4 == 0, acc);

    const float* shifts = static_cast<const float*>(args.weight_shift) + g * sums;
    float* out = static_cast<float*>(args.out) + (g * args.rows + first_row) * sums;
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < 4 * kWarpTiles; ++i) {
        const int row = mma_row(i), o = mma_sum(i, first_sum);
        if (row >= rows || o >= sums) continue;
        const float s = mma_result<kHigh>(acc, i);
        const float own = shifts[o], shift = value_shift[row];
        const bool lost = s < mma_trusted<kHigh>(n) && own != kImpossible && shift != kImpossible;
        mine |= static_cast<unsigned>(lost) << i;
        out[row * sums + o] = logf(s) + own + shift;
    }
#pragma unroll 1
    for (int i = 0; i < 4 * kWarpTiles; ++i) {
        unsigned lost = lx::ballot_sync(lx::kFullMask, mine >> i & 1);
        while (lost) {
            const int lane_at = lx::ffs(lost) - 1;
            lost &= lost - 1;
            const int row = lx::shfl_sync(lx::kFullMask, mma_row(i), lane_at);
            const int o = lx::shfl_sync(lx::kFullMask, mma_sum(i, first_sum), lane_at);
            WarpWeights<T> weights(args, weights_of<T>(args, g, 0, o), n, w_aligned);
            weights.find_top();
            const float exact = weights.rescue(values_of(args, g, first_row + row), shifts[o]);
            if (lane == lane_at) out[row * sums + o] = exact;
        }
    }
}

}  // namespace

bool log_sum_fused_fits(const LogSumArgs& args) {
    return args.sums <= 256 && args.terms <= 256 && args.groups <= kMaxGridY &&
           ceil_div(args.rows, kMmaRows) <= kMaxGridX;
}

LaunchStatus launch_log_sum_fused(const LogSumArgs& args, bool high, void* stream) {
    declare_weights(args);
    declare_values(args);
    declare_floats(args.weight, args.groups * args.sums * args.terms, lx::Access::kConstant);
    declare_floats(args.weight_shift, args.groups * args.sums, lx::Access::kConstant);
    declare_floats(args.out, args.groups * args.rows * args.sums, lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(ceil_div(args.rows, kMmaRows)),
                    static_cast<unsigned>(ceil_div(args.sums, kBlockSums)),
                    static_cast<unsigned>(args.groups));
    const int bytes = mma_shared_bytes(high, args.terms);
    return with_dtype(args.dtype, [&]<class T>() {
        return high ? LX_LAUNCH((log_sum_fused_kernel<T, true>), grid, kThreads, bytes, stream,
                                args, weights_aligned(args))
                    : LX_LAUNCH((log_sum_fused_kernel<T, false>), grid, kThreads, bytes, stream,
                                args, weights_aligned(args));
    });
}

}  // namespace lora_ext
