// Entry points that code compiled with -fsanitize=thread calls before each load and store, and the
// memory functions to which instrumented.h redirects. No ThreadSanitizer library is linked.
#include <cstring>

#include "emu/machine.h"

using lx::emu::machine;
using lx::emu::Place;
using lx::emu::Touch;

namespace {

inline void hook(const void* p, size_t bytes, Touch how, bool must_align, const void* code) {
    if (machine.current) lx::emu::touch(p, bytes, how, must_align, Place(code));
}

}  // namespace

#define HOOK(name, how, bytes, aligned)                                   \
    void __tsan_##name(void* p) {                                         \
        hook(p, bytes, Touch::how, aligned, __builtin_return_address(0)); \
    }
#define HOOKS(bytes)                                          \
    HOOK(read##bytes, kRead, bytes, true)                     \
    HOOK(write##bytes, kWrite, bytes, true)                   \
    HOOK(unaligned_read##bytes, kRead, bytes, false)          \
    HOOK(unaligned_write##bytes, kWrite, bytes, false)        \
    HOOK(volatile_read##bytes, kRead, bytes, true)            \
    HOOK(volatile_write##bytes, kWrite, bytes, true)          \
    HOOK(unaligned_volatile_read##bytes, kRead, bytes, false) \
    HOOK(unaligned_volatile_write##bytes, kWrite, bytes, false)

extern "C" {

void __tsan_init() {}
// Stops the launch before a deep or large frame reaches the guard page.
void __tsan_func_entry(void*) {
    if (!machine.current) return;
    const auto* here = static_cast<const unsigned char*>(__builtin_frame_address(0));
    if (here < machine.current->stack.low + 8192) {
        lx::emu::fatal("resources", Place(__builtin_return_address(0)),
                       "a thread uses more than 50 KiB of stack");
    }
}
void __tsan_func_exit() {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
    if (bytes) hook(p, bytes, Touch::kRead, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    if (bytes) hook(p, bytes, Touch::kWrite, false, __builtin_return_address(0));
}
void __tsan_vptr_update(void* p, void*) {
    hook(p, sizeof(void*), Touch::kWrite, true, __builtin_return_address(0));
}
void __tsan_vptr_read(void* p) {
    hook(p, sizeof(void*), Touch::kRead, true, __builtin_return_address(0));
}

void* lx_emu_memcpy(void* to, const void* from, size_t bytes) {
    if (bytes) {
        hook(from, bytes, Touch::kRead, false, __builtin_return_address(0));
        hook(to, bytes, Touch::kWrite, false, __builtin_return_address(0));
    }
    return memcpy(to, from, bytes);
}
void* lx_emu_memmove(void* to, const void* from, size_t bytes) {
    if (bytes) {
        hook(from, bytes, Touch::kRead, false, __builtin_return_address(0));
        hook(to, bytes, Touch::kWrite, false, __builtin_return_address(0));
    }
    return memmove(to, from, bytes);
}
void* lx_emu_memset(void* to, int value, size_t bytes) {
    if (bytes) hook(to, bytes, Touch::kWrite, false, __builtin_return_address(0));
    return memset(to, value, bytes);
}

}  // extern "C"
