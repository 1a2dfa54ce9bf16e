// From the DType of values, known at run time, to the C++ type in which they are stored.
#pragma once

#include "lora_ext/common.h"

#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

// f.operator()<T>() with the storage type of `dtype`.
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

// The dtype that chooses among a table's functions; families whose arguments nest add their own.
template <typename Args>
LX_INLINE DType dtype_of(const Args& args) {
    return args.dtype;
}

// An entry of a table: the function template f, instantiated for dtype_of(args).
#define LX_BY_DTYPE(f)                                                          \
    [](const auto& args, auto... rest) {                                        \
        with_dtype(dtype_of(args), [&]<typename T>() { f<T>(args, rest...); }); \
    }

}  // namespace
}  // namespace lora_ext::LX_ISA
