// Expand: y[t, :] = round(y[t, :] + b[s] v[t, :]), and the sum of v over its splits.
//
// Block (tile, range of outputs, module). A warp owns 16 rows of one adapter and 32 outputs at a
// time: v is operand A of mma, the rows of the B pages are operand B, loaded as in lora_tile.cuh.
// Columns are numbered so that a lane holds 8 adjacent outputs of rows g and g + 8; y is read and
// written once, 16 bytes per access. Loads are issued a step or a product ahead, so that a turn of
// a loop waits for memory once. Decode: the warps of a block share 16 rows and divide the outputs;
// two memory round trips (find_tile) precede the first byte of B. Prefill: the warps divide the
// rows of a chunk, and all but the first read B from L1; in a short chunk they also divide the
// outputs. Bound: bytes of the B pages (decode), of y (prefill).
//
// v is float32. For 16-bit types it is split into high + low: two products, which keep 16 bits of v
// (bfloat16) or 22 (float16). float16 rows are first scaled to [2^14, 2^15) by a power of two, so
// that a large v does not overflow and a small one does not lose its low part.
#include "lora_kernels.cuh"

namespace lora_ext {
namespace {

// A block of ranks: the ranks that four lanes load together. A lane loads the eight ranks of one
// page row, or half of them (float32).
template <class T>
constexpr int kBlockRanks = 4 * kVec<T>;
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;  // high and low part of v, or the float itself

constexpr int kWarpOutputs = 32;
constexpr int kDecodeShared = 6 * 1024;  // minimum shared memory per block, in bytes
template <class T, int kRows>
constexpr int fragment_bytes(int max_rank) {
    return kRows / kTileRows * static_cast<int>(ceil_div(max_rank, kBlockRanks<T>)) * kParts<T> *
           2 * 32 * 16;
}

// Returns fragment (row tile, block, part, half) of v: 16 bytes per lane, the operand of mma_step
// for words 2 half and 2 half + 1 of the lane's ranks in rows g and g + 8.
template <class T>
LX_DEVICE uint4* fragment(unsigned char* fragments, int blocks, int tile, int block, int part,
                          int half) {
    return reinterpret_cast<uint4*>(fragments) +
           (((tile * blocks + block) * kParts<T> + part) * 2 + half) * 32;
}

// Sums the splits of v, scales them, stores fragments. unscale[row] undoes the row's power of two.
// kFactors: pages and rows have their own factors, instead of `scale`.
template <class T, int kRows, bool kFactors>
LX_DEVICE void build_fragments(const LoraArgs& args, const Partials& v, const RowTile& tile,
                               float scale, const int32_t (&row_of)[kRows],
                               unsigned char* fragments, unsigned (&row_max)[kRows],
                               float (&unscale)[kRows]) {
    constexpr bool kNormalise = std::is_same_v<T, lx::f16>;
    const int blocks = (tile.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    if constexpr (kNormalise) {
        for (int i = lx::thread_rank(); i < kRows; i += static_cast<int>(blockDim.x))
            row_max[i] = 0;
        lx::syncthreads();
    }
    // Item (row, block, t): the ranks of one row and block that lane t of four loads. A thread
    // stores a quad of ranks at a time: an item of float32, or half of a 16-bit item.
    constexpr unsigned kHalves = kVec<T> / 4;
    struct Quad {
        int row, block, t, half;
    };
    const unsigned quads =
        (tile.rows + kTileRows - 1) / kTileRows * kTileRows * blocks * 4 * kHalves;
    const auto quad_of = [&](unsigned number) -> Quad {
        const unsigned item = number / kHalves, of_row = item / 4 / blocks;
        return {static_cast<int>(of_row), static_cast<int>(item / 4 - of_row * blocks),
                static_cast<int>(item % 4), static_cast<int>(number % kHalves)};
    };
    // The four words of a quad are at words_of(quad)[word(i)]: two of high and two of low parts, or
    // floats.
    const auto words_of = [&](const Quad& q) {
        uint4* const at = fragment<T>(fragments, blocks, q.row / kTileRows, q.block, 0, q.half);
        return reinterpret_cast<uint32_t*>(at + q.row % 8 * 4 + q.t) + q.row / 8 % 2;
    };
    const auto word = [](int i) { return i / 2 * static_cast<int>(kHalves) * 32 * 4 + i % 2 * 2; };
    const auto store = [&](uint32_t* at, const float (&value)[4]) {
        if constexpr (kHalves == 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) at[word(i)] = lx::bit_cast<uint32_t>(value[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t high = lx::pack_floats<T>(value[2 * i], value[2 * i + 1]);
                const float2 h = lx::unpack_floats<T>(high);
                at[word(i)] = high;
                at[word(2 + i)] = lx::pack_floats<T>(value[2 * i] - h.x, value[2 * i + 1] - h.y);
            }
        }
    };
    const bool wide = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.row_floats % 4 == 0 &&
                      v.row_stride % 4 == 0 && v.split_stride % 4 == 0;
    const unsigned first = static_cast<unsigned>(lx::thread_rank());
    for (unsigned number = first; number < quads; number += blockDim.x) {  // whole warps
        const Quad quad = quad_of(number);
        const int row = quad.row;
        const int rank = quad.block * kBlockRanks<T> + quad.t * kVec<T> + quad.half * 4;
        // For a missing row or rank, the tile's first row and rank are read instead.
        const int n = row < tile.rows ? tile.rank - rank : 0;
        const float* p = v.data + row_of[n > 0 ? row : 0] * v.row_stride + (n > 0 ? rank : 0);
        float value[4] = {};
        float weight = 1;
        if constexpr (kFactors) {  // the four ranks are in one page
            const int page = (n > 0 ? rank : 0) / kPageRanks;
            scale = scale_of_page(args.bank, tile.slot, page);
            weight = weight_of_row(args, tile.slot, row_of[n > 0 ? row : 0], page);
        }
        if (wide) {
            add_splits(v.splits, value, [&](int split, float (&part)[4]) {
                const float4 four = *reinterpret_cast<const float4*>(p + split * v.split_stride);
                part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
            });
        } else {
#pragma unroll 1
            for (int split = 0; split < v.splits; ++split, p += v.split_stride) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i < n) value[i] += p[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            value[i] = i < n ? value[i] * scale : 0.0f;
            if constexpr (kFactors) value[i] = i < n ? value[i] * weight : 0.0f;
        }
        if constexpr (kNormalise) {
            // Scaling needs the row's largest entry. Until it is found, the floats of the item are
            // stored in the memory of the item's high and low parts.
            const float largest = fmaxf(fmaxf(fabsf(value[0]), fabsf(value[1])),
                                        fmaxf(fabsf(value[2]), fabsf(value[3])));
            // As integers, nonnegative floats have the same order as the floats.
            lx::atomic_max(&row_max[row], lx::bit_cast<unsigned>(largest));
            uint32_t* const at = words_of(quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) at[word(i)] = lx::bit_cast<uint32_t>(value[i]);
        } else {
            store(words_of(quad), value);
        }
    }
    if constexpr (kNormalise) {
        lx::syncthreads();
        for (unsigned number = first; number < quads; number += blockDim.x) {
            const Quad quad = quad_of(number);
            const int exponent = static_cast<int>(row_max[quad.row] >> 23);  // 255: not finite
            const int shift = exponent == 255 ? 0 : lx::min(127 + 14 - exponent, 126);
            const float up = lx::bit_cast<float>(static_cast<unsigned>(127 + shift) << 23);
            if (quad.block == 0 && quad.t == 0 && quad.half == 0)
                unscale[quad.row] = lx::bit_cast<float>(static_cast<unsigned>(127 - shift) << 23);
            uint32_t* const at = words_of(quad);
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) value[i] = up * lx::bit_cast<float>(at[word(i)]);
            store(at, value);
        }
    }
}

// Returns lx::unpack_floats<T>(pair), for bfloat16 in two instructions instead of three.
template <class T>
LX_DEVICE float2 floats_of(uint32_t pair) {
    if constexpr (std::is_same_v<T, lx::f16>) return lx::unpack_floats<T>(pair);
    return {lx::bit_cast<float>(pair << 16), lx::bit_cast<float>(pair & 0xffff0000u)};
}

// Eight adjacent outputs of one row of y.
template <class T, bool kAligned>
struct Outputs {
    static constexpr int kLoads = 8 / kVec<T>;
    uint4 words[kLoads];

    LX_DEVICE void load(const T* p, int n) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if constexpr (kAligned) {
                words[i] = lx::load_global(reinterpret_cast<const uint4*>(p) + i);
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
            const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
            uint32_t out[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (sizeof(T) == 2) {
                    const float2 y = floats_of<T>(w[j]);
                    out[j] = lx::pack_floats<T>(y.x + d[2 * j], y.y + d[2 * j + 1]);
                } else {
                    out[j] = lx::bit_cast<uint32_t>(lx::bit_cast<float>(w[j]) + d[4 * i + j]);
                }
            }
            if constexpr (kAligned) {
                lx::store_global(reinterpret_cast<uint4*>(p) + i,
                                 uint4{out[0], out[1], out[2], out[3]});
            } else {
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

// The tile of a block, as all its lanes read it from shared memory.
struct Found {
    int rows, rank;
    unsigned pages;  // bit i is set if page i has ranks of the adapter and exists in memory
};

// Registers for the B of one product and the y of one step.
template <class T, bool kAligned>
struct Loads {
    uint4 b[4];
    Outputs<T, kAligned> y[2];
};

// What a lane has to know for its loads, products and stores. It is built twice: for the loads
// before the wait, and again from shared memory after the fragments, so that it takes no registers
// while the splits of v are summed.
template <class T, bool kAligned, int kWarpsM, int kWarpsN>
struct Lane {
    const LoraArgs& args;
    const T* const* page_of;
    const Found found;
    const int end;  // of the block's outputs
    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4;
    // Column c of the j-th of four mma is output 8 (c / 2) + 2j + c % 2 of the warp's 32.
    const int first_output = 8 * (g / 2) + g % 2;
    const int blocks = (found.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    int warp_m, warp_n;
    int stride;    // outputs from a step of the warp to its next one
    T* y_row[2];   // output 8 t of rows g and g + 8
    int y_end[2];  // a step at o has outputs for this lane in row g + 8 h if o < y_end[h]

    LX_DEVICE Lane(const LoraArgs& args, const Found& found, int end, const T* const* page_of,
                   const int32_t* row_of)
        : args(args), page_of(page_of), found(found), end(end) {
        // The warps along the rows are the smallest power of two that covers the row tiles; the
        // other factor of the warps divides the outputs.
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
    // Returns how many ranks of the adapter follow this lane's first one of a block, that one
    // included; none if not positive.
    LX_DEVICE int ranks(int block) const {
        const int rank = rank_of(block, t);
        return found.pages >> rank / kPageRanks & 1 ? found.rank - rank : 0;
    }
    // Returns the address of this lane's ranks of output 0; if there are none, another valid one.
    LX_DEVICE const T* page(int block) const {
        const int rank = rank_of(block, t);
        return page_of[ranks(block) > 0 ? rank / kPageRanks : lx::ffs(found.pages) - 1] +
               rank % kPageRanks;
    }
    // Returns the address of an output's ranks. Beyond the last output it is that of the last.
    LX_DEVICE const T* b_row(const T* page, int o, int j) const {
        const int output = lx::min(o + first_output + 2 * j, end - 1);
        return row_at<kAligned>(page, output, args.bank.b_row_stride);
    }
    // Loads the B of a step whether or not the lane has ranks of the block.
    LX_DEVICE void load_b(uint4 (&b)[4], int block, int o) const {
        const T* const at = page(block);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const T* const row = b_row(at, o, j);
            if constexpr (kAligned)
                b[j] = lx::load_global(reinterpret_cast<const uint4*>(row));
            else
                b[j] = load_words<T, false>(row, ranks(block));
        }
    }
    // Loads the B of a step if `own`, that is, if the lane has ranks; otherwise b keeps its value.
    LX_DEVICE void load_own_b(uint4 (&b)[4], const T* page, bool own, int o) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const T* const row = b_row(page, o, j);
            if (own) b[j] = lx::load_global(reinterpret_cast<const uint4*>(row));
        }
    }
    // Copies b with zeros for ranks that the adapter does not have.
    LX_DEVICE void keep_own(uint4 (&own)[4], const uint4 (&b)[4], int block) const {
        const uint4 mask = keep_elements<T>({~0u, ~0u, ~0u, ~0u}, ranks(block));
#pragma unroll
        for (int j = 0; j < 4; ++j)
            own[j] = {b[j].x & mask.x, b[j].y & mask.y, b[j].z & mask.z, b[j].w & mask.w};
    }
    // Loads the y of the step at o, `ahead` elements after y_at. Missing values keep theirs.
    LX_DEVICE void load_y(Outputs<T, kAligned> (&y)[2], T* const (&y_at)[2], int ahead,
                          int o) const {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (o < y_end[h]) y[h].load(y_at[h] + ahead, y_end[h] - o);
    }
    LX_DEVICE void multiply(float (&acc)[4][4], const uint4 (&b)[4], unsigned char* fragments,
                            int block) const {
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
    // Adds the products of the step at o to its y, and stores the sums at y_at.
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

// Minimum blocks per multiprocessor, to hide the latency of decode.
template <class T, bool kAligned, int kWarpsM>
constexpr int kMinBlocks = kWarpsM > 1      ? 2
                           : !kAligned      ? 3
                           : sizeof(T) == 2 ? 5
                                            : 4;

template <class T, bool kAligned, int kWarpsM, int kWarpsN, int kModules, bool kFactors>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * 32, kMinBlocks<T, kAligned, kWarpsM>)
    lora_expand_kernel(const __grid_constant__ Modules<kModules> modules,
                       const __grid_constant__ Tiling tiling, int block_outputs) {
    constexpr int kRows = kTileRows * kWarpsM;
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const T*, page_of, kFusedPages);
    LX_SHARED(unsigned, row_max, kRows);
    LX_SHARED(float, unscale, kRows);
    LX_SHARED(Found, found, 1);
    LX_DYN_SHARED(fragments);
    const Module& module = modules.each[kModules > 1 ? blockIdx.z : 0];
    const LoraArgs& args = module.args;
    const Partials& v = module.v;
    const LoraBank& bank = args.bank;
    const int begin = static_cast<int>(blockIdx.y) * block_outputs;
    const int lane = lx::lane_id();
    int number = 0;  // number of page `lane` of the slot
    float scale = 1;
    const auto also = [&](int slot) {
        number = page_number(bank, slot, lane);
        if (!kFactors && !v.scaled && bank.scale) scale = bank.scale[slot];
    };
    const RowTile tile = find_tile<kRows>(args, tiling, static_cast<int>(blockIdx.x), row_of, also);
    // The last blocks of a small sibling have no work: the grid covers the largest sibling.
    if (tile.rank == 0 || (kModules > 1 && begin >= bank.out_features)) {
        lx::grid_dependency_wait();  // the next grid waits only for this one, not for its producer
        return;
    }
    static_assert(kFusedPages == lx::kWarpSize);
    const T* const page = page_at<T, kAligned>(bank, bank.b, tile.slot, number, bank.b_slot_stride,
                                               bank.b_page_stride);
    if (lx::warp_id() == 0) page_of[lane] = page;
    const unsigned pages = lx::ballot_sync(lx::kFullMask, lane * kPageRanks < tile.rank && page);
    if (lx::thread_rank() == 0) found[0] = {tile.rows, tile.rank, pages};
    lx::syncthreads();  // row_of, page_of and found are complete
    if (pages == 0) {
        lx::grid_dependency_wait();
        return;
    }
    const int end =
        static_cast<int>(lx::min<int64_t>(int64_t{begin} + block_outputs, bank.out_features));
    using Work = Lane<T, kAligned, kWarpsM, kWarpsN>;

    // Loads that do not depend on v are issued before the wait for v.
    Loads<T, kAligned> even{}, odd{};
    {
        const Work work(args, {tile.rows, tile.rank, pages}, end, page_of, row_of);
        const int o = begin + work.warp_n * kWarpOutputs;
        if constexpr (kAligned)
            work.load_own_b(even.b, work.page(0), work.ranks(0) > 0, o);
        else
            work.load_b(even.b, 0, o);
        T* const y_at[2] = {work.y_row[0] + o, work.y_row[1] + o};
        work.load_y(even.y, y_at, 0, o);
    }
    lx::grid_dependency_wait();
    build_fragments<T, kRows, kFactors>(args, v, tile, scale, row_of, fragments, row_max, unscale);
    lx::syncthreads();

    const Work work(args, found[0], end, page_of, row_of);
    if (work.warp_m * kTileRows >= work.found.rows) return;  // the whole warp
    const int stride = work.stride;
    int o = begin + work.warp_n * kWarpOutputs;
    T* y_at[2] = {work.y_row[0] + o, work.y_row[1] + o};

    // One block of ranks, and each lane has all ranks of its 16 bytes or none: two steps take
    // turns. While one is multiplied and stored, the loads of the other are under way, and each
    // asks for the step after the other as soon as it has used its registers. Nothing is copied or
    // masked: a lane without ranks never loads B, and its registers stay zero. (float32 has no
    // registers for two steps.)
    if constexpr (kAligned && sizeof(T) == 2) {
        if (work.blocks == 1 && work.found.rank % kVec<T> == 0) {
            const T* const own_page = work.page(0);
            const bool own = work.ranks(0) > 0;
            const auto step = [&](Loads<T, kAligned>& now) {
                float acc[4][4] = {};
                work.multiply(acc, now.b, fragments, 0);
                work.load_own_b(now.b, own_page, own, o + 2 * stride);
                lx::syncwarp();  // the loads of B are issued before the sums of y
                work.store_y(now.y, y_at, acc, unscale, o);
                work.load_y(now.y, y_at, 2 * stride, o + 2 * stride);
                lx::syncwarp();
                y_at[0] += stride, y_at[1] += stride;
                o += stride;
            };
            work.load_own_b(odd.b, own_page, own, o + stride);
            work.load_y(odd.y, y_at, stride, o + stride);
#pragma unroll 1
            while (true) {
                step(even);
                if (o >= end) return;
                step(odd);
                if (o >= end) return;
            }
        }
    }
    // Otherwise a step has a product per block of ranks. During each product, the next one's B is
    // loaded, and during a step's last product its y. The copy that both wait for sets the ranks to
    // zero that the adapter does not have.
    work.keep_own(even.b, even.b, 0);
#pragma unroll 1
    for (; o < end; o += stride) {
        float acc[4][4] = {};
#pragma unroll 1
        for (int block = 0; block < work.blocks; ++block) {
            const bool last = block + 1 == work.blocks;
            const int next = last ? 0 : block + 1;
            if (last) work.load_y(even.y, y_at, 0, o);
            work.load_b(odd.b, next, last ? o + stride : o);
            work.multiply(acc, even.b, fragments, block);
            work.keep_own(even.b, odd.b, next);
        }
        work.store_y(even.y, y_at, acc, unscale, o);
        y_at[0] += stride, y_at[1] += stride;
    }
}

template <class T, bool kAligned, int kWarpsM, int kWarpsN, int kModules, bool kFactors = false>
LaunchStatus launch_expand(std::span<const Module> modules, int outputs, bool dependent,
                           void* stream) {
    if constexpr (!kFactors) {
        for (const Module& module : modules)
            if (has_factors(module.args) && !module.v.scaled)
                return launch_expand<T, kAligned, kWarpsM, kWarpsN, kModules, true>(
                    modules, outputs, dependent, stream);
    }
    constexpr int kRows = kTileRows * kWarpsM;
    const LoraArgs& args = modules[0].args;
    const int64_t out = largest(modules, [](const LoraBank& bank) { return bank.out_features; });
    while (ceil_div(out, outputs) > kMaxGridY) outputs *= 2;
    const dim3 grid(num_tiles(args, kRows), static_cast<unsigned>(ceil_div(out, outputs)),
                    static_cast<unsigned>(modules.size()));
    const int fragments = fragment_bytes<T, kRows>(
        static_cast<int>(largest(modules, [](const LoraBank& bank) { return bank.max_rank; })));
    // With this minimum, five decode blocks use as much shared memory as four of shrink: 37 KiB. A
    // multiprocessor configured for one kernel can then run the other without draining first.
    const int bytes = lx::max(fragments, kWarpsM == 1 ? kDecodeShared : 0);
    constexpr int kThreads = kWarpsM * kWarpsN * 32;
    const Modules<kModules> all(modules);
    return dependent
               ? LX_LAUNCH_PDL(
                     (lora_expand_kernel<T, kAligned, kWarpsM, kWarpsN, kModules, kFactors>), grid,
                     kThreads, bytes, stream, all, tiling(args, kRows), outputs)
               : LX_LAUNCH((lora_expand_kernel<T, kAligned, kWarpsM, kWarpsN, kModules, kFactors>),
                           grid, kThreads, bytes, stream, all, tiling(args, kRows), outputs);
}

// Returns the outputs per block at decode. Blocks run in waves of as many as fit on the device at
// once; a block takes about kHead steps before its warps' first step, and each warp has a step per
// 128 outputs. A plan has entries for batches of many adapters, so the choice is the one with the
// least time for such a batch and for one of a single adapter together. It does not change the bits
// of an output.
int decode_outputs(std::span<const Module> modules, int blocks_per_multiprocessor) {
    constexpr int kHead = 4, kStep = 128;
    const LoraArgs& args = modules[0].args;
    const int64_t at_once = int64_t{blocks_per_multiprocessor} * lx::max(1, lx::multiprocessors());
    int best = kStep;
    int64_t least = INT64_MAX;
    for (int outputs = kStep; outputs <= 8 * kStep; outputs *= 2) {
        int64_t time = 0;
        for (const int64_t tiles :
             {int64_t{num_tiles(args, kTileRows)}, ceil_div(args.num_tokens, int64_t{kTileRows})}) {
            int64_t blocks = 0;
            for (const Module& module : modules)
                blocks += tiles * ceil_div(module.args.bank.out_features, outputs);
            time += ceil_div(blocks, at_once) * (kHead + outputs / kStep);
        }
        if (time < least) best = outputs, least = time;
    }
    return best;
}

}  // namespace

LaunchStatus run_expand(std::span<const Module> modules, bool dependent, void* stream) {
    const LoraArgs& args = modules[0].args;
    const LoraBank& bank = args.bank;
    const bool aligned = expand_aligned(args);
    for (const auto& [each, partials] : modules) {
        const int64_t size = element_size(each.dtype);
        declare_common(each);
        declare_b(each);
        declare_v(each, partials, lx::Access::kRead);
        // expand reads y before it waits for its producer. This is safe because the chain of early
        // launches starts with a shrink that is not early: every earlier writer of y has ended, and
        // shrink and reduce do not write y. If shrink were early too, y might be incomplete, which
        // the emulator would report for two consecutive calls that add to the same y.
        if (dependent)
            LX_BUF_ROWS(each.y, each.num_tokens, each.bank.out_features * size,
                        each.y_row_stride * size, lx::Access::kConstant);
        LX_BUF_ROWS(each.y, each.num_tokens, each.bank.out_features * size,
                    each.y_row_stride * size, lx::Access::kReadWrite);
    }
    if (large_rank(bank)) return run_gemm_expand(args, modules[0].v, dependent, stream);
    return with_dtype(args.dtype, [&]<class T>() {
        // Decode needs enough blocks to fill the machine; prefill, many outputs per fragment of v.
        const int chunk_rows = lora_chunk_rows(args.num_tokens);
        const auto few = [&](int blocks) {
            return chunk_rows == 16 ? decode_outputs(modules, blocks) : 256;
        };
        if (modules.size() > 1)
            return launch_expand<T, true, 1, 4, kMaxSiblings>(modules, few(kMinBlocks<T, true, 1>),
                                                              dependent, stream);
        if (!aligned)
            return launch_expand<T, false, 1, 4, 1>(modules, few(kMinBlocks<T, false, 1>),
                                                    dependent, stream);
        if (chunk_rows == 16)
            return launch_expand<T, true, 1, 4, 1>(modules, few(kMinBlocks<T, true, 1>), dependent,
                                                   stream);
        // The fragments of 128 rows of a high rank exceed the shared memory of some devices.
        const bool small = chunk_rows == 64 ||
                           fragment_bytes<T, 8 * kTileRows>(bank.max_rank) > most_dynamic_bytes();
        if (small) return launch_expand<T, true, 4, 2, 1>(modules, 512, dependent, stream);
        return launch_expand<T, true, 8, 1, 1>(modules, 512, dependent, stream);
    });
}

}  // namespace lora_ext
