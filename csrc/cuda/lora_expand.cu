// Expand: y[t, :] = round(y[t, :] + b[s] v[t, :]), and the sum of v over its splits.
//
// Block (tile, range of outputs). A warp owns 16 rows of one adapter and 32 outputs at a time: v is
// operand A of mma, the rows of the B pages are operand B, straight from 16-byte loads as
// lora_tile.cuh explains. Columns are numbered such that a lane ends up with 8 adjacent outputs of
// rows g and g + 8, so y is read and written once, 16 bytes per access.
// Decode: the warps of a block share 16 rows and part the outputs. Prefill: they part the rows of a
// chunk, and B comes from L1 for all but the first; where a chunk is short, the outputs as well.
// Bound: bytes of the B pages (decode), of y (prefill).
//
// v is float32. For 16-bit types it enters as high + low, two products instead of one, which keeps
// 16 bits of it (bfloat16) or 22 (float16, whose rows are first brought to [2^14, 2^15) by a power
// of two, so that neither a large v overflows nor a small one loses its low part).
#include "lora_kernels.cuh"

namespace lora_ext {
namespace {

// Ranks of a block: what four lanes load. A lane's 16 bytes are a page row, or half of one
// (float32).
template <class T>
constexpr int kBlockRanks = 4 * kVec<T>;
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;  // high and low, or the float itself

constexpr int kWarpOutputs = 32;
// Splits of v whose loads are in flight together, sixteen floats: more cost decode its fifth block.
template <class T>
constexpr int kSplitBatch = 16 / kVec<T>;

template <class T, int kRows>
constexpr int fragment_bytes(int max_rank) {
    return kRows / kTileRows * static_cast<int>(ceil_div(max_rank, kBlockRanks<T>)) * kParts<T> *
           2 * 32 * 16;
}

// Fragment (row tile, block, part, half) of v: 16 bytes per lane, ready for mma_words.
template <class T>
LX_DEVICE uint4* fragment(unsigned char* fragments, int blocks, int tile, int block, int part,
                          int half) {
    return reinterpret_cast<uint4*>(fragments) +
           (((tile * blocks + block) * kParts<T> + part) * 2 + half) * 32;
}

// The first n of kCount floats, n cut to [0, kCount], and zeros.
template <int kCount>
LX_DEVICE void load_ranks(const float* p, int n, bool aligned, float (&out)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        if (aligned && i + 4 <= n) {
            const float4 four = *reinterpret_cast<const float4*>(p + i);
            out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
        } else {
#pragma unroll
            for (int j = i; j < i + 4; ++j) out[j] = j < n ? p[j] : 0.0f;
        }
    }
}

// Sums the splits of v, scales, and stores the fragments. `unscale` undoes the power of two of a
// row.
template <class T, int kRows>
LX_DEVICE void build_fragments(const LoraArgs& args, const Partials& v, const RowTile& tile,
                               const int32_t (&row_of)[kRows], unsigned char* fragments,
                               unsigned (&row_max)[kRows], float (&unscale)[kRows]) {
    constexpr bool kNormalise = std::is_same_v<T, lx::f16>;
    const int threads = static_cast<int>(blockDim.x);
    const int blocks = (tile.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    const float scale = !v.scaled && args.bank.scale ? args.bank.scale[tile.slot] : 1.0f;
    const bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.row_stride % 4 == 0;
    if constexpr (kNormalise) {
        for (int i = lx::thread_rank(); i < kRows; i += threads) row_max[i] = 0;
        lx::syncthreads();
    }
    // Item (row, block, t): what lane t of the row holds. Two passes where a row must know its
    // largest entry; in between the item's floats wait where its two parts will be.
    const int items = (tile.rows + kTileRows - 1) / kTileRows * kTileRows * blocks * 4;
    auto slot_of = [&](int row, int block, int t, int part) {
        return fragment<T>(fragments, blocks, row / kTileRows, block, part, row / 8 % 2) +
               row % 8 * 4 + t;
    };
    auto store = [&](int row, int block, int t, const float (&value)[kVec<T>]) {
        if constexpr (sizeof(T) == 4) {
            *slot_of(row, block, t, 0) = words_of<T>(value);
        } else {
            uint32_t high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                high[i] = lx::pack_floats<T>(value[2 * i], value[2 * i + 1]);
                const float2 h = lx::unpack_floats<T>(high[i]);
                low[i] = lx::pack_floats<T>(value[2 * i] - h.x, value[2 * i + 1] - h.y);
            }
            *slot_of(row, block, t, 0) = {high[0], high[1], high[2], high[3]};
            *slot_of(row, block, t, 1) = {low[0], low[1], low[2], low[3]};
        }
    };
    for (int item = lx::thread_rank(); item < items; item += threads) {
        const int t = item % 4, block = item / 4 % blocks, row = item / 4 / blocks;
        const int rank = block * kBlockRanks<T> + t * kVec<T>;
        float value[kVec<T>] = {};
        if (row < tile.rows) {
            // Added in order, but a batch of splits is on its way at once. Adding 0 to a sum that
            // began at 0 changes no bit.
            const float* p = v.data + row_of[row] * v.row_stride + rank;
            for (int s = 0; s < v.splits;
                 s += kSplitBatch<T>, p += kSplitBatch<T> * v.split_stride) {
                float part[kSplitBatch<T>][kVec<T>];
#pragma unroll
                for (int k = 0; k < kSplitBatch<T>; ++k)
                    load_ranks(p + k * v.split_stride, s + k < v.splits ? tile.rank - rank : 0,
                               aligned, part[k]);
#pragma unroll
                for (int k = 0; k < kSplitBatch<T>; ++k) {
#pragma unroll
                    for (int i = 0; i < kVec<T>; ++i) value[i] += part[k][i];
                }
            }
#pragma unroll
            for (int i = 0; i < kVec<T>; ++i) value[i] *= scale;
        }
        if constexpr (kNormalise) {
            float largest = 0;
#pragma unroll
            for (int i = 0; i < kVec<T>; ++i) largest = fmaxf(largest, fabsf(value[i]));
            lx::atomic_max(&row_max[row], lx::bit_cast<unsigned>(largest));  // order of bits
            *reinterpret_cast<float4*>(slot_of(row, block, t, 0)) = {value[0], value[1], value[2],
                                                                     value[3]};
            *reinterpret_cast<float4*>(slot_of(row, block, t, 1)) = {value[4], value[5], value[6],
                                                                     value[7]};
        } else {
            store(row, block, t, value);
        }
    }
    if constexpr (kNormalise) {
        lx::syncthreads();
        for (int item = lx::thread_rank(); item < items; item += threads) {
            const int t = item % 4, block = item / 4 % blocks, row = item / 4 / blocks;
            const int exponent = static_cast<int>(row_max[row] >> 23);  // 255: not finite
            const int shift = exponent == 255 ? 0 : lx::min(127 + 14 - exponent, 126);
            const float up = lx::bit_cast<float>(static_cast<unsigned>(127 + shift) << 23);
            if (block == 0 && t == 0)
                unscale[row] = lx::bit_cast<float>(static_cast<unsigned>(127 - shift) << 23);
            const float4 first = *reinterpret_cast<float4*>(slot_of(row, block, t, 0));
            const float4 second = *reinterpret_cast<float4*>(slot_of(row, block, t, 1));
            store(row, block, t,
                  {first.x * up, first.y * up, first.z * up, first.w * up, second.x * up,
                   second.y * up, second.z * up, second.w * up});
        }
    }
}

// Eight adjacent outputs of one row of y.
template <class T, bool kAligned>
struct Outputs {
    static constexpr int kLoads = 8 / kVec<T>;
    uint4 words[kLoads];

    LX_DEVICE void load(const T* p, int n) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            words[i] = {0, 0, 0, 0};
            if constexpr (kAligned) {
                if (n > 0) words[i] = reinterpret_cast<const uint4*>(p)[i];
            } else {
                T e[kVec<T>];
#pragma unroll
                for (int j = 0; j < kVec<T>; ++j)
                    e[j] = i * kVec<T> + j < n ? p[i * kVec<T> + j] : lx::from_float<T>(0);
                words[i] = words_of(e);
            }
        }
    }
    // Adds d[0..8) and stores.
    LX_DEVICE void add_store(T* p, int n, const float (&d)[8]) const {
        if (n <= 0) return;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
            uint32_t out[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (sizeof(T) == 2) {
                    const float2 y = lx::unpack_floats<T>(w[j]);
                    out[j] = lx::pack_floats<T>(y.x + d[2 * j], y.y + d[2 * j + 1]);
                } else {
                    out[j] = lx::bit_cast<uint32_t>(lx::bit_cast<float>(w[j]) + d[4 * i + j]);
                }
            }
            if constexpr (kAligned) {
                reinterpret_cast<uint4*>(p)[i] = {out[0], out[1], out[2], out[3]};
            } else {
#pragma unroll
                for (int j = 0; j < kVec<T>; ++j) {
                    if (i * kVec<T> + j >= n) continue;
                    if constexpr (sizeof(T) == 2) {
                        p[i * kVec<T> + j] =
                            lx::bit_cast<T>(static_cast<uint16_t>(out[j / 2] >> (16 * (j % 2))));
                    } else {
                        p[i * kVec<T> + j] = lx::bit_cast<T>(out[j]);
                    }
                }
            }
        }
    }
};

template <class T, bool kAligned, int kWarpsM, int kWarpsN>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * 32)
    lora_expand_kernel(const __grid_constant__ LoraArgs args, const __grid_constant__ Tiling tiling,
                       const __grid_constant__ Partials v, int block_outputs) {
    constexpr int kRows = kTileRows * kWarpsM;
    constexpr bool kNormalise = std::is_same_v<T, lx::f16>;
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const T*, page_of, kMaxPages);
    LX_SHARED(unsigned, row_max, kRows);
    LX_SHARED(float, unscale, kRows);
    LX_DYN_SHARED(fragments);
    const LoraBank& bank = args.bank;
    const RowTile tile = find_tile<kRows>(args, tiling, static_cast<int>(blockIdx.x), row_of);
    if (tile.rank == 0) {
        lx::grid_dependency_wait();  // the end of this grid must not come before that of its
                                     // producer
        return;
    }
    for (int p = lx::thread_rank(); p * kPageRanks < tile.rank; p += static_cast<int>(blockDim.x))
        page_of[p] = b_page<T>(bank, tile.slot, p);
    lx::syncthreads();  // row_of, page_of

    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4;
    // As many warps along the rows as there are row tiles, to a power of two; the others part the
    // outputs.
    int log_m = 0;
    while ((1 << log_m) < kWarpsM && (kTileRows << log_m) < tile.rows) ++log_m;
    const int warp_m = lx::warp_id() & ((1 << log_m) - 1), warp_n = lx::warp_id() >> log_m;
    const int stride = (kWarpsM * kWarpsN * kWarpOutputs) >> log_m;
    const int blocks = (tile.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    const int begin = static_cast<int>(blockIdx.y) * block_outputs;
    const int end =
        static_cast<int>(lx::min<int64_t>(int64_t{begin} + block_outputs, bank.out_features));
    const bool has_rows = warp_m * kTileRows < tile.rows;  // the same for the whole warp

    // Column c of the j-th of four mma is output 8 (c / 2) + 2j + c % 2 of the warp's 32.
    const int lane_output = 8 * (g / 2) + g % 2;
    auto load_b = [&](uint4(&b)[4], int o, int block) {
        const int rank = block * kBlockRanks<T> + t * kVec<T>;
        const int n = lx::min(tile.rank - rank, kVec<T>);
        const T* page = n > 0 ? page_of[rank / kPageRanks] : nullptr;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int output = o + lane_output + 2 * j;
            const bool wanted = page && output < end;
            b[j] = load_words<T, kAligned>(
                wanted ? page + output * bank.b_row_stride + rank % kPageRanks : nullptr,
                wanted ? n : 0);
            if (n < kVec<T>) b[j] = keep_elements<T>(b[j], n);
        }
    };
    T* y[2];
    bool wanted_row[2];
    Outputs<T, kAligned> values[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp_m * kTileRows + g + 8 * h;
        wanted_row[h] = row < tile.rows;
        y[h] = static_cast<T*>(args.y) + (wanted_row[h] ? row_of[row] * args.y_row_stride : 0);
    }
    auto load_y = [&](int o) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            values[h].load(y[h] + o + 8 * t, wanted_row[h] ? end - o - 8 * t : 0);
    };

    // What does not depend on v is on its way before v is waited for.
    int o = begin + warp_n * kWarpOutputs;
    uint4 b[4] = {};
    if (has_rows && o < end) {
        load_b(b, o, 0);
        load_y(o);
    }
    lx::grid_dependency_wait();
    build_fragments<T, kRows>(args, v, tile, row_of, fragments, row_max, unscale);
    lx::syncthreads();
    if (!has_rows) return;

    float undo[2] = {1.0f, 1.0f};
    if constexpr (kNormalise) {
#pragma unroll
        for (int h = 0; h < 2; ++h) undo[h] = unscale[warp_m * kTileRows + g + 8 * h];
    }
    for (; o < end; o += stride) {
        float acc[4][4] = {};
        for (int block = 0; block < blocks; ++block) {
            // The next step's B, while this one is multiplied.
            uint4 next[4] = {};
            const bool last = block + 1 == blocks;
            const int next_o = last ? o + stride : o;
            if (next_o < end) load_b(next, next_o, last ? 0 : block + 1);
#pragma unroll
            for (int part = 0; part < kParts<T>; ++part) {
                const uint4 low = fragment<T>(fragments, blocks, warp_m, block, part, 0)[lane];
                const uint4 high = fragment<T>(fragments, blocks, warp_m, block, part, 1)[lane];
#pragma unroll
                for (int j = 0; j < 4; ++j) mma_words<T>(acc[j], low, high, b[j]);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = next[j];
        }
        const Outputs<T, kAligned> now[2] = {values[0], values[1]};
        if (o + stride < end) load_y(o + stride);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float d[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) d[i] = acc[i / 2][2 * h + i % 2] * undo[h];
            now[h].add_store(y[h] + o + 8 * t, wanted_row[h] ? end - o - 8 * t : 0, d);
        }
    }
}

template <class T, bool kAligned, int kWarpsM, int kWarpsN>
LaunchStatus launch_expand(const LoraArgs& args, const Partials& v, int outputs, bool dependent,
                           void* stream) {
    constexpr int kRows = kTileRows * kWarpsM;
    while (ceil_div(args.bank.out_features, outputs) > kMaxGridY) outputs *= 2;
    const dim3 grid(num_tiles(args, kRows),
                    static_cast<unsigned>(ceil_div(args.bank.out_features, outputs)));
    const int bytes = fragment_bytes<T, kRows>(args.bank.max_rank);
    constexpr int kThreads = kWarpsM * kWarpsN * 32;
    return dependent ? LX_LAUNCH_PDL((lora_expand_kernel<T, kAligned, kWarpsM, kWarpsN>), grid,
                                     kThreads, bytes, stream, args, tiling(args, kRows), v, outputs)
                     : LX_LAUNCH((lora_expand_kernel<T, kAligned, kWarpsM, kWarpsN>), grid,
                                 kThreads, bytes, stream, args, tiling(args, kRows), v, outputs);
}

}  // namespace

LaunchStatus run_expand(const LoraArgs& args, const Partials& v, bool dependent, void* stream) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype);
    // y in pieces of eight outputs; b in whole page rows, which must exist.
    const bool aligned =
        bank.full_pages && bank.out_features % 8 == 0 &&
        aligned_16(args.y, {args.y_row_stride}, size) &&
        aligned_16(bank.b, {bank.b_slot_stride, bank.b_page_stride, bank.b_row_stride}, size);
    declare_common(args);
    declare_b(args);
    declare_v(args, v, lx::Access::kRead);
    // The previous kernel is a shrink, which does not write y: it may be read before the wait.
    if (dependent)
        LX_BUF_ROWS(args.y, args.num_tokens, bank.out_features * size, args.y_row_stride * size,
                    lx::Access::kConstant);
    LX_BUF_ROWS(args.y, args.num_tokens, bank.out_features * size, args.y_row_stride * size,
                lx::Access::kReadWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        // Decode: enough blocks to fill the machine. Prefill: enough outputs to earn the fragments.
        const int chunk_rows = lora_chunk_rows(args.num_tokens);
        if (!aligned) return launch_expand<T, false, 1, 4>(args, v, 256, dependent, stream);
        if (chunk_rows == 16) return launch_expand<T, true, 1, 4>(args, v, 256, dependent, stream);
        if (chunk_rows == 64) return launch_expand<T, true, 4, 2>(args, v, 512, dependent, stream);
        return launch_expand<T, true, 8, 1>(args, v, 512, dependent, stream);
    });
}

}  // namespace lora_ext
