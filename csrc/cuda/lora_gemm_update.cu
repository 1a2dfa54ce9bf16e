// The products with v and dv at large ranks, v -> y and dv -> dx: lora_gemm.cuh.
#include "lora_gemm.cuh"

namespace lora_ext {

LaunchStatus run_gemm_expand(const LoraArgs& args, const Partials& v, bool dependent,
                             void* stream) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype);
    Gemm gemm{};
    gemm.lora = args;
    gemm.left = v.data;
    gemm.left_row_stride = v.row_stride;
    gemm.width = bank.out_features;
    gemm.out = args.y;
    gemm.out_row_stride = args.y_row_stride;
    gemm.left_aligned = aligned_16(v.data, {v.row_stride}, 4);
    gemm.right_aligned =
        aligned_16(bank.b, {bank.b_slot_stride, bank.b_page_stride, bank.b_row_stride}, size);
    gemm.out_aligned = aligned_16(args.y, {args.y_row_stride}, size);
    return with_dtype(args.dtype, [&]<class T>() {
        const auto launch = [&]<int kRows>() {
            return launch_gemm<T, Product::kExpand, kRows>(gemm, bank.out_features, 1, dependent,
                                                           stream);
        };
        switch (lora_chunk_rows(args.num_tokens)) {
            case 16:
                return launch.template operator()<16>();
            case 64:
                return launch.template operator()<64>();
            default:
                return launch.template operator()<kMostRows<T, Product::kExpand>>();
        }
    });
}

LaunchStatus run_gemm_input_gradient(const LoraTrainArgs& args, void* stream) {
    const LoraArgs& lora = args.lora;
    const LoraBank& bank = lora.bank;
    const int64_t size = element_size(lora.dtype);
    Gemm gemm{};
    gemm.lora = lora;
    gemm.dropout = args.dropout;
    gemm.left = args.dv;
    gemm.left_row_stride = args.dv_row_stride;
    gemm.width = bank.in_features;
    gemm.out = args.dx;
    gemm.out_row_stride = args.dx_row_stride;
    gemm.left_aligned = aligned_16(args.dv, {args.dv_row_stride}, 4);
    gemm.right_aligned =
        aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, size);
    gemm.out_aligned = aligned_16(args.dx, {args.dx_row_stride}, size);
    return with_dtype(lora.dtype, [&]<class T>() {
        return lora_chunk_rows(lora.num_tokens) == 128
                   ? launch_gemm<T, Product::kInput, kMostRows<T, Product::kInput>>(
                         gemm, bank.in_features, 1, false, stream)
                   : launch_gemm<T, Product::kInput, 64>(gemm, bank.in_features, 1, false, stream);
    });
}

}  // namespace lora_ext
