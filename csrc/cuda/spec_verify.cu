// Verifies the drafts of all rows. Token x_k is accepted while u_k < p_k(x_k) / q(x_k | x_<k), and
// never if q is 0 (p / q is then not a probability, and the circuit cannot have drawn x_k). Then a
// token is drawn from max(0, p - q) at the first rejected position, or from p after the last draft.
//
// This file uses one launch with one block per row of the batch. A warp per row of target (the
// model's logits of one position) computes the maximum, then the sum of exp((logit - max) / T),
// reading from cache the second time. All positions are processed at once, since otherwise most
// warps of the block would idle. After one barrier every thread knows the rejected position. Groups
// of lanes compute the norms of the leaves of that position. Then lanes iterate over the
// vocabulary; each weight of the draw costs C exponentials. To find the index, the warps recompute
// the weights of one chunk (see draw). Bound: latency of a load, a barrier and C exponentials.
// Above 32768 logits the bound would be bytes, and spec_verify_grid.cu is used instead.
#include "spec_verify.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / lx::kWarpSize;

struct Tested {
    Stats stats;
    bool accepted;
};

int64_t shared_bytes(const SpecVerifyArgs& args) {
    return kDrawChunks * 8 + (args.n_token + 1) * static_cast<int64_t>(sizeof(Tested)) +
           (2 * args.components + BlockTeam::kScratch) * 4;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    spec_verify_kernel(const __grid_constant__ SpecVerifyArgs args,
                       const __grid_constant__ Leaves leaves, bool target_aligned) {
    LX_DYN_SHARED(shared);
    const int64_t row = blockIdx.x;
    const int K = static_cast<int>(args.n_token), C = static_cast<int>(args.components);
    const int V = static_cast<int>(args.vocabulary);
    const int lane = lx::lane_id(), warp = lx::warp_id();
    double* const sums = reinterpret_cast<double*>(shared);
    Tested* const tested = reinterpret_cast<Tested*>(sums + kDrawChunks);
    Norm* const weights = reinterpret_cast<Norm*>(tested + K + 1);  // log_sum minus log posterior
    const BlockTeam team(reinterpret_cast<float*>(weights + C));
    const T* const target = static_cast<const T*>(args.target) + row * args.target_stride;
    const int given = given_tokens(args, row);
    const float scale = static_cast<float>(args.inverse_temperature);
    const bool greedy = scale == 0;

    for (int k = given + warp; k <= K; k += kWarps) {
        const T* const logits = target + int64_t{k} * V;
        const Largest best = largest_of(logits, V, target_aligned);
        const float shift = shift_of(best.value);
        float sum = 0;
        if (!greedy)
            for_pieces(logits, V, target_aligned, lane, lx::kWarpSize, [&](int, const auto& v) {
#pragma unroll
                for (int j = 0; j < kPiece<T>; ++j) sum += lx::exp_approx((v[j] - shift) * scale);
            });
        sum = reduce_lanes(sum, lx::kWarpSize, add);
        if (lane == 0) {
            const Stats stats{shift, sum, best.index};
            bool accepted = false;
            if (k < K)
                accepted = stands(
                    draft_of(args, row, k, [&](int64_t at) { return lx::to_float(logits[at]); }),
                    stats, scale);
            tested[k] = {stats, accepted};
        }
    }
    lx::syncthreads();
    int accepted = given;
    while (accepted < K && tested[accepted].accepted) ++accepted;
    const Stats& own = tested[accepted].stats;
    if (lx::thread_rank() == 0) args.accepted[row] = accepted;
    if (greedy) {
        if (lx::thread_rank() == 0) args.next_token[row] = own.argmax;
        return;
    }

    const T* const logits = target + int64_t{accepted} * V;
    const LeafRows rows = leaves.rows(row, lx::min(accepted, K - 1));
    bool whole = accepted == K;
    if (!whole) {
        const float* const posterior =
            static_cast<const float*>(args.posterior) + (row * K + accepted) * C;
        for_norms(rows, C, warp, kWarps, [&](int z, const Norm& norm) {
            weights[z] = weight_of_state(norm, posterior[z]);
        });
        lx::syncthreads();
    }
    const float factor = own.sum > 0 ? lx::reciprocal_approx(own.sum) : 0.0f;
    const float uniform = static_cast<const float*>(args.uniforms)[row * (K + 1) + K];
    int token = -1;
    while (token < 0) {
        token = draw<1>(team, sums, V, uniform, [&](int v, float (&w)[1]) {
            const float logit = lx::to_float(lx::load_nc(logits + v));
            w[0] = lx::exp_approx((logit - own.top) * scale) * factor;
            if (whole) return;
            rows.with_row(0, [&](const auto* leaf) {
                float q = 0;
#pragma unroll 4
                for (int z = 0; z < C; ++z)
                    q += lx::exp_approx(lx::to_float(lx::load_nc(leaf + int64_t{z} * V + v)) -
                                        weights[z].top - weights[z].log_sum);
                w[0] = fmaxf(w[0] - q, 0.0f);
            });
        });
        if (whole) break;
        whole = true;  // no token has p > q: draw from p
    }
    if (lx::thread_rank() == 0) args.next_token[row] = lx::max(token, 0);
}

}  // namespace

LaunchStatus launch_spec_verify(const SpecVerifyArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    const int64_t V = args.vocabulary, size = element_size(args.target_dtype);
    const bool aligned = aligned_16(args.target, {args.target_stride, V}, size);
    const Leaves leaves =
        leaves_of(args.leaf, args.leaf_stride, args.leaf_dtype, args.components, V);
    if (verified_by_grid(args)) return run_verify_grid(args, leaves, aligned, stream);
    declare_verify(args, leaves);
    LX_BUF(args.accepted, args.rows * 8, lx::Access::kWrite);
    LX_BUF(args.next_token, args.rows * 8, lx::Access::kWrite);
    return with_dtype(args.target_dtype, [&]<class T>() {
        return LX_LAUNCH(spec_verify_kernel<T>, static_cast<unsigned>(args.rows), kThreads,
                         shared_bytes(args), stream, args, leaves, aligned);
    });
}

}  // namespace lora_ext
