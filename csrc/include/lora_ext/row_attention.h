// Attention of one query row at a time over the keys that the row sees:
//
//   out[b, t, h] = sum_j p[j] v[b, g, j],  p = softmax over seen j of scale q[b, h, t] . k[b, g, j]
//
// with g = h / (H / G), the group of heads that shares keys. A row without keys yields zeros.
//
// The bits of a row depend only on its q and on the keys and values that it sees, in their order. A
// score is one sum in ascending order of D; weights are summed in lanes, to which the seen keys are
// assigned in order; an element of the result adds its products key by key. Other rows, unseen
// keys, their number and the number of threads do not change the result.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

// Keys that a query row sees: [first, end) or, if there are holes, the keys in this range that the
// mask selects.
struct SeenKeys {
    int64_t first = 0, end = 0;
    bool holes = false;
};

struct RowAttentionArgs {
    DType dtype = DType::kFloat32;                                 // dtype of q, k, v and out
    int64_t batch = 0, heads = 0, groups = 0, rows = 0, keys = 0;  // B, H, G, T, L
    int64_t width = 0, value_width = 0;                            // D, E
    double scale = 1;
    const void* q = nullptr;  // (B, H, T, D)
    const void* k = nullptr;  // (B, G, L, D)
    const void* v = nullptr;  // (B, G, L, E)
    // Elements between entries of the first three axes; the last axis is contiguous.
    int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};
    void* out = nullptr;  // (B, T, H, E), contiguous

    // Row t sees a key if all given conditions hold. causal: the key is at least T - t - 1
    // positions before the last key; spans: it is in [first, end); mask: its entry is true. The
    // strides over b are 0 if that axis has size 1.
    bool causal = false;
    const int64_t* spans = nullptr;  // (B or 1, T, 2)
    int64_t spans_stride = 0;
    const bool* mask = nullptr;  // (B or 1, T, L)
    int64_t mask_stride[2] = {};

    // Twins only: (B, T), or (1, T) if all sequences see the same keys; written by see.
    SeenKeys* seen = nullptr;
    bool seen_alike = true;
};

// Return the keys that row t of sequence b sees according to causal and spans.
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

// Return the number of rows t in one item of attend. Rows of an item share each load of the keys,
// so an item has as many rows as the cache has space for scores, within limits.
constexpr int64_t attention_block(const RowAttentionArgs& args) {
    constexpr int64_t kMost = 48, kLeast = 12, kScores = 1 << 16;
    const int64_t fit = kScores / (args.keys > 0 ? args.keys : 1);
    const int64_t rows = fit < kLeast ? kLeast : fit > kMost ? kMost : fit;
    const int64_t alike = args.heads / args.groups;
    return rows > alike ? rows / alike : 1;
}

// CPU twins. The split of items over threads does not change the result.
struct RowAttentionCpu {
    // Items are rows of seen.
    void (*see)(const RowAttentionArgs&, int64_t begin, int64_t end);
    // Items are blocks of rows t of a group, (B, G, blocks). `scratch` is per thread, 64-byte
    // aligned.
    void (*attend)(const RowAttentionArgs&, int64_t begin, int64_t end, void* scratch);
    int64_t (*scratch_bytes)(const RowAttentionArgs&);
};

LaunchStatus launch_row_attention(const RowAttentionArgs& args, void* stream);

}  // namespace lora_ext
