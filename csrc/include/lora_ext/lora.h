// Batched multi-adapter LoRA: the interface and data layouts of CUDA kernels and CPU twins.
//
//   s       = adapter_ids[t]
//   v[t, :] = scale[s] * a[s] x[t, :]             (rank of s,) float32 (float64 for float64)
//   y[t, :] = round(y[t, :] + b[s] v[t, :])       rounded once, to the dtype of y
//
// With factors (has_factors), rank r of page p = r / 8 is v[t, r] = (scale[s, p] * sum) *
// weights[t, groups[s, p]], in this order, so that a weight of 1 keeps every bit.
//
// Rows with id -1 and rows whose adapter has rank 0 keep every bit of y, and their row of v is not
// accessed.
//
// Letters: T tokens, I in, O out, R largest rank, A adapters (slots), P pages.
#pragma once

#include <span>

#include "lora_ext/common.h"

namespace lora_ext {

// ------------------------------------------------------------------------------------------------
// Adapters: pages of eight ranks
//
// Page p of adapter s holds the ranks 8p .. 8p+7 of both factors:
//
//   an A page has 8 rows of I contiguous elements; row j (rank 8p+j) starts at
//       a_page + j * a_row_stride;
//   a B page has O rows of 8 contiguous elements, one per rank; row o starts at
//       b_page + o * b_row_stride.
//
// Plain tensors a (A, R, I), b (A, O, R) consist of such pages, and so does the pool, a (P, 8, I),
// b (P, O, 8). The two differ only in the address of a page's first element:
//
//   bank (page_table == nullptr):
//       a_page = a + s * a_slot_stride + p * a_page_stride
//   pool:
//       a_page = a + page_table[s * pages_per_slot + p] * a_page_stride
//
// and likewise for b. Strides count elements.
//
// Ranks at or beyond an adapter's rank are not read, with one exception: if `full_pages` is true,
// their memory exists, and a whole 8-wide row of a B page (or a whole A page) may be loaded. The
// surplus elements must then be discarded. They must not be multiplied by zero, because they may be
// NaN.
struct LoraBank {
    const void* a = nullptr;
    const void* b = nullptr;
    const int32_t* page_table = nullptr;  // (A, pages_per_slot) or nullptr for plain tensors
    const int32_t* ranks = nullptr;       // (A,) each in [0, max_rank]; nullptr: all max_rank
    const float* scale = nullptr;         // (A,), or (A, pages_per_slot); nullptr: all 1
    const int32_t* groups = nullptr;      // (A, pages_per_slot) columns of weights; nullptr: all 0
    int64_t a_slot_stride = 0, a_page_stride = 0, a_row_stride = 0;
    int64_t b_slot_stride = 0, b_page_stride = 0, b_row_stride = 0;
    int32_t num_adapters = 0;
    int32_t max_rank = 0;
    int32_t pages_per_slot = 0;  // ceil(max_rank / 8)
    int32_t num_pages = 0;  // pool size; table entries outside [0, num_pages) mark absent pages
    int32_t in_features = 0;
    int32_t out_features = 0;
    // True if every page has memory for all 8 ranks: for a pool, and if max_rank % 8 == 0.
    bool full_pages = false;
    bool scale_per_page = false;
    // True if the pages are float8_e4m3fn, at most kRankSpan ranks of a pool. CPU twins read such
    // pages, and so do CUDA kernels if lora_reads_float8() is true.
    bool float8 = false;
    int32_t num_groups = 1;  // columns of weights
};

// ------------------------------------------------------------------------------------------------
// Plan: rows grouped by adapter
//
// One int32 tensor, so that a model's layers can share it. Its size depends only on (T, A).
//   header[kPlanHeader]        the numbers of PlanField
//   chunks[max_chunks][4]      {slot, start, len, 0}: the rows perm[start .. start+len) all use
//                              this slot, and len is at most chunk_rows()
//   perm[T]                    the row numbers sorted by slot, stably; inactive rows are last
//   slot_begin[A + 2]          slot s owns perm[slot_begin[s] .. slot_begin[s+1]);
//                              slot_begin[A] = active rows, slot_begin[A+1] = T
//
// Chunks are in order of (slot, start). Chunks at or beyond num_chunks are undefined.
enum PlanField : int32_t {
    kPlanNumChunks = 0,
    kPlanNumActive = 1,  // rows with an adapter, that is, with an id in [0, A)
    kPlanIdentity = 2,   // 1 if perm[i] == i for all active rows
    kPlanBadIds = 3,     // rows whose id was outside [-1, A); they count as -1
    kPlanHeader = 8,
};

// Return the maximum number of rows per chunk: a few in decode, a tile in prefill. It depends only
// on num_tokens, which the host knows.
constexpr int32_t lora_chunk_rows(int64_t num_tokens) {
    return num_tokens <= 256 ? 16 : num_tokens < 4096 ? 64 : 128;
}

struct LoraPlanLayout {
    int64_t num_tokens;
    int32_t num_adapters;

    constexpr int32_t chunk_rows() const { return lora_chunk_rows(num_tokens); }
    constexpr int64_t max_chunks() const {
        return num_tokens / chunk_rows() + (num_tokens < num_adapters ? num_tokens : num_adapters);
    }
    constexpr int64_t chunks() const { return kPlanHeader; }
    constexpr int64_t perm() const { return chunks() + 4 * max_chunks(); }
    constexpr int64_t slot_begin() const { return perm() + num_tokens; }
    constexpr int64_t size() const { return slot_begin() + num_adapters + 2; }
};

struct LoraPlanArgs {
    const void* adapter_ids = nullptr;  // (T,) int64 or int32
    bool ids_are_int64 = true;
    // Number of valid rows, on the device of the ids: rows at or beyond it have id -1. nullptr: all
    // rows are valid.
    const int32_t* num_valid = nullptr;
    int64_t num_tokens = 0;
    int32_t num_adapters = 0;
    int32_t* plan = nullptr;  // LoraPlanLayout::size() entries; all defined ones are written
};

// ------------------------------------------------------------------------------------------------
// Shrink, expand, apply
struct LoraArgs {
    DType dtype = DType::kFloat32;  // dtype of x, y, a, b
    LoraBank bank;
    int64_t num_tokens = 0;
    // (T, I) and (T, O); rows are contiguous, of any alignment, row_stride elements apart.
    const void* x = nullptr;
    int64_t x_row_stride = 0;
    void* y = nullptr;
    int64_t y_row_stride = 0;
    // (T, >= max_rank) float32 (float64): exactly `rank` entries of an active row are used.
    void* v = nullptr;
    int64_t v_row_stride = 0;
    // nullptr: decoding without a plan, in which the CUDA kernel groups the rows itself, by `ids`.
    const int32_t* plan = nullptr;
    LoraPlanArgs ids;
    void* workspace = nullptr;       // lora_workspace_bytes(); CUDA only
    const float* weights = nullptr;  // (T, bank.num_groups); nullptr: all 1
    int64_t weights_row_stride = 0;
};

// Returns whether the factor of v differs between the rows or the pages of an adapter. Shrink then
// computes only the sums, and a later step multiplies them by the factors.
constexpr bool has_factors(const LoraArgs& args) {
    return args.weights || args.bank.scale_per_page;
}
// Returns `args` without scales and weights, for a shrink that computes only the sums.
inline LoraArgs without_factors(LoraArgs args) {
    args.bank.scale = nullptr;
    args.bank.scale_per_page = false;
    args.weights = nullptr;
    return args;
}

// Largest number of siblings, that is, modules of one call that share their rows (q, k, v). Their
// LoraArgs differ only in bank, y, v and workspace, and have the same number of adapters. Each y is
// bitwise equal to the result of a call with that module alone.
constexpr int kMaxSiblings = 8;

// Largest number of ranks that CPU twins process at once, so that no buffer grows with the rank.
constexpr int64_t kRankSpan = 256;
constexpr int64_t rank_spans(int64_t max_rank) {
    return max_rank <= kRankSpan ? 1 : (max_rank - 1) / kRankSpan + 1;
}

// CPU twins: one table per instruction set, from isa.h. csrc/ops splits [0, items) over threads,
// and the split does not change the result. Items of shrink are (span of ranks, chunk); items of
// expand are (block of outputs, chunk).
struct LoraCpu {
    const char* isa;  // "scalar", "avx2", "avx512", "avx512bf16"
    int64_t (*shrink_items)(const LoraArgs&);
    void (*shrink)(const LoraArgs&, int64_t begin, int64_t end);
    int64_t (*expand_items)(const LoraArgs&);
    void (*expand)(const LoraArgs&, int64_t begin, int64_t end);
    // Shrinks and expands chunks [begin, end) of the plan in one call; at most kRankSpan ranks.
    void (*apply)(const LoraArgs&, int64_t begin, int64_t end);
};

void lora_plan_cpu(const LoraPlanArgs& args);
// ids[i] = seg_adapter[s] for seg_indptr[s] <= i < seg_indptr[s+1], else -1.
void lora_segment_ids_cpu(const int32_t* seg_indptr, const int32_t* seg_adapter,
                          int32_t num_segments, int32_t* ids, int64_t num_tokens);

// CUDA launchers: asynchronous, on `stream` (a cudaStream_t), no allocation, no synchronisation.
LaunchStatus launch_lora_plan(const LoraPlanArgs& args, void* stream);
LaunchStatus launch_lora_segment_ids(const int32_t* seg_indptr, const int32_t* seg_adapter,
                                     int32_t num_segments, int32_t* ids, int64_t num_tokens,
                                     void* stream);
// Largest number of rows for which plan may be nullptr.
constexpr int64_t kPlanlessTokens = 32;
// Returns whether kernels read the float8 pages of a call: 16-bit rows, at most 256, and aligned
// memory. A call without y shrinks, one without x expands.
bool lora_reads_float8(const LoraArgs& args);
// Reads only the sizes in `args`. The workspace must be aligned to 16 bytes.
int64_t lora_workspace_bytes(const LoraArgs& args);
LaunchStatus launch_lora_shrink(const LoraArgs& args, void* stream);  // x -> v
LaunchStatus launch_lora_expand(const LoraArgs& args, void* stream);  // v -> y +=
// x -> y +=. The field v is unused, because the workspace of each module holds its v. Siblings
// share launches if they have at most 256 rows, ranks up to 256, and aligned memory.
LaunchStatus launch_lora_apply(std::span<const LoraArgs> modules, void* stream);

}  // namespace lora_ext
