// Verification if the logits of a row of the batch are too many for one multiprocessor: four
// kernels that each use the whole machine. Each kernel may start before the previous one ends, and
// waits before it reads that kernel's results.
//
//   verify_target   (row, position, span)  maximum and sum of exp of 2048 logits of target
//   verify_leaves   (row, state, span)     in every block, the rejected position from these sums;
//                                          then maximum and sum of 2048 logits of a leaf there
//   verify_weights  (row, 512 tokens)      p - q of each token, stored, and their sum
//   verify_pick     (row)                  the token, from the sums and then from the weights
//
// All four are needed: the choice of leaves depends on the rejected position, q on all of these
// leaves, and the token on the sum of all weights. A row's leaves are thus read twice, first from
// memory and then from L2; p - q is computed once.
//
// A warp reads a span of 2048 logits by loads of 16 bytes per lane, all in flight at once. The
// maxima and sums of spans are combined in a tree. In verify_weights the eight warps of a block
// divide the states, so that a lane loads eight leaves at once; their shares of q are added in the
// order of the warps. Weights are float32, sums of weights double. Every order depends only on V, C
// and the types. Bound: bytes of K + 1 rows of target and C rows of leaves; 2 C V exponentials.
#include "spec_verify_grid.cuh"

namespace lora_ext {
namespace {

constexpr int64_t kBlockLogits = 32768;  // one block reads them in about the time of three launches
constexpr int kSpanLogits = 2048;        // logits of a row that a warp reads

// Returns the layout of the workspace, and sets `end` to the end of the workspace.
VerifySpace space_of(const SpecVerifyArgs& args, uintptr_t& end) {
    VerifySpace space{};
    end = reinterpret_cast<uintptr_t>(args.workspace);
    const auto take = [&]<class X>(X*& p, int64_t count) {
        p = reinterpret_cast<X*>(end);
        end += static_cast<uintptr_t>(ceil_div(count * static_cast<int64_t>(sizeof(X)), 16) * 16);
    };
    const int64_t B = args.rows;
    space.spans = static_cast<int>(ceil_div(args.vocabulary, kSpanLogits));
    space.blocks = static_cast<int>(ceil_div(args.vocabulary, kBlockTokens));
    take(space.sums, B * 2 * space.blocks);
    take(space.target, B * (args.n_token + 1) * space.spans);
    take(space.argmax, B * (args.n_token + 1) * space.spans);
    take(space.leaves, B * args.components * space.spans);
    take(space.decision, B);
    take(space.weights, B * args.vocabulary);
    return space;
}

// Calls f for a lane's pieces of a span of `n` logits starting at p.
template <class T, class F>
LX_DEVICE void for_span(const T* p, int n, bool aligned, F&& f) {
    for_pieces<8>(p, n, aligned, lx::lane_id(), lx::kWarpSize, f);
}

template <class T>
__global__ void __launch_bounds__(kVerifyThreads)
    verify_target_kernel(const __grid_constant__ SpecVerifyArgs args,
                         const __grid_constant__ VerifySpace space, bool aligned) {
    lx::grid_dependency_launch();
    const int64_t of_row = (args.n_token + 1) * space.spans;
    const int64_t unit = int64_t{blockIdx.x} * kVerifyWarps + lx::warp_id();
    if (unit >= args.rows * of_row) return;
    const int64_t row = unit / of_row, k = unit % of_row / space.spans;
    const int first = static_cast<int>(unit % space.spans) * kSpanLogits;
    const int n = lx::min(kSpanLogits, static_cast<int>(args.vocabulary) - first);
    const T* const p =
        static_cast<const T*>(args.target) + row * args.target_stride + k * args.vocabulary + first;
    const float scale = static_cast<float>(args.inverse_temperature);
    if (scale == 0) {
        float top = kImpossible;
        int index = 0x7fffffff;
        for_span(p, n, aligned, [&](int i, const auto& v) {
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j) {
                if (v[j] > top) {
                    top = v[j];
                    index = i + j;
                }
            }
        });
        const Largest best = largest_among(n, top, index);
        if (lx::lane_id() == 0) {
            space.target[unit] = {best.value, 0};
            space.argmax[unit] = first + best.index;
        }
        return;
    }
    OnlineSum own;
    for_span(p, n, aligned, [&](int, const auto& v) {
        float most = own.top;
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) most = fmaxf(most, v[j]);
        const float shift = shift_of(most);
        own.sum *= lx::exp_approx((own.top - shift) * scale);
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) own.sum += lx::exp_approx((v[j] - shift) * scale);
        own.top = most;
    });
    const OnlineSum all = sum_of_lanes(own, lx::kWarpSize, scale);
    if (lx::lane_id() == 0) space.target[unit] = all;
}

// ------------------------------------------------------------------------------------------------
// The rejected position, and norms of its leaves

struct Tested {
    Draft draft;
    Stats stats;
    bool stands;
};

// Returns the first index of the largest logit of a row of target. The whole warp must call this.
LX_DEVICE int argmax_of_spans(const VerifySpace& space, int64_t first, int vocabulary) {
    float top = kImpossible;
    int index = 0x7fffffff;
#pragma unroll 1
    for (int i = lx::lane_id(); i < space.spans; i += lx::kWarpSize) {
        const float next = space.target[first + i].top;
        const int place = space.argmax[first + i];
        if (next > top) {
            top = next;
            index = place;
        }
    }
    return largest_among(vocabulary, top, index).index;
}

// Tests the drafts, tested[k].draft, of a row's positions from `given` on. Ends with a barrier.
LX_DEVICE void test_positions(const VerifySpace& space, int64_t row, int given, int K,
                              int vocabulary, float scale, Tested* tested) {
    const int lane = lx::lane_id(), group = lane / kSpanLanes, warp = lx::warp_id();
    const int64_t first = row * (K + 1) * space.spans;
    if (scale == 0) {
        for (int k = given + warp; k <= K; k += kVerifyWarps) {
            const int index = argmax_of_spans(space, first + int64_t{k} * space.spans, vocabulary);
            if (lane == 0) tested[k].stats = {0, 0, index};
        }
    } else {
        for (int k0 = given + warp * kWarpRows; k0 <= K; k0 += kRowsAtOnce) {
            const int k = k0 + group;
            const OnlineSum all = sum_of_spans(
                space.target + first + int64_t{lx::min(k, K)} * space.spans, space.spans, scale);
            if (k <= K && lane % kSpanLanes == 0) tested[k].stats = {all.top, all.sum, 0};
        }
    }
    lx::syncthreads();
    for (int k = given + lx::thread_rank(); k < K; k += kVerifyThreads)
        tested[k].stands = stands(tested[k].draft, tested[k].stats, scale);
    lx::syncthreads();
}

template <class L>
__global__ void __launch_bounds__(kVerifyThreads)
    verify_leaves_kernel(const __grid_constant__ SpecVerifyArgs args,
                         const __grid_constant__ Leaves leaves,
                         const __grid_constant__ LeafRows target,
                         const __grid_constant__ VerifySpace space, int blocks) {
    lx::grid_dependency_launch();
    LX_DYN_SHARED(shared);
    Tested* const tested = reinterpret_cast<Tested*>(shared);
    const int64_t row = blockIdx.x / blocks;
    const int block = static_cast<int>(blockIdx.x % blocks), thread = lx::thread_rank();
    const int K = static_cast<int>(args.n_token), C = static_cast<int>(args.components);
    const float scale = static_cast<float>(args.inverse_temperature);
    const int given = given_tokens(args, row);
#pragma unroll 1
    for (int k = thread; k < K; k += kVerifyThreads)
        tested[k].draft = draft_of(args, row, k, [&](int64_t token) {
            return target.at(0, row * args.target_stride + int64_t{k} * target.vocabulary + token);
        });
    lx::grid_dependency_wait();
    test_positions(space, row, given, K, target.vocabulary, scale, tested);
    int accepted = given;
    while (accepted < K && tested[accepted].stands) ++accepted;
    if (block == 0 && thread == 0) {
        args.accepted[row] = accepted;
        space.decision[row] = {tested[accepted].stats, accepted};
        if (scale == 0) args.next_token[row] = tested[accepted].stats.argmax;
    }
    if (scale == 0 || accepted == K) return;

    const int unit = block * kVerifyWarps + lx::warp_id(), z = unit / space.spans;
    if (z >= C) return;
    const int first = unit % space.spans * kSpanLogits;
    const LeafRows rows = leaves.rows(row, accepted);
    const L* const p = static_cast<const L*>(rows.first) + int64_t{z} * rows.vocabulary + first;
    OnlineSum own;
    for_span(p, lx::min(kSpanLogits, rows.vocabulary - first), rows.aligned,
             [&](int, const auto& v) { own.add(v); });
    const OnlineSum all = sum_of_lanes(own, lx::kWarpSize, 1.0f);
    if (lx::lane_id() == 0) space.leaves[(row * C + z) * space.spans + unit % space.spans] = all;
}

}  // namespace

bool verified_by_grid(const SpecVerifyArgs& args) {
    return (args.components + args.n_token + 1) * args.vocabulary > kBlockLogits;
}

int64_t spec_verify_workspace_bytes(const SpecVerifyArgs& args) {
    if (!verified_by_grid(args)) return 0;
    SpecVerifyArgs sized = args;
    sized.workspace = nullptr;
    uintptr_t end;
    space_of(sized, end);
    return static_cast<int64_t>(end);
}

LaunchStatus run_verify_grid(const SpecVerifyArgs& args, const Leaves& leaves, bool aligned,
                             void* stream) {
    const int64_t B = args.rows, K = args.n_token, C = args.components;
    uintptr_t end;
    const VerifySpace space = space_of(args, end);
    const bool greedy = args.inverse_temperature == 0;
    const LeafRows target{args.target, args.target_dtype, leaves.vocabulary, aligned};
    const int64_t target_blocks = ceil_div(B * (K + 1) * space.spans, kVerifyWarps);
    const int64_t leaf_blocks = greedy ? 1 : ceil_div(C * space.spans, kVerifyWarps);
    const int64_t tested_bytes = (K + 1) * static_cast<int64_t>(sizeof(Tested));
    if (lx::max(target_blocks, B * lx::max<int64_t>(leaf_blocks, space.blocks)) > kMaxGridX ||
        lx::max(tested_bytes, verify_weights_bytes(args)) > most_dynamic_bytes())
        return kInvalidValue;
    using enum lx::Access;
    declare_space(args, leaves, space, kWrite, kRead, kRead);
    LaunchStatus status = with_dtype(args.target_dtype, [&]<class T>() {
        return LX_LAUNCH(verify_target_kernel<T>, static_cast<unsigned>(target_blocks),
                         kVerifyThreads, 0, stream, args, space, aligned);
    });
    if (status) return status;
    declare_space(args, leaves, space, kRead, kWrite, kRead);
    status = with_dtype(args.leaf_dtype, [&]<class L>() {
        return LX_LAUNCH_PDL(verify_leaves_kernel<L>, static_cast<unsigned>(B * leaf_blocks),
                             kVerifyThreads, static_cast<size_t>(tested_bytes), stream, args,
                             leaves, target, space, static_cast<int>(leaf_blocks));
    });
    if (status || greedy) return status;
    return run_verify_token(args, leaves, target, space, stream);
}

}  // namespace lora_ext
