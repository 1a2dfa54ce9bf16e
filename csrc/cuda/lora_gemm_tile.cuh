// The tile of lora_gemm.cuh: its shape for each product, the copies of its pieces to shared memory,
// and the product of a warp over one stage.
#pragma once

#include "lora_train.cuh"

namespace lora_ext {

enum class Product { kShrink, kProject, kExpand, kInput };

constexpr int kGemmThreads = 128;

template <class T, Product kProduct, int kRows>
struct GemmShape {
    static constexpr bool kUpdate = kProduct == Product::kExpand || kProduct == Product::kInput;
    static constexpr bool kTurned = kProduct == Product::kProject || kProduct == Product::kInput;
    static constexpr bool kParted = kUpdate && sizeof(T) == 2;  // left is float, right 16-bit
    using Left = std::conditional_t<kUpdate, float, T>;

    static constexpr int kLeftPieces = 8;
    static constexpr int kLeftRow = kLeftPieces * kPieceBytes;
    static constexpr int kStep = kLeftRow / static_cast<int>(sizeof(Left));  // k per stage
    static constexpr int kMmaK = sizeof(T) == 2 ? 16 : 8;
    static constexpr int kRightRows = kTurned ? kStep : kGemmColumns;
    static constexpr int kRightPieces = (kTurned ? kGemmColumns : kStep) / kVec<T>;
    static constexpr int kRightRow = kRightPieces * kPieceBytes;
    static constexpr int kStageBytes = kRows * kLeftRow + kRightRows * kRightRow;
    static constexpr int kStages = lx::min(4, 98304 / kStageBytes);
    static constexpr int kRingBytes = kStages * kStageBytes;
    // The result of an update is stored in the ring as floats before it is added. With rows of this
    // size, the stores of a warp have no bank conflict.
    static constexpr int kDeltaRow = kGemmColumns + 8;
    static_assert(!kUpdate || kRows * kDeltaRow * 4 <= kRingBytes);

    static constexpr int kWarpsM = kRows == 16 ? 1 : 2, kWarpsN = 4 / kWarpsM;
    static constexpr int kTilesM = kRows / kTileRows / kWarpsM;
    static constexpr int kTilesN = kGemmColumns / 8 / kWarpsN;
    static constexpr int kWarpRows = kTilesM * kTileRows, kWarpColumns = kTilesN * 8;
    static constexpr bool kTf32 = sizeof(T) == 4 || (kParted && std::is_same_v<T, lx::f16>);
    static constexpr int kMinBlocks = kRows == 128  ? 2
                                      : kRows == 64 ? (kParted && !kTf32 ? 3 : 2)
                                      : kTf32       ? 3
                                                    : 4;

    // Number of mma steps of a stage that are unrolled, limited by registers.
    static constexpr int kUnroll = kTf32 || (kUpdate && kRows == 128) ? 1 : kRows == 128 ? 2 : 4;
    using Sums = float[kTilesM][kTilesN][4];

    // Positions of pieces in a row, chosen so that reads have no bank conflict. If left is split,
    // it is read as float2; if right is transposed and float, it is read as floats. In both cases a
    // warp reads 32 bytes of each of four rows at once.
    __host__ __device__ static constexpr int left_piece(int row, int piece) {
        return piece ^ (kParted ? 2 * row : row) % 8;
    }
    __host__ __device__ static constexpr int right_piece(int row, int piece) {
        if (kTurned) return piece ^ (sizeof(T) == 2 ? row % 8 : 2 * (row % 4));
        return piece ^ (kRightPieces == 8 ? row % 8 : row / 2 % 4);
    }
};

// 16 bytes to copy: the first n elements, then zeros. If n <= 0, `from` is not read.
template <class T>
struct Piece {
    const T* from;
    int n;
};

// Copies piece_of(i) to to(i), by cp.async if aligned, otherwise synchronously. `whole`: all pieces
// of the thread have 16 bytes, as in most stages; a copy then takes one instruction besides the
// computation of its address.
template <class T, int kCount, class To, class PieceOf>
LX_DEVICE void copy_pieces(bool whole, bool aligned, To&& to, PieceOf&& piece_of) {
    if (whole && aligned) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) lx::cp_async<kPieceBytes>(to(i), piece_of(i).from);
    } else {
#pragma unroll 1
        for (int i = 0; i < kCount; ++i) {
            const Piece<T> piece = piece_of(i);
            copy_piece<T>(to(i), piece.from, piece.n, aligned);
        }
    }
}

// Loads operand B of the warp's column tiles: kMmaK values of the stage, from `k` on.
template <class G, class T>
LX_DEVICE void load_right(uint32_t (&w)[G::kTilesN][2], const unsigned char* right, int column,
                          int k) {
    const int lane = lx::lane_id();
#pragma unroll
    for (int j = 0; j < G::kTilesN; j += 2) {
        if constexpr (G::kTurned && sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = k + i % 2 * 4 + lane % 4;
                const int at = column + 8 * (j + i / 2) + lane / 4;
                w[j + i / 2][i % 2] = reinterpret_cast<const uint32_t*>(
                    right + row * G::kRightRow + G::right_piece(row, at / 4) * kPieceBytes)[at % 4];
            }
        } else {
            // ldmatrix loads both halves of k of one column tile, then of the next.
            uint32_t four[4];
            if constexpr (G::kTurned) {
                const int row = k + lane % 16, piece = column / 8 + j + lane / 16;
                lx::ldmatrix_x4_trans(
                    four, right + row * G::kRightRow + G::right_piece(row, piece) * kPieceBytes);
            } else {
                const int row = column + 8 * (j + lane / 16) + lane % 8;
                const int piece = k / kVec<T> + lane / 8 % 2;
                lx::ldmatrix_x4(
                    four, right + row * G::kRightRow + G::right_piece(row, piece) * kPieceBytes);
            }
            w[j][0] = four[0], w[j][1] = four[1];
            w[j + 1][0] = four[2], w[j + 1][1] = four[3];
        }
    }
}

// Adds the product of left and right over one stage to the sums of the warp's rows and columns.
template <class G, class T>
LX_DEVICE void multiply(typename G::Sums& sums, const unsigned char* left,
                        const unsigned char* right, int warp_row, int warp_column) {
    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll(G::kUnroll)
    for (int k = 0; k < G::kStep; k += G::kMmaK) {
        uint32_t w[G::kTilesN][2];
        load_right<G, T>(w, right, warp_column, k);
#pragma unroll
        for (int m = 0; m < G::kTilesM; ++m) {
            const int first = warp_row + m * kTileRows;
            if constexpr (!G::kParted) {
                // ldmatrix loads rows 0-7 and 8-15 of the first half of k, then of the
                // second.
                uint32_t xf[4];
                const int row = first + lane % 16, piece = k / kVec<T> + lane / 16;
                lx::ldmatrix_x4(xf,
                                left + row * G::kLeftRow + G::left_piece(row, piece) * kPieceBytes);
#pragma unroll
                for (int j = 0; j < G::kTilesN; ++j) mma_step<T>(sums[m][j], xf, w[j]);
            } else {
                // v contains elements 2t and 2t + 1 of rows g and g + 8, first those of the first
                // half of k.
                float2 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = first + g + i % 2 * 8, at = k + i / 2 * 8 + 2 * t;
                    v[i] = *reinterpret_cast<const float2*>(
                        left + row * G::kLeftRow + G::left_piece(row, at / 4) * kPieceBytes +
                        at % 4 * 4);
                }
                if constexpr (std::is_same_v<T, lx::bf16>) {
                    uint32_t high[4], low[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        high[i] = lx::pack_floats<T>(v[i].x, v[i].y);
                        const float2 h = lx::unpack_floats<T>(high[i]);
                        low[i] = lx::pack_floats<T>(v[i].x - h.x, v[i].y - h.y);
                    }
#pragma unroll
                    for (int j = 0; j < G::kTilesN; ++j) lx::mma_m16n8k16<T>(sums[m][j], low, w[j]);
#pragma unroll
                    for (int j = 0; j < G::kTilesN; ++j)
                        lx::mma_m16n8k16<T>(sums[m][j], high, w[j]);
                } else {
                    // Lane t passes elements 2t and 2t + 1 of eight as k = t and t + 4 of an mma.
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 upper = v[2 * half], lower = v[2 * half + 1];
                        const float a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
                        for (int j = 0; j < G::kTilesN; ++j) {
                            const float2 pair = lx::unpack_floats<T>(w[j][half]);
                            mma_floats<false, true>(sums[m][j], a, {pair.x, pair.y});
                        }
                    }
                }
            }
        }
    }
}

}  // namespace lora_ext
