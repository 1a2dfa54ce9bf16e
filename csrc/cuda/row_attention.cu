// Attention in which each query row has a separate range of keys; row_attention.h has the formula.
//
// A block computes 16 query rows, ordered (t, head), of the heads that share keys, and up to 128
// features of their values. A warp has four of the rows and 32 keys at a time, one key per lane.
// Keys and queries are loaded to shared memory, 64 features at a time. A first pass over the keys
// computes the largest score of each row, a second the weights. Each score, sum of weights and
// element of the result is thus one sum in ascending order, independent of other rows. With a
// running maximum in one pass, or with tensor cores, a row's bits would depend on the boundaries
// of key tiles. Bound: multiply-adds, three for each feature of each pair of a key and a query
// row.
#include "lora_ext/row_attention.h"

#include "launch.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * lx::kWarpSize;
constexpr int kOwn = 4;  // query rows per warp
constexpr int kRows = kWarps * kOwn;
constexpr int kKeys = lx::kWarpSize;
constexpr int kDepth = 64;
constexpr int kKeyStride = kDepth + 1;  // odd, so that the lanes of a warp read different banks

// A query row of a block: offsets of its data, and its range of keys, empty beyond the last row.
struct alignas(16) Row {
    int64_t q = 0, out = 0, mask = 0;  // offsets in elements
    int first = 0, end = 0;
};

// The data of a block, and the pieces of its queries and keys in shared memory.
template <class T>
struct Tile {
    const T *q_data, *k_data;  // k_data: keys of the block's group of heads
    int64_t k_stride;
    int num_keys, width;
    const Row* rows;
    float *q, *keys;   // shared: kRows x kDepth, kKeys x kKeyStride
    int q_depth = -1;  // first feature of the queries in shared memory

    // Computes s[i] = q . k for row i of the warp and for the lane's key, first + lane.
    LX_DEVICE void score(int first, float (&s)[kOwn]) {
        const int rank = lx::thread_rank(), lane = lx::lane_id();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) s[i] = 0;
#pragma unroll 1
        for (int at = 0; at < width; at += kDepth) {
            const int depth = lx::min(kDepth, width - at), d = rank % kDepth;
            lx::syncthreads();  // the previous queries and keys have been read
            if (q_depth != at)
#pragma unroll 4
                for (int r = rank / kDepth; r < kRows; r += kThreads / kDepth) {
                    const bool here = rows[r].first < rows[r].end && d < depth;
                    q[r * kDepth + d] =
                        here ? lx::to_float(lx::load_nc(q_data + rows[r].q + at + d)) : 0.0f;
                }
            q_depth = at;
#pragma unroll 8
            for (int j = rank / kDepth; j < kKeys; j += kThreads / kDepth) {
                const bool here = first + j < num_keys && d < depth;
                const T* const from = k_data + (first + j) * k_stride + at + d;
                keys[j * kKeyStride + d] = here ? lx::to_float(lx::load_nc(from)) : 0.0f;
            }
            lx::syncthreads();
            const float* const own = q + lx::warp_id() * kOwn * kDepth;
#pragma unroll 4
            for (int k = 0; k < depth; ++k) {
                const float key = keys[lane * kKeyStride + k];
#pragma unroll
                for (int i = 0; i < kOwn; ++i) s[i] += own[i * kDepth + k] * key;
            }
        }
    }
};

LX_DEVICE Row row_of(const RowAttentionArgs& args, int64_t b, int64_t g, int64_t at) {
    const int64_t alike = args.heads / args.groups, t = at / alike, head = g * alike + at % alike;
    if (t >= args.rows) return {0, -1, 0, 0, 0};
    const SeenKeys span = span_of(args, b, t);
    return {b * args.q_stride[0] + head * args.q_stride[1] + t * args.q_stride[2],
            ((b * args.rows + t) * args.heads + head) * args.value_width,
            b * args.mask_stride[0] + t * args.mask_stride[1], static_cast<int>(span.first),
            static_cast<int>(span.end)};
}

LX_DEVICE bool sees(const Row& row, const bool* mask, int key) {
    return key >= row.first && key < row.end && (!mask || mask[row.mask + key]);
}

template <class T, int kColumns>  // columns per lane: kColumns * 32 per block
__global__ void __launch_bounds__(kThreads, 4)
    row_attention_kernel(const __grid_constant__ RowAttentionArgs args) {
    constexpr int kWidth = kColumns * lx::kWarpSize;
    LX_SHARED(float, q, kRows* kDepth);
    LX_SHARED(float, keys, kKeys* kKeyStride);
    LX_SHARED(float, values, kKeys* kWidth);
    LX_SHARED(Row, rows, kRows);
    const int64_t blocks = (args.rows * (args.heads / args.groups) + kRows - 1) / kRows;
    const int64_t b = blockIdx.x / blocks / args.groups, g = blockIdx.x / blocks % args.groups;
    const int rank = lx::thread_rank(), lane = lx::lane_id();
    if (rank < kRows) rows[rank] = row_of(args, b, g, blockIdx.x % blocks * kRows + rank);
    lx::syncthreads();
    const Row* const own_rows = rows + lx::warp_id() * kOwn;
    const float scale = static_cast<float>(args.scale);
    const int num_keys = static_cast<int>(args.keys);
    int first_key = num_keys, end_key = 0;  // union of the rows' ranges of keys
    for (int i = 0; i < kRows; ++i)
        if (rows[i].first < rows[i].end) {
            first_key = lx::min(first_key, rows[i].first);
            end_key = lx::max(end_key, rows[i].end);
        }
    Tile<T> tile{static_cast<const T*>(args.q),
                 static_cast<const T*>(args.k) + b * args.k_stride[0] + g * args.k_stride[1],
                 args.k_stride[2],
                 num_keys,
                 static_cast<int>(args.width),
                 rows,
                 q,
                 keys};

    float s[kOwn], top[kOwn], total[kOwn], sum[kOwn][kColumns];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        top[i] = -INFINITY, total[i] = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[i][c] = 0;
    }
#pragma unroll 1
    for (int j = first_key; j < end_key; j += kKeys) {
        tile.score(j, s);
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (sees(own_rows[i], args.mask, j + lane)) top[i] = fmaxf(top[i], s[i] * scale);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int step = lx::kWarpSize / 2; step > 0; step /= 2)
            top[i] = fmaxf(top[i], lx::shfl_xor_sync(lx::kFullMask, top[i], step));

    const int column = static_cast<int>(blockIdx.y) * kWidth;
    const int width = static_cast<int>(args.value_width);
    const T* const v =
        static_cast<const T*>(args.v) + b * args.v_stride[0] + g * args.v_stride[1] + column;
#pragma unroll 1
    for (int j = first_key; j < end_key; j += kKeys) {
        tile.score(j, s);
#pragma unroll
        for (int i = 0; i < kOwn; ++i)  // scores become weights; -1: not a key of this row
            s[i] = sees(own_rows[i], args.mask, j + lane) ? expf(s[i] * scale - top[i]) : -1.0f;
        if (args.width == 0) lx::syncthreads();  // without features, score() has no barrier
#pragma unroll 4
        for (int k = lx::warp_id(); k < kKeys; k += kWarps)
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const int at = c * lx::kWarpSize + lane;
                const bool here = j + k < num_keys && column + at < width;
                values[k * kWidth + at] =
                    here ? lx::to_float(lx::load_nc(v + (j + k) * args.v_stride[2] + at)) : 0.0f;
            }
        lx::syncthreads();
#pragma unroll 1
        for (int k = 0; k < kKeys; ++k) {
            float own[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
                own[c] = values[k * kWidth + c * lx::kWarpSize + lane];
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const float weight = lx::shfl_sync(lx::kFullMask, s[i], k);
                if (weight < 0) continue;  // all lanes take the same branch
                total[i] += weight;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) sum[i][c] += weight * own[c];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        if (own_rows[i].out < 0) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int at = column + c * lx::kWarpSize + lane;
            // The weight of the largest score is 1. The sum of weights is therefore 0 only if a row
            // has no key (the result is 0), or if scores overflow (the result is NaN).
            const bool no_key = total[i] == 0 && top[i] == -INFINITY;
            const float y = no_key ? 0.0f : sum[i][c] / total[i];
            if (at < width) static_cast<T*>(args.out)[own_rows[i].out + at] = lx::from_float<T>(y);
        }
    }
}

void declare_heads([[maybe_unused]] const RowAttentionArgs& args, const void* data,
                   const int64_t (&stride)[3], int64_t heads, int64_t rows, int64_t width) {
    const int64_t size = element_size(args.dtype);
    for (int64_t b = 0; b < args.batch; ++b)
        for (int64_t h = 0; h < heads; ++h) {
            [[maybe_unused]] const char* const from =
                static_cast<const char*>(data) + (b * stride[0] + h * stride[1]) * size;
            if (rows > 0 && width > 0)
                LX_BUF_ROWS(from, stride[2] == 0 ? 1 : rows, width * size, stride[2] * size,
                            lx::Access::kConstant);
        }
}

}  // namespace

LaunchStatus launch_row_attention(const RowAttentionArgs& args, void* stream) {
    const int64_t alike = args.heads / args.groups;
    const int64_t blocks = args.batch * args.groups * ceil_div(args.rows * alike, kRows);
    if (blocks == 0 || args.value_width == 0) return 0;
    const bool narrow = args.value_width <= 2 * lx::kWarpSize;
    const int64_t columns = ceil_div(args.value_width, (narrow ? 2 : 4) * lx::kWarpSize);
    if (blocks > kMaxGridX || columns > 65535) return kInvalidValue;
    declare_heads(args, args.q, args.q_stride, args.heads, args.rows, args.width);
    declare_heads(args, args.k, args.k_stride, args.groups, args.keys, args.width);
    declare_heads(args, args.v, args.v_stride, args.groups, args.keys, args.value_width);
    if (args.spans)
        LX_BUF(args.spans, (args.spans_stride ? args.batch : 1) * args.rows * 16,
               lx::Access::kConstant);
    if (args.mask && args.keys > 0)
        for (int64_t b = 0; b < (args.mask_stride[0] ? args.batch : 1); ++b)
            LX_BUF_ROWS(args.mask + b * args.mask_stride[0], args.mask_stride[1] ? args.rows : 1,
                        args.keys, args.mask_stride[1], lx::Access::kConstant);
    LX_BUF(args.out,
           args.batch * args.rows * args.heads * args.value_width * element_size(args.dtype),
           lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
    return with_dtype(args.dtype, [&]<class T>() {
        return narrow ? LX_LAUNCH((row_attention_kernel<T, 2>), grid, kThreads, 0, stream, args)
                      : LX_LAUNCH((row_attention_kernel<T, 4>), grid, kThreads, 0, stream, args);
    });
}

}  // namespace lora_ext
