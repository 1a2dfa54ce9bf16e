// Cross entropy of a chunk of logits (vocab.h): a block processes one row of the batch (vocab.cuh).
#include "vocab.cuh"

namespace lora_ext {
namespace {

// Returns the label's column in this chunk, or -1.
LX_DEVICE int label_column(const VocabArgs& args) {
    const int64_t y = args.labels[blockIdx.x] - args.first;
    return y >= 0 && y < args.columns ? static_cast<int>(y) : -1;
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kVocabThreads, kCapped ? kVocabBlocksTwice : kVocabBlocks)
    cross_entropy_update_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    LX_SHARED(float, partial, BlockTeam::kScratch);
    if (args.labels[blockIdx.x] == args.ignore_index) return;
    const BlockTeam team(partial);
    const VocabLogit<kCapped> logit(args);
    const bool start = args.first == 0, kept = args.products != nullptr;
    const int y = label_column(args);
    const VocabRow<T, kCapped> row(args, logit, team, 0, aligned);
    if (lx::thread_rank() == 0) {
        if (y >= 0)
            *row.third_at = logit.of(lx::to_float(row.logits[y]));
        else if (start)
            *row.third_at = __builtin_nanf("");  // NaN until the chunk with the label is read
    }
    lx::syncthreads();  // the label's logit has been read
    float sum = 0;
    const T* const rows[1] = {row.logits};
    for_own_pieces(rows, row.columns, aligned, [&](int i, const auto& v, auto whole) {
        float e[kPiece<T>];
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) {
            float slope;
            const float z = logit.of(v[0][j], slope);
            e[j] = i + j == y || !(whole.value || i + j < row.columns)
                       ? 0.0f
                       : lx::exp_approx(z - row.shift);
            sum += e[j];
            e[j] *= slope;
        }
        if (kept) row.store(i, e, whole);
    });
    row.keep(start, sum);
}

template <bool kCapped>
__global__ void __launch_bounds__(kVocabFinishThreads)
    cross_entropy_finish_kernel(const __grid_constant__ VocabArgs args) {
    const int64_t n = blockIdx.x;
    const int width = static_cast<int>(args.width), rank = lx::thread_rank();
    float* const d = args.products ? static_cast<float*>(args.products) + n * args.width : nullptr;
    float loss = 0, lse = 0, inverse = 0, away = 0;
    const bool counts = args.labels[n] != args.ignore_index;
    if (counts) {
        const float* const state = static_cast<const float*>(args.state) + n;
        const float top = state[0], others = state[args.rows], target = state[2 * args.rows];
        const float own = expf(target - shift_of(top));
        const float log_sum = own == 1 ? log1pf(others) : logf(others + own);
        lse = top + log_sum;
        loss = (top - target) + log_sum;
        inverse = 1 / (others + own);
        const float ratio = kCapped ? target / static_cast<float>(args.softcap) : 0.0f;
        away = others * inverse * (1 - ratio * ratio);
    }
    if (rank == 0) {
        static_cast<float*>(args.loss)[n] = loss;
        static_cast<float*>(args.lse)[n] = lse;
    }
    if (!d) return;
    const float* const w = static_cast<const float*>(args.targets) + n * args.width;
    for (int j = rank; j < width; j += kVocabFinishThreads)
        d[j] = counts ? d[j] * inverse - away * lx::load_nc(w + j) : 0.0f;
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kVocabThreads, kVocabBlocks)
    cross_entropy_gradient_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    const int64_t n = blockIdx.x;
    const int columns = static_cast<int>(args.columns), y = label_column(args);
    T* const row = static_cast<T*>(args.logits) + n * args.columns;
    const bool counts = args.labels[n] != args.ignore_index;
    const VocabLogit<kCapped> logit(args);
    const float lse = static_cast<const float*>(args.lse)[n];
    const T* const rows[1] = {row};
    for_own_pieces(rows, columns, aligned, [&](int i, const auto& v, auto whole) {
        float d[kPiece<T>];
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) {
            float slope;
            const float q = lx::exp_approx(logit.of(v[0][j], slope) - lse);
            d[j] = counts ? (i + j == y ? q - 1 : q) * slope : 0.0f;
        }
        store_values(row + i, columns - i, whole.value, d);
    });
}

}  // namespace

LaunchStatus launch_cross_entropy_update(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        declare_update(args);
        return LX_LAUNCH((cross_entropy_update_kernel<T, kCapped>), grid, kVocabThreads, 0, stream,
                         args, aligned);
    });
}

LaunchStatus launch_cross_entropy_finish(const VocabArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    if (!declare_finish(args)) return kInvalidValue;
    const auto grid = static_cast<unsigned>(args.rows);
    return args.softcap > 0 ? LX_LAUNCH(cross_entropy_finish_kernel<true>, grid,
                                        kVocabFinishThreads, 0, stream, args)
                            : LX_LAUNCH(cross_entropy_finish_kernel<false>, grid,
                                        kVocabFinishThreads, 0, stream, args);
}

LaunchStatus launch_cross_entropy_gradient(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        LX_BUF(args.lse, args.rows * 4, lx::Access::kConstant);
        return LX_LAUNCH((cross_entropy_gradient_kernel<T, kCapped>), grid, kVocabThreads, 0,
                         stream, args, aligned);
    });
}

}  // namespace lora_ext
