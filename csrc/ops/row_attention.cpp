// Attention of one query row at a time: checks, memory, choice of CPU twin or CUDA kernel.
#include "ops/row_attention.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "lora_ext/row_attention.h"
#include "ops/checks.h"
#include "ops/deal.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

constexpr const char* kOp = "row_attention";
// Minimum number of multiplications per thread.
constexpr int64_t kSerialProducts = 1 << 18;

// Returns t if its last axis is contiguous, else a copy, and sets the data and strides of the
// result.
Tensor lie(const Tensor& t, const void*& data, int64_t (&stride)[3]) {
    const Tensor kept = t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous();
    data = kept.const_data_ptr();
    for (int i = 0; i < 3; ++i) stride[i] = kept.size(i) > 1 ? kept.stride(i) : 0;
    return kept;
}

// Checks spans or a mask of shape (B or 1, T, last).
void check_rows(const char* name, const Tensor& t, const char* letters,
                const RowAttentionArgs& args, int64_t last, at::ScalarType dtype,
                at::Device device) {
    check_dtype(kOp, name, t, dtype);
    check_dim(kOp, name, t, 3, letters);
    const int64_t batch = t.size(0) == 1 ? 1 : args.batch;
    check_shape(kOp, name, t, letters, {batch, args.rows, last}, device);
}

void run(RowAttentionArgs& args) {
    const RowAttentionCpu& twin = chosen_twins<RowAttentionCpu>();
    const int64_t apart = args.seen_alike ? 1 : args.batch;
    std::vector<SeenKeys> seen(static_cast<size_t>(apart * args.rows));
    args.seen = seen.data();
    for_items(apart * args.rows, args.mask ? args.keys : 1, kSerialProducts,
              [&](int64_t begin, int64_t end) { twin.see(args, begin, end); });
    const int64_t bytes = twin.scratch_bytes(args);
    const auto attend = [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        twin.attend(args, begin, end, scratch.get(static_cast<size_t>(bytes)));
    };
    const int64_t items = args.batch * args.groups * ceil_div(args.rows, attention_block(args));
    const int64_t products = args.batch * args.heads * args.rows * args.keys *
                             std::max<int64_t>(args.width + args.value_width, 1);
    if (products < 2 * kSerialProducts)
        attend(0, items);
    else
        deal_items(items, 1, attend);
}

}  // namespace

Tensor row_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale,
                     bool causal, const OptionalTensor& spans, const OptionalTensor& mask) {
    check_no_tangents(kOp, {&q_in, &k_in, &v_in});
    RowAttentionArgs args;
    args.dtype = dtype_of(kOp, "q", q_in);
    check_dim(kOp, "q", q_in, 4, "(B, H, T, D)");
    check_dim(kOp, "k", k_in, 4, "(B, G, L, D)");
    args.batch = q_in.size(0), args.heads = q_in.size(1), args.rows = q_in.size(2);
    args.width = q_in.size(3), args.groups = k_in.size(1), args.keys = k_in.size(2);
    check_like(kOp, "k", k_in, q_in, "q");
    check_shape(kOp, "k", k_in, "(B, G, L, D)", {args.batch, args.groups, args.keys, args.width},
                q_in.device());
    require(args.groups > 0 ? args.heads % args.groups == 0 : args.heads == 0, kOp, "k",
            expected("a number of heads that divides that of q, ", args.heads), found(args.groups));
    check_like(kOp, "v", v_in, q_in, "q");
    check_dim(kOp, "v", v_in, 4, "(B, G, L, E)");
    args.value_width = v_in.size(3);
    check_shape(kOp, "v", v_in, "(B, G, L, E)",
                {args.batch, args.groups, args.keys, args.value_width}, q_in.device());
    require(std::max({args.rows, args.keys, args.width, args.value_width}) <= kMaxSize, kOp, "q",
            expected("at most ", kMaxSize, " rows, keys and features"), found(q_in.sizes()));
    require(std::isfinite(scale), kOp, "scale", expected("a finite number"), found(scale));
    args.scale = scale, args.causal = causal;
    Tensor spans_kept, mask_kept;
    if (spans) {
        check_rows("spans", *spans, "(B or 1, T, 2)", args, 2, at::kLong, q_in.device());
        spans_kept = spans->contiguous();
        args.spans = spans_kept.const_data_ptr<int64_t>();
        args.spans_stride = spans->size(0) == 1 ? 0 : 2 * args.rows;
    }
    if (mask) {
        check_rows("mask", *mask, "(B or 1, T, L)", args, args.keys, at::kBool, q_in.device());
        mask_kept = args.keys <= 1 || mask->stride(2) == 1 ? *mask : mask->contiguous();
        args.mask = mask_kept.const_data_ptr<bool>();
        args.mask_stride[0] = mask->size(0) == 1 ? 0 : mask_kept.stride(0);
        args.mask_stride[1] = mask_kept.stride(1);
    }
    Tensor out = at::empty({args.batch, args.rows, args.heads, args.value_width}, q_in.options());
    if (out.numel() == 0) return out.transpose(1, 2);
    const Tensor q = lie(q_in, args.q, args.q_stride), k = lie(k_in, args.k, args.k_stride);
    const Tensor v = lie(v_in, args.v, args.v_stride);
    args.out = out.mutable_data_ptr();
    args.seen_alike = args.spans_stride == 0 && args.mask_stride[0] == 0;
    if (launches_kernels(q)) {
        const c10::DeviceGuard guard(q.device());
        check_launch(kOp, launch_row_attention(args, current_stream(q)));
    } else {
        run(args);
    }
    return out.transpose(1, 2);
}

}  // namespace lora_ext
