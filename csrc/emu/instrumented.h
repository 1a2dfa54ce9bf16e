// Included first in the check flavour. -fsanitize=thread does not report copies and fills that the
// compiler turns into calls. The assembler names below redirect these calls to hooks.cpp.
#pragma once

#include <stddef.h>

extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("lx_emu_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("lx_emu_memmove");
void* memset(void*, int, size_t) noexcept __asm__("lx_emu_memset");
}
