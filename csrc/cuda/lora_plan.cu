// The plan (rows of a batch, stably grouped by adapter), and adapter ids of contiguous segments.
//
// The kernel is one block of 1024 threads. Rows are sorted in shared memory, a tile of 8192 at a
// time (fewer if shared memory is small), by a radix sort with digits of five bits: each thread
// scans one of 1024 counters, 32 digits x 32 warps. A warp owns a contiguous range of rows and
// places them in order, so the sort is stable and no result depends on timing. Slot boundaries are
// then found by bisection of the sorted ids. If there are several tiles, they are sorted one after
// another, and the plan's memory holds the next free position of each slot. Only this case uses
// atomics, to count the rows of each slot. Bound: latency, not bytes.
#include "lora_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 5;
constexpr int kMaxTile = 8192;
constexpr int kRowBytes = 2 * (sizeof(uint32_t) + sizeof(uint16_t));  // shared memory per row
constexpr int kStaticBytes = (kThreads + kWarps) * 4;

// Returns the sum of `x` over earlier threads, and in `total` the sum over all threads. All threads
// must call this.
LX_DEVICE int block_scan(int x, int (&warp_sums)[kWarps], int& total) {
    const int lane = lx::lane_id(), warp = lx::warp_id();
    auto warp_scan = [lane](int y) {  // inclusive scan over the lanes
        for (int d = 1; d < 32; d *= 2) {
            const int before = lx::shfl_up_sync(lx::kFullMask, y, static_cast<unsigned>(d));
            if (lane >= d) y += before;
        }
        return y;
    };
    const int inclusive = warp_scan(x);
    if (lane == 31) warp_sums[warp] = inclusive;
    lx::syncthreads();
    if (warp == 0) warp_sums[lane] = warp_scan(warp_sums[lane]);
    lx::syncthreads();
    total = warp_sums[kWarps - 1];
    const int before = warp == 0 ? 0 : warp_sums[warp - 1];
    lx::syncthreads();  // warp_sums has been read
    return before + inclusive - x;
}

// Keys and rows of a tile, and the buffers to which the next pass of the sort moves them.
struct Sorted {
    uint32_t *keys, *next_keys;  // slot; num_adapters for rows without an adapter
    uint16_t *rows, *next_rows;  // relative to the start of the tile
};

// Sorts s.keys[0 .. n) stably and moves s.rows with them. Ends with a barrier.
LX_DEVICE void sort_tile(Sorted& s, int n, int passes, int (&counters)[kThreads],
                         int (&warp_sums)[kWarps]) {
    const int lane = lx::lane_id(), warp = lx::warp_id();
    const int per_warp = (n + kThreads - 1) / kThreads * 32;
    const int begin = warp * per_warp;
    // The 32 counters of a digit, one per warp, form a row, which is rotated by the digit. Thanks
    // to the rotation, neither lanes that scan a row nor lanes that count different digits have
    // bank conflicts.
    auto counter = [&](int digit, int of_warp) -> int& {
        return counters[digit * kWarps + (of_warp + digit) % kWarps];
    };
    for (int pass = 0; pass < passes; ++pass) {
        auto digit_of = [&](int i) {  // 32 if row i does not exist
            return i < n ? static_cast<int>(s.keys[i] >> (pass * kDigitBits)) % 32 : 32;
        };
        counter(lane, warp) = 0;
        lx::syncwarp();
        for (int i = begin + lane; i < begin + per_warp; i += 32) {
            const int digit = digit_of(i);
            const unsigned same = lx::match_any_sync(lx::kFullMask, digit);
            if (digit < 32 && lx::ffs(same) - 1 == lane) counter(digit, warp) += lx::popc(same);
            lx::syncwarp();  // another lane may update this counter in the next step
        }
        lx::syncthreads();
        int total;
        const int place = block_scan(counter(warp, lane), warp_sums, total);
        counter(warp, lane) = place;
        lx::syncthreads();
        for (int i = begin + lane; i < begin + per_warp; i += 32) {
            const int digit = digit_of(i);
            const unsigned same = lx::match_any_sync(lx::kFullMask, digit);
            if (digit < 32) {
                const int to = counter(digit, warp) + lx::popc(same & ((1u << lane) - 1));
                s.next_keys[to] = s.keys[i];
                s.next_rows[to] = s.rows[i];
            }
            lx::syncwarp();  // all lanes have read the counter
            if (digit < 32 && lx::ffs(same) - 1 == lane) counter(digit, warp) += lx::popc(same);
            lx::syncwarp();
        }
        lx::syncthreads();
        uint32_t* const keys = s.keys;
        uint16_t* const rows = s.rows;
        s.keys = s.next_keys;
        s.rows = s.next_rows;
        s.next_keys = keys;
        s.next_rows = rows;
    }
}

// Returns the first position in the sorted keys[0 .. n) that is not below `key`.
LX_DEVICE int lower_bound(const uint32_t* keys, int n, uint32_t key) {
    int low = 0, high = n;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (keys[middle] < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

struct PlanOffsets {
    int64_t perm, slot_begin;
    int chunk_rows, tile_rows, passes;
};

__global__ void __launch_bounds__(kThreads)
    lora_plan_kernel(const __grid_constant__ LoraPlanArgs args,
                     const __grid_constant__ PlanOffsets at) {
    LX_SHARED(int, counters, kThreads);
    LX_SHARED(int, warp_sums, kWarps);
    LX_DYN_SHARED(memory);
    const int thread = lx::thread_rank(), lane = lx::lane_id();
    const int64_t num_rows = args.num_tokens, num_valid = valid_rows(args);
    const int slots = args.num_adapters;
    const int capacity = static_cast<int>(lx::min<int64_t>(num_rows, at.tile_rows));
    int32_t* perm = args.plan + at.perm;
    int32_t* slot_begin = args.plan + at.slot_begin;
    Sorted tile;
    tile.keys = reinterpret_cast<uint32_t*>(memory);
    tile.next_keys = tile.keys + capacity;
    tile.rows = reinterpret_cast<uint16_t*>(tile.next_keys + capacity);
    tile.next_rows = tile.rows + capacity;

    int bad_ids = 0;
    auto key_of = [&](int64_t row) {
        bool bad;
        const int slot = adapter_of_row(args, row, num_valid, bad);
        bad_ids += bad;
        return static_cast<uint32_t>(slot < 0 ? slots : slot);
    };
    // Loads and sorts the keys of a tile of rows, from row `first` on. Returns the number of rows.
    auto load_tile = [&](int64_t first) {
        const int n = static_cast<int>(lx::min<int64_t>(num_rows - first, at.tile_rows));
        for (int i = thread; i < n; i += kThreads) {
            tile.keys[i] = key_of(first + i);
            tile.rows[i] = static_cast<uint16_t>(i);
        }
        lx::syncthreads();
        sort_tile(tile, n, at.passes, counters, warp_sums);
        return n;
    };

    bool identity = true;
    if (num_rows <= at.tile_rows) {
        const int n = load_tile(0);
        for (int s = thread; s <= slots; s += kThreads)
            slot_begin[s] = lower_bound(tile.keys, n, static_cast<uint32_t>(s));
        if (thread == 0) slot_begin[slots + 1] = n;
        for (int i = thread; i < n; i += kThreads) {
            perm[i] = tile.rows[i];
            identity =
                identity && (tile.rows[i] == i || tile.keys[i] == static_cast<uint32_t>(slots));
        }
    } else {
        // ends[s] is first the number of rows of slot s, then the slot's start in perm, and then
        // advances by the rows that each tile adds, until it is the slot's end.
        int32_t* ends = slot_begin + 1;
        for (int s = thread; s <= slots; s += kThreads) ends[s] = 0;
        if (thread == 0) slot_begin[0] = 0;
        lx::syncthreads();
        for (int64_t first = 0; first < num_rows; first += kThreads) {
            const bool here = first + thread < num_rows;
            const int key = here ? static_cast<int>(key_of(first + thread)) : -1;
            const unsigned same = lx::match_any_sync(lx::kFullMask, key);
            if (here && lx::ffs(same) - 1 == lane) lx::atomic_add(&ends[key], lx::popc(same));
        }
        lx::syncthreads();
        for (int first = 0, carry = 0; first <= slots; first += kThreads) {
            const int s = first + thread;
            int total;
            const int before = block_scan(s <= slots ? ends[s] : 0, warp_sums, total);
            if (s <= slots) ends[s] = carry + before;
            carry += total;
        }
        lx::syncthreads();
        const int bad_once = bad_ids;
        for (int64_t first = 0; first < num_rows; first += at.tile_rows) {
            const int n = load_tile(first);
            for (int i = thread; i < n; i += kThreads) {
                const uint32_t key = tile.keys[i];
                const int to = ends[key] + i - lower_bound(tile.keys, n, key);
                perm[to] = static_cast<int32_t>(first + tile.rows[i]);
                identity =
                    identity && (to == first + tile.rows[i] || key == static_cast<uint32_t>(slots));
            }
            lx::syncthreads();
            for (int i = thread; i < n; i += kThreads) {
                const uint32_t key = tile.keys[i];
                if (i + 1 == n || tile.keys[i + 1] != key)
                    ends[key] += i + 1 - lower_bound(tile.keys, n, key);
            }
            lx::syncthreads();
        }
        bad_ids = bad_once;
    }
    identity = lx::syncthreads_and(identity);  // also completes slot_begin
    int bad_total;
    block_scan(bad_ids, warp_sums, bad_total);

    int num_chunks = 0;
    int32_t* chunks = args.plan + kPlanHeader;
    for (int first = 0; first < slots; first += kThreads) {
        const int s = first + thread;
        const int begin = s < slots ? slot_begin[s] : 0, end = s < slots ? slot_begin[s + 1] : 0;
        int total;
        int64_t chunk = num_chunks + block_scan((end - begin + at.chunk_rows - 1) / at.chunk_rows,
                                                warp_sums, total);
        for (int start = begin; start < end; start += at.chunk_rows, ++chunk) {
            int32_t* entry = chunks + 4 * chunk;
            entry[0] = s;
            entry[1] = start;
            entry[2] = lx::min(at.chunk_rows, end - start);
            entry[3] = 0;
        }
        num_chunks += total;
    }
    if (thread < kPlanHeader) {
        const int field = thread == kPlanNumChunks   ? num_chunks
                          : thread == kPlanNumActive ? slot_begin[slots]
                          : thread == kPlanIdentity  ? static_cast<int>(identity)
                          : thread == kPlanBadIds    ? bad_total
                                                     : 0;
        args.plan[thread] = field;
    }
}

// Sets ids[t] = seg_adapter[s] for the last segment s that starts at or before t.
__global__ void __launch_bounds__(256)
    lora_segment_ids_kernel(const int32_t* seg_indptr, const int32_t* seg_adapter,
                            int32_t num_segments, int32_t* ids, int64_t num_tokens) {
    const int64_t t = int64_t{256} * blockIdx.x + threadIdx.x;
    if (t >= num_tokens) return;
    int low = 0, high = num_segments + 1;  // `low` becomes the first segment bound > t
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (seg_indptr[middle] <= t) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    ids[t] = low >= 1 && low <= num_segments ? seg_adapter[low - 1] : -1;
}

}  // namespace

LaunchStatus launch_lora_plan(const LoraPlanArgs& args, void* stream) {
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    const int64_t most = most_dynamic_bytes(kStaticBytes) / kRowBytes / kThreads * kThreads;
    PlanOffsets at{layout.perm(), layout.slot_begin(), layout.chunk_rows(),
                   static_cast<int>(lx::min<int64_t>(most, kMaxTile)), 0};
    for (int64_t keys = 1; keys <= args.num_adapters; keys <<= kDigitBits) ++at.passes;
    const size_t bytes =
        static_cast<size_t>(lx::min<int64_t>(args.num_tokens, at.tile_rows)) * kRowBytes;
    LX_BUF(args.adapter_ids, args.num_tokens * (args.ids_are_int64 ? 8 : 4), lx::Access::kConstant);
    if (args.num_valid) LX_BUF(args.num_valid, 4, lx::Access::kConstant);
    LX_BUF(args.plan, layout.size() * 4, lx::Access::kReadWrite);
    return LX_LAUNCH(lora_plan_kernel, 1, kThreads, bytes, stream, args, at);
}

LaunchStatus launch_lora_segment_ids(const int32_t* seg_indptr, const int32_t* seg_adapter,
                                     int32_t num_segments, int32_t* ids, int64_t num_tokens,
                                     void* stream) {
    if (num_tokens == 0) return 0;
    LX_BUF(seg_indptr, int64_t{4} * (num_segments + 1), lx::Access::kConstant);
    LX_BUF(seg_adapter, int64_t{4} * num_segments, lx::Access::kConstant);
    LX_BUF(ids, num_tokens * 4, lx::Access::kWrite);
    return LX_LAUNCH(lora_segment_ids_kernel, static_cast<unsigned>(ceil_div(num_tokens, 256)), 256,
                     0, stream, seg_indptr, seg_adapter, num_segments, ids, num_tokens);
}

}  // namespace lora_ext
