// Stackful coroutines, one per CUDA thread: a switch saves the registers that a call preserves,
// nothing else.
#pragma once

#include <cstddef>

namespace lx::emu {

constexpr size_t kStackBytes = 64 * 1024;  // the lowest page of each stack is a guard

#if defined(__x86_64__) && !defined(LX_EMU_PORTABLE_FIBERS)
using Context = void*;  // the saved stack pointer; the registers lie on the stack
#else
}  // namespace lx::emu
#include <ucontext.h>
namespace lx::emu {
using Context = ucontext_t;  // slow (a system call per switch), and runs everywhere
#endif

// Memory for stack `index`; the same one on every call.
struct Stack {
    unsigned char *low, *high;  // usable range
};
Stack fiber_stack(int index);

// Makes `context` start in `entry`, which must not return, on an unused stack.
void fiber_prepare(Context* context, const Stack& stack, void (*entry)());
// `stack`: of `to`; nullptr: the stack of the program that launches kernels.
void fiber_switch(Context* from, Context* to, const Stack* stack);
// The first thing in `entry`.
void fiber_entered();

}  // namespace lx::emu
