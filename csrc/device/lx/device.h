// The only header through which a kernel uses CUDA.
//
// A file under csrc/cuda includes this header and headers of csrc/include, but no header of CUDA or
// torch, and contains no `asm`. nvcc compiles it for a GPU (lx/hardware.h: one intrinsic or PTX
// instruction per wrapper). g++ with -DLX_EMULATE compiles the same text for the emulator
// (lx/emulated.h, csrc/emu). docs/notes/emulator.md explains how to write such a kernel and what a
// run in the emulator proves.
//
// Both implementations provide CUDA's qualifiers, vector types, threadIdx, blockIdx, blockDim and
// gridDim, and:
//
//   LX_SHARED(type, name, count)
//       declares the array `name` in static shared memory, aligned to 16 bytes.
//   LX_DYN_SHARED(name)
//       declares `name`, a pointer to dynamic shared memory, aligned to 128 bytes.
//   LX_LAUNCH(kernel, grid, block, dynamic_bytes, stream, args...)
//       launches the kernel; returns 0 or the code of the CUDA error that prevented the launch.
//   LX_LAUNCH_PDL(kernel, grid, block, dynamic_bytes, stream, args...)
//       does the same, but the kernel may start before the previous kernel in the stream ends. It
//       must call lx::grid_dependency_wait() before every access to the results of that kernel.
//   LX_BUF(pointer, bytes, access)
//       declares to the emulator, before a launch, that the next kernel may access these bytes;
//       empty on a GPU.
//   LX_BUF_ROWS(pointer, rows, row_bytes, row_stride_bytes, access)
//       does the same for rows, without the gaps between them.
//
// A kernel with commas in its name needs parentheses: LX_LAUNCH((gemm<float, 8>), grid, ...).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace lx {

using bf16 = __nv_bfloat16;
using f16 = __half;
using bf16x2 = __nv_bfloat162;
using f16x2 = __half2;

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// How a kernel may access a declared buffer.
enum class Access {
    // Read-only and written by no kernel in flight: may be read before grid_dependency_wait().
    kConstant,
    kRead,
    // Written; a location may be read only after this launch has written it.
    kWrite,
    kReadWrite,
};

}  // namespace lx

#ifdef LX_EMULATE
#include "lx/emulated.h"
#else
#include "lx/hardware.h"
#include "lx/hardware_tile.h"
#endif

#define LX_DEVICE __device__ __forceinline__
#define LX_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...)   \
    ::lx::launch(#kernel, false, kernel, grid, block, dynamic_bytes, \
                 stream __VA_OPT__(, ) __VA_ARGS__)
#define LX_LAUNCH_PDL(kernel, grid, block, dynamic_bytes, stream, ...) \
    ::lx::launch(#kernel, true, kernel, grid, block, dynamic_bytes,    \
                 stream __VA_OPT__(, ) __VA_ARGS__)

// ------------------------------------------------------------------------------------------------
// Common to GPU and emulator
namespace lx {

LX_DEVICE int thread_rank() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
LX_DEVICE int lane_id() {
    return thread_rank() % kWarpSize;
}
LX_DEVICE int warp_id() {
    return thread_rank() / kWarpSize;
}

template <class T>
__host__ __device__ constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T max(T a, T b) {
    return a < b ? b : a;
}

// Conversions; to a narrower type they round to nearest even.
LX_DEVICE float to_float(float x) {
    return x;
}
LX_DEVICE float to_float(double x) {
    return static_cast<float>(x);
}
LX_DEVICE float to_float(bf16 x) {
    return __bfloat162float(x);
}
LX_DEVICE float to_float(f16 x) {
    return __half2float(x);
}
LX_DEVICE float2 to_float2(bf16x2 x) {
    return __bfloat1622float2(x);
}
LX_DEVICE float2 to_float2(f16x2 x) {
    return __half22float2(x);
}

// Returns e^x by two instructions, or 0 if e^x is below 2^-126. __expf takes five, and keeps
// denormals. Relative error on a GPU: at most 1.23 |x| 2^-24, by the roundings of log2(e) and of
// the product, and the error of exp2_approx, two units in the last place.
LX_DEVICE float exp_approx(float x) {
    return exp2_approx(x * 1.44269504f);
}

template <class T>
LX_DEVICE T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        return __float2bfloat16_rn(x);
    } else if constexpr (std::is_same_v<T, f16>) {
        return __float2half_rn(x);
    } else {
        return static_cast<T>(x);
    }
}

// Two 16-bit values in one register, the first in bits 0-15, as in memory, ldmatrix and mma.
template <class T>
struct PackedOf;
template <>
struct PackedOf<bf16> {
    using type = bf16x2;
};
template <>
struct PackedOf<f16> {
    using type = f16x2;
};
template <class T>
using Packed = typename PackedOf<T>::type;

template <class T>
LX_DEVICE uint32_t pack(T low, T high) {
    static_assert(sizeof(T) == 2);
    return static_cast<uint32_t>(bit_cast<uint16_t>(low)) |
           static_cast<uint32_t>(bit_cast<uint16_t>(high)) << 16;
}
template <class T>
LX_DEVICE uint32_t pack_floats(float low, float high) {
    if constexpr (std::is_same_v<T, bf16>) {
        return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
    } else {
        return bit_cast<uint32_t>(__floats2half2_rn(low, high));
    }
}
template <class T>
LX_DEVICE float2 unpack_floats(uint32_t pair) {
    return to_float2(bit_cast<Packed<T>>(pair));
}

}  // namespace lx
