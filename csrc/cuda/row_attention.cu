// Attention in which each query row has a separate range of keys; row_attention.h has the formula.
//
// A block computes 32 query rows, ordered (t, head), of the heads that share keys, and up to 128
// features of their values. A warp has eight of the rows and 32 keys at a time, one key per lane;
// in the sums of values, a lane has up to four features. Queries stay in shared memory; keys, and
// after them their values, use one buffer in turn. Rows are loaded 16 bytes at a time. A first pass
// over the keys computes the largest score of each row, a second pass the weights. Each score, each
// sum of weights and each element of the result is thus one sum in ascending order of the keys or
// features, independent of other rows. With a running maximum in one pass, or with tensor cores, a
// row's bits would depend on the boundaries of key tiles. Bound: multiply-adds, three for each
// feature of each pair of a key and a query row.
#include "lora_ext/row_attention.h"

#include "circuit_walk.cuh"  // pieces of 16 bytes
#include "launch.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * lx::kWarpSize;
constexpr int kOwn = 8;  // query rows per warp
constexpr int kRows = kWarps * kOwn;
constexpr int kKeys = lx::kWarpSize;

// A query row of a block: offsets of its data, and its range of keys, empty beyond the last row.
struct alignas(16) Row {
    int64_t q = 0, out = 0, mask = 0;  // offsets in elements
    int first = 0, end = 0;
};

// Loads 32 rows of `width` elements, at most kWidth, to shared memory as floats. row(r) returns row
// r. If `aligned`, rows consist of whole, aligned pieces of 16 bytes, and columns of shared memory
// beyond the width are filled with copies of the first piece, which no result uses. Otherwise these
// columns are filled with zeros.
template <int kWidth, class F>
LX_DEVICE void load_rows(float* to, int stride, int width, bool aligned, F&& row) {
    using T = std::remove_cvref_t<decltype(*row(0))>;
    constexpr int kSize = kPiece<T>, kAcross = kWidth / kSize, kDown = kThreads / kAcross;
    constexpr int kTurns = 32 / kDown, kBatch = kTurns < 4 ? kTurns : 4;
    const int column = lx::thread_rank() % kAcross * kSize;
    const int first = lx::thread_rank() / kAcross;
    const auto store = [&](int turn, const float (&v)[kSize]) {
        float* const at = to + (first + turn * kDown) * stride + column;
#pragma unroll
        for (int j = 0; j < kSize; j += 4)
            *reinterpret_cast<float4*>(at + j) = {v[j], v[j + 1], v[j + 2], v[j + 3]};
    };
    if (!aligned) {
#pragma unroll 1
        for (int turn = 0; turn < kTurns; ++turn) {
            const T* const from = row(first + turn * kDown) + column;
            float v[kSize];
#pragma unroll
            for (int j = 0; j < kSize; ++j)
                v[j] = column + j < width ? lx::to_float(lx::load_nc(from + j)) : 0.0f;
            store(turn, v);
        }
        return;
    }
    const int from = column < width ? column : 0;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn += kBatch) {
        uint4 words[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            words[i] =
                lx::load_nc(reinterpret_cast<const uint4*>(row(first + (turn + i) * kDown) + from));
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            float v[kSize];
            unpack_piece<T>(words[i], v);
            store(turn + i, v);
        }
    }
}

// The data of a block, and the pieces of its queries and keys in shared memory.
template <class T, int kWidth>
struct Tile {
    // Four floats more than a piece, so that eight lanes that read four floats each of different
    // keys access different banks.
    static constexpr int kKeyStride = kWidth + 4;

    const T *q_data, *k_data;  // k_data: keys of the block's group of heads
    int64_t k_stride;
    int num_keys, width;
    bool aligned;
    const Row* rows;
    float *q, *keys;    // shared: kRows x kWidth, kKeys x kKeyStride
    bool computes;      // whether the warp has a row
    int q_column = -1;  // first feature of the queries in shared memory

    // Computes s[i] = q . k for row i of the warp and for the lane's key, first + lane.
    LX_DEVICE void score(int first, float (&s)[kOwn]) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) s[i] = 0;
#pragma unroll 1
        for (int at = 0; at < width; at += kWidth) {
            const int count = lx::min(kWidth, width - at);
            lx::syncthreads();  // the previous queries, keys and values have been read
            if (q_column != at)
                load_rows<kWidth>(q, kWidth, count, aligned,
                                  [&](int r) { return q_data + rows[r].q + at; });
            q_column = at;
            load_rows<kWidth>(keys, kKeyStride, count, aligned, [&](int j) {
                return k_data + lx::min(first + j, num_keys - 1) * k_stride + at;
            });
            lx::syncthreads();
            if (!computes) continue;
            const float* own = q + lx::warp_id() * kOwn * kWidth;
            const float* key = keys + lx::lane_id() * kKeyStride;
            const float* const end = key + count;
#pragma unroll 1
            for (; key < end; key += 4, own += 4) {
                const float4 b = *reinterpret_cast<const float4*>(key);
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    const float4 a = *reinterpret_cast<const float4*>(own + i * kWidth);
                    s[i] += a.x * b.x;
                    s[i] += a.y * b.y;
                    s[i] += a.z * b.z;
                    s[i] += a.w * b.w;
                }
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

// Returns a bit mask of the warp's rows that see the key.
LX_DEVICE unsigned rows_that_see(const Row* rows, const bool* mask, int key) {
    unsigned seen = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
        seen |= static_cast<unsigned>(key >= rows[i].first && key < rows[i].end) << i;
    if (mask) {
#pragma unroll 1
        for (int i = 0; i < kOwn; ++i)
            if (seen >> i & 1 && !mask[rows[i].mask + key]) seen ^= 1u << i;
    }
    return seen;
}

// Adds weight x value for 32 keys, in ascending order, to the sums of the warp's rows, in the
// lane's columns; `total` is the sum of the weights of row lane % kOwn. Unless kFull, a negative
// weight marks a key that a row does not see.
template <bool kFull, int kColumns>
LX_DEVICE void add_values(const float* weights, const float* values, int stride, float& total,
                          float (&sum)[kOwn][kColumns]) {
    const float* const of_total = weights + lx::lane_id() % kOwn;
#pragma unroll 2
    for (int k = 0; k < kKeys; ++k) {
        float weight[kOwn], own[kColumns];
#pragma unroll
        for (int i = 0; i < kOwn; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(weights + k * kOwn + i);
            weight[i] = four.x, weight[i + 1] = four.y;
            weight[i + 2] = four.z, weight[i + 3] = four.w;
        }
#pragma unroll
        for (int c = 0; c < kColumns; c += 2) {
            const float2 two = *reinterpret_cast<const float2*>(values + k * stride + c);
            own[c] = two.x, own[c + 1] = two.y;
        }
        const float next = of_total[k * kOwn];
        if (kFull || !(next < 0)) total += next;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (!kFull && weight[i] < 0) continue;  // all lanes take the same branch
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[i][c] += weight[i] * own[c];
        }
    }
}

template <class T, int kColumns>  // columns per lane: kColumns * 32 per block
__global__ void __launch_bounds__(kThreads, 4)
    row_attention_kernel(const __grid_constant__ RowAttentionArgs args, bool aligned) {
    constexpr int kWidth = kColumns * lx::kWarpSize, kStride = Tile<T, kWidth>::kKeyStride;
    LX_SHARED(float, q, kRows* kWidth);
    LX_SHARED(float, piece, kKeys* kStride);  // holds keys, then their values
    LX_SHARED(float, all_weights, kRows* kKeys);
    LX_SHARED(float, all_tops, kRows);
    LX_SHARED(Row, rows, kRows);
    const int64_t blocks = (args.rows * (args.heads / args.groups) + kRows - 1) / kRows;
    const int64_t b = blockIdx.x / blocks / args.groups, g = blockIdx.x / blocks % args.groups;
    const int rank = lx::thread_rank(), lane = lx::lane_id();
    if (rank < kRows) rows[rank] = row_of(args, b, g, blockIdx.x % blocks * kRows + rank);
    lx::syncthreads();
    const Row* const own_rows = rows + lx::warp_id() * kOwn;
    float* const weights = all_weights + lx::warp_id() * kOwn * kKeys;  // [key][row] of the warp
    const float scale = static_cast<float>(args.scale);
    const int num_keys = static_cast<int>(args.keys);
    int first_key = num_keys, end_key = 0;  // union of the rows' ranges of keys
#pragma unroll 1
    for (int i = 0; i < kRows; ++i)
        if (rows[i].first < rows[i].end) {
            first_key = lx::min(first_key, rows[i].first);
            end_key = lx::max(end_key, rows[i].end);
        }
    Tile<T, kWidth> tile{
        static_cast<const T*>(args.q),
        static_cast<const T*>(args.k) + b * args.k_stride[0] + g * args.k_stride[1],
        args.k_stride[2],
        num_keys,
        static_cast<int>(args.width),
        aligned,
        rows,
        q,
        piece,
        own_rows[0].out >= 0};

    float s[kOwn], top[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) top[i] = -INFINITY;
#pragma unroll 1
    for (int j = first_key; j < end_key; j += kKeys) {
        tile.score(j, s);
        const unsigned seen = rows_that_see(own_rows, args.mask, j + lane);
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            top[i] = fmaxf(top[i], seen >> i & 1 ? s[i] * scale : -INFINITY);
    }
    float* const tops = all_tops + lx::warp_id() * kOwn;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int step = lx::kWarpSize / 2; step > 0; step /= 2)
            top[i] = fmaxf(top[i], lx::shfl_xor_sync(lx::kFullMask, top[i], step));
        if (lane == 0) tops[i] = top[i];
    }
    lx::syncwarp();

    float total = 0, sum[kOwn][kColumns] = {};

    const int column = static_cast<int>(blockIdx.y) * kWidth;
    const int width = static_cast<int>(args.value_width);
    const T* const v =
        static_cast<const T*>(args.v) + b * args.v_stride[0] + g * args.v_stride[1] + column;
#pragma unroll 1
    for (int j = first_key; j < end_key; j += kKeys) {
        tile.score(j, s);
        const unsigned seen = rows_that_see(own_rows, args.mask, j + lane);
        const bool full = lx::all_sync(lx::kFullMask, seen == (1u << kOwn) - 1);
#pragma unroll
        for (int i = 0; i < kOwn; ++i)  // scores become weights; -1: not a key of this row
            s[i] = seen >> i & 1 ? expf(s[i] * scale - tops[i]) : -1.0f;
#pragma unroll
        for (int i = 0; i < kOwn; i += 4)
            *reinterpret_cast<float4*>(weights + lane * kOwn + i) = {s[i], s[i + 1], s[i + 2],
                                                                     s[i + 3]};
        lx::syncthreads();  // the keys have been read
        load_rows<kWidth>(piece, kStride, width - column, aligned, [&](int k) {
            return v + lx::min(j + k, num_keys - 1) * args.v_stride[2];
        });
        lx::syncthreads();
        if (!tile.computes) continue;
        const float* const values = piece + lane * kColumns;
        if (full)
            add_values<true>(weights, values, kStride, total, sum);
        else
            add_values<false>(weights, values, kStride, total, sum);
        lx::syncwarp();  // the weights have been read
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const float whole = lx::shfl_sync(lx::kFullMask, total, i), largest = tops[i];
        if (own_rows[i].out < 0) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int at = column + lane * kColumns + c;
            // The weight of the largest score is 1. The sum of weights is therefore 0 only if a row
            // has no key (the result is 0), or if scores overflow (the result is NaN).
            const bool no_key = whole == 0 && largest == -INFINITY;
            const float y = no_key ? 0.0f : sum[i][c] / whole;
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
    const bool narrow = lx::max(args.width, args.value_width) <= 2 * lx::kWarpSize;
    const int64_t size = element_size(args.dtype);
    const auto whole = [&](const void* data, const int64_t (&stride)[3], int64_t width) {
        return aligned_16(data, {stride[0], stride[1], stride[2], width}, size);
    };
    const bool aligned = whole(args.q, args.q_stride, args.width) &&
                         whole(args.k, args.k_stride, args.width) &&
                         whole(args.v, args.v_stride, args.value_width);
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
    LX_BUF(args.out, args.batch * args.rows * args.heads * args.value_width * size,
           lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
    return with_dtype(args.dtype, [&]<class T>() {
        return narrow ? LX_LAUNCH((row_attention_kernel<T, 2>), grid, kThreads, 0, stream, args,
                                  aligned)
                      : LX_LAUNCH((row_attention_kernel<T, 4>), grid, kThreads, 0, stream, args,
                                  aligned);
    });
}

}  // namespace lora_ext
