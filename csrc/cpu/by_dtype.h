// Mapping from a runtime DType to the C++ storage type.
#pragma once

#include "lora_ext/common.h"

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

// Calls f.operator()<T>() with the storage type of `dtype`.
template <typename F>
LX_INLINE void with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f.template operator()<float>();
        case DType::kFloat16:
            return f.template operator()<Half>();
        case DType::kBFloat16:
            return f.template operator()<BFloat>();
        case DType::kFloat64:
            return f.template operator()<double>();
    }
}

// Return the dtype field of the arguments of an op. by_dtype selects a function by this dtype.
template <typename Args>
LX_INLINE DType dtype_of(const Args& args) {
    if constexpr (requires { args.lora.dtype; })
        return args.lora.dtype;
    else if constexpr (requires { args.params.dtype; })
        return args.params.dtype;
    else
        return args.dtype;
}

// Calls the one of the four functions that belongs to dtype_of(args).
template <auto kFloat, auto kHalf, auto kBFloat, auto kDouble, typename Args, typename... Rest>
void by_dtype(const Args& args, Rest... rest) {
    switch (dtype_of(args)) {
        case DType::kFloat32:
            return kFloat(args, rest...);
        case DType::kFloat16:
            return kHalf(args, rest...);
        case DType::kBFloat16:
            return kBFloat(args, rest...);
        case DType::kFloat64:
            return kDouble(args, rest...);
    }
}

// Entry of a table of CPU twins: f for all four types. It is not a lambda, because a lambda in an
// exported table would become an exported symbol.
#define LX_BY_DTYPE(f) by_dtype<f<float>, f<Half>, f<BFloat>, f<double>>

}  // namespace
}  // namespace lora_ext::LX_ISA
