// Choice of the token of a row with many logits: the kernels verify_weights and verify_pick. The
// head of spec_verify_grid.cu describes them and the order of the sums.
#include "spec_verify_grid.cuh"

namespace lora_ext {
namespace {

constexpr int kLaneTokens = 8;  // tokens that a lane processes at once
constexpr int kHalves = kBlockTokens / (kLaneTokens * lx::kWarpSize);

// ------------------------------------------------------------------------------------------------
// Weights

// kLaneTokens logits from index `at` on, in 16-byte loads if rows are aligned. The entries for
// indices n and above hold other logits of the row; the caller ignores them.
template <class L, bool kAligned>
struct LaneLogits {
    static constexpr int kWords = kLaneTokens / kPiece<L>;
    uint4 words[kWords];

    LX_DEVICE void load(const L* row, int at, int n) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const int first = at + w * kPiece<L>;
            if constexpr (kAligned) {
                words[w] =
                    lx::load_nc(reinterpret_cast<const uint4*>(row + (first < n ? first : 0)));
            } else {
                L e[kPiece<L>];
#pragma unroll
                for (int j = 0; j < kPiece<L>; ++j)
                    e[j] = lx::load_nc(row + lx::min(first + j, n - 1));
                __builtin_memcpy(&words[w], e, 16);
            }
        }
    }
    LX_DEVICE void unpack(float (&v)[kLaneTokens]) const {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            float piece[kPiece<L>];
            unpack_piece<L>(words[w], piece);
#pragma unroll
            for (int j = 0; j < kPiece<L>; ++j) v[w * kPiece<L> + j] = piece[j];
        }
    }
};

// Computes states[z] from the spans of a row's leaves. Ends with a barrier.
LX_DEVICE void weigh_states(const VerifySpace& space, const float* posterior, int64_t row, int C,
                            Norm* states) {
    const int lane = lx::lane_id();
    for (int z0 = lx::warp_id() * kWarpRows; z0 < C; z0 += kRowsAtOnce) {
        const int z = lx::min(z0 + lane / kSpanLanes, C - 1);
        const float p = lx::load_global(posterior + z);
        const OnlineSum all =
            sum_of_spans(space.leaves + (row * C + z) * space.spans, space.spans, 1.0f);
        if (z == z0 + lane / kSpanLanes && lane % kSpanLanes == 0)
            states[z] = weight_of_state({all.top, logf(all.sum)}, p);
    }
    lx::syncthreads();
}

// Number of states whose leaves a lane loads at once: 128 bytes, or 96 on sm_100, where 128 would
// spill registers. The order of the sums does not depend on this number.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kHalfStates = 3;
#else
constexpr int kHalfStates = 4;
#endif

// Computes a warp's share of q for the block's tokens, that is, the sum over the states warp, warp
// + 8, ..., and writes it to shared memory. Ends with a barrier.
template <class L, bool kAligned>
LX_DEVICE void share_q(const L* leaf, const Norm* states, int C, int V, int base, float* q_of) {
    constexpr int kBatch = sizeof(L) == 2 ? kHalfStates : 2;
    const int warp = lx::warp_id();
    const int first = lx::lane_id() * kLaneTokens, half = lx::kWarpSize * kLaneTokens;
    float q[kHalves][kLaneTokens] = {};
#pragma unroll 1
    for (int z0 = warp; z0 < C; z0 += kBatch * kVerifyWarps) {
        LaneLogits<L, kAligned> logits[kBatch][kHalves];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const L* const row = leaf + int64_t{lx::min(z0 + u * kVerifyWarps, C - 1)} * V;
#pragma unroll
            for (int h = 0; h < kHalves; ++h) logits[u][h].load(row, base + h * half + first, V);
        }
        lx::syncwarp();  // keeps the compiler from moving loads down to save registers
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const int z = z0 + u * kVerifyWarps;
            const Norm state = z < C ? states[z] : Norm{0, -kImpossible};
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
                float v[kLaneTokens];
                logits[u][h].unpack(v);
#pragma unroll
                for (int j = 0; j < kLaneTokens; ++j)
                    q[h][j] += lx::exp_approx(v[j] - state.top - state.log_sum);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
        float4* const to = reinterpret_cast<float4*>(q_of + warp * kBlockTokens + h * half + first);
        to[0] = {q[h][0], q[h][1], q[h][2], q[h][3]};
        to[1] = {q[h][4], q[h][5], q[h][6], q[h][7]};
    }
    lx::syncthreads();
}

template <class L>
__global__ void __launch_bounds__(kVerifyThreads)
    verify_weights_kernel(const __grid_constant__ SpecVerifyArgs args,
                          const __grid_constant__ Leaves leaves,
                          const __grid_constant__ LeafRows target,
                          const __grid_constant__ VerifySpace space) {
    lx::grid_dependency_launch();
    LX_SHARED(double, partial, 2 * kVerifyWarps);
    LX_DYN_SHARED(shared);
    float* const q_of = reinterpret_cast<float*>(shared);
    Norm* const states = reinterpret_cast<Norm*>(q_of + kVerifyWarps * kBlockTokens);
    const int64_t row = blockIdx.x / space.blocks;
    const int block = static_cast<int>(blockIdx.x % space.blocks);
    const int K = static_cast<int>(args.n_token), C = static_cast<int>(args.components);
    const int V = static_cast<int>(args.vocabulary), base = block * kBlockTokens;
    const int warp = lx::warp_id(), lane = lx::lane_id(), thread = lx::thread_rank();
    const float scale = static_cast<float>(args.inverse_temperature);
    lx::grid_dependency_wait();
    const VerifyDecision decision = space.decision[row];
    const bool whole = decision.accepted == K;
    if (!whole) {
        weigh_states(space,
                     static_cast<const float*>(args.posterior) + (row * K + decision.accepted) * C,
                     row, C, states);
        const LeafRows rows = leaves.rows(row, decision.accepted);
        const L* const leaf = static_cast<const L*>(rows.first);
        if (rows.aligned)
            share_q<L, true>(leaf, states, C, V, base, q_of);
        else
            share_q<L, false>(leaf, states, C, V, base, q_of);
    }

    double left = 0, all = 0;
#pragma unroll
    for (int i = 0; i < kBlockTokens / kVerifyThreads; ++i) {
        const int at = i * kVerifyThreads + thread, v = base + at;
        if (v >= V) continue;
        const float logit = target.at(
            0, row * args.target_stride + int64_t{decision.accepted} * target.vocabulary + v);
        const float p = p_of(logit, decision.stats, scale);
        float w = p;
        if (!whole) {
            float q = q_of[at];
#pragma unroll
            for (int k = 1; k < kVerifyWarps; ++k) q += q_of[k * kBlockTokens + at];
            w = fmaxf(p - q, 0.0f);
        }
        space.weights[row * V + v] = w;
        left += w;
        all += p;
    }
    const auto plus = [](double a, double b) { return a + b; };
    left = reduce_lanes(left, lx::kWarpSize, plus);
    all = reduce_lanes(all, lx::kWarpSize, plus);
    if (lane == 0) partial[2 * warp] = left, partial[2 * warp + 1] = all;
    lx::syncthreads();
    if (thread < 2) {
        double sum = partial[thread];
#pragma unroll
        for (int k = 1; k < kVerifyWarps; ++k) sum += partial[2 * k + thread];
        space.sums[(row * 2 + thread) * space.blocks + block] = sum;
    }
}

// ------------------------------------------------------------------------------------------------
// The index

// Draws among n weights, of which a lane owns ceil(n / 32) consecutive ones: finds the first whose
// running sum, starting at `before`, exceeds `limit`, else the last positive weight. If `limit` is
// negative, it is replaced by `uniform` times the total.
template <class At>
LX_DEVICE Place find_among_runs(int n, double before, double limit, double uniform, At&& at) {
    const int lane = lx::lane_id(), run = (n + lx::kWarpSize - 1) / lx::kWarpSize;
    const int first = lane * run, count = lx::min(run, n - first);
    double own = 0;
#pragma unroll 8
    for (int j = 0; j < count; ++j) own += at(first + j);
    const double sum = before + running_sum(own);
    Place place;
    place.limit = limit < 0 ? uniform * last_lane(sum) : limit;
    const unsigned has = lx::ballot_sync(lx::kFullMask, own > 0);
    const unsigned hit = lx::ballot_sync(lx::kFullMask, own > 0 && sum > place.limit);
    double below = lx::shfl_up_sync(lx::kFullMask, sum, 1u);
    if (lane == 0) below = before;
    if (has == 0) return place;
    const int owner = pick_lane(hit, has);
    int index = -1;
    double in_front = below;
    if (lane == owner) {
        for (int j = 0; j < count && !(index >= 0 && below > place.limit); ++j) {
            const double w = at(first + j);
            if (!(w > 0)) continue;
            index = first + j;
            in_front = below;
            below += w;
        }
    }
    place.index = lx::shfl_sync(lx::kFullMask, index, owner);
    place.before = lx::shfl_sync(lx::kFullMask, in_front, owner);
    return place;
}

__global__ void __launch_bounds__(lx::kWarpSize)
    verify_pick_kernel(const __grid_constant__ SpecVerifyArgs args,
                       const __grid_constant__ LeafRows target,
                       const __grid_constant__ VerifySpace space) {
    const int64_t row = blockIdx.x;
    const int V = static_cast<int>(args.vocabulary);
    const float scale = static_cast<float>(args.inverse_temperature);
    const float uniform =
        static_cast<const float*>(args.uniforms)[(row + 1) * (args.n_token + 1) - 1];
    lx::grid_dependency_wait();
    const VerifyDecision decision = space.decision[row];
    const int64_t logits =
        row * args.target_stride + int64_t{decision.accepted} * target.vocabulary;
    int token = -1;
    // The first iteration draws from max(0, p - q); if this is 0 for all tokens, the second draws
    // from p.
    for (int way = 0; way < 2 && token < 0; ++way) {
        const double* const sums = space.sums + (row * 2 + way) * space.blocks;
        const Place block =
            find_among_runs(space.blocks, 0, -1, uniform, [&](int i) { return sums[i]; });
        if (block.index < 0) continue;
        const int base = block.index * kBlockTokens;
        const Place place = find_among_runs(
            lx::min(kBlockTokens, V - base), block.before, block.limit, 0, [&](int i) -> double {
                return way == 0 ? space.weights[row * V + base + i]
                                : p_of(target.at(0, logits + base + i), decision.stats, scale);
            });
        token = base + lx::max(place.index, 0);
    }
    if (lx::lane_id() == 0) args.next_token[row] = lx::max(token, 0);
}

}  // namespace

int64_t verify_weights_bytes(const SpecVerifyArgs& args) {
    return kVerifyWarps * kBlockTokens * 4 + args.components * static_cast<int64_t>(sizeof(Norm));
}

LaunchStatus run_verify_token(const SpecVerifyArgs& args, const Leaves& leaves,
                              const LeafRows& target, const VerifySpace& space, void* stream) {
    const int64_t B = args.rows;
    using enum lx::Access;
    declare_space(args, leaves, space, kRead, kRead, kWrite);
    const LaunchStatus status = with_dtype(args.leaf_dtype, [&]<class L>() {
        return LX_LAUNCH_PDL(verify_weights_kernel<L>, static_cast<unsigned>(B * space.blocks),
                             kVerifyThreads, static_cast<size_t>(verify_weights_bytes(args)),
                             stream, args, leaves, target, space);
    });
    if (status) return status;
    declare_space(args, leaves, space, kRead, kRead, kRead);
    return LX_LAUNCH_PDL(verify_pick_kernel, static_cast<unsigned>(B), lx::kWarpSize, 0, stream,
                         args, target, space);
}

}  // namespace lora_ext
