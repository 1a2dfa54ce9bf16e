// Expand: y[t, :] = round(y[t, :] + b[s] v[t, :]), and the sum of v over its splits.
//
// Block (tile, range of outputs, module). A warp owns 16 rows of one adapter and 32 outputs at a
// time: v is operand A of mma, the rows of the B pages are operand B, loaded as in lora_tile.cuh.
// Columns are numbered so that a lane holds 8 adjacent outputs of rows g and g + 8; y is read and
// written once, 16 bytes per access. Decode: the warps of a block share 16 rows and divide the
// outputs; two memory round trips (find_tile) precede the first byte of B. Prefill: the warps
// divide the rows of a chunk, and all but the first read B from L1; in a short chunk they also
// divide the outputs. Bound: bytes of the B pages (decode), of y (prefill).
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

// Returns fragment (row tile, block, part, half) of v: 16 bytes per lane, ready for mma_words.
template <class T>
LX_DEVICE uint4* fragment(unsigned char* fragments, int blocks, int tile, int block, int part,
                          int half) {
    return reinterpret_cast<uint4*>(fragments) +
           (((tile * blocks + block) * kParts<T> + part) * 2 + half) * 32;
}

// Sums the splits of v, scales them, stores fragments. unscale[row] undoes the row's power of two.
template <class T, int kRows>
LX_DEVICE void build_fragments(const Partials& v, const RowTile& tile, float scale,
                               const int32_t (&row_of)[kRows], unsigned char* fragments,
                               unsigned (&row_max)[kRows], float (&unscale)[kRows]) {
    constexpr bool kNormalise = std::is_same_v<T, lx::f16>;
    const int threads = static_cast<int>(blockDim.x);
    const int blocks = (tile.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    if constexpr (kNormalise) {
        for (int i = lx::thread_rank(); i < kRows; i += threads) row_max[i] = 0;
        lx::syncthreads();
    }
    // Item (row, block, t): the ranks of one row and block that lane t of four loads.
    const int items = (tile.rows + kTileRows - 1) / kTileRows * kTileRows * blocks * 4;
    auto slot_of = [&](int row, int block, int t, int part) {
        return fragment<T>(fragments, blocks, row / kTileRows, block, part, row / 8 % 2) +
               row % 8 * 4 + t;
    };
    // A thread stores four ranks at a time: an item of float32, or half of a 16-bit item.
    constexpr int kHalves = kVec<T> / 4;
    auto store = [&](int row, int block, int t, int half, const float (&value)[4]) {
        if constexpr (kHalves == 1) {
            *slot_of(row, block, t, 0) = words_of<T>(value);
        } else {
            uint32_t high[2], low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                high[i] = lx::pack_floats<T>(value[2 * i], value[2 * i + 1]);
                const float2 h = lx::unpack_floats<T>(high[i]);
                low[i] = lx::pack_floats<T>(value[2 * i] - h.x, value[2 * i + 1] - h.y);
            }
            reinterpret_cast<uint2*>(slot_of(row, block, t, 0))[half] = {high[0], high[1]};
            reinterpret_cast<uint2*>(slot_of(row, block, t, 1))[half] = {low[0], low[1]};
        }
    };
    const bool wide = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.row_floats % 4 == 0 &&
                      v.row_stride % 4 == 0 && v.split_stride % 4 == 0;
    for (int quad = lx::thread_rank(); quad < items * kHalves; quad += threads) {  // whole warps
        const int half = quad % kHalves, item = quad / kHalves;
        const int t = item % 4, block = item / 4 % blocks, row = item / 4 / blocks;
        const int rank = block * kBlockRanks<T> + t * kVec<T> + half * 4;
        // For a missing row or rank, the tile's first row and rank are read instead.
        const int n = row < tile.rows ? tile.rank - rank : 0;
        const float* p = v.data + row_of[n > 0 ? row : 0] * v.row_stride + (n > 0 ? rank : 0);
        float value[4] = {};
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
        for (int i = 0; i < 4; ++i) value[i] = i < n ? value[i] * scale : 0.0f;
        if constexpr (kNormalise) {
            // Scaling needs the row's largest entry. Until it is found, the floats of the item are
            // stored in the memory of the item's high and low parts.
            const float largest = fmaxf(fmaxf(fabsf(value[0]), fabsf(value[1])),
                                        fmaxf(fabsf(value[2]), fabsf(value[3])));
            // As integers, nonnegative floats have the same order as the floats.
            lx::atomic_max(&row_max[row], lx::bit_cast<unsigned>(largest));
            *reinterpret_cast<float4*>(slot_of(row, block, t, half)) = {value[0], value[1],
                                                                        value[2], value[3]};
        } else {
            store(row, block, t, half, value);
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
            store(row, block, t, 0, {first.x * up, first.y * up, first.z * up, first.w * up});
            store(row, block, t, 1, {second.x * up, second.y * up, second.z * up, second.w * up});
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
                    const float2 y = lx::unpack_floats<T>(w[j]);
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

// Minimum blocks per multiprocessor, to hide the latency of decode.
template <class T, bool kAligned, int kWarpsM>
constexpr int kMinBlocks = kWarpsM > 1      ? 2
                           : !kAligned      ? 3
                           : sizeof(T) == 2 ? 5
                                            : 4;

template <class T, bool kAligned, int kWarpsM, int kWarpsN, int kModules>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * 32, kMinBlocks<T, kAligned, kWarpsM>)
    lora_expand_kernel(const __grid_constant__ Modules<kModules> modules,
                       const __grid_constant__ Tiling tiling, int block_outputs) {
    constexpr int kRows = kTileRows * kWarpsM;
    constexpr bool kNormalise = std::is_same_v<T, lx::f16>;
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const T*, page_of, kFusedPages);
    LX_SHARED(unsigned, row_max, kRows);
    LX_SHARED(float, unscale, kRows);
    LX_DYN_SHARED(fragments);
    const Module& module = modules.each[kModules > 1 ? blockIdx.z : 0];
    const LoraArgs& args = module.args;
    const Partials& v = module.v;
    const LoraBank& bank = args.bank;
    const int begin = static_cast<int>(blockIdx.y) * block_outputs;
    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4;
    int number = 0;  // number of page `lane` of the slot
    float scale = 1;
    const auto also = [&](int slot) {
        number = page_number(bank, slot, lane);
        if (!v.scaled && bank.scale) scale = bank.scale[slot];
    };
    const RowTile tile = find_tile<kRows>(args, tiling, static_cast<int>(blockIdx.x), row_of, also);
    // The last blocks of a small sibling have no work: the grid covers the largest sibling.
    if (tile.rank == 0 || (kModules > 1 && begin >= bank.out_features)) {
        lx::grid_dependency_wait();  // the next grid waits only for this one, not for its producer
        return;
    }
    static_assert(kFusedPages == lx::kWarpSize);
    const T* const page =
        page_at<T>(bank, bank.b, tile.slot, number, bank.b_slot_stride, bank.b_page_stride);
    if (lx::warp_id() == 0) page_of[lane] = page;
    // Bit i is set if page i has ranks of the adapter and exists in memory.
    const unsigned pages = lx::ballot_sync(lx::kFullMask, lane * kPageRanks < tile.rank && page);
    lx::syncthreads();  // row_of and page_of are complete
    if (pages == 0) {
        lx::grid_dependency_wait();
        return;
    }
    const T* const stand_in = page_of[lx::ffs(pages) - 1];
    // The warps along the rows are the smallest power of two that covers the row tiles; the
    // other factor of the warps divides the outputs.
    int log_m = 0;
    while ((1 << log_m) < kWarpsM && (kTileRows << log_m) < tile.rows) ++log_m;
    const int warp_m = lx::warp_id() & ((1 << log_m) - 1), warp_n = lx::warp_id() >> log_m;
    const int stride = (kWarpsM * kWarpsN * kWarpOutputs) >> log_m;
    const int blocks = (tile.rank + kBlockRanks<T> - 1) / kBlockRanks<T>;
    const int end =
        static_cast<int>(lx::min<int64_t>(int64_t{begin} + block_outputs, bank.out_features));
    const bool has_rows = warp_m * kTileRows < tile.rows;  // the same for the whole warp

    // Column c of the j-th of four mma is output 8 (c / 2) + 2j + c % 2 of the warp's 32.
    const int lane_output = 8 * (g / 2) + g % 2;
    // Loads have no condition: if an output, rank, page or row is missing, another valid address is
    // read, and the value is replaced by zero when used.
    const auto ranks_here = [&](int block) {
        const int rank = block * kBlockRanks<T> + t * kVec<T>;
        return pages >> rank / kPageRanks & 1 ? tile.rank - rank : 0;
    };
    const auto load_b = [&](uint4(&b)[4], int o, int block) {
        const int n = ranks_here(block), rank = block * kBlockRanks<T> + t * kVec<T>;
        const T* page = (n > 0 ? page_of[rank / kPageRanks] : stand_in) + rank % kPageRanks;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const T* row = page + lx::min(o + lane_output + 2 * j, end - 1) * bank.b_row_stride;
            if constexpr (kAligned)
                b[j] = lx::load_global(reinterpret_cast<const uint4*>(row));
            else
                b[j] = load_words<T, false>(row, n);
        }
    };
    // Returns the address of outputs o + 8 t .. + 7 of row g + 8 h, and in n how many exist.
    const auto y_at = [&](int h, int o, int& n) {
        const int row = warp_m * kTileRows + g + 8 * h;
        n = row < tile.rows ? end - o - 8 * t : 0;
        return static_cast<T*>(args.y) + row_of[n > 0 ? row : 0] * args.y_row_stride + o + 8 * t;
    };
    Outputs<T, kAligned> values[2];
    const auto load_y = [&](int o) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int n;
            const T* y = y_at(h, o, n);
            values[h].load(n > 0 ? y : stand_in, n);
        }
    };

    // Loads that do not depend on v are issued before the wait for v.
    int o = begin + warp_n * kWarpOutputs;
    uint4 b[4];
    load_b(b, o, 0);
    load_y(o);
    lx::grid_dependency_wait();
    build_fragments<T, kRows>(v, tile, scale, row_of, fragments, row_max, unscale);
    lx::syncthreads();
    if (!has_rows) return;

    for (; o < end; o += stride) {
        float acc[4][4] = {};
        for (int block = 0; block < blocks; ++block) {
            // The next step's B is loaded during this product.
            uint4 next[4];
            const bool last = block + 1 == blocks;
            load_b(next, last ? o + stride : o, last ? 0 : block + 1);
            const int n = ranks_here(block);
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = keep_elements<T>(b[j], n);
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
        load_y(o + stride);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float undo = kNormalise ? unscale[warp_m * kTileRows + g + 8 * h] : 1.0f;
            float d[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) d[i] = acc[i / 2][2 * h + i % 2] * undo;
            int n;
            T* y = y_at(h, o, n);
            now[h].add_store(y, n, d);
        }
    }
}

template <class T, bool kAligned, int kWarpsM, int kWarpsN, int kModules>
LaunchStatus launch_expand(std::span<const Module> modules, int outputs, bool dependent,
                           void* stream) {
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
               ? LX_LAUNCH_PDL((lora_expand_kernel<T, kAligned, kWarpsM, kWarpsN, kModules>), grid,
                               kThreads, bytes, stream, all, tiling(args, kRows), outputs)
               : LX_LAUNCH((lora_expand_kernel<T, kAligned, kWarpsM, kWarpsN, kModules>), grid,
                           kThreads, bytes, stream, all, tiling(args, kRows), outputs);
}

// Returns the outputs per block at decode: 256, or 128 if 256 gives fewer than two blocks per
// multiprocessor of an H100 (132). The choice does not change the bits of an output.
int decode_outputs(std::span<const Module> modules) {
    const int64_t out = largest(modules, [](const LoraBank& bank) { return bank.out_features; });
    const int64_t tiles =
        int64_t{num_tiles(modules[0].args, kTileRows)} * static_cast<int64_t>(modules.size());
    return tiles * ceil_div(out, 256) < 2 * 132 ? 128 : 256;
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
        const int few = chunk_rows == 16 ? decode_outputs(modules) : 256;
        if (modules.size() > 1)
            return launch_expand<T, true, 1, 4, kMaxSiblings>(modules, few, dependent, stream);
        if (!aligned) return launch_expand<T, false, 1, 4, 1>(modules, few, dependent, stream);
        if (chunk_rows == 16)
            return launch_expand<T, true, 1, 4, 1>(modules, few, dependent, stream);
        // The fragments of 128 rows of a high rank exceed the shared memory of some devices.
        const bool small = chunk_rows == 64 ||
                           fragment_bytes<T, 8 * kTileRows>(bank.max_rank) > most_dynamic_bytes();
        if (small) return launch_expand<T, true, 4, 2, 1>(modules, 512, dependent, stream);
        return launch_expand<T, true, 8, 1, 1>(modules, 512, dependent, stream);
    });
}

}  // namespace lora_ext
