// Kernels that round weights to codes of 8 and 4 bits, and convert codes back. packed_bits.h has
// the layout.
//
// A block processes a group of in-features of the 32 outputs of a panel. Four lanes share an
// output; each has every fourth octet (eight in-features), which is two words of codes of 8 bits or
// one word of codes of 4 bits. Bound: bytes of the weight, which packing reads twice, the second
// time from L1.
#include "lora_ext/packed_bits.h"

#include "launch.cuh"

namespace lora_ext {
namespace {

constexpr int kLanes = 4;  // lanes per output
constexpr int kThreads = static_cast<int>(kPanel) * kLanes;
constexpr int kOctet = 8;

// The place of a thread: its output in the panel, and the block of codes.
struct Place {
    int column, lane;
    int64_t output, group;
    uint8_t* block;

    LX_DEVICE explicit Place(const PackedBitsArgs& args)
        : column(lx::thread_rank() / kLanes),
          lane(lx::thread_rank() % kLanes),
          output(int64_t{blockIdx.x} * kPanel + column),
          group(blockIdx.y),
          block(args.packed +
                (blockIdx.x * (args.in_features / args.group) + group) * block_bytes(args)) {}

    LX_DEVICE uint32_t* words(int octet, int bits) const {
        return reinterpret_cast<uint32_t*>(block) + octet * (bits / 4) * kPanel + column;
    }
    LX_DEVICE lx::f16* scales(const PackedBitsArgs& args) const {
        return reinterpret_cast<lx::f16*>(block + code_bytes(args)) + column;
    }
};

// Returns the integer in [first, last] that is nearest to v; ties go to the even integer.
LX_DEVICE int nearest_code(float v, int first, int last) {
    if (v <= static_cast<float>(first)) return first;
    if (v >= static_cast<float>(last)) return last;
    return static_cast<int>(rintf(v));
}

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const __grid_constant__ PackedBitsArgs args) {
    const Place place(args);
    const int octets = static_cast<int>(args.group) / kOctet;
    const bool exists = place.output < args.out_features;
    const T* const w = static_cast<const T*>(args.weight) +
                       (exists ? place.output : 0) * args.weight_stride + place.group * args.group;
    float low = lx::to_float(lx::load_nc(w)), high = low;
    for (int octet = place.lane; octet < octets; octet += kLanes)
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            const float v = lx::to_float(lx::load_nc(w + octet * kOctet + i));
            low = fminf(low, v);
            high = fmaxf(high, v);
        }
#pragma unroll
    for (int i = 1; i < kLanes; i *= 2) {  // over the lanes of an output
        low = fminf(low, lx::shfl_xor_sync(lx::kFullMask, low, i));
        high = fmaxf(high, lx::shfl_xor_sync(lx::kFullMask, high, i));
    }
    const bool minimum = kBits == 4 && args.minimum;
    lx::f16 base_bits = lx::from_float<lx::f16>(0);
    // With 4 bits, the value of the largest magnitude has code -8, as in the CPU twin.
    float scale = kBits == 8 ? fmaxf(-low, high) / 127 : (-low > high ? low : high) / -8 + 0.0f;
    float base = 0;
    if (kBits == 4 && !minimum) {  // tests if all are multiples of the largest magnitude / 7
        const float seventh = lx::to_float(lx::from_float<lx::f16>(fmaxf(-low, high) / 7));
        int whole = seventh > 0;
        for (int octet = place.lane; octet < octets; octet += kLanes)
#pragma unroll
            for (int i = 0; i < kOctet; ++i) {
                const float v = lx::to_float(lx::load_nc(w + octet * kOctet + i)) / seventh;
                whole &= fabsf(v - static_cast<float>(nearest_code(v, -7, 7))) <= 1 / 64.0f;
            }
#pragma unroll
        for (int i = 1; i < kLanes; i *= 2) whole &= lx::shfl_xor_sync(lx::kFullMask, whole, i);
        if (whole) scale = seventh;
    }
    if (minimum) {
        base_bits = lx::from_float<lx::f16>(low);
        base = lx::to_float(base_bits);
        scale = fmaxf((high - base) / 15, 0.0f);
    }
    uint16_t bits = lx::bit_cast<uint16_t>(lx::from_float<lx::f16>(scale));
    const int first = minimum ? 0 : kBits == 8 ? -127 : -8;
    const int last = minimum ? 15 : kBits == 8 ? 127 : 7;
    // Rounds a small scale up if the largest code would be clipped, as the CPU twin does.
    const float most = minimum ? 15 : kBits == 8 ? 127 : 8;
    const float stored = fabsf(lx::to_float(lx::bit_cast<lx::f16>(bits)));
    if (stored * (most + 0.5f) < fabsf(scale) * most) ++bits;
    const float rounded = lx::to_float(lx::bit_cast<lx::f16>(bits));
    for (int octet = place.lane; octet < octets; octet += kLanes) {
        uint32_t* const words = place.words(octet, kBits);
#pragma unroll
        for (int i = 0; i < kBits / 4; ++i) {
            uint32_t word = 0;
#pragma unroll
            for (int k = 0; k < 32 / kBits; ++k) {
                const float v = lx::to_float(lx::load_nc(w + octet * kOctet + 4 * i + k));
                int code = rounded != 0 ? nearest_code((v - base) / rounded, first, last) : 0;
                if (kBits == 4 && !minimum) code += 8;
                const unsigned bits_of_code = exists ? static_cast<unsigned>(code) : 0;
                word |= (bits_of_code & ((1u << kBits) - 1)) << (8 * (k % 4) + 4 * (k / 4));
            }
            words[i * kPanel] = word;
        }
    }
    if (place.lane != 0) return;
    const uint16_t none = 0;
    place.scales(args)[0] = lx::bit_cast<lx::f16>(exists ? bits : none);
    if (minimum) place.scales(args)[kPanel] = exists ? base_bits : lx::bit_cast<lx::f16>(none);
}

// Stores an octet, each value rounded once, in accesses of 16 bytes.
template <class T>
LX_DEVICE void store_octet(T* to, const float (&v)[kOctet]) {
    uint4* const at = reinterpret_cast<uint4*>(to);
    if constexpr (sizeof(T) == 2) {
        at[0] = {lx::pack_floats<T>(v[0], v[1]), lx::pack_floats<T>(v[2], v[3]),
                 lx::pack_floats<T>(v[4], v[5]), lx::pack_floats<T>(v[6], v[7])};
    } else {
        const auto bits = [&](int i) { return lx::bit_cast<uint32_t>(v[i]); };
        at[0] = {bits(0), bits(1), bits(2), bits(3)};
        at[1] = {bits(4), bits(5), bits(6), bits(7)};
    }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads)
    unpack_weight_kernel(const __grid_constant__ PackedBitsArgs args) {
    const Place place(args);
    const int octets = static_cast<int>(args.group) / kOctet;
    if (place.output >= args.out_features) return;
    const bool minimum = kBits == 4 && args.minimum;
    const lx::f16* const scales = place.scales(args);
    const float scale = lx::to_float(scales[0]);
    const float base = minimum ? lx::to_float(scales[kPanel]) : 0.0f;
    T* const to =
        static_cast<T*>(args.weight) + place.output * args.in_features + place.group * args.group;
    for (int octet = place.lane; octet < octets; octet += kLanes) {
        float v[kOctet];
#pragma unroll
        for (int i = 0; i < kBits / 4; ++i) {
            const uint32_t word = place.words(octet, kBits)[i * kPanel];
#pragma unroll
            for (int k = 0; k < 32 / kBits; ++k) {
                const unsigned at = kBits == 8 ? 8 * k : 8 * (k % 4) + 4 * (k / 4);
                int code = static_cast<int>(word >> at & ((1u << kBits) - 1));
                if (kBits == 8) code = static_cast<int8_t>(code);
                if (kBits == 4 && !minimum) code -= 8;
                v[kBits == 8 ? 4 * i + k : k] = fmaf(static_cast<float>(code), scale, base);
            }
        }
        store_octet(to + octet * kOctet, v);
    }
}

struct Grid {
    dim3 blocks;
    int64_t packed_bytes;
    bool empty, fits;

    explicit Grid(const PackedBitsArgs& args) {
        const int64_t panels = ceil_div(args.out_features, kPanel);
        const int64_t groups = args.in_features / args.group;
        blocks = {static_cast<unsigned>(panels), static_cast<unsigned>(groups)};
        packed_bytes = panels * groups * block_bytes(args);
        empty = panels == 0 || groups == 0;
        fits = panels <= kMaxGridX && groups <= 65535;
    }
};

}  // namespace

LaunchStatus launch_pack_weight(const PackedBitsArgs& args, void* stream) {
    const Grid grid(args);
    if (grid.empty) return 0;
    if (!grid.fits) return kInvalidValue;
    const int64_t size = element_size(args.dtype);
    LX_BUF_ROWS(args.weight, args.out_features, args.in_features * size, args.weight_stride * size,
                lx::Access::kConstant);
    LX_BUF(args.packed, grid.packed_bytes, lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return args.bits == 8
                   ? LX_LAUNCH((pack_weight_kernel<T, 8>), grid.blocks, kThreads, 0, stream, args)
                   : LX_LAUNCH((pack_weight_kernel<T, 4>), grid.blocks, kThreads, 0, stream, args);
    });
}

LaunchStatus launch_unpack_weight(const PackedBitsArgs& args, void* stream) {
    const Grid grid(args);
    if (grid.empty) return 0;
    if (!grid.fits) return kInvalidValue;
    LX_BUF(args.packed, grid.packed_bytes, lx::Access::kConstant);
    LX_BUF(args.weight, args.out_features * args.in_features * element_size(args.dtype),
           lx::Access::kWrite);
    return with_dtype(args.dtype, [&]<class T>() {
        return args.bits == 8
                   ? LX_LAUNCH((unpack_weight_kernel<T, 8>), grid.blocks, kThreads, 0, stream, args)
                   : LX_LAUNCH((unpack_weight_kernel<T, 4>), grid.blocks, kThreads, 0, stream,
                               args);
    });
}

}  // namespace lora_ext
