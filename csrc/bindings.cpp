// The only pybind11 file. Each op is one C++ function, reachable by two doors: the module itself,
// and the dispatcher, which is the one Python uses (torch.compile, fake tensors and autograd come
// with it).
#include <torch/extension.h>

#include "ops/circuit.h"
#include "ops/circuit_autograd.h"
#include "ops/circuit_decode.h"
#include "ops/circuit_sum.h"
#include "ops/lora.h"
#include "ops/lora_train.h"
#include "ops/lora_train_autograd.h"
#include "ops/settings.h"
#ifdef LX_EMULATE
#include "emu/emu.h"
#endif

#ifndef LORA_EXT_LIBRARY
#define LORA_EXT_LIBRARY lora_ext
#endif

namespace {

// The end of every signature.
#define LX_ADAPTERS "Tensor? ranks=None, Tensor? page_table=None, Tensor? plan=None"

#define LX_CIRCUIT "str kind, Tensor leaf, Tensor? prior, Tensor? trans"

#define LX_STRING_(x) #x
#define LX_STRING(x) LX_STRING_(x)
#define LX_OP(op) LX_STRING(LORA_EXT_LIBRARY) "::" #op

bool wants_grad(const at::Tensor& t) {
    return t.requires_grad();
}
bool wants_grad(const std::optional<at::Tensor>& t) {
    return t && t->requires_grad();
}
bool wants_grad(double) {
    return false;
}
bool wants_grad(std::string_view) {
    return false;
}
bool has_tangent(const at::Tensor& t) {
    return t._fw_grad(/*level=*/0).defined();
}
bool has_tangent(const std::optional<at::Tensor>& t) {
    return t && has_tangent(*t);
}
bool has_tangent(double) {
    return false;
}
bool has_tangent(std::string_view) {
    return false;
}

// What torch's own operators do above their kernels, for an op without a backward: refuse a
// gradient or a tangent instead of dropping it (also under torch.func, whose wrappers no kernel
// sees), and count a change in place, so that autograd notices a tensor that it had saved.
template <auto kOp, class Signature = std::remove_pointer_t<decltype(kOp)>>
struct NoBackward;
template <auto kOp, class Result, class... Args>
struct NoBackward<kOp, Result(Args...)> {
    using Handle = lora_ext::autograd::Handle<kOp>;
    static inline const char* instead =
        "call it under torch.no_grad(), or use lora_apply, which is differentiable";

    static Result autograd(c10::DispatchKeySet keys, Args... args) {
        TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(args) || ...), Handle::name,
                                    " has no forward-mode derivative");
        TORCH_CHECK(!c10::GradMode::is_enabled() || !(wants_grad(args) || ...), Handle::name,
                    " has no backward; ", instead);
        const at::AutoDispatchBelowAutograd guard;
        return Handle::get().redispatch(keys & c10::after_autograd_keyset, args...);
    }
    static void in_place(c10::DispatchKeySet keys, Args... args) {
        {
            const at::AutoDispatchBelowADInplaceOrView guard;
            Handle::get().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
        }
        torch::autograd::impl::bump_version(std::get<0>(std::tie(args...)));
    }
};
using Shrink = NoBackward<&lora_ext::lora_shrink>;
using Expand = NoBackward<&lora_ext::lora_expand_>;
using Apply = NoBackward<&lora_ext::lora_apply_>;
using LinearBackward = NoBackward<&lora_ext::lora_linear_backward>;
using LogWeights = NoBackward<&lora_ext::log_einsum_weights>;
using LogMax = NoBackward<&lora_ext::log_einsum_max>;
using LeafBackward = NoBackward<&lora_ext::circuit_leaf_backward>;
using EmissionBackward = NoBackward<&lora_ext::emission_gather_backward>;
using ScanBackward = NoBackward<&lora_ext::circuit_scan_backward>;
namespace train = lora_ext::autograd;
using ConditionalDist = NoBackward<&lora_ext::circuit_conditional_dist>;
using Sample = NoBackward<&lora_ext::circuit_sample>;
using Argmax = NoBackward<&lora_ext::circuit_argmax>;
using Verify = NoBackward<&lora_ext::spec_verify>;

template <class Library>
void implement(Library& m) {
    m.impl("lora_plan", &lora_ext::lora_plan);
    m.impl("lora_segment_ids", &lora_ext::lora_segment_ids);
    m.impl("lora_shrink", &lora_ext::lora_shrink);
    m.impl("lora_expand_", &lora_ext::lora_expand_);
    m.impl("lora_apply", &lora_ext::lora_apply);
    m.impl("lora_apply_", &lora_ext::lora_apply_);
    m.impl("lora_linear_forward", &lora_ext::lora_linear_forward);
    m.impl("lora_linear_backward", &lora_ext::lora_linear_backward);
    m.impl("lora_dropout", &lora_ext::lora_dropout);
    m.impl("circuit_leaf", &lora_ext::circuit_leaf);
    m.impl("circuit_leaf_backward", &lora_ext::circuit_leaf_backward);
    m.impl("emission_gather", &lora_ext::emission_gather);
    m.impl("emission_gather_backward", &lora_ext::emission_gather_backward);
    m.impl("circuit_scan", &lora_ext::circuit_scan);
    m.impl("circuit_scan_backward", &lora_ext::circuit_scan_backward);
    m.impl("circuit_conditional_dist", &lora_ext::circuit_conditional_dist);
    m.impl("circuit_sample", &lora_ext::circuit_sample);
    m.impl("circuit_argmax", &lora_ext::circuit_argmax);
    m.impl("spec_verify", &lora_ext::spec_verify);
    m.impl("log_einsum_weights", &lora_ext::log_einsum_weights);
    m.impl("log_einsum_exp", &lora_ext::log_einsum_exp);
    m.impl("log_einsum_exp_backward", &lora_ext::log_einsum_exp_backward);
    m.impl("log_einsum_max", &lora_ext::log_einsum_max);
}

}  // namespace

TORCH_LIBRARY(LORA_EXT_LIBRARY, m) {
    m.def("lora_plan(Tensor adapter_ids, int num_adapters, Tensor? num_valid=None) -> Tensor");
    m.def("lora_segment_ids(Tensor seg_indptr, Tensor seg_adapter, int num_tokens) -> Tensor");
    m.def("lora_shrink(Tensor x, Tensor a, Tensor adapter_ids, Tensor? scale=None, " LX_ADAPTERS
          ") -> Tensor");
    m.def("lora_expand_(Tensor(a!) y, Tensor v, Tensor b, Tensor adapter_ids, " LX_ADAPTERS
          ") -> ()");
    m.def(
        "lora_apply(Tensor x, Tensor a, Tensor b, Tensor adapter_ids, Tensor? "
        "scale=None, " LX_ADAPTERS ") -> Tensor");
    m.def(
        "lora_apply_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor adapter_ids, "
        "Tensor? scale=None, " LX_ADAPTERS ") -> ()");
    m.def(
        "lora_linear_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor a, Tensor b, "
        "Tensor adapter_ids, Tensor? scale=None, Tensor? ranks=None, float dropout_p=0.0, "
        "Tensor? seed=None, Tensor? plan=None) -> (Tensor y, Tensor v)");
    m.def(
        "lora_linear_backward(Tensor dy, Tensor x, Tensor v, Tensor? weight, Tensor a, Tensor b, "
        "Tensor adapter_ids, Tensor? scale, Tensor? ranks, Tensor? plan, float dropout_p, "
        "Tensor? seed, bool need_dx, bool need_da, bool need_db) "
        "-> (Tensor dx, Tensor da, Tensor db)");
    m.def("lora_dropout(Tensor x, float p, Tensor? seed=None) -> Tensor");
    m.def("circuit_leaf(Tensor leaf, Tensor x) -> (Tensor e, Tensor norm)");
    m.def("circuit_leaf_backward(Tensor de, Tensor leaf, Tensor x, Tensor norm) -> Tensor");
    m.def("emission_gather(Tensor h, Tensor emit, Tensor x) -> Tensor");
    m.def(
        "emission_gather_backward(Tensor de, Tensor h, Tensor emit, Tensor x, bool need_h, "
        "bool need_emit) -> (Tensor dh, Tensor demit)");
    m.def(
        "circuit_scan(str kind, Tensor e, Tensor? prior=None, Tensor? trans=None, "
        "bool save=False) "
        "-> (Tensor prefix, Tensor conditional, Tensor posterior, Tensor states)");
    m.def(
        "circuit_scan_backward(Tensor? dprefix, Tensor? dconditional, str kind, Tensor e, "
        "Tensor? prior, Tensor? trans, Tensor states, bool need_prior, bool need_trans) "
        "-> (Tensor de, Tensor dprior, Tensor dtrans)");
    m.def("circuit_conditional_dist(" LX_CIRCUIT ", Tensor x, Tensor k) -> Tensor");
    m.def("circuit_sample(" LX_CIRCUIT
          ", Tensor uniforms, Tensor? evidence=None) "
          "-> (Tensor tokens, Tensor conditional, Tensor posterior)");
    m.def("circuit_argmax(" LX_CIRCUIT ", Tensor? evidence=None) -> (Tensor tokens, Tensor value)");
    m.def(
        "spec_verify(Tensor target, Tensor tokens, Tensor conditional, Tensor posterior, "
        "Tensor leaf, Tensor uniforms, Tensor? num_evidence=None, float temperature=1.0) "
        "-> (Tensor accepted, Tensor next_token)");
    m.def("log_einsum_weights(Tensor w, str norm) -> (Tensor weight, Tensor shift)");
    m.def(
        "log_einsum_exp(Tensor w, Tensor values, str norm, str precision, Tensor? weight=None, "
        "Tensor? shift=None) -> Tensor");
    m.def(
        "log_einsum_exp_backward(Tensor dout, Tensor w, Tensor values, Tensor out, str norm, "
        "bool need_dw, bool need_dvalues, Tensor? weight=None, Tensor? shift=None) "
        "-> (Tensor dw, Tensor dvalues)");
    m.def(
        "log_einsum_max(Tensor w, Tensor values, str norm) -> (Tensor values_out, Tensor "
        "indices)");
}

TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, Autograd, m) {
    Shrink::Handle::name = LX_OP(lora_shrink);
    Expand::Handle::name = LX_OP(lora_expand_);
    Apply::Handle::name = LX_OP(lora_apply_);
    LinearBackward::Handle::name = LX_OP(lora_linear_backward);
    LinearBackward::instead = "the gradient of lora_linear is not itself differentiable";
    LeafBackward::Handle::name = LX_OP(circuit_leaf_backward);
    LeafBackward::instead = "the gradient of circuit_leaf is not itself differentiable";
    EmissionBackward::Handle::name = LX_OP(emission_gather_backward);
    EmissionBackward::instead = "the gradient of emission_gather is not itself differentiable";
    ScanBackward::Handle::name = LX_OP(circuit_scan_backward);
    ScanBackward::instead = "the gradient of circuit_scan is not itself differentiable";
    LogWeights::Handle::name = LX_OP(log_einsum_weights);
    LogMax::Handle::name = LX_OP(log_einsum_max);
    LogWeights::instead = LogMax::instead =
        "call it under torch.no_grad(); log_einsum_exp is differentiable";
    train::Linear::Plan::name = LX_OP(lora_plan);
    train::Linear::Forward::name = LX_OP(lora_linear_forward);
    train::Dropout::Forward::name = LX_OP(lora_dropout);
    train::CircuitLeaf::Forward::name = LX_OP(circuit_leaf);
    train::EmissionGather::Forward::name = LX_OP(emission_gather);
    train::CircuitScan::Forward::name = LX_OP(circuit_scan);
    ConditionalDist::Handle::name = LX_OP(circuit_conditional_dist);
    Sample::Handle::name = LX_OP(circuit_sample);
    Argmax::Handle::name = LX_OP(circuit_argmax);
    Verify::Handle::name = LX_OP(spec_verify);
    ConditionalDist::instead = Sample::instead = Argmax::instead = Verify::instead =
        "call it under torch.no_grad(); circuit_scan is differentiable";
    m.impl("lora_shrink", TORCH_FN(Shrink::autograd));
    m.impl("lora_expand_", TORCH_FN(Expand::autograd));
    m.impl("lora_apply_", TORCH_FN(Apply::autograd));
    m.impl("lora_linear_forward", TORCH_FN(train::linear));
    m.impl("lora_linear_backward", TORCH_FN(LinearBackward::autograd));
    m.impl("lora_dropout", TORCH_FN(train::dropout));
    m.impl("circuit_leaf", TORCH_FN(train::circuit_leaf_autograd));
    m.impl("circuit_leaf_backward", TORCH_FN(LeafBackward::autograd));
    m.impl("emission_gather", TORCH_FN(train::emission_gather_autograd));
    m.impl("emission_gather_backward", TORCH_FN(EmissionBackward::autograd));
    m.impl("circuit_scan", TORCH_FN(train::circuit_scan_autograd));
    m.impl("circuit_scan_backward", TORCH_FN(ScanBackward::autograd));
    m.impl("circuit_conditional_dist", TORCH_FN(ConditionalDist::autograd));
    m.impl("circuit_sample", TORCH_FN(Sample::autograd));
    m.impl("circuit_argmax", TORCH_FN(Argmax::autograd));
    m.impl("spec_verify", TORCH_FN(Verify::autograd));
    m.impl("log_einsum_weights", TORCH_FN(LogWeights::autograd));
    m.impl("log_einsum_max", TORCH_FN(LogMax::autograd));
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, AutocastCPU, m) {
    m.impl("lora_linear_forward", TORCH_FN(train::autocast_linear<c10::kCPU>));
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, AutocastCUDA, m) {
    m.impl("lora_linear_forward", TORCH_FN(train::autocast_linear<c10::kCUDA>));
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, ADInplaceOrView, m) {
    m.impl("lora_expand_", TORCH_FN(Expand::in_place));
    m.impl("lora_apply_", TORCH_FN(Apply::in_place));
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, CPU, m) {
    implement(m);
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, CUDA, m) {
    implement(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() =
        "Kernels of lora_ext: every op as a function, the same that torch.ops.lora_ext holds.";
    m.def("lora_plan", &lora_ext::lora_plan);
    m.def("lora_segment_ids", &lora_ext::lora_segment_ids);
    m.def("lora_shrink", &lora_ext::lora_shrink);
    m.def("lora_expand_", &lora_ext::lora_expand_);
    m.def("lora_apply", &lora_ext::lora_apply);
    m.def("lora_apply_", &lora_ext::lora_apply_);
    m.def("lora_linear_forward", &lora_ext::lora_linear_forward);
    m.def("lora_linear_backward", &lora_ext::lora_linear_backward);
    m.def("lora_dropout", &lora_ext::lora_dropout);
    m.def("circuit_leaf", &lora_ext::circuit_leaf);
    m.def("circuit_leaf_backward", &lora_ext::circuit_leaf_backward);
    m.def("emission_gather", &lora_ext::emission_gather);
    m.def("emission_gather_backward", &lora_ext::emission_gather_backward);
    m.def("circuit_scan", &lora_ext::circuit_scan);
    m.def("circuit_scan_backward", &lora_ext::circuit_scan_backward);
    m.def("circuit_conditional_dist", &lora_ext::circuit_conditional_dist);
    m.def("circuit_sample", &lora_ext::circuit_sample);
    m.def("circuit_argmax", &lora_ext::circuit_argmax);
    m.def("spec_verify", &lora_ext::spec_verify);
    m.def("log_einsum_weights", &lora_ext::log_einsum_weights);
    m.def("log_einsum_exp", &lora_ext::log_einsum_exp);
    m.def("log_einsum_exp_backward", &lora_ext::log_einsum_exp_backward);
    m.def("log_einsum_max", &lora_ext::log_einsum_max);
    m.def("cpu_isa", &lora_ext::cpu_isa);
    m.def("set_cpu_isa", &lora_ext::set_cpu_isa);
    m.def("has_kernels", &lora_ext::has_kernels);
    m.def("set_debug", &lora_ext::set_debug);
#ifdef LX_EMULATE
    m.def("set_seed", &lx::emu::set_seed);
    m.def("set_shared_memory", &lx::emu::set_shared_memory);
    m.def("launches", [] { return lx::emu::counters().launches; });
#endif
}
