// GPU implementation of lx/device.h: one intrinsic or PTX instruction per wrapper. Requires sm_80.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#define LX_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define LX_DYN_SHARED(name)                                             \
    extern __shared__ __align__(128) unsigned char lx_dynamic_shared[]; \
    unsigned char* const name = lx_dynamic_shared
#define LX_BUF(pointer, bytes, access) static_cast<void>(0)
#define LX_BUF_ROWS(pointer, rows, row_bytes, row_stride_bytes, access) static_cast<void>(0)

#define LX_INLINE __device__ __forceinline__

namespace lx {

// ------------------------------------------------------------------------------------------------
// Host side

inline const char* status_string(int status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// Returns an attribute of the current device, or 0 on failure.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
    return value;
}
inline int multiprocessors() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
}

namespace detail {
// Returns value(), computed once per key. A failed result is not cached, since there may be too
// little memory to load a kernel now but enough later.
template <class Key, class F, class Failed>
auto kept(const Key& key, F&& value, Failed&& failed) {
    static std::mutex lock;
    static std::map<Key, decltype(value())> known;
    const std::lock_guard<std::mutex> guard(lock);
    if (const auto found = known.find(key); found != known.end()) return found->second;
    const auto fresh = value();
    if (!failed(fresh)) known.emplace(key, fresh);
    return fresh;
}
inline int current_device() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}
}  // namespace detail

// Returns the maximum bytes of shared memory per block on the current device, static arrays
// included: 227 KiB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and sm_120.
inline int shared_memory_per_block() {
    return detail::kept(
        detail::current_device(),
        [] { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); },
        [](int bytes) { return bytes == 0; });
}

inline int fill_bytes(void* pointer, int value, size_t bytes, void* stream) {
    return cudaMemsetAsync(pointer, value, bytes, static_cast<cudaStream_t>(stream));
}

namespace detail {
struct KernelFacts {
    cudaError_t error;
    bool can_wait;  // whether the code was built for sm_90 or later
};
// Returns properties of a kernel on the current device, read once. A kernel with more than 48 KiB
// of shared memory, static arrays included, must opt in. This function opts in to the maximum,
// because the limit of a kernel is the same for all threads, and another thread may be launching
// the kernel with a larger size.
inline KernelFacts kernel_facts(const void* kernel) {
    const auto ask = [&] {
        cudaFuncAttributes built{};
        cudaError_t error = cudaFuncGetAttributes(&built, kernel);
        const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                         static_cast<int>(built.sharedSizeBytes);
        if (error == cudaSuccess && built.maxDynamicSharedSizeBytes < most)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        // The architecture of the compiled code matters, not the GPU's: PTX for an older GPU has no
        // wait instruction, even if it is compiled for a newer GPU at load time.
        return KernelFacts{error, built.ptxVersion >= 90};
    };
    return kept(std::pair(kernel, current_device()), ask,
                [](const KernelFacts& facts) { return facts.error != cudaSuccess; });
}
}  // namespace detail

template <class... Params, class... Args>
int launch(const char*, bool dependent, void (*kernel)(Params...), dim3 grid, dim3 block,
           size_t dynamic_bytes, void* stream, Args&&... args) {
    detail::KernelFacts facts{};
    if (dependent || dynamic_bytes > 32 * 1024)
        facts = detail::kernel_facts(reinterpret_cast<const void*>(kernel));
    cudaError_t error = facts.error;
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = dynamic_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = dependent && facts.can_wait ? 1 : 0;
        error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
    }
    // The caller receives the error's code. The call below clears the error, which the next
    // unrelated check would otherwise report again.
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

// ------------------------------------------------------------------------------------------------
// Bits

template <class To, class From>
LX_INLINE To bit_cast(const From& from) {  // std::bit_cast rejects bf16x2 and f16x2
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}
LX_INLINE int popc(unsigned x) {
    return __popc(x);
}
LX_INLINE int ffs(unsigned x) {
    return __ffs(static_cast<int>(x));
}  // 1-based, 0 for x == 0
LX_INLINE int clz(unsigned x) {
    return __clz(static_cast<int>(x));
}
LX_INLINE unsigned brev(unsigned x) {
    return __brev(x);
}
LX_INLINE unsigned funnel_shift_left(unsigned low, unsigned high, unsigned shift) {
    return __funnelshift_l(low, high, shift);
}
LX_INLINE unsigned funnel_shift_right(unsigned low, unsigned high, unsigned shift) {
    return __funnelshift_r(low, high, shift);
}

// ------------------------------------------------------------------------------------------------
// Barriers and fences

LX_INLINE void syncthreads() {
    __syncthreads();
}
LX_INLINE bool syncthreads_or(bool p) {
    return __syncthreads_or(p);
}
LX_INLINE bool syncthreads_and(bool p) {
    return __syncthreads_and(p);
}
LX_INLINE int syncthreads_count(bool p) {
    return __syncthreads_count(p);
}
LX_INLINE void syncwarp(unsigned mask = kFullMask) {
    __syncwarp(mask);
}

// Named barriers 1 to 15 (0 is syncthreads). `threads`, a multiple of 32, is the total number of
// threads that call bar_sync or bar_arrive.
LX_INLINE void bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LX_INLINE void bar_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

LX_INLINE void fence_block() {
    __threadfence_block();
}
LX_INLINE void fence_device() {
    __threadfence();
}
LX_INLINE void fence_system() {
    __threadfence_system();
}

// ------------------------------------------------------------------------------------------------
// Warp collectives. T has 2, 4 or 8 bytes.

namespace detail {
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
template <class T>
LX_INLINE Bits<T> to_bits(const T& x) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    if constexpr (sizeof(T) == 2) {
        return bit_cast<uint16_t>(x);
    } else {
        return bit_cast<Bits<T>>(x);
    }
}
template <class T>
LX_INLINE T from_bits(Bits<T> bits) {
    if constexpr (sizeof(T) == 2) {
        return bit_cast<T>(static_cast<uint16_t>(bits));
    } else {
        return bit_cast<T>(bits);
    }
}
}  // namespace detail

template <class T>
LX_INLINE T shfl_sync(unsigned mask, T x, int source, int width = kWarpSize) {
    return detail::from_bits<T>(__shfl_sync(mask, detail::to_bits(x), source, width));
}
template <class T>
LX_INLINE T shfl_up_sync(unsigned mask, T x, unsigned delta, int width = kWarpSize) {
    return detail::from_bits<T>(__shfl_up_sync(mask, detail::to_bits(x), delta, width));
}
template <class T>
LX_INLINE T shfl_down_sync(unsigned mask, T x, unsigned delta, int width = kWarpSize) {
    return detail::from_bits<T>(__shfl_down_sync(mask, detail::to_bits(x), delta, width));
}
template <class T>
LX_INLINE T shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = kWarpSize) {
    return detail::from_bits<T>(__shfl_xor_sync(mask, detail::to_bits(x), lane_mask, width));
}
LX_INLINE unsigned ballot_sync(unsigned mask, bool p) {
    return __ballot_sync(mask, p);
}
LX_INLINE bool any_sync(unsigned mask, bool p) {
    return __any_sync(mask, p);
}
LX_INLINE bool all_sync(unsigned mask, bool p) {
    return __all_sync(mask, p);
}
template <class T>  // Returns the mask of lanes in `mask` with the same value.
LX_INLINE unsigned match_any_sync(unsigned mask, T x) {
    return __match_any_sync(mask, detail::to_bits(x));
}

// T: int32_t or uint32_t.
template <class T>
LX_INLINE T reduce_add_sync(unsigned mask, T x) {
    return __reduce_add_sync(mask, x);
}
template <class T>
LX_INLINE T reduce_min_sync(unsigned mask, T x) {
    return __reduce_min_sync(mask, x);
}
template <class T>
LX_INLINE T reduce_max_sync(unsigned mask, T x) {
    return __reduce_max_sync(mask, x);
}
LX_INLINE unsigned reduce_and_sync(unsigned mask, unsigned x) {
    return __reduce_and_sync(mask, x);
}
LX_INLINE unsigned reduce_or_sync(unsigned mask, unsigned x) {
    return __reduce_or_sync(mask, x);
}
LX_INLINE unsigned reduce_xor_sync(unsigned mask, unsigned x) {
    return __reduce_xor_sync(mask, x);
}

// ------------------------------------------------------------------------------------------------
// Relaxed atomics on shared or global integers; each returns the old value. T: int, unsigned; add,
// exchange and compare-and-swap also take unsigned long long.

template <class T>
LX_INLINE T atomic_add(T* p, T x) {
    return atomicAdd(p, x);
}
template <class T>
LX_INLINE T atomic_min(T* p, T x) {
    return atomicMin(p, x);
}
template <class T>
LX_INLINE T atomic_max(T* p, T x) {
    return atomicMax(p, x);
}
template <class T>
LX_INLINE T atomic_and(T* p, T x) {
    return atomicAnd(p, x);
}
template <class T>
LX_INLINE T atomic_or(T* p, T x) {
    return atomicOr(p, x);
}
template <class T>
LX_INLINE T atomic_exchange(T* p, T x) {
    return atomicExch(p, x);
}
template <class T>
LX_INLINE T atomic_compare_exchange(T* p, T expected, T desired) {
    return atomicCAS(p, expected, desired);
}

// ------------------------------------------------------------------------------------------------
// Loads and stores. With a cache hint, T has 4, 8 or 16 bytes (load_nc: also 2).

// Returns p + n * bytes (in bytes) by one instruction with a 64-bit product. In a loop, the
// compiler would multiply by `bytes` as a 64-bit number, which takes three instructions.
template <class T>
LX_INLINE T* element(T* p, int n, int bytes) {
    T* address;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(n), "r"(bytes), "l"(p));
    return address;
}

// Accesses to global memory without a hint, for a T of any size. They are needed for pointers whose
// address space the compiler cannot deduce, for example after a selection or a round trip through
// shared memory.
template <class T>
LX_INLINE T load_global(const T* p) {
    __builtin_assume(__isGlobal(p));
    return *p;
}
template <class T>
LX_INLINE void store_global(T* p, const T& x) {
    __builtin_assume(__isGlobal(p));
    *p = x;
}
// Loads through the read-only path. The bytes must not change while the kernel runs.
template <class T>
LX_INLINE T load_nc(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 2) {
        return bit_cast<T>(__ldg(reinterpret_cast<const unsigned short*>(p)));
    } else if constexpr (sizeof(T) == 4) {
        return bit_cast<T>(__ldg(reinterpret_cast<const unsigned*>(p)));
    } else if constexpr (sizeof(T) == 8) {
        return bit_cast<T>(__ldg(reinterpret_cast<const uint2*>(p)));
    } else {
        return bit_cast<T>(__ldg(reinterpret_cast<const uint4*>(p)));
    }
}
// Loads like load_nc, but without an allocation in L1, for data that is read once.
template <class T>
LX_INLINE T load_stream(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 4) {
        unsigned x;
        asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(x) : "l"(p));
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 8) {
        uint2 x;
        asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                     : "=r"(x.x), "=r"(x.y)
                     : "l"(p));
        return bit_cast<T>(x);
    } else {
        uint4 x;
        asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"(p));
        return bit_cast<T>(x);
    }
}
// Loads from L2, since L1 may be stale, for data that another block of this launch has written.
template <class T>
LX_INLINE T load_l2(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 4) {
        return bit_cast<T>(__ldcg(reinterpret_cast<const unsigned*>(p)));
    } else if constexpr (sizeof(T) == 8) {
        return bit_cast<T>(__ldcg(reinterpret_cast<const uint2*>(p)));
    } else {
        return bit_cast<T>(__ldcg(reinterpret_cast<const uint4*>(p)));
    }
}
// Stores data that is not read soon. Caches evict such data first.
template <class T>
LX_INLINE void store_stream(T* p, T x) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 4) {
        __stcs(reinterpret_cast<unsigned*>(p), bit_cast<unsigned>(x));
    } else if constexpr (sizeof(T) == 8) {
        __stcs(reinterpret_cast<uint2*>(p), bit_cast<uint2>(x));
    } else {
        __stcs(reinterpret_cast<uint4*>(p), bit_cast<uint4>(x));
    }
}
LX_INLINE void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ------------------------------------------------------------------------------------------------
// Programmatic dependent launch; no-ops before sm_90.

// Waits until the results of the previous kernel in the stream are visible.
LX_INLINE void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allows a dependent kernel to be scheduled once every block has called this or ended. It gives no
// guarantee about memory.
LX_INLINE void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------------
// Math. *_approx: a few units in the last place, see the CUDA programming guide. The rest of
// <cmath> (fmaf, fmaxf, expf, log1pf, ...) is available on GPU and emulator, without a wrapper.

// Denormal arguments and results become 0.
LX_INLINE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
LX_INLINE float log_approx(float x) {
    return __logf(x);
}
LX_INLINE float log2_approx(float x) {
    return __log2f(x);
}
LX_INLINE float rsqrt_approx(float x) {
    return rsqrtf(x);
}
LX_INLINE float divide_approx(float x, float y) {
    return __fdividef(x, y);
}
LX_INLINE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

[[noreturn]] LX_INLINE void trap() {
    __trap();
    __builtin_unreachable();
}

}  // namespace lx

#undef LX_INLINE
