// Compares the plan and the segment ids of the CPU twins with a naive construction.
#include <vector>

#include "lora_ext/lora.h"
#include "twin_test.h"

using namespace lora_ext;

namespace {

template <typename Id>
void check_plan(int64_t num_tokens, int32_t num_adapters, double bad, bool sorted) {
    std::vector<Id> ids;
    for (int64_t t = 0; t < num_tokens; ++t)
        ids.push_back(static_cast<Id>(std::fabs(uniform()) < bad
                                          ? (below(2) ? num_adapters + below(9) : -2 - below(9))
                                          : below(num_adapters + 1) - 1));
    if (sorted)
        std::sort(ids.begin(), ids.end(), [](Id l, Id r) { return uint64_t(l) < uint64_t(r); });
    const int32_t num_valid = static_cast<int32_t>(below(num_tokens + 4)) - 1;
    for (const int32_t* limit : {static_cast<const int32_t*>(nullptr), &num_valid}) {
        const LoraPlanLayout layout{num_tokens, num_adapters};
        std::vector<int32_t> plan(layout.size() + 1, -7);
        LoraPlanArgs args{ids.data(), sizeof(Id) == 8, limit,
                          num_tokens, num_adapters,    plan.data()};
        lora_plan_cpu(args);

        std::vector<std::vector<int32_t>> rows(num_adapters + 1);
        int32_t bad_ids = 0;
        for (int64_t t = 0; t < num_tokens; ++t) {
            const bool valid = !limit || t < *limit;
            const bool active = valid && ids[t] >= 0 && ids[t] < num_adapters;
            bad_ids += valid && !active && ids[t] != -1;
            rows[active ? ids[t] : num_adapters].push_back(static_cast<int32_t>(t));
        }
        std::vector<int32_t> perm, chunks, slot_begin;
        for (int32_t s = 0; s < num_adapters; ++s) {
            slot_begin.push_back(static_cast<int32_t>(perm.size()));
            for (int32_t at = 0; at < int32_t(rows[s].size()); at += layout.chunk_rows()) {
                const int32_t len = std::min(layout.chunk_rows(), int32_t(rows[s].size()) - at);
                chunks.insert(chunks.end(), {s, int32_t(perm.size()) + at, len, 0});
            }
            perm.insert(perm.end(), rows[s].begin(), rows[s].end());
        }
        const int32_t active = static_cast<int32_t>(perm.size());
        bool identity = true;
        for (int32_t i = 0; i < active; ++i) identity &= perm[i] == i;
        perm.insert(perm.end(), rows[num_adapters].begin(), rows[num_adapters].end());
        slot_begin.insert(slot_begin.end(), {active, static_cast<int32_t>(num_tokens)});

        const auto at = [&](int64_t offset, const std::vector<int32_t>& want) {
            return std::equal(want.begin(), want.end(), plan.begin() + offset);
        };
        EXPECT(at(0, {int32_t(chunks.size() / 4), active, identity, bad_ids, 0, 0, 0, 0}),
               "plan T=%d A=%d: header %d %d %d %d, want %d %d %d %d", int(num_tokens),
               num_adapters, plan[0], plan[1], plan[2], plan[3], int(chunks.size() / 4), active,
               identity, bad_ids);
        EXPECT(int64_t(chunks.size() / 4) <= layout.max_chunks(), "plan T=%d A=%d: too many chunks",
               int(num_tokens), num_adapters);
        EXPECT(at(layout.chunks(), chunks), "plan T=%d A=%d: chunks", int(num_tokens),
               num_adapters);
        EXPECT(at(layout.perm(), perm), "plan T=%d A=%d: perm", int(num_tokens), num_adapters);
        EXPECT(at(layout.slot_begin(), slot_begin), "plan T=%d A=%d: slot_begin", int(num_tokens),
               num_adapters);
        EXPECT(plan.back() == -7, "plan T=%d A=%d: wrote past its end", int(num_tokens),
               num_adapters);
    }
}

}  // namespace

void check_plans() {
    for (int64_t t : {0, 1, 2, 16, 31, 32, 33, 256, 257, 1000, 5000})
        for (int32_t adapters : {0, 1, 3, 64, 700})
            for (double bad : {0.0, 0.2})
                for (bool sorted : {false, true}) {
                    check_plan<int64_t>(t, adapters, bad, sorted);
                    check_plan<int32_t>(t, adapters, bad, sorted);
                }
    const std::vector<int32_t> indptr{2, 2, 5, 9}, adapters{7, 3, 4};
    std::vector<int32_t> ids(11, 99);
    lora_segment_ids_cpu(indptr.data(), adapters.data(), 3, ids.data(), 10);
    EXPECT((ids == std::vector<int32_t>{-1, -1, 3, 3, 3, 4, 4, 4, 4, -1, 99}), "segment ids");
}
