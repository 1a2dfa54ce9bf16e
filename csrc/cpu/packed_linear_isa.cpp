// Products of few rows on the CPU, compiled once per instruction set.
//
// A panel of W streams through the L1 cache in chunks of 16 KiB, and every tile of rows x columns
// uses a chunk before the next one: W is read from memory once for any number of rows. The tiles
// prefetch the next chunk, one cache line per step, so that memory is never idle. Without prefetch
// 16 rows took 1.3 times as long (Zen 5, W in the L3 cache).
#include "lora_ext/packed_linear.h"

#include "parts.h"
#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = LX_VEC_BYTES == 64 ? 8 : 6;  // x 2 vectors of sums, in registers
constexpr int64_t kTileColumns = 2 * kF;
constexpr int64_t kHalves = kPanel / kTileColumns;  // adjacent tiles of a panel
constexpr int64_t kChunk = 128;                     // steps of a panel that stay in L1
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

// Prefetches of a tile: `lines` per step, from byte `first` on.
template <int kLines>
struct Fetch {
    static constexpr int lines = kLines;
    int64_t first;
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
    const auto step = [&](auto&& x_of) {
        for (int line = 0; line < Ahead::lines; ++line)
            __builtin_prefetch(w + ahead.first + 64 * line);
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
                    if (passes == 1)
                        run(Fetch<2>{kAhead});
                    else if (pass < 2)
                        run(Fetch<1>{kChunk * kStepBytes + 64 * pass - column * 4});
                    else
                        run(Fetch<0>{});
                });
            }
        }
    }
}

template <typename T>
void multiply(const PackedLinearArgs& args, int64_t begin, int64_t end) {
    const int64_t panel_bytes = panel_steps(args) * kStepBytes;
    const T* bias = static_cast<const T*>(args.bias);
    alignas(64) float sums[kRows * kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const char* panel = static_cast<const char*>(args.packed) + p * panel_bytes;
        const int64_t o = p * kPanel, width = min(kPanel, args.out_features - o);
        for (int64_t row = 0; row < args.rows; row += kRows) {
            const int64_t rows = min(kRows, args.rows - row);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < kPanel; c += kF) {
                    const int64_t n = min(kF, width - c);
                    store(sums + i * kPanel + c,
                          bias && n > 0 ? load_part(bias + o + c, n) : Vec<float>{});
                }
            add_panel(panel, static_cast<const T*>(args.x) + row * args.x_stride, args.x_stride,
                      rows, args.in_features, sums);
            T* y = static_cast<T*>(args.y) + row * args.out_features + o;
            for (int64_t i = 0; i < rows; ++i)
                store_rounded(y + i * args.out_features, sums + i * kPanel, width);
        }
    }
}

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
