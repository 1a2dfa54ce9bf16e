#include "ops/lora_args.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Checks a matrix with a number for each page of each adapter, and returns its data.
template <class T>
const T* page_data(const char* op, const char* name, const Tensor& t, const LoraBank& w,
                   at::ScalarType dtype, at::Device device) {
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, "(A, R / 8)", {w.num_adapters, w.pages_per_slot}, device);
    require(t.is_contiguous(), op, name, expected("a contiguous tensor"),
            found("strides ", t.strides()));
    return t.const_data_ptr<T>();
}

// Checks pages of float8_e4m3fn, (P, m, n), for up to `rank` ranks per adapter.
void check_float8(const char* op, const char* name, const Tensor& t, const Tensor& x,
                  const char* x_name, int64_t rank) {
    check_device(op, name, t, x.device());
    require(x.scalar_type() != at::kDouble, op, x_name,
            expected("float32, float16 or bfloat16 with pages of ", t.scalar_type()),
            found(x.scalar_type()));
    require(rank <= kRankSpan, op, "page_table.shape[1]",
            expected("at most ", kRankSpan / 8, " pages of ", t.scalar_type()), found(rank / 8));
    require(t.dim() != 3 || t.size(0) == 0 || t[0].is_contiguous(), op, name,
            expected("contiguous pages"), found("strides ", t.strides()));
}

}  // namespace

Bank bank_of(const char* op, const Tensor* a, const Tensor* b, const OptionalTensor& scale,
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
        check_dtype(op, "page_table", table, at::kInt);
        check_device(op, "page_table", table, x.device());
        slots = table.size(0);
        rank = 8 * table.size(1);
        require(rank <= kMaxSize, op, "page_table.shape[1]",
                expected("at most ", kMaxSize / 8, " pages"), found(table.size(1)));
        require(table.is_contiguous(), op, "page_table", expected("a contiguous tensor"),
                found("strides ", table.strides()));
        require(ranks.has_value(), op, "ranks", expected("the rank of each slot of the page_table"),
                found("None"));
        w.page_table = table.const_data_ptr<int32_t>();
        bank.page_table = table;
    }
    const auto factor = [&](const Tensor& t, const char* name, const char* shape, int rank_dim,
                            int width_dim, int64_t width, const char* width_owner) {
        const auto check_size = [&](int dim, bool holds, auto... what) {
            require(holds, op, words(name, ".shape[", dim, "]"), expected(what...),
                    found(t.size(dim)));
        };
        if (paged && t.scalar_type() == at::kFloat8_e4m3fn)
            check_float8(op, name, t, x, x_name, rank);
        else
            check_like(op, name, t, x, x_name);
        check_dim(op, name, t, 3, shape);
        check_size(width_dim, t.size(width_dim) == width, width_owner, " = ", width);
        if (paged) {
            check_size(rank_dim, t.size(rank_dim) == 8, "8, the ranks of a page");
            w.float8 = t.scalar_type() == at::kFloat8_e4m3fn;
            require(t.stride(-1) == 1 || t.size(-1) == 1, op, name,
                    expected("pages that are contiguous in their last dimension"),
                    found("strides ", t.strides()));
            return t;
        }
        check_size(0, slots < 0 || t.size(0) == slots, "a.shape[0] = ", slots);
        check_size(rank_dim, rank < 0 || t.size(rank_dim) == rank, "a.shape[1] = ", rank);
        slots = t.size(0);
        rank = t.size(rank_dim);
        check_size(rank_dim, rank <= kMaxSize, "a rank of at most ", kMaxSize);
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
    const char* bank_name = a ? "a" : "b";
    const int64_t pages = paged ? (a ? *a : *b).size(0) : 0;
    require(slots < kMaxAdapters, op, paged ? "page_table" : bank_name,
            expected("fewer than 2^24 adapters"), found(slots));
    require(in <= kMaxSize && out <= kMaxSize, op, bank_name,
            expected("at most ", kMaxSize, " features"), found(in, " and ", out));
    require(pages <= kMaxSize, op, bank_name, expected("at most ", kMaxSize, " pages"),
            found(pages));
    if (paged && a && b) {
        require(b->size(0) == pages, op, "b.shape[0]", expected("a.shape[0] = ", pages, " pages"),
                found(b->size(0)));
        require(a->scalar_type() == b->scalar_type(), op, "b",
                expected("the dtype of a, ", a->scalar_type()), found(b->scalar_type()));
    }
    w.num_adapters = static_cast<int32_t>(slots);
    w.max_rank = static_cast<int32_t>(rank);
    w.pages_per_slot = static_cast<int32_t>(ceil_div(rank, 8));
    w.num_pages = static_cast<int32_t>(pages);
    w.in_features = static_cast<int32_t>(in);
    w.out_features = static_cast<int32_t>(out);
    w.full_pages = paged || rank % 8 == 0;
    if (scale && scale->dim() == 2) {
        w.scale = page_data<float>(op, "scale", *scale, w, at::kFloat, x.device());
        w.scale_per_page = w.pages_per_slot != 1;
    } else if (scale) {
        w.scale = vector_data<float>(op, "scale", *scale, slots, at::kFloat, x.device());
    }
    if (ranks) w.ranks = vector_data<int32_t>(op, "ranks", *ranks, slots, at::kInt, x.device());
    return bank;
}

void widen_pages(LoraArgs& args, Bank& bank, const Tensor& x, const Tensor& ids) {
    LoraBank& w = args.bank;
    if (!w.float8 || !launches_kernels(x) || lora_reads_float8(args)) return;
    w.float8 = false;
    if (w.num_pages == 0) return;  // no page is read
    // Copies the pages of the slots that rows use. There may be no memory for the pages of others,
    // whose adapters may be unloaded. T ids use at most T slots, which are sorted to the front.
    const Tensor& table = bank.page_table;
    const int64_t slots = w.num_adapters;
    const Tensor flat = ids.flatten();
    const Tensor known = flat.masked_fill(flat.ge(slots), -1).clamp_min(-1).to(at::kLong).add_(1);
    const Tensor used = at::zeros({slots + 1}, table.options().dtype(at::kByte))
                            .index_fill_(0, known, 1)
                            .slice(0, 1);
    const Tensor first = used.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true)
                             .slice(0, 0, std::min(flat.numel(), slots));
    const Tensor rows = table.index_select(0, first);
    const Tensor absent = rows.lt(0)
                              .logical_or_(rows.ge(w.num_pages))
                              .logical_or_(used.index_select(0, first).eq(0).unsqueeze(1));
    const Tensor index = rows.masked_fill(absent, 0).flatten();
    const auto widened = [&](const Tensor& pages) {
        return pages.view(at::kByte)
            .index_select(0, index)
            .view(pages.scalar_type())
            .to(x.scalar_type());
    };
    const Tensor own = at::arange(rows.numel(), rows.options()).view(rows.sizes());
    bank.page_table = at::full_like(table, -1).index_copy_(0, first, own.masked_fill(absent, -1));
    w.page_table = bank.page_table.const_data_ptr<int32_t>();
    w.num_pages = static_cast<int32_t>(rows.numel());
    if (w.a) {
        bank.a = widened(bank.a);
        w.a = bank.a.const_data_ptr();
        w.a_page_stride = w.a_slot_stride = bank.a.stride(0);
        w.a_row_stride = bank.a.stride(1);
    }
    if (w.b) {
        bank.b = widened(bank.b);
        w.b = bank.b.const_data_ptr();
        w.b_page_stride = w.b_slot_stride = bank.b.stride(0);
        w.b_row_stride = bank.b.stride(1);
    }
}

void set_weights(const char* op, LoraArgs& args, Bank& bank, const OptionalTensor& weights,
                 const OptionalTensor& groups, const Tensor& ids) {
    const bool columns = ids.dim() == 2;
    if (weights) {
        const Tensor& w = *weights;
        check_dtype(op, "weights", w, at::kFloat);
        check_device(op, "weights", w, ids.device());
        const int64_t rows = ids.size(0), dim = w.dim();
        const bool fits = columns ? w.sizes() == ids.sizes()
                                  : (dim == 1 || (dim == 2 && w.size(1) >= 1)) && w.size(0) == rows;
        require(fits || columns, op, "weights", expected("shape (", rows, ",) or (", rows, ", G)"),
                found(w.sizes()));
        require(fits, op, "weights", expected("the shape of adapter_ids, ", ids.sizes()),
                found(w.sizes()));
        bank.weights = w.contiguous();
        args.weights = bank.weights.const_data_ptr<float>();
        args.weights_row_stride = dim == 2 ? w.size(1) : 1;
        args.bank.num_groups = static_cast<int32_t>(columns ? 1 : args.weights_row_stride);
    }
    if (!groups) return;
    require(!columns, op, "groups", expected("None with adapter_ids (T, K)"), found("a tensor"));
    require(weights && weights->dim() == 2, op, "groups",
            expected("None without weights of shape (T, G)"), found("a tensor"));
    args.bank.groups = page_data<int32_t>(op, "groups", *groups, args.bank, at::kInt, ids.device());
}

void check_inference(const char* op, std::initializer_list<const Tensor*> tensors) {
    check_no_tangents(op, tensors);
    if (!c10::GradMode::is_enabled()) return;
    for (const Tensor* t : tensors)
        TORCH_CHECK(!t->requires_grad(), op,
                    " has no backward; call it under torch.no_grad(), or "
                    "use lora_apply, which is differentiable");
}

void check_ids(const char* op, const Tensor& ids, int64_t rows, at::Device device) {
    require(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op, "adapter_ids",
            expected("int64 or int32"), found(ids.scalar_type()));
    require((ids.dim() == 1 || ids.dim() == 2) && ids.size(0) == rows, op, "adapter_ids",
            expected("shape (", rows, ",), one id per row"), found(ids.sizes()));
    require(ids.dim() == 1 || (ids.size(1) >= 1 && ids.size(1) <= kMaxColumns), op,
            "adapter_ids.shape[1]", expected("1 to ", kMaxColumns, " ids per row"),
            found(ids.size(-1)));
    check_device(op, "adapter_ids", ids, device);
}

Tensor columns_of(const Tensor& ids) {
    return ids.dim() == 2 ? ids.t().contiguous() : ids.contiguous().unsqueeze(0);
}

void check_plan_tensor(const char* op, const LoraPlanLayout& layout, int64_t columns,
                       const Tensor& plan, at::Device device) {
    const int64_t size = columns * layout.size();
    require(plan.scalar_type() == at::kInt && plan.is_contiguous() && plan.dim() == 1 &&
                plan.numel() == size && plan.device() == device,
            op, "plan",
            expected("lora_plan() of ", layout.num_tokens, " rows and ", layout.num_adapters,
                     " adapters on ", device, ", int32 of size ", size),
            found(plan.scalar_type(), " of shape ", plan.sizes(), " on ", plan.device()));
}

namespace {

template <typename Id>
bool plan_fits(const LoraPlanLayout& layout, const Id* ids, const int32_t* plan) {
    const int64_t rows = layout.num_tokens, chunks = plan[kPlanNumChunks];
    const int32_t* perm = plan + layout.perm();
    const int32_t* chunk = plan + layout.chunks();
    const int32_t* slot_begin = plan + layout.slot_begin();
    bool fits = chunks >= 0 && chunks <= layout.max_chunks() && slot_begin[0] == 0 &&
                slot_begin[layout.num_adapters + 1] == rows;
    for (int64_t s = 0; fits && s < layout.num_adapters; ++s)
        fits = slot_begin[s] <= slot_begin[s + 1] && slot_begin[s + 1] <= rows;
    int64_t covered = 0;  // rows covered by chunks, which are in order of (slot, start)
    for (int64_t c = 0; fits && c < chunks; ++c, chunk += 4) {
        const int64_t slot = chunk[0], start = chunk[1], len = chunk[2];
        fits = slot >= 0 && slot < layout.num_adapters && start == covered && len > 0 &&
               len <= layout.chunk_rows() && start >= slot_begin[slot] &&
               start + len <= slot_begin[slot + 1];
        covered = start + len;
        for (int64_t i = start; fits && i < start + len; ++i)
            fits = perm[i] >= 0 && perm[i] < rows && ids[perm[i]] == slot;
    }
    return fits && covered == slot_begin[layout.num_adapters];
}

}  // namespace

void check_plan(const char* op, const LoraPlanLayout& layout, const Tensor& ids,
                const int32_t* plan) {
    const bool fits = ids.scalar_type() == at::kLong
                          ? plan_fits(layout, ids.const_data_ptr<int64_t>(), plan)
                          : plan_fits(layout, ids.const_data_ptr<int32_t>(), plan);
    require(fits, op, "plan", expected("lora_plan() of these adapter_ids"),
            found("a plan of other ids"));
}

void check_slots(const char* op, const LoraBank& w, const int32_t* plan) {
    const int32_t* chunk = plan + kPlanHeader;
    for (int32_t c = 0; c < plan[kPlanNumChunks]; ++c, chunk += 4) {
        const int32_t s = chunk[0];
        const int32_t rank = w.ranks ? w.ranks[s] : w.max_rank;
        require(rank >= 0 && rank <= w.max_rank, op, words("ranks[", s, "]"),
                expected("a rank in [0, ", w.max_rank, "]"), found(rank));
        for (int32_t p = 0; w.groups && 8 * p < rank; ++p) {
            const int32_t group = w.groups[int64_t{s} * w.pages_per_slot + p];
            require(group >= 0 && group < w.num_groups, op, words("groups[", s, ", ", p, "]"),
                    expected("a column in [0, ", w.num_groups, ")"), found(group));
        }
        if (!w.page_table) continue;
        const int32_t* page = w.page_table + int64_t{s} * w.pages_per_slot;
        for (int32_t p = 0; 8 * p < rank; ++p)
            require(
                page[p] >= 0 && page[p] < w.num_pages, op, words("page_table[", s, ", ", p, "]"),
                expected("a page in [0, ", w.num_pages, "), as adapter ", s, " has rank ", rank),
                found(page[p]));
    }
}

void check_groups(const char* op, LoraBank w, const LoraPlanLayout& layout, const int32_t* plan,
                  at::Device device) {
    if (!w.groups) return;
    const auto host = [&](const int32_t* data, int64_t size) {
        const auto options = at::TensorOptions(device).dtype(at::kInt);
        return at::from_blob(const_cast<int32_t*>(data), {size}, options).cpu();
    };
    const Tensor chunks = host(plan, layout.size());
    const Tensor groups = host(w.groups, int64_t{w.num_adapters} * w.pages_per_slot);
    const Tensor ranks = w.ranks ? host(w.ranks, w.num_adapters) : Tensor();
    w.groups = groups.const_data_ptr<int32_t>();
    if (w.ranks) w.ranks = ranks.const_data_ptr<int32_t>();
    w.page_table = nullptr;  // kernels allow absent pages
    check_slots(op, w, chunks.const_data_ptr<int32_t>());
}

LoraPlanArgs plan_args(const Tensor& ids, int32_t num_adapters) {
    LoraPlanArgs args;
    args.adapter_ids = ids.const_data_ptr();
    args.ids_are_int64 = ids.scalar_type() == at::kLong;
    args.num_tokens = ids.size(0);
    args.num_adapters = num_adapters;
    return args;
}

void build_plan(const char* op, const Tensor& ids, LoraPlanArgs args, const Tensor& like,
                int64_t column) {
    if (launches_kernels(like)) {
        check_launch(op, launch_lora_plan(args, current_stream(like)));
        return;
    }
    lora_plan_cpu(args);
    if (args.plan[kPlanBadIds] != 0) raise_bad_id(op, ids, args.num_adapters, column);
}

[[noreturn]] void raise_bad_id(const char* op, const Tensor& ids, int64_t num_adapters,
                               int64_t column) {
    const Tensor host = ids.to(at::kCPU, at::kLong).contiguous();
    const int64_t* p = host.const_data_ptr<int64_t>();
    const int64_t* bad = std::find_if(p, p + host.numel(),
                                      [&](int64_t id) { return id < -1 || id >= num_adapters; });
    const auto at = expected("an id in [-1, ", num_adapters, ")");
    const auto value = found(bad == p + host.numel() ? -1 : *bad);
    if (column < 0) refuse(op, words("adapter_ids[", bad - p, "]"), at, value);
    refuse(op, words("adapter_ids[", bad - p, ", ", column, "]"), at, value);
}

}  // namespace lora_ext
