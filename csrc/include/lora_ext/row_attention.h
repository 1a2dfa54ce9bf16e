// Attention with one query row at a time over the keys that it sees:
//
//   out[b, t, h] = sum_j p[j] v[b, g, j],  p = softmax over seen j of scale q[b, h, t] . k[b, g, j]
//
// with g = h / (H / G), the group of heads that shares keys. A row without keys gives zeros.
//
// A row's bits depend on its q and on the keys and values that it sees, in their order, alone: a
// score is one sum in ascending order of D; the weights are added up in lanes that count seen keys;
// an element of the result takes up its products key by key. So neither other rows nor keys that a
// row does not see, nor the number of either, nor threads change a bit.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

// The keys that a row of queries sees: [first, end), or those of them that the mask names.
struct SeenKeys {
    int64_t first = 0, end = 0;
    bool holes = false;
};

struct RowAttentionArgs {
    DType dtype = DType::kFloat32;                                 // of q, k, v and out
    int64_t batch = 0, heads = 0, groups = 0, rows = 0, keys = 0;  // B, H, G, T, L
    int64_t width = 0, value_width = 0;                            // D, E
    double scale = 1;
    const void* q = nullptr;  // (B, H, T, D)
    const void* k = nullptr;  // (B, G, L, D)
    const void* v = nullptr;  // (B, G, L, E)
    // Elements between entries of the first three axes; the last one is contiguous.
    int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};
    void* out = nullptr;  // (B, T, H, E), contiguous

    // What each row sees: of the keys up to T - t - 1 from the last (causal), of [first, end) in
    // spans, of those that are true in mask, all that hold. Strides of b are 0 where B is 1 there.
    bool causal = false;
    const int64_t* spans = nullptr;  // (B or 1, T, 2)
    int64_t spans_stride = 0;
    const bool* mask = nullptr;  // (B or 1, T, L)
    int64_t mask_stride[2] = {};

    // Of the twins: (B, T), or (1, T) where all sequences see alike; written by see.
    SeenKeys* seen = nullptr;
    bool seen_alike = true;
};

// What causal and spans let row t of sequence b see.
LX_HOST_DEVICE constexpr SeenKeys span_of(const RowAttentionArgs& args, int64_t b, int64_t t) {
    SeenKeys span{0, args.keys, false};
    const int64_t last = t + 1 + args.keys - args.rows;
    if (args.causal && last < span.end) span.end = last;
    if (args.spans) {
        const int64_t* const own = args.spans + b * args.spans_stride + 2 * t;
        if (own[0] > 0) span.first = own[0];
        if (own[1] < span.end) span.end = own[1];
    }
    return span.first < span.end ? span : SeenKeys{};
}

// Rows t that one item of attend takes: as many as share a reading of the keys while their scores
// stay in the cache.
constexpr int64_t attention_block(const RowAttentionArgs& args) {
    constexpr int64_t kMost = 48, kLeast = 12, kScores = 1 << 16;
    const int64_t fit = kScores / (args.keys > 0 ? args.keys : 1);
    const int64_t rows = fit < kLeast ? kLeast : fit > kMost ? kMost : fit;
    const int64_t alike = args.heads / args.groups;
    return rows > alike ? rows / alike : 1;
}

// CPU twins. No bit depends on how items are split.
struct RowAttentionCpu {
    // Items are rows of seen.
    void (*see)(const RowAttentionArgs&, int64_t begin, int64_t end);
    // Items are blocks of rows t of a group, (B, G, blocks). `scratch`, on 64 bytes, is the calling
    // thread's.
    void (*attend)(const RowAttentionArgs&, int64_t begin, int64_t end, void* scratch);
    int64_t (*scratch_bytes)(const RowAttentionArgs&);
};

LaunchStatus launch_row_attention(const RowAttentionArgs& args, void* stream);

}  // namespace lora_ext
