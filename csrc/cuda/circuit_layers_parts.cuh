// Numbers split into 16-bit parts for tensor cores, and the tile of a product of such numbers.
//
//   3 parts   bfloat16, all 24 bits of a float; the six largest of nine products are computed
//   2 parts   bfloat16, 16 bits; the three largest of four products are computed
//   1 part    float16 of the number times 2^14: 11 bits, terms below 2^-38 of the largest vanish
//
// The parts of eight numbers of a row are contiguous: eight first parts, eight second parts, ...
//
// A stage of a tile holds kStep values of k of both sides. cp.async fills a ring of stages of at
// most 72 KiB, so that one block fits any device and three fit a multiprocessor of 227 KiB. A side
// has the same layout in shared memory as in global memory: row by row, or k by k if ldmatrix.trans
// transposes it. Its 16-byte pieces are permuted within a row so that the eight lanes of an
// ldmatrix have no bank conflict.
#pragma once

#include "circuit_layers.cuh"
#include "ring.cuh"

namespace lora_ext {

constexpr float kHalfScale = 0x1p14f;
constexpr int kProductThreads = 128;
constexpr int kPartPiece = 8;  // numbers per 16 bytes

template <int kParts>
using PartOf = std::conditional_t<kParts == 1, lx::f16, lx::bf16>;

// Splits two numbers into one word per part.
template <int kParts>
LX_DEVICE void part_pair(float a, float b, uint32_t (&words)[kParts]) {
    if constexpr (kParts == 1) a *= kHalfScale, b *= kHalfScale;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        words[p] = lx::pack_floats<PartOf<kParts>>(a, b);
        const float2 rounded = lx::unpack_floats<PartOf<kParts>>(words[p]);
        a -= rounded.x, b -= rounded.y;
    }
}
// Returns the index of the first part of number `at` of a row. Parts are kPartPiece apart.
template <int kParts>
LX_DEVICE int64_t part_at(int64_t at) {
    return at / kPartPiece * (kPartPiece * kParts) + at % kPartPiece;
}
// Splits four numbers into parts and stores them from number `at` on, a multiple of four.
template <int kParts>
LX_DEVICE void store_parts(uint16_t* row, int64_t at, float a, float b, float c, float d) {
    uint32_t first[kParts], second[kParts];
    part_pair<kParts>(a, b, first);
    part_pair<kParts>(c, d, second);
#pragma unroll
    for (int p = 0; p < kParts; ++p)
        *reinterpret_cast<uint2*>(row + part_at<kParts>(at) + p * kPartPiece) = {first[p],
                                                                                 second[p]};
}
// Returns the exact values of two adjacent numbers with three parts; `first` points to the first
// part of the first number.
LX_DEVICE float2 joined_pair(const uint16_t* first) {
    float2 sum = {0, 0};
#pragma unroll
    for (int p = 2; p >= 0; --p) {
        const float2 part =
            lx::unpack_floats<lx::bf16>(*reinterpret_cast<const uint32_t*>(first + p * kPartPiece));
        sum.x += part.x, sum.y += part.y;
    }
    return sum;
}

// The numbers in memory that one side of a tile reads: `rows` x `columns` numbers from `first` on.
// Columns are read in whole pieces of eight; rows are `stride` numbers apart.
struct PartRows {
    const void* first;
    int64_t stride;
    int rows, columns;
};

// One side of a product, kSize rows or columns of a tile: (kSize, k) or, transposed, (k, kSize). A
// thread copies the same piece of every kRowStep-th row, one step of k after another.
template <int kParts, bool kTurned, int kSize, int kStep>
struct ProductSide {
    static constexpr int kRows = kTurned ? kStep : kSize;
    static constexpr int kPieces = (kTurned ? kSize : kStep) / kPartPiece;
    static constexpr int kRowBytes = kPieces * 16;
    static constexpr int kPlaneBytes = kRows * kRowBytes;  // bytes of one part
    static constexpr int kBytes = kParts * kPlaneBytes;
    static constexpr int kRowStep = kProductThreads / kPieces;
    static constexpr int kCopies = kRows / kRowStep;
    // As a multiple of 8, kRowStep gives all rows of a thread the same permutation of pieces.
    static_assert(kRowStep % 8 == 0 && kCopies * kRowStep == kRows);

    const unsigned char *origin, *own;  // own: the thread's first piece of the next step
    int64_t row_step, step;             // bytes between the thread's rows, and between steps
    int to;                             // offset of the thread's first piece in a stage
    int left;                           // remaining values of k from the next step on
    int others;                         // remaining rows or, if transposed, columns

    LX_DEVICE explicit ProductSide(const PartRows& in)
        : origin(static_cast<const unsigned char*>(in.first)) {
        const int row = lx::thread_rank() / kPieces, piece = lx::thread_rank() % kPieces;
        const int64_t row_bytes = in.stride * (2 * kParts);
        own = origin + row * row_bytes + piece * (16 * kParts);
        row_step = row_bytes * kRowStep;
        step = kTurned ? row_bytes * kStep : int64_t{kStep} * (2 * kParts);
        to = offset(row, piece);
        left = (kTurned ? in.rows - row : in.columns - piece * kPartPiece);
        others = (kTurned ? in.columns - piece * kPartPiece : in.rows - row);
    }
    LX_DEVICE static int offset(int row, int piece) {
        return row * kRowBytes + (piece ^ (kPieces >= 8 ? row % 8 : row / 2 % kPieces)) * 16;
    }

    // Copies the next step of k to a stage, with zeros beyond the end.
    LX_DEVICE void fill(unsigned char* stage) {
        constexpr int kLastRow = (kCopies - 1) * kRowStep;
        const bool whole = kTurned ? left > kLastRow && others > 0 : left > 0 && others > kLastRow;
        stage += to;
        if (whole) {
            const unsigned char* from = own;
#pragma unroll
            for (int i = 0; i < kCopies; ++i, from += row_step) {
#pragma unroll
                for (int p = 0; p < kParts; ++p)
                    lx::cp_async<16>(stage + p * kPlaneBytes + i * kRowStep * kRowBytes,
                                     from + 16 * p);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < kCopies; ++i) {
                const bool there =
                    kTurned ? left > i * kRowStep && others > 0 : left > 0 && others > i * kRowStep;
                const unsigned char* from = there ? own + i * row_step : origin;
#pragma unroll
                for (int p = 0; p < kParts; ++p)
                    lx::cp_async<16>(stage + p * kPlaneBytes + i * kRowStep * kRowBytes,
                                     from + 16 * p, there ? 16 : 0);
            }
        }
        own += step;
        left -= kStep;
    }
    // Loads operand A of part p: rows first to first + 15, for the 16 values of k from `k` on.
    LX_DEVICE static void load_rows(uint32_t (&a)[4], const unsigned char* stage, int p, int first,
                                    int k) {
        const int lane = lx::lane_id();
        stage += p * kPlaneBytes;
        if constexpr (kTurned)
            lx::ldmatrix_x4_trans(
                a, stage + offset(k + lane / 16 * 8 + lane % 8, first / kPartPiece + lane / 8 % 2));
        else
            lx::ldmatrix_x4(a, stage + offset(first + lane % 16, k / kPartPiece + lane / 16));
    }
    // Loads operand B of part p: two tiles of eight columns from `first` on, for the same values of
    // k as load_rows.
    LX_DEVICE static void load_columns(uint32_t (&b)[2], uint32_t (&next)[2],
                                       const unsigned char* stage, int p, int first, int k) {
        const int lane = lx::lane_id();
        uint32_t four[4];
        stage += p * kPlaneBytes;
        if constexpr (kTurned)
            lx::ldmatrix_x4_trans(four,
                                  stage + offset(k + lane % 16, first / kPartPiece + lane / 16));
        else
            lx::ldmatrix_x4(four, stage + offset(first + lane / 16 * 8 + lane % 8,
                                                 k / kPartPiece + lane / 8 % 2));
        b[0] = four[0], b[1] = four[1];
        next[0] = four[2], next[1] = four[3];
    }
};

// A tile of kRows rows and kColumns columns; each of four warps computes a quarter of it.
template <int kNumParts, bool kLeftTurned, bool kRightTurned, bool kLarge>
struct ProductShape {
    static constexpr int kParts = kNumParts;
    static constexpr int kRows = kLarge ? 128 : 64, kColumns = kLarge ? 64 : 32;
    static constexpr int kStep = kParts == 1 ? 64 : 32;
    using Left = ProductSide<kParts, kLeftTurned, kRows, kStep>;
    using Right = ProductSide<kParts, kRightTurned, kColumns, kStep>;
    static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
    static constexpr int kStages = lx::min(4, 73728 / kStageBytes);
    static constexpr int kRingBytes = kStages * kStageBytes;
    static constexpr int kTilesM = kRows / 32, kTilesN = kColumns / 16;
    static constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / 2;
    static constexpr int kOwn = kTilesM * kTilesN * 4;  // results per thread
    // Tensor cores truncate a sum where float32 would round it, which biases long sums of positive
    // terms (Fasi et al. 2021). With three parts, whose results keep all bits of a float, tensor
    // cores therefore sum 128 terms at a time, and ordinary instructions add these sums.
    static constexpr int kRun = kParts == 3 ? 128 / kStep : 1 << 30;
    static constexpr int kTogether = kTilesN >= 4 ? 1 : 2;  // row tiles whose products alternate
    static constexpr int kUnroll = kParts == 3 && kLarge ? 1 : kStep / 16;  // limited by registers
    using Sums = float[kTilesM][kTilesN][4];
    static_assert(kStages >= 2);

    LX_DEVICE static int warp_row() { return lx::warp_id() % 2 * kWarpRows; }
    LX_DEVICE static int warp_column() { return lx::warp_id() / 2 * kWarpColumns; }
    // Row and column of a thread's result i. For even i, result i + 1 is in the next column.
    LX_DEVICE static int row_of(int i) {
        return warp_row() + i / (4 * kTilesN) * 16 + i / 2 % 2 * 8 + lx::lane_id() / 4;
    }
    LX_DEVICE static int column_of(int i) {
        return warp_column() + i / 4 % kTilesN * 8 + lx::lane_id() % 4 * 2 + i % 2;
    }
    LX_DEVICE static float at(const Sums& sums, int i) {
        return sums[i / (4 * kTilesN)][i / 4 % kTilesN][i % 4];
    }

    LX_DEVICE static void multiply(Sums& sums, const unsigned char* left,
                                   const unsigned char* right) {
#pragma unroll(kUnroll)
        for (int k = 0; k < kStep; k += 16) {
            uint32_t b[kParts][kTilesN][2];
#pragma unroll
            for (int p = 0; p < kParts; ++p)
#pragma unroll
                for (int j = 0; j < kTilesN; j += 2)
                    Right::load_columns(b[p][j], b[p][j + 1], right, p, warp_column() + 8 * j, k);
#pragma unroll
            for (int m = 0; m < kTilesM; m += kTogether) {
                uint32_t a[kTogether][kParts][4];
#pragma unroll
                for (int t = 0; t < kTogether; ++t)
#pragma unroll
                    for (int p = 0; p < kParts; ++p)
                        Left::load_rows(a[t][p], left, p, warp_row() + 16 * (m + t), k);
                // The smallest products are added first, which loses fewer bits.
#pragma unroll
                for (int below = kParts - 1; below >= 0; --below)
#pragma unroll
                    for (int p = below; p >= 0; --p)
#pragma unroll
                        for (int t = 0; t < kTogether; ++t)
#pragma unroll
                            for (int j = 0; j < kTilesN; ++j)
                                lx::mma_m16n8k16<PartOf<kParts>>(sums[m + t][j], a[t][p],
                                                                 b[below - p][j]);
            }
        }
    }
    // Adds the product of left and right over `depth` values of k to `sums`. Waits for the kernel
    // that writes `right`.
    LX_DEVICE static void add_product(Sums& sums, unsigned char* ring, const PartRows& left_rows,
                                      const PartRows& right_rows, int depth) {
        Left left(left_rows);
        Right right(right_rows);
        const int steps = (depth + kStep - 1) / kStep;
#pragma unroll
        for (int s = 0; s < kStages - 1; ++s)
            if (s < steps) left.fill(ring + s * kStageBytes);
        lx::grid_dependency_wait();
        const Ring<kStages> stages{steps};
        stages.fill([&](int s) { right.fill(ring + s * kStageBytes + Left::kBytes); });
        int stage = 0, next = kRingBytes - kStageBytes;  // next stage to fill
        const auto fill = [&](int) {
            left.fill(ring + next);
            right.fill(ring + next + Left::kBytes);
            next = next == kRingBytes - kStageBytes ? 0 : next + kStageBytes;
        };
        for (int step = 0; step < steps;) {
            Sums run = {};
            const int end = kParts == 3 ? lx::min(steps, step + kRun) : steps;
            for (; step < end; ++step) {
                stages.consume(step, fill);
                multiply(run, ring + stage, ring + stage + Left::kBytes);
                stage = stage == kRingBytes - kStageBytes ? 0 : stage + kStageBytes;
            }
#pragma unroll
            for (int m = 0; m < kTilesM; ++m)
#pragma unroll
                for (int j = 0; j < kTilesN; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m][j][i] += run[m][j][i];
        }
        lx::cp_async_wait_all();
        lx::syncthreads();  // the ring has been read
    }
};

template <int kParts>
LX_DEVICE float trusted(int n) {
    return kParts == 1 ? static_cast<float>(n) * 0x1p-28f : kSumTrusted;
}

// Converts the sums of a tile to values; `tops` contains the largest term of each lane.
template <class G>
LX_DEVICE void finish_up(const LayersArgs& args, const LayersNode& node, const LayersMatrix& m,
                         int row0, int64_t lane0, const float* tops, const typename G::Sums& sums) {
    const LayerTile tile(args, 0);
    unsigned lost[(G::kOwn + 31) / 32] = {};  // one bit per result, set if it must be recomputed
#pragma unroll
    for (int i = 0; i < G::kOwn; i += 2) {
        const int o = row0 + G::row_of(i);
        const int64_t lane = lane0 + G::column_of(i);
        if (o >= m.units || lane >= args.lanes) continue;
        const float shift = tile.shift_of(m, o);
        const float2 top = *reinterpret_cast<const float2*>(tops + G::column_of(i));
        const float scale = G::kParts == 1 ? 0x1p-28f : 1.0f, least = trusted<G::kParts>(m.width);
        const float s[2] = {G::at(sums, i) * scale, G::at(sums, i + 1) * scale};
        const bool possible = shift != kImpossible;
        lost[i / 32] |= static_cast<unsigned>(possible && s[0] < least && top.x != kImpossible)
                        << i % 32;
        lost[i / 32] |= static_cast<unsigned>(possible && s[1] < least && top.y != kImpossible)
                        << (i % 32 + 1);
        *reinterpret_cast<float2*>(tile.at(args.val, node.out + o) + lane) = {
            logf(s[0]) + shift + top.x, logf(s[1]) + shift + top.y};
    }
#pragma unroll 1
    for (int word = 0; word < (G::kOwn + 31) / 32; ++word) {
        unsigned rest = word == 0 ? lost[0] : lost[G::kOwn > 32 ? 1 : 0];
        while (rest) {
            const int i = 32 * word + lx::ffs(rest) - 1;
            rest &= rest - 1;
            const int o = row0 + G::row_of(i);
            const int lane = static_cast<int>(lane0) + G::column_of(i);
            tile.at(args.val, node.out + o)[lane] = tile.rescued_sum(node, m, o, lane);
        }
    }
}

inline void declare_parts(const void* parts, int64_t numbers, lx::Access access) {
    LX_BUF(parts, numbers * 2, access);
}

}  // namespace lora_ext
