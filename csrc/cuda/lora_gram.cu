// Gram matrices of adapters, and inner products computed from them, for all adapters of a model in
// one launch:
//
//   gram_a[i, j] = sum over k of a[i, k] a[j, k]         a (r, I)
//   gram_b[i, j] = sum over k of b[k, i] b[k, j]         b (O, r)
//   stats        = sum over (i, j) of gram_a .* (b^T b, p^T p, p^T b, (p - b)^T (p - b))
//
// There is one block per (item, adapter). An item is a tile of 64 x 64 ranks; tiles of gram_a and
// gram_b above the diagonal are not computed. The table of adapters (500 per launch) is passed to
// the kernel by value, so nothing is copied to the device, and a captured graph needs no host
// memory.
//
// The elements of a sum are added in a fixed order: those that a group of threads reads in one
// step, then the steps, then the groups, in a tree (lora_gram.cuh). The order depends only on the
// rank and the number of elements. Bound: the bytes of the factors, which are read from memory
// once. Above 64 ranks, and for the four products of stats, they are read again from L2.
#include "lora_gram.cuh"

namespace lora_ext {
namespace {

constexpr int kMostAdapters = 500;
struct GramTable {
    GramAdapter adapters[kMostAdapters];
};
static_assert(sizeof(GramTable) <= 32764);  // maximum size of the parameters of a kernel

template <class T, class S>
__global__ void __launch_bounds__(kGramThreads, sizeof(S) == 4 ? 2 : 1)
    lora_gram_kernel(const __grid_constant__ GramTable table) {
    LX_SHARED(S, shared, (kGramShared<T, S>));
    const GramAdapter& adapter = table.adapters[blockIdx.y];
    const int rank = adapter.rank, item = static_cast<int>(blockIdx.x);
    if (item >= gram_items(rank)) return;
    const GramTile tile = gram_tile(item, rank);
    const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
    auto side = [&](int first) {
        return tile.of_b ? GramSide<T>(adapter.b, adapter.b_stride, first, rank, rank, true)
                         : GramSide<T>(adapter.a, adapter.a_stride, first, rank,
                                       adapter.in_features, false);
    };
    const bool same = row == column;
    const GramSides<T> sides{side(row), side(column),
                             tile.of_b ? adapter.out_features : adapter.in_features, tile.of_b,
                             same};
    const GramPart part(sides.x.ranks, sides.y.ranks, same);
    S sum[kGramSums];
    multiply_any<T, S, false>(sides, part, shared, sum);
    if (part.group > 0) return;
    S* const out = static_cast<S*>(tile.of_b ? adapter.gram_b : adapter.gram_a);
#pragma unroll
    for (int s = 0; s < kGramSums; ++s) {
        const int m = row + 4 * part.i + s / 4, n = column + 4 * part.j + s % 4;
        if (m >= rank || n >= rank) continue;
        out[int64_t{m} * rank + n] = sum[s];
        out[int64_t{n} * rank + m] = sum[s];
    }
}

template <class T>
__global__ void __launch_bounds__(kGramThreads, 1)
    lora_pair_stats_kernel(const __grid_constant__ GramTable table) {
    LX_SHARED(double, shared, (kGramShared<T, double>));
    const GramAdapter& adapter = table.adapters[blockIdx.y];
    const int rank = adapter.rank, item = static_cast<int>(blockIdx.x);
    if (item >= pair_items(rank)) return;
    const GramTile tile = gram_tile(item, rank);
    const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
    const bool diagonal = row == column;
    const GramPart part(lx::min(kGramRanks, rank - row), lx::min(kGramRanks, rank - column), false);
    auto a = [&](int first) {
        return GramSide<T>(adapter.a, adapter.a_stride, first, rank, adapter.in_features, false);
    };
    auto b = [&](int first) {
        return GramSide<T>(adapter.b, adapter.b_stride, first, rank, rank, true);
    };
    auto p = [&](int first) {
        return GramSide<T>(adapter.p, adapter.p_stride, first, rank, rank, true);
    };
    auto moved = [&](int first) {
        GramSide<T> side = p(first);
        const GramSide<T> other = b(first);
        side.minus = other.data;
        side.minus_stride = other.stride;
        side.aligned = side.aligned && other.aligned;
        return side;
    };
    double gram_a[kGramSums], stats[4] = {};
    // Product 0 is a a^T; products 1 to 4 are those of stats. Off the diagonal, a tile stands for
    // its mirrored tile as well, so its sums count twice. Only p^T b is not symmetric: for it,
    // product 5 (b^T p) is that of the mirrored tile.
    for (int product = 0; product < (diagonal ? 5 : 6); ++product) {
        auto side = [&](int first, bool of_p) {
            return product == 0   ? a(first)
                   : product == 4 ? moved(first)
                   : of_p         ? p(first)
                                  : b(first);
        };
        const bool mixed = product == 3 || product == 5;
        const GramSides<T> sides{side(row, product == 2 || product == 3),
                                 side(column, product == 2 || product == 5),
                                 product == 0 ? adapter.in_features : adapter.out_features,
                                 product > 0, diagonal && !mixed};
        double sum[kGramSums], total = 0;
        multiply_any<T, double, true>(sides, part, shared, sum);
        if (part.group > 0) continue;
#pragma unroll
        for (int s = 0; s < kGramSums; ++s) {
            if (product == 0) gram_a[s] = sum[s];
            // Sums beyond the ranks are 0, but must be skipped: 0 times an infinite gram_a is NaN.
            const bool there =
                4 * part.i + s / 4 < sides.x.ranks && 4 * part.j + s % 4 < sides.y.ranks;
            total += there ? sum[s] * gram_a[s] : 0;
        }
        if (!diagonal && !mixed) total *= 2;
        const int counted = product == 5 ? 2 : product - 1;
#pragma unroll
        for (int k = 0; k < 4; ++k) stats[k] += k == counted ? total : 0;
    }
    add_groups(stats, lx::thread_rank(), kGramThreads, 1, shared);
    if (lx::thread_rank() > 0) return;
    double* const out = static_cast<double*>(adapter.gram_a) + 4 * item;
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = stats[k];
}

// Calls launch.operator()<T>(grid, table), which launches a kernel, for every 500 adapters. T is
// the type of the factors.
template <class F>
LaunchStatus launch_tables(const GramArgs& args, int64_t (*items_of)(int64_t), int64_t result_bytes,
                           F&& launch) {
    if (args.items > kMaxGridX) return kInvalidValue;
    const auto launch_of = [&]<class T>() -> LaunchStatus {
        [[maybe_unused]] constexpr int64_t size = sizeof(T);
        for (int64_t begin = 0; begin < args.num_adapters; begin += kMostAdapters) {
            const int64_t count = lx::min<int64_t>(kMostAdapters, args.num_adapters - begin);
            GramTable table{};
            for (int64_t i = 0; i < count; ++i) {
                const GramAdapter& adapter = table.adapters[i] = args.adapters[begin + i];
                LX_BUF_ROWS(adapter.a, adapter.rank, adapter.in_features * size,
                            int64_t{adapter.a_stride} * size, lx::Access::kConstant);
                LX_BUF_ROWS(adapter.b, adapter.out_features, adapter.rank * size,
                            int64_t{adapter.b_stride} * size, lx::Access::kConstant);
                if (adapter.p)
                    LX_BUF_ROWS(adapter.p, adapter.out_features, adapter.rank * size,
                                int64_t{adapter.p_stride} * size, lx::Access::kConstant);
                const int64_t bytes = result_bytes * items_of(adapter.rank);
                LX_BUF(adapter.gram_a, bytes, lx::Access::kWrite);
                if (adapter.gram_b) LX_BUF(adapter.gram_b, bytes, lx::Access::kWrite);
            }
            const dim3 grid(static_cast<unsigned>(args.items), static_cast<unsigned>(count));
            if (const LaunchStatus status = launch.template operator()<T>(grid, table))
                return status;
        }
        return 0;
    };
    return args.dtype == DType::kFloat64 ? launch_of.template operator()<double>()
                                         : with_dtype(args.dtype, launch_of);
}

}  // namespace

LaunchStatus launch_lora_gram(const GramArgs& args, void* stream) {
    const auto squared = [](int64_t rank) { return rank * rank; };
    return launch_tables(args, squared, args.float64 ? 8 : 4,
                         [&]<class T>(dim3 grid, const GramTable& table) {
                             if constexpr (std::is_same_v<T, double>) {
                                 return LX_LAUNCH((lora_gram_kernel<T, double>), grid, kGramThreads,
                                                  0, stream, table);
                             } else {
                                 if (args.float64)
                                     return LX_LAUNCH((lora_gram_kernel<T, double>), grid,
                                                      kGramThreads, 0, stream, table);
                                 return LX_LAUNCH((lora_gram_kernel<T, float>), grid, kGramThreads,
                                                  0, stream, table);
                             }
                         });
}

LaunchStatus launch_lora_pair_stats(const GramArgs& args, void* stream) {
    return launch_tables(
        args, pair_items, 4 * sizeof(double), [&]<class T>(dim3 grid, const GramTable& table) {
            return LX_LAUNCH(lora_pair_stats_kernel<T>, grid, kGramThreads, 0, stream, table);
        });
}

}  // namespace lora_ext
