// Products of few rows with weights of 8 and 4 bits, compiled once per instruction set.
//
// A panel streams through the L1 cache in chunks of about 8 KiB, and every tile of rows uses a
// chunk before the next one. A tile turns the codes of a step into float32 once for all its rows.
// All tiles share the prefetches of the next chunk, so that memory is never idle. One or two rows
// process two panels at a time, since the sums of a single panel would be bound by the latency of
// their chain of additions.
#include "lora_ext/packed_bits.h"

#include "parts.h"
#include "vec.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int kTileRows = LX_VEC_BYTES == 64 ? 8 : 4;  // rows whose sums are in registers
constexpr int kVectors = 2;                            // vectors of outputs in a tile
constexpr int64_t kStepBytes = kPanel * 4;
constexpr int64_t kChunkBytes = 8192;  // part of a panel that stays in L1
constexpr int64_t kAhead = 4096;       // prefetch distance in bytes, for one tile
constexpr int64_t kRows = 32;          // rows per pass over W

using Word = VecN<uint32_t, kF>;
using Int32 = VecN<int32_t, kF>;

LX_INLINE float half_to_float(const uint8_t* p) {
    const uint16_t h = load_bits<uint16_t>(p);
    // `magnitude` is not a subnormal float, which torch.set_flush_denormal(True) would turn into 0.
    const float magnitude = h & 0x7c00
                                ? bit_cast<float>((uint32_t(h & 0x7fff) << 13) + (112u << 23))
                                : static_cast<float>(h & 0x3ff) * 0x1p-24f;
    return h & 0x8000 ? -magnitude : magnitude;
}
// Return the nearest float16 of a finite number below 65520 in magnitude.
LX_INLINE uint16_t float_to_half(float v) {
    Vec<float> lanes = v - Vec<float>{};
    Half halves[kF];
    store(halves, lanes);
    return halves[0].bits;
}

// ------------------------------------------------------------------------------------------------
// Codes of one step

template <int kBits>
constexpr int kFeatures = kBits == 8 ? 4 : 8;  // in-features of one step

// Return the position of the bits of in-feature f in a lane.
template <int kBits>
constexpr int shift_of(int f) {
    return kBits == 8 ? 8 * f : 8 * (f % 4) + 4 * (f / 4);
}

// Return the code of in-feature f of each output as a float; codes of 4 bits are centred.
template <int kBits>
LX_INLINE Vec<float> code_of(Word w, int f) {
#if defined(__AVX512F__) && LX_VEC_BYTES == 64
    if constexpr (kBits == 4) {
        const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return (Vec<float>)_mm512_permutexvar_ps((__m512i)(w >> shift_of<4>(f)), table);
    }
#endif
    if constexpr (kBits == 8)
        return __builtin_convertvector((Int32)(w << (24 - 8 * f)) >> 24, Vec<float>);
    else
        return __builtin_convertvector((Int32)(w >> shift_of<4>(f) & 15u) - 8, Vec<float>);
}

// Prefetches of a tile: one or two lines per step, in each panel.
struct Fetch {
    int64_t first, stride;  // bytes from the tile's first step to the first line; bytes per step
    bool both;              // whether to prefetch two lines per step
};

template <int kPanels>
LX_INLINE void fetch_step(const uint8_t* const* fetch, const Fetch& how, int64_t at) {
    for (int p = 0; p < kPanels; ++p) {
        __builtin_prefetch(fetch[p] + at);
        if (how.both) __builtin_prefetch(fetch[p] + at + 64);
    }
}

// sum (rows x vectors) = the sums of the products of a group's codes with the inputs x, added in
// ascending order of the in-features.
template <int kBits, int kCount, int kPanels>
LX_INLINE void add_group(const uint8_t* const* w, const uint8_t* const* fetch, const Fetch& how,
                         const float* x, int64_t x_stride, int64_t group,
                         Vec<float> (*sum)[kPanels][kVectors]) {
    for (int i = 0; i < kCount; ++i)
        for (int p = 0; p < kPanels; ++p)
            for (int j = 0; j < kVectors; ++j) sum[i][p][j] = Vec<float>{};
    for (int64_t k = 0, at = 0, ahead = 0; k < group;
         k += kFeatures<kBits>, at += kStepBytes, ahead += how.stride) {
        fetch_step<kPanels>(fetch, how, ahead);
        Word word[kPanels][kVectors];
        for (int p = 0; p < kPanels; ++p)
            for (int j = 0; j < kVectors; ++j)
                word[p][j] = load_bits<Word>(w[p] + at + j * LX_VEC_BYTES);
#pragma GCC unroll 8
        for (int f = 0; f < kFeatures<kBits>; ++f) {
            Vec<float> code[kPanels][kVectors];
            for (int p = 0; p < kPanels; ++p)
                for (int j = 0; j < kVectors; ++j) code[p][j] = code_of<kBits>(word[p][j], f);
            for (int i = 0; i < kCount; ++i) {
                const Vec<float> one = broadcast<float>(x[i * x_stride + k + f]);
                for (int p = 0; p < kPanels; ++p)
                    for (int j = 0; j < kVectors; ++j)
                        sum[i][p][j] = fma(code[p][j], one, sum[i][p][j]);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Inputs of 8 bits

// Return sum + the products of the four bytes of a lane: codes of the weight, w, and of a row, x.
// Weight codes of 8 bits are signed; those of 4 bits are unsigned, as they are stored.
template <int kBits>
LX_INLINE Int32 add_products(Word w, uint32_t x, Int32 sum) {
#if defined(__AVX512VNNI__) && LX_VEC_BYTES == 64
    // The instruction takes its first operand as unsigned, so for codes of 8 bits x is the code of
    // the row plus 128, see kFlip.
    const __m512i row = (__m512i)(x - Word{});
    if constexpr (kBits == 8)
        return (Int32)_mm512_dpbusd_epi32((__m512i)sum, row, (__m512i)w);
    else
        return (Int32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, row);
#else
    for (int f = 0; f < 4; ++f) {
        const Int32 code = (Int32)(w << (24 - 8 * f)) >> 24;
        sum += code * (static_cast<int32_t>(x << (24 - 8 * f)) >> 24);
    }
    return sum;
#endif
}
#if defined(__AVX512VNNI__) && LX_VEC_BYTES == 64
constexpr uint32_t kFlip = 0x80808080u;  // turns a signed byte x into x + 128
#else
constexpr uint32_t kFlip = 0;
#endif

// As add_group, for rows of int8; the sums are integers.
template <int kBits, int kCount, int kPanels>
LX_INLINE void add_codes(const uint8_t* const* w, const uint8_t* const* fetch, const Fetch& how,
                         const int8_t* x, int64_t x_stride, int64_t group,
                         Int32 (*sum)[kPanels][kVectors]) {
    constexpr bool kOffset = kBits == 8 && kFlip != 0;
    Int32 excess[kPanels][kVectors] = {};  // 128 times the sum of the codes
    for (int i = 0; i < kCount; ++i)
        for (int p = 0; p < kPanels; ++p)
            for (int j = 0; j < kVectors; ++j) sum[i][p][j] = Int32{};
    for (int64_t k = 0, at = 0, ahead = 0; k < group;
         k += kFeatures<kBits>, at += kStepBytes, ahead += how.stride) {
        fetch_step<kPanels>(fetch, how, ahead);
        for (int p = 0; p < kPanels; ++p) {
            for (int j = 0; j < kVectors; ++j) {
                const Word word = load_bits<Word>(w[p] + at + j * LX_VEC_BYTES);
                for (int half = 0; half < kFeatures<kBits> / 4; ++half) {
                    const Word codes = kBits == 8 ? word : word >> (4 * half) & 0x0f0f0f0fu;
                    if constexpr (kOffset)
                        excess[p][j] = add_products<kBits>(codes, 0x80808080u, excess[p][j]);
                    for (int i = 0; i < kCount; ++i) {
                        const uint32_t row = load_bits<uint32_t>(x + i * x_stride + k + 4 * half);
                        sum[i][p][j] =
                            add_products<kBits>(codes, kOffset ? row ^ kFlip : row, sum[i][p][j]);
                    }
                }
            }
        }
    }
    if constexpr (kOffset)
        for (int i = 0; i < kCount; ++i)
            for (int p = 0; p < kPanels; ++p)
                for (int j = 0; j < kVectors; ++j) sum[i][p][j] -= excess[p][j];
}

// ------------------------------------------------------------------------------------------------
// Products

// Groups [begin, end) of one or two panels.
struct Chunk {
    const uint8_t* panel;
    int64_t begin, end;
};

// totals (rows x kPanels x kPanel) += the products of a chunk, for the columns from `column` on.
template <int kBits, int kCount, int kPanels, bool kCodes>
void add_tile(const PackedBitsArgs& args, const Chunk& chunk, int64_t row, int64_t column,
              Fetch how, float* totals) {
    const int64_t group = args.group, groups = args.in_features / group;
    const int64_t block = block_bytes(args), size = code_bytes(args);
    // From group to group, a single pass moves its prefetches by a whole block (codes and scales),
    // so that they stay kAhead bytes ahead.
    const int64_t group_stride = how.both ? block : group / kFeatures<kBits> * how.stride;
    for (int64_t g = chunk.begin; g < chunk.end; ++g) {
        const uint8_t *blocks[kPanels], *w[kPanels], *fetch[kPanels];
        for (int p = 0; p < kPanels; ++p) {
            blocks[p] = chunk.panel + (p * groups + g) * block;
            w[p] = blocks[p] + column * 4;
            fetch[p] = chunk.panel + (p * groups + chunk.begin) * block + how.first +
                       (g - chunk.begin) * group_stride;
        }
        Vec<float> sum[kCount][kPanels][kVectors];
        if constexpr (kCodes) {
            Int32 whole[kCount][kPanels][kVectors];
            add_codes<kBits, kCount, kPanels>(w, fetch, how,
                                              args.codes + row * args.in_features + g * group,
                                              args.in_features, group, whole);
            for (int i = 0; i < kCount; ++i)
                for (int p = 0; p < kPanels; ++p)
                    for (int j = 0; j < kVectors; ++j)
                        sum[i][p][j] = __builtin_convertvector(whole[i][p][j], Vec<float>) *
                                       args.x_scales[row + i];
        } else {
            add_group<kBits, kCount, kPanels>(
                w, fetch, how, args.x + row * args.x_stride + g * group, args.x_stride, group, sum);
        }
        for (int p = 0; p < kPanels; ++p) {
            const Half* scales = reinterpret_cast<const Half*>(blocks[p] + size) + column;
            for (int j = 0; j < kVectors; ++j) {
                // The sum of the row's inputs is multiplied by the weight of code 8 or, if the
                // codes of 4 bits are not centred, by that of code 0.
                const Vec<float> scale = load(scales + j * kF);
                Vec<float> centre = Vec<float>{};
                if (args.minimum) centre = load(scales + kPanel + j * kF);
                if (args.minimum != kCodes) centre += scale * (kCodes ? -8.0f : 8.0f);
                for (int i = 0; i < kCount; ++i) {
                    float* total = totals + (i * kPanels + p) * kPanel + column + j * kF;
                    Vec<float> t = fma(scale, sum[i][p][j], load(total));
                    if (args.sums)
                        t = fma(centre, broadcast<float>(args.sums[(row + i) * groups + g]), t);
                    store(total, t);
                }
            }
        }
    }
}

template <typename T>
LX_INLINE void begin_totals(const PackedBitsArgs& args, int64_t o, int64_t rows, int64_t width,
                            float* totals) {
    const T* bias = static_cast<const T*>(args.bias);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < width; c += kF) {
            const int64_t n = min(kF, args.out_features - o - c);
            store(totals + i * width + c,
                  bias && n > 0 ? load_part(bias + o + c, n) : Vec<float>{});
        }
}
template <typename T>
LX_INLINE void end_totals(const PackedBitsArgs& args, int64_t o, int64_t row, int64_t rows,
                          int64_t width, const float* totals) {
    T* y = static_cast<T*>(args.y) + row * args.out_features + o;
    for (int64_t i = 0; i < rows; ++i)
        store_rounded(y + i * args.out_features, totals + i * width,
                      min(width, args.out_features - o));
}

template <typename T, int kBits, bool kCodes>
void multiply(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t kColumns = kVectors * kF;  // columns of a tile
    const int64_t groups = args.in_features / args.group, block = block_bytes(args);
    alignas(64) float totals[kRows * kPanel];
    for (int64_t p = begin, panels; p < end; p += panels) {
        const uint8_t* panel = args.packed + p * groups * block;
        const int64_t o = p * kPanel;
        panels = args.rows <= 2 && p + 2 <= end ? 2 : 1;
        if (panels == 2) {
            const Fetch how{kAhead, kStepBytes, true};
            begin_totals<T>(args, o, args.rows, 2 * kPanel, totals);
            for (int64_t column = 0; column < kPanel; column += kColumns)
                with_constant<2>(args.rows, [&](auto count) {
                    add_tile<kBits, count.value, 2, kCodes>(args, {panel, 0, groups}, 0, column,
                                                            how, totals);
                });
            end_totals<T>(args, o, 0, args.rows, 2 * kPanel, totals);
            continue;
        }
        for (int64_t first = 0; first < args.rows; first += kRows) {
            const int64_t rows = min(kRows, args.rows - first);
            const int64_t tiles = blocks_of(rows, kTileRows), passes = tiles * kPanel / kColumns;
            const int64_t chunk = passes == 1 ? groups : blocks_of(kChunkBytes, block);
            begin_totals<T>(args, o, rows, kPanel, totals);
            for (int64_t g = 0; g < groups; g += chunk) {
                const Chunk part{panel, g, min(groups, g + chunk)};
                int64_t pass = 0;
                for (int64_t column = 0; column < kPanel; column += kColumns)
                    for (int64_t row = 0, left = tiles, n; row < rows; row += n, ++pass) {
                        n = blocks_of(rows - row, left--);
                        // Each pass prefetches its share of the next chunk.
                        const Fetch how = passes == 1
                                              ? Fetch{kAhead, kStepBytes, true}
                                              : Fetch{chunk * block + chunk * block * pass / passes,
                                                      kStepBytes / passes, false};
                        with_constant<kTileRows>(n, [&](auto count) {
                            add_tile<kBits, count.value, 1, kCodes>(args, part, first + row, column,
                                                                    how, totals + row * kPanel);
                        });
                    }
            }
            end_totals<T>(args, o, first, rows, kPanel, totals);
        }
    }
}

template <typename T>
void by_bits(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    if (args.bits == 8)
        args.codes ? multiply<T, 8, true>(args, begin, end)
                   : multiply<T, 8, false>(args, begin, end);
    else
        args.codes ? multiply<T, 4, true>(args, begin, end)
                   : multiply<T, 4, false>(args, begin, end);
}
void product(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    args.dtype == DType::kFloat32 ? by_bits<float>(args, begin, end)
                                  : by_bits<BFloat>(args, begin, end);
}

// ------------------------------------------------------------------------------------------------
// Rows

// Return the integer of [first, last] nearest to v; ties go to the even one.
LX_INLINE int nearest_code(float v, int first, int last) {
    constexpr float kMagic = 0x1.8p23f;
    if (v <= first) return first;
    if (v >= last) return last;
    return static_cast<int>(bit_cast<int32_t>(v + kMagic) - bit_cast<int32_t>(kMagic));
}

void prepare(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    const int64_t group = args.group, groups = args.in_features / group;
    for (int64_t t = begin; t < end; ++t) {
        const float* x = args.x + t * args.x_stride;
        int8_t* codes = args.codes ? args.codes + t * args.in_features : nullptr;
        float scale = 1;
        if (codes) {
            float most = 0;
            bool finite = true;
            for (int64_t k = 0; k < args.in_features; ++k) {
                const float v = x[k] < 0 ? -x[k] : x[k];
                most = v > most ? v : most;
                finite &= v - v == 0;
            }
            scale = most / 127;
            // A row that is not finite has NaN as its scale, so that all of its outputs are NaN.
            for (int64_t k = 0; k < args.in_features; ++k)
                codes[k] = static_cast<int8_t>(
                    finite && scale > 0 ? nearest_code(x[k] / scale, -127, 127) : 0);
            args.x_scales[t] = scale = finite ? scale : bit_cast<float>(0x7fc00000u);
        }
        for (int64_t g = 0; args.sums && g < groups; ++g) {
            if (codes) {
                int32_t sum = 0;
                for (int64_t k = 0; k < group; ++k) sum += codes[g * group + k];
                args.sums[t * groups + g] = static_cast<float>(sum) * scale;
                continue;
            }
            // The lanes of one vector are added in ascending order.
            Vec<float> lanes = Vec<float>{};
            for (int64_t k = 0; k < group; k += kF) lanes += load(x + g * group + k);
            float sum = 0;
            for (int l = 0; l < kF; ++l) sum += lanes[l];
            args.sums[t * groups + g] = sum;
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Weights

template <int kBits>
LX_INLINE void set_code(uint8_t* block, int64_t c, int64_t k, int code) {
    const int64_t f = k % kFeatures<kBits>;
    uint8_t& byte = block[k / kFeatures<kBits> * kStepBytes + c * 4 + f % 4];
    if constexpr (kBits == 8)
        byte = static_cast<uint8_t>(code);
    else
        byte = static_cast<uint8_t>(byte | code << (4 * (f / 4)));
}
template <int kBits>
LX_INLINE int get_code(const uint8_t* block, int64_t c, int64_t k) {
    const int64_t f = k % kFeatures<kBits>;
    const uint8_t byte = block[k / kFeatures<kBits> * kStepBytes + c * 4 + f % 4];
    return kBits == 8 ? static_cast<int8_t>(byte) : byte >> (4 * (f / 4)) & 15;
}

// Quantise the weights w of one output and group into column c of a block.
template <int kBits, typename T>
void quantise(const PackedBitsArgs& args, const T* w, uint8_t* block, int64_t c) {
    float values[128], low = 0, high = 0;
    for (int64_t k = 0; k < args.group; ++k) {
        if constexpr (sizeof(T) == 4)
            values[k] = w[k];
        else
            values[k] = bit_cast<float>(uint32_t{w[k].bits} << 16);
        low = k == 0 || values[k] < low ? values[k] : low;
        high = k == 0 || values[k] > high ? values[k] : high;
    }
    uint8_t* scales = block + code_bytes(args) + 2 * c;
    const auto magnitude = [](float v) { return v < 0 ? -v : v; };
    // With 4 bits, the value of the largest magnitude has code -8, as in GGUF's Q4_0, and the scale
    // has the other sign. Adding 0 makes the scale of a group of zeros positive.
    const float peak = -low > high ? low : high;
    float base = 0, scale = kBits == 8 ? magnitude(peak) / 127 : peak / -8 + 0.0f;
    if (kBits == 4 && !args.minimum) {
        // If all values are multiples of a seventh of the largest magnitude, as in a ternary
        // weight, this seventh is the scale. Rounding it to float16 moves the values by at most
        // 7 x 2^-11 of a step.
        const uint16_t bits = float_to_half(magnitude(peak) / 7);
        __builtin_memcpy(scales, &bits, 2);
        const float seventh = half_to_float(scales);
        bool whole = seventh > 0;
        for (int64_t k = 0; whole && k < args.group; ++k) {
            const float v = values[k] / seventh;
            whole = magnitude(v - static_cast<float>(nearest_code(v, -7, 7))) <= 1 / 64.0f;
        }
        if (whole) scale = seventh;
    }
    if (args.minimum) {
        const uint16_t bits = float_to_half(low);
        __builtin_memcpy(scales + 2 * kPanel, &bits, 2);
        base = half_to_float(scales + 2 * kPanel);
        scale = (high - base) / 15;
        scale = scale > 0 ? scale : 0;
    }
    uint16_t bits = float_to_half(scale);
    __builtin_memcpy(scales, &bits, 2);
    // A small scale (float16 has few bits there) is rounded up if the largest code would be
    // clipped.
    const int first = args.minimum ? 0 : kBits == 8 ? -127 : -8;
    const int last = args.minimum ? 15 : kBits == 8 ? 127 : 7;
    const float most = args.minimum ? 15 : kBits == 8 ? 127 : 8;  // magnitude of a code
    if (magnitude(half_to_float(scales)) * (most + 0.5f) < magnitude(scale) * most) ++bits;
    __builtin_memcpy(scales, &bits, 2);
    const float rounded = half_to_float(scales);
    for (int64_t k = 0; k < args.group; ++k) {
        const int code = rounded != 0 ? nearest_code((values[k] - base) / rounded, first, last) : 0;
        set_code<kBits>(block, c, k, kBits == 4 && !args.minimum ? code + 8 : code);
    }
}

template <int kBits, typename T>
void lay_out(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    const int64_t groups = args.in_features / args.group, block = block_bytes(args);
    for (int64_t p = begin; p < end; ++p)
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t* to = args.packed + (p * groups + g) * block;
            for (int64_t i = 0; i < block; ++i) to[i] = 0;
            for (int64_t c = 0; c < min(kPanel, args.out_features - p * kPanel); ++c)
                quantise<kBits>(args,
                                static_cast<const T*>(args.weight) +
                                    (p * kPanel + c) * args.weight_stride + g * args.group,
                                to, c);
        }
}
void pack(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    if (args.dtype == DType::kFloat32)
        args.bits == 8 ? lay_out<8, float>(args, begin, end) : lay_out<4, float>(args, begin, end);
    else
        args.bits == 8 ? lay_out<8, BFloat>(args, begin, end)
                       : lay_out<4, BFloat>(args, begin, end);
}

template <int kBits>
void restore(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    const int64_t groups = args.in_features / args.group, block = block_bytes(args);
    float* weight = static_cast<float*>(args.weight);
    for (int64_t p = begin; p < end; ++p)
        for (int64_t c = 0; c < min(kPanel, args.out_features - p * kPanel); ++c)
            for (int64_t g = 0; g < groups; ++g) {
                const uint8_t* from = args.packed + (p * groups + g) * block;
                const uint8_t* scales = from + code_bytes(args) + 2 * c;
                const float scale = half_to_float(scales);
                const float base = args.minimum ? half_to_float(scales + 2 * kPanel) : 0;
                float* to = weight + (p * kPanel + c) * args.in_features + g * args.group;
                for (int64_t k = 0; k < args.group; ++k) {
                    const int code = get_code<kBits>(from, c, k);
                    to[k] =
                        static_cast<float>(kBits == 4 && !args.minimum ? code - 8 : code) * scale +
                        base;
                }
            }
}
void unpack(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    args.bits == 8 ? restore<8>(args, begin, end) : restore<4>(args, begin, end);
}

}  // namespace

extern const PackedBitsCpu packed_bits_table;
const PackedBitsCpu packed_bits_table = {pack, unpack, prepare, product};

}  // namespace lora_ext::LX_ISA
