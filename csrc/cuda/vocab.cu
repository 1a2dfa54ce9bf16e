// Losses over a vocabulary, a chunk of logits at a time: vocab.h has the formulas.
//
// A block processes a row of the batch, with all its hidden states. It first finds the largest
// logit of a chunk, then computes the exponentials; the second read is from L1 or L2, as a row of
// a chunk is about 16 KiB. The teacher's row is read again for each student, also from cache. A
// thread reads and writes only its own pieces, so it can overwrite them in place. Sums over the
// block use a fixed tree. Bound: bytes of the logits, read once and, with weights, written once.
#include "lora_ext/vocab.h"

#include "circuit_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 4;
constexpr int kMinBlocksTwice = 3;  // minimum with softcap or two rows per block
constexpr int kFinishThreads = 128;

// Calls f(index, values of each row, whole) for the pieces of kRows rows that this thread owns.
// `whole` is std::true_type if rows are aligned to 16 bytes and n is a multiple of a piece;
// otherwise it is std::false_type, and values beyond n are -inf.
template <class T, int kRows, class F>
LX_DEVICE void for_own_pieces(const T* const (&rows)[kRows], int n, bool aligned, F&& f) {
    constexpr int kSize = kPiece<T>, kStep = kThreads * kSize, kBatch = 4 / kRows;
    int i = lx::thread_rank() * kSize;
    if (aligned) {
#pragma unroll 1
        for (; i < n; i += kBatch * kStep) {
            uint4 words[kBatch][kRows];
#pragma unroll
            for (int k = 0; k < kBatch; ++k)
#pragma unroll
                for (int r = 0; r < kRows; ++r)  // beyond the end, reload the batch's first piece
                    words[k][r] = lx::load_global(reinterpret_cast<const uint4*>(
                        rows[r] + (i + k * kStep < n ? i + k * kStep : i)));
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                float v[kRows][kSize];
#pragma unroll
                for (int r = 0; r < kRows; ++r) unpack_piece<T>(words[k][r], v[r]);
                if (i + k * kStep < n) f(i + k * kStep, v, std::true_type());
            }
        }
    } else {
        for (; i < n; i += kStep) {
            float v[kRows][kSize];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int j = 0; j < kSize; ++j)
                    v[r][j] =
                        i + j < n ? lx::to_float(lx::load_global(rows[r] + i + j)) : kImpossible;
            f(i, v, std::false_type());
        }
    }
}

// Computes z = softcap(raw) / tau from `raw`, the product of a hidden state with a row of W.
template <bool kCapped>
struct Logit {
    float cap, inverse_cap, inverse_tau;

    LX_DEVICE explicit Logit(const VocabArgs& args)
        : cap(static_cast<float>(args.softcap)),
          inverse_cap(kCapped ? 1 / cap : 0),
          inverse_tau(static_cast<float>(1 / args.tau)) {}

    LX_DEVICE float of(float raw, float& slope) const {  // slope = tau dz / d(raw)
        if constexpr (kCapped) {
            const float t = tanhf(raw * inverse_cap);
            slope = 1 - t * t;
            return t * cap * inverse_tau;
        } else {
            slope = 1;
            return raw * inverse_tau;
        }
    }
    LX_DEVICE float of(float raw) const {
        float slope;
        return of(raw, slope);
    }
};

// A row of logits of the current chunk, and the running maximum and sums of the row in all chunks.
template <class T, bool kCapped>
struct Row {
    const Logit<kCapped>& logit;
    const BlockTeam& team;
    T* logits;
    int columns;
    bool aligned;
    float *top_at, *sum_at, *third_at;
    float* products;  // nullptr if there is nothing to rescale
    int width;
    float top, shift, fade;

    LX_DEVICE Row(const VocabArgs& args, const Logit<kCapped>& logit, const BlockTeam& team,
                  int64_t e, bool aligned)
        : logit(logit),
          team(team),
          columns(static_cast<int>(args.columns)),
          aligned(aligned),
          width(static_cast<int>(args.width)) {
        const int64_t n = blockIdx.x, at = e * args.rows + n, all = args.hiddens * args.rows;
        logits = static_cast<T*>(args.logits) + at * args.columns;
        top_at = static_cast<float*>(args.state) + at;
        sum_at = top_at + all;
        third_at = sum_at + all;
        const bool start = args.first == 0;
        products =
            args.products && !start ? static_cast<float*>(args.products) + at * width : nullptr;
        const float before = start ? kImpossible : *top_at;
        float most = kImpossible;
        const T* const rows[1] = {logits};
        for_own_pieces(rows, columns, aligned, [&](int, const auto& v, auto) {
#pragma unroll
            for (int j = 0; j < kPiece<T>; ++j) most = fmaxf(most, v[0][j]);
        });
        most = team.reduce(most, larger);
        top = fmaxf(before, logit.of(most));  // z increases with raw
        shift = shift_of(top);
        fade = lx::exp_approx(before - shift);
    }
    template <class Whole>
    LX_DEVICE void store(int i, const float (&v)[kPiece<T>], Whole) const {
        store_values(logits + i, columns - i, Whole::value, v);
    }
    // Adds the chunk's sum to those of earlier chunks. All threads have read what it overwrites.
    LX_DEVICE void keep(bool start, float sum) const {
        sum = team.reduce(sum, add);
        if (lx::thread_rank() == 0) {
            *top_at = top;
            *sum_at = start ? sum : *sum_at * fade + sum;
        }
        if (products && fade != 1)
            for (int j = lx::thread_rank(); j < width; j += kThreads) products[j] *= fade;
    }
};

// ------------------------------------------------------------------------------------------------
// Cross entropy

// Returns the label's column in this chunk, or -1.
LX_DEVICE int label_column(const VocabArgs& args) {
    const int64_t y = args.labels[blockIdx.x] - args.first;
    return y >= 0 && y < args.columns ? static_cast<int>(y) : -1;
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads, kCapped ? kMinBlocksTwice : kMinBlocks)
    cross_entropy_update_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    LX_SHARED(float, partial, BlockTeam::kScratch);
    if (args.labels[blockIdx.x] == args.ignore_index) return;
    const BlockTeam team(partial);
    const Logit<kCapped> logit(args);
    const bool start = args.first == 0, kept = args.products != nullptr;
    const int y = label_column(args);
    const Row<T, kCapped> row(args, logit, team, 0, aligned);
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
__global__ void __launch_bounds__(kFinishThreads)
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
    for (int j = rank; j < width; j += kFinishThreads)
        d[j] = counts ? d[j] * inverse - away * lx::load_nc(w + j) : 0.0f;
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    cross_entropy_gradient_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    const int64_t n = blockIdx.x;
    const int columns = static_cast<int>(args.columns), y = label_column(args);
    T* const row = static_cast<T*>(args.logits) + n * args.columns;
    const bool counts = args.labels[n] != args.ignore_index;
    const Logit<kCapped> logit(args);
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

// ------------------------------------------------------------------------------------------------
// Divergence of each hidden state, a student, from the last one, the teacher

LX_DEVICE bool counts(const VocabArgs& args) {
    return !args.mask || args.mask[blockIdx.x];
}
LX_HOST_DEVICE inline float share_of(const VocabArgs& args) {  // tau^2 / students / tau
    return static_cast<float>(args.tau / static_cast<double>(args.hiddens - 1));
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads, kMinBlocksTwice)
    kl_update_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    LX_SHARED(float, partial, BlockTeam::kScratch);
    if (!counts(args)) return;
    const BlockTeam team(partial);
    const Logit<kCapped> logit(args);
    const bool start = args.first == 0, kept = args.products != nullptr;
    const int last = static_cast<int>(args.hiddens) - 1;
    const Row<T, kCapped> teacher(args, logit, team, last, aligned);
    for (int e = 0; e < last; ++e) {
        const Row<T, kCapped> student(args, logit, team, e, aligned);
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

__global__ void __launch_bounds__(kFinishThreads)
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
        for (int j = rank; j < width; j += kFinishThreads)
            d[j] = valid ? d[j] * own - d_k[j] * other : 0.0f;
    }
    if (rank == 0) {
        lse[end] = top_k + logf(sum_k);
        static_cast<float*>(args.loss)[n] = loss * share * static_cast<float>(args.tau);
    }
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    kl_gradient_kernel(const __grid_constant__ VocabArgs args, bool aligned) {
    const int64_t n = blockIdx.x;
    const int columns = static_cast<int>(args.columns), last = static_cast<int>(args.hiddens) - 1;
    const bool valid = counts(args);
    const Logit<kCapped> logit(args);
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

// ------------------------------------------------------------------------------------------------

void declare_rows(const VocabArgs& args) {
    if (args.labels) LX_BUF(args.labels, args.rows * 8, lx::Access::kConstant);
    if (args.mask) LX_BUF(args.mask, args.rows, lx::Access::kConstant);
}
// Launches a kernel over a chunk of logits: launch.operator()<T, kCapped>(grid, aligned).
template <class Launch>
LaunchStatus over_logits(const VocabArgs& args, Launch&& launch) {
    if (args.rows == 0) return 0;
    // The limit prevents overflow: an index exceeds the end by at most a batch of pieces.
    if (args.rows > kMaxGridX || args.columns > INT32_MAX - 32 * kThreads) return kInvalidValue;
    const int64_t size = element_size(args.dtype);
    [[maybe_unused]] const int64_t all = args.hiddens * args.rows;
    declare_rows(args);
    LX_BUF(args.logits, all * args.columns * size, lx::Access::kReadWrite);
    const bool aligned = aligned_16(args.logits, {args.columns}, size);
    return with_dtype(args.dtype, [&]<class T>() {
        const auto grid = static_cast<unsigned>(args.rows);
        return args.softcap > 0 ? launch.template operator()<T, true>(grid, aligned)
                                : launch.template operator()<T, false>(grid, aligned);
    });
}
void declare_update(const VocabArgs& args) {
    [[maybe_unused]] const int64_t all = args.hiddens * args.rows;
    LX_BUF(args.state, 3 * all * 4, args.first == 0 ? lx::Access::kWrite : lx::Access::kReadWrite);
    if (args.products) LX_BUF(args.products, all * args.width * 4, lx::Access::kReadWrite);
}
bool declare_finish(const VocabArgs& args) {
    [[maybe_unused]] const int64_t all = args.hiddens * args.rows;
    declare_rows(args);
    LX_BUF(args.state, 3 * all * 4, lx::Access::kRead);
    if (args.products) LX_BUF(args.products, all * args.width * 4, lx::Access::kReadWrite);
    if (args.targets) LX_BUF(args.targets, args.rows * args.width * 4, lx::Access::kConstant);
    LX_BUF(args.loss, args.rows * 4, lx::Access::kWrite);
    LX_BUF(args.lse, all * 4, lx::Access::kWrite);
    return args.rows <= kMaxGridX;
}

}  // namespace

LaunchStatus launch_cross_entropy_update(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        declare_update(args);
        return LX_LAUNCH((cross_entropy_update_kernel<T, kCapped>), grid, kThreads, 0, stream, args,
                         aligned);
    });
}

LaunchStatus launch_cross_entropy_finish(const VocabArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    if (!declare_finish(args)) return kInvalidValue;
    const auto grid = static_cast<unsigned>(args.rows);
    return args.softcap > 0
               ? LX_LAUNCH(cross_entropy_finish_kernel<true>, grid, kFinishThreads, 0, stream, args)
               : LX_LAUNCH(cross_entropy_finish_kernel<false>, grid, kFinishThreads, 0, stream,
                           args);
}

LaunchStatus launch_cross_entropy_gradient(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        LX_BUF(args.lse, args.rows * 4, lx::Access::kConstant);
        return LX_LAUNCH((cross_entropy_gradient_kernel<T, kCapped>), grid, kThreads, 0, stream,
                         args, aligned);
    });
}

LaunchStatus launch_kl_update(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        declare_update(args);
        return LX_LAUNCH((kl_update_kernel<T, kCapped>), grid, kThreads, 0, stream, args, aligned);
    });
}

LaunchStatus launch_kl_finish(const VocabArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    if (!declare_finish(args)) return kInvalidValue;
    return LX_LAUNCH(kl_finish_kernel, static_cast<unsigned>(args.rows), kFinishThreads, 0, stream,
                     args);
}

LaunchStatus launch_kl_gradient(const VocabArgs& args, void* stream) {
    return over_logits(args, [&]<class T, bool kCapped>(unsigned grid, bool aligned) {
        LX_BUF(args.lse, args.hiddens * args.rows * 4, lx::Access::kConstant);
        return LX_LAUNCH((kl_gradient_kernel<T, kCapped>), grid, kThreads, 0, stream, args,
                         aligned);
    });
}

}  // namespace lora_ext
