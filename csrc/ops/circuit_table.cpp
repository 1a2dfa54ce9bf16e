// Tables of finite distributions: checks, allocation, choice of CPU twins or CUDA kernels.
//
// Shapes: table (R, V), x (B, M), row (M,), e (B, M * block).
#include <ATen/ops/empty.h>

#include <algorithm>

#include "lora_ext/circuit_layers.h"
#include "ops/checks.h"
#include "ops/circuit_layers.h"
#include "ops/reuse.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Work that one thread does in 20 to 30 us (AVX-512); for less, a second thread costs more than it
// saves.
constexpr int64_t kSerialEntries = 1 << 16, kSerialLookups = 1 << 17;

// Return the checked arguments; the caller sets the outputs.
CircuitTableArgs table_args(const char* op, const Tensor& table, const Tensor& x, const Tensor& row,
                            int64_t block, std::string_view norm) {
    CircuitTableArgs args;
    args.dtype = dtype_of(op, "table", table);
    require(args.dtype == DType::kFloat32 || args.dtype == DType::kFloat64, op, "table",
            expected("float32 or float64"), found(table.scalar_type()));
    require(norm == "logits" || norm == "none", op, "norm", expected("'logits' or 'none'"),
            found("'", norm, "'"));
    args.norm = norm == "logits" ? WeightNorm::kLogits : WeightNorm::kLog;
    check_dim(op, "table", table, 2, "(R, V)");
    check_dtype(op, "x", x, at::kLong);
    check_dim(op, "x", x, 2, "(B, M)");
    check_device(op, "x", x, table.device());
    require(block > 0 && block <= kMaxSize, op, "block", expected("a size of 1 to ", kMaxSize),
            found(block));
    args.rows = x.size(0), args.lanes = ceil_div(args.rows, kLaneGroup) * kLaneGroup;
    args.blocks = x.size(1), args.block = block;
    args.table_rows = table.size(0), args.values = table.size(1);
    require(args.lanes <= kMaxSize && args.blocks * block <= kMaxSize &&
                args.table_rows <= kMaxSize && args.values <= kMaxSize && args.values > 0,
            op, "table", expected("sizes of at most ", kMaxSize, " and at least one value"),
            found(table.sizes()));
    args.table = table.const_data_ptr();
    args.row = vector_data<int64_t>(op, "row", row, args.blocks, at::kLong, table.device());
    args.x = x.const_data_ptr<int64_t>();
    if (!table.is_cpu() && !debug_mode()) return args;
    const Tensor host_row = row.cpu().contiguous(), host_x = x.cpu();
    for (int64_t m = 0; m < args.blocks; ++m) {
        const int64_t first = host_row.const_data_ptr<int64_t>()[m];
        require(first >= 0 && first % block == 0 && first <= args.table_rows - block, op, "row",
                expected("multiples of ", block, " within the table"), found(first));
    }
    const int64_t* values = host_x.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < x.numel(); ++i)
        require(values[i] >= -1 && values[i] < args.values, op, "x",
                expected("values in -1 .. ", args.values - 1), found(values[i]));
    return args;
}

const CircuitTableCpu& twin() {
    return chosen_twins<CircuitTableCpu>();
}
// Calls f(args, begin, end, scratch) for parts of [0, items).
template <class F>
void with_scratch(const CircuitTableArgs& args, F f, int64_t items, int64_t work, int64_t serial) {
    const auto bytes = static_cast<size_t>(twin().scratch_bytes(args));
    for_items(items, work, serial, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        f(args, begin, end, scratch.get(bytes));
    });
}

}  // namespace

Tensor circuit_table(const Tensor& table_in, const Tensor& x_in, const Tensor& row, int64_t block,
                     std::string_view norm) {
    constexpr auto op = "circuit_table";
    const Tensor table = table_in.contiguous(), x = x_in.contiguous();
    CircuitTableArgs args = table_args(op, table, x, row, block, norm);
    const Tensor e = reused_memory({args.blocks * block, args.lanes}, table.options());
    const Tensor result = e.narrow(1, 0, args.rows).t();
    if (e.numel() == 0) return result;
    const c10::DeviceGuard guard(table.device());
    const bool logits = args.norm == WeightNorm::kLogits;
    const Tensor norms = at::empty({logits ? 2 * args.table_rows : 0}, table.options());
    if (logits) {
        args.base = norms.mutable_data_ptr();
        args.shift = static_cast<char*>(args.base) + args.table_rows * table.element_size();
    }
    args.e = e.mutable_data_ptr();
    if (launches_kernels(table)) {
        check_launch(op, launch_circuit_table(args, current_stream(table)));
        return result;
    }
    if (logits)
        for_items(args.table_rows, args.values, kSerialEntries,
                  [&](int64_t begin, int64_t end) { twin().norms(args, begin, end); });
    for_items(args.blocks, block * args.lanes, kSerialLookups,
              [&](int64_t begin, int64_t end) { twin().forward(args, begin, end); });
    return result;
}

Tensor circuit_table_backward(const Tensor& de, const Tensor& table_in, const Tensor& x_in,
                              const Tensor& row, int64_t block, std::string_view norm) {
    constexpr auto op = "circuit_table_backward";
    const Tensor table = table_in.contiguous(), x = x_in.contiguous();
    CircuitTableArgs args = table_args(op, table, x, row, block, norm);
    check_dtype(op, "de", de, table.scalar_type());
    check_shape(op, "de", de, "(B, M * block)", {args.rows, args.blocks * block}, x.device());
    Tensor dtable = reused_memory({args.table_rows, args.values}, de.options()).zero_();
    if (de.numel() == 0) return dtable;
    const c10::DeviceGuard guard(de.device());
    args.de = de.const_data_ptr();
    args.de_row = de.stride(0), args.de_unit = de.stride(1);
    args.dtable = dtable.mutable_data_ptr();
    if (launches_kernels(de)) {
        check_launch(op, launch_circuit_table_backward(args, current_stream(de)));
        return dtable;
    }
    with_scratch(args, twin().backward, ceil_div(block, kLaneGroup),
                 kLaneGroup * args.blocks * args.rows, kSerialLookups);
    if (args.norm == WeightNorm::kLogits)
        with_scratch(args, twin().finish, args.table_rows, args.values, kSerialEntries);
    return dtable;
}

}  // namespace lora_ext
