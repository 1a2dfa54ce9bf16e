// Backward pass of a mix of normalised hidden states; lora_ext/depth_mix.h has the formulas.
//
// A block processes one hidden state of a part (a range of rows), row after row. A thread holds two
// pieces of g and h of a row while it loads those of the next row. Its shares of dgamma and dbeta
// stay in registers until the part ends. Each hidden state is thus read once and its gradient
// written once. g is read once per hidden state, mostly from L2, since the blocks of different
// hidden states run concurrently. Bound: bytes of h, g and dh. A last kernel adds the parts in
// order.
//
// A router needs all dw of a row before the gradient of n_{k-1} is known. For the last hidden state
// the first launch therefore computes only dw, and a second launch the other gradients. A third
// launch computes dR = sum dl n_{k-1}, one column per thread.
//
// Rows that are not whole pieces, or too wide for the registers, are processed element by element;
// shares of dgamma and dbeta are then accumulated in the part's memory.
#include "depth_mix.cuh"

namespace lora_ext {
namespace {

constexpr int kAnyThreads = 256;
constexpr int kSumThreads = 128;
constexpr int kSumBatch = 8;  // parts per thread whose loads are in flight

// The work of a block: rows [begin, end) of hidden state e.
struct Task {
    int64_t begin, end;
    int e;
    bool dweight_only;

    LX_DEVICE Task(const DepthMixArgs& args, bool routed)
        : begin(blockIdx.x * mix_part_rows(args.rows)),
          end(lx::min(begin + mix_part_rows(args.rows), args.rows)),
          e(routed ? args.depths - 1 : static_cast<int>(blockIdx.y)),
          dweight_only(!routed && args.router != nullptr && e == args.depths - 1) {}
};

LX_DEVICE float* partial_of(const DepthMixArgs& args) {
    return static_cast<float*>(args.partial) + blockIdx.x * mix_sums(args);
}

// Converts the gradients of one row's weights to gradients of the router's logits. Writes the
// result to dl, in shared memory, and after a barrier also over the gradients of the weights.
LX_DEVICE void turn_to_logits(const DepthMixArgs& args, int64_t row, float* dl) {
    const int own = lx::thread_rank();
    float mine = 0, mean = 0;
    for (int e = 0; own < args.depths && e < args.depths; ++e) {
        float d = number_of(args, args.dweights, row, e);
        if (args.dweights_in) d += number_of(args, args.dweights_in, row, e);
        mean += number_of(args, args.weights, row, e) * d;
        mine = e == own ? d : mine;
    }
    if (own < args.depths) dl[own] = mine = number_of(args, args.weights, row, own) * (mine - mean);
    lx::syncthreads();
    if (own < args.depths) number_of(args, args.dweights, row, own) = mine;
}

// Numbers of a row from which dh = factor t - slope (h - mean) - level is computed, where t = gamma
// * (gradient of n_e).
struct RowNumbers {
    float weight, rinv, mean;

    LX_DEVICE RowNumbers(const DepthMixArgs& args, int64_t row, int e, bool routed)
        : weight(routed ? 1.0f : number_of(args, args.weights, row, e)),
          rinv(number_of(args, args.rinv, row, e)),
          mean(mean_of(args, row, e)) {}
    LX_DEVICE float factor() const { return weight * rinv; }
    LX_DEVICE float slope(float scaled, float width) const {
        return factor() * (rinv * (rinv * (scaled / width)));
    }
    LX_DEVICE float level(float plain, float width) const { return factor() * (plain / width); }
};

template <class T, class G, bool kRouted>
__global__ void __launch_bounds__(kMixThreads, 1)
    depth_mix_backward_kernel(const __grid_constant__ DepthMixArgs args) {
    LX_SHARED(float, scratch, BlockSums<3>::kScratch);
    LX_SHARED(float, dl, kMaxDepths);
    BlockSums<3> block(scratch);
    constexpr int P = kPiece<T>;
    const Columns<T> columns{static_cast<int>(args.width)};
    const float width = static_cast<float>(args.width);
    const Task task(args, kRouted);
    const int e = task.e;
    T* const dhidden = static_cast<T*>(args.dhidden[e]);
    Scales<T, G> gamma;
    gamma.load(args.gamma[e], columns);
    float of_gamma[kHeld][P] = {}, of_beta[kHeld][P] = {};
    // Without a router, the next row is loaded early. With a router, there are too few registers.
    Pieces<T> now_g, now_h, next_g, next_h;
    const auto load = [&](int64_t row, Pieces<T>& g, Pieces<T>& h) {
        g.load(dmixed_row<T>(args, row), columns);
        h.load(hidden_row<T>(args, e, row), columns);
        return RowNumbers(args, row, e, kRouted);
    };
    RowNumbers next = load(task.begin, next_g, next_h);
#pragma unroll 1
    for (int64_t row = task.begin; row < task.end; ++row) {
        RowNumbers now = next;
        if constexpr (kRouted) {
            now = load(row, now_g, now_h);
        } else {
            now_g = next_g;
            now_h = next_h;
            next = load(lx::min(row + 1, task.end - 1), next_g, next_h);
        }

        // `up` is G, the gradient of n_e. Without a router, the factor w_e is applied later.
        float up[kHeld][P];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) now_g.unpack(i, columns, up[i]);
        if constexpr (kRouted) {
            turn_to_logits(args, row, dl);
            const float weight = number_of(args, args.weights, row, e);
#pragma unroll
            for (int i = 0; i < kHeld; ++i)
#pragma unroll
                for (int j = 0; j < P; ++j) up[i][j] *= weight;
#pragma unroll 1
            for (int other = 0; other < args.depths; ++other)
#pragma unroll
                for (int i = 0; i < kHeld; ++i) {
                    if (!columns.has(i)) continue;
                    float r[P];
                    load_router<T>(args, other, columns.at(i), r);
#pragma unroll
                    for (int j = 0; j < P; ++j) up[i][j] += dl[other] * r[j];
                }
        }
        float sums[3] = {};  // sums of G gamma (h - mean), G gamma, G beta
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            float h[P], scale[P];
            now_h.unpack(i, columns, h);
            gamma.unpack(i, scale);
#pragma unroll
            for (int j = 0; j < P; ++j) {
                const float t = columns.has(i) ? up[i][j] * scale[j] : 0.0f;
                sums[0] += t * (h[j] - now.mean);
                sums[1] += t;
            }
        }
        if (!kRouted && args.beta[e]) {
            Scales<T, G> beta;
            beta.load(args.beta[e], columns);
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                float shift[P];
                beta.unpack(i, shift);
#pragma unroll
                for (int j = 0; j < P; ++j) sums[2] += columns.has(i) ? up[i][j] * shift[j] : 0.0f;
            }
        }
        block.add_up(sums);
        if (!kRouted && lx::thread_rank() == 0)
            number_of(args, args.dweights, row, e) = now.rinv * sums[0] + sums[2];
        if (task.dweight_only) continue;

        const float factor = now.factor(), slope = now.slope(sums[0], width),
                    level = args.layer ? now.level(sums[1], width) : 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            float h[P], scale[P], d[P];
            now_h.unpack(i, columns, h);
            gamma.unpack(i, scale);
#pragma unroll
            for (int j = 0; j < P; ++j) {
                const float x = h[j] - now.mean, t = up[i][j] * factor;
                of_gamma[i][j] += t * x;
                of_beta[i][j] += up[i][j] * now.weight;
                d[j] = t * scale[j] - x * slope - level;
            }
            if (dhidden && columns.has(i))
                store_values(dhidden + row * args.width + columns.at(i), P, true, d);
        }
    }
    if (task.dweight_only) return;
    float* const dgamma = partial_of(args) + e * args.width;
    float* const dbeta = dgamma + mix_betas_at(args);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (!columns.has(i)) continue;
#pragma unroll
        for (int j = 0; j < P; ++j) {
            dgamma[columns.at(i) + j] = of_gamma[i][j];
            if (args.beta[e]) dbeta[columns.at(i) + j] = of_beta[i][j];
        }
    }
}

// Backward pass for rows of any width and at any address.
template <class T, class G>
__global__ void __launch_bounds__(kAnyThreads, 2)
    depth_mix_backward_any_kernel(const __grid_constant__ DepthMixArgs args, bool routed) {
    LX_SHARED(float, scratch, BlockSums<3>::kScratch);
    LX_SHARED(float, dl, kMaxDepths);
    BlockSums<3> block(scratch);
    const int width = static_cast<int>(args.width), rank = lx::thread_rank();
    const Task task(args, routed);
    const int e = task.e;
    const G* const gamma = static_cast<const G*>(args.gamma[e]);
    const G* const beta = static_cast<const G*>(args.beta[e]);
    T* const dhidden = static_cast<T*>(args.dhidden[e]);
    float* const dgamma = partial_of(args) + e * args.width;
    float* const dbeta = beta ? dgamma + mix_betas_at(args) : nullptr;
    if (!task.dweight_only)
        for (int j = rank; j < width; j += kAnyThreads) {
            dgamma[j] = 0;
            if (beta) dbeta[j] = 0;
        }
    for (int64_t row = task.begin; row < task.end; ++row) {
        const RowNumbers now(args, row, e, routed);
        const T* const g = dmixed_row<T>(args, row);
        const T* const h = hidden_row<T>(args, e, row);
        if (routed) turn_to_logits(args, row, dl);
        const float first = routed ? number_of(args, args.weights, row, e) : 1.0f;
        const auto up = [&](int j) {
            float sum = first * lx::to_float(g[j]);
#pragma unroll 1
            for (int other = 0; routed && other < args.depths; ++other)
                sum += dl[other] * router_row(args, other)[j];
            return sum;
        };
        float sums[3] = {};
        for (int j = rank; j < width; j += kAnyThreads) {
            const float t = up(j) * lx::to_float(gamma[j]);
            sums[0] += t * (lx::to_float(h[j]) - now.mean);
            sums[1] += t;
            if (beta) sums[2] += up(j) * lx::to_float(beta[j]);
        }
        block.add_up(sums);
        if (!routed && rank == 0)
            number_of(args, args.dweights, row, e) = now.rinv * sums[0] + sums[2];
        if (task.dweight_only) continue;
        const float factor = now.factor(), slope = now.slope(sums[0], args.width),
                    level = args.layer ? now.level(sums[1], args.width) : 0.0f;
        for (int j = rank; j < width; j += kAnyThreads) {
            const float x = lx::to_float(h[j]) - now.mean, t = up(j) * factor;
            dgamma[j] += t * x;
            if (beta) dbeta[j] += up(j) * now.weight;
            if (dhidden)
                dhidden[row * args.width + j] =
                    lx::from_float<T>(t * lx::to_float(gamma[j]) - x * slope - level);
        }
        lx::syncthreads();  // dl has been read
    }
}

// Computes dR and dc of a part. A thread computes one column of dR.
template <class T, class G>
__global__ void __launch_bounds__(kSumThreads, 8)
    depth_mix_router_kernel(const __grid_constant__ DepthMixArgs args) {
    const Task task(args, /*routed=*/true);
    const int64_t column = int64_t{blockIdx.y} * kSumThreads + lx::thread_rank();
    float* const partial = partial_of(args);
    const int e = lx::thread_rank();
    if (blockIdx.y == 0 && e < args.depths) {
        float sum = 0;
        for (int64_t row = task.begin; row < task.end; ++row)
            sum += number_of(args, args.dweights, row, e);
        partial[mix_bias_at(args) + e] = sum;
    }
    if (column >= args.width) return;
    const float gamma = lx::to_float(static_cast<const G*>(args.gamma[task.e])[column]);
    const G* const betas = static_cast<const G*>(args.beta[task.e]);
    const float beta = betas ? lx::to_float(betas[column]) : 0.0f;
    float sums[kMaxDepths] = {};
    for (int64_t row = task.begin; row < task.end; ++row) {
        const RowNumbers now(args, row, task.e, true);
        const float h = lx::to_float(hidden_row<T>(args, task.e, row)[column]);
        const float n = (h - now.mean) * now.rinv * gamma + beta;
#pragma unroll
        for (int other = 0; other < kMaxDepths; ++other)
            if (other < args.depths) sums[other] += number_of(args, args.dweights, row, other) * n;
    }
#pragma unroll
    for (int other = 0; other < kMaxDepths; ++other)
        if (other < args.depths)
            partial[mix_router_at(args) + other * args.width + column] = sums[other];
}

// Computes sums[i], the sum of partial[part, i] over the parts, in order.
__global__ void __launch_bounds__(kSumThreads, 8)
    depth_mix_sums_kernel(const float* partial, float* sums, int64_t count, int parts) {
    const int64_t i = int64_t{blockIdx.x} * kSumThreads + lx::thread_rank();
    if (i >= count) return;
    float sum = 0;
    for (int p = 0; p < parts; p += kSumBatch) {
        float batch[kSumBatch];
#pragma unroll
        for (int j = 0; j < kSumBatch; ++j)
            batch[j] = lx::load_global(partial + lx::min(p + j, parts - 1) * count + i);
#pragma unroll
        for (int j = 0; j < kSumBatch; ++j) sum += p + j < parts ? batch[j] : 0.0f;
    }
    sums[i] = sum;
}

void declare_backward(const DepthMixArgs& args, lx::Access dweights) {
    declare_mix(args);
    LX_BUF(args.dmixed, args.rows * args.width * element_size(args.dtype), lx::Access::kRead);
    for (const void* numbers : {args.weights, args.rinv, args.mean})
        declare_numbers(args, numbers, lx::Access::kRead);
    declare_numbers(args, args.dweights_in, lx::Access::kRead);
    declare_numbers(args, args.dweights, dweights);
    for (int e = 0; e < args.depths; ++e)
        if (args.dhidden[e])
            LX_BUF(args.dhidden[e], args.rows * args.width * element_size(args.dtype),
                   lx::Access::kWrite);
    LX_BUF(args.partial, mix_parts(args.rows) * mix_sums(args) * 4, lx::Access::kWrite);
}

}  // namespace

LaunchStatus launch_depth_mix_backward(const DepthMixArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    const auto parts = static_cast<unsigned>(mix_parts(args.rows));
    const bool held = row_is_held(args);
    LaunchStatus status = with_mix_types(args, [&]<class T, class G>() -> LaunchStatus {
        const dim3 all(parts, static_cast<unsigned>(args.depths));
        const auto hiddens = [&](dim3 grid, auto routed) {
            declare_backward(args, routed.value ? lx::Access::kReadWrite : lx::Access::kWrite);
            if (held)
                return LX_LAUNCH((depth_mix_backward_kernel<T, G, routed.value>), grid,
                                 mix_threads(args), 0, stream, args);
            return LX_LAUNCH((depth_mix_backward_any_kernel<T, G>), grid, kAnyThreads, 0, stream,
                             args, routed.value);
        };
        const LaunchStatus first = hiddens(all, std::false_type());
        if (first != 0 || !args.router) return first;
        const LaunchStatus second = hiddens(dim3(parts), std::true_type());
        if (second != 0) return second;
        declare_backward(args, lx::Access::kRead);
        const int64_t columns = ceil_div(args.width, kSumThreads);
        if (columns > 65535) return kInvalidValue;
        return LX_LAUNCH((depth_mix_router_kernel<T, G>),
                         dim3(parts, static_cast<unsigned>(columns)), kSumThreads, 0, stream, args);
    });
    if (status != 0) return status;
    const int64_t count = mix_sums(args);
    LX_BUF(args.partial, mix_parts(args.rows) * count * 4, lx::Access::kRead);
    LX_BUF(args.sums, count * 4, lx::Access::kWrite);
    return LX_LAUNCH(depth_mix_sums_kernel, static_cast<unsigned>(ceil_div(count, kSumThreads)),
                     kSumThreads, 0, stream, static_cast<const float*>(args.partial),
                     static_cast<float*>(args.sums), count, static_cast<int>(parts));
}

}  // namespace lora_ext
