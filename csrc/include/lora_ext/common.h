// Types shared by every family of kernels. No torch header, no CUDA header: the contract between
// csrc/ops, which knows tensors, and csrc/cuda and csrc/cpu, which know pointers.
#pragma once

#include <cstdint>

// Functions that kernels and host code share.
#ifdef __CUDACC__
#define LX_HOST_DEVICE __host__ __device__
#else
#define LX_HOST_DEVICE
#endif

namespace lora_ext {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// A launcher returns 0, or the code of the CUDA error that kept it from launching.
using LaunchStatus = int;

// The words of the CUDA runtime for a code that a launcher returned.
const char* launch_status_string(LaunchStatus status);

}  // namespace lora_ext
