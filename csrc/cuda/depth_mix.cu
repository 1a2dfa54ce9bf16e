// Mixes of normalised hidden states: mixed[t] = sum_e w[t, e] n_e[t], n_e = gamma_e (h_e - m_e) r_e
// + beta_e; with a router w[t] = softmax(R n_{k-1}[t] + c).
//
// A block computes a row; a thread holds two pieces of 16 bytes of one hidden state at a time. The
// next hidden state is loaded while the block sums the squares of the current one; the mix
// accumulates in registers. Each hidden state is thus read once. With a router, the last hidden
// state is read first because it determines all weights. Bound: bytes of the hidden states and of
// the mix.
//
// If rows are not whole aligned pieces, or too wide for the registers, they are processed element
// by element, and read again from the cache.
#include "depth_mix.cuh"

namespace lora_ext {
namespace {

constexpr int kAnyThreads = 256;

// The weights that a router gives a row: softmax(R n + c). partial(e) must return this thread's
// part of the product of n with row e of R.
class Weights {
  public:
    static constexpr int kScratch = kMaxDepths * (kMixWarps + 1);
    LX_DEVICE explicit Weights(float* scratch) : weights_(scratch), dots_(scratch + kMaxDepths) {}
    LX_DEVICE float operator[](int e) const { return weights_[e]; }

    template <class Partial>
    LX_DEVICE void choose(const DepthMixArgs& args, int64_t row, Partial&& partial) {
        const int own = lx::thread_rank(), depths = args.depths;
#pragma unroll 1
        for (int e = 0; e < depths; ++e) {
            const float dot = WarpTeam(nullptr).reduce(partial(e), add);
            if (lx::lane_id() == 0) dots_[e * kMixWarps + lx::warp_id()] = dot;
        }
        lx::syncthreads();
        if (own < depths) {
            float top = logit(args, 0), total = 0;
            for (int e = 1; e < depths; ++e) top = fmaxf(top, logit(args, e));
            for (int e = 0; e < depths; ++e) total += expf(logit(args, e) - top);
            weights_[own] = expf(logit(args, own) - top) / total;
            number_of(args, args.weights, row, own) = weights_[own];
        }
        lx::syncthreads();
    }

  private:
    LX_DEVICE float logit(const DepthMixArgs& args, int e) const {
        float sum = 0;
        for (int w = 0; w < static_cast<int>(blockDim.x) / lx::kWarpSize; ++w)
            sum += dots_[e * kMixWarps + w];
        return sum + static_cast<const float*>(args.bias)[e];
    }

    float *weights_, *dots_;
};

// Adds weight * beta_e to `to`, for the thread's elements.
template <class T, class G>
LX_DEVICE void add_beta(const DepthMixArgs& args, int e, const Columns<T>& columns, float weight,
                        float (&to)[kHeld][kPiece<T>]) {
    if (!args.beta[e]) return;
    Scales<T, G> beta;
    beta.load(args.beta[e], columns);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        float shift[kPiece<T>];
        beta.unpack(i, shift);
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) to[i][j] += weight * shift[j];
    }
}

template <class T, class G, bool kRouted>
__global__ void __launch_bounds__(kMixThreads, 1)
    depth_mix_kernel(const __grid_constant__ DepthMixArgs args) {
    LX_SHARED(float, scratch, BlockSums<1>::kScratch);
    LX_SHARED(float, chosen, kRouted ? Weights::kScratch : 1);
    BlockSums<1> block(scratch);
    Weights weights(chosen);
    constexpr int P = kPiece<T>;
    const Columns<T> columns{static_cast<int>(args.width)};
    const float width = static_cast<float>(args.width);
    const int64_t row = blockIdx.x;
    const int depths = args.depths;
    // With a router, the last hidden state is read first, because it determines the weights.
    const auto depth_at = [&](int step) {
        if (!kRouted) return step;
        return step == 0 ? depths - 1 : step - 1;
    };
    float mixed[kHeld][P] = {};
    Pieces<T> next;
    next.load(hidden_row<T>(args, depth_at(0), row), columns);
#pragma unroll 1
    for (int step = 0; step < depths; ++step) {
        const int e = depth_at(step);
        const Pieces<T> now = next;
        Scales<T, G> gamma;
        next.load(hidden_row<T>(args, depth_at(lx::min(step + 1, depths - 1)), row), columns);
        gamma.load(args.gamma[e], columns);
        float weight = kRouted ? 0.0f : number_of(args, args.weights, row, e);

        // Each element is converted once. Pieces beyond the row are not added to sums, and their
        // results are not stored.
        float x[kHeld][P];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) unpack_piece<T>(now.words[i], x[i]);
        float mean = 0, squares = 0;
        if (args.layer) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                if (!columns.has(i)) continue;
#pragma unroll
                for (int j = 0; j < P; ++j) sum += x[i][j];
            }
            mean = block.add_up(sum) / width;
#pragma unroll
            for (int i = 0; i < kHeld; ++i)
#pragma unroll
                for (int j = 0; j < P; ++j) x[i][j] -= mean;
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (!columns.has(i)) continue;
#pragma unroll
            for (int j = 0; j < P; ++j) squares += x[i][j] * x[i][j];
        }
        const float rinv =
            1.0f / sqrtf(block.add_up(squares) / width + static_cast<float>(args.eps));
        if (lx::thread_rank() == 0) {
            number_of(args, args.rinv, row, e) = rinv;
            if (args.layer) number_of(args, args.mean, row, e) = mean;
        }

        if (kRouted && step == 0) {
            float n[kHeld][P];
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                float scale[P];
                gamma.unpack(i, scale);
#pragma unroll
                for (int j = 0; j < P; ++j) n[i][j] = x[i][j] * rinv * scale[j];
            }
            add_beta<T, G>(args, e, columns, 1.0f, n);
            weights.choose(args, row, [&](int other) {
                float dot = 0;
#pragma unroll
                for (int i = 0; i < kHeld; ++i) {
                    if (!columns.has(i)) continue;
                    float r[P];
                    load_router<T>(args, other, columns.at(i), r);
#pragma unroll
                    for (int j = 0; j < P; ++j) dot += n[i][j] * r[j];
                }
                return dot;
            });
        }
        if (kRouted) weight = weights[e];
        const float factor = weight * rinv;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            float scale[P];
            gamma.unpack(i, scale);
#pragma unroll
            for (int j = 0; j < P; ++j) mixed[i][j] += x[i][j] * factor * scale[j];
        }
        add_beta<T, G>(args, e, columns, weight, mixed);
    }
    T* const out = static_cast<T*>(args.mixed) + row * args.width;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        if (columns.has(i)) store_values(out + columns.at(i), P, true, mixed[i]);
}

// ------------------------------------------------------------------------------------------------
// Rows of any width and at any address

template <class T, class G>
__global__ void __launch_bounds__(kAnyThreads, 4)
    depth_mix_any_kernel(const __grid_constant__ DepthMixArgs args) {
    LX_SHARED(float, scratch, BlockSums<1>::kScratch);
    LX_SHARED(float, chosen, Weights::kScratch);
    LX_SHARED(float, means, kMaxDepths);
    LX_SHARED(float, rinvs, kMaxDepths);
    Weights weights(chosen);
    BlockSums<1> block(scratch);
    const int width = static_cast<int>(args.width), rank = lx::thread_rank();
    const int64_t row = blockIdx.x;
    const int depths = args.depths, last = depths - 1;
    for (int e = 0; e < depths; ++e) {
        const T* const h = hidden_row<T>(args, e, row);
        float mean = 0, squares = 0;
        if (args.layer) {
            float sum = 0;
            for (int j = rank; j < width; j += kAnyThreads) sum += lx::to_float(h[j]);
            mean = block.add_up(sum) / static_cast<float>(width);
        }
        for (int j = rank; j < width; j += kAnyThreads) {
            const float x = lx::to_float(h[j]) - mean;
            squares += x * x;
        }
        const float rinv = 1.0f / sqrtf(block.add_up(squares) / static_cast<float>(width) +
                                        static_cast<float>(args.eps));
        if (rank == 0) {
            means[e] = mean;
            rinvs[e] = rinv;
            number_of(args, args.rinv, row, e) = rinv;
            if (args.layer) number_of(args, args.mean, row, e) = mean;
        }
    }
    lx::syncthreads();
    const auto normed = [&](int e, int j) {
        const float x = (lx::to_float(hidden_row<T>(args, e, row)[j]) - means[e]) * rinvs[e];
        const float n = x * lx::to_float(static_cast<const G*>(args.gamma[e])[j]);
        return args.beta[e] ? n + lx::to_float(static_cast<const G*>(args.beta[e])[j]) : n;
    };
    if (args.router)
        weights.choose(args, row, [&](int e) {
            float dot = 0;
            for (int j = rank; j < width; j += kAnyThreads)
                dot += normed(last, j) * router_row(args, e)[j];
            return dot;
        });
    T* const out = static_cast<T*>(args.mixed) + row * args.width;
    for (int j = rank; j < width; j += kAnyThreads) {
        float mixed = 0;
        for (int e = 0; e < depths; ++e) {
            const float weight = args.router ? weights[e] : number_of(args, args.weights, row, e);
            mixed += weight * normed(e, j);
        }
        out[j] = lx::from_float<T>(mixed);
    }
}

}  // namespace

LaunchStatus launch_depth_mix(const DepthMixArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    if (args.rows > kMaxGridX) return kInvalidValue;
    declare_mix(args);
    declare_numbers(args, args.weights, args.router ? lx::Access::kWrite : lx::Access::kRead);
    declare_numbers(args, args.rinv, lx::Access::kWrite);
    if (args.layer) declare_numbers(args, args.mean, lx::Access::kWrite);
    if (args.router) LX_BUF(args.bias, args.depths * 4, lx::Access::kRead);
    LX_BUF(args.mixed, args.rows * args.width * element_size(args.dtype), lx::Access::kWrite);
    const auto blocks = static_cast<unsigned>(args.rows);
    return with_mix_types(args, [&]<class T, class G>() {
        if (row_is_held(args) && args.router)
            return LX_LAUNCH((depth_mix_kernel<T, G, true>), blocks, mix_threads(args), 0, stream,
                             args);
        if (row_is_held(args))
            return LX_LAUNCH((depth_mix_kernel<T, G, false>), blocks, mix_threads(args), 0, stream,
                             args);
        return LX_LAUNCH((depth_mix_any_kernel<T, G>), blocks, kAnyThreads, 0, stream, args);
    });
}

}  // namespace lora_ext
