// Host side shared by the LoRA launchers: which kernel runs where, and what it may touch.
#pragma once

#include <initializer_list>

#include "lora_tile.cuh"

namespace lora_ext {

constexpr LaunchStatus kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int kMaxGridY = 65535;

// The stages. `v` says where the products go and where they are taken from.
LaunchStatus run_shrink_decode(const LoraArgs& args, const Partials& v, void* stream);
LaunchStatus run_shrink_prefill(const LoraArgs& args, const Partials& v, void* stream);
LaunchStatus run_reduce(const LoraArgs& args, const Partials& v, void* stream);
LaunchStatus run_expand(const LoraArgs& args, const Partials& v, bool dependent, void* stream);

inline Tiling tiling(const LoraArgs& args, int rows) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    return {args.plan ? layout.chunk_rows() / rows : 1, layout.perm()};
}
// Blocks that cover every chunk there can be, in tiles of `rows` rows.
inline unsigned num_tiles(const LoraArgs& args, int rows) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    return static_cast<unsigned>(layout.max_chunks() * tiling(args, rows).per_chunk);
}

inline int64_t element_size(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}
inline bool aligned_16(const void* p, std::initializer_list<int64_t> strides, int64_t size) {
    bool aligned = reinterpret_cast<uintptr_t>(p) % 16 == 0;
    for (int64_t stride : strides) aligned = aligned && stride * size % 16 == 0;
    return aligned;
}

// Whether shrink may read x and a in 16-byte loads. A row must also end on 16 bytes, so that no
// load crosses its end.
inline bool shrink_aligned(const LoraArgs& args) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype);
    return aligned_16(args.x, {args.x_row_stride, bank.in_features}, size) &&
           aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, size);
}

// f.template operator()<T>() for the C++ type of `dtype`.
template <class F>
LaunchStatus with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f.template operator()<float>();
        case DType::kFloat16:
            return f.template operator()<lx::f16>();
        case DType::kBFloat16:
            return f.template operator()<lx::bf16>();
        default:
            return kInvalidValue;
    }
}

// What find_tile and the page functions read. On a GPU this is nothing; in the emulator it
// declares, page by page, exactly the rows and ranks that an adapter owns.
void declare_common(const LoraArgs& args);
void declare_a(const LoraArgs& args);
void declare_b(const LoraArgs& args);
void declare_v(const LoraArgs& args, const Partials& v, lx::Access access);

}  // namespace lora_ext
