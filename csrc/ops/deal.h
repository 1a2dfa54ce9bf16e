// Dynamic distribution of items of very different cost over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace lora_ext {

// Calls f(begin, end) for parts of [0, items); a thread that finishes a part takes the next one.
// The items of each group of `together` adjacent items share work. If there are enough items for
// four groups per thread, the size of a part is therefore a multiple of `together`.
template <typename F>
void deal_items(int64_t items, int64_t together, const F& f) {
    const int64_t threads = at::get_num_threads();
    const int64_t fair = items / (4 * threads);
    const int64_t hand = fair < together ? std::max<int64_t>(fair, 1) : fair - fair % together;
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(hand, std::memory_order_relaxed)) < items;)
            f(begin, std::min(begin + hand, items));
    });
}

}  // namespace lora_ext
