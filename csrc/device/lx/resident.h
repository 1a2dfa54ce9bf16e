// Launches whose blocks all run at the same time, so that they can wait for each other. Extends
// lx/device.h for the kernels that need this.
//
//   LX_LAUNCH_RESIDENT(kernel, grid, block, dynamic_bytes, stream, args...)
//       launches the kernel; fails if the grid has more than lx::resident_blocks() blocks.
//   lx::resident_blocks(kernel, threads, dynamic_bytes)
//       host: returns the number of blocks that the current device runs at once, 0 if unknown.
//   lx::wait_at_least(counter, least)
//       kernel: waits until *counter, which blocks increase by atomic_add, is at least `least`.
//       Data that a block writes before a fence_device() and its atomic_add is visible after this
//       call and another fence_device().
#pragma once

#include "lx/device.h"

#define LX_LAUNCH_RESIDENT(kernel, grid, block, dynamic_bytes, stream, ...) \
    ::lx::launch_resident(#kernel, kernel, grid, block, dynamic_bytes,      \
                          stream __VA_OPT__(, ) __VA_ARGS__)

namespace lx {

#ifdef LX_EMULATE

namespace emu {
int resident_blocks(size_t dynamic_bytes);
int run_resident(const Launch& launch, void (*body)(void*), void* arguments, size_t argument_bytes);
void wait_at_least(const unsigned* counter, unsigned least, Site site);
}  // namespace emu

template <class... Params>
int resident_blocks(void (*)(Params...), int /*threads*/, size_t dynamic_bytes) {
    return emu::resident_blocks(dynamic_bytes);
}

template <class... Params, class... Args>
int launch_resident(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                    size_t dynamic_bytes, void* /*stream*/, Args&&... args) {
    struct Call {
        void (*kernel)(Params...);
        std::tuple<std::remove_cv_t<Params>...> args;
    } call{kernel, {static_cast<std::remove_cv_t<Params>>(std::forward<Args>(args))...}};
    auto body = [](void* p) {
        auto& c = *static_cast<Call*>(p);
        std::apply(c.kernel, c.args);
    };
#ifdef __SANITIZE_THREAD__
    constexpr bool kInstrumented = true;
#else
    constexpr bool kInstrumented = false;
#endif
    return emu::run_resident({name, grid, block, dynamic_bytes, false, kInstrumented}, body, &call,
                             sizeof(call));
}

inline void wait_at_least(const unsigned* counter, unsigned least,
                          emu::Site site = emu::Site::current()) {
    emu::wait_at_least(counter, least, site);
}

#else

template <class... Params>
int resident_blocks(void (*kernel)(Params...), int threads, size_t dynamic_bytes) {
    const auto facts = detail::kernel_facts(reinterpret_cast<const void*>(kernel));
    int each = 0;
    if (facts.error != cudaSuccess || device_attribute(cudaDevAttrCooperativeLaunch) == 0 ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, dynamic_bytes) !=
            cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return each * multiprocessors();
}

template <class... Params, class... Args>
int launch_resident(const char*, void (*kernel)(Params...), dim3 grid, dim3 block,
                    size_t dynamic_bytes, void* stream, Args&&... args) {
    cudaError_t error = detail::kernel_facts(reinterpret_cast<const void*>(kernel)).error;
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = dynamic_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = 1;
        error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
    }
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

__device__ __forceinline__ void wait_at_least(const unsigned* counter, unsigned least) {
    unsigned seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < least);
}

#endif

}  // namespace lx
