// Plan of a batch on the CPU, by a stable counting sort of its rows by slot, and row ids from
// segments.
#include "lora_ext/lora.h"

#include <algorithm>
#include <cstring>

namespace lora_ext {

namespace {

template <typename Id>
void plan_by_slot(const LoraPlanArgs& args) {
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    const Id* ids = static_cast<const Id*>(args.adapter_ids);
    const int32_t num_slots = args.num_adapters;
    const int64_t num_tokens = args.num_tokens;
    const int64_t num_valid =
        args.num_valid ? std::clamp<int64_t>(*args.num_valid, 0, num_tokens) : num_tokens;
    int32_t* header = args.plan;
    int32_t* chunk = args.plan + layout.chunks();
    int32_t* perm = args.plan + layout.perm();
    int32_t* slot_begin = args.plan + layout.slot_begin();

    // Bucket num_slots holds the inactive rows. After counting, slot_begin[s + 1] is the size of
    // bucket s.
    std::fill_n(slot_begin, num_slots + 2, 0);
    int32_t bad_ids = 0;
    for (int64_t t = 0; t < num_valid; ++t) {
        const bool active = ids[t] >= 0 && ids[t] < num_slots;
        bad_ids += !active && ids[t] != -1;
        ++slot_begin[active ? ids[t] + 1 : num_slots + 1];
    }
    slot_begin[num_slots + 1] += static_cast<int32_t>(num_tokens - num_valid);

    const int32_t chunk_rows = layout.chunk_rows();
    int32_t num_chunks = 0;
    for (int32_t s = 0; s < num_slots; ++s) {
        const int32_t begin = slot_begin[s];
        const int32_t end = begin + slot_begin[s + 1];
        for (int32_t start = begin; start < end; start += chunk_rows, chunk += 4, ++num_chunks) {
            chunk[0] = s;
            chunk[1] = start;
            chunk[2] = std::min(chunk_rows, end - start);
            chunk[3] = 0;
        }
        slot_begin[s + 1] = end;
    }
    const int32_t num_active = slot_begin[num_slots];

    // Scatter the rows, with slot_begin as the write cursors. Afterwards slot_begin[s] is the end
    // of slot s, so that the entries must be shifted by one.
    int32_t next_inactive = num_active;
    bool identity = true;
    for (int64_t t = 0; t < num_tokens; ++t) {
        const bool active = t < num_valid && ids[t] >= 0 && ids[t] < num_slots;
        int32_t& next = active ? slot_begin[ids[t]] : next_inactive;
        identity &= !active || next == t;
        perm[next++] = static_cast<int32_t>(t);
    }
    std::memmove(slot_begin + 1, slot_begin, num_slots * sizeof(int32_t));
    slot_begin[0] = 0;
    slot_begin[num_slots] = num_active;
    slot_begin[num_slots + 1] = static_cast<int32_t>(num_tokens);

    std::fill_n(header, kPlanHeader, 0);
    header[kPlanNumChunks] = num_chunks;
    header[kPlanNumActive] = num_active;
    header[kPlanIdentity] = identity;
    header[kPlanBadIds] = bad_ids;
}

}  // namespace

void lora_plan_cpu(const LoraPlanArgs& args) {
    args.ids_are_int64 ? plan_by_slot<int64_t>(args) : plan_by_slot<int32_t>(args);
}

void lora_segment_ids_cpu(const int32_t* seg_indptr, const int32_t* seg_adapter,
                          int32_t num_segments, int32_t* ids, int64_t num_tokens) {
    std::fill_n(ids, num_tokens, -1);
    for (int32_t s = 0; s < num_segments; ++s) {
        const int64_t begin = std::clamp<int64_t>(seg_indptr[s], 0, num_tokens);
        const int64_t end = std::clamp<int64_t>(seg_indptr[s + 1], begin, num_tokens);
        std::fill(ids + begin, ids + end, seg_adapter[s]);
    }
}

}  // namespace lora_ext
