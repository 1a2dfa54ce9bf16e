#include "emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace lx::emu {

// AddressSanitizer, if the program is built with it, must be notified of every change of stack.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* low, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** low,
                                                   size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* low, size_t size);
}

namespace {

Stack host_stack{};
bool in_fiber = false, entered_from_host = false;

}  // namespace

static void switch_context(Context* from, Context* to);

void fiber_switch(Context* from, Context* to, const Stack* stack) {
    entered_from_host = !in_fiber;
    in_fiber = stack != nullptr;
    void* fake_stack = nullptr;
    if (__sanitizer_start_switch_fiber) {
        const Stack& s = stack ? *stack : host_stack;
        __sanitizer_start_switch_fiber(&fake_stack, s.low, static_cast<size_t>(s.high - s.low));
    }
    switch_context(from, to);
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    }
}

void fiber_entered() {
    if (!__sanitizer_finish_switch_fiber) return;
    const void* low;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &low, &size);
    if (entered_from_host) {
        host_stack.low = static_cast<unsigned char*>(const_cast<void*>(low));
        host_stack.high = host_stack.low + size;
    }
}

namespace {

void unpoison(const Stack& stack) {  // clears the poison of the previous thread's frames
    if (__asan_unpoison_memory_region) {
        __asan_unpoison_memory_region(stack.low, static_cast<size_t>(stack.high - stack.low));
    }
}

}  // namespace

static std::vector<Stack> stacks;

void free_stacks(int first) {
    for (size_t i = static_cast<size_t>(first); i < stacks.size(); ++i) {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        if (stacks[i].low) munmap(stacks[i].low - page, kStackBytes);
        stacks[i] = {};
    }
}

Stack fiber_stack(int index) {
    if (static_cast<size_t>(index) >= stacks.size())
        stacks.resize(static_cast<size_t>(index) + 1, Stack{});
    Stack& stack = stacks[static_cast<size_t>(index)];
    if (!stack.low) {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) abort();
        stack.low = static_cast<unsigned char*>(memory) + page;
        // With equal offsets of the stack tops, all hot lines would share the same cache sets.
        stack.high = static_cast<unsigned char*>(memory) + kStackBytes - 64 * (index % 32);
    }
    return stack;
}

#if defined(__x86_64__) && !defined(LX_EMU_PORTABLE_FIBERS)

asm(R"(
    .text
    .p2align 4
    .hidden lx_emu_switch
    .globl lx_emu_switch
    .type lx_emu_switch, @function
lx_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size lx_emu_switch, . - lx_emu_switch
)");
extern "C" void lx_emu_switch(void** from, void* to);

static void switch_context(Context* from, Context* to) {
    lx_emu_switch(from, *to);
}

void fiber_prepare(Context* context, const Stack& stack, void (*entry)()) {
    unpoison(stack);
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.high) & ~uintptr_t{15});
    *--top = nullptr;  // takes the place of a return address, so the stack is aligned as in a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    *context = top;
}

#else

static void switch_context(Context* from, Context* to) {
    swapcontext(from, to);
}

void fiber_prepare(Context* context, const Stack& stack, void (*entry)()) {
    unpoison(stack);
    getcontext(context);
    context->uc_stack.ss_sp = stack.low;
    context->uc_stack.ss_size = static_cast<size_t>(stack.high - stack.low);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}

#endif

}  // namespace lx::emu
