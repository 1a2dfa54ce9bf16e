// Inner products of adapters: Gram matrices of their factors, for any number of adapters of any
// shapes in one call.
//
//   gram_a = a a^T, sums over I        a (r, I), I contiguous
//   gram_b = b^T b, sums over O        b (O, r), r contiguous
//   stats  = sum over (i, j) of gram_a[i, j] times each of
//            b^T b, p^T p, p^T b, (p - b)^T (p - b)        p (O, r), r contiguous
//
// With D = b a and PD = p a, which are never formed, stats = (|D|^2, |PD|^2, <PD, D>, |PD - D|^2).
// The last is computed from p - b itself: |D|^2 + |PD|^2 - 2 <PD, D> would cancel.
//
// The order of every sum depends only on the adapter's own sizes (for CPU twins also on the
// instruction set), never on threads or on other adapters. An element of a Gram matrix and its
// mirror image are computed as one sum.
//
// Source: SPLoRA (TACL 2025), the distance of an update to its projection, by the identity
// <b1 a1, b2 a2> = <b2^T b1, a2 a1^T>.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

constexpr int64_t kGramTile = 64;  // ranks per side of a tile of results

struct GramAdapter {
    const void *a = nullptr, *b = nullptr, *p = nullptr;  // p: for stats only
    // gram: both (r, r), contiguous, in the type of sums. stats: gram_a has four doubles per item,
    // which the caller adds up, and gram_b is nullptr.
    void *gram_a = nullptr, *gram_b = nullptr;
    int32_t a_stride = 0, b_stride = 0, p_stride = 0;  // elements between rows
    int32_t in_features = 0, out_features = 0, rank = 0;
};

struct GramArgs {
    DType dtype = DType::kFloat32;  // dtype of all factors
    bool float64 = false;           // true if grams are summed in float64, as stats always are
    const GramAdapter* adapters = nullptr;
    int64_t num_adapters = 0;
    int64_t items = 0;  // items per adapter, as many as the largest adapter has
};

LX_HOST_DEVICE constexpr int64_t gram_tiles(int64_t rank) {
    return (rank + kGramTile - 1) / kGramTile;
}
// Return the number of items of an adapter: tiles of the lower half of gram_a, then of gram_b.
LX_HOST_DEVICE constexpr int64_t gram_items(int64_t rank) {
    return gram_tiles(rank) * (gram_tiles(rank) + 1);
}
// Return the number of items of an adapter for stats: tiles of the lower half, in the order of
// grams, each with four doubles. An off-diagonal tile also counts for its mirror image.
LX_HOST_DEVICE constexpr int64_t pair_items(int64_t rank) {
    return gram_items(rank) / 2;
}

// Position of an item. The items for stats are the first half of the items for Gram matrices.
struct GramTile {
    bool of_b;
    int64_t row, column;  // first ranks
};
LX_HOST_DEVICE constexpr GramTile gram_tile(int64_t item, int64_t rank) {
    const int64_t half = gram_items(rank) / 2;
    int64_t place = item % half, row = 0;
    for (; place > row; ++row) place -= row + 1;
    return {item >= half, row * kGramTile, place * kGramTile};
}

// Both functions compute items [begin, end) of num_adapters * items, and skip items that an adapter
// does not have.
struct GramCpu {
    void (*gram)(const GramArgs&, int64_t begin, int64_t end);
    void (*pair_stats)(const GramArgs&, int64_t begin, int64_t end);
};

// Each launches one kernel per 500 adapters, whose table is passed by value.
LaunchStatus launch_lora_gram(const GramArgs& args, void* stream);
LaunchStatus launch_lora_pair_stats(const GramArgs& args, void* stream);

}  // namespace lora_ext
