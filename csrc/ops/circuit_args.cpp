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
    refuse(op, "kind", expected("'ff', 'cp', 'hmm' or 'btree'"), found("'", kind, "'"));
}

}  // namespace

Tensor batch_of_rows(const Tensor& t) {
    return t.size(0) == 0 || t.select(0, 0).is_contiguous() ? t : t.contiguous();
}

void check_range(const char* op, const char* name, const Tensor& t, int64_t least, int64_t most) {
    if (launches_kernels(t) && !debug_mode()) return;
    const Tensor host = t.to(at::kCPU).contiguous();
    const int64_t* values = host.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < host.numel(); ++i) {
        if (values[i] >= least && values[i] < most) continue;
        const int64_t width = t.dim() == 2 ? t.size(1) : 1;
        const auto at = t.dim() == 2 ? c10::str(i / width, ", ", i % width) : c10::str(i);
        refuse(op, words(name, "[", at, "]"), expected("a number in [", least, ", ", most, ")"),
               found(values[i]));
    }
}

void check_uniforms(const char* op, const Tensor& uniforms) {
    if (launches_kernels(uniforms) && !debug_mode()) return;
    const Tensor host = uniforms.to(at::kCPU).contiguous();
    const auto check = [&](const auto* u) {
        for (int64_t i = 0; i < host.numel(); ++i)
            require(u[i] >= 0 && u[i] <= 1, op, "uniforms", expected("numbers in [0, 1]"),
                    found(u[i], " at flat index ", i));
    };
    if (host.scalar_type() == at::kDouble)
        check(host.const_data_ptr<double>());
    else
        check(host.const_data_ptr<float>());
}

void check_tokens(const char* op, const Tensor& x, int64_t rows, int64_t n_token, int64_t vocab,
                  at::Device device) {
    check_dtype(op, "x", x, at::kLong);
    check_shape(op, "x", x, "(B, K)", {rows, n_token}, device);
    check_range(op, "x", x, -1, vocab);
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
    require(leaf.numel() > 0 || c.rows == 0, op, leaf_name,
            expected("at least one position, component and token"), found(leaf.sizes()));
    require(c.n_token > 0 && c.components > 0 && c.components <= kMaxComponents &&
                c.rows <= kMaxSize && c.n_token <= kMaxSize,
            op, leaf_name,
            expected("1 to ", kMaxComponents, " components and at most ", kMaxSize,
                     " rows and positions"),
            found(leaf.sizes()));
    require(kind != CircuitKind::kFF || c.components == 1, op, leaf_name,
            expected("one component for kind 'ff'"), found(c.components));
    const int64_t matrices = circuit_num_transitions(kind, c.n_token);
    require(matrices == 0 || trans, op, "trans",
            expected("the transitions of kind '", kind_name, "' over ", c.n_token, " positions"),
            found("None"));
    // Parameters are float64 only with float64 leaves; everything else is computed in float32.
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
        require(t.scalar_type() == given, op, name, expected("the dtype of prior, ", given),
                found(t.scalar_type()));
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
