// The products v -> y and dv -> dx for large ranks; lora_gemm.cuh has the kernel.
#include "lora_gemm.cuh"

namespace lora_ext {

LaunchStatus run_gemm_expand(const LoraArgs& args, const Partials& v, bool dependent,
                             void* stream) {
    Gemm gemm = gemm_of(args, v.data, v.row_stride, sizeof(float));
    take_b(gemm);
    give(gemm, args.y, args.y_row_stride);
    return launch_gemm<Product::kExpand>(gemm, 1, dependent, stream);
}

LaunchStatus run_gemm_input_gradient(const LoraTrainArgs& args, void* stream) {
    Gemm gemm = gemm_of(args.lora, args.dv, args.dv_row_stride, sizeof(float));
    take_a(gemm);
    give(gemm, args.dx, args.dx_row_stride);
    gemm.dropout = args.dropout;
    return launch_gemm<Product::kInput>(gemm, 1, false, stream);
}

}  // namespace lora_ext
