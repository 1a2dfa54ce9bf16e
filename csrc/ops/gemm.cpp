#include "ops/gemm.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/linear.h>

#include "lora_ext/isa.h"

namespace lora_ext {
namespace {

using at::Tensor;

// In float32 at::linear calls the BLAS that torch was built with, usually MKL, which does not use
// AVX-512 on processors of vendors other than Intel. torch also contains oneDNN, which is reached
// through an operator of torch.compile. Without AVX-512, MKL is faster.
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
        } catch (const c10::Error&) {  // other versions of torch have another signature
        }
#endif
        return std::nullopt;
    }();
    return handle ? &*handle : nullptr;
}

// Minimum sizes for oneDNN: for smaller products its setup takes longer than it saves.
constexpr int64_t kOneDnnRows = 32, kOneDnnWork = 1 << 20;

// Columns of one AMX tile of 16-bit numbers.
constexpr int64_t kTileColumns = 32;

}  // namespace

Tensor spaced(const Tensor& left) {
    const int64_t width = left.size(-1), rest = width % kTileColumns;
    const bool halves = left.scalar_type() == at::kBFloat16 || left.scalar_type() == at::kHalf;
    if (rest == 0 || !halves || !left.is_cpu()) return left;
    return at::constant_pad_nd(left, {0, 2 * kTileColumns - rest}).narrow(-1, 0, width);
}

Tensor fast_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const bool large = x.size(0) >= kOneDnnRows && x.size(0) * weight.numel() >= kOneDnnWork;
    if (large && x.is_cpu() && x.scalar_type() == at::kFloat &&
        at::globalContext().userEnabledMkldnn())
        if (const auto* onednn = onednn_linear()) {
            const at::AutoDispatchBelowADInplaceOrView guard;
            std::optional<Tensor> dense;  // contiguous copy, since oneDNN ignores a bias's stride
            if (bias) dense = bias->contiguous();
            return onednn->call(x, weight, dense, "none", c10::List<std::optional<at::Scalar>>(),
                                "");
        }
    return at::linear(spaced(x), weight, bias);
}

}  // namespace lora_ext
