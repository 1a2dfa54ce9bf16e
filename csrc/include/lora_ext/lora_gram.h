// Inner products of adapters: Gram matrices of their factors, for any number of adapters of any
// shapes in one call.
//
//   gram_a = a a^T, sums over I        a (r, I), I contiguous
//   gram_b = b^T b, sums over O        b (O, r), r contiguous
//   stats  = sum over (i, j) of gram_a[i, j] times each of
//            b^T b, p^T p, p^T b, (p - b)^T (p - b)        p (O, r), r contiguous
//
// With D = b a and PD = p a, which nobody forms, stats = (|D|^2, |PD|^2, <PD, D>, |PD - D|^2). The
// last comes from p - b itself: |D|^2 + |PD|^2 - 2 <PD, D> would cancel.
//
// The order of every sum depends on the adapter's own sizes alone (of twins, on the instruction set
// too), never on threads, nor on the adapters beside it. An element of a Gram matrix and its mirror
// image are one sum.
//
// Source: SPLoRA (TACL 2025), the distance of an update to its projection, by the identity
// <b1 a1, b2 a2> = <b2^T b1, a2 a1^T>.
#pragma once

#include "lora_ext/common.h"

namespace lora_ext {

constexpr int64_t kGramTile = 64;  // a tile of results is so many ranks high and wide

struct GramAdapter {
    const void *a = nullptr, *b = nullptr, *p = nullptr;  // only stats have p
    // Of grams, both are (r, r), contiguous, in the type of sums. Of stats, gram_a has four doubles
    // for each item, which the caller adds up, and gram_b is not there.
    void *gram_a = nullptr, *gram_b = nullptr;
    int32_t a_stride = 0, b_stride = 0, p_stride = 0;  // elements between rows
    int32_t in_features = 0, out_features = 0, rank = 0;
};

struct GramArgs {
    DType dtype = DType::kFloat32;  // all factors have it
    bool float64 = false;           // whether grams are summed in float64, as stats always are
    const GramAdapter* adapters = nullptr;
    int64_t num_adapters = 0;
    int64_t items = 0;  // each adapter is given as many as the largest one has
};

LX_HOST_DEVICE constexpr int64_t gram_tiles(int64_t rank) {
    return (rank + kGramTile - 1) / kGramTile;
}
// Items of an adapter: tiles of the lower half of gram_a, then those of gram_b.
LX_HOST_DEVICE constexpr int64_t gram_items(int64_t rank) {
    return gram_tiles(rank) * (gram_tiles(rank) + 1);
}
// Items of an adapter: tiles of the lower half, in the order of grams; each has four doubles of its
// own. One that is off the diagonal stands for its mirror image too.
LX_HOST_DEVICE constexpr int64_t pair_items(int64_t rank) {
    return gram_items(rank) / 2;
}

// The place of an item; those of stats are the first half of those of grams.
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

// Both do items [begin, end) of num_adapters * items, and pass over those that an adapter has not.
struct GramCpu {
    void (*gram)(const GramArgs&, int64_t begin, int64_t end);
    void (*pair_stats)(const GramArgs&, int64_t begin, int64_t end);
};

// There is one launch for every 500 adapters, and their table travels with it by value.
LaunchStatus launch_lora_gram(const GramArgs& args, void* stream);
LaunchStatus launch_lora_pair_stats(const GramArgs& args, void* stream);

}  // namespace lora_ext
