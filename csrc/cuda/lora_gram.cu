// Gram matrices of adapters, and inner products computed from them, for all adapters of a model in
// one launch:
//
//   gram_a[i, j] = sum over k of a[i, k] a[j, k]         a (r, I)
//   gram_b[i, j] = sum over k of b[k, i] b[k, j]         b (O, r)
//   stats        = sum over (i, j) of gram_a .* (b^T b, p^T p, p^T b, (p - b)^T (p - b))
//
// Block (item, adapter). An item is a tile of 64 x 64 ranks; tiles of gram_a and gram_b above the
// diagonal are not computed. The table of adapters is an argument of the kernel, by value, with 500
// adapters per launch: nothing is copied to the device, and a captured graph needs no host memory.
//
// A block iterates over the long axis in steps of 4096 elements (16-bit types with float sums:
// 8192, doubles: 2048). All threads load the next step, in pieces of 16 bytes, while the sums of
// the current step read shared memory, where elements have the type of the sums. A thread has 4 x 4
// sums; in a diagonal tile, only sums with i >= j. If a tile has few ranks, its threads form groups
// that divide the elements, four at a time: 25 groups at 16 ranks, 7 at 32, one at 64.
//
// A sum first adds a group's elements of a step, then the steps, then the groups in a tree. This
// order depends only on the rank and the length. Bound: the bytes of the factors, which are read
// once. Above 64 ranks, and for the four products of stats, they are read again from L2.
#include "lora_ext/lora_gram.h"

#include "launch.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = static_cast<int>(kGramTile);
constexpr int kPad = 4;    // padding of each rank of a, to put eight ranks in different banks
constexpr int kSums = 16;  // sums per thread, 4 x 4

constexpr int kMostAdapters = 500;
struct GramTable {
    GramAdapter adapters[kMostAdapters];
};
static_assert(sizeof(GramTable) <= 32764);  // maximum size of the parameters of a kernel

template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));
// Log2 of the number of elements of a step, counted over both sides.
template <class T, class S>
constexpr int kLogStep = sizeof(T) == 8                     ? 11
                         : sizeof(T) == 2 && sizeof(S) == 4 ? 13
                                                            : 12;
template <class T, class S>
constexpr int kPieces = (1 << kLogStep<T, S>) / kVec<T> / kThreads;  // per thread and step, even
// Size of shared memory in numbers: for the elements of a step, or for the sums of the groups.
template <class T, class S>
constexpr int kShared = lx::max(1 << kLogStep<T, S>, kThreads* kSums) + 2 * kTile * kPad;

template <class T>
struct alignas(16) Piece {
    T e[kVec<T>];
};
template <class S>
constexpr int kWide = 16 / static_cast<int>(sizeof(S));
template <class S>
using Wide = Piece<S>;

template <class S, class T>
LX_DEVICE S widen(T x) {
    if constexpr (std::is_same_v<T, double>) {
        return static_cast<S>(x);
    } else {
        return static_cast<S>(lx::to_float(x));
    }
}

// The ranks of one side of a tile.
template <class T>
struct Side {
    const T* data;             // data of the side's first rank
    const T* minus;            // subtracted from each element, or nullptr
    int stride, minus_stride;  // elements between rows
    int ranks;
    bool aligned;  // pieces are aligned to 16 bytes, and none crosses the end of a row

    LX_DEVICE Side(const void* factor, int row_stride, int first, int rank, int row,
                   bool ranks_in_row)
        : data(static_cast<const T*>(factor) +
               (ranks_in_row ? first : int64_t{first} * row_stride)),
          minus(nullptr),
          stride(row_stride),
          minus_stride(0),
          ranks(lx::min(kTile, rank - first)),
          aligned(reinterpret_cast<uintptr_t>(factor) % 16 == 0 && row_stride % kVec<T> == 0 &&
                  row % kVec<T> == 0) {}
};

// Two sides, multiplied over the long axis.
template <class T>
struct Sides {
    Side<T> x, y;
    int length;  // length of the long axis
    bool of_b;   // the sides are factors b, otherwise a
    bool same;   // both sides are equal: y is x
};

// A thread's share of a product: sums (4 i + m, 4 j + n), m, n < 4, over its group's elements.
struct Part {
    int i, j, group, groups, lanes;

    // If `lower`, the tile is diagonal and only sums with i >= j are computed.
    LX_DEVICE Part(int rows, int columns, bool lower) {
        const int thread = lx::thread_rank();
        const int down = (rows + 3) / 4, across = (columns + 3) / 4;
        lanes = lower ? down * (down + 1) / 2 : down * across;
        groups = kThreads / lanes;
        group = thread / lanes;
        const int lane = thread % lanes;
        if (lower) {
            i = 0;
            while ((i + 1) * (i + 2) / 2 <= lane) ++i;
            j = lane - i * (i + 1) / 2;
        } else {
            i = lane / across;
            j = lane % across;
        }
    }
};

// Adds the sums of all groups; group 0 has the result. shared: kThreads * kCount numbers.
template <class S, int kCount>
LX_DEVICE void add_groups(S (&sum)[kCount], int group, int groups, int lanes, S* shared) {
    const int thread = lx::thread_rank();
    lx::syncthreads();  // the previous contents have been read
    for (int n = groups; n > 1;) {
        const int half = (n + 1) / 2;
        if (group >= half && group < n) {
#pragma unroll
            for (int s = 0; s < kCount; ++s) shared[s * kThreads + thread] = sum[s];
        }
        lx::syncthreads();
        if (group < n - half) {
#pragma unroll
            for (int s = 0; s < kCount; ++s) sum[s] += shared[s * kThreads + thread + half * lanes];
        }
        n = half;
    }
}

// Computes sum[4 m + n] = sum over k of x[4 i + m, k] y[4 j + n, k] for the threads of group 0. All
// threads of the block must call this. kMoved: the sides may have a `minus`.
template <class T, class S, bool kMoved, bool kOfB, bool kAligned>
LX_DEVICE void multiply(const Sides<T>& sides, const Part& part, S* shared, S (&sum)[kSums]) {
    constexpr int V = kVec<T>;
    const Side<T>&x = sides.x, &y = sides.y;
    const int thread = lx::thread_rank(), length = sides.length;
    // Widths and depths are powers of two. A piece of b has V ranks, and a piece of a has V
    // elements of the long axis.
    const int most = lx::max(lx::max(x.ranks, y.ranks), V < 4 ? 4 : V);
    const int log_width = 32 - lx::clz(static_cast<unsigned>(most - 1)), width = 1 << log_width;
    const int log_depth = kLogStep<T, S> - (sides.same ? 0 : 1) - log_width, depth = 1 << log_depth;
    const int row = kOfB ? width : depth + kPad;
    const int side_size = kOfB ? depth * width : width * row;

    // A line is a rank of a, or an element of the long axis of b. No line is longer than the pieces
    // of all threads together. All pieces of a thread therefore have the same offset `within` their
    // lines, which are `hop` lines apart; pieces of x precede pieces of y.
    const int log_line = kOfB ? log_width : log_depth;
    const int within = thread * V & ((1 << log_line) - 1), across = thread * V >> log_line;
    const int hop = kThreads * V >> log_line;
    auto of_y = [&](int v) { return !sides.same && v >= kPieces<T, S> / 2; };
    auto line_of = [&](int v) { return across + (of_y(v) ? v - kPieces<T, S> / 2 : v) * hop; };
    // Returns how many numbers of piece v are valid.
    auto count_of = [&](int v, int begin) {
        const int ranks = of_y(v) ? y.ranks : x.ranks, left = length - begin, line = line_of(v);
        const bool there = kOfB ? line < left : line < ranks;
        return there ? lx::min((kOfB ? ranks : left) - within, V) : 0;
    };
    // For a piece without valid numbers, the side's first piece is read instead.
    auto load = [&](const T* data, int stride, int v, int begin) {
        const int64_t line = kOfB ? begin + line_of(v) : line_of(v);
        const int count = count_of(v, begin);
        const T* const from =
            data + (count > 0 ? line * stride + (kOfB ? within : begin + within) : 0);
        if constexpr (kAligned) {
            return lx::load_stream(reinterpret_cast<const Piece<T>*>(from));
        } else {
            Piece<T> piece;
#pragma unroll
            for (int e = 0; e < V; ++e)
                piece.e[e] = e < count ? lx::load_nc(from + e) : lx::from_float<T>(0);
            return piece;
        }
    };
    auto load_side = [&](int v, int begin) {
        return load(of_y(v) ? y.data : x.data, of_y(v) ? y.stride : x.stride, v, begin);
    };

    Piece<T> pieces[kPieces<T, S>];
    auto fetch = [&](int begin) {
#pragma unroll
        for (int v = 0; v < kPieces<T, S>; ++v) pieces[v] = load_side(v, begin);
    };
    // Ranks of a are stored in the order 0, 4, 8, ..., 1, 5, ..., so that the ranks that lanes read
    // at the same time are adjacent.
    auto put = [&](int begin) {
#pragma unroll
        for (int v = 0; v < kPieces<T, S>; ++v) {
            const Piece<T> piece = kAligned ? pieces[v] : load_side(v, begin);
            S values[V];
#pragma unroll
            for (int e = 0; e < V; ++e) values[e] = widen<S>(piece.e[e]);
            if constexpr (kMoved) {
                if (x.minus) {
                    const Piece<T> taken =
                        load(of_y(v) ? y.minus : x.minus, of_y(v) ? y.minus_stride : x.minus_stride,
                             v, begin);
#pragma unroll
                    for (int e = 0; e < V; ++e) values[e] -= widen<S>(taken.e[e]);
                }
            }
            const int count = count_of(v, begin), line = line_of(v);
            const int place = kOfB ? line : (line & 3) * (width / 4) + line / 4;
            S* const to = shared + (of_y(v) ? side_size : 0) + place * row + within;
#pragma unroll
            for (int e = 0; e < V; e += kWide<S>) {
                Wide<S> wide;
#pragma unroll
                for (int n = 0; n < kWide<S>; ++n) wide.e[n] = e + n < count ? values[e + n] : S{0};
                *reinterpret_cast<Wide<S>*>(to + e) = wide;
            }
        }
    };
    auto wide_at = [](const S* p) { return *reinterpret_cast<const Wide<S>*>(p); };
    // Adds the products of elements 4 f to 4 f + 3 of the long axis to `step`.
    auto add_b = [&](S(&step)[kSums], int f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const S* const line = shared + (4 * f + e) * row;
            const S* const other = line + (sides.same ? 0 : side_size);
            S u[4], w[4];
#pragma unroll
            for (int n = 0; n < 4; n += kWide<S>) {
                const Wide<S> left = wide_at(line + 4 * part.i + n);
                const Wide<S> right = wide_at(other + 4 * part.j + n);
#pragma unroll
                for (int h = 0; h < kWide<S>; ++h) u[n + h] = left.e[h], w[n + h] = right.e[h];
            }
#pragma unroll
            for (int s = 0; s < kSums; ++s) step[s] += u[s / 4] * w[s % 4];
        }
    };
    auto add_a = [&](S(&step)[kSums], int f) {
        const int apart = width / 4 * row;
#pragma unroll
        for (int e = 0; e < 4; e += kWide<S>) {
            const S* const line = shared + part.i * row + 4 * f + e;
            const S* const other = shared + (sides.same ? 0 : side_size) + part.j * row + 4 * f + e;
            Wide<S> u[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) u[m] = wide_at(line + m * apart);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const Wide<S> w = wide_at(other + n * apart);
#pragma unroll
                for (int m = 0; m < 4; ++m) {
#pragma unroll
                    for (int h = 0; h < kWide<S>; ++h) step[4 * m + n] += u[m].e[h] * w.e[h];
                }
            }
        }
    };

#pragma unroll
    for (int s = 0; s < kSums; ++s) sum[s] = 0;
    if (kAligned && length > 0) fetch(0);
    for (int begin = 0; begin < length; begin += depth) {
        lx::syncthreads();  // the previous step has been read
        put(begin);
        lx::syncthreads();
        if (kAligned && begin + depth < length) fetch(begin + depth);
        const int fours = (lx::min(depth, length - begin) + 3) / 4;
        const int first = part.group < part.groups ? part.group : fours;
        // Float sums start at zero in each step, so that rounding errors accumulate less.
        S step[kSums];
#pragma unroll
        for (int s = 0; s < kSums; ++s) step[s] = sizeof(S) == 4 ? 0 : sum[s];
        if constexpr (kOfB) {
            for (int f = first; f < fours; f += part.groups) add_b(step, f);
        } else {
            for (int f = first; f < fours; f += part.groups) add_a(step, f);
        }
#pragma unroll
        for (int s = 0; s < kSums; ++s) sum[s] = sizeof(S) == 4 ? sum[s] + step[s] : step[s];
    }
    add_groups(sum, part.group, part.groups, part.lanes, shared);
}

template <class T, class S, bool kMoved>
LX_DEVICE void multiply_any(const Sides<T>& sides, const Part& part, S* shared, S (&sum)[kSums]) {
    const bool aligned = sides.x.aligned && sides.y.aligned;
    if (sides.of_b) {
        if (aligned)
            multiply<T, S, kMoved, true, true>(sides, part, shared, sum);
        else
            multiply<T, S, kMoved, true, false>(sides, part, shared, sum);
    } else {
        if (aligned)
            multiply<T, S, false, false, true>(sides, part, shared, sum);
        else
            multiply<T, S, false, false, false>(sides, part, shared, sum);
    }
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 2 : 1)
    lora_gram_kernel(const __grid_constant__ GramTable table) {
    LX_SHARED(S, shared, (kShared<T, S>));
    const GramAdapter& adapter = table.adapters[blockIdx.y];
    const int rank = adapter.rank, item = static_cast<int>(blockIdx.x);
    if (item >= gram_items(rank)) return;
    const GramTile tile = gram_tile(item, rank);
    const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
    auto side = [&](int first) {
        return tile.of_b
                   ? Side<T>(adapter.b, adapter.b_stride, first, rank, rank, true)
                   : Side<T>(adapter.a, adapter.a_stride, first, rank, adapter.in_features, false);
    };
    const bool same = row == column;
    const Sides<T> sides{side(row), side(column),
                         tile.of_b ? adapter.out_features : adapter.in_features, tile.of_b, same};
    const Part part(sides.x.ranks, sides.y.ranks, same);
    S sum[kSums];
    multiply_any<T, S, false>(sides, part, shared, sum);
    if (part.group > 0) return;
    S* const out = static_cast<S*>(tile.of_b ? adapter.gram_b : adapter.gram_a);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
        const int m = row + 4 * part.i + s / 4, n = column + 4 * part.j + s % 4;
        if (m >= rank || n >= rank) continue;
        out[int64_t{m} * rank + n] = sum[s];
        out[int64_t{n} * rank + m] = sum[s];
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    lora_pair_stats_kernel(const __grid_constant__ GramTable table) {
    LX_SHARED(double, shared, (kShared<T, double>));
    const GramAdapter& adapter = table.adapters[blockIdx.y];
    const int rank = adapter.rank, item = static_cast<int>(blockIdx.x);
    if (item >= pair_items(rank)) return;
    const GramTile tile = gram_tile(item, rank);
    const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
    const bool diagonal = row == column;
    const Part part(lx::min(kTile, rank - row), lx::min(kTile, rank - column), false);
    auto a = [&](int first) {
        return Side<T>(adapter.a, adapter.a_stride, first, rank, adapter.in_features, false);
    };
    auto b = [&](int first) {
        return Side<T>(adapter.b, adapter.b_stride, first, rank, rank, true);
    };
    auto p = [&](int first) {
        return Side<T>(adapter.p, adapter.p_stride, first, rank, rank, true);
    };
    auto moved = [&](int first) {
        Side<T> side = p(first);
        const Side<T> other = b(first);
        side.minus = other.data;
        side.minus_stride = other.stride;
        side.aligned = side.aligned && other.aligned;
        return side;
    };
    double gram_a[kSums], stats[4] = {};
    // Product 0 is a a^T; 1 to 4 are those of stats. Off the diagonal, 5 is b^T p, the p^T b of the
    // mirrored tile. In the other products the two tiles have equal sums, which count twice.
    for (int product = 0; product < (diagonal ? 5 : 6); ++product) {
        auto side = [&](int first, bool of_p) {
            return product == 0   ? a(first)
                   : product == 4 ? moved(first)
                   : of_p         ? p(first)
                                  : b(first);
        };
        const bool mixed = product == 3 || product == 5;
        const Sides<T> sides{side(row, product == 2 || product == 3),
                             side(column, product == 2 || product == 5),
                             product == 0 ? adapter.in_features : adapter.out_features, product > 0,
                             diagonal && !mixed};
        double sum[kSums], total = 0;
        multiply_any<T, double, true>(sides, part, shared, sum);
        if (part.group > 0) continue;
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
            if (product == 0) gram_a[s] = sum[s];
            // Sums beyond the ranks are 0 and skipped: 0 times an infinite gram_a would be NaN.
            const bool there =
                4 * part.i + s / 4 < sides.x.ranks && 4 * part.j + s % 4 < sides.y.ranks;
            total += there ? sum[s] * gram_a[s] : 0;
        }
        if (!diagonal && !mixed) total *= 2;
        const int counted = product == 5 ? 2 : product - 1;
#pragma unroll
        for (int k = 0; k < 4; ++k) stats[k] += k == counted ? total : 0;
    }
    add_groups(stats, lx::thread_rank(), kThreads, 1, shared);
    if (lx::thread_rank() > 0) return;
    double* const out = static_cast<double*>(adapter.gram_a) + 4 * item;
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = stats[k];
}

// Launches a kernel for 500 adapters at a time: launch.operator()<T>(grid, table), where T is the
// type of the factors.
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
    return launch_tables(
        args, squared, args.float64 ? 8 : 4, [&]<class T>(dim3 grid, const GramTable& table) {
            if constexpr (std::is_same_v<T, double>) {
                return LX_LAUNCH((lora_gram_kernel<T, double>), grid, kThreads, 0, stream, table);
            } else {
                if (args.float64)
                    return LX_LAUNCH((lora_gram_kernel<T, double>), grid, kThreads, 0, stream,
                                     table);
                return LX_LAUNCH((lora_gram_kernel<T, float>), grid, kThreads, 0, stream, table);
            }
        });
}

LaunchStatus launch_lora_pair_stats(const GramArgs& args, void* stream) {
    return launch_tables(
        args, pair_items, 4 * sizeof(double), [&]<class T>(dim3 grid, const GramTable& table) {
            return LX_LAUNCH(lora_pair_stats_kernel<T>, grid, kThreads, 0, stream, table);
        });
}

}  // namespace lora_ext
