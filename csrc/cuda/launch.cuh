// Host code that the launchers of all kernels share.
#pragma once

#include <initializer_list>

#include "lora_ext/common.h"
#include "lx/device.h"

namespace lora_ext {

constexpr LaunchStatus kInvalidValue = 1;  // cudaErrorInvalidValue

constexpr int64_t kMaxGridX = INT32_MAX;

// Returns the maximum dynamic shared memory of a block on this device. If a kernel uses dynamic
// memory, its static arrays take less than 2 KiB, except in the plan's kernel (4.2 KiB).
inline int64_t most_dynamic_bytes(int64_t static_bytes = 2048) {
    return lx::shared_memory_per_block() - static_bytes;
}

inline int64_t element_size(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}
inline bool aligned_16(const void* p, std::initializer_list<int64_t> strides, int64_t size) {
    bool aligned = reinterpret_cast<uintptr_t>(p) % 16 == 0;
    for (int64_t stride : strides) aligned = aligned && stride * size % 16 == 0;
    return aligned;
}

// Calls f.template operator()<T>() with the C++ type of `dtype`.
template <class F>
LaunchStatus with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f.template operator()<float>();
        case DType::kFloat16:
            return f.template operator()<lx::f16>();
        case DType::kBFloat16:
            return f.template operator()<lx::bf16>();
        default:
            return kInvalidValue;
    }
}

}  // namespace lora_ext
