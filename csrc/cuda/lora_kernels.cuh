// Host code shared by the LoRA launchers: it chooses kernels and declares buffers to the emulator.
#pragma once

#include <bit>
#include <span>

#include "launch.cuh"
#include "lora_tile.cuh"

namespace lora_ext {

constexpr int kMaxGridY = 65535;

// One module of a launch. `v` describes the memory that shrink writes and expand reads.
struct Module {
    LoraArgs args;
    Partials v;
};
// Argument of a kernel: one module, or up to kMaxSiblings modules that share the launch.
template <int kCount>
struct Modules {
    Module each[kCount];

    explicit Modules(std::span<const Module> modules) : each{} {
        for (size_t i = 0; i < modules.size(); ++i) each[i] = modules[i];
    }
};

// Launchers of shrink, reduce (the sum of the splits of v) and expand. If there are several
// modules, all must be aligned and have the same rows, at most 256.
LaunchStatus run_shrink_decode(std::span<const Module> modules, void* stream);
// Writes the sum of the splits of `v` to args.v, which may be the memory of the first split.
LaunchStatus run_reduce(const LoraArgs& args, const Partials& v, void* stream);
LaunchStatus run_expand(std::span<const Module> modules, bool dependent, void* stream);

// Rows of floats; data may be nullptr.
struct FloatRows {
    float* data;
    int64_t row_stride;
};
// Sums the splits of `v`. Writes inverse_keep * scale * sum to `scaled`, and the row's weight times
// this product to `weighed`. An output whose data is nullptr is not written. Either output may be
// the memory of the first split.
LaunchStatus run_weigh(const LoraArgs& args, const Partials& v, float inverse_keep,
                       FloatRows scaled, FloatRows weighed, bool dependent, void* stream);

// The same stages for large ranks, as grouped products of lora_gemm.cuh. The caller must have
// declared the buffers to the emulator.
constexpr int kGemmColumns = 128;  // columns per block
LaunchStatus run_gemm_shrink(const LoraArgs& args, const Partials& v, void* stream);
// inverse_keep: 1, in training 1 / (1 - p). Rows of v must be aligned and padded to whole pages.
LaunchStatus run_gemm_reduce(const LoraArgs& args, const Partials& v, float inverse_keep,
                             bool dependent, void* stream);
LaunchStatus run_gemm_expand(const LoraArgs& args, const Partials& v, bool dependent, void* stream);

inline bool large_rank(const LoraBank& bank) {
    return bank.max_rank > kFusedRank;
}

inline Tiling tiling(const LoraPlanLayout& layout, int rows) {
    const int per_chunk = lx::max(1, layout.chunk_rows() / rows);
    return {per_chunk, std::countr_zero(static_cast<unsigned>(per_chunk)), layout.perm()};
}
inline Tiling tiling(const LoraArgs& args, int rows) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    return args.plan ? tiling(layout, rows) : Tiling{1, 0, layout.perm()};
}
// Returns the maximum number of tiles of `rows` rows in a plan. The grid has a block for each tile.
inline unsigned num_tiles(const LoraArgs& args, int rows) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    return static_cast<unsigned>(layout.max_chunks() * tiling(args, rows).per_chunk);
}

// Returns the size of an element of a page, in bytes.
inline int64_t page_size(const LoraArgs& args) {
    return args.bank.float8 ? 1 : element_size(args.dtype);
}

// Returns whether all strides in bytes fit in 32 bits. Addresses then take fewer instructions.
inline bool narrow(std::initializer_list<int64_t> strides, int64_t size) {
    bool all = true;
    for (int64_t stride : strides) all = all && stride <= INT32_MAX / size;
    return all;
}

// Returns whether shrink may read x and a in 16-byte loads. The length of a row must be a multiple
// of 16 bytes too, so that no load crosses the end of the row.
inline bool shrink_aligned(const LoraArgs& args) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype), of_page = page_size(args);
    return aligned_16(args.x, {args.x_row_stride, bank.in_features}, size) &&
           aligned_16(bank.a, {bank.a_slot_stride, bank.a_page_stride}, of_page) &&
           bank.a_row_stride * size % 16 == 0 && narrow({args.x_row_stride}, size) &&
           narrow({bank.a_slot_stride, bank.a_page_stride, bank.a_row_stride}, of_page);
}

// Returns whether expand may access y in pieces of eight outputs, and b in whole, existing page
// rows.
inline bool expand_aligned(const LoraArgs& args) {
    const LoraBank& bank = args.bank;
    const int64_t size = element_size(args.dtype), of_page = page_size(args);
    return bank.full_pages && bank.out_features % 8 == 0 &&
           aligned_16(args.y, {args.y_row_stride}, size) &&
           aligned_16(bank.b, {bank.b_slot_stride, bank.b_page_stride}, of_page) &&
           bank.b_row_stride * size % 16 == 0 && narrow({args.y_row_stride}, size) &&
           narrow({bank.b_slot_stride, bank.b_page_stride, bank.b_row_stride}, of_page);
}

// Order in which shrink sums over the in-features of a row, for ranks up to 256. The in-features
// are divided into `count` slices of `width`, and each slice into four segments. The sums of the
// slices are added in order. The order depends only on the number of in-features, so that a row's v
// has the same bits in any batch, in serving and in training. Slices have 512 in-features, or more
// if there would be more than kMaxSplits slices, so that few rows also fill the machine. A segment
// is a whole number of stages of lora_shrink.cu and of steps of lora_shrink_decode.cu.
constexpr int kSliceSegments = 4;
struct SumOrder {
    int count, width;
};
inline SumOrder sum_order(int64_t in_features) {
    const int64_t about =
        lx::max<int64_t>(1, lx::min<int64_t>(kMaxSplits, ceil_div(in_features, 512)));
    const int64_t width = lx::max<int64_t>(ceil_div(ceil_div(in_features, about), 256), 1) * 256;
    return {static_cast<int>(lx::max<int64_t>(1, ceil_div(in_features, width))),
            static_cast<int>(width)};
}

template <class F>
int64_t largest(std::span<const Module> modules, F&& f) {
    int64_t found = 0;
    for (const Module& module : modules) found = lx::max<int64_t>(found, f(module.args.bank));
    return found;
}

// Declares to the emulator the data that find_tile and the page functions read. On a GPU this does
// nothing. The declared ranges are, page by page, exactly the rows and ranks that an adapter owns.
// `access` must be kRead in a dependent launch that may follow a writer of these buffers.
void declare_common(const LoraArgs& args, lx::Access access = lx::Access::kConstant);
void declare_a(const LoraArgs& args, lx::Access access = lx::Access::kConstant);
void declare_b(const LoraArgs& args);
void declare_v(const LoraArgs& args, const Partials& v, lx::Access access);

}  // namespace lora_ext
