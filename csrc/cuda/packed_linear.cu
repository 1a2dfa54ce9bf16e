// Products of up to 64 rows with packed weights of 8 and 4 bits; packed_bits.h has the layout and
// the order of the sums.
//
// A warp processes a slice: a panel of 32 outputs and every 16th chunk of 32 in-features. A block
// has 16 warps. If the block has up to 16 rows, its warps process the 16 slices of one panel. If it
// has up to 32 rows (16-bit x, without minima), they process four panels, and of each panel four
// slices (a part) at a time, and read the same rows of x from L1. A lane copies its bytes of codes
// to its own ring in shared memory, without barriers, so that the copies of many chunks are in
// flight.
//
// packed_chunk.cuh multiplies a chunk. Bound: bytes of the weight, read once from memory. With more
// rows, adjacent blocks share a panel, and all but one find it in L2.
#include "lora_ext/packed_bits.h"

#include "launch.cuh"
#include "packed_chunk.cuh"

namespace lora_ext {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * lx::kWarpSize;
constexpr int kChunk = 32;  // in-features
constexpr int kParts = 4, kSlices = 4, kAllSlices = kParts * kSlices;
constexpr int kTileRows = 8;  // rows of x in a product
constexpr int kOutputs = static_cast<int>(kPanel);
constexpr int64_t kMaxPanels = 65535;  // in one launch
// Distance between rows of sums in shared memory, in floats. Eight lanes that store 16 bytes use
// all banks.
constexpr int kSumStride = kOutputs + 4;

// Number of panels of a block that has kTiles tiles of rows (1, 2 or 4).
template <int kTiles>
constexpr int kPanels = kTiles > 2 ? 4 : 1;

// Sizes of a stage of the ring, which contains codes, scales and, if kMinimum, minima.
template <int kBits, bool kMinimum>
struct Stage {
    static constexpr int kWords = kBits / 4;  // 16-byte words
    static constexpr int kScales = kMinimum ? 2 : 1;
    static constexpr int kBytes = kThreads * (16 * kWords + 8 * kScales);
    static constexpr int kCount = kBits == 8 ? 4 : 6;
    static constexpr int kRing = kCount * kBytes;
};

// Layout of the weight and division of the work, the same for all blocks.
struct Layout {
    int64_t panel_bytes;
    int64_t stride;  // bytes between chunks of a slice
    int block_bytes, code_bytes;
    int chunks, shift;  // chunks of a row; log2 of the chunks of a group
    int panels, parts;  // parts: how many a block computes, 1 or 4
    int row_bytes;      // bytes between rows of x
};

// ------------------------------------------------------------------------------------------------
// A slice

// Returns four adjacent float16 as floats.
LX_DEVICE void load_halves(const unsigned char* p, float (&v)[4]) {
    const uint2 four = *reinterpret_cast<const uint2*>(p);
    const float2 low = lx::unpack_floats<lx::f16>(four.x);
    const float2 high = lx::unpack_floats<lx::f16>(four.y);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

// Adds the products of the slice's chunks, for the panel and all rows, to `total`.
template <class T, int kBits, bool kMinimum, int kTiles>
LX_DEVICE void multiply(const PackedBitsArgs& args, const Layout& layout, unsigned char* ring,
                        int panel, int slice, int first_row, float (&total)[kTiles][2][4]) {
    using Step = Stage<kBits, kMinimum>;
    constexpr int kCount = Step::kCount;
    // Only with two tiles are there enough registers to load the rows of the next chunk ahead (a
    // block of one tile shares the multiprocessor). Otherwise the rows of a chunk are loaded before
    // its codes are read.
    constexpr bool kAhead = kTiles == 2;
    const int lane = lx::lane_id(), g = lane / 4, t = lane % 4, thread = lx::thread_rank();
    const int steps = (layout.chunks - slice + kAllSlices - 1) / kAllSlices;
    const uint8_t* const block =
        args.packed + panel * layout.panel_bytes + (slice >> layout.shift) * layout.block_bytes;
    const int of_lane = (slice & ((1 << layout.shift) - 1)) * (kOutputs * kChunk * kBits / 8) +
                        t * (Step::kWords * 4 * kOutputs) + g * 16;
    const int to_scales = layout.code_bytes + g * 8 - of_lane;
    const T* x_at = static_cast<const T*>(args.input) + slice * kChunk + 8 * t;  // loaded next
    int row_at[kTiles];  // offsets in bytes; a missing row has that of the last row
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        row_at[tile] = lx::min(first_row + tile * kTileRows + g, static_cast<int>(args.rows) - 1) *
                       layout.row_bytes;
    // A stage contains words of all threads, then scales of all threads.
    unsigned char* const first_stage = ring + thread * 16;
    const int to_scales_of_stage = kThreads * 16 * Step::kWords - thread * 8;

    const uint8_t* from = block + of_lane;  // the chunk to copy next
    const auto copy = [&](unsigned char* stage) {
#pragma unroll
        for (int i = 0; i < Step::kWords; ++i)
            lx::cp_async<16>(stage + i * kThreads * 16, from + i * 4 * kOutputs);
#pragma unroll
        for (int i = 0; i < Step::kScales; ++i)
            lx::cp_async<8>(stage + to_scales_of_stage + i * kThreads * 8,
                            from + to_scales + i * 2 * kOutputs);
        from += layout.stride;
    };
#pragma unroll
    for (int step = 0; step < kCount - 1; ++step) {
        if (step < steps) copy(first_stage + step * Step::kBytes);
        lx::cp_async_commit();
    }
    const auto load_next = [&](uint4(&words)[kTiles][kPieces<T>]) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < kPieces<T>; ++i)
                words[tile][i] = lx::load_nc(
                    reinterpret_cast<const uint4*>(lx::element(x_at, row_at[tile], 1)) + i);
        x_at += kAllSlices * kChunk;
    };
    uint4 next[kTiles][kPieces<T>] = {};
    if (kAhead && steps > 0) load_next(next);
    constexpr int kLast = (kCount - 1) * Step::kBytes;
    unsigned char *stage = first_stage, *read = first_stage + kLast;  // read: in the previous step
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        uint4 x[kTiles][kPieces<T>];
        if constexpr (kAhead) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int i = 0; i < kPieces<T>; ++i) x[tile][i] = next[tile][i];
            if (step + 1 < steps) load_next(next);
        } else {
            load_next(x);
        }
        lx::cp_async_wait_group<kCount - 2>();  // a lane reads only what it has copied itself
        uint4 words[Step::kWords];
#pragma unroll
        for (int i = 0; i < Step::kWords; ++i)
            words[i] = *reinterpret_cast<const uint4*>(stage + i * kThreads * 16);
        float scale[4], centre[4] = {};
        load_halves(stage + to_scales_of_stage, scale);
        if constexpr (kMinimum) {
            load_halves(stage + to_scales_of_stage + kThreads * 8, centre);
#pragma unroll
            for (int i = 0; i < 4; ++i) centre[i] += 8 * scale[i];
        }
        if (step + kCount - 1 < steps) copy(read);
        lx::cp_async_commit();
        read = stage;
        stage = stage == first_stage + kLast ? first_stage : stage + Step::kBytes;
        Rows<T> b[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) row_operand<T, kBits>(x[tile], b[tile]);
        add_chunk<T, kBits, kMinimum, kTiles>(words, b, scale, centre, total);
    }
}

// ------------------------------------------------------------------------------------------------
// Sums of the slices

// Returns the bias of four adjacent outputs, the first of which exists, or zeros without a bias.
template <class T>
LX_DEVICE float4 bias_of(const PackedBitsArgs& args, int64_t output) {
    float v[4] = {};
    if (args.bias) {
        const T* const bias = static_cast<const T*>(args.bias) + output;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = lx::to_float(lx::load_nc(output + i < args.out_features ? bias + i : bias));
    }
    return {v[0], v[1], v[2], v[3]};
}
template <class T>
LX_DEVICE void store_result(const PackedBitsArgs& args, int64_t row, int64_t output, float4 v) {
    T* const y = static_cast<T*>(args.y) + row * args.out_features + output;
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (output + i < args.out_features) y[i] = lx::from_float<T>(values[i]);
}
LX_DEVICE float4 operator+(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
// Returns the address of a sum in the workspace, whose rows are padded to whole panels.
LX_DEVICE float4* part_at(const PackedBitsArgs& args, int panels, int part, int64_t row,
                          int64_t output) {
    const int64_t width = int64_t{panels} * kOutputs;
    return reinterpret_cast<float4*>(args.parts + (part * args.rows + row) * width + output);
}

template <class T, int kBits, bool kMinimum, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 && sizeof(T) == 2 && !kMinimum ? 2 : 1)
    packed_linear_kernel(const __grid_constant__ PackedBitsArgs args,
                         const __grid_constant__ Layout layout) {
    LX_DYN_SHARED(shared);
    constexpr int kHere = kPanels<kTiles>, kRows = kTiles * kTileRows;
    constexpr int kOfPanel = kWarps / kHere;     // slices at once: 16 or 4
    constexpr int kAtOnce = kOfPanel / kSlices;  // parts at once
    const int warp = lx::warp_id(), lane = lx::lane_id(), g = lane / 4, t = lane % 4;
    const int first_row = static_cast<int>(blockIdx.x) * kRows;
    const int first_panel = static_cast<int>(blockIdx.y) * kHere;
    // A warp whose panel does not exist computes the last panel again, and its sums are not used.
    const int panel = lx::min(first_panel + warp / kOfPanel, layout.panels - 1);
    const int first_part = static_cast<int>(blockIdx.z) * layout.parts;
    float* const sums = reinterpret_cast<float*>(shared);  // reuses the ring's memory
    // Sums of the parts so far. No two threads access the same element.
    float4* const results = reinterpret_cast<float4*>(shared + Stage<kBits, kMinimum>::kRing);
    if (layout.parts == 1) lx::grid_dependency_launch();  // the next launch sums the parts

#pragma unroll 1
    for (int part = first_part; part < first_part + layout.parts; part += kAtOnce) {
        float total[kTiles][2][4] = {};
        multiply<T, kBits, kMinimum, kTiles>(args, layout, shared, panel,
                                             part * kSlices + warp % kOfPanel, first_row, total);
        lx::syncthreads();  // the ring has been read
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                *reinterpret_cast<float4*>(
                    sums + (warp * kRows + tile * kTileRows + 2 * t + i) * kSumStride + 4 * g) = {
                    total[tile][0][i], total[tile][0][2 + i], total[tile][1][i],
                    total[tile][1][2 + i]};
        lx::syncthreads();  // sums are complete
#pragma unroll 1
        for (int at = lx::thread_rank(); at < kHere * kRows * kOutputs / 4; at += kThreads) {
            const int column = at % (kOutputs / 4) * 4, row = at / (kOutputs / 4) % kRows;
            const int of_panel = at / (kOutputs / 4) / kRows;
            const int64_t output = int64_t{first_panel + of_panel} * kOutputs + column;
            const int64_t row_of_x = first_row + row;
            if (output >= args.out_features || row_of_x >= args.rows) continue;
            const float* const own =
                sums + (of_panel * kOfPanel * kRows + row) * kSumStride + column;
            const auto of_slice = [&](int s) {
                return *reinterpret_cast<const float4*>(own + s * kRows * kSumStride);
            };
            float4 sum{};
            if (layout.parts > 1) sum = part == 0 ? bias_of<T>(args, output) : results[at];
#pragma unroll
            for (int q = 0; q < kAtOnce; ++q) {
                float4 of_part = of_slice(q * kSlices);
#pragma unroll
                for (int s = 1; s < kSlices; ++s) of_part = of_part + of_slice(q * kSlices + s);
                sum = layout.parts > 1 ? sum + of_part : of_part;
            }
            if (kAtOnce == 1 && layout.parts == 1)
                *part_at(args, layout.panels, part, row_of_x, output) = sum;
            else if (part + kAtOnce == kParts)
                store_result<T>(args, row_of_x, output, sum);
            else
                results[at] = sum;
        }
        lx::syncthreads();  // sums have been read
    }
}

// The kernel computes y = bias + the four parts, added in order.
constexpr int kSumThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    packed_linear_sum_kernel(const __grid_constant__ PackedBitsArgs args, int panels) {
    const int64_t row = blockIdx.y;
    const int64_t output = 4 * (int64_t{blockIdx.x} * kSumThreads + lx::thread_rank());
    const bool exists = output < args.out_features;
    float4 sum = bias_of<T>(args, exists ? output : 0);
    lx::grid_dependency_wait();
    if (!exists) return;
    float4 part[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) part[i] = *part_at(args, panels, i, row, output);
#pragma unroll
    for (int i = 0; i < kParts; ++i) sum = sum + part[i];
    store_result<T>(args, row, output, sum);
}

// ------------------------------------------------------------------------------------------------
// Host side

// Returns the number of row tiles of a block: 1, 2 or 4. Four tiles would need too many registers
// for the three parts of a float32 x, or with minima.
int64_t tiles_of(const PackedBitsArgs& args) {
    const int64_t tiles = ceil_div(args.rows, kTileRows);
    return tiles <= 2 ? tiles : args.dtype == DType::kFloat32 || args.minimum ? 2 : 4;
}
int64_t blocks_of_rows(const PackedBitsArgs& args) {
    return ceil_div(args.rows, tiles_of(args) * kTileRows);
}
// Returns whether the parts of a panel are computed by different blocks and added by another
// launch. The parts are split if there would otherwise be too few blocks to fill the machine. The
// result has the same bits in both cases.
bool splits_parts(const PackedBitsArgs& args) {
    if (args.rows == 0 || tiles_of(args) < 4) return false;
    const int64_t panels = ceil_div(args.out_features, kPanel);
    return 4 * blocks_of_rows(args) * ceil_div(panels, kPanels<4>) < 3 * lx::multiprocessors();
}

template <class T, int kBits, bool kMinimum, int kTiles>
LaunchStatus run(const PackedBitsArgs& args, const Layout& layout, void* stream) {
    using Step = Stage<kBits, kMinimum>;
    static_assert(Step::kRing >= kWarps * kTiles * kTileRows * kSumStride * 4);
    constexpr int kResults = kTiles == 4 ? kTiles * kPanels<4> * kTileRows * kOutputs * 4 : 0;
    // Blocks that share panels are adjacent, so that all but one find the codes in L2.
    const dim3 grid(static_cast<unsigned>(blocks_of_rows(args)),
                    static_cast<unsigned>(ceil_div(layout.panels, kPanels<kTiles>)),
                    static_cast<unsigned>(kParts / layout.parts));
    return LX_LAUNCH((packed_linear_kernel<T, kBits, kMinimum, kTiles>), grid, kThreads,
                     Step::kRing + kResults, stream, args, layout);
}

template <class T, int kBits, bool kMinimum>
LaunchStatus run_tiles(const PackedBitsArgs& args, const Layout& layout, void* stream) {
    switch (tiles_of(args)) {
        case 1:
            return run<T, kBits, kMinimum, 1>(args, layout, stream);
        case 2:
            return run<T, kBits, kMinimum, 2>(args, layout, stream);
        default:
            if constexpr (sizeof(T) == 2 && !kMinimum)
                return run<T, kBits, kMinimum, 4>(args, layout, stream);
            return kInvalidValue;
    }
}

}  // namespace

int64_t packed_linear_workspace_bytes(const PackedBitsArgs& args) {
    const int64_t width = ceil_div(args.out_features, kPanel) * kPanel;
    return splits_parts(args) ? kParts * args.rows * width * 4 : 0;
}

LaunchStatus launch_packed_linear(const PackedBitsArgs& args, void* stream) {
    if (args.rows == 0 || args.out_features == 0) return 0;
    const int64_t groups = args.in_features / args.group, block = block_bytes(args);
    const int64_t size = element_size(args.dtype), panels = ceil_div(args.out_features, kPanel);
    if (args.rows > kMostKernelRows || panels > kMaxPanels || args.in_features > INT32_MAX / 64 ||
        args.x_stride > INT32_MAX / 64 / size || !aligned_16(args.input, {args.x_stride}, size) ||
        reinterpret_cast<uintptr_t>(args.packed) % 16 != 0)
        return kInvalidValue;
    const bool split = splits_parts(args);
    Layout layout;
    layout.panel_bytes = groups * block;
    // A group has 1, 2 or 4 chunks, so 16 chunks are a whole number of blocks.
    layout.stride = kAllSlices * kChunk / args.group * block;
    layout.block_bytes = static_cast<int>(block);
    layout.code_bytes = static_cast<int>(code_bytes(args));
    layout.chunks = static_cast<int>(args.in_features / kChunk);
    layout.shift = args.group == 32 ? 0 : args.group == 64 ? 1 : 2;
    layout.panels = static_cast<int>(panels);
    layout.parts = split ? 1 : kParts;
    layout.row_bytes = static_cast<int>(args.x_stride * size);
    LX_BUF_ROWS(args.input, args.rows, args.in_features * size, args.x_stride * size,
                lx::Access::kConstant);
    LX_BUF(args.packed, panels * layout.panel_bytes, lx::Access::kConstant);
    if (args.bias) LX_BUF(args.bias, args.out_features * size, lx::Access::kConstant);
    [[maybe_unused]] const int64_t outputs = args.rows * args.out_features;
    if (split)
        LX_BUF(args.parts, packed_linear_workspace_bytes(args), lx::Access::kWrite);
    else
        LX_BUF(args.y, outputs * size, lx::Access::kWrite);
    const LaunchStatus status = with_dtype(args.dtype, [&]<class T>() {
        if (args.bits == 8) return run_tiles<T, 8, false>(args, layout, stream);
        return args.minimum ? run_tiles<T, 4, true>(args, layout, stream)
                            : run_tiles<T, 4, false>(args, layout, stream);
    });
    if (!split || status != 0) return status;
    if (args.bias) LX_BUF(args.bias, args.out_features * size, lx::Access::kConstant);
    LX_BUF(args.parts, packed_linear_workspace_bytes(args), lx::Access::kRead);
    LX_BUF(args.y, outputs * size, lx::Access::kWrite);
    const dim3 grid(static_cast<unsigned>(ceil_div(args.out_features, 4 * kSumThreads)),
                    static_cast<unsigned>(args.rows));
    return with_dtype(args.dtype, [&]<class T>() {
        if constexpr (sizeof(T) == 2)  // float32 has no split parts
            return LX_LAUNCH_PDL(packed_linear_sum_kernel<T>, grid, kSumThreads, 0, stream, args,
                                 layout.panels);
        return kInvalidValue;
    });
}

}  // namespace lora_ext
