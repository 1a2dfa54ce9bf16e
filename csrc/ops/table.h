// Table of all ops, one row each: name, schema, function, and the dispatcher layers above the
// function. bindings.cpp registers the ops from this table, and only bindings.cpp includes it.
#pragma once

#include <tuple>

#include "ops/autograd.h"
#include "ops/circuit.h"
#include "ops/circuit_autograd.h"
#include "ops/circuit_decode.h"
#include "ops/circuit_layers.h"
#include "ops/circuit_sum.h"
#include "ops/depth_mix.h"
#include "ops/depth_mix_autograd.h"
#include "ops/lora.h"
#include "ops/lora_gram.h"
#include "ops/lora_train.h"
#include "ops/lora_train_autograd.h"
#include "ops/packed_linear.h"
#include "ops/pointwise.h"
#include "ops/row_attention.h"
#include "ops/vocab.h"

namespace lora_ext::table {

// Op without an autograd layer: it handles only integers, or Python registers its backward.
template <auto kOp>
struct Op {
    static constexpr auto kernel = kOp;
    const char* name;
    const char* schema;
};

// Op with a backward in C++: Formula::call is the layer above the kernel;
// Formula::autocast<device>, if defined, is the layer above that.
template <auto kOp, class Formula_>
struct Differentiable : Op<kOp> {
    using Formula = Formula_;
    static constexpr auto above = &Formula::call;
};

// Op that raises for gradients and tangents; kRemedy names the alternative.
template <auto kOp, const char* kRemedy>
struct NoGradient : Op<kOp> {
    static constexpr auto above = &autograd::Refusal<kOp, kRemedy>::call;
};

// Like NoGradient, for an op that also changes its first argument in place.
template <auto kOp, const char* kRemedy>
struct InPlace : NoGradient<kOp, kRemedy> {
    static constexpr auto in_place = &autograd::Refusal<kOp, kRemedy>::in_place;
};

#define LX_NO_GRAD "call it under torch.no_grad()"
inline constexpr char kApply[] = LX_NO_GRAD ", or use lora_apply, which is differentiable";
inline constexpr char kScan[] = LX_NO_GRAD "; circuit_scan is differentiable";
inline constexpr char kSum[] = LX_NO_GRAD "; log_einsum_exp is differentiable";
inline constexpr char kLayers[] = LX_NO_GRAD "; circuits.Circuit is differentiable";
inline constexpr char kGram[] = LX_NO_GRAD;
inline constexpr char kPacked[] = LX_NO_GRAD;
inline constexpr char kPointwise[] = LX_NO_GRAD;
#define LX_ONCE(op) "the gradient of " op " is not itself differentiable"
inline constexpr char kLinearOnce[] = LX_ONCE("lora_linear");
inline constexpr char kLeafOnce[] = LX_ONCE("circuit_leaf");
inline constexpr char kEmissionOnce[] = LX_ONCE("emission_gather");
inline constexpr char kScanOnce[] = LX_ONCE("circuit_scan");
inline constexpr char kTableOnce[] = LX_ONCE("circuit_table");
inline constexpr char kMixOnce[] = LX_ONCE("depth_mix");
inline constexpr char kCrossEntropyOnce[] = LX_ONCE("chunked_cross_entropy");
inline constexpr char kDivergenceOnce[] = LX_ONCE("chunked_kl");

// Common beginnings and ends of schemas.
#define LX_ADAPTERS "Tensor? ranks=None, Tensor? page_table=None, Tensor? plan=None"
#define LX_WEIGHTS "Tensor? weights=None, Tensor? groups=None"
#define LX_CIRCUIT "str kind, Tensor leaf, Tensor? prior, Tensor? trans"

// clang-format off
inline constexpr std::tuple kOps{
    // --- lora ---
    Op<&lora_plan>{
        "lora_plan", "(Tensor adapter_ids, int num_adapters, Tensor? num_valid=None) -> Tensor"},
    Op<&lora_segment_ids>{
        "lora_segment_ids", "(Tensor seg_indptr, Tensor seg_adapter, int num_tokens) -> Tensor"},
    NoGradient<&lora_shrink, kApply>{
        "lora_shrink",
        "(Tensor x, Tensor a, Tensor adapter_ids, Tensor? scale=None, " LX_ADAPTERS ", " LX_WEIGHTS
        ") -> Tensor"},
    InPlace<&lora_expand_, kApply>{
        "lora_expand_",
        "(Tensor(a!) y, Tensor v, Tensor b, Tensor adapter_ids, " LX_ADAPTERS ") -> ()"},
    Op<&lora_apply>{
        "lora_apply",
        "(Tensor x, Tensor a, Tensor b, Tensor adapter_ids, Tensor? scale=None, " LX_ADAPTERS ", "
        LX_WEIGHTS ") -> Tensor"},
    InPlace<&lora_apply_, kApply>{
        "lora_apply_",
        "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor adapter_ids, Tensor? scale=None, "
        LX_ADAPTERS ", " LX_WEIGHTS ") -> ()"},
    InPlace<&lora_apply_siblings_, kApply>{
        "lora_apply_siblings_",
        "(Tensor(a!)[] y, Tensor x, Tensor[] a, Tensor[] b, Tensor adapter_ids, Tensor[] scale, "
        "Tensor[] ranks, Tensor[] page_table, Tensor? plan=None, Tensor? weights=None, "
        "Tensor[]? groups=None) -> ()"},

    // --- lora_train ---
    Differentiable<&lora_linear_forward, autograd::Linear>{
        "lora_linear_forward",
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor a, Tensor b, Tensor adapter_ids, "
        "Tensor? scale=None, Tensor? ranks=None, float dropout_p=0.0, Tensor? seed=None, "
        "Tensor? plan=None, " LX_WEIGHTS ") -> (Tensor y, Tensor v)"},
    NoGradient<&lora_linear_backward, kLinearOnce>{
        "lora_linear_backward",
        "(Tensor dy, Tensor x, Tensor v, Tensor? weight, Tensor a, Tensor b, Tensor adapter_ids, "
        "Tensor? scale, Tensor? ranks, Tensor? plan, float dropout_p, Tensor? seed, bool need_dx, "
        "bool need_da, bool need_db, " LX_WEIGHTS ", bool need_dweights=False)"
        " -> (Tensor dx, Tensor da, Tensor db, Tensor dweights)"},
    Differentiable<&lora_dropout, autograd::Dropout>{
        "lora_dropout", "(Tensor x, float p, Tensor? seed=None) -> Tensor"},

    // --- lora_gram ---
    NoGradient<&lora_gram, kGram>{
        "lora_gram",
        "(Tensor[] a, Tensor[] b, ScalarType? dtype=None) -> (Tensor[] gram_a, Tensor[] gram_b)"},
    NoGradient<&lora_pair_stats, kGram>{
        "lora_pair_stats", "(Tensor[] a, Tensor[] b, Tensor[] projected_b) -> Tensor"},

    // --- circuit ---
    Differentiable<&circuit_leaf, autograd::CircuitLeaf>{
        "circuit_leaf", "(Tensor leaf, Tensor x) -> (Tensor e, Tensor norm)"},
    NoGradient<&circuit_leaf_backward, kLeafOnce>{
        "circuit_leaf_backward", "(Tensor de, Tensor leaf, Tensor x, Tensor norm) -> Tensor"},
    Differentiable<&emission_gather, autograd::EmissionGather>{
        "emission_gather", "(Tensor h, Tensor emit, Tensor x) -> Tensor"},
    NoGradient<&emission_gather_backward, kEmissionOnce>{
        "emission_gather_backward",
        "(Tensor de, Tensor h, Tensor emit, Tensor x, bool need_h, bool need_emit)"
        " -> (Tensor dh, Tensor demit)"},
    Differentiable<&circuit_scan, autograd::CircuitScan>{
        "circuit_scan",
        "(str kind, Tensor e, Tensor? prior=None, Tensor? trans=None, bool save=False)"
        " -> (Tensor prefix, Tensor conditional, Tensor posterior, Tensor states)"},
    NoGradient<&circuit_scan_backward, kScanOnce>{
        "circuit_scan_backward",
        "(Tensor? dprefix, Tensor? dconditional, str kind, Tensor e, Tensor? prior, Tensor? trans, "
        "Tensor states, bool need_prior, bool need_trans)"
        " -> (Tensor de, Tensor dprior, Tensor dtrans)"},

    // --- circuit_decode ---
    NoGradient<&circuit_conditional_dist, kScan>{
        "circuit_conditional_dist", "(" LX_CIRCUIT ", Tensor x, Tensor k) -> Tensor"},
    NoGradient<&circuit_sample, kScan>{
        "circuit_sample",
        "(" LX_CIRCUIT ", Tensor uniforms, Tensor? evidence=None)"
        " -> (Tensor tokens, Tensor conditional, Tensor posterior)"},
    NoGradient<&circuit_argmax, kScan>{
        "circuit_argmax",
        "(" LX_CIRCUIT ", Tensor? evidence=None) -> (Tensor tokens, Tensor value)"},
    NoGradient<&spec_verify, kScan>{
        "spec_verify",
        "(Tensor target, Tensor tokens, Tensor conditional, Tensor posterior, Tensor leaf, "
        "Tensor uniforms, Tensor? num_evidence=None, float temperature=1.0)"
        " -> (Tensor accepted, Tensor next_token)"},

    // --- circuit_sum ---
    NoGradient<&log_einsum_weights, kSum>{
        "log_einsum_weights", "(Tensor w, str norm) -> (Tensor weight, Tensor shift)"},
    Op<&log_einsum_exp>{
        "log_einsum_exp",
        "(Tensor w, Tensor values, str norm, str precision, Tensor? weight=None, "
        "Tensor? shift=None) -> Tensor"},
    Op<&log_einsum_exp_backward>{
        "log_einsum_exp_backward",
        "(Tensor dout, Tensor w, Tensor values, Tensor out, str norm, bool need_dw, "
        "bool need_dvalues, Tensor? weight=None, Tensor? shift=None)"
        " -> (Tensor dw, Tensor dvalues)"},
    NoGradient<&log_einsum_max, kSum>{
        "log_einsum_max",
        "(Tensor w, Tensor values, str norm) -> (Tensor values_out, Tensor indices)"},

    // --- circuit_layers ---
    Differentiable<&circuit_table, autograd::CircuitTable>{
        "circuit_table",
        "(Tensor table, Tensor x, Tensor row, int block, str norm) -> Tensor"},
    NoGradient<&circuit_table_backward, kTableOnce>{
        "circuit_table_backward",
        "(Tensor de, Tensor table, Tensor x, Tensor row, int block, str norm) -> Tensor"},
    NoGradient<&circuit_layers, kLayers>{
        "circuit_layers",
        "(Tensor leaf, Tensor w, Tensor program, int[] plan, str norm, str semiring, "
        "str precision='fp32') -> Tensor"},
    NoGradient<&circuit_layers_backward, kLayers>{
        "circuit_layers_backward",
        "(Tensor droots, Tensor val, Tensor w, Tensor program, int[] plan, str norm, bool need_dw)"
        " -> (Tensor grad, Tensor dw)"},
    NoGradient<&circuit_layers_walk, kLayers>{
        "circuit_layers_walk",
        "(Tensor val, Tensor w, Tensor program, int[] plan, Tensor root, Tensor? uniforms)"
        " -> Tensor"},

    // --- depth_mix ---
    Differentiable<&depth_mix_forward, autograd::DepthMix>{
        "depth_mix_forward",
        "(Tensor[] hiddens, Tensor[] gammas, Tensor[] betas, Tensor? weights, Tensor? router, "
        "Tensor? bias, float eps, str norm)"
        " -> (Tensor mixed, Tensor chosen, Tensor rinv, Tensor mean)"},
    NoGradient<&depth_mix_backward, kMixOnce>{
        "depth_mix_backward",
        "(Tensor dmixed, Tensor? dweights, Tensor[] hiddens, Tensor[] gammas, Tensor[] betas, "
        "Tensor weights, Tensor? router, Tensor rinv, Tensor mean, bool need_hiddens)"
        " -> (Tensor[] dhiddens, Tensor sums, Tensor dweights_out)"},
    // --- packed_linear ---
    NoGradient<&pack_weight, kPacked>{
        "pack_weight",
        "(Tensor weight, int? bits=None, int group=64, bool minimum=False) -> Tensor"},
    Op<&unpack_weight>{
        "unpack_weight",
        "(Tensor packed, int out_features, int in_features, ScalarType? dtype=None) -> Tensor"},
    NoGradient<&packed_linear, kPacked>{
        "packed_linear",
        "(Tensor x, Tensor packed, Tensor? bias, int out_features, bool int8=False) -> Tensor"},
    NoGradient<&packed_lora_linear, kPacked>{
        "packed_lora_linear",
        "(Tensor x, Tensor packed, Tensor? bias, int out_features, bool int8, Tensor a, Tensor b, "
        "Tensor adapter_ids, Tensor? scale=None, " LX_ADAPTERS ", " LX_WEIGHTS ") -> Tensor"},

    // --- pointwise ---
    NoGradient<&pointwise, kPointwise>{"pointwise", "(Tensor x, str function) -> Tensor"},

    // --- row_attention ---
    Op<&row_attention>{
        "row_attention",
        "(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? spans, Tensor? mask)"
        " -> Tensor"},

    // --- vocab ---
    Op<&vocab_cross_entropy>{
        "vocab_cross_entropy",
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int chunk, int ignore_index, "
        "float softcap, ScalarType dtype, bool with_gradient)"
        " -> (Tensor loss, Tensor lse, Tensor dhidden)"},
    NoGradient<&vocab_cross_entropy_backward, kCrossEntropyOnce>{
        "vocab_cross_entropy_backward",
        "(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, "
        "Tensor dhidden, int chunk, int ignore_index, float softcap, ScalarType dtype, "
        "bool need_dhidden, bool need_dweight, bool need_dbias)"
        " -> (Tensor dhidden_out, Tensor dweight, Tensor dbias)"},
    Op<&vocab_kl>{
        "vocab_kl",
        "(Tensor hiddens, Tensor weight, Tensor? bias, Tensor? mask, float tau, int chunk, "
        "float softcap, ScalarType dtype, bool with_gradient)"
        " -> (Tensor loss, Tensor lse, Tensor dhiddens)"},
    NoGradient<&vocab_kl_backward, kDivergenceOnce>{
        "vocab_kl_backward",
        "(Tensor dloss, Tensor hiddens, Tensor weight, Tensor? bias, Tensor? mask, Tensor lse, "
        "Tensor dhiddens, float tau, int chunk, float softcap, ScalarType dtype, "
        "bool need_dhiddens, bool need_dweight, bool need_dbias)"
        " -> (Tensor dhiddens_out, Tensor dweight, Tensor dbias)"},
};
// clang-format on

// Calls f(row) for every op.
template <class F>
void for_each_op(F&& f) {
    std::apply([&](const auto&... op) { (f(op), ...); }, kOps);
}

}  // namespace lora_ext::table
