// Verification if the logits of a row of the batch are too many for one multiprocessor: four
// kernels that each use the whole machine. Each kernel may start before the previous one ends, and
// waits for its results.
//
//   verify_target   (row, position, span)  maximum and sum of exp of 2048 logits of target
//   verify_leaves   (row, state, span)     in every block, the rejected position from these sums;
//                                          then maximum and sum of 2048 logits of its leaves
//   verify_weights  (row, 512 tokens)      p - q of each token, stored, and their sum
//   verify_pick     (row)                  the token, from the sums and then from the weights
//
// All four are needed: the choice of leaves depends on the rejected position, q on all of these
// leaves, and the token on the sum of all weights. A row's leaves are thus read twice, from memory
// and then from L2, and p - q is computed once.
//
// A warp reads a span of 2048 logits by loads of 16 bytes per lane, all in flight at once. The
// maxima and sums of spans are combined in a tree. In verify_weights the eight warps of a block
// divide the states, so that a lane loads eight leaves at once; their shares of q are added in the
// order of the warps. Weights are float32, sums of weights double. Every order depends only on V, C
// and the types. Bound: bytes of K + 1 rows of target and C rows of leaves; 2 C V exponentials.
#include "spec_verify.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / lx::kWarpSize;
constexpr int64_t kBlockLogits = 32768;  // one block reads them in about the time of three launches
constexpr int kSpan = 2048;              // logits of a row that a warp reads
constexpr int kTokens = 512;             // tokens per block of verify_weights
constexpr int kLaneTokens = 8;           // tokens that a lane processes at once
constexpr int kHalves = kTokens / (kLaneTokens * lx::kWarpSize);

// The decision for a row of the batch.
struct Decision {
    Stats stats;  // statistics of the row of target from which the token is drawn
    int accepted;
};

// Workspace: results that one kernel writes for the next.
struct Space {
    int spans, blocks;
    OnlineSum* target;   // (B, K + 1, spans)
    int* argmax;         // (B, K + 1, spans), only if greedy
    OnlineSum* leaves;   // (B, C, spans)
    Decision* decision;  // (B,)
    double* sums;        // (B, 2, blocks): sums of max(0, p - q), and of p
    float* weights;      // (B, V): max(0, p - q)
};
// Returns the layout of the workspace, and its end.
Space space_of(const SpecVerifyArgs& args, uintptr_t& end) {
    Space space{};
    end = reinterpret_cast<uintptr_t>(args.workspace);
    const auto take = [&]<class X>(X*& p, int64_t count) {
        p = reinterpret_cast<X*>(end);
        end += static_cast<uintptr_t>(ceil_div(count * static_cast<int64_t>(sizeof(X)), 16) * 16);
    };
    const int64_t B = args.rows;
    space.spans = static_cast<int>(ceil_div(args.vocabulary, kSpan));
    space.blocks = static_cast<int>(ceil_div(args.vocabulary, kTokens));
    take(space.sums, B * 2 * space.blocks);
    take(space.target, B * (args.n_token + 1) * space.spans);
    take(space.argmax, B * (args.n_token + 1) * space.spans);
    take(space.leaves, B * args.components * space.spans);
    take(space.decision, B);
    take(space.weights, B * args.vocabulary);
    return space;
}

// ------------------------------------------------------------------------------------------------
// Spans

// Adds sums `next` to `own`; each sum is of exp((x - maximum) * scale), with its maximum.
template <int kCount>
LX_DEVICE void add_sums(OnlineSum& own, const OnlineSum (&next)[kCount], float scale) {
    float most = own.top;
#pragma unroll
    for (int u = 0; u < kCount; ++u) most = fmaxf(most, next[u].top);
    const float shift = shift_of(most);
    own.sum *= lx::exp_approx((own.top - shift) * scale);
#pragma unroll
    for (int u = 0; u < kCount; ++u)
        own.sum += next[u].sum * lx::exp_approx((next[u].top - shift) * scale);
    own.top = most;
}
// Returns the combined sum of a group of lanes to all lanes of the group.
LX_DEVICE OnlineSum sum_of_lanes(const OnlineSum& own, int lanes, float scale) {
    const float top = shift_of(reduce_lanes(own.top, lanes, larger));
    const float sum = own.sum * lx::exp_approx((own.top - top) * scale);
    return {top, reduce_lanes(sum, lanes, add)};
}
// Returns the sum of a row's spans, which eight lanes load, eight each. The whole warp calls this.
constexpr int kGroup = 8, kGroups = lx::kWarpSize / kGroup, kRowsAtOnce = kWarps * kGroups;
LX_DEVICE OnlineSum sum_of_spans(const OnlineSum* part, int spans, float scale) {
    constexpr int kBatch = 8;
    OnlineSum own;
#pragma unroll 1
    for (int first = 0; first < spans; first += kBatch * kGroup) {
        const int at = first + lx::lane_id() % kGroup;
        OnlineSum next[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const uint2 words = lx::load_global(
                reinterpret_cast<const uint2*>(part + lx::min(at + u * kGroup, spans - 1)));
            next[u] = {lx::bit_cast<float>(words.x), lx::bit_cast<float>(words.y)};
        }
        lx::syncwarp();  // keeps the compiler from moving loads down to save registers
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
            if (at + u * kGroup >= spans) next[u] = OnlineSum{};
        add_sums(own, next, scale);
    }
    return sum_of_lanes(own, kGroup, scale);
}

// Calls f for a lane's pieces of a span of `n` logits starting at p.
template <class T, class F>
LX_DEVICE void for_span(const T* p, int n, bool aligned, F&& f) {
    for_pieces<8>(p, n, aligned, lx::lane_id(), lx::kWarpSize, f);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    verify_target_kernel(const __grid_constant__ SpecVerifyArgs args,
                         const __grid_constant__ Space space, bool aligned) {
    lx::grid_dependency_launch();
    const int64_t of_row = (args.n_token + 1) * space.spans;
    const int64_t unit = int64_t{blockIdx.x} * kWarps + lx::warp_id();
    if (unit >= args.rows * of_row) return;
    const int64_t row = unit / of_row, k = unit % of_row / space.spans;
    const int first = static_cast<int>(unit % space.spans) * kSpan;
    const int n = lx::min(kSpan, static_cast<int>(args.vocabulary) - first);
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
LX_DEVICE int argmax_of_spans(const Space& space, int64_t first, int vocabulary) {
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
LX_DEVICE void test_positions(const Space& space, int64_t row, int given, int K, int vocabulary,
                              float scale, Tested* tested) {
    const int lane = lx::lane_id(), group = lane / kGroup, warp = lx::warp_id();
    const int64_t first = row * (K + 1) * space.spans;
    if (scale == 0) {
        for (int k = given + warp; k <= K; k += kWarps) {
            const int index = argmax_of_spans(space, first + int64_t{k} * space.spans, vocabulary);
            if (lane == 0) tested[k].stats = {0, 0, index};
        }
    } else {
        for (int k0 = given + warp * kGroups; k0 <= K; k0 += kRowsAtOnce) {
            const int k = k0 + group;
            const OnlineSum all = sum_of_spans(
                space.target + first + int64_t{lx::min(k, K)} * space.spans, space.spans, scale);
            if (k <= K && lane % kGroup == 0) tested[k].stats = {all.top, all.sum, 0};
        }
    }
    lx::syncthreads();
    for (int k = given + lx::thread_rank(); k < K; k += kThreads)
        tested[k].stands = stands(tested[k].draft, tested[k].stats, scale);
    lx::syncthreads();
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    verify_leaves_kernel(const __grid_constant__ SpecVerifyArgs args,
                         const __grid_constant__ Leaves leaves,
                         const __grid_constant__ LeafRows target,
                         const __grid_constant__ Space space, int blocks) {
    lx::grid_dependency_launch();
    LX_DYN_SHARED(shared);
    Tested* const tested = reinterpret_cast<Tested*>(shared);
    const int64_t row = blockIdx.x / blocks;
    const int block = static_cast<int>(blockIdx.x % blocks), thread = lx::thread_rank();
    const int K = static_cast<int>(args.n_token), C = static_cast<int>(args.components);
    const float scale = static_cast<float>(args.inverse_temperature);
    const int given = given_tokens(args, row);
#pragma unroll 1
    for (int k = thread; k < K; k += kThreads)
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

    const int unit = block * kWarps + lx::warp_id(), z = unit / space.spans;
    if (z >= C) return;
    const int first = unit % space.spans * kSpan;
    const LeafRows rows = leaves.rows(row, accepted);
    const L* const p = static_cast<const L*>(rows.first) + int64_t{z} * rows.vocabulary + first;
    OnlineSum own;
    for_span(p, lx::min(kSpan, rows.vocabulary - first), rows.aligned,
             [&](int, const auto& v) { own.add(v); });
    const OnlineSum all = sum_of_lanes(own, lx::kWarpSize, 1.0f);
    if (lx::lane_id() == 0) space.leaves[(row * C + z) * space.spans + unit % space.spans] = all;
}

// ------------------------------------------------------------------------------------------------
// Weights

// kLaneTokens logits from index `at` on, in 16-byte loads if rows are aligned. Beyond index n they
// are other logits of the row, which the caller ignores.
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

// Returns the probability p of a token of the row.
LX_DEVICE float p_of(float logit, const Stats& stats, float scale) {
    const float factor = stats.sum > 0 ? lx::reciprocal_approx(stats.sum) : 0.0f;
    return lx::exp_approx((logit - stats.top) * scale) * factor;
}

// Computes states[z] from the spans of a row's leaves. Ends with a barrier.
LX_DEVICE void weigh_states(const Space& space, const float* posterior, int64_t row, int C,
                            Norm* states) {
    const int lane = lx::lane_id();
    for (int z0 = lx::warp_id() * kGroups; z0 < C; z0 += kRowsAtOnce) {
        const int z = lx::min(z0 + lane / kGroup, C - 1);
        const float p = lx::load_global(posterior + z);
        const OnlineSum all =
            sum_of_spans(space.leaves + (row * C + z) * space.spans, space.spans, 1.0f);
        if (z == z0 + lane / kGroup && lane % kGroup == 0)
            states[z] = weight_of_state({all.top, logf(all.sum)}, p);
    }
    lx::syncthreads();
}

// States whose leaves a lane has on their way at once: 128 bytes, or 96 on sm_100, where registers
// would spill. The order of the sums does not depend on it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kHalfStates = 3;
#else
constexpr int kHalfStates = 4;
#endif

// Computes a warp's share of q for the block's tokens, the sum over states warp, warp + 8, ..., and
// writes it to shared memory. Ends with a barrier.
template <class L, bool kAligned>
LX_DEVICE void share_q(const L* leaf, const Norm* states, int C, int V, int base, float* q_of) {
    constexpr int kBatch = sizeof(L) == 2 ? kHalfStates : 2;
    const int warp = lx::warp_id();
    const int first = lx::lane_id() * kLaneTokens, half = lx::kWarpSize * kLaneTokens;
    float q[kHalves][kLaneTokens] = {};
#pragma unroll 1
    for (int z0 = warp; z0 < C; z0 += kBatch * kWarps) {
        LaneLogits<L, kAligned> logits[kBatch][kHalves];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const L* const row = leaf + int64_t{lx::min(z0 + u * kWarps, C - 1)} * V;
#pragma unroll
            for (int h = 0; h < kHalves; ++h) logits[u][h].load(row, base + h * half + first, V);
        }
        lx::syncwarp();  // keeps the compiler from moving loads down to save registers
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
            const int z = z0 + u * kWarps;
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
        float4* const to = reinterpret_cast<float4*>(q_of + warp * kTokens + h * half + first);
        to[0] = {q[h][0], q[h][1], q[h][2], q[h][3]};
        to[1] = {q[h][4], q[h][5], q[h][6], q[h][7]};
    }
    lx::syncthreads();
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    verify_weights_kernel(const __grid_constant__ SpecVerifyArgs args,
                          const __grid_constant__ Leaves leaves,
                          const __grid_constant__ LeafRows target,
                          const __grid_constant__ Space space) {
    lx::grid_dependency_launch();
    LX_SHARED(double, partial, 2 * kWarps);
    LX_DYN_SHARED(shared);
    float* const q_of = reinterpret_cast<float*>(shared);
    Norm* const states = reinterpret_cast<Norm*>(q_of + kWarps * kTokens);
    const int64_t row = blockIdx.x / space.blocks;
    const int block = static_cast<int>(blockIdx.x % space.blocks);
    const int K = static_cast<int>(args.n_token), C = static_cast<int>(args.components);
    const int V = static_cast<int>(args.vocabulary), base = block * kTokens;
    const int warp = lx::warp_id(), lane = lx::lane_id(), thread = lx::thread_rank();
    const float scale = static_cast<float>(args.inverse_temperature);
    lx::grid_dependency_wait();
    const Decision decision = space.decision[row];
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
    for (int i = 0; i < kTokens / kThreads; ++i) {
        const int at = i * kThreads + thread, v = base + at;
        if (v >= V) continue;
        const float logit = target.at(
            0, row * args.target_stride + int64_t{decision.accepted} * target.vocabulary + v);
        const float p = p_of(logit, decision.stats, scale);
        float w = p;
        if (!whole) {
            float q = q_of[at];
#pragma unroll
            for (int k = 1; k < kWarps; ++k) q += q_of[k * kTokens + at];
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
        for (int k = 1; k < kWarps; ++k) sum += partial[2 * k + thread];
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
                       const __grid_constant__ Space space) {
    const int64_t row = blockIdx.x;
    const int V = static_cast<int>(args.vocabulary);
    const float scale = static_cast<float>(args.inverse_temperature);
    const float uniform =
        static_cast<const float*>(args.uniforms)[(row + 1) * (args.n_token + 1) - 1];
    lx::grid_dependency_wait();
    const Decision decision = space.decision[row];
    const int64_t logits =
        row * args.target_stride + int64_t{decision.accepted} * target.vocabulary;
    int token = -1;
    for (int way = 0; way < 2 && token < 0; ++way) {  // if p - q is never positive: draw from p
        const double* const sums = space.sums + (row * 2 + way) * space.blocks;
        const Place block =
            find_among_runs(space.blocks, 0, -1, uniform, [&](int i) { return sums[i]; });
        if (block.index < 0) continue;
        const int base = block.index * kTokens;
        const Place place = find_among_runs(
            lx::min(kTokens, V - base), block.before, block.limit, 0, [&](int i) -> double {
                return way == 0 ? space.weights[row * V + base + i]
                                : p_of(target.at(0, logits + base + i), decision.stats, scale);
            });
        token = base + lx::max(place.index, 0);
    }
    if (lx::lane_id() == 0) args.next_token[row] = lx::max(token, 0);
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
    const Space space = space_of(args, end);
    const bool greedy = args.inverse_temperature == 0;
    const LeafRows target{args.target, args.target_dtype, leaves.vocabulary, aligned};
    const int64_t target_blocks = ceil_div(B * (K + 1) * space.spans, kWarps);
    const int64_t leaf_blocks = greedy ? 1 : ceil_div(C * space.spans, kWarps);
    const int64_t tested_bytes = (K + 1) * static_cast<int64_t>(sizeof(Tested));
    const int64_t weight_bytes = kWarps * kTokens * 4 + C * static_cast<int64_t>(sizeof(Norm));
    if (lx::max(target_blocks, B * lx::max<int64_t>(leaf_blocks, space.blocks)) > kMaxGridX ||
        lx::max(tested_bytes, weight_bytes) > most_dynamic_bytes())
        return kInvalidValue;
    const auto declare = [&](lx::Access targets, lx::Access of_leaves, lx::Access of_weights) {
        declare_verify(args, leaves);
        LX_BUF(space.target, B * (K + 1) * space.spans * sizeof(OnlineSum), targets);
        LX_BUF(space.argmax, B * (K + 1) * space.spans * sizeof(int), targets);
        LX_BUF(space.leaves, B * C * space.spans * sizeof(OnlineSum), of_leaves);
        LX_BUF(space.decision, B * sizeof(Decision), of_leaves);
        LX_BUF(space.sums, B * 2 * space.blocks * sizeof(double), of_weights);
        LX_BUF(space.weights, B * args.vocabulary * sizeof(float), of_weights);
        LX_BUF(args.accepted, B * 8, lx::Access::kWrite);
        LX_BUF(args.next_token, B * 8, lx::Access::kWrite);
    };
    using enum lx::Access;
    declare(kWrite, kRead, kRead);
    LaunchStatus status = with_dtype(args.target_dtype, [&]<class T>() {
        return LX_LAUNCH(verify_target_kernel<T>, static_cast<unsigned>(target_blocks), kThreads, 0,
                         stream, args, space, aligned);
    });
    if (status) return status;
    declare(kRead, kWrite, kRead);
    status = with_dtype(args.leaf_dtype, [&]<class L>() {
        return LX_LAUNCH_PDL(verify_leaves_kernel<L>, static_cast<unsigned>(B * leaf_blocks),
                             kThreads, static_cast<size_t>(tested_bytes), stream, args, leaves,
                             target, space, static_cast<int>(leaf_blocks));
    });
    if (status || greedy) return status;
    declare(kRead, kRead, kWrite);
    status = with_dtype(args.leaf_dtype, [&]<class L>() {
        return LX_LAUNCH_PDL(verify_weights_kernel<L>, static_cast<unsigned>(B * space.blocks),
                             kThreads, static_cast<size_t>(weight_bytes), stream, args, leaves,
                             target, space);
    });
    if (status) return status;
    declare(kRead, kRead, kRead);
    return LX_LAUNCH_PDL(verify_pick_kernel, static_cast<unsigned>(B), lx::kWarpSize, 0, stream,
                         args, target, space);
}

}  // namespace lora_ext
