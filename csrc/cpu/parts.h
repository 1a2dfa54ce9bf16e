// Iteration over rows of any length, in whole vectors and a partial last one.
#pragma once

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

// Calls f(index, count) for [begin, end), a vector at a time; only the last count may be smaller.
template <typename T, typename F>
LX_INLINE void for_vectors(int64_t begin, int64_t end, F&& f) {
    constexpr int L = kLanes<T>;
    int64_t i = begin;
    for (; i + L <= end; i += L) f(i, int64_t{L});
    if (i < end) f(i, end - i);
}
// Loads the first `count` lanes; the others are zero.
template <typename T>
LX_INLINE Vec<T> load_part(const T* p, int64_t count) {
    return count == kLanes<T> ? load(p) : load_n(p, count);
}
template <typename T>
LX_INLINE void store_part(T* p, Vec<T> v, int64_t count) {
    if (count == kLanes<T>)
        store(p, v);
    else
        store_n(p, v, count);
}

}  // namespace
}  // namespace lora_ext::LX_ISA
