// Loads, products and stores of a warp of expand: 16 rows of one adapter, 32 outputs per step.
#pragma once

#include "lora_fragments.cuh"

namespace lora_ext {

constexpr int kWarpOutputs = 32;

// Eight adjacent outputs of one row of y. kEarly: the load precedes the wait for the previous
// kernel. PTX guarantees that L1 shows the results of earlier kernels only after this wait, so an
// early load reads from L2.
template <class T, bool kAligned>
struct Outputs {
    static constexpr int kLoads = 8 / kVec<T>;
    uint4 words[kLoads];

    template <bool kEarly>
    LX_DEVICE void load(const T* p, int n) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if constexpr (kAligned) {
                const uint4* const at = reinterpret_cast<const uint4*>(p) + i;
                words[i] = kEarly ? lx::load_l2(at) : lx::load_global(at);
            } else {
                T e[kVec<T>];
#pragma unroll
                for (int j = 0; j < kVec<T>; ++j)
                    e[j] = i * kVec<T> + j < n ? lx::load_global(p + i * kVec<T> + j)
                                               : lx::from_float<T>(0);
                words[i] = words_of(e);
            }
        }
    }
    // Adds d[0..8) to the outputs and stores the first n of them at p.
    LX_DEVICE void add_store(T* p, int n, const float (&d)[8]) const {
        if (n <= 0) return;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            float part[kVec<T>];
#pragma unroll
            for (int j = 0; j < kVec<T>; ++j) part[j] = d[i * kVec<T> + j];
            const uint4 sum = add_to_words<T>(words[i], part);
            if constexpr (kAligned) {
                lx::store_global(reinterpret_cast<uint4*>(p) + i, sum);
            } else {
                const uint32_t out[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                for (int j = 0; j < kVec<T>; ++j) {
                    if (i * kVec<T> + j >= n) continue;
                    T* const at = p + i * kVec<T> + j;
                    if constexpr (sizeof(T) == 2) {
                        const uint32_t word = out[j / 2] >> (16 * (j % 2));
                        lx::store_global(at, lx::bit_cast<T>(static_cast<uint16_t>(word)));
                    } else {
                        lx::store_global(at, lx::bit_cast<T>(out[j]));
                    }
                }
            }
        }
    }
};

// The tile of a block. It is in shared memory, from which all lanes read it.
struct Found {
    int rows, rank;
    unsigned pages;  // bit i is set if page i has ranks of the adapter and exists in memory
};

// Registers for the B of one product and the y of one step.
template <class P, bool kAligned>
struct Loads {
    typename PagesOf<P>::Words b[4];
    Outputs<typename PagesOf<P>::Row, kAligned> y[2];
};

// Addresses and counts that a lane needs for its loads, products and stores. They are computed
// twice: for the loads before the wait, and again from shared memory once the fragments are built,
// so that they take no registers while the splits of v are summed.
template <class P, bool kAligned, int kWarpsM, int kWarpsN>
struct Lane {
    using T = typename PagesOf<P>::Row;
    using E = typename PagesOf<P>::Element;
    using Words = typename PagesOf<P>::Words;
    const LoraArgs& args;
    const E* const* page_of;
    const Found found;
    const int end;  // end of the outputs of the thread block
    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4;
    // Column c of the j-th of four mma is output 8 (c / 2) + 2j + c % 2 of the warp's 32.
    const int first_output = 8 * (g / 2) + g % 2;
    const int blocks = (found.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    int warp_m, warp_n;
    int stride;    // outputs between two consecutive steps of the warp
    T* y_row[2];   // output 8 t of rows g and g + 8
    int y_end[2];  // the step at output o has outputs of this lane in row g + 8 h if o < y_end[h]

    LX_DEVICE Lane(const LoraArgs& args, const Found& found, int end, const E* const* page_of,
                   const int32_t* row_of)
        : args(args), page_of(page_of), found(found), end(end) {
        // The number of warps along the rows is the smallest power of two that covers the tile's
        // rows. Along the outputs, there are kWarpsM * kWarpsN divided by this number.
        int log_m = 0;
        while ((1 << log_m) < kWarpsM && (kTileRows << log_m) < found.rows) ++log_m;
        warp_m = lx::warp_id() & ((1 << log_m) - 1), warp_n = lx::warp_id() >> log_m;
        stride = (kWarpsM * kWarpsN * kWarpOutputs) >> log_m;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_m * kTileRows + g + 8 * h;
            const bool here = row < found.rows;
            y_end[h] = here ? end - 8 * t : 0;
            y_row[h] = row_at<kAligned>(static_cast<T*>(args.y) + 8 * t, row_of[here ? row : 0],
                                        args.y_row_stride);
        }
    }
    LX_DEVICE static int rank_of(int block, int t) { return block * kBlockRanks<T> + t * kVec<T>; }
    // Returns the adapter's rank minus this lane's first rank in a block of ranks, or 0 if the page
    // is missing. If the result is not positive, the lane has no ranks in the block.
    LX_DEVICE int ranks(int block) const {
        const int rank = rank_of(block, t);
        return found.pages >> rank / kPageRanks & 1 ? found.rank - rank : 0;
    }
    // Returns the address of this lane's ranks of output 0, or another valid address if the lane
    // has no ranks.
    LX_DEVICE const E* page(int block) const {
        const int rank = rank_of(block, t);
        return page_of[ranks(block) > 0 ? rank / kPageRanks : lx::ffs(found.pages) - 1] +
               rank % kPageRanks;
    }
    // Returns the address of the ranks of an output. For outputs beyond the last one, returns that
    // of the last one.
    LX_DEVICE const E* b_row(const E* page, int o, int j) const {
        const int output = lx::min(o + first_output + 2 * j, end - 1);
        return row_at<kAligned>(page, output, args.bank.b_row_stride);
    }
    // Loads the B of a step, even if the lane has no ranks in the block.
    LX_DEVICE void load_b(Words (&b)[4], int block, int o) const {
        const E* const at = page(block);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const E* const row = b_row(at, o, j);
            if constexpr (kAligned)
                b[j] = lx::load_global(reinterpret_cast<const Words*>(row));
            else
                b[j] = load_words<T, false>(row, ranks(block));
        }
    }
    // Loads the B of a step if `own`, that is, if the lane has ranks; otherwise b keeps its value.
    LX_DEVICE void load_own_b(Words (&b)[4], const E* page, bool own, int o) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const E* const row = b_row(page, o, j);
            if (own) b[j] = lx::load_global(reinterpret_cast<const Words*>(row));
        }
    }
    // Copies b to `own`, with zeros for ranks that the adapter does not have.
    LX_DEVICE void keep_own(Words (&own)[4], const Words (&b)[4], int block) const {
        if constexpr (std::is_same_v<P, T>) {
            const uint4 mask = keep_elements<T>({~0u, ~0u, ~0u, ~0u}, ranks(block));
#pragma unroll
            for (int j = 0; j < 4; ++j)
                own[j] = {b[j].x & mask.x, b[j].y & mask.y, b[j].z & mask.z, b[j].w & mask.w};
        } else {
            const int n = ranks(block);
            const auto first = [n](int skip) {  // mask of the first n bytes of eight
                return n <= skip ? 0u : n < skip + 4 ? (1u << 8 * (n - skip)) - 1 : ~0u;
            };
            const uint2 mask = {first(0), first(4)};
#pragma unroll
            for (int j = 0; j < 4; ++j) own[j] = {b[j].x & mask.x, b[j].y & mask.y};
        }
    }
    // Loads the y of the step at output o, `ahead` elements after y_at. The registers of outputs
    // that do not exist keep their values.
    template <bool kEarly = false>
    LX_DEVICE void load_y(Outputs<T, kAligned> (&y)[2], T* const (&y_at)[2], int ahead,
                          int o) const {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (o < y_end[h]) y[h].template load<kEarly>(y_at[h] + ahead, y_end[h] - o);
    }
    LX_DEVICE void multiply(float (&acc)[4][4], const Words (&of_pages)[4],
                            unsigned char* fragments, int block) const {
        uint4 b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (std::is_same_v<P, T>)
                b[j] = of_pages[j];
            else
                b[j] = widen_float8<T>(of_pages[j]);
        }
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 a = fragment<T>(fragments, blocks, warp_m, block, part, half)[lane];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (half == 0)
                        mma_step<T>(acc[j], {a.x, a.y, a.z, a.w}, {b[j].x, b[j].y});
                    else
                        mma_step<T>(acc[j], {a.x, a.y, a.z, a.w}, {b[j].z, b[j].w});
                }
            }
        }
    }
    // Adds the products of the step at output o to its y, and stores the sums at y_at.
    LX_DEVICE void store_y(const Outputs<T, kAligned> (&y)[2], T* const (&y_at)[2],
                           const float (&acc)[4][4], const float* unscale, int o) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float undo =
                std::is_same_v<T, lx::f16> ? unscale[warp_m * kTileRows + g + 8 * h] : 1.0f;
            float d[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) d[i] = acc[i / 2][2 * h + i % 2] * undo;
            y[h].add_store(y_at[h], y_end[h] - o, d);
        }
    }
};

}  // namespace lora_ext
