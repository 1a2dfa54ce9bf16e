// The most probable tokens and latents of each row, in one launch.
//
// One block per row of the batch; values and choices stay in shared memory.
//   best      a group of lanes per row of leaf logits computes log p of its mode or given token
//   upward    latent by latent, children first: a warp per row of the latent's matrix computes the
//             row's norm, then the maximum of log softmax + value below and its index
//   downward  one thread follows the choices; a warp per position selects the token
// Bound: one multiprocessor reads the logits of one row of the batch, then takes M short steps,
// each of which needs the result of the previous one. A step reads its matrix twice, the second
// time from cache.
#include "circuit_decode.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / lx::kWarpSize;

int64_t shared_bytes(const CircuitParams& c) {
    const int64_t M = circuit_num_transitions(c.kind, c.n_token), C = c.components;
    return 4 * (c.n_token * C + 2 * M * C + C + M + 1);
}

// Returns the maximum of log softmax(logits) + below and its first index, the same on every lane of
// the warp. If logits is nullptr, the distribution is uniform.
template <class P>
LX_DEVICE Largest best_step(const P* logits, bool aligned, const float* below, int n) {
    const int lane = lx::lane_id();
    Norm norm{0, logf(static_cast<float>(n))};
    if (logits) {
        OnlineSum mine;
        for_pieces(logits, n, aligned, lane, lx::kWarpSize,
                   [&](int, const auto& v) { mine.add(v); });
        norm = norm_of(mine, lx::kWarpSize);
    }
    float top = kImpossible;
    int index = 0x7fffffff;
    for (int z = lane; z < n; z += lx::kWarpSize) {
        const float step = norm.log_p(logits ? lx::to_float(lx::load_nc(logits + z)) : 0.0f);
        if (step + below[z] > top) {
            top = step + below[z];
            index = z;
        }
    }
    const float best = reduce_lanes(top, lx::kWarpSize, larger);
    index = lx::reduce_min_sync(lx::kFullMask, top == best ? index : 0x7fffffff);
    return {best, index < n ? index : 0};
}

template <class P>
__global__ void __launch_bounds__(kThreads, 1)
    circuit_argmax_kernel(const __grid_constant__ CircuitArgmaxArgs args,
                          const __grid_constant__ Leaves leaves, int M, bool trans_aligned) {
    LX_DYN_SHARED(shared);
    const CircuitParams& c = args.logits.circuit;
    const int64_t row = blockIdx.x;
    const int K = static_cast<int>(c.n_token), C = static_cast<int>(c.components);
    const int V = leaves.vocabulary, lane = lx::lane_id(), warp = lx::warp_id();
    float* const best = reinterpret_cast<float*>(shared);    // (K, C): log p of mode or given token
    float* const stepped = best + K * C;                     // (M, C), at the parent's state
    float* const value = stepped + M * C;                    // (C,)
    int* const choices = reinterpret_cast<int*>(value + C);  // (M, C)
    int* const states = choices + M * C + 1;                 // (M,); entry -1 is the root's state
    const int64_t* const evidence = args.evidence ? args.evidence + row * K : nullptr;
    const auto given = [&](int k) { return evidence ? evidence[k] : int64_t{-1}; };

    const auto take_best = [&](int i, const Norm& norm) {
        const int64_t token = given(i / C);
        best[i] = norm.log_p(token < 0   ? norm.top
                             : token < V ? leaves.rows(row, i / C).at(i % C, token)
                                         : kImpossible);
    };
    if (const Norm* norms = norms_of(args.logits, row))
        for (int i = lx::thread_rank(); i < K * C; i += kThreads) take_best(i, norms[i]);
    else  // one call for all positions, because their rows are contiguous
        for_norms(leaves.rows(row, 0), K * C, warp, kWarps, take_best);
    for (int m = M - 1; m >= -1; --m) {
        lx::syncthreads();
        const CircuitLatent latent = circuit_latent(c.kind, K, m);
        for (int z = lx::thread_rank(); z < C; z += kThreads) {
            float sum = 0;
            for (int64_t inner : latent.inner)
                if (inner >= 0) sum += stepped[inner * C + z];
            for (int k = 0; k < latent.num_leaves; ++k)
                sum += best[(latent.first_leaf + k) * C + z];
            value[z] = sum;
        }
        lx::syncthreads();
        const P* const matrix =
            static_cast<const P*>(c.trans) + row * c.trans_stride + int64_t{m} * C * C;
        for (int z = warp; m >= 0 && z < C; z += kWarps) {
            const Largest step = best_step(matrix + z * C, trans_aligned, value, C);
            if (lane == 0) {
                stepped[m * C + z] = step.value;
                choices[m * C + z] = step.index;
            }
        }
    }
    if (warp == 0) {
        const P* const prior =
            c.prior ? static_cast<const P*>(c.prior) + row * c.prior_stride : nullptr;
        const Largest root = best_step(prior, false, value, C);
        if (lane == 0) {
            states[-1] = root.index;
            static_cast<float*>(args.value)[row] = root.value;
            for (int m = -1; m < M; ++m)
                for (int64_t inner : circuit_latent(c.kind, K, m).inner)
                    if (inner >= 0) states[inner] = choices[inner * C + states[m]];
        }
    }
    lx::syncthreads();
    for (int m = -1; m < M; ++m) {
        const CircuitLatent latent = circuit_latent(c.kind, K, m);
        for (int64_t k = latent.first_leaf; k < latent.first_leaf + latent.num_leaves; ++k) {
            if (k % kWarps != warp) continue;
            int64_t token = given(static_cast<int>(k));
            if (token < 0) {
                const LeafRows rows = leaves.rows(row, k);
                token = rows.with_row(states[m], [&](const auto* logits) {
                    return largest_of(logits, V, rows.aligned).index;
                });
            }
            if (lane == 0) args.tokens[row * K + k] = token;
        }
    }
}

}  // namespace

int64_t circuit_argmax_bytes(const CircuitLogits& logits) {
    return shared_bytes(logits.circuit);
}

LaunchStatus launch_circuit_argmax(const CircuitArgmaxArgs& args, void* stream) {
    const CircuitLogits& logits = args.logits;
    const CircuitParams& c = logits.circuit;
    if (c.rows == 0) return 0;
    const Leaves leaves =
        leaves_of(logits.leaf, logits.leaf_stride, logits.dtype, c.components, logits.vocabulary);
    const int M = static_cast<int>(circuit_num_transitions(c.kind, c.n_token));
    if (const LaunchStatus status = run_norms(logits, leaves, nullptr, stream)) return status;
    [[maybe_unused]] const int64_t positions = c.rows * c.n_token;
    declare_circuit(logits, leaves);
    if (args.evidence) LX_BUF(args.evidence, positions * 8, lx::Access::kConstant);
    LX_BUF(args.tokens, positions * 8, lx::Access::kWrite);
    LX_BUF(args.value, c.rows * 4, lx::Access::kWrite);
    return with_dtype(c.dtype, [&]<class P>() {
        return LX_LAUNCH(circuit_argmax_kernel<P>, static_cast<unsigned>(c.rows), kThreads,
                         shared_bytes(c), stream, args, leaves, M, trans_aligned(c));
    });
}

}  // namespace lora_ext
