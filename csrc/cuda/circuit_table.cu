// Leaves of finite families, looked up in a table of log-probabilities; formula in
// circuit_layers.h. Forward: a thread per unit and lane, bound by the bytes written. Backward: a
// thread per entry of the table goes through the rows of data in order, which are few beside it.
#include "circuit_layers.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 4)
    circuit_table_kernel(const __grid_constant__ CircuitTableArgs args) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t unit = at / args.lanes, lane = at % args.lanes;
    if (unit >= args.blocks * args.block) return;
    const int64_t m = unit / args.block, j = unit % args.block;
    const int64_t x = lane < args.rows ? args.x[lane * args.blocks + m] : -1;
    const float* table = static_cast<const float*>(args.table);
    static_cast<float*>(args.e)[at] = x < 0 ? 0.0f : table[(args.row[m] + j) * args.values + x];
}

__global__ void __launch_bounds__(kThreads, 4)
    circuit_table_backward_kernel(const __grid_constant__ CircuitTableArgs args) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t row = at / args.values, value = at % args.values;
    if (row >= args.table_rows) return;
    float sum = 0;
    for (int64_t m = 0; m < args.blocks; ++m) {
        const int64_t j = row - args.row[m];
        if (j < 0 || j >= args.block) continue;
        const float* de = static_cast<const float*>(args.de) + (m * args.block + j) * args.de_unit;
        for (int64_t b = 0; b < args.rows; ++b)
            if (args.x[b * args.blocks + m] == value) sum += de[b * args.de_row];
    }
    static_cast<float*>(args.dtable)[at] = sum;
}

void declare_table(const CircuitTableArgs& args) {
    LX_BUF(args.x, args.rows * args.blocks * 8, lx::Access::kConstant);
    LX_BUF(args.row, args.blocks * 8, lx::Access::kConstant);
}

}  // namespace

LaunchStatus launch_circuit_table(const CircuitTableArgs& args, void* stream) {
    const int64_t count = args.blocks * args.block * args.lanes;
    if (ceil_div(count, kThreads) > kMaxGridX) return kInvalidValue;
    declare_table(args);
    LX_BUF(args.table, args.table_rows * args.values * 4, lx::Access::kConstant);
    LX_BUF(args.e, count * 4, lx::Access::kWrite);
    return LX_LAUNCH(circuit_table_kernel, static_cast<unsigned>(ceil_div(count, kThreads)),
                     kThreads, 0, stream, args);
}

LaunchStatus launch_circuit_table_backward(const CircuitTableArgs& args, void* stream) {
    const int64_t count = args.table_rows * args.values;
    if (ceil_div(count, kThreads) > kMaxGridX) return kInvalidValue;
    declare_table(args);
    declare_strided(args.de, args.rows, args.de_row, args.blocks * args.block, args.de_unit);
    LX_BUF(args.dtable, count * 4, lx::Access::kWrite);
    return LX_LAUNCH(circuit_table_backward_kernel,
                     static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream, args);
}

}  // namespace lora_ext
