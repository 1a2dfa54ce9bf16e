// Emulator implementation of lx/device.h: only declarations and functions of one line. They call
// csrc/emu, which is compiled without instrumentation. lx/hardware.h documents each wrapper.
#pragma once

#include <cstring>
#include <source_location>
#include <tuple>
#include <utility>

// The half-precision headers define CUDA's qualifiers. g++ does not support __launch_bounds__.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ LX_SHARED_or_LX_DYN_SHARED_is_the_way_to_shared_memory

#define threadIdx (::lx::emu::self().thread_idx)
#define blockIdx (::lx::emu::self().block_idx)
#define blockDim (::lx::emu::self().block_dim)
#define gridDim (::lx::emu::self().grid_dim)

// The address of the key identifies an array: a static local exists once per kernel instantiation.
#define LX_SHARED(type, name, count)             \
    static const char name##_lx_key = 0;         \
    auto& name = *static_cast<type(*)[(count)]>( \
        ::lx::emu::shared_array(&name##_lx_key, #name, sizeof(type) * (count)))
#define LX_DYN_SHARED(name) unsigned char* const name = ::lx::emu::dynamic_shared()
#define LX_BUF(pointer, bytes, access) \
    ::lx::emu::declare(#pointer, pointer, 1, static_cast<int64_t>(bytes), 0, access)
#define LX_BUF_ROWS(pointer, rows, row_bytes, row_stride_bytes, access)                         \
    ::lx::emu::declare(#pointer, pointer, static_cast<int64_t>(rows),                           \
                       static_cast<int64_t>(row_bytes), static_cast<int64_t>(row_stride_bytes), \
                       access)

namespace lx {
namespace emu {

// Source location of a call. Wrappers that can fail or block take it as a default argument.
using Site = std::source_location;

struct Self {
    uint3 thread_idx, block_idx;
    dim3 block_dim, grid_dim;
};
[[gnu::const]] const Self& self();  // cacheable: a stack frame belongs to one CUDA thread

void* shared_array(const void* key, const char* name, size_t bytes);
unsigned char* dynamic_shared();
void declare(const char* name, const void* pointer, int64_t rows, int64_t row_bytes,
             int64_t row_stride_bytes, Access access);

struct Launch {
    const char* kernel;
    dim3 grid, block;
    size_t dynamic_bytes;
    bool dependent;
    bool instrumented;  // compiled so that every load and store is reported to the checker
};
int run(const Launch& launch, void (*body)(void*), void* arguments, size_t argument_bytes);

enum class BarrierVote { kNone, kOr, kAnd, kCount };
int block_barrier(BarrierVote vote, bool p, Site site);
void named_barrier(int id, int threads, bool wait, Site site);
void fence();

enum class Shuffle { kIndex, kUp, kDown, kXor };
void shuffle(Shuffle kind, unsigned mask, void* value, int bytes, int operand, int width,
             Site site);
enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t reduce(Reduce op, bool is_signed, unsigned mask, uint32_t x, Site site);
unsigned match_any(unsigned mask, uint64_t bits, Site site);

enum class Atomic { kAdd, kMin, kMax, kAnd, kOr, kExchange, kCompareExchange };
uint64_t atomic(Atomic op, void* p, int bytes, bool is_signed, uint64_t x, uint64_t expected,
                Site site);

void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed, Site site);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site);
void cp_async(void* shared, const void* global, int bytes, int source_bytes, Site site);

}  // namespace emu

// Host side
const char* status_string(int status);
int multiprocessors();
int shared_memory_per_block();
int fill_bytes(void* pointer, int value, size_t bytes, void* stream);

template <class... Params, class... Args>
int launch(const char* name, bool dependent, void (*kernel)(Params...), dim3 grid, dim3 block,
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
    return emu::run({name, grid, block, dynamic_bytes, dependent, kInstrumented}, body, &call,
                    sizeof(call));
}

// Bits
template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}
inline int popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int ffs(unsigned x) {
    return __builtin_ffs(static_cast<int>(x));
}
inline int clz(unsigned x) {
    return x ? __builtin_clz(x) : 32;
}
unsigned brev(unsigned x);
inline unsigned funnel_shift_left(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned funnel_shift_right(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// Barriers and fences
inline void syncthreads(emu::Site site = emu::Site::current()) {
    emu::block_barrier(emu::BarrierVote::kNone, false, site);
}
inline bool syncthreads_or(bool p, emu::Site site = emu::Site::current()) {
    return emu::block_barrier(emu::BarrierVote::kOr, p, site) != 0;
}
inline bool syncthreads_and(bool p, emu::Site site = emu::Site::current()) {
    return emu::block_barrier(emu::BarrierVote::kAnd, p, site) != 0;
}
inline int syncthreads_count(bool p, emu::Site site = emu::Site::current()) {
    return emu::block_barrier(emu::BarrierVote::kCount, p, site);
}
void syncwarp(unsigned mask = kFullMask, emu::Site site = emu::Site::current());
inline void bar_sync(int id, int threads, emu::Site site = emu::Site::current()) {
    emu::named_barrier(id, threads, true, site);
}
inline void bar_arrive(int id, int threads, emu::Site site = emu::Site::current()) {
    emu::named_barrier(id, threads, false, site);
}
inline void fence_block() {}  // no-op: the race checker orders within a block by barriers only
inline void fence_device() {
    emu::fence();
}
inline void fence_system() {
    emu::fence();
}

// Warp collectives
template <class T>
inline T shfl_sync(unsigned mask, T x, int source, int width = kWarpSize,
                   emu::Site site = emu::Site::current()) {
    emu::shuffle(emu::Shuffle::kIndex, mask, &x, sizeof(T), source, width, site);
    return x;
}
template <class T>
inline T shfl_up_sync(unsigned mask, T x, unsigned delta, int width = kWarpSize,
                      emu::Site site = emu::Site::current()) {
    emu::shuffle(emu::Shuffle::kUp, mask, &x, sizeof(T), static_cast<int>(delta), width, site);
    return x;
}
template <class T>
inline T shfl_down_sync(unsigned mask, T x, unsigned delta, int width = kWarpSize,
                        emu::Site site = emu::Site::current()) {
    emu::shuffle(emu::Shuffle::kDown, mask, &x, sizeof(T), static_cast<int>(delta), width, site);
    return x;
}
template <class T>
inline T shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = kWarpSize,
                       emu::Site site = emu::Site::current()) {
    emu::shuffle(emu::Shuffle::kXor, mask, &x, sizeof(T), lane_mask, width, site);
    return x;
}
unsigned ballot_sync(unsigned mask, bool p, emu::Site site = emu::Site::current());
inline bool any_sync(unsigned mask, bool p, emu::Site site = emu::Site::current()) {
    return ballot_sync(mask, p, site) != 0;
}
inline bool all_sync(unsigned mask, bool p, emu::Site site = emu::Site::current()) {
    return ballot_sync(mask, !p, site) == 0;
}
template <class T>
inline unsigned match_any_sync(unsigned mask, T x, emu::Site site = emu::Site::current()) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &x, sizeof(T));
    return emu::match_any(mask, bits, site);
}
namespace emu {
template <class T>
inline T reduce_as(Reduce op, unsigned mask, T x, Site site) {
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);
    return static_cast<T>(reduce(op, std::is_signed_v<T>, mask, static_cast<uint32_t>(x), site));
}
template <class T>
inline T atomic_as(Atomic op, T* p, T x, T expected, Site site) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    return static_cast<T>(atomic(op, p, sizeof(T), std::is_signed_v<T>, static_cast<uint64_t>(x),
                                 static_cast<uint64_t>(expected), site));
}
}  // namespace emu
template <class T>
inline T reduce_add_sync(unsigned mask, T x, emu::Site site = emu::Site::current()) {
    return emu::reduce_as(emu::Reduce::kAdd, mask, x, site);
}
template <class T>
inline T reduce_min_sync(unsigned mask, T x, emu::Site site = emu::Site::current()) {
    return emu::reduce_as(emu::Reduce::kMin, mask, x, site);
}
template <class T>
inline T reduce_max_sync(unsigned mask, T x, emu::Site site = emu::Site::current()) {
    return emu::reduce_as(emu::Reduce::kMax, mask, x, site);
}
inline unsigned reduce_and_sync(unsigned mask, unsigned x, emu::Site site = emu::Site::current()) {
    return emu::reduce_as(emu::Reduce::kAnd, mask, x, site);
}
inline unsigned reduce_or_sync(unsigned mask, unsigned x, emu::Site site = emu::Site::current()) {
    return emu::reduce_as(emu::Reduce::kOr, mask, x, site);
}
inline unsigned reduce_xor_sync(unsigned mask, unsigned x, emu::Site site = emu::Site::current()) {
    return emu::reduce_as(emu::Reduce::kXor, mask, x, site);
}

// Atomics
template <class T>
inline T atomic_add(T* p, T x, emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kAdd, p, x, T{}, site);
}
template <class T>
inline T atomic_min(T* p, T x, emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kMin, p, x, T{}, site);
}
template <class T>
inline T atomic_max(T* p, T x, emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kMax, p, x, T{}, site);
}
template <class T>
inline T atomic_and(T* p, T x, emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kAnd, p, x, T{}, site);
}
template <class T>
inline T atomic_or(T* p, T x, emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kOr, p, x, T{}, site);
}
template <class T>
inline T atomic_exchange(T* p, T x, emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kExchange, p, x, T{}, site);
}
template <class T>
inline T atomic_compare_exchange(T* p, T expected, T desired,
                                 emu::Site site = emu::Site::current()) {
    return emu::atomic_as(emu::Atomic::kCompareExchange, p, desired, expected, site);
}

// Loads and stores with cache hints are plain here. The check flavour checks their full width.
template <class T>
inline T* element(T* p, int n, int bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) +
                                static_cast<uintptr_t>(int64_t{n} * bytes));
}
template <class T>
inline T load_global(const T* p) {
    return *p;
}
template <class T>
inline void store_global(T* p, const T& x) {
    *p = x;
}
template <class T>
inline T load_nc(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    return *p;
}
template <class T>
inline T load_stream(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    return *p;
}
template <class T>
inline T load_l2(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    return *p;
}
template <class T>
inline void store_stream(T* p, T x) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    *p = x;
}
inline void prefetch_l2(const void*) {}

// Tensor cores
uint32_t shared_address(const void* p);
inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, emu::Site site = emu::Site::current()) {
    emu::ldmatrix(r, row, 1, false, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, emu::Site site = emu::Site::current()) {
    emu::ldmatrix(r, row, 2, false, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, emu::Site site = emu::Site::current()) {
    emu::ldmatrix(r, row, 4, false, site);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row,
                              emu::Site site = emu::Site::current()) {
    emu::ldmatrix(r, row, 1, true, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              emu::Site site = emu::Site::current()) {
    emu::ldmatrix(r, row, 2, true, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              emu::Site site = emu::Site::current()) {
    emu::ldmatrix(r, row, 4, true, site);
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emu::Site site = emu::Site::current()) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    if constexpr (std::is_same_v<T, bf16>) {
        emu::mma_bf16(d, a, b, site);
    } else {
        emu::mma_f16(d, a, b, site);
    }
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emu::Site site = emu::Site::current()) {
    emu::mma_tf32(d, a, b, site);
}
uint32_t to_tf32(float x);

// cp.async
template <int kBytes>
inline void cp_async(void* shared, const void* global, int source_bytes = kBytes,
                     emu::Site site = emu::Site::current()) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    emu::cp_async(shared, global, kBytes, source_bytes, site);
}
void cp_async_commit();
void cp_async_wait(int pending);
template <int kPending>
inline void cp_async_wait_group() {
    cp_async_wait(kPending);
}
void cp_async_wait_all();

// Programmatic dependent launch
void grid_dependency_wait();
void grid_dependency_launch();

// Math. Here *_approx is exact apart from rounding; the tolerances of the tests allow for the
// larger errors of a GPU.
inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // like a GPU, which flushes denormals to 0
}
inline float log_approx(float x) {
    return std::log(x);
}
inline float log2_approx(float x) {
    return std::log2(x);
}
inline float rsqrt_approx(float x) {
    return 1.0f / std::sqrt(x);
}
inline float divide_approx(float x, float y) {
    return x / y;
}
inline float reciprocal_approx(float x) {
    return 1.0f / x;
}

[[noreturn]] void trap(emu::Site site = emu::Site::current());

}  // namespace lx
