// Products of few rows with weights of 8 and 4 bits, compiled once per instruction set.
//
// A panel streams through the L1 cache in chunks of about 8 KiB, and every tile of rows uses a
// chunk before the next one. A tile turns the codes of a step into float32 once for all its rows.
// All tiles share the prefetches of the next chunk, so that memory is never idle. One or two rows
// (with three digits, one) process two panels at a time, since the sums of a single panel would be
// bound by the latency of their chain of additions.
//
// Processors that multiply four pairs of bytes at once (AVX-512-VNNI, AMX) do so for float inputs
// too: each group of inputs is converted to integers of 24 bits with a common unit, whose three
// bytes are multiplied separately. The sums of a group are then exact integers. Rounding an input
// to the unit loses about as much as one rounding of a float32 sum. Three products of four inputs
// take less time than widening four codes and multiplying them as floats.
#include "lora_ext/packed_bits.h"

#include <atomic>

#include "parts.h"
#include "tile_config.h"
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
using Bytes = VecN<int8_t, LX_VEC_BYTES>;

#if defined(__AVX512VNNI__) && LX_VEC_BYTES == 64
constexpr int kFloatDigits = 3;  // digits of eight bits into which prepare converts a float input
#else
constexpr int kFloatDigits = 0;  // products read the floats
#endif

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
// Inputs in digits of eight bits

// Return the codes of four in-features of a step as signed bytes; codes of 4 bits are centred.
template <int kBits>
LX_INLINE Word bytes_of(Word w, int half) {
    if constexpr (kBits == 8)
        return w;
    else
        return (Word)((Bytes)(w >> (4 * half) & 0x0f0f0f0fu) - static_cast<int8_t>(8));
}

// Return sum + the products of the four bytes of a lane: signed codes and unsigned digits x.
LX_INLINE Int32 add_products(Word codes, uint32_t x, Int32 sum) {
#if defined(__AVX512VNNI__) && LX_VEC_BYTES == 64
    return (Int32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)(x - Word{}), (__m512i)codes);
#else
    for (int f = 0; f < 4; ++f)
        sum += ((Int32)(codes << (24 - 8 * f)) >> 24) * static_cast<int32_t>(x >> (8 * f) & 255u);
    return sum;
#endif
}

// sum (rows x digits x panels x vectors) = the products of a group's codes with each digit of the
// inputs x. excess = 128 times the sum of the codes.
template <int kBits, int kDigits, int kCount, int kPanels>
LX_INLINE void add_codes(const uint8_t* const* w, const uint8_t* const* fetch, const Fetch& how,
                         const uint8_t* x, int64_t x_stride, int64_t group,
                         Int32 (*sum)[kDigits][kPanels][kVectors], Int32 (*excess)[kVectors]) {
    for (int p = 0; p < kPanels; ++p)
        for (int j = 0; j < kVectors; ++j) {
            excess[p][j] = Int32{};
            for (int i = 0; i < kCount; ++i)
                for (int d = 0; d < kDigits; ++d) sum[i][d][p][j] = Int32{};
        }
    for (int64_t k = 0, at = 0, ahead = 0; k < group;
         k += kFeatures<kBits>, at += kStepBytes, ahead += how.stride) {
        fetch_step<kPanels>(fetch, how, ahead);
        for (int half = 0; half < kFeatures<kBits> / 4; ++half) {
            Word codes[kPanels][kVectors];
            for (int p = 0; p < kPanels; ++p)
                for (int j = 0; j < kVectors; ++j) {
                    const Word word = load_bits<Word>(w[p] + at + j * LX_VEC_BYTES);
                    codes[p][j] = bytes_of<kBits>(word, half);
                    excess[p][j] = add_products(codes[p][j], 0x80808080u, excess[p][j]);
                }
            for (int i = 0; i < kCount; ++i)
                for (int d = 0; d < kDigits; ++d) {
                    const uint32_t row =
                        load_bits<uint32_t>(x + i * x_stride + d * group + k + 4 * half);
                    for (int p = 0; p < kPanels; ++p)
                        for (int j = 0; j < kVectors; ++j)
                            sum[i][d][p][j] = add_products(codes[p][j], row, sum[i][d][p][j]);
                }
        }
    }
}

// Return the sum of the products of a group with its inputs, in units of the inputs, from the sums
// of each digit. `digit(d)` returns those of digit d, the least significant one first. The last one
// is stored plus 128.
template <int kDigits, typename F>
LX_INLINE Vec<float> value_of(F&& digit, Int32 excess) {
    const Int32 last = digit(kDigits - 1) - excess;
    if constexpr (kDigits == 1) return __builtin_convertvector(last, Vec<float>);
    const Vec<float> upper = __builtin_convertvector((last << 8) + digit(1 % kDigits), Vec<float>);
    return fma(upper, broadcast<float>(256), __builtin_convertvector(digit(0), Vec<float>));
}

// ------------------------------------------------------------------------------------------------
// Products

// Scales of a block for one vector of outputs, and the factors of the sums of a row's inputs: the
// weights with the code at the centre.
struct Scales {
    Vec<float> scale, centre;
};

LX_INLINE Scales scales_of(const PackedBitsArgs& args, const uint8_t* block, int64_t column) {
    const Half* at = reinterpret_cast<const Half*>(block + code_bytes(args)) + column;
    Scales found{load(at), Vec<float>{}};
    if (args.minimum) found.centre = load(at + kPanel) + found.scale * 8.0f;
    return found;
}

// Add the product of group g with a row to a vector of totals.
LX_INLINE void add_value(const PackedBitsArgs& args, const Scales& scales, Vec<float> value,
                         int64_t row, int64_t g, float* total) {
    Vec<float> t = fma(scales.scale, value, load(total));
    if (args.sums) {
        const float sum = args.sums[row * (args.in_features / args.group) + g];
        t = fma(scales.centre, broadcast<float>(sum), t);
    }
    store(total, t);
}

// Groups [begin, end) of one or two panels.
struct Chunk {
    const uint8_t* panel;
    int64_t begin, end;
};

// totals (rows x kPanels x kPanel) += the products of a chunk, for the columns from `column` on.
// If kDigits is 0, inputs are floats.
template <int kBits, int kDigits, int kCount, int kPanels>
void add_tile(const PackedBitsArgs& args, const Chunk& chunk, int64_t row, int64_t column,
              Fetch how, float* totals) {
    const int64_t group = args.group, groups = args.in_features / group, block = block_bytes(args);
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
        if constexpr (kDigits > 0) {
            const int64_t stride = kDigits * args.in_features;
            Int32 digits[kCount][kDigits][kPanels][kVectors], excess[kPanels][kVectors];
            add_codes<kBits, kDigits, kCount, kPanels>(
                w, fetch, how, args.codes + row * stride + g * kDigits * group, stride, group,
                digits, excess);
            for (int i = 0; i < kCount; ++i)
                for (int p = 0; p < kPanels; ++p)
                    for (int j = 0; j < kVectors; ++j)
                        sum[i][p][j] = value_of<kDigits>([&](int d) { return digits[i][d][p][j]; },
                                                         excess[p][j]) *
                                       args.x_scales[(row + i) * groups + g];
        } else {
            add_group<kBits, kCount, kPanels>(
                w, fetch, how, args.x + row * args.x_stride + g * group, args.x_stride, group, sum);
        }
        for (int p = 0; p < kPanels; ++p)
            for (int j = 0; j < kVectors; ++j) {
                const int64_t at = column + j * kF;
                const Scales scales = scales_of(args, blocks[p], at);
                for (int i = 0; i < kCount; ++i)
                    add_value(args, scales, sum[i][p][j], row + i, g,
                              totals + (i * kPanels + p) * kPanel + at);
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

#if defined(__AMX_INT8__)
// Tile registers: 0 to 5 have sums of rows x 16 outputs, two for each digit, for the halves of a
// panel. 6 has one digit of rows x 64 in-features, 7 the codes of 64 in-features x 16 outputs. The
// sums are those of add_codes, so each number of rows has the same bits with and without tiles.
constexpr int64_t kTileFeatures = 64;
constexpr int kSumRows = 16;  // rows of a tile
// Fewest rows for which tiles are faster than vectors.
template <int kDigits>
constexpr int64_t kLeastTileRows = 5;

template <int kDigits>
LX_INLINE void add_tiles(const uint8_t* w, const uint8_t* x, int64_t x_stride, int64_t group) {
    _tile_loadd(7, w, kStepBytes);
    _tile_loadd(6, x, x_stride);
    _tile_dpbusd(0, 6, 7);
    if constexpr (kDigits == 3) {
        _tile_loadd(6, x + group, x_stride);
        _tile_dpbusd(2, 6, 7);
        _tile_loadd(6, x + 2 * group, x_stride);
        _tile_dpbusd(4, 6, 7);
    }
    _tile_loadd(7, w + kTileRow, kStepBytes);
    if constexpr (kDigits == 3) {
        _tile_dpbusd(5, 6, 7);
        _tile_loadd(6, x + group, x_stride);
        _tile_dpbusd(3, 6, 7);
        _tile_loadd(6, x, x_stride);
    }
    _tile_dpbusd(1, 6, 7);
}

// sums (digits x halves x rows x 16) = the products of a group, as in add_codes.
template <int kDigits>
LX_INLINE void multiply_group(const uint8_t* w, const uint8_t* x, int64_t x_stride, int64_t group,
                              Int32 (*sums)[2][kSumRows]) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kDigits == 3) {
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
    }
    for (int64_t k = 0; k < group; k += kTileFeatures)
        add_tiles<kDigits>(w + k / 4 * kStepBytes, x + k, x_stride, group);
    _tile_stored(0, sums[0][0], kTileRow);
    _tile_stored(1, sums[0][1], kTileRow);
    if constexpr (kDigits == 3) {
        _tile_stored(2, sums[1][0], kTileRow);
        _tile_stored(3, sums[1][1], kTileRow);
        _tile_stored(4, sums[2][0], kTileRow);
        _tile_stored(5, sums[2][1], kTileRow);
    }
}

template <typename T, int kBits, int kDigits>
void multiply_tiles(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    static_assert(kVectors == 2 && kF == 16 && kPanel == 32);
    constexpr int64_t kMostGroup = 128;
    const int64_t group = args.group, groups = args.in_features / group, block = block_bytes(args);
    const int64_t stride = kDigits * args.in_features;
    alignas(64) float totals[kRows * kPanel];
    alignas(64) uint8_t wide[kBits == 4 ? kMostGroup * kPanel : 1];  // codes of 4 bits, as bytes
    Int32 sums[kDigits][2][kSumRows];
    int64_t configured = 0;
    for (int64_t p = begin; p < end; ++p)
        for (int64_t first = 0; first < args.rows; first += kRows) {
            const int64_t rows = min(kRows, args.rows - first), tiles = blocks_of(rows, kSumRows);
            const int64_t height = blocks_of(rows, tiles);
            if (height != configured) {
                const int64_t features = min(group, kTileFeatures);
                TileConfig config;
                for (int tile = 0; tile < 6; ++tile) config.set(tile, height);
                config.set(6, height, features);
                config.set(7, features / 4);
                _tile_loadconfig(&config);
                configured = height;
            }
            begin_totals<T>(args, p * kPanel, rows, kPanel, totals);
            for (int64_t g = 0; g < groups; ++g) {
                const uint8_t* at = args.packed + (p * groups + g) * block;
                for (int64_t line = 0; first == 0 && line < block; line += 64)
                    __builtin_prefetch(at + kAhead + line);
                Int32 excess[kVectors] = {};
                for (int64_t k = 0; k < group; k += 4)
                    for (int j = 0; j < kVectors; ++j) {
                        const int64_t step = k / kFeatures<kBits> * kStepBytes + j * LX_VEC_BYTES;
                        const int half = static_cast<int>(k % kFeatures<kBits> / 4);
                        const Word codes = bytes_of<kBits>(load_bits<Word>(at + step), half);
                        excess[j] = add_products(codes, 0x80808080u, excess[j]);
                        if constexpr (kBits == 4)
                            __builtin_memcpy(wide + k / 4 * kStepBytes + j * LX_VEC_BYTES, &codes,
                                             sizeof codes);
                    }
                // GCC does not know that tile loads read memory, and would remove stores.
                std::atomic_signal_fence(std::memory_order_seq_cst);
                const Scales scales[] = {scales_of(args, at, 0), scales_of(args, at, kF)};
                for (int64_t tile = 0, done = 0; tile < tiles; ++tile, done += height) {
                    // The last tile may contain rows of the one before it, which are left out.
                    const int64_t start = min(done, rows - height);
                    multiply_group<kDigits>(
                        kBits == 4 ? wide : at,
                        args.codes + (first + start) * stride + g * kDigits * group, stride, group,
                        sums);
                    for (int64_t i = done - start; i < height; ++i) {
                        const int64_t row = start + i;
                        const float unit = args.x_scales[(first + row) * groups + g];
                        for (int j = 0; j < kVectors; ++j) {
                            const Vec<float> value =
                                value_of<kDigits>([&](int d) { return sums[d][j][i]; }, excess[j]);
                            add_value(args, scales[j], value * unit, first + row, g,
                                      totals + row * kPanel + j * kF);
                        }
                    }
                }
            }
            end_totals<T>(args, p * kPanel, first, rows, kPanel, totals);
        }
    _tile_release();
}
#endif

template <typename T, int kBits, int kDigits>
void multiply(const PackedBitsArgs& args, int64_t begin, int64_t end) {
#if defined(__AMX_INT8__)
    if (args.rows >= kLeastTileRows<kDigits>)
        return multiply_tiles<T, kBits, kDigits>(args, begin, end);
#endif
    constexpr int64_t kColumns = kVectors * kF;  // columns of a tile
    // Three digits have three times as many sums.
    constexpr int kMostRows = kDigits == 3 ? 4 : kTileRows, kPairedRows = kDigits == 3 ? 1 : 2;
    const int64_t groups = args.in_features / args.group, block = block_bytes(args);
    alignas(64) float totals[kRows * kPanel];
    for (int64_t p = begin, panels; p < end; p += panels) {
        const uint8_t* panel = args.packed + p * groups * block;
        const int64_t o = p * kPanel;
        panels = args.rows <= kPairedRows && p + 2 <= end ? 2 : 1;
        if (panels == 2) {
            const Fetch how{kAhead, kStepBytes, true};
            begin_totals<T>(args, o, args.rows, 2 * kPanel, totals);
            for (int64_t column = 0; column < kPanel; column += kColumns)
                with_constant<kPairedRows>(args.rows, [&](auto count) {
                    add_tile<kBits, kDigits, count.value, 2>(args, {panel, 0, groups}, 0, column,
                                                             how, totals);
                });
            end_totals<T>(args, o, 0, args.rows, 2 * kPanel, totals);
            continue;
        }
        for (int64_t first = 0; first < args.rows; first += kRows) {
            const int64_t rows = min(kRows, args.rows - first);
            const int64_t tiles = blocks_of(rows, kMostRows), passes = tiles * kPanel / kColumns;
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
                        with_constant<kMostRows>(n, [&](auto count) {
                            add_tile<kBits, kDigits, count.value, 1>(
                                args, part, first + row, column, how, totals + row * kPanel);
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
        args.digits == 1 ? multiply<T, 8, 1>(args, begin, end)
                         : multiply<T, 8, kFloatDigits>(args, begin, end);
    else
        args.digits == 1 ? multiply<T, 4, 1>(args, begin, end)
                         : multiply<T, 4, kFloatDigits>(args, begin, end);
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

// Write a row of inputs as one digit each, and return its scale. A row that is not finite has NaN
// as its scale, so that all of its outputs are NaN.
LX_INLINE float round_row(const float* x, int64_t count, uint8_t* digits) {
    float most = 0;
    bool finite = true;
    for (int64_t k = 0; k < count; ++k) {
        const float v = x[k] < 0 ? -x[k] : x[k];
        most = v > most ? v : most;
        finite &= v - v == 0;
    }
    const float scale = most / 127;
    for (int64_t k = 0; k < count; ++k)
        digits[k] = static_cast<uint8_t>(
            128 + (finite && scale > 0 ? nearest_code(x[k] / scale, -127, 127) : 0));
    return finite ? scale : bit_cast<float>(0x7fc00000u);
}

#if defined(__AVX512VNNI__) && LX_VEC_BYTES == 64
// Write a group of inputs as integers of 24 bits, three digits each, and return their unit: a power
// of two, at most 2^-22 of the largest magnitude, or NaN if an input is not finite.
LX_INLINE float fix_group(const float* x, int64_t group, uint8_t* digits) {
    Word largest = Word{};
    for (int64_t k = 0; k < group; k += kF) {
        const Word magnitude = load_bits<Word>(x + k) & 0x7fffffffu;
        largest = (Word)_mm512_max_epu32((__m512i)largest, (__m512i)magnitude);
    }
    const uint32_t most = _mm512_reduce_max_epu32((__m512i)largest);
    // The magnitudes are below 2^(exponent - 126). The unit is not subnormal.
    const uint32_t exponent = most >> 23 > 23 ? most >> 23 : 23;
    const float unit = bit_cast<float>((exponent - 22) << 23);
    const Vec<float> inverse = broadcast<float>(bit_cast<float>((276 - exponent) << 23));
    for (int64_t k = 0; k < group; k += kF) {
        const __m512i rounded = _mm512_cvtps_epi32((__m512)(load(x + k) * inverse));
        const __m512i moved = _mm512_add_epi32(rounded, _mm512_set1_epi32(1 << 23));
        const __m512i v = _mm512_min_epu32(moved, _mm512_set1_epi32((1 << 24) - 1));
        for (int d = 0; d < 3; ++d)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * group + k),
                             _mm512_cvtepi32_epi8(_mm512_srli_epi32(v, 8 * d)));
    }
    return most < 0x7f800000u ? unit : bit_cast<float>(0x7fc00000u);
}
#else
LX_INLINE float fix_group(const float*, int64_t, uint8_t*) {
    return 0;
}
#endif

void prepare(const PackedBitsArgs& args, int64_t begin, int64_t end) {
    const int64_t group = args.group, groups = args.in_features / group;
    for (int64_t t = begin; t < end; ++t) {
        const float* x = args.x + t * args.x_stride;
        uint8_t* codes = args.codes + t * args.digits * args.in_features;
        const float scale = args.digits == 1 ? round_row(x, args.in_features, codes) : 0;
        for (int64_t g = 0; g < groups; ++g) {
            if (args.digits > 0)
                args.x_scales[t * groups + g] =
                    args.digits == 1
                        ? scale
                        : fix_group(x + g * group, group, codes + g * args.digits * group);
            if (!args.sums) continue;
            float& sum = args.sums[t * groups + g];
            if (args.digits == 1) {
                int32_t whole = 0;
                for (int64_t k = 0; k < group; ++k) whole += codes[g * group + k] - 128;
                sum = static_cast<float>(whole) * scale;
                continue;
            }
            // The lanes of one vector are added in ascending order.
            Vec<float> lanes = Vec<float>{};
            for (int64_t k = 0; k < group; k += kF) lanes += load(x + g * group + k);
            sum = 0;
            for (int l = 0; l < kF; ++l) sum += lanes[l];
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
const PackedBitsCpu packed_bits_table = {pack, unpack, prepare, product, kFloatDigits};

}  // namespace lora_ext::LX_ISA
