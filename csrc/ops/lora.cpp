// The LoRA ops: tensors in, checks, allocation, choice of twin or kernel. Writes no math.
//
// Shapes: x (T, I); bank a (A, R, I), b (A, O, R), or pool a (P, 8, I), b (P, O, 8) with page_table
// (A, R/8); adapter_ids (T,); v (T, R); y (T, O). lora_ext/lora.h has the layouts.
#include "ops/lora.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "lora_ext/lora.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

#define LX_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

constexpr int64_t kMaxRank = 256;
constexpr int64_t kMaxAdapters = 1 << 24;
// Of rows, features and pages: kernels count in int32, and a little beyond the end.
constexpr int64_t kMaxSize = (int64_t{1} << 31) - (1 << 16);

std::atomic<bool> debug_mode{false};
std::atomic<const LoraCpu*> chosen_twin{nullptr};

const LoraCpu& twin() {
    const LoraCpu* chosen = chosen_twin.load(std::memory_order_relaxed);
    return chosen ? *chosen : lora_cpu();
}

DType dtype_of(const char* op, const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat:
            return DType::kFloat32;
        case at::kHalf:
            return DType::kFloat16;
        case at::kBFloat16:
            return DType::kBFloat16;
        case at::kDouble:
            LX_CHECK(!launches_kernels(t), op, ": ", name,
                     " must be float32, float16 or bfloat16 on this device, got float64");
            return DType::kFloat64;
        default:
            LX_CHECK(false, op, ": ", name,
                     " must be float32, float16, bfloat16 or float64 (CPU), got ", t.scalar_type());
    }
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name) {
    LX_CHECK(t.device() == x.device(), op, ": ", name, " must be on the device of ", x_name, ", ",
             x.device(), ", got ", t.device());
    LX_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of ", x_name,
             ", ", x.scalar_type(), ", got ", t.scalar_type());
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
    LX_CHECK(t.dim() == dim, op, ": ", name, " must have shape ", shape, ", got ", t.sizes());
}

// Small integer and scale vectors that sit beside the weights.
template <class T>
const T* vector_data(const char* op, const char* name, const Tensor& t, int64_t size,
                     at::ScalarType dtype, at::Device device) {
    LX_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ",
             t.scalar_type());
    LX_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have shape (", size,
             ",), got ", t.sizes());
    LX_CHECK(t.device() == device, op, ": ", name, " must be on ", device, ", got ", t.device());
    LX_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
    return t.const_data_ptr<T>();
}

Tensor rows_contiguous(const Tensor& t) {
    return t.dim() == 0 || t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

// The adapters of one op, and the tensors that keep their memory alive.
struct Bank {
    LoraBank view;
    Tensor a, b;
};

// Each op names the factors it uses; `in` and `out` are what the activations say their widths are.
Bank make_bank(const char* op, const Tensor* a, const Tensor* b, const OptionalTensor& scale,
               const OptionalTensor& ranks, const OptionalTensor& page_table, const Tensor& x,
               const char* x_name, int64_t in, int64_t out) {
    Bank bank;
    LoraBank& w = bank.view;
    const bool paged = page_table.has_value();
    const char* a_shape = paged ? "(P, 8, I)" : "(A, R, I)";
    const char* b_shape = paged ? "(P, O, 8)" : "(A, O, R)";
    int64_t slots = -1, rank = -1;
    if (paged) {
        const Tensor& table = *page_table;
        check_dim(op, "page_table", table, 2, "(A, R / 8)");
        LX_CHECK(table.scalar_type() == at::kInt, op, ": page_table must be int32, got ",
                 table.scalar_type());
        LX_CHECK(table.device() == x.device() && table.is_contiguous(), op,
                 ": page_table must be contiguous and on ", x.device(), ", got ", table.device());
        LX_CHECK(ranks.has_value(), op, ": ranks is required with a page_table");
        slots = table.size(0);
        rank = 8 * table.size(1);
        LX_CHECK(rank <= kMaxRank, op, ": page_table.shape[1] must be at most ", kMaxRank / 8,
                 " (rank ", kMaxRank, "), got ", table.size(1));
        w.page_table = table.const_data_ptr<int32_t>();
    }
    auto factor = [&](const Tensor& t, const char* name, const char* shape, int rank_dim,
                      int width_dim, int64_t width, const char* width_owner) {
        check_like(op, name, t, x, x_name);
        check_dim(op, name, t, 3, shape);
        LX_CHECK(t.size(width_dim) == width, op, ": ", name, ".shape[", width_dim, "] must equal ",
                 width_owner, " = ", width, ", got ", t.size(width_dim));
        if (paged) {
            LX_CHECK(t.size(rank_dim) == 8, op, ": ", name, ".shape[", rank_dim,
                     "] must be 8 (ranks of a page), got ", t.size(rank_dim));
            LX_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, op, ": pages of ", name,
                     " must be contiguous in their last dimension");
            return t;
        }
        LX_CHECK(slots < 0 || t.size(0) == slots, op, ": ", name,
                 ".shape[0] must equal a.shape[0] = ", slots, ", got ", t.size(0));
        LX_CHECK(rank < 0 || t.size(rank_dim) == rank, op, ": ", name, ".shape[", rank_dim,
                 "] must equal a.shape[1] = ", rank, ", got ", t.size(rank_dim));
        slots = t.size(0);
        rank = t.size(rank_dim);
        LX_CHECK(rank <= kMaxRank, op, ": the rank of ", name, " must be at most ", kMaxRank,
                 ", got ", rank);
        return rows_contiguous(t);
    };
    if (a) {
        bank.a = factor(*a, "a", a_shape, 1, 2, in, "x.shape[1]");
        w.a = bank.a.const_data_ptr();
        w.a_slot_stride = bank.a.stride(0);
        w.a_row_stride = bank.a.stride(1);
        w.a_page_stride = paged ? bank.a.stride(0) : 8 * w.a_row_stride;
    }
    if (b) {
        bank.b = factor(*b, "b", b_shape, 2, 1, out, "y.shape[1]");
        w.b = bank.b.const_data_ptr();
        w.b_slot_stride = bank.b.stride(0);
        w.b_row_stride = bank.b.stride(1);
        w.b_page_stride = paged ? bank.b.stride(0) : 8;
    }
    LX_CHECK(slots < kMaxAdapters, op, ": the number of adapters must be below 2^24, got ", slots);
    LX_CHECK(in <= kMaxSize && out <= kMaxSize && (!paged || (a ? *a : *b).size(0) <= kMaxSize), op,
             ": features and pages must be at most ", kMaxSize, ", got ", in, " and ", out);
    w.num_adapters = static_cast<int32_t>(slots);
    w.max_rank = static_cast<int32_t>(rank);
    w.pages_per_slot = static_cast<int32_t>(ceil_div(rank, 8));
    w.in_features = static_cast<int32_t>(in);
    w.out_features = static_cast<int32_t>(out);
    w.full_pages = paged || rank % 8 == 0;
    if (scale) w.scale = vector_data<float>(op, "scale", *scale, slots, at::kFloat, x.device());
    if (ranks) w.ranks = vector_data<int32_t>(op, "ranks", *ranks, slots, at::kInt, x.device());
    if (paged && a && b)
        LX_CHECK(a->size(0) == b->size(0), op, ": b.shape[0] must equal a.shape[0] = ", a->size(0),
                 " pages, got ", b->size(0));
    w.num_pages = paged ? static_cast<int32_t>((a ? *a : *b).size(0)) : 0;
    return bank;
}

// A caller's plan is a tensor like any other: every row that it groups must carry the id of its
// chunk, or memory outside the tensors would be touched.
template <typename Id>
void check_plan(const char* op, const LoraPlanLayout& layout, const Id* ids, const int32_t* plan) {
    const int64_t rows = layout.num_tokens, chunks = plan[kPlanNumChunks];
    const int32_t* perm = plan + layout.perm();
    const int32_t* chunk = plan + layout.chunks();
    bool fits = chunks >= 0 && chunks <= layout.max_chunks();
    for (int64_t c = 0; fits && c < chunks; ++c, chunk += 4) {
        const int64_t slot = chunk[0], start = chunk[1], len = chunk[2];
        fits = slot >= 0 && slot < layout.num_adapters && start >= 0 && len > 0 &&
               len <= layout.chunk_rows() && start + len <= rows;
        for (int64_t i = start; fits && i < start + len; ++i)
            fits = perm[i] >= 0 && perm[i] < rows && ids[perm[i]] == slot;
    }
    LX_CHECK(fits, op, ": plan must be lora_plan() of these adapter_ids, got that of others");
}

// Ranks and pages of the slots that a plan on the CPU uses. Slots it does not use may be changing
// under a pool's hands at this moment.
void check_slots(const char* op, const LoraBank& w, const int32_t* plan) {
    const int32_t* chunk = plan + kPlanHeader;
    for (int32_t c = 0; c < plan[kPlanNumChunks]; ++c, chunk += 4) {
        const int32_t s = chunk[0];
        const int32_t rank = w.ranks ? w.ranks[s] : w.max_rank;
        LX_CHECK(rank >= 0 && rank <= w.max_rank, op, ": ranks[", s, "] must be in [0, ",
                 w.max_rank, "], got ", rank);
        if (!w.page_table) continue;
        const int32_t* page = w.page_table + int64_t{s} * w.pages_per_slot;
        for (int32_t p = 0; 8 * p < rank; ++p)
            LX_CHECK(page[p] >= 0 && page[p] < w.num_pages, op, ": page_table[", s, ", ", p,
                     "] must be in [0, ", w.num_pages, "), got ", page[p], ": adapter ", s,
                     " has rank ", rank);
    }
}

void check_ids(const char* op, const Tensor& ids, int64_t rows, at::Device device) {
    LX_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op,
             ": adapter_ids must be int64 or int32, got ", ids.scalar_type());
    LX_CHECK(ids.dim() == 1 && ids.size(0) == rows, op, ": adapter_ids must have shape (", rows,
             ",), one id per row, got ", ids.sizes());
    LX_CHECK(ids.device() == device, op, ": adapter_ids must be on ", device, ", got ",
             ids.device());
}

LoraPlanArgs plan_args(const Tensor& ids, int32_t num_adapters) {
    LoraPlanArgs args;
    args.adapter_ids = ids.const_data_ptr();
    args.ids_are_int64 = ids.scalar_type() == at::kLong;
    args.num_tokens = ids.size(0);
    args.num_adapters = num_adapters;
    return args;
}

[[noreturn]] void raise_bad_id(const char* op, const Tensor& ids, int64_t num_adapters) {
    const Tensor host = ids.to(at::kCPU, at::kLong).contiguous();
    const int64_t* p = host.const_data_ptr<int64_t>();
    const int64_t* bad = std::find_if(p, p + host.numel(),
                                      [&](int64_t id) { return id < -1 || id >= num_adapters; });
    LX_CHECK(false, op, ": adapter_ids[", bad - p, "] must be in [-1, ", num_adapters, "), got ",
             bad == p + host.numel() ? -1 : *bad);
}

void check_launch(const char* op, LaunchStatus status) {
    TORCH_CHECK(status == 0, op, ": ", launch_status_string(status));
}

// Fills `plan` and raises on an id out of range: at once on the CPU, in debug mode on a device.
void build_plan(const char* op, const Tensor& ids, LoraPlanArgs args, const Tensor& like) {
    if (launches_kernels(like)) {
        check_launch(op, launch_lora_plan(args, current_stream(like)));
        return;
    }
    lora_plan_cpu(args);
    if (args.plan[kPlanBadIds] != 0) raise_bad_id(op, ids, args.num_adapters);
}

// Memory that lives as long as its thread, so that a call on the CPU allocates only its result.
class Scratch {
  public:
    void* get(size_t bytes) {
        if (bytes > capacity_) {
            const size_t wanted = (std::max(bytes, 2 * capacity_) + 63) / 64 * 64;
            capacity_ = 0;  // until there is memory: the next call must not believe in it
            memory_.reset(static_cast<char*>(std::aligned_alloc(64, wanted)));
            TORCH_CHECK(memory_ != nullptr, "lora_ext: out of memory for ", wanted,
                        " bytes of scratch");
            capacity_ = wanted;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    size_t capacity_ = 0;
};
thread_local Scratch plan_scratch, v_scratch;

enum class Step { kShrink, kExpand, kApply };

// A parallel region costs a few microseconds; below this many bytes of adapters per call one thread
// is faster.
constexpr int64_t kSerialBytes = 128 * 1024;

void run_twin(LoraArgs& args, Step step, int64_t element_size) {
    const LoraCpu& cpu = twin();
    const int64_t chunks = args.plan[kPlanNumChunks];
    if (chunks == 0) return;
    const int64_t width = (step != Step::kExpand ? args.bank.in_features : 0) +
                          (step != Step::kShrink ? args.bank.out_features : 0);
    const int64_t bytes = chunks * args.bank.max_rank * width * element_size;
    const int64_t threads = bytes < kSerialBytes ? 1 : at::get_num_threads();
    auto split = [&](int64_t items, auto&& f) {
        if (threads == 1 || items <= 1) {
            if (items > 0) f(0, items);
        } else {
            at::parallel_for(0, items, 1, f);
        }
    };
    auto shrink = [&](int64_t begin, int64_t end) { cpu.shrink(args, begin, end); };
    auto expand = [&](int64_t begin, int64_t end) { cpu.expand(args, begin, end); };
    if (step == Step::kApply && (threads == 1 || chunks >= 4 * threads)) {
        split(cpu.shrink_items(args),
              [&](int64_t begin, int64_t end) { cpu.apply(args, begin, end); });
        return;
    }
    if (step != Step::kExpand) split(cpu.shrink_items(args), shrink);
    if (step != Step::kShrink) split(cpu.expand_items(args), expand);
}

// The common end of every op: plan, scratch, launch or loop.
void execute(const char* op, Step step, LoraArgs& args, const Bank& bank, const Tensor& x,
             const Tensor& ids_in, const OptionalTensor& plan) {
    args.bank = bank.view;
    const int64_t rows = args.num_tokens;
    const LoraPlanLayout layout{rows, args.bank.num_adapters};
    check_ids(op, ids_in, rows, x.device());
    if (plan) {
        LX_CHECK(plan->scalar_type() == at::kInt && plan->is_contiguous() && plan->dim() == 1 &&
                     plan->numel() == layout.size() && plan->device() == x.device(),
                 op, ": plan must be lora_plan() of ", rows, " rows and ", args.bank.num_adapters,
                 " adapters on ", x.device(), ", int32 of size ", layout.size(), ", got ",
                 plan->scalar_type(), " of shape ", plan->sizes(), " on ", plan->device());
    }
    LX_CHECK(rows <= kMaxSize, op, ": at most ", kMaxSize, " rows, got ", rows);
    if (rows == 0 || args.bank.max_rank == 0) return;
    // Without in-features v is zero, and the twins do not write it.
    if (step != Step::kExpand && args.bank.in_features == 0) return;
    const c10::DeviceGuard guard(x.device());
    const Tensor ids = ids_in.contiguous();
    args.ids = plan_args(ids, args.bank.num_adapters);
    if (plan) args.plan = plan->const_data_ptr<int32_t>();

    if (!launches_kernels(x)) {
        if (!plan) {
            args.ids.plan =
                static_cast<int32_t*>(plan_scratch.get(layout.size() * sizeof(int32_t)));
            build_plan(op, ids, args.ids, x);
            args.plan = args.ids.plan;
        } else if (args.ids.ids_are_int64) {
            check_plan(op, layout, ids.const_data_ptr<int64_t>(), args.plan);
        } else {
            check_plan(op, layout, ids.const_data_ptr<int32_t>(), args.plan);
        }
        check_slots(op, args.bank, args.plan);
        if (step == Step::kApply) {
            args.v_row_stride = 8 * args.bank.pages_per_slot;
            const size_t size = args.dtype == DType::kFloat64 ? 8 : 4;
            args.v = v_scratch.get(rows * args.v_row_stride * size);
        }
        run_twin(args, step, x.element_size());
        return;
    }

    // torch's caching allocator gives workspaces: it is stream-ordered and safe under graph
    // capture.
    const auto ints = x.options().dtype(at::kInt);
    Tensor own_plan, workspace;
    if (!plan && (rows > kPlanlessTokens || debug_mode)) {
        own_plan = at::empty({layout.size()}, ints);
        args.ids.plan = own_plan.mutable_data_ptr<int32_t>();
        build_plan(op, ids, args.ids, x);
        args.plan = args.ids.plan;
        if (debug_mode && own_plan[kPlanBadIds].item<int32_t>() != 0)
            raise_bad_id(op, ids, args.bank.num_adapters);
    }
    if (const int64_t bytes = lora_workspace_bytes(args); bytes > 0) {
        workspace = at::empty({bytes}, x.options().dtype(at::kByte));
        args.workspace = workspace.mutable_data_ptr();
    }
    void* stream = current_stream(x);
    switch (step) {
        case Step::kShrink:
            check_launch(op, launch_lora_shrink(args, stream));
            break;
        case Step::kExpand:
            check_launch(op, launch_lora_expand(args, stream));
            break;
        case Step::kApply:
            check_launch(op, launch_lora_apply(args, stream));
            break;
    }
}

void check_output(const char* op, const Tensor& y) {
    check_dim(op, "y", y, 2, "(T, O)");
    LX_CHECK(y.size(1) <= 1 || y.stride(1) == 1, op,
             ": y must be contiguous in its last dimension, "
             "got strides ",
             y.strides());
    LX_CHECK(y.size(0) <= 1 || y.stride(0) >= y.size(1), op,
             ": rows of y must not overlap, got shape ", y.sizes(), " with strides ", y.strides());
}

// Below autograd a tangent would be dropped without a word.
void check_no_tangents(const char* op, std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* t : tensors)
        TORCH_CHECK_NOT_IMPLEMENTED(!t->_fw_grad(0).defined(), op,
                                    " has no forward-mode derivative");
}

void check_inference(const char* op, std::initializer_list<const Tensor*> tensors) {
    check_no_tangents(op, tensors);
    if (!c10::GradMode::is_enabled()) return;
    for (const Tensor* t : tensors)
        TORCH_CHECK(!t->requires_grad(), op,
                    " has no backward; call it under torch.no_grad(), or "
                    "use lora_apply, which is differentiable");
}

}  // namespace

Tensor lora_plan(const Tensor& adapter_ids, int64_t num_adapters, const OptionalTensor& num_valid) {
    constexpr auto op = "lora_plan";
    LX_CHECK(adapter_ids.dim() == 1, op, ": adapter_ids must have shape (T,), got ",
             adapter_ids.sizes());
    check_ids(op, adapter_ids, adapter_ids.size(0), adapter_ids.device());
    LX_CHECK(num_adapters >= 0 && num_adapters < kMaxAdapters, op,
             ": num_adapters must be in [0, 2^24), got ", num_adapters);
    LX_CHECK(adapter_ids.size(0) <= kMaxSize, op, ": at most ", kMaxSize, " rows, got ",
             adapter_ids.size(0));
    const c10::DeviceGuard guard(adapter_ids.device());
    const Tensor ids = adapter_ids.contiguous();
    LoraPlanArgs args = plan_args(ids, static_cast<int32_t>(num_adapters));
    if (num_valid) {
        LX_CHECK(num_valid->scalar_type() == at::kInt && num_valid->numel() == 1 &&
                     num_valid->device() == ids.device(),
                 op, ": num_valid must be one int32 on ", ids.device(), ", got ",
                 num_valid->scalar_type(), " of shape ", num_valid->sizes(), " on ",
                 num_valid->device());
        args.num_valid = num_valid->const_data_ptr<int32_t>();
    }
    const LoraPlanLayout layout{args.num_tokens, args.num_adapters};
    // Zeros, so that entries no one reads are equal from call to call.
    Tensor plan = at::zeros({layout.size()}, ids.options().dtype(at::kInt));
    args.plan = plan.mutable_data_ptr<int32_t>();
    build_plan(op, ids, args, ids);
    return plan;
}

Tensor lora_segment_ids(const Tensor& seg_indptr, const Tensor& seg_adapter, int64_t num_tokens) {
    constexpr auto op = "lora_segment_ids";
    const int64_t segments = seg_adapter.numel();
    const int32_t* indptr = vector_data<int32_t>(op, "seg_indptr", seg_indptr, segments + 1,
                                                 at::kInt, seg_adapter.device());
    const int32_t* adapter = vector_data<int32_t>(op, "seg_adapter", seg_adapter, segments,
                                                  at::kInt, seg_adapter.device());
    LX_CHECK(num_tokens >= 0, op, ": num_tokens must not be negative, got ", num_tokens);
    const c10::DeviceGuard guard(seg_indptr.device());
    Tensor ids = at::empty({num_tokens}, seg_adapter.options());
    int32_t* out = ids.mutable_data_ptr<int32_t>();
    const int32_t n = static_cast<int32_t>(segments);
    if (launches_kernels(seg_indptr)) {
        if (num_tokens > 0)
            check_launch(op, launch_lora_segment_ids(indptr, adapter, n, out, num_tokens,
                                                     current_stream(seg_indptr)));
        return ids;
    }
    for (int64_t s = 0; s <= segments; ++s)
        LX_CHECK(indptr[s] >= (s == 0 ? 0 : indptr[s - 1]) && indptr[s] <= num_tokens, op,
                 ": seg_indptr must not decrease and must stay in [0, ", num_tokens,
                 "], got seg_indptr[", s, "] = ", indptr[s]);
    lora_segment_ids_cpu(indptr, adapter, n, out, num_tokens);
    return ids;
}

Tensor lora_shrink(const Tensor& x_in, const Tensor& a, const Tensor& adapter_ids,
                   const OptionalTensor& scale, const OptionalTensor& ranks,
                   const OptionalTensor& page_table, const OptionalTensor& plan) {
    constexpr auto op = "lora_shrink";
    check_inference(op, {&x_in, &a});
    check_dim(op, "x", x_in, 2, "(T, I)");
    LoraArgs args;
    args.dtype = dtype_of(op, "x", x_in);
    const Tensor x = rows_contiguous(x_in);
    const Bank bank = make_bank(op, &a, nullptr, scale, ranks, page_table, x, "x", x.size(1), 0);
    args.num_tokens = x.size(0);
    args.x = x.const_data_ptr();
    args.x_row_stride = x.stride(0);
    const auto v_type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    Tensor v = at::zeros({x.size(0), bank.view.max_rank}, x.options().dtype(v_type));
    args.v = v.mutable_data_ptr();
    args.v_row_stride = v.stride(0);
    execute(op, Step::kShrink, args, bank, x, adapter_ids, plan);
    return v;
}

void lora_expand_(Tensor y, const Tensor& v_in, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& ranks, const OptionalTensor& page_table,
                  const OptionalTensor& plan) {
    constexpr auto op = "lora_expand_";
    check_inference(op, {&y, &v_in, &b});
    check_output(op, y);
    LoraArgs args;
    args.dtype = dtype_of(op, "y", y);
    check_dim(op, "v", v_in, 2, "(T, R)");
    const auto v_type = y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    LX_CHECK(v_in.scalar_type() == v_type, op, ": v must be ", v_type, ", got ",
             v_in.scalar_type());
    LX_CHECK(v_in.device() == y.device(), op, ": v must be on ", y.device(), ", got ",
             v_in.device());
    LX_CHECK(v_in.size(0) == y.size(0), op, ": v.shape[0] must equal y.shape[0] = ", y.size(0),
             ", got ", v_in.size(0));
    const Bank bank = make_bank(op, nullptr, &b, {}, ranks, page_table, y, "y", 0, y.size(1));
    LX_CHECK(v_in.size(1) == bank.view.max_rank, op, ": v.shape[1] must equal the rank of b, ",
             bank.view.max_rank, ", got ", v_in.size(1));
    at::assert_no_overlap(y, v_in);
    const Tensor v = rows_contiguous(v_in);
    args.num_tokens = y.size(0);
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    args.v = const_cast<void*>(v.const_data_ptr());
    args.v_row_stride = v.stride(0);
    execute(op, Step::kExpand, args, bank, y, adapter_ids, plan);
}

namespace {

void apply_to(const char* op, const Tensor& y, const Tensor& x_in, const Tensor& a, const Tensor& b,
              const Tensor& adapter_ids, const OptionalTensor& scale, const OptionalTensor& ranks,
              const OptionalTensor& page_table, const OptionalTensor& plan) {
    check_dim(op, "x", x_in, 2, "(T, I)");
    check_output(op, y);
    LoraArgs args;
    args.dtype = dtype_of(op, "x", x_in);
    check_like(op, "y", y, x_in, "x");
    LX_CHECK(y.size(0) == x_in.size(0), op, ": y.shape[0] must equal x.shape[0] = ", x_in.size(0),
             ", got ", y.size(0));
    at::assert_no_overlap(y, x_in);
    const Tensor x = rows_contiguous(x_in);
    const Bank bank = make_bank(op, &a, &b, scale, ranks, page_table, x, "x", x.size(1), y.size(1));
    args.num_tokens = x.size(0);
    args.x = x.const_data_ptr();
    args.x_row_stride = x.stride(0);
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    execute(op, Step::kApply, args, bank, x, adapter_ids, plan);
}

}  // namespace

Tensor lora_apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& adapter_ids,
                  const OptionalTensor& scale, const OptionalTensor& ranks,
                  const OptionalTensor& page_table, const OptionalTensor& plan) {
    constexpr auto op = "lora_apply";
    check_dim(op, "x", x, 2, "(T, I)");
    check_dim(op, "b", b, 3, page_table ? "(P, O, 8)" : "(A, O, R)");
    check_no_tangents(op, {&x, &a, &b});
    Tensor y = at::zeros({x.size(0), b.size(1)}, x.options());
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan);
    return y;
}

void lora_apply_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b,
                 const Tensor& adapter_ids, const OptionalTensor& scale,
                 const OptionalTensor& ranks, const OptionalTensor& page_table,
                 const OptionalTensor& plan) {
    constexpr auto op = "lora_apply_";
    check_inference(op, {&y, &x, &a, &b});
    apply_to(op, y, x, a, b, adapter_ids, scale, ranks, page_table, plan);
}

std::string cpu_isa() {
    return twin().isa;
}

void set_cpu_isa(const std::string& isa) {
    const LoraCpu* chosen = isa.empty() ? nullptr : lora_cpu(isa.c_str());
    LX_CHECK(isa.empty() || chosen, "set_cpu_isa: this machine or build has no instruction set '",
             isa, "'");
    chosen_twin = chosen;
}

bool has_kernels() {
#if defined(LORA_EXT_WITH_CUDA)
    return true;
#else
    return false;
#endif
}

void set_debug(bool on) {
    debug_mode = on;
}

}  // namespace lora_ext
