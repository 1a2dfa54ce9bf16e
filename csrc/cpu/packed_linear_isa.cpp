// Products of few rows on the CPU, compiled once per instruction set.
//
// A panel of W streams through the L1 cache in chunks of 8 KiB, and every tile of rows x columns
// uses a chunk before the next one: W is read from memory once for any number of rows. Each tile
// prefetches its share of the next chunk, so that memory is never idle. When the first tiles
// prefetched the whole chunk instead, memory and arithmetic worked in turn, and 16 rows took 1.5
// times as long (Xeon with AMX). Without prefetches they took 1.3 times as long (Zen 5, W in the L3
// cache).
//
// Processors with AMX multiply bfloat16 in tiles of 16 steps x 16 outputs, which have the same
// layout as a panel. Arithmetic is then faster than memory for any number of rows.
#include "lora_ext/packed_linear.h"

#include <atomic>

#include "parts.h"
#include "tile_config.h"
#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = LX_VEC_BYTES == 64 ? 8 : 6;  // two vectors of sums per row in registers
constexpr int64_t kTileColumns = 2 * kF;
constexpr int64_t kHalves = kPanel / kTileColumns;  // adjacent tiles of a panel
constexpr int64_t kChunk = 64;                      // steps of a panel that stay in L1
constexpr int64_t kStepBytes = kPanel * 4;          // two cache lines
constexpr int64_t kAhead = 4096;                    // prefetch distance in bytes, for one pass
constexpr int64_t kRows = 32;                       // rows per pass over W

using Word = VecN<uint32_t, kF>;

// Return the bits of the in-features of one step: one float32 or two bfloat16.
LX_INLINE uint32_t step_of(const float* x) {
    return load_bits<uint32_t>(x);
}
LX_INLINE uint32_t step_of(const BFloat* x) {
    return load_bits<uint32_t>(x);
}

// Return sum + w x, lane by lane.
template <typename T>
LX_INLINE Vec<float> add_step(Word w, uint32_t x, Vec<float> sum) {
    if constexpr (sizeof(T) == 4) {
        return fma(bit_cast<Vec<float>>(w), broadcast<T>(bit_cast<float>(x)), sum);
    } else if constexpr (kPairs<T>) {
        return dot_pairs(bit_cast<Pairs>(w), bit_cast<Pairs>(x - Word{}), sum);
    } else {
        constexpr uint32_t kHigh = 0xffff0000u;
        sum = fma(bit_cast<Vec<float>>(w << 16), broadcast<T>(bit_cast<float>(x << 16)), sum);
        return fma(bit_cast<Vec<float>>(w & kHigh), broadcast<T>(bit_cast<float>(x & kHigh)), sum);
    }
}

// Prefetches of a tile: `lines` per step, from byte `first` on, `stride` bytes further each step.
template <int kLines>
struct Fetch {
    static constexpr int lines = kLines;
    int64_t first, stride;
};

// sums (rows x kPanel) += x W for `steps` steps of a tile. `last`, if not null, is one more step
// with a single in-feature per row.
template <typename T, int kCount, typename Ahead>
LX_INLINE void add_tile(const char* w, const T* x, int64_t x_stride, int64_t steps,
                        const uint32_t* last, Ahead ahead, float* sums) {
    constexpr int64_t kFeatures = 4 / sizeof(T);
    Vec<float> sum[kCount][2];
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < 2; ++j) sum[i][j] = load(sums + i * kPanel + j * kF);
    const char* fetch = w + ahead.first;
    const auto step = [&](auto&& x_of) {
        for (int line = 0; line < Ahead::lines; ++line) __builtin_prefetch(fetch + 64 * line);
        fetch += ahead.stride;
        const Word w0 = load_bits<Word>(w), w1 = load_bits<Word>(w + LX_VEC_BYTES);
        for (int i = 0; i < kCount; ++i) {
            const uint32_t one = x_of(i);
            sum[i][0] = add_step<T>(w0, one, sum[i][0]);
            sum[i][1] = add_step<T>(w1, one, sum[i][1]);
        }
    };
    for (int64_t k = 0; k < steps; ++k, w += kStepBytes, x += kFeatures)
        step([&](int i) { return step_of(x + i * x_stride); });
    if (last) step([&](int i) { return last[i]; });
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < 2; ++j) store(sums + i * kPanel + j * kF, sum[i][j]);
}

// sums += x W for all rows and all columns of a panel.
template <typename T>
void add_panel(const char* panel, const T* x, int64_t x_stride, int64_t rows, int64_t in_features,
               float* sums) {
    constexpr int64_t kFeatures = 4 / sizeof(T);
    const int64_t whole = in_features / kFeatures, tiles = blocks_of(rows, kTileRows);
    const bool part = in_features % kFeatures != 0;
    uint32_t last[kRows];
    if (part)
        for (int64_t i = 0; i < rows; ++i)
            last[i] = load_bits<uint16_t>(x + i * x_stride + in_features - 1);
    const int64_t passes = kHalves * tiles, chunk = passes == 1 ? whole + part : kChunk;
    for (int64_t k = 0; k < whole + part; k += chunk) {
        const int64_t steps = min(chunk, whole - k);
        const bool ends = part && k + chunk > whole;
        int64_t pass = 0;
        for (int64_t half = 0; half < kHalves; ++half) {
            const int64_t column = half * kTileColumns;
            for (int64_t row = 0, left = tiles, n; row < rows; row += n, ++pass) {
                n = blocks_of(rows - row, left--);
                const char* w = panel + k * kStepBytes + column * 4;
                with_constant<kTileRows>(n, [&](auto count) {
                    const auto run = [&](auto ahead) {
                        add_tile<T, count.value>(w, x + row * x_stride + k * kFeatures, x_stride,
                                                 steps, ends ? last + row : nullptr, ahead,
                                                 sums + row * kPanel + column);
                    };
                    const int64_t bytes = kChunk * kStepBytes;
                    if (passes == 1)
                        run(Fetch<2>{kAhead, kStepBytes});
                    else
                        run(Fetch<1>{bytes + bytes * pass / passes - column * 4,
                                     kStepBytes / passes});
                });
            }
        }
    }
}

// sums (rows x kPanel) = bias, for one panel that begins at output o.
template <typename T>
LX_INLINE void begin_sums(const PackedLinearArgs& args, int64_t o, int64_t rows, float* sums) {
    const T* bias = static_cast<const T*>(args.bias);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < kPanel; c += kF) {
            const int64_t n = min(kF, args.out_features - o - c);
            store(sums + i * kPanel + c, bias && n > 0 ? load_part(bias + o + c, n) : Vec<float>{});
        }
}
template <typename T>
LX_INLINE void end_sums(const PackedLinearArgs& args, int64_t o, int64_t row, int64_t rows,
                        const float* sums) {
    T* y = static_cast<T*>(args.y) + row * args.out_features + o;
    for (int64_t i = 0; i < rows; ++i)
        store_rounded(y + i * args.out_features, sums + i * kPanel,
                      min(kPanel, args.out_features - o));
}

template <typename T>
void multiply(const PackedLinearArgs& args, int64_t begin, int64_t end) {
    const int64_t panel_bytes = panel_steps(args) * kStepBytes;
    alignas(64) float sums[kRows * kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const char* panel = static_cast<const char*>(args.packed) + p * panel_bytes;
        const int64_t o = p * kPanel;
        for (int64_t row = 0; row < args.rows; row += kRows) {
            const int64_t rows = min(kRows, args.rows - row);
            begin_sums<T>(args, o, rows, sums);
            add_panel(panel, static_cast<const T*>(args.x) + row * args.x_stride, args.x_stride,
                      rows, args.in_features, sums);
            end_sums<T>(args, o, row, rows, sums);
        }
    }
}

#if defined(__AMX_BF16__)
// Tile registers: 0 and 1 have rows x 32 in-features of x, 2 and 3 the two halves of 16 steps of a
// panel, 4 to 7 sums of rows x 16 outputs.
constexpr int64_t kTileSteps = 16;

// Adds the products of 16 steps of a panel, at w, with 32 in-features of each row, at x, to the
// sums in tile registers 4 to 7.
template <bool kTwo>
LX_INLINE void add_tiles(const char* w, const BFloat* x, int64_t x_stride) {
    _tile_loadd(2, w, kStepBytes);
    _tile_loadd(3, w + kTileRow, kStepBytes);
    _tile_loadd(0, x, x_stride * 2);
    _tile_dpbf16ps(4, 0, 2);
    _tile_dpbf16ps(5, 0, 3);
    if constexpr (kTwo) {
        _tile_loadd(1, x + 16 * x_stride, x_stride * 2);
        _tile_dpbf16ps(6, 1, 2);
        _tile_dpbf16ps(7, 1, 3);
    }
}

// Multiplies at most 32 rows, from `row` on, by the panels [begin, end).
template <bool kTwo>
void multiply_tiles(const PackedLinearArgs& args, int64_t row, int64_t rows, int64_t begin,
                    int64_t end) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        const bool second = tile == 1 || tile > 5;
        const int64_t height = second ? rows - 16 : min(rows, 16);
        config.set(tile, tile == 2 || tile == 3 ? kTileSteps : height > 0 ? height : 1);
    }
    _tile_loadconfig(&config);
    const BFloat* x = static_cast<const BFloat*>(args.x) + row * args.x_stride;
    constexpr int64_t kFeatures = 2 * kTileSteps, kBytes = kTileSteps * kStepBytes;
    const int64_t steps = panel_steps(args), tiles = args.in_features / kFeatures;
    const int64_t done = tiles * kFeatures, left = args.in_features - done;
    // The in-features beyond the last whole tile, with zeros after them.
    alignas(64) BFloat last_x[kRows * kFeatures] = {};
    alignas(64) char last_w[kBytes] = {};
    for (int64_t i = 0; left > 0 && i < rows; ++i)
        __builtin_memcpy(last_x + i * kFeatures, x + i * args.x_stride + done,
                         static_cast<size_t>(left) * 2);
    alignas(64) float sums[kRows * kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const char* panel = static_cast<const char*>(args.packed) + p * steps * kStepBytes;
        begin_sums<BFloat>(args, p * kPanel, rows, sums);
        if (left > 0)  // before tile registers hold sums, which a function call may overwrite
            __builtin_memcpy(last_w, panel + tiles * kBytes,
                             static_cast<size_t>((steps - tiles * kTileSteps) * kStepBytes));
        // GCC does not know that tile loads read memory, and would remove the stores above.
        std::atomic_signal_fence(std::memory_order_seq_cst);
        _tile_loadd(4, sums, kPanel * 4);
        _tile_loadd(5, sums + 16, kPanel * 4);
        if constexpr (kTwo) {
            _tile_loadd(6, sums + 16 * kPanel, kPanel * 4);
            _tile_loadd(7, sums + 16 * kPanel + 16, kPanel * 4);
        }
        for (int64_t t = 0; t < tiles; ++t) {
            for (int64_t line = 0; line < kBytes; line += 64)
                __builtin_prefetch(panel + t * kBytes + kAhead + line);
            add_tiles<kTwo>(panel + t * kBytes, x + t * kFeatures, args.x_stride);
        }
        if (left > 0) add_tiles<kTwo>(last_w, last_x, kFeatures);
        _tile_stored(4, sums, kPanel * 4);
        _tile_stored(5, sums + 16, kPanel * 4);
        if constexpr (kTwo) {
            _tile_stored(6, sums + 16 * kPanel, kPanel * 4);
            _tile_stored(7, sums + 16 * kPanel + 16, kPanel * 4);
        }
        end_sums<BFloat>(args, p * kPanel, row, rows, sums);
    }
    _tile_release();
}

template <>
void multiply<BFloat>(const PackedLinearArgs& args, int64_t begin, int64_t end) {
    // All rows use about 1 MiB of panels while these are in L2.
    const int64_t bytes = panel_steps(args) * kStepBytes;
    const int64_t together = args.rows > kRows ? 1 + (1 << 20) / (bytes + 1) : end - begin;
    for (int64_t p = begin; p < end; p += together) {
        const int64_t last = min(end, p + together);
        for (int64_t row = 0; row < args.rows; row += kRows) {
            const int64_t rows = min(kRows, args.rows - row);
            rows > 16 ? multiply_tiles<true>(args, row, rows, p, last)
                      : multiply_tiles<false>(args, row, rows, p, last);
        }
    }
}
#endif

template <typename T>
void lay_out(const PackedLinearArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t kFeatures = 4 / sizeof(T), kBlock = 64;  // kBlock: steps in L1
    const int64_t steps = panel_steps(args);
    for (int64_t p = begin; p < end; ++p) {
        T* panel = static_cast<T*>(args.packed) + p * steps * kPanel * kFeatures;
        for (int64_t k = 0; k < steps; k += kBlock)
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t o = p * kPanel + c;
                const T* w = static_cast<const T*>(args.weight) + o * args.weight_stride;
                T* to = panel + (k * kPanel + c) * kFeatures;
                const int64_t first = k * kFeatures, count = min(kBlock, steps - k) * kFeatures;
                for (int64_t i = 0; i < count; ++i) {
                    const bool inside = o < args.out_features && first + i < args.in_features;
                    to[i / kFeatures * kPanel * kFeatures + i % kFeatures] =
                        inside ? w[first + i] : T{};
                }
            }
    }
}

void pack(const PackedLinearArgs& args, int64_t begin, int64_t end) {
    args.dtype == DType::kFloat32 ? lay_out<float>(args, begin, end)
                                  : lay_out<BFloat>(args, begin, end);
}
void product(const PackedLinearArgs& args, int64_t begin, int64_t end) {
    args.dtype == DType::kFloat32 ? multiply<float>(args, begin, end)
                                  : multiply<BFloat>(args, begin, end);
}

}  // namespace

extern const PackedLinearCpu packed_linear_table;
const PackedLinearCpu packed_linear_table = {pack, product};

}  // namespace lora_ext::LX_ISA
