// Configuration of AMX tile registers. Compiled per instruction set like vec.h.
#pragma once

#include "vec.h"

#if defined(__AMX_TILE__)
namespace lora_ext::LX_ISA {
namespace {

constexpr int64_t kTileRow = 64;  // bytes in a row of a tile register

// Operand of _tile_loadconfig.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // bytes per row of each tile
    uint8_t rows[16] = {};

    void set(int tile, int64_t height, int64_t width = kTileRow) {
        rows[tile] = static_cast<uint8_t>(height);
        bytes[tile] = static_cast<uint16_t>(width);
    }
};

}  // namespace
}  // namespace lora_ext::LX_ISA
#endif
