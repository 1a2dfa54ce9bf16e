// Types shared by all kernel families. The header includes neither torch nor CUDA: csrc/ops handles
// tensors, csrc/cuda and csrc/cpu handle pointers.
#pragma once

#include <cstdint>

// Marks functions shared by kernels and host code.
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

// Return type of launchers: 0, or the code of the CUDA error that prevented the launch.
using LaunchStatus = int;

// Return the CUDA runtime's message for a code that a launcher returned.
const char* launch_status_string(LaunchStatus status);

}  // namespace lora_ext
