// Computes log q(v | x_<k) of one position of each row for the whole vocabulary, in one launch with
// one block per row.
//
// The walk to position k stores log posterior[z] - log_sum[z] of that position in shared memory.
// Then the lanes iterate over the vocabulary and read the C logits of a token twice: first for
// their maximum, then for their exponentials relative to it, since a sum of probabilities could
// underflow. Bound: one multiprocessor reads the logits of k + 1 positions and computes C
// exponentials per token.
#include "circuit_row.cuh"

namespace lora_ext {
namespace {

template <class P, class Team>
__global__ void __launch_bounds__(kRowThreads<Team>, 1)
    circuit_conditional_dist_kernel(const __grid_constant__ CircuitConditionalArgs args,
                                    const __grid_constant__ Leaves leaves, bool trans_aligned) {
    LX_DYN_SHARED(shared);
    const CircuitParams& c = args.logits.circuit;
    const int64_t row = blockIdx.x;
    const int C = static_cast<int>(c.components), V = leaves.vocabulary;
    const int64_t last = lx::min(lx::max<int64_t>(args.k[row], 0), c.n_token - 1);
    const Row<Team> own(args.logits, leaves, row, reinterpret_cast<float*>(shared));
    own.prepare(last + 1);

    if (!kByWarp<Team> || lx::warp_id() == 0) {
        const CircuitWalk<P, Team> walk(c, row, trans_aligned, own.walk);
        walk.run([&](int64_t k, const float* cur, double) -> const float* {
            const int64_t token = k < last ? args.x[row * c.n_token + k] : -1;
            const LeafRows rows = leaves.rows(row, k);
            const Norm* const norms = k <= last ? own.norms_at(k) : nullptr;
            if (k == last) {
                const float total = posterior_of(walk, cur, own.state);
                // state[z] becomes the part of component z's exponent that does not depend on the
                // token.
                walk.for_own([&](int z) {
                    const bool none = cur[z] == kImpossible || norms[z].log_sum == kImpossible;
                    own.state[z] = none ? kImpossible : cur[z] - total - norms[z].log_sum;
                });
            }
            walk.for_own([&](int z) {
                own.e[z] = token < 0                   ? 0.0f
                           : token < leaves.vocabulary ? norms[z].log_p(rows.at(z, token))
                                                       : kImpossible;
            });
            return own.e;
        });
    }
    lx::syncthreads();
    const Norm* const norms = own.last_norms(last);
    leaves.rows(row, last).with_row(0, [&](const auto* leaf) {
        for (int v = lx::thread_rank(); v < V; v += kRowThreads<Team>) {
            const auto term = [&](int z) {
                return lx::to_float(lx::load_nc(leaf + int64_t{z} * V + v)) - norms[z].top +
                       own.state[z];
            };
            float top = kImpossible, sum = 0;
            for (int z = 0; z < C; ++z) top = fmaxf(top, term(z));
            const float shift = shift_of(top);
            for (int z = 0; z < C; ++z) sum += lx::exp_approx(term(z) - shift);
            static_cast<float*>(args.out)[row * V + v] = logf(sum) + shift;
        }
    });
}

}  // namespace

LaunchStatus launch_circuit_conditional_dist(const CircuitConditionalArgs& args, void* stream) {
    const CircuitParams& c = args.logits.circuit;
    if (c.rows == 0) return 0;
    const auto declare = [&] {
        LX_BUF(args.x, c.rows * c.n_token * 8, lx::Access::kConstant);
        LX_BUF(args.k, c.rows * 8, lx::Access::kConstant);
        LX_BUF(args.out, c.rows * args.logits.vocabulary * 4, lx::Access::kWrite);
    };
    return with_circuit(args.logits, args.k, stream, declare,
                        [&]<class P, class Team>(const Leaves& leaves, bool aligned) {
                            return LX_LAUNCH((circuit_conditional_dist_kernel<P, Team>),
                                             static_cast<unsigned>(c.rows), kRowThreads<Team>,
                                             shared_bytes<Team>(c), stream, args, leaves, aligned);
                        });
}

}  // namespace lora_ext
