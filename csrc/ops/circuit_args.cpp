#include "ops/circuit_args.h"

#include "ops/checks.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

constexpr int64_t kMaxComponents = 1 << 15;

CircuitKind kind_of(const char* op, std::string_view kind) {
    if (kind == "ff") return CircuitKind::kFF;
    if (kind == "cp") return CircuitKind::kCP;
    if (kind == "hmm") return CircuitKind::kHMM;
    if (kind == "btree") return CircuitKind::kBTree;
    LX_CHECK(false, op, ": kind must be 'ff', 'cp', 'hmm' or 'btree', got '", kind, "'");
}

}  // namespace

at::ScalarType accumulator_of(const Tensor& t) {
    return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor batch_of_rows(const Tensor& t) {
    return t.size(0) == 0 || t.select(0, 0).is_contiguous() ? t : t.contiguous();
}

void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 at::IntArrayRef sizes, at::Device device) {
    LX_CHECK(t.sizes() == sizes, op, ": ", name, " must have shape ", letters, " = ", sizes,
             ", got ", t.sizes());
    LX_CHECK(t.device() == device, op, ": ", name, " must be on ", device, ", got ", t.device());
}

void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype) {
    LX_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ",
             t.scalar_type());
}

void check_range(const char* op, const char* name, const Tensor& t, int64_t least, int64_t most) {
    if (launches_kernels(t) && !debug_mode()) return;
    const Tensor host = t.to(at::kCPU).contiguous();
    const int64_t* values = host.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < host.numel(); ++i) {
        if (values[i] >= least && values[i] < most) continue;
        const int64_t width = t.dim() == 2 ? t.size(1) : 1;
        const auto at = t.dim() == 2 ? c10::str(i / width, ", ", i % width) : c10::str(i);
        LX_CHECK(false, op, ": ", name, "[", at, "] must be in [", least, ", ", most, "), got ",
                 values[i]);
    }
}

CircuitWeights circuit_weights(const char* op, std::string_view kind_name, const Tensor& leaf,
                               const char* leaf_name, const OptionalTensor& prior,
                               const OptionalTensor& trans) {
    CircuitWeights weights;
    CircuitParams& c = weights.params;
    const CircuitKind kind = kind_of(op, kind_name);
    const DType dtype = dtype_of(op, leaf_name, leaf);
    c.rows = leaf.size(0);
    c.n_token = leaf.size(1);
    c.components = leaf.size(2);
    LX_CHECK(leaf.numel() > 0 || c.rows == 0, op, ": ", leaf_name,
             " must have at least one position, component and token, got shape ", leaf.sizes());
    LX_CHECK(c.n_token > 0 && c.components > 0 && c.components <= kMaxComponents &&
                 c.rows <= kMaxSize && c.n_token <= kMaxSize,
             op, ": ", leaf_name, " must have 1 to ", kMaxComponents, " components, and at most ",
             kMaxSize, " rows and positions, got shape ", leaf.sizes());
    LX_CHECK(kind != CircuitKind::kFF || c.components == 1, op,
             ": kind 'ff' has one component, got ", c.components);
    const int64_t matrices = circuit_num_transitions(kind, c.n_token);
    LX_CHECK(matrices == 0 || trans, op, ": trans is required for kind '", kind_name, "' over ",
             c.n_token, " positions, got None");
    // float64 beside float64 only: elsewhere everything is computed in float32.
    const auto given = prior   ? prior->scalar_type()
                       : trans ? trans->scalar_type()
                               : leaf.scalar_type();
    const auto type = dtype == DType::kFloat64 ? at::kDouble
                      : given == at::kDouble   ? at::kFloat
                                               : given;
    c.dtype = dtype;
    const auto take = [&](const char* name, const Tensor& t, const char* letters,
                          at::IntArrayRef sizes) {
        check_shape(op, name, t, letters, sizes, leaf.device());
        LX_CHECK(t.scalar_type() == given, op, ": ", name, " must have the dtype of prior, ", given,
                 ", got ", t.scalar_type());
        const Tensor rows = batch_of_rows(t.to(type));
        c.dtype = dtype_of(op, name, rows);
        return rows;
    };
    if (prior) {
        weights.prior = take("prior", *prior, "(B, C)", {c.rows, c.components});
        c.prior = weights.prior.const_data_ptr();
        c.prior_stride = weights.prior.stride(0);
    }
    if (trans) {
        weights.trans =
            take("trans", *trans, "(B, M, C, C)", {c.rows, matrices, c.components, c.components});
        c.trans = weights.trans.const_data_ptr();
        c.trans_stride = weights.trans.stride(0);
    }
    c.kind = matrices > 0 ? kind : CircuitKind::kCP;
    return weights;
}

}  // namespace lora_ext
