#include "ops/gemm.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>

#include "lora_ext/isa.h"

namespace lora_ext {
namespace {

using at::Tensor;

// In float32 at::linear is the BLAS that torch was built with, MKL as a rule, which leaves AVX-512
// of other makers idle. torch carries oneDNN too, behind an operator of its compiler. Without AVX-512
// MKL is the faster one.
using OneDnnLinear = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                            std::string_view, c10::List<std::optional<at::Scalar>>,
                            std::optional<std::string_view>);

const c10::TypedOperatorHandle<OneDnnLinear>* onednn_linear() {
    using Handle = std::optional<c10::TypedOperatorHandle<OneDnnLinear>>;
    static const Handle handle = []() -> Handle {
#if defined(__x86_64__)
        try {
            const auto found =
                c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
            if (found && at::globalContext().hasMKLDNN() && best_isa() >= Isa::kAvx512)
                return found->typed<OneDnnLinear>();
        } catch (const c10::Error&) {  // another torch, another signature
        }
#endif
        return std::nullopt;
    }();
    return handle ? &*handle : nullptr;
}

// Below, what oneDNN does before its first multiplication takes longer than it saves.
constexpr int64_t kOneDnnRows = 32, kOneDnnWork = 1 << 20;

}  // namespace

Tensor fast_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const bool large = x.size(0) >= kOneDnnRows && x.size(0) * weight.numel() >= kOneDnnWork;
    if (large && x.is_cpu() && x.scalar_type() == at::kFloat &&
        at::globalContext().userEnabledMkldnn())
        if (const auto* onednn = onednn_linear()) {
            const at::AutoDispatchBelowADInplaceOrView guard;
            std::optional<Tensor> dense;  // oneDNN reads a bias as if it were contiguous
            if (bias) dense = bias->contiguous();
            return onednn->call(x, weight, dense, "none", c10::List<std::optional<at::Scalar>>(),
                                "");
        }
    return at::linear(x, weight, bias);
}

}  // namespace lora_ext
