// Divergence between the last hidden state (the teacher) and each other hidden state (a student),
// for a chunk of logits (vocab.h): a block processes one row of the batch (vocab.cuh).
#include "vocab.cuh"

namespace lora_ext {
namespace {

LX_DEVICE bool counts(const VocabArgs& args) {
    return !args.mask || args.mask[blockIdx.x];
}
LX_HOST_DEVICE inline float share_of(const VocabArgs& args) {  // tau^2 / students / tau
    return static_cast<float>(args.tau / static_cast<double>(args.hiddens - 1));
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kVocabThreads, kVocabBlocksTwice)
    kl_update_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    LX_SHARED(float, partial, BlockTeam::kScratch);
    if (!counts(args)) return;
    const BlockTeam team(partial);
    const VocabLogit<kCapped> logit(args);
    const bool start = args.first == 0, kept = args.products != nullptr;
    const int last = static_cast<int>(args.hiddens) - 1;
    const VocabRow<T, kCapped> teacher(args, logit, team, last, aligned);
    for (int e = 0; e < last; ++e) {
        const VocabRow<T, kCapped> student(args, logit, team, e, aligned);
        float sum = 0, cross = 0;
        const T* const rows[2] = {teacher.logits, student.logits};
        for_own_pieces(rows, student.columns, aligned, [&](int i, const auto& v, auto whole) {
            float q[kPiece<T>];
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j) {
                const bool here = whole.value || i + j < student.columns;
                const float k = logit.of(v[0][j]), z = logit.of(v[1][j]);
                const float p = here ? lx::exp_approx(k - teacher.shift) : 0.0f;
                q[j] = here ? lx::exp_approx(z - student.shift) : 0.0f;
                sum += q[j];
                cross += p == 0 ? 0.0f : p * (k - z);
            }
            if (kept) student.store(i, q, whole);
        });
        student.keep(start, sum);
        cross = team.reduce(cross, add);
        if (lx::thread_rank() == 0)
            *student.third_at = start ? cross : *student.third_at * teacher.fade + cross;
    }
    float sum = 0;
    const T* const rows[1] = {teacher.logits};
    for_own_pieces(rows, teacher.columns, aligned, [&](int i, const auto& v, auto whole) {
        float p[kPiece<T>];
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) {
            p[j] = whole.value || i + j < teacher.columns
                       ? lx::exp_approx(logit.of(v[0][j]) - teacher.shift)
                       : 0.0f;
            sum += p[j];
        }
        if (kept) teacher.store(i, p, whole);
    });
    teacher.keep(start, sum);
}

__global__ void __launch_bounds__(kVocabFinishThreads)
    kl_finish_kernel(const __grid_constant__ VocabArgs args) {
    const int64_t n = blockIdx.x, all = args.hiddens * args.rows;
    const int width = static_cast<int>(args.width), rank = lx::thread_rank();
    const int last = static_cast<int>(args.hiddens) - 1;
    const bool valid = counts(args);
    const float* const state = static_cast<const float*>(args.state) + n;
    float* const lse = static_cast<float*>(args.lse) + n;
    float* const products =
        args.products ? static_cast<float*>(args.products) + n * args.width : nullptr;
    const int64_t end = int64_t{last} * args.rows;
    const float share = last > 0 ? share_of(args) : 0.0f;
    const float top_k = valid ? state[end] : 0.0f, sum_k = valid ? state[end + all] : 1.0f;
    float loss = 0;
    for (int e = 0; e < last; ++e) {
        const int64_t at = int64_t{e} * args.rows;
        const float top = valid ? state[at] : 0.0f, sum = valid ? state[at + all] : 1.0f;
        if (valid) loss += state[at + 2 * all] / sum_k + ((top - top_k) + logf(sum / sum_k));
        if (rank == 0) lse[at] = top + logf(sum);
        if (!products) continue;
        float* const d = products + at * args.width;
        const float* const d_k = products + end * args.width;
        const float own = share / sum, other = share / sum_k;
        for (int j = rank; j < width; j += kVocabFinishThreads)
            d[j] = valid ? d[j] * own - d_k[j] * other : 0.0f;
    }
    if (rank == 0) {
        lse[end] = top_k + logf(sum_k);
        static_cast<float*>(args.loss)[n] = loss * share * static_cast<float>(args.tau);
    }
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kVocabThreads, kVocabBlocks)
    kl_gradient_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    const int64_t n = blockIdx.x;
    const int columns = static_cast<int>(args.columns), last = static_cast<int>(args.hiddens) - 1;
    const bool valid = counts(args);
    const VocabLogit<kCapped> logit(args);
    T* const logits = static_cast<T*>(args.logits) + n * args.columns;
    const float* const lse = static_cast<const float*>(args.lse) + n;
    const float share = share_of(args), lse_k = lse[last * args.rows];
    for (int e = 0; e < last; ++e) {
        T* const z_e = logits + e * args.rows * args.columns;
        const float lse_e = lse[e * args.rows];
        const T* const rows[2] = {logits + last * args.rows * args.columns, z_e};
        for_own_pieces(rows, columns, aligned, [&](int i, const auto& v, auto whole) {
            float d[kPiece<T>];
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j) {
                float slope;
                const float q = lx::exp_approx(logit.of(v[1][j], slope) - lse_e);
                const float p = lx::exp_approx(logit.of(v[0][j]) - lse_k);
                d[j] = valid ? (q - p) * slope * share : 0.0f;
            }
            store_values(z_e + i, columns - i, whole.value, d);
        });
    }
}

}  // namespace

LaunchStatus launch_kl_update(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        declare_update(args);
        return LX_LAUNCH((kl_update_kernel<T, kCapped>), grid, kVocabThreads, 0, stream, args,
                         aligned);
    });
}

LaunchStatus launch_kl_finish(const VocabArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    if (!declare_finish(args)) return kInvalidValue;
    return LX_LAUNCH(kl_finish_kernel, static_cast<unsigned>(args.rows), kVocabFinishThreads, 0,
                     stream, args);
}

LaunchStatus launch_kl_gradient(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        LX_BUF(args.lse, args.hiddens * args.rows * 4, lx::Access::kConstant);
        return LX_LAUNCH((kl_gradient_kernel<T, kCapped>), grid, kVocabThreads, 0, stream, args,
                         aligned);
    });
}

}  // namespace lora_ext
