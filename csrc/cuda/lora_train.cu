// The training launchers. They choose kernels by sizes that the host knows. They neither allocate
// memory nor wait for the device.
//
//   shrink     x -> v            projection of side A, with the mask
//              v -> v, weighed   with factors; `weighed` with weights
//   backward   v -> weighed      with weights, for db
//              dy -> dv          projection of side B              if da or dx is needed
//              dy, v -> db       gradient of the weights           with dv in one pass over dy
//              dv, v -> dv, dw   with factors
//              x, dv -> da       the kernel that also computes db, with the mask
//              dv -> dx          in place, with the mask
//
// Large ranks use the kernels of lora_gemm.cuh and lora_gemm_weights.cu. The stages of the backward
// pass run one after another on one stream and share one workspace.
#include "lora_train.cuh"

namespace lora_ext {
namespace {

LoraArgs side_b(const LoraTrainArgs& args) {
    LoraArgs lora = args.lora;
    lora.x = args.dy;
    lora.x_row_stride = args.dy_row_stride;
    return lora;
}

// Returns the arguments of the gradient db, dy^T v, if `of_b`, otherwise of da, (mask x)^T dv.
Gradient gradient(const LoraTrainArgs& args, bool of_b) {
    const LoraArgs& lora = args.lora;
    Gradient g{};
    g.x = of_b ? args.dy : lora.x;
    g.x_row_stride = of_b ? args.dy_row_stride : lora.x_row_stride;
    g.width = of_b ? lora.bank.out_features : lora.bank.in_features;
    if (!of_b) g.dropout = args.dropout;
    g.v = static_cast<const float*>(of_b ? lora.v : args.dv);
    g.v_row_stride = of_b ? lora.v_row_stride : args.dv_row_stride;
    g.plan = lora.plan;
    g.ranks = lora.bank.ranks;
    g.num_tokens = lora.num_tokens;
    g.num_adapters = lora.bank.num_adapters;
    g.max_rank = lora.bank.max_rank;
    g.dtype = lora.dtype;
    g.out = of_b ? args.db : args.da;
    g.rank_major = !of_b;
    return g;
}

LaunchStatus check(const LoraTrainArgs& args) {
    const LoraBank& bank = args.lora.bank;
    return bank.max_rank < 0 || bank.page_table ? kInvalidValue : 0;
}
bool no_adapters(const LoraTrainArgs& args) {
    return args.lora.bank.max_rank == 0 || args.lora.bank.num_adapters == 0;
}

Partials whole_v(const LoraTrainArgs& args) {
    const LoraArgs& lora = args.lora;
    return {static_cast<float*>(lora.v), lora.v_row_stride, 0, 1, 0, lora.bank.max_rank, false};
}
FloatRows weighed_rows(const LoraTrainArgs& args) {
    return {static_cast<float*>(args.weighed), args.weighed_row_stride};
}

// Computes y = mask * x / (1 - p). Each thread writes 16 bytes of a row, and y is contiguous.
template <class T>
__global__ void __launch_bounds__(256)
    lora_dropout_kernel(const T* x, int64_t x_row_stride, T* y, int64_t rows, int width, int pieces,
                        bool aligned, const __grid_constant__ LoraDropout dropout) {
    const int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x;
    if (index >= rows * pieces) return;
    const int64_t row = index / pieces;
    const int column = static_cast<int>(index % pieces) * kVec<T>;
    const int n = width - column;
    bool keep[kVec<T>];
    keep_elements_of(mask_of(dropout, 0, 0), static_cast<uint32_t>(row), column, keep);
    const T* from = x + row * x_row_stride + column;
    const uint4 words = aligned ? load_words<T, true>(from, n) : load_words<T, false>(from, n);
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
            const float2 v = lx::unpack_floats<T>(w[i]);
            out[i] = lx::pack_floats<T>(v.x * dropout.inverse_keep, v.y * dropout.inverse_keep);
        } else {
            out[i] = lx::bit_cast<uint32_t>(lx::bit_cast<float>(w[i]) * dropout.inverse_keep);
        }
    }
    const uint4 kept = drop_elements<T>({out[0], out[1], out[2], out[3]}, keep);
    store_piece(y + row * width + column, n, aligned, kept);
}

}  // namespace

int64_t lora_train_shrink_workspace_bytes(const LoraTrainArgs& args) {
    return check(args) || no_adapters(args) ? 0 : projection_workspace(args.lora, false);
}

int64_t lora_train_backward_workspace_bytes(const LoraTrainArgs& args) {
    if (check(args) || no_adapters(args)) return 0;
    const Gradient db = gradient(args, true);
    const LoraArgs side = side_b(args);
    const int64_t gradients =
        lx::max(gradient_workspace(gradient(args, false)), gradient_workspace(db));
    const int64_t pass = takes_one_pass(db, side) ? one_pass_workspace(db, side) : 0;
    return lx::max(lx::max(projection_workspace(side, true), gradients), pass);
}

LaunchStatus launch_lora_train_shrink(const LoraTrainArgs& args, void* stream) {
    if (const LaunchStatus status = check(args)) return status;
    if (no_adapters(args) || args.lora.num_tokens == 0) return 0;
    const bool factors = has_factors(args.lora);
    const LoraTrainArgs sums = factors ? without_factors(args) : args;
    const Projection step{sums.lora, sums.dropout, static_cast<float*>(args.lora.v),
                          args.lora.v_row_stride};
    const LaunchStatus status = run_projection(step, false, args.workspace, stream);
    if (status || !factors) return status;
    return run_weigh(args.lora, whole_v(args), args.dropout.inverse_keep,
                     {static_cast<float*>(args.lora.v), args.lora.v_row_stride}, weighed_rows(args),
                     false, stream);
}

LaunchStatus launch_lora_train_backward(const LoraTrainArgs& args, void* stream) {
    if (const LaunchStatus status = check(args)) return status;
    if (no_adapters(args)) return 0;
    const bool rows = args.lora.num_tokens > 0, factors = has_factors(args.lora);
    const LoraTrainArgs sums = factors ? without_factors(args) : args;
    LoraDropout factor = sums.dropout;
    factor.threshold = 0;  // dy has no mask, only the factor 1 / (1 - p)
    const Projection dv{side_b(sums), factor, static_cast<float*>(args.dv), args.dv_row_stride};
    Gradient db = gradient(args, true);
    const bool wants_dv = rows && (args.da || args.dx || args.dweights);
    const bool one_pass = wants_dv && args.db && takes_one_pass(db, dv.lora);
    LaunchStatus status = 0;
    if (args.lora.weights && rows && args.db) {
        LoraArgs unscaled = args.lora;
        unscaled.bank.scale = nullptr;
        status = run_weigh(unscaled, whole_v(args), 1.0f, {}, weighed_rows(args), false, stream);
        db.v = static_cast<const float*>(args.weighed);
        db.v_row_stride = args.weighed_row_stride;
    }
    if (!status && wants_dv && !one_pass) status = run_projection(dv, true, args.workspace, stream);
    if (!status && args.db)
        status = run_gradient(db, args.workspace, stream, one_pass ? &dv : nullptr);
    if (!status && factors && wants_dv) status = run_weigh_back(args, stream);
    if (!status && args.da) status = run_gradient(gradient(args, false), args.workspace, stream);
    if (!status && args.dx && rows && args.lora.bank.in_features > 0)
        status = run_input_gradient(args, stream);
    return status;
}

LaunchStatus launch_lora_dropout(const LoraTrainArgs& args, void* y, void* stream) {
    const LoraArgs& lora = args.lora;
    const int64_t size = element_size(lora.dtype);
    const int64_t width = lora.bank.in_features;
    const int64_t pieces = ceil_div(width * size, kPieceBytes);
    const int64_t blocks = ceil_div(lora.num_tokens * pieces, 256);
    if (blocks == 0) return 0;
    if (blocks > INT32_MAX) return kInvalidValue;
    const bool aligned =
        aligned_16(lora.x, {lora.x_row_stride, width}, size) && aligned_16(y, {}, size);
    LX_BUF_ROWS(lora.x, lora.num_tokens, width * size, lora.x_row_stride * size,
                lx::Access::kConstant);
    LX_BUF(y, lora.num_tokens * width * size, lx::Access::kWrite);
    declare_seed(args.dropout, 0);
    return with_dtype(lora.dtype, [&]<class T>() {
        return LX_LAUNCH(lora_dropout_kernel<T>, static_cast<unsigned>(blocks), 256, 0, stream,
                         static_cast<const T*>(lora.x), lora.x_row_stride, static_cast<T*>(y),
                         lora.num_tokens, static_cast<int>(width), static_cast<int>(pieces),
                         aligned, args.dropout);
    });
}

}  // namespace lora_ext
