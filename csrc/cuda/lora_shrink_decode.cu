// Shrink for few rows per adapter, v[t, :] = a[s] x[t, :] for the adapter s of row t, and the sum
// of the splits of v.
//
// There is one block per (tile, split, rank group of a module), that is, per up to 16 rows of one
// adapter x split_width in-features x 32 ranks. Four warps share the in-features. A warp feeds mma
// from 16-byte loads as described in lora_tile.cuh: rows of x are operand A, the eight rows of a
// page of A are operand B. Tensor cores are used even for one row: 16-byte loads need no unpacking,
// and a row's sum does not depend on its neighbours. One kernel therefore covers every batch.
// Bound: bytes of the A pages, each read once per tile.
//
// The splits depend only on the number of in-features, so a row of v does not depend on the batch.
// Partial sums are written to the workspace and added in the order of the splits, here or in the
// expand kernel.
#include "lora_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4;
constexpr int kGroupPages = 4;

template <class T>
constexpr int kBlock = 4 * kVec<T>;  // in-features of a row that a warp reads at once: 64 bytes

// Computes acc += x a over the in-features [begin, end) for the first kPages pages. A step loads
// kUnroll blocks before it multiplies any. If aligned, loads have no condition: beyond the end they
// read the last 16 bytes before it, and the value is replaced by zero when used.
template <class P, bool kAligned, int kPages, int kUnroll>
LX_DEVICE void multiply(const typename PagesOf<P>::Row* const (&x)[2],
                        const typename PagesOf<P>::Element* const (&a)[kGroupPages], int begin,
                        int end, float (&acc)[kGroupPages][4]) {
    using T = typename PagesOf<P>::Row;
    using Words = typename PagesOf<P>::Words;
    const int first = begin + lx::lane_id() % 4 * kVec<T>;
#pragma unroll 1
    for (int k0 = first; k0 - first < end - begin; k0 += kUnroll * kBlock<T>) {
        uint4 xw[kUnroll][2];
        Words aw[kUnroll][kPages];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int k = k0 + u * kBlock<T>;
            const auto load = [&](const T* row) {
                if constexpr (!kAligned) return load_words<T, false>(row + k, end - k);
                return lx::load_global(
                    reinterpret_cast<const uint4*>(row + lx::min(k, end - kVec<T>)));
            };
#pragma unroll
            for (int h = 0; h < 2; ++h) xw[u][h] = load(x[h]);
#pragma unroll
            for (int p = 0; p < kPages; ++p) {
                if constexpr (std::is_same_v<P, T>)
                    aw[u][p] = load(a[p]);
                else
                    aw[u][p] = lx::load_global(
                        reinterpret_cast<const Words*>(a[p] + lx::min(k, end - kVec<T>)));
            }
        }
        lx::syncwarp();  // keeps the compiler from moving loads down to save registers
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const auto keep = [&](const uint4& words) {
                return !kAligned || k0 + u * kBlock<T> < end ? words : uint4{0, 0, 0, 0};
            };
            const uint4 low = keep(xw[u][0]), high = keep(xw[u][1]);
#pragma unroll
            for (int p = 0; p < kPages; ++p) {
                if constexpr (std::is_same_v<P, T>)
                    mma_words<T>(acc[p], low, high, keep(aw[u][p]));
                else
                    mma_words<T>(acc[p], low, high, keep(widen_float8<T>(aw[u][p])));
            }
        }
    }
}

// Minimum blocks per multiprocessor: four, or three for float32 (a float becomes two tf32) and for
// unaligned rows on Blackwell (with four, registers would spill).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kUnalignedBlocks = 3;
#else
constexpr int kUnalignedBlocks = 4;
#endif
template <class T, bool kAligned>
constexpr int kMinBlocks = std::is_same_v<T, float> ? 3
                           : kAligned               ? 4
                                                    : kUnalignedBlocks;

template <class P, bool kAligned, int kModules>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks<P, kAligned>)
    lora_shrink_decode_kernel(const __grid_constant__ Modules<kModules> modules,
                              const __grid_constant__ Tiling tiling, int rank_groups) {
    using T = typename PagesOf<P>::Row;
    using E = typename PagesOf<P>::Element;
    // For float32, narrow addresses would make ptxas delay half of the loads.
    constexpr bool kNarrow = kAligned && sizeof(T) == 2;
    // The previous kernel may write x, the plan or a bank, or it may be an expand that reads v, so
    // no access to memory precedes the wait. The next launch may start only after this wait: it may
    // be an expand, which reads y before its own wait, and every earlier writer of y must have
    // ended by then.
    lx::grid_dependency_wait();
    lx::grid_dependency_launch();
    const int z = static_cast<int>(blockIdx.z);
    int which = kModules > 1 ? z : 0;
    if (kModules > 1 && rank_groups > 1) which = z / rank_groups;
    const LoraArgs& args = modules.each[which].args;
    const Partials& v = modules.each[which].v;
    LX_SHARED(int32_t, row_of, kTileRows);
    LX_SHARED(float, sums, kWarps * kGroupPages * kTileRows * kPageRanks);
    const LoraBank& bank = args.bank;
    const int lane = lx::lane_id(), warp = lx::warp_id(), g = lane / 4, t = lane % 4;
    const int first_page = (z - which * rank_groups) * kGroupPages;
    int number[kGroupPages] = {};
    float scale = 1;
    const auto also = [&](int slot) {
#pragma unroll
        for (int p = 0; p < kGroupPages; ++p) number[p] = page_number(bank, slot, first_page + p);
        if (v.scaled && bank.scale) scale = bank.scale[slot];
    };
    const RowTile tile =
        find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of, also);
    const int ranks = lx::min(tile.rank - first_page * kPageRanks, kGroupPages * kPageRanks);
    if (ranks <= 0) return;
    const int pages = (ranks + kPageRanks - 1) / kPageRanks;
    lx::syncthreads();  // row_of is complete

    const int width = v.split_width / kWarps;
    const int begin = static_cast<int>(blockIdx.y) * v.split_width + warp * width;
    const int end = lx::min(begin + width, bank.in_features);

    // Addresses that this lane reads: rows g and g + 8 of x, rank g of each page. Instead of
    // missing rows and ranks, the tile's first row of x is read, and the results are not stored.
    // The sums of an absent page are set to zero at the end.
    const T* x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = g + 8 * h;
        x[h] = row_at<kNarrow>(static_cast<const T*>(args.x), row_of[row < tile.rows ? row : 0],
                               args.x_row_stride);
    }
    const E* const stand_in = reinterpret_cast<const E*>(
        row_at<kNarrow>(static_cast<const T*>(args.x), row_of[0], args.x_row_stride));
    const E* a[kGroupPages];
    bool absent[kGroupPages] = {};
#pragma unroll
    for (int p = 0; p < kGroupPages; ++p) {
        const E* page = p < pages ? page_at<E, kNarrow>(bank, bank.a, tile.slot, number[p],
                                                        bank.a_slot_stride, bank.a_page_stride)
                                  : nullptr;
        absent[p] = !page;
        const bool mine = page && p * kPageRanks + g < ranks;
        a[p] = mine ? row_at<kNarrow>(page, g, bank.a_row_stride) : stand_in;
    }

    float acc[kGroupPages][4] = {};
    if (pages <= kGroupPages / 2)
        multiply<P, kAligned, kGroupPages / 2, kAligned ? (sizeof(T) == 2 ? 4 : 3) : 2>(x, a, begin,
                                                                                        end, acc);
    else
        multiply<P, kAligned, kGroupPages, 2>(x, a, begin, end, acc);
#pragma unroll
    for (int p = 0; p < kGroupPages; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (absent[p]) acc[p][i] = 0;
    }

    // sums[warp][row][rank of the group]
    constexpr int kRanks = kGroupPages * kPageRanks;
    float* mine = sums + warp * kTileRows * kRanks;
#pragma unroll
    for (int p = 0; p < kGroupPages; ++p) {
        const int column = p * kPageRanks + 2 * t;
        *reinterpret_cast<float2*>(mine + g * kRanks + column) = {acc[p][0], acc[p][1]};
        *reinterpret_cast<float2*>(mine + (g + 8) * kRanks + column) = {acc[p][2], acc[p][3]};
    }
    lx::syncthreads();
    for (int i = lx::thread_rank(); i < tile.rows * kRanks; i += kWarps * lx::kWarpSize) {
        const int row = i / kRanks, rank = i % kRanks;
        if (rank >= ranks) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums[w * kTileRows * kRanks + i];
        v.data[blockIdx.y * v.split_stride + row_of[row] * v.row_stride + first_page * kPageRanks +
               rank] = scale * sum;
    }
}

// Computes v[t, j] = scale[s] * sum of the splits. v may overlap the splits, because a warp writes
// an element only after it has read the splits of this element. This kernel runs for callers that
// need v, and before an expand with many blocks.
__global__ void __launch_bounds__(128)
    lora_reduce_kernel(const __grid_constant__ LoraArgs args, const __grid_constant__ Tiling tiling,
                       const __grid_constant__ Partials v) {
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kTileRows);
    float scale = 1;
    const auto also = [&](int slot) {
        if (args.bank.scale) scale = args.bank.scale[slot];
    };
    const RowTile tile =
        find_tile<kTileRows>(args, tiling, static_cast<int>(blockIdx.x), row_of, also);
    if (tile.rank == 0) {
        // A block without work also waits: the next grid waits only for this grid, and therefore
        // this grid must not end before the grid that writes the splits.
        lx::grid_dependency_wait();
        return;
    }
    lx::syncthreads();  // row_of is complete
    lx::grid_dependency_wait();
    const int count = tile.rows * tile.rank;
    for (int first = lx::warp_id() * lx::kWarpSize; first < count; first += 128) {
        const int at = first + lx::lane_id(), i = lx::min(at, count - 1);
        const int64_t row = row_of[i / tile.rank];
        const int rank = i % tile.rank;
        const float* p = v.data + row * v.row_stride + rank;
        float sum[1] = {};
        add_splits(v.splits, sum,
                   [&](int split, float (&part)[1]) { part[0] = p[split * v.split_stride]; });
        if (at < count)
            static_cast<float*>(args.v)[row * args.v_row_stride + rank] = scale * sum[0];
    }
}

}  // namespace

LaunchStatus run_shrink_decode(std::span<const Module> modules, void* stream) {
    const LoraArgs& args = modules[0].args;
    const bool aligned = shrink_aligned(args);
    const int64_t groups =
        ceil_div(largest(modules, [](const LoraBank& bank) { return bank.max_rank; }),
                 kGroupPages * kPageRanks);
    const dim3 grid(num_tiles(args, kTileRows), static_cast<unsigned>(modules[0].v.splits),
                    static_cast<unsigned>(groups * modules.size()));
    for (const Module& module : modules) {
        declare_common(module.args, lx::Access::kRead);
        declare_a(module.args, lx::Access::kRead);
        declare_v(module.args, module.v, lx::Access::kWrite);
    }
    return with_dtype(args.dtype, [&]<class T>() {
        const auto launch = [&]<class P, bool kAligned, int kModules>() {
            return LX_LAUNCH_PDL((lora_shrink_decode_kernel<P, kAligned, kModules>), grid,
                                 kWarps * 32, 0, stream, Modules<kModules>(modules),
                                 tiling(args, kTileRows), static_cast<int>(groups));
        };
        const bool many = modules.size() > 1;
        if constexpr (sizeof(T) == 2) {
            if (args.bank.float8)
                return many ? launch.template operator()<Float8<T>, true, kMaxSiblings>()
                            : launch.template operator()<Float8<T>, true, 1>();
        }
        if (many) return launch.template operator()<T, true, kMaxSiblings>();
        return aligned ? launch.template operator()<T, true, 1>()
                       : launch.template operator()<T, false, 1>();
    });
}

LaunchStatus run_reduce(const LoraArgs& args, const Partials& v, void* stream) {
    if (has_factors(args))
        return run_weigh(args, v, 1.0f, {}, {static_cast<float*>(args.v), args.v_row_stride}, true,
                         stream);
    declare_common(args);
    LX_BUF_ROWS(args.v, args.num_tokens, args.bank.max_rank * 4, args.v_row_stride * 4,
                args.v == v.data ? lx::Access::kReadWrite : lx::Access::kWrite);
    declare_v(args, v, lx::Access::kRead);
    if (large_rank(args.bank)) return run_gemm_reduce(args, v, 1.0f, true, stream);
    return LX_LAUNCH_PDL(lora_reduce_kernel, num_tiles(args, kTileRows), 128, 0, stream, args,
                         tiling(args, kTileRows), v);
}

}  // namespace lora_ext
