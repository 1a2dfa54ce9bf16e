// Leaves of variables with finitely many values, looked up in a table. The formula is in
// circuit_layers.h.
//
// Forward: a thread per unit and lane, bound by the bytes written. Backward: a thread per entry of
// the table iterates in order over the rows of data, which are few compared with the entries. If
// the table contains logits, a warp per row computes the norm of the row before the lookup. In the
// backward pass, a warp subtracts the share of the softmax from the flows of its row.
#include "circuit_layers.cuh"

namespace lora_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kRowWarps = 4;

LX_DEVICE WarpWeights<float> logits_of(const CircuitTableArgs& args, int64_t row) {
    LogSumArgs as_sum;
    as_sum.norm = WeightNorm::kLogits;
    const bool aligned = args.values % 4 == 0 && reinterpret_cast<uintptr_t>(args.table) % 16 == 0;
    WarpWeights<float> logits(as_sum, static_cast<const float*>(args.table) + row * args.values,
                              static_cast<int>(args.values), aligned);
    logits.find_top();
    return logits;
}
LX_DEVICE float sum_of(const WarpWeights<float>& logits) {
    float total = 0;
    logits.for_own([&](int, const float (&v)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total += logits.scaled(v[j]);
    });
    return WarpTeam(nullptr).reduce(total, add);
}

__global__ void __launch_bounds__(kRowWarps * 32, 4)
    circuit_table_norms_kernel(const __grid_constant__ CircuitTableArgs args) {
    const int64_t row = int64_t{blockIdx.x} * kRowWarps + lx::warp_id();
    if (row >= args.table_rows) return;
    const WarpWeights<float> logits = logits_of(args, row);
    const float total = sum_of(logits);
    if (lx::lane_id() != 0) return;
    static_cast<float*>(args.base)[row] = logits.base;
    static_cast<float*>(args.shift)[row] = logits.shift(total);
}

__global__ void __launch_bounds__(kThreads, 4)
    circuit_table_kernel(const __grid_constant__ CircuitTableArgs args) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t unit = at / args.lanes, lane = at % args.lanes;
    if (unit >= args.blocks * args.block) return;
    const int64_t m = unit / args.block, row = args.row[m] + unit % args.block;
    const int64_t x = lane < args.rows ? args.x[lane * args.blocks + m] : -1;
    float l = 0;
    if (x >= 0) l = static_cast<const float*>(args.table)[row * args.values + x];
    if (x >= 0 && args.norm == WeightNorm::kLogits)
        l = l - static_cast<const float*>(args.base)[row] +
            static_cast<const float*>(args.shift)[row];
    static_cast<float*>(args.e)[at] = l;
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

// Converts a row's flows to gradients of logits: subtracts from each flow softmax * sum of flows.
__global__ void __launch_bounds__(kRowWarps * 32, 4)
    circuit_table_finish_kernel(const __grid_constant__ CircuitTableArgs args) {
    const int64_t row = int64_t{blockIdx.x} * kRowWarps + lx::warp_id();
    if (row >= args.table_rows) return;
    const WarpWeights<float> logits = logits_of(args, row);
    const float total = sum_of(logits);
    float* d = static_cast<float*>(args.dtable) + row * args.values;
    float flow = 0;
    for (int64_t i = lx::lane_id(); i < args.values; i += 32) flow += d[i];
    flow = WarpTeam(nullptr).reduce(flow, add);
    const float share = total == 0 ? 0.0f : lx::divide_approx(flow, total);
    for (int64_t i = lx::lane_id(); i < args.values; i += 32)
        d[i] -= logits.scaled(logits.w[i]) * share;
}

unsigned row_blocks(const CircuitTableArgs& args) {
    return static_cast<unsigned>(ceil_div(args.table_rows, kRowWarps));
}
void declare_table(const CircuitTableArgs& args) {
    LX_BUF(args.x, args.rows * args.blocks * 8, lx::Access::kConstant);
    LX_BUF(args.row, args.blocks * 8, lx::Access::kConstant);
    LX_BUF(args.table, args.table_rows * args.values * 4, lx::Access::kConstant);
}
void declare_norms(const CircuitTableArgs& args, lx::Access access) {
    LX_BUF(args.base, args.table_rows * 4, access);
    LX_BUF(args.shift, args.table_rows * 4, access);
}

}  // namespace

LaunchStatus launch_circuit_table(const CircuitTableArgs& args, void* stream) {
    const int64_t count = args.blocks * args.block * args.lanes;
    if (ceil_div(count, kThreads) > kMaxGridX) return kInvalidValue;
    const bool logits = args.norm == WeightNorm::kLogits;
    if (logits) {
        declare_table(args);
        declare_norms(args, lx::Access::kWrite);
        const LaunchStatus status = LX_LAUNCH(circuit_table_norms_kernel, row_blocks(args),
                                              kRowWarps * 32, 0, stream, args);
        if (status) return status;
    }
    declare_table(args);
    if (logits) declare_norms(args, lx::Access::kConstant);
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
    const LaunchStatus status =
        LX_LAUNCH(circuit_table_backward_kernel, static_cast<unsigned>(ceil_div(count, kThreads)),
                  kThreads, 0, stream, args);
    if (status || args.norm != WeightNorm::kLogits) return status;
    declare_table(args);
    LX_BUF(args.dtable, count * 4, lx::Access::kReadWrite);
    return LX_LAUNCH(circuit_table_finish_kernel, row_blocks(args), kRowWarps * 32, 0, stream,
                     args);
}

}  // namespace lora_ext
