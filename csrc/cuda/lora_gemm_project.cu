// The projections onto large ranks, x -> v and dy -> dv: lora_gemm.cuh.
#include "lora_gemm.cuh"

namespace lora_ext {
namespace {

template <Product kProduct>
LaunchStatus launch(const Gemm& args, int64_t splits, void* stream) {
    const LoraArgs& lora = args.lora;
    return with_dtype(lora.dtype, [&]<class T>() {
        return lora_chunk_rows(lora.num_tokens) == 128
                   ? launch_gemm<T, kProduct, kMostRows<T, kProduct>>(args, lora.bank.max_rank,
                                                                      splits, false, stream)
                   : launch_gemm<T, kProduct, 64>(args, lora.bank.max_rank, splits, false, stream);
    });
}

}  // namespace

LaunchStatus run_gemm_shrink(const LoraArgs& args, const Partials& v, void* stream) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype);
    Gemm gemm{};
    gemm.lora = args;
    gemm.left = args.x;
    gemm.left_row_stride = args.x_row_stride;
    gemm.width = bank.in_features;
    gemm.out = v.data;
    gemm.out_row_stride = v.row_stride;
    gemm.slice_width = v.split_width;
    gemm.slice_count = 1;
    gemm.split_stride = v.split_stride;
    gemm.finished = v.scaled;
    gemm.left_aligned = aligned_16(args.x, {args.x_row_stride}, size);
    gemm.right_aligned =
        aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, size);
    return launch<Product::kShrink>(gemm, v.splits, stream);
}

LaunchStatus run_gemm_projection(const Projection& args, bool side_b, const Slices& slices,
                                 void* stream) {
    Gemm gemm{};
    gemm.lora = args.lora;
    gemm.dropout = args.dropout;
    gemm.left = args.lora.x;
    gemm.left_row_stride = args.lora.x_row_stride;
    gemm.width = side_b ? args.lora.bank.out_features : args.lora.bank.in_features;
    gemm.out = args.out;
    gemm.out_row_stride = args.out_row_stride;
    gemm.slice_width = slices.width;
    gemm.slice_count = slices.per_block;
    gemm.split_stride = slices.split_stride;
    gemm.finished = slices.finished;
    gemm.left_aligned = slices.x_aligned;
    gemm.right_aligned = slices.w_aligned;
    const int64_t splits = slices.count / slices.per_block;
    return side_b ? launch<Product::kProject>(gemm, splits, stream)
                  : launch<Product::kShrink>(gemm, splits, stream);
}

}  // namespace lora_ext
