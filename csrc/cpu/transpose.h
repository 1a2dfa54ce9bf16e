// Square blocks of numbers, as many rows as a vector has lanes, transposed in registers. Built on
// vec.h and, as that, per instruction set.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct LanesBelow : LanesBelow<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesBelow<0, kLane...> {
    using type = LaneList<kLane...>;
};

// Of two rows whose numbers differ in bit kBit, what belongs to the one without it and with it.
template <int kBit, typename V, int... kLane>
LX_INLINE void exchange(V& low, V& high, LaneList<kLane...>) {
    constexpr int L = sizeof...(kLane);
    const V first =
        __builtin_shufflevector(low, high, (kLane & kBit ? (kLane ^ kBit) + L : kLane)...);
    high = __builtin_shufflevector(low, high, (kLane & kBit ? kLane + L : kLane ^ kBit)...);
    low = first;
}
template <int kBit, typename A>
LX_INLINE void exchange_rows(Vec<A> (&r)[kLanes<A>]) {
    constexpr int L = kLanes<A>;
    if constexpr (kBit < L) {
        for (int i = 0; i < L; ++i)
            if (!(i & kBit)) exchange<kBit>(r[i], r[i | kBit], typename LanesBelow<L>::type{});
        exchange_rows<2 * kBit, A>(r);
    }
}
// to[j][i] = from[i][j]; both strides count numbers.
template <typename A>
LX_INLINE void transpose(const A* from, int64_t from_row, A* to, int64_t to_row) {
    constexpr int L = kLanes<A>;
    Vec<A> r[L];
    for (int i = 0; i < L; ++i) r[i] = load(from + i * from_row);
    exchange_rows<1, A>(r);
    for (int i = 0; i < L; ++i) store(to + i * to_row, r[i]);
}

}  // namespace
}  // namespace lora_ext::LX_ISA
