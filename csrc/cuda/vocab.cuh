// Code shared by the losses over a vocabulary, which process a chunk of logits at a time. vocab.h
// has the formulas.
//
// A block processes a row of the batch, with all its hidden states. It first finds the largest
// logit of a chunk, then computes the exponentials; the second read is from L1 or L2, as a row of
// a chunk is about 16 KiB. The teacher's row is read again for each student, also from cache. A
// thread reads and writes only its own pieces, so it can overwrite them in place. Sums over the
// block use a fixed tree. Bound: bytes of the logits, read once and, with weights, written once.
#pragma once

#include "lora_ext/vocab.h"

#include "circuit_kernels.cuh"

namespace lora_ext {

constexpr int kVocabThreads = 256;
constexpr int kVocabBlocks = 4;       // minimum blocks per multiprocessor
constexpr int kVocabBlocksTwice = 3;  // with softcap, or two rows per block
constexpr int kVocabFinishThreads = 128;

// Calls f(index, values of each row, whole) for the pieces of kRows rows that this thread owns.
// `whole` is std::true_type if rows are aligned to 16 bytes and n is a multiple of a piece;
// otherwise it is std::false_type, and values beyond n are -inf.
template <class T, int kRows, class F>
LX_DEVICE void for_own_pieces(const T* const (&rows)[kRows], int n, bool aligned, F&& f) {
    constexpr int kSize = kPiece<T>, kStep = kVocabThreads * kSize, kBatch = 4 / kRows;
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
struct VocabLogit {
    float cap, inverse_cap, inverse_tau;

    LX_DEVICE explicit VocabLogit(const VocabArgs& args)
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
struct VocabRow {
    const VocabLogit<kCapped>& logit;
    const BlockTeam& team;
    T* logits;
    int columns;
    bool aligned;
    float *top_at, *sum_at, *third_at;
    float* products;  // nullptr if there is nothing to rescale
    int width;
    float top, shift, fade;

    LX_DEVICE VocabRow(const VocabArgs& args, const VocabLogit<kCapped>& logit,
                       const BlockTeam& team, int64_t e, bool aligned)
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
    // Adds the chunk's sum to that of earlier chunks. All threads must have read the values that
    // this function overwrites.
    LX_DEVICE void keep(bool start, float sum) const {
        sum = team.reduce(sum, add);
        if (lx::thread_rank() == 0) {
            *top_at = top;
            *sum_at = start ? sum : *sum_at * fade + sum;
        }
        if (products && fade != 1)
            for (int j = lx::thread_rank(); j < width; j += kVocabThreads) products[j] *= fade;
    }
};

// ------------------------------------------------------------------------------------------------
// Launchers

inline void declare_rows(const VocabArgs& args) {
    if (args.labels) LX_BUF(args.labels, args.rows * 8, lx::Access::kConstant);
    if (args.mask) LX_BUF(args.mask, args.rows, lx::Access::kConstant);
}
// Calls launch.operator()<T, kCapped>(grid, aligned), which launches a kernel over a chunk of
// logits.
template <class Launch>
LaunchStatus over_logits(const VocabArgs& args, Launch&& launch) {
    if (args.rows == 0) return 0;
    // The limit prevents overflow: an index exceeds the end by at most a batch of pieces.
    if (args.rows > kMaxGridX || args.columns > INT32_MAX - 32 * kVocabThreads)
        return kInvalidValue;
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
inline void declare_update(const VocabArgs& args) {
    [[maybe_unused]] const int64_t all = args.hiddens * args.rows;
    LX_BUF(args.state, 3 * all * 4, args.first == 0 ? lx::Access::kWrite : lx::Access::kReadWrite);
    if (args.products) LX_BUF(args.products, all * args.width * 4, lx::Access::kReadWrite);
}
inline bool declare_finish(const VocabArgs& args) {
    [[maybe_unused]] const int64_t all = args.hiddens * args.rows;
    declare_rows(args);
    LX_BUF(args.state, 3 * all * 4, lx::Access::kRead);
    if (args.products) LX_BUF(args.products, all * args.width * 4, lx::Access::kReadWrite);
    if (args.targets) LX_BUF(args.targets, args.rows * args.width * 4, lx::Access::kConstant);
    LX_BUF(args.loss, args.rows * 4, lx::Access::kWrite);
    LX_BUF(args.lse, all * 4, lx::Access::kWrite);
    return args.rows <= kMaxGridX;
}

}  // namespace lora_ext
