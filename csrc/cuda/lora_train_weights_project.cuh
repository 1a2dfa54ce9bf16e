// dv[t, :] = c * dy[t, :] b[s] in the pass over dy that also computes db: a block multiplies its
// columns of dy and of B, which are in shared memory.
#pragma once

#include "lora_train_weights.cuh"

namespace lora_ext {

constexpr int kPassStepRows = 32;
constexpr int kPassRow = kPassBytes + kPieceBytes;  // an odd number of pieces, like kBandRow
// Bytes of a row of B in shared memory; each output has a row.
template <int kPages>
constexpr int kFactorRow = (kPages + 1) * kPieceBytes;

// Computes dv of the rows of a step. A warp has 16 rows and one or two pages of ranks, and sums
// over a slice of the block's columns.
template <class T, int kPages>
struct Projecting {
    static constexpr int kShares = kPages == 2 ? 2 : 1;  // slices per block
    static constexpr int kOwn = kPages == 2 ? 1 : 2;     // pages per warp
    static constexpr int kWidth = kGradientColumns<T> / kShares;
    static_assert(kPassStepRows / kTileRows * kShares * kPages / kOwn == kGradientWarps);
    static_assert(kWidth == pass_slice(kPages * kPageRanks));

    int row, page, share;

    LX_DEVICE Projecting()
        : row(lx::warp_id() % 2 * kTileRows),
          page(lx::warp_id() / 2 % (kPages / kOwn) * kOwn),
          share(lx::warp_id() / (2 * kPages / kOwn)) {}

    LX_DEVICE void multiply(float (&acc)[kOwn][4], const unsigned char* x,
                            const unsigned char* b) const {
        const int lane = lx::lane_id();
        constexpr int kStep = kOwn == 1 ? 32 : 16;  // columns of one ldmatrix of B
#pragma unroll
        for (int k0 = 0; k0 < kWidth; k0 += kStep) {
            const int k = share * kWidth + k0;
            // ldmatrix loads and transposes 32 columns of one page, or 16 columns of each of two
            // pages.
            uint32_t bf[4];
            lx::ldmatrix_x4_trans(bf, b + (k + lane % kStep) * kFactorRow<kPages> +
                                          (page + lane / kStep) * kPieceBytes);
#pragma unroll
            for (int i = 0; i < kStep / 16; ++i) {
                // ldmatrix loads rows 0-7 and 8-15 of eight columns, then of the next eight.
                uint32_t xf[4];
                lx::ldmatrix_x4(xf, x + (row + lane % 16) * kPassRow +
                                        (k / kVec<T> + 2 * i + lane / 16) * kPieceBytes);
                lx::mma_m16n8k16<T>(acc[0], xf, {bf[2 * i], bf[2 * i + 1]});
                if constexpr (kOwn == 2) lx::mma_m16n8k16<T>(acc[1], xf, {bf[2], bf[3]});
            }
        }
    }

    // Stores dv. row_of[0, rows) are the indices in the batch of the rows of the step.
    LX_DEVICE void store(const float (&acc)[kOwn][4], const Projection& to, const Slices& slices,
                         const GradientBlock& block, const int32_t* row_of, int rows, float factor,
                         bool paired) const {
        const int slice = block.column / kWidth + share, lane = lx::lane_id();
        if (slice >= slices.count) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = row + 8 * h + lane / 4;
            if (at >= rows) continue;
            float* const out =
                to.out + slice * slices.split_stride + row_of[at] * to.out_row_stride;
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
                const int rank = (page + j) * kPageRanks + 2 * (lane % 4);
                store_ranks(out + rank, block.ranks - rank, paired, factor * acc[j][2 * h],
                            factor * acc[j][2 * h + 1]);
            }
        }
    }
};

// Copies the block's outputs of B, with zeros for missing outputs or ranks. Whole page rows may
// contain ranks past the adapter's, whose sums are not stored.
template <class T, int kPages>
LX_DEVICE void fill_factor(unsigned char* to, const LoraBank& bank, const GradientBlock& block,
                           bool aligned) {
    const T* const b = static_cast<const T*>(bank.b) + block.slot * bank.b_slot_stride;
    for (int i = lx::thread_rank(); i < kGradientColumns<T> * kPages; i += kGradientThreads) {
        const int page = i % kPages, output = block.column + i / kPages;
        int n = lx::min(block.ranks - page * kPageRanks, kPageRanks);
        if (n > 0 && aligned) n = kPageRanks;
        if (output >= bank.out_features) n = 0;
        copy_piece<T>(to + i / kPages * kFactorRow<kPages> + page * kPieceBytes,
                      n > 0 ? b + page * bank.b_page_stride + output * bank.b_row_stride : b, n,
                      aligned);
    }
}

}  // namespace lora_ext
