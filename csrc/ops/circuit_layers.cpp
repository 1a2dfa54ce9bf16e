// Whole circuits: checks, allocation, choice of CPU twins or CUDA kernels.
//
// Shapes: leaf (B, N), val (B, U), w (W,), root (B,), uniforms (M, draws). circuit_layers.h has the
// layouts of program and plan.
#include "ops/circuit_layers.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <vector>

#include "lora_ext/circuit_layers.h"
#include "ops/checks.h"
#include "ops/circuit_args.h"
#include "ops/reuse.h"
#include "ops/scratch.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Work that one thread does in 30 us (AVX-512); for less, a second thread costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 20, kSerialWeights = 1 << 16;

int64_t lanes_of(int64_t rows) {
    return ceil_div(rows, kLaneGroup) * kLaneGroup;
}
Tensor unit_major(int64_t units, int64_t rows, const at::TensorOptions& options) {
    return reused_memory({units, lanes_of(rows)}, options);
}
// Return the view (B, U) of memory (U, L).
Tensor rows_of(const Tensor& t, int64_t rows) {
    return t.narrow(1, 0, rows).t();
}

// Checks that every index in a program is in range, so that no CPU twin or kernel accesses memory
// outside its buffers.
void check_program(const char* op, const LayersProgram& p, int64_t size, int64_t weights) {
    const auto check = [&](bool holds, const char* what, int64_t i) {
        require(holds, op, "program", expected(what), found("a mismatch at index ", i));
    };
    require(size >= LayersProgram::kHeader, op, "program",
            expected("at least ", LayersProgram::kHeader, " numbers"), found(size, " numbers"));
    for (int i = 0; i < LayersProgram::kHeader; ++i)
        check(p.at[i] >= 0 && p.at[i] <= kMaxSize, "valid counts in the header", i);
    require(p.size() == size, op, "program", expected(p.size(), " numbers"), found(size));
    check(p.units() >= kFirstLeaf + p.leaves(), "a column for each leaf", 0);
    for (int64_t i = 0; i < p.num_children(); ++i) {
        const LayersChild c = p.children()[i];
        check(c.column >= 0 && c.units > 0 && c.column <= p.units() - c.units,
              "columns of children in the range of units", i);
    }
    int64_t covered = 0;
    for (int64_t i = 0; i < p.num_matrices(); ++i) {
        const LayersMatrix m = p.matrices()[i];
        const bool shape = m.units > 0 && m.width > 0 && m.row >= 0 && m.weight >= 0;
        check(shape && m.row <= p.rows() - m.units &&
                  m.weight + int64_t{m.units} * m.width <= weights,
              "matrices in the range of the weights", i);
        // A matrix that no node uses is rejected: max_width and max_units are maxima over nodes.
        check(m.user_begin >= 0 && m.user_begin < m.user_end && m.user_end <= p.num_users(),
              "users of a matrix in the range of the list of users", i);
        for (int64_t u = m.user_begin; u < m.user_end; ++u)
            check(p.users()[u] >= 0 && p.users()[u] < p.num_nodes() &&
                      p.nodes()[p.users()[u]].matrix == i,
                  "only nodes that use the matrix among its users", u);
        check(m.row == (i == 0 ? 0 : p.matrices()[i - 1].row + p.matrices()[i - 1].units) &&
                  (i + 1 < p.num_matrices() || m.row + m.units == p.rows()),
              "matrices with consecutive rows", i);
        covered += int64_t{m.units} * m.width;
    }
    require(covered == weights, op, "w", expected(covered, " weights"), found(weights));
    for (int64_t n = 0; n < p.num_nodes(); ++n) {
        const LayersNode node = p.nodes()[n];
        check(node.units > 0 && node.out >= kFirstLeaf + p.leaves() &&
                  node.out <= p.units() - node.units && node.matrix < p.num_matrices() &&
                  node.part_begin >= 0 && node.part_begin <= node.part_end &&
                  node.part_end <= p.num_parts(),
              "nodes with units, matrix and parts in range", n);
        int64_t width = 0;
        for (int64_t i = node.part_begin; i < node.part_end; ++i) {
            const LayersPart part = p.parts()[i];
            const int64_t count = int64_t{part.child_end} - part.child_begin;
            check(part.term == width && part.child_begin >= 0 && count >= 1 &&
                      part.child_end <= p.num_children() && (!part.kronecker || count == 2),
                  "parts with at least one child, kronecker parts with two", i);
            const LayersChild* c = p.children() + part.child_begin;
            for (int64_t k = 0; k < count; ++k)
                check((part.kronecker || c[k].units == c[0].units) &&
                          c[k].column + c[k].units <= node.out,
                      "children of equal size that precede their node", i);
            width += part.kronecker ? int64_t{c[0].units} * c[1].units : int64_t{c[0].units};
        }
        const LayersMatrix* m = node.matrix < 0 ? nullptr : p.matrices() + node.matrix;
        check(width == node.width && node.units == (m ? m->units : node.width) &&
                  (!m || m->width == node.width),
              "the number of terms of the node's parts", n);
    }
    for (int64_t i = 0; i < p.num_roots(); ++i)
        check(p.roots()[i] >= 0 && p.roots()[i] < p.units(), "roots in the range of units", i);
}

// Checks that a walk accesses only its own buffers: every child and root is a unit of an earlier
// node, or a leaf of one of the `variables`.
void check_walk(const char* op, const LayersProgram& p, const LayersPlan& plan) {
    const auto check = [&](bool holds, const char* what, int64_t i) {
        require(holds, op, "program", expected(what), found("a mismatch at index ", i));
    };
    // Checks that columns [column, column + units) belong to `owner`, which precedes node n.
    const auto check_owner = [&](int64_t i, int64_t n, int64_t column, int64_t units) {
        const int64_t owner = p.owners()[i];
        const bool leaf = owner < 0;
        check(leaf ? owner >= -plan.variables() : owner < n,
              "an earlier node or a variable as owner", i);
        const int64_t first = leaf ? kFirstLeaf : p.nodes()[owner].out;
        const int64_t end = first + (leaf ? p.leaves() : p.nodes()[owner].units);
        check(column >= first && column + units <= end, "columns that belong to their owner", i);
    };
    for (int64_t n = 0; n < p.num_nodes(); ++n) {
        const LayersNode node = p.nodes()[n];
        for (int64_t i = node.part_begin; i < node.part_end; ++i)
            for (int64_t c = p.parts()[i].child_begin; c < p.parts()[i].child_end; ++c)
                check_owner(c, n, p.children()[c].column, p.children()[c].units);
        const int64_t draw = p.draws()[n];
        check(node.matrix < 0 || (draw >= 0 && draw < plan.draws()), "indices of uniforms in range",
              n);
    }
    for (int64_t r = 0; r < p.num_roots(); ++r)
        check_owner(p.num_children() + r, p.num_nodes(), p.roots()[r], 1);
}

// Arguments of one call of any of the ops, and the tensors that own their memory.
struct Call {
    const char* op;
    LayersArgs args;
    LayersPlan plan;
    Tensor w, weight, shift;
    Tensor checked;              // the program on the host; undefined if it is not checked
    std::vector<Tensor> memory;  // buffers of kernels that run stage by stage
    at::TensorOptions options;
    bool kernels;

    Call(const char* op, const Tensor& values, const char* name, const Tensor& w_in,
         const Tensor& program, at::IntArrayRef plan_in, std::string_view norm)
        : op(op), plan{plan_in.data()}, w(w_in.contiguous()), options(values.options()) {
        args.dtype = dtype_of(op, name, values);
        require(args.dtype == DType::kFloat32 || args.dtype == DType::kFloat64, op, name,
                expected("float32 or float64"), found(values.scalar_type()));
        require(norm == "logits" || norm == "none", op, "norm", expected("'logits' or 'none'"),
                found("'", norm, "'"));
        args.norm = norm == "logits" ? WeightNorm::kLogits : WeightNorm::kLog;
        check_dim(op, name, values, 2, "(B, units)");
        check_dtype(op, "w", w, values.scalar_type());
        check_dim(op, "w", w, 1, "(W,)");
        check_device(op, "w", w, values.device());
        check_dtype(op, "program", program, at::kInt);
        check_device(op, "program", program, values.device());
        require(program.dim() == 1 && program.is_contiguous(), op, "program",
                expected("a contiguous vector"), found(program.sizes()));
        check_plan(plan_in);
        require(program.numel() == plan.numbers(), op, "program",
                expected(plan.numbers(), " numbers, the size in the plan"), found(program.numel()));
        args.program.at = program.const_data_ptr<int32_t>();
        // On a device the host would have to wait for the program, so only debug mode checks it.
        if (values.is_cpu() || debug_mode()) {
            checked = program.cpu();
            const LayersProgram p = checked_program();
            check_program(op, p, program.numel(), w.numel());
            require(p.units() == plan.units() && p.leaves() == plan.leaves() &&
                        p.rows() == plan.rows() && p.num_roots() == plan.roots() &&
                        p.num_nodes() == plan.nodes() && p.num_matrices() == plan.matrices() &&
                        p.num_stages() == plan.num_stages(),
                    op, "plan", expected("the sizes of the program"), found(plan_in));
            for (int64_t n = 0; n < p.num_nodes(); ++n) {
                args.max_width = std::max<int64_t>(args.max_width, p.nodes()[n].width);
                args.max_units = std::max<int64_t>(args.max_units, p.nodes()[n].units);
            }
        }
        args.plan = plan;
        args.rows = values.size(0), args.lanes = lanes_of(args.rows);
        require(args.lanes <= kMaxSize, op, name, expected("at most ", kMaxSize, " rows"),
                found(args.rows));
        args.w = w.const_data_ptr();
        args.num_weights = w.numel();
        kernels = launches_kernels(values);
    }
    void check_plan(at::IntArrayRef numbers) const {
        const auto size = static_cast<int64_t>(numbers.size());
        require(size >= LayersPlan::kHeader && size == plan.size() &&
                    std::all_of(numbers.begin(), numbers.end(),
                                [](int64_t n) { return n >= 0 && n <= kMaxSize; }),
                op, "plan", expected("sizes, with four numbers per stage"), found(numbers));
    }

    LayersProgram checked_program() const { return {checked.const_data_ptr<int32_t>()}; }
    int64_t groups() const { return args.lanes / kLaneGroup; }
    // Number of products per group of lanes: each weight is used once per lane.
    int64_t work() const { return w.numel() * kLaneGroup; }
    // Upper bound of the work of one walk, if an exponential takes as long as kLaneGroup products.
    int64_t walk_work() const { return plan.nodes() * args.max_width * kLaneGroup; }

    static const LayersCpu& twin() { return chosen_twins<LayersCpu>(); }
    // Calls f(args, begin, end, scratch) for parts of [0, items).
    template <class F>
    void on_threads(F f, int64_t items, int64_t work_per_item) const {
        const int64_t bytes = twin().scratch_bytes(args);
        for_items(items, work_per_item, kSerialProducts, [&](int64_t begin, int64_t end) {
            static thread_local Scratch scratch;
            f(args, begin, end, scratch.get(std::max<int64_t>(bytes, 1)));
        });
    }
    void* held(at::IntArrayRef sizes, at::ScalarType dtype) {
        return memory.emplace_back(at::empty(sizes, options.dtype(dtype))).mutable_data_ptr();
    }
    // Allocates the buffers of kernels that run stage by stage; `down`: for the backward.
    void go_by_stages(LayersPrecision precision, bool down) {
        args.parts = parts_of(precision);
        args.weight_parts = held({stored_weights(args)}, at::kShort);
        args.term_parts = held({stored_terms(args)}, at::kShort);
        args.tops = held({plan.nodes(), args.lanes}, at::kFloat);
        if (!down) {
            args.next_parts = held({stored_terms(args)}, at::kShort);
            args.run_tops = static_cast<float*>(held({stored_run_tops(args)}, at::kFloat));
            args.arrivals = static_cast<uint32_t*>(held({stored_arrivals(args)}, at::kInt));
            return;
        }
        args.ratio_parts = held({stored_ratios(args)}, at::kShort);
        args.lost = held({plan.nodes(), kNodeShares, args.lanes}, at::kFloat);
        args.terms = held({plan.most_terms(), args.lanes}, at::kFloat);
    }
    void make_weights() {
        weight = reused_memory({args.parts ? 0 : w.numel()}, options);
        shift = reused_memory({plan.rows()}, options);
        args.weight = weight.mutable_data_ptr();
        args.shift = shift.mutable_data_ptr();
        if (kernels)
            check_launch(op, launch_layers_weights(args, current_stream(w)));
        else
            for_items(plan.rows(), w.numel() / std::max<int64_t>(plan.rows(), 1), kSerialWeights,
                      [&](int64_t begin, int64_t end) { twin().weights(args, begin, end); });
    }
};

// Returns the values in the forward's layout, without a copy if they already have it.
Tensor unit_major_values(const Tensor& val) {
    const int64_t rows = val.size(0), units = val.size(1), lanes = lanes_of(rows);
    const bool as_made = (rows == 1 || val.stride(0) == 1) && val.stride(1) == lanes &&
                         val.storage_offset() == 0 &&
                         static_cast<int64_t>(val.storage().nbytes()) >=
                             units * lanes * static_cast<int64_t>(val.element_size());
    if (as_made) return val.as_strided({units, lanes}, {lanes, 1});
    Tensor copy = at::empty({units, lanes}, val.options());
    rows_of(copy, rows).copy_(val);
    // Padding lanes are copies of the last row: values of units must be consistent, as they are in
    // the forward, so that flows of zero remain zero.
    copy.narrow(1, rows, lanes - rows).copy_(copy.narrow(1, rows - 1, 1));
    return copy;
}

}  // namespace

Tensor circuit_layers(const Tensor& leaf, const Tensor& w, const Tensor& program,
                      at::IntArrayRef plan, std::string_view norm, std::string_view semiring,
                      std::string_view precision) {
    constexpr auto op = "circuit_layers";
    Call call(op, leaf, "leaf", w, program, plan, norm);
    LayersArgs& args = call.args;
    require(semiring == "sum" || semiring == "max", op, "semiring", expected("'sum' or 'max'"),
            found("'", semiring, "'"));
    args.max_product = semiring == "max";
    require(precision == "fp32" || precision == "high" || precision == "fp16s", op, "precision",
            expected("'fp32', 'high' or 'fp16s'"), found("'", precision, "'"));
    args.precision = precision == "fp32"   ? LayersPrecision::kFloat32
                     : precision == "high" ? LayersPrecision::kHigh
                                           : LayersPrecision::kHalf;
    require(leaf.size(1) == call.plan.leaves(), op, "leaf",
            expected("N = ", call.plan.leaves(), " leaf units"), found(leaf.sizes()));
    const Tensor val = unit_major(call.plan.units(), args.rows, call.options);
    if (args.rows == 0) return rows_of(val, 0);
    const c10::DeviceGuard guard(leaf.device());
    args.leaf = leaf.const_data_ptr();
    args.leaf_row = leaf.stride(0), args.leaf_unit = leaf.stride(1);
    args.val = val.mutable_data_ptr();
    const bool reduced = args.precision != LayersPrecision::kFloat32;
    if (call.kernels && !args.max_product && (reduced || !call.plan.small_nodes()))
        call.go_by_stages(args.precision, false);
    call.make_weights();
    if (call.kernels)
        check_launch(op, launch_layers_forward(args, current_stream(leaf)));
    else
        call.on_threads(Call::twin().forward, call.groups(), call.work());
    return rows_of(val, args.rows);
}

std::tuple<Tensor, Tensor> circuit_layers_backward(const Tensor& droots_in, const Tensor& val_in,
                                                   const Tensor& w, const Tensor& program,
                                                   at::IntArrayRef plan, std::string_view norm,
                                                   bool need_dw) {
    constexpr auto op = "circuit_layers_backward";
    Call call(op, val_in, "val", w, program, plan, norm);
    LayersArgs& args = call.args;
    require(val_in.size(1) == call.plan.units(), op, "val",
            expected("U = ", call.plan.units(), " units"), found(val_in.sizes()));
    check_dtype(op, "droots", droots_in, val_in.scalar_type());
    check_shape(op, "droots", droots_in, "(B, roots)", {args.rows, call.plan.roots()},
                val_in.device());
    const Tensor grad = unit_major(call.plan.units(), args.rows, call.options);
    if (args.rows == 0)
        return {rows_of(grad, 0), at::zeros({need_dw ? w.numel() : 0}, call.options)};
    Tensor dw = reused_memory({need_dw ? w.numel() : 0}, call.options);
    const c10::DeviceGuard guard(val_in.device());
    const Tensor droots = droots_in.contiguous(), val = unit_major_values(val_in);
    const bool by_stages = call.kernels && !call.plan.small_nodes();
    const Tensor ratio = by_stages ? Tensor() : reused_memory(grad.sizes(), call.options);
    args.droots = droots.const_data_ptr();
    args.val = const_cast<void*>(val.const_data_ptr());
    args.grad = grad.mutable_data_ptr();
    if (by_stages)
        call.go_by_stages(LayersPrecision::kFloat32, true);
    else
        args.ratio = ratio.mutable_data_ptr();
    if (need_dw) args.dw = dw.mutable_data_ptr();
    call.make_weights();
    if (call.kernels) {
        if (!by_stages) {
            args.terms = call.held({call.plan.most_terms(), args.lanes}, at::kFloat);
            args.tops = call.held({call.plan.nodes(), args.lanes}, at::kFloat);
        }
        check_launch(op, launch_layers_backward(args, current_stream(val)));
        if (need_dw) check_launch(op, launch_layers_dweights(args, current_stream(val)));
        return {rows_of(grad, args.rows), dw};
    }
    call.on_threads(Call::twin().backward, call.groups(), 2 * call.work());
    if (need_dw) {
        int64_t bands = 0;
        for (int64_t i = 0; i < args.program.num_matrices(); ++i)
            bands += ceil_div(args.program.matrices()[i].units, kBandRows);
        call.on_threads(Call::twin().dweights, bands,
                        call.work() * call.groups() / std::max<int64_t>(bands, 1));
    }
    return {rows_of(grad, args.rows), dw};
}

Tensor circuit_layers_walk(const Tensor& val_in, const Tensor& w, const Tensor& program,
                           at::IntArrayRef plan, const Tensor& root_in,
                           const OptionalTensor& uniforms_in) {
    constexpr auto op = "circuit_layers_walk";
    Call call(op, val_in, "val", w, program, plan, "none");
    LayersArgs& args = call.args;
    require(val_in.size(1) == call.plan.units(), op, "val",
            expected("U = ", call.plan.units(), " units"), found(val_in.sizes()));
    check_dtype(op, "root", root_in, at::kLong);
    check_shape(op, "root", root_in, "(B,)", {args.rows}, val_in.device());
    args.walks = args.rows;
    if (uniforms_in) {
        check_dim(op, "uniforms", *uniforms_in, 2, "(M, draws)");
        args.walks = uniforms_in->size(0);
        check_shape(op, "uniforms", *uniforms_in, "(M, draws)", {args.walks, call.plan.draws()},
                    val_in.device());
        args.wide_uniforms = uniforms_in->scalar_type() == at::kDouble;
        if (!args.wide_uniforms) check_dtype(op, "uniforms", *uniforms_in, at::kFloat);
        require(args.rows > 0 ? args.walks % args.rows == 0 : args.walks == 0, op, "uniforms",
                expected("M a multiple of the number of rows, ", args.rows),
                found(uniforms_in->sizes()));
        check_uniforms(op, *uniforms_in);
    }
    const Tensor root = root_in.contiguous();
    if (call.checked.defined()) {
        check_walk(op, call.checked_program(), call.plan);
        const Tensor host = root.cpu();
        const int64_t* r = host.const_data_ptr<int64_t>();
        for (int64_t b = 0; b < args.rows; ++b)
            require(r[b] >= 0 && r[b] < call.plan.roots(), op, "root",
                    expected("numbers in 0 .. ", call.plan.roots() - 1), found(r[b]));
    }
    const auto sizes = std::array{args.walks, call.plan.variables()};
    const Tensor leaves = at::empty(sizes, root.options());
    if (args.walks == 0) return leaves;
    args.walks_per_row = args.walks / args.rows;
    const c10::DeviceGuard guard(val_in.device());
    const Tensor val = unit_major_values(val_in);
    const Tensor uniforms = uniforms_in ? rows_contiguous(*uniforms_in) : Tensor();
    const Tensor chosen =
        reused_memory({call.plan.nodes(), args.walks}, call.options.dtype(at::kInt));
    args.val = const_cast<void*>(val.const_data_ptr());
    args.root = root.const_data_ptr<int64_t>();
    if (uniforms_in) {
        args.uniforms = uniforms.const_data_ptr();
        args.uniforms_row = uniforms.stride(0);
    }
    args.chosen = chosen.mutable_data_ptr<int32_t>();
    args.leaves = leaves.mutable_data_ptr<int64_t>();
    if (call.kernels)
        check_launch(op, launch_layers_walk(args, current_stream(val)));
    else
        call.on_threads(Call::twin().walk, args.walks, call.walk_work());
    return leaves;
}

}  // namespace lora_ext
