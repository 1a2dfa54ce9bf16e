// Sum layers with shared weights in one kernel, for up to 256 sums and terms, on tensor cores:
//   out[b, o] = log(sum_i value[b, i] weight[o, i]) + weight_shift[o] + value_shift[b]
// where value = exp(l - its maximum) is made in the block and weight is the step before this one.
//
// Block (16 rows, 128 sums, group), eight warps. They make two rows of values each, as 16-bit
// numbers in shared memory, then take two tiles of eight sums each: every weight is read from L2
// once per block, eight to a lane, and becomes an operand in registers (see lora_tile.cuh on the
// order of k). Rows of values lie 64 bytes off a multiple of 128, so that the eight lanes of a
// 16-byte access meet no bank twice. Bound: bytes of weights from L2, until rows fill the machine.
//
//   fp16s  both operands times 2^14 in float16: 11 bits, terms below 2^-38 of the largest vanish
//   high   both as high + low bfloat16, three products: 16 bits, the range of float32
//
// A sum below what its mode can be trusted with is taken again by the warp, in float32, from
// shifted terms. Source: scaled operands and rescue are ours (docs/circuit_engine.md).
#include "circuit_sum.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 16;
constexpr int kTileSums = 8;
constexpr int kWarpTiles = 2;
constexpr int kBlockSums = kWarps * kWarpTiles * kTileSums;
constexpr int kStep = 32;  // terms that four lanes read together
constexpr float kHalfScale = 0x1p14f;

// Bytes between rows of values: whole steps, then 64 off a multiple of 128.
LX_HOST_DEVICE constexpr int value_row_bytes(int64_t terms) {
    const int bytes = (static_cast<int>(terms) + kStep - 1) / kStep * kStep * 2;
    return bytes % 128 == 0 ? bytes + 64 : bytes;
}

// Eight numbers as operand words; `low` is what rounding left over.
template <bool kHigh>
struct Operand {
    uint4 high, low;

    LX_DEVICE explicit Operand(const float (&v)[8]) {
        using Half = std::conditional_t<kHigh, lx::bf16, lx::f16>;
        uint32_t h[4], r[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float a = kHigh ? v[2 * i] : v[2 * i] * kHalfScale;
            const float b = kHigh ? v[2 * i + 1] : v[2 * i + 1] * kHalfScale;
            h[i] = lx::pack_floats<Half>(a, b);
            if constexpr (kHigh) {
                const float2 rounded = lx::unpack_floats<Half>(h[i]);
                r[i] = lx::pack_floats<Half>(a - rounded.x, b - rounded.y);
            }
        }
        high = {h[0], h[1], h[2], h[3]};
        low = {r[0], r[1], r[2], r[3]};
    }
};

// The eight numbers from k on, zero beyond n.
LX_DEVICE void load_eight(const float* p, int k, int n, bool aligned, float (&v)[8]) {
    if (aligned && k + 8 <= n) {
        const float4 a = lx::load_nc(reinterpret_cast<const float4*>(p + k));
        const float4 b = lx::load_nc(reinterpret_cast<const float4*>(p + k + 4));
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = k + j < n ? lx::load_nc(p + k + j) : 0.0f;
    }
}

template <class T, bool kHigh>
__global__ void __launch_bounds__(kThreads, 2)
    log_sum_fused_kernel(const __grid_constant__ LogSumArgs args, bool w_aligned) {
    using Half = std::conditional_t<kHigh, lx::bf16, lx::f16>;
    LX_DYN_SHARED(shared);
    LX_SHARED(float, value_shift, kRows);
    const int n = static_cast<int>(args.terms), sums = static_cast<int>(args.sums);
    const int64_t g = blockIdx.z, first_row = int64_t{blockIdx.x} * kRows;
    const int rows = static_cast<int>(lx::min<int64_t>(kRows, args.rows - first_row));
    const int row_bytes = value_row_bytes(n), part_bytes = kRows * row_bytes;
    const int warp = lx::warp_id(), lane = lx::lane_id();
    const int steps = (n + kStep - 1) / kStep;
    const bool aligned = n % 4 == 0;  // of the weights, which lie on 16 bytes

    for (int row = warp; row < kRows; row += kWarps) {
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

    const int first_sum = static_cast<int>(blockIdx.y) * kBlockSums + warp * kWarpTiles * kTileSums;
    const float* weight = static_cast<const float*>(args.weight) + g * sums * n;
    float acc[kWarpTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
        const int k = step * kStep + 8 * (lane % 4);
        const auto words = [&](int row, int part) {
            return *reinterpret_cast<const uint4*>(shared + part * part_bytes + row * row_bytes +
                                                   2 * k);
        };
        const uint4 a = words(lane / 4, 0), a8 = words(lane / 4 + 8, 0);
        uint4 a_low{}, a8_low{};
        if constexpr (kHigh) a_low = words(lane / 4, 1), a8_low = words(lane / 4 + 8, 1);
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; ++tile) {
            const int o = first_sum + tile * kTileSums + lane / 4;
            float v[8];
            load_eight(weight + int64_t{o} * n, k, o < sums ? n : 0, aligned, v);
            const Operand<kHigh> b(v);
            if constexpr (kHigh) {
                mma_words<Half>(acc[tile], a_low, a8_low, b.high);
                mma_words<Half>(acc[tile], a, a8, b.low);
            }
            mma_words<Half>(acc[tile], a, a8, b.high);
        }
    }

    const float trusted = kHigh ? kSumTrusted : static_cast<float>(n) * 0x1p-28f;
    const float* shifts = static_cast<const float*>(args.weight_shift) + g * sums;
    float* out = static_cast<float*>(args.out) + (g * args.rows + first_row) * sums;
    // Result i of a lane, i < 4 * kWarpTiles.
    const auto row_of = [&](int i) { return lane / 4 + 8 * (i / 2 % 2); };
    const auto sum_of = [&](int i) {
        return first_sum + i / 4 * kTileSums + 2 * (lane % 4) + i % 2;
    };
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < 4 * kWarpTiles; ++i) {
        const int row = row_of(i), o = sum_of(i);
        if (row >= rows || o >= sums) continue;
        const float s = kHigh ? acc[i / 4][i % 4] : acc[i / 4][i % 4] * 0x1p-28f;
        const float own = shifts[o], shift = value_shift[row];
        const bool lost = s < trusted && own != kImpossible && shift != kImpossible;
        mine |= static_cast<unsigned>(lost) << i;
        out[row * sums + o] = logf(s) + own + shift;
    }
#pragma unroll 1
    for (int i = 0; i < 4 * kWarpTiles; ++i) {
        unsigned lost = lx::ballot_sync(lx::kFullMask, mine >> i & 1);
        while (lost) {
            const int lane_at = lx::ffs(lost) - 1;
            lost &= lost - 1;
            const int row = lx::shfl_sync(lx::kFullMask, row_of(i), lane_at);
            const int o = lx::shfl_sync(lx::kFullMask, sum_of(i), lane_at);
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
           ceil_div(args.rows, kRows) <= kMaxGridX;
}

LaunchStatus launch_log_sum_fused(const LogSumArgs& args, bool high, void* stream) {
    declare_weights(args);
    declare_values(args);
    declare_floats(args.weight, args.groups * args.sums * args.terms, lx::Access::kConstant);
    declare_floats(args.weight_shift, args.groups * args.sums, lx::Access::kConstant);
    declare_floats(args.out, args.groups * args.rows * args.sums, lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(ceil_div(args.rows, kRows)),
                    static_cast<unsigned>(ceil_div(args.sums, kBlockSums)),
                    static_cast<unsigned>(args.groups));
    const int bytes = (high ? 2 : 1) * kRows * value_row_bytes(args.terms);
    return with_dtype(args.dtype, [&]<class T>() {
        return high ? LX_LAUNCH((log_sum_fused_kernel<T, true>), grid, kThreads, bytes, stream,
                                args, weights_aligned(args))
                    : LX_LAUNCH((log_sum_fused_kernel<T, false>), grid, kThreads, bytes, stream,
                                args, weights_aligned(args));
    });
}

}  // namespace lora_ext
