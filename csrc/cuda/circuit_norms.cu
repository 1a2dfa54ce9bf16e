// Computes the norms of leaves in a separate launch, which is used if one multiprocessor would need
// too long to read the logits of a row of the batch. The eight warps of a block read rows of V
// logits as in circuit_row.cuh. Bound: bytes of the logits.
#include "circuit_decode.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / lx::kWarpSize;
// Bytes of logits of one row of the batch that a block reads in about the time of another launch.
constexpr int64_t kBlockBytes = 512 * 1024;

__global__ void __launch_bounds__(kThreads)
    circuit_norms_kernel(const __grid_constant__ Leaves leaves, Norm* norms, const int64_t* last,
                         int states, int blocks) {
    const int64_t row = blockIdx.x / blocks;
    const int block = static_cast<int>(blockIdx.x % blocks);
    int count = states;
    if (last) {
        const int64_t positions = lx::max<int64_t>(last[row], 0) + 1;
        count = static_cast<int>(lx::min<int64_t>(positions * leaves.components, states));
    }
    for_norms(leaves.rows(row, 0), count, block * kWarps + lx::warp_id(), blocks * kWarps,
              [&](int z, const Norm& norm) { norms[row * states + z] = norm; });
}

}  // namespace

int64_t circuit_workspace_bytes(const CircuitLogits& logits) {
    const CircuitParams& c = logits.circuit;
    const int64_t states = c.n_token * c.components;
    const bool large = states * logits.vocabulary * element_size(logits.dtype) > kBlockBytes;
    return large ? c.rows * states * static_cast<int64_t>(sizeof(Norm)) : 0;
}

LaunchStatus run_norms(const CircuitLogits& logits, const Leaves& leaves, const int64_t* last,
                       void* stream) {
    if (!logits.workspace) return 0;
    const CircuitParams& c = logits.circuit;
    const int states = static_cast<int>(c.n_token * c.components);
    const int64_t blocks = ceil_div(states, kWarps);
    if (c.rows * blocks > INT32_MAX) return kInvalidValue;
    declare_leaves(leaves, c.rows, c.n_token);
    LX_BUF(logits.workspace, circuit_workspace_bytes(logits), lx::Access::kWrite);
    if (last) LX_BUF(last, c.rows * 8, lx::Access::kConstant);
    return LX_LAUNCH(circuit_norms_kernel, static_cast<unsigned>(c.rows * blocks), kThreads, 0,
                     stream, leaves, static_cast<Norm*>(logits.workspace), last, states,
                     static_cast<int>(blocks));
}

}  // namespace lora_ext
