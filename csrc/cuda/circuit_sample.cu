// Draws a window of K tokens from a circuit, in one launch with one block per row of the batch. At
// each position k
//   state ~ softmax(cur), token ~ softmax(leaf[k, state]), e[z] = leaf[k, z, token] - norm[k, z]
// A row of logits is read once for its norm. Of each position, the row of the drawn state and the C
// logits of the drawn token are read again, from cache. See circuit_row.cuh for the team that
// walks. Bound: one multiprocessor reads the logits of one row of the batch, then takes K short
// steps, each of which needs the result of the previous one.
#include "circuit_row.cuh"

namespace lora_ext {
namespace {

template <class P, class Team>
__global__ void __launch_bounds__(kRowThreads<Team>, 1)
    circuit_sample_kernel(const __grid_constant__ CircuitSampleArgs args,
                          const __grid_constant__ Leaves leaves, bool trans_aligned) {
    LX_DYN_SHARED(shared);
    const CircuitParams& c = args.logits.circuit;
    const int64_t row = blockIdx.x;
    const Row<Team> own(args.logits, leaves, row, reinterpret_cast<float*>(shared));
    own.prepare(c.n_token);
    if (kByWarp<Team> && lx::warp_id() > 0) return;

    const CircuitWalk<P, Team> walk(c, row, trans_aligned, own.walk);
    const float* const uniforms = static_cast<const float*>(args.uniforms) + row * c.n_token * 2;
    walk.run([&](int64_t k, const float* cur, double) -> const float* {
        const int64_t at = row * c.n_token + k;
        const LeafRows rows = leaves.rows(row, k);
        const float total = posterior_of(walk, cur, own.state);
        walk.for_own([&](int z) {
            static_cast<float*>(args.posterior)[at * own.components + z] = own.state[z];
        });
        const Norm* const norms = own.norms_at(k);
        int64_t token = args.evidence ? args.evidence[at] : -1;
        if (token < 0) {
            const int z = lx::max(find(own.state, own.components, uniforms[2 * k]).index, 0);
            token = lx::max(
                draw_token(walk.team, own.sums, rows, z, norms[z].top, uniforms[2 * k + 1]), 0);
        }
        const bool possible = token < leaves.vocabulary;  // not yet checked on a GPU
        walk.for_own(
            [&](int z) { own.e[z] = possible ? norms[z].log_p(rows.at(z, token)) : kImpossible; });
        const float top =
            walk.reduce(kImpossible, larger, [&](int z) { return cur[z] + own.e[z]; });
        const float shift = shift_of(top);
        const float sum = walk.reduce(
            0.0f, add, [&](int z) { return lx::exp_approx(cur[z] + own.e[z] - shift); });
        if (walk.team.rank() == 0) {
            args.tokens[at] = token;
            static_cast<float*>(args.conditional)[at] =
                sum > 0 ? logf(sum) + shift - total : kImpossible;
        }
        return own.e;
    });
}

}  // namespace

int64_t circuit_block_bytes() {
    return most_dynamic_bytes();
}
int64_t circuit_row_bytes(const CircuitLogits& logits) {
    const CircuitParams& c = logits.circuit;
    return walks_by_warp(logits) ? shared_bytes<WarpTeam>(c) : shared_bytes<BlockTeam>(c);
}

LaunchStatus launch_circuit_sample(const CircuitSampleArgs& args, void* stream) {
    const CircuitParams& c = args.logits.circuit;
    if (c.rows == 0) return 0;
    const auto declare = [&] {
        [[maybe_unused]] const int64_t positions = c.rows * c.n_token;
        LX_BUF(args.uniforms, positions * 8, lx::Access::kConstant);
        if (args.evidence) LX_BUF(args.evidence, positions * 8, lx::Access::kConstant);
        LX_BUF(args.tokens, positions * 8, lx::Access::kWrite);
        LX_BUF(args.conditional, positions * 4, lx::Access::kWrite);
        LX_BUF(args.posterior, positions * c.components * 4, lx::Access::kWrite);
    };
    return with_circuit(args.logits, nullptr, stream, declare,
                        [&]<class P, class Team>(const Leaves& leaves, bool aligned) {
                            return LX_LAUNCH((circuit_sample_kernel<P, Team>),
                                             static_cast<unsigned>(c.rows), kRowThreads<Team>,
                                             shared_bytes<Team>(c), stream, args, leaves, aligned);
                        });
}

}  // namespace lora_ext
