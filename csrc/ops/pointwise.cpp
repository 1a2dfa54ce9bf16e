// Functions of one number: checks and allocation. CPU only.
#include "ops/pointwise.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <iterator>

#include "lora_ext/pointwise.h"
#include "ops/checks.h"
#include "ops/settings.h"

namespace lora_ext {
namespace {

// Minimum number of elements per thread.
constexpr int64_t kSerialNumbers = 1 << 14;

}  // namespace

Tensor pointwise(const Tensor& x, std::string_view function) {
    const char* op = "pointwise";
    PointwiseArgs args;
    require(x.is_cpu(), op, "x", expected("a tensor on the CPU"), found(x.device()));
    const bool wide = x.scalar_type() == at::kFloat;
    require(wide || x.scalar_type() == at::kBFloat16, op, "x", expected("float32 or bfloat16"),
            found(x.scalar_type()));
    args.dtype = wide ? DType::kFloat32 : DType::kBFloat16;
    const auto* const name =
        std::find(std::begin(kPointwiseNames), std::end(kPointwiseNames), function);
    require(name != std::end(kPointwiseNames), op, "function",
            expected("the name of a function, such as 'silu'"), found("'", function, "'"));
    args.function = static_cast<Pointwise>(name - std::begin(kPointwiseNames));
    // The CPU twin visits the elements in memory order, whatever their strides.
    const Tensor dense = x.is_non_overlapping_and_dense() ? x : x.contiguous();
    Tensor y = at::empty_like(dense);
    args.x = dense.const_data_ptr();
    args.y = y.mutable_data_ptr();
    const PointwiseCpu& twin = chosen_twins<PointwiseCpu>();
    for_items(y.numel(), 1, kSerialNumbers,
              [&](int64_t begin, int64_t end) { twin.apply(args, begin, end); });
    return y;
}

}  // namespace lora_ext
