// Code shared by the training kernels: the dropout mask, bounds-checked 16-byte accesses, the rows
// of v in shared memory, and float32 products with split operands.
#pragma once

#include "lora_ext/lora_train.h"
#include "lora_kernels.cuh"
#include "ring.cuh"

namespace lora_ext {

constexpr int kPieceBytes = 16;
constexpr int kTrainRows = 64;   // rows per step
constexpr int kBandBytes = 256;  // bytes per row and step: 128 columns, 64 of float32
constexpr int kBandPieces = kBandBytes / kPieceBytes;
// Rows are an odd number of pieces apart, so eight consecutive rows are in different banks.
constexpr int kBandRow = kBandBytes + kPieceBytes;
template <class T>
constexpr int kBandColumns = kBandBytes / static_cast<int>(sizeof(T));

// The stages of training. Arguments of type `float*` are v, dv, or partial sums of these.
//
// Projection: x A^T or dy B, with the factors of each row's adapter, times scale / (1 - p).
struct Projection {
    LoraArgs lora;  // for side B, lora.x is dy
    LoraDropout dropout;
    float* out;
    int64_t out_row_stride;
};
// Order of a projection's sum over the features: slices of fixed width. On side A, up to rank 256,
// it is the order that sum_order returns; otherwise a slice is one chain of mma.
struct Slices {
    int width, count;
    int per_block;         // slices per block: all or one
    int64_t split_stride;  // elements between partial sums
    bool finished;         // no partial sums: the block multiplies by scale / (1 - p)
    bool x_aligned, w_aligned;
    int ranks_per_stage;
};
// For up to 64 ranks of a 16-bit type, one pass over dy can compute both db and dv, in slices of
// 1024 bytes. If dv is computed without that pass, it is summed over the same slices, so its bits
// are the same.
constexpr int kPassBytes = 1024, kPassRanks = 64;
__host__ __device__ constexpr int pass_slice(int ranks) {
    return ranks <= 16 ? 256 : 512;
}
inline bool pass_sliced(const LoraArgs& args, bool side_b) {
    return side_b && args.dtype != DType::kFloat32 && args.bank.max_rank <= kPassRanks;
}
constexpr int kProjectedRanks = 64;  // ranks per block
// in_pass: return the slices of the pass over dy that also computes db. That pass stores the sum of
// each slice separately.
Slices projection_slices(const LoraArgs& args, bool side_b, bool in_pass = false);
int64_t slices_bytes(const Slices& slices);
int64_t projection_workspace(const LoraArgs& args, bool side_b);
LaunchStatus run_projection(const Projection& args, bool side_b, void* workspace, void* stream);
// Computes the projection of side A. Unless slices.finished, it stores the sums of the slices,
// which the caller adds (by sum_slices in training, by expand in serving).
LaunchStatus run_shrink_rows(const Projection& args, const Slices& slices, void* stream);
// Steps of run_projection: choose the kernel's output, declare its buffers, and sum the slices.
Projection projection_step(const Projection& args, const Slices& slices, void* workspace);
void declare_projection(const Projection& step, const Slices& slices, bool side_b);
LaunchStatus sum_slices(const Projection& args, const Projection& step, const Slices& slices,
                        void* stream);
LX_DEVICE float projection_factor(const Projection& args, int slot) {
    return args.dropout.inverse_keep * (args.lora.bank.scale ? args.lora.bank.scale[slot] : 1.0f);
}

// Gradient of a factor of each adapter: the sum of v[t, :]^T x[t, :] over the adapter's rows t.
struct Gradient {
    const void* x;  // x, to which the mask applies, or dy
    int64_t x_row_stride;
    int32_t width;
    LoraDropout dropout;
    const float* v;  // dv, or v
    int64_t v_row_stride;
    const int32_t* plan;
    const int32_t* ranks;
    int64_t num_tokens;
    int32_t num_adapters, max_rank;
    DType dtype;
    void* out;  // (A, R, width), or (A, width, R)
    bool rank_major;
};
int64_t gradient_workspace(const Gradient& args);
// beside: if given, the projection of side B, which the same pass over dy computes.
LaunchStatus run_gradient(const Gradient& args, void* workspace, void* stream,
                          const Projection* beside = nullptr);
constexpr int64_t kMostParts = 256 << 20;  // bytes of partial sums; above, two passes over dy
int64_t one_pass_workspace(const Gradient& args, const LoraArgs& side_b);
bool takes_one_pass(const Gradient& args, const LoraArgs& side_b);

// With factors (lora_train.h), dv contains u = dy b[s] on entry. Adds the inner products of u and v
// to dweights, if it is given, and replaces u by dv = (c * u) * w.
LaunchStatus run_weigh_back(const LoraTrainArgs& args, void* stream);

// dx[t, :] += mask * (dv[t, :] A)
LaunchStatus run_input_gradient(const LoraTrainArgs& args, void* stream);

// Launchers of the same stages for large ranks with enough rows or tiles; they launch the kernels
// of lora_gemm.cuh and lora_gemm_weights.cu. The caller must have declared the buffers.
LaunchStatus run_gemm_projection(const Projection& args, bool side_b, const Slices& slices,
                                 void* stream);
LaunchStatus run_gemm_input_gradient(const LoraTrainArgs& args, void* stream);

LaunchStatus run_gemm_gradient(const Gradient& args, void* stream);

// Columns per block of run_gemm_gradient. A block sums all rows of its adapter, so the kernel is
// used only if the blocks of one adapter fill half of an H100's multiprocessors (half is an
// estimate). The condition is the same for every device, because the two kernels add in different
// orders.
constexpr int gradient_columns(bool tf32) {
    return tf32 ? 64 : 128;
}
inline bool gradient_takes_gemm(const Gradient& args) {
    const int64_t bands = ceil_div(args.width, gradient_columns(args.dtype != DType::kBFloat16));
    return args.max_rank > kFusedRank && bands * ceil_div(args.max_rank, kGemmColumns) >= 64;
}

inline bool takes_gemm(const LoraArgs& args) {
    return large_rank(args.bank) && lora_chunk_rows(args.num_tokens) >= kTrainRows;
}

// ------------------------------------------------------------------------------------------------
// Dropout

struct Philox {
    uint32_t key[2];
    uint32_t column;  // column of the adapter ids (T, K)

    // Returns the result of ten rounds on the counter {row, quad, column, 0}.
    LX_DEVICE uint4 operator()(uint32_t row, uint32_t quad) const {
        uint32_t c0 = row, c1 = quad, c2 = column, c3 = 0, k0 = key[0], k1 = key[1];
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(p1);
            c3 = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        return {c0, c1, c2, c3};
    }
};

// The dropout mask of rows of one adapter.
struct Mask {
    Philox philox;
    uint32_t threshold;  // 0: all elements are kept
    bool by_place;       // rows are counted within the adapter, not within the batch
    int first;           // index of the first row within the adapter

    LX_DEVICE uint32_t row(int i, int in_batch) const {
        return static_cast<uint32_t>(by_place ? first + i : in_batch);
    }
};

LX_DEVICE Mask mask_of(const LoraDropout& dropout, int slot, int first) {
    if (dropout.threshold == 0) return {};
    const uint64_t seed = static_cast<uint64_t>(dropout.seed[dropout.per_adapter ? slot : 0]);
    return {{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, dropout.column},
            dropout.threshold,
            dropout.per_adapter,
            first};
}
// Returns the mask of the rows of a tile.
LX_DEVICE Mask mask_of(const LoraDropout& dropout, const LoraArgs& args, const Tiling& tiling,
                       const RowTile& tile) {
    if (!dropout.per_adapter) return mask_of(dropout, tile.slot, 0);
    const int32_t* const slot_begin = args.plan + tiling.perm + args.num_tokens;  // after perm
    return mask_of(dropout, tile.slot, tile.first - slot_begin[tile.slot]);
}

inline void declare_seed([[maybe_unused]] const LoraDropout& dropout,
                         [[maybe_unused]] int32_t num_adapters) {
    if (dropout.threshold)
        LX_BUF(dropout.seed, 8 * (dropout.per_adapter ? num_adapters : 1), lx::Access::kConstant);
}

// Sets keep[i] to whether the mask keeps element column + i of the row. `column` is a multiple of
// 4.
template <int kCount>
LX_DEVICE void keep_elements_of(const Mask& mask, uint32_t row, int column, bool (&keep)[kCount]) {
    const uint32_t threshold = mask.threshold;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        const uint4 word = mask.philox(row, static_cast<uint32_t>(column + i) / 4);
        keep[i] = word.x >= threshold;
        keep[i + 1] = word.y >= threshold;
        keep[i + 2] = word.z >= threshold;
        keep[i + 3] = word.w >= threshold;
    }
}

// Returns `words` with dropped elements set to zero, even if they are NaN.
template <class T>
LX_DEVICE uint4 drop_elements(const uint4& words, const bool (&keep)[kVec<T>]) {
    uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
            w[i] &= (keep[2 * i] ? 0xffffu : 0u) | (keep[2 * i + 1] ? 0xffff0000u : 0u);
        } else {
            w[i] = keep[i] ? w[i] : 0u;
        }
    }
    return {w[0], w[1], w[2], w[3]};
}

// Applies the mask to 16 bytes of shared memory. The thread that copied them must call this.
template <class T>
LX_DEVICE void drop_piece(void* piece, const Mask& mask, uint32_t row, int column) {
    bool keep[kVec<T>];
    keep_elements_of(mask, row, column, keep);
    uint4& words = *static_cast<uint4*>(piece);
    words = drop_elements<T>(words, keep);
}

// ------------------------------------------------------------------------------------------------
// Pieces

// Copies n elements (n clamped to [0, kVec]) to shared memory, followed by zeros: by cp.async if
// `aligned`, which is the same for all pieces of a tensor. If n <= 0, `from` is not read.
template <class T>
LX_DEVICE void copy_piece(void* to, const T* from, int n, bool aligned) {
    n = lx::min(lx::max(n, 0), kVec<T>);
    if (aligned) {
        lx::cp_async<kPieceBytes>(to, from, n * static_cast<int>(sizeof(T)));
    } else {
        *static_cast<uint4*>(to) = load_words<T, false>(from, n);
    }
}

// Load or store the first n elements of 16 bytes, in memory that this launch may also write.
template <class T>
LX_DEVICE uint4 load_piece(const T* p, int n, bool aligned) {
    if (n >= kVec<T> && aligned) return *reinterpret_cast<const uint4*>(p);
    T e[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) e[i] = i < n ? p[i] : lx::from_float<T>(0);
    return words_of(e);
}
template <class T>
LX_DEVICE void store_piece(T* p, int n, bool aligned, const uint4& words) {
    if (n >= kVec<T> && aligned) {
        *reinterpret_cast<uint4*>(p) = words;
        return;
    }
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
        if (i >= n) continue;
        if constexpr (sizeof(T) == 2) {
            p[i] = lx::bit_cast<T>(static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2))));
        } else {
            p[i] = lx::bit_cast<T>(w[i]);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// v in shared memory: kTrainRows rows with 32 bytes, eight floats, for each page of ranks. With
// bfloat16, the eight floats are replaced in place by eight high parts, then eight low parts.

__host__ __device__ constexpr int v_row_bytes(int pages) {
    return (2 * pages + 1) * kPieceBytes;
}

template <class T>
struct VTile {
    unsigned char* data;
    int pages, row_bytes;

    LX_DEVICE VTile(unsigned char* at, int num_pages)
        : data(at), pages(num_pages), row_bytes(v_row_bytes(num_pages)) {}
    LX_DEVICE unsigned char* at(int row, int page) const {
        return data + row * row_bytes + page * 2 * kPieceBytes;
    }
    // Copies an item (row, page), which the same thread splits after it has waited for the copy.
    // `ranks`: number of valid ranks, counted from the first rank of the page.
    LX_DEVICE void copy(int row, int page, const float* from, int ranks, bool aligned) const {
        copy_piece<float>(at(row, page), from, ranks, aligned);
        copy_piece<float>(at(row, page) + kPieceBytes, ranks > 4 ? from + 4 : from, ranks - 4,
                          aligned);
    }
    LX_DEVICE void split(int row, int page) const {
        if constexpr (std::is_same_v<T, lx::bf16>) {
            float4* const p = reinterpret_cast<float4*>(at(row, page));
            const float4 first = p[0], second = p[1];
            const float v[8] = {first.x,  first.y,  first.z,  first.w,
                                second.x, second.y, second.z, second.w};
            uint32_t high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                high[i] = lx::pack_floats<T>(v[2 * i], v[2 * i + 1]);
                const float2 h = lx::unpack_floats<T>(high[i]);
                low[i] = lx::pack_floats<T>(v[2 * i] - h.x, v[2 * i + 1] - h.y);
            }
            uint4* const parts = reinterpret_cast<uint4*>(p);
            parts[0] = {high[0], high[1], high[2], high[3]};
            parts[1] = {low[0], low[1], low[2], low[3]};
        }
    }
};

// ------------------------------------------------------------------------------------------------
// Products of floats: each float is high + low in tf32. A float16 value equals its high part.

// Computes d += a b (m16n8k8). An exact operand has no low part; the product of both low parts is
// dropped.
template <bool kExactA, bool kExactB>
LX_DEVICE void mma_floats(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a_high[i] = kExactA ? lx::bit_cast<uint32_t>(a[i]) : lx::to_tf32(a[i]);
        a_low[i] = kExactA ? 0 : lx::to_tf32(a[i] - lx::bit_cast<float>(a_high[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        b_high[i] = kExactB ? lx::bit_cast<uint32_t>(b[i]) : lx::to_tf32(b[i]);
        b_low[i] = kExactB ? 0 : lx::to_tf32(b[i] - lx::bit_cast<float>(b_high[i]));
    }
    float part[4] = {};
    if constexpr (!kExactA) lx::mma_m16n8k8_tf32(part, a_low, b_high);
    if constexpr (!kExactB) lx::mma_m16n8k8_tf32(part, a_high, b_low);
    lx::mma_m16n8k8_tf32(part, a_high, b_high);
    add_part(d, part);
}

}  // namespace lora_ext
