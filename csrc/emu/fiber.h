// Stackful coroutines, one per CUDA thread. A switch saves only the callee-saved registers.
#pragma once

#include <cstddef>

namespace lx::emu {

constexpr size_t kStackBytes = 64 * 1024;  // the lowest page of each stack is a guard

#if defined(__x86_64__) && !defined(LX_EMU_PORTABLE_FIBERS)
using Context = void*;  // the saved stack pointer; the registers are on the stack
#else
}  // namespace lx::emu
#include <ucontext.h>
namespace lx::emu {
using Context = ucontext_t;  // portable but slow: a system call per switch
#endif

// Returns the memory of stack `index`, the same on every call until it is freed.
struct Stack {
    unsigned char *low, *high;  // usable range
};
Stack fiber_stack(int index);
// Frees the memory of all stacks from index `first` on.
void free_stacks(int first);

// Prepares `context` to start in `entry`, which must not return, on an unused stack.
void fiber_prepare(Context* context, const Stack& stack, void (*entry)());
// Saves the running context in `from` and continues `to`. `stack` is the stack of `to`, or nullptr
// for the stack of the program that launches kernels.
void fiber_switch(Context* from, Context* to, const Stack* stack);
// Must be called in `entry` before anything else.
void fiber_entered();

}  // namespace lx::emu
