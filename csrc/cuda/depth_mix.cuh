// Code shared by the kernels of mixes: the elements of a row that a thread holds, sums over a
// block, and declarations of buffers.
#pragma once

#include "circuit_kernels.cuh"  // pieces of 16 bytes
#include "lora_ext/depth_mix.h"

namespace lora_ext {

constexpr int kMixThreads = 512;  // threads of the largest block
constexpr int kHeld = 2;          // pieces of 16 bytes of a row per thread
constexpr int kMixWarps = kMixThreads / lx::kWarpSize;

// Sums over a block, in a fixed order, returned to every thread. Calls alternate between two
// buffers. Each call therefore needs only one barrier: before a buffer is reused, the barrier of
// the call in between has ensured that all threads have read it.
template <int kMost>
class BlockSums {
  public:
    static constexpr int kScratch = 2 * kMost * kMixWarps;
    LX_DEVICE explicit BlockSums(float* scratch) : scratch_(scratch) {}

    template <int kCount>
    LX_DEVICE void add_up(float (&v)[kCount]) {
        static_assert(kCount <= kMost);
        float* const mine = scratch_ + turn_ * kMost * kMixWarps;
        turn_ ^= 1;
        const int warps = static_cast<int>(blockDim.x) / lx::kWarpSize;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            v[i] = WarpTeam(nullptr).reduce(v[i], add);
            if (lx::lane_id() == 0) mine[i * kMixWarps + lx::warp_id()] = v[i];
        }
        lx::syncthreads();
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float* const from = mine + i * kMixWarps;
            v[i] = from[0];
            if (warps % 4 == 0) {
#pragma unroll 1
                for (int w = 0; w < warps; w += 4) {
                    const float4 four = *reinterpret_cast<const float4*>(from + w);
                    v[i] = w == 0 ? four.x : v[i] + four.x;
                    v[i] += four.y;
                    v[i] += four.z;
                    v[i] += four.w;
                }
            } else {
#pragma unroll 1
                for (int w = 1; w < warps; ++w) v[i] += from[w];
            }
        }
    }
    LX_DEVICE float add_up(float v) {
        float one[1] = {v};
        add_up(one);
        return one[0];
    }

  private:
    float* scratch_;
    int turn_ = 0;
};

// The elements of a row that this thread holds: pieces `rank` and `rank + threads`. If a piece is
// beyond the row, the thread loads the row's last piece instead, and uses zeros.
template <class T>
struct Columns {
    int width;

    LX_DEVICE int at(int i) const {
        return (lx::thread_rank() + i * static_cast<int>(blockDim.x)) * kPiece<T>;
    }
    LX_DEVICE bool has(int i) const { return at(i) < width; }
    LX_DEVICE int reading(int i) const { return lx::min(at(i), width - kPiece<T>); }
};

// The thread's pieces of a row, not yet converted to float.
template <class T>
struct Pieces {
    uint4 words[kHeld];

    LX_DEVICE void load(const T* row, const Columns<T>& columns) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            words[i] = lx::load_global(reinterpret_cast<const uint4*>(row + columns.reading(i)));
    }
    LX_DEVICE void unpack(int i, const Columns<T>& columns, float (&v)[kPiece<T>]) const {
        unpack_piece<T>(words[i], v);
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j) v[j] = columns.has(i) ? v[j] : 0.0f;
    }
};

// The thread's elements of gamma or beta. G is their type: T or, if T has 16 bits, also float.
template <class T, class G>
struct Scales {
    static constexpr int kWords = kPiece<T> / kPiece<G>;
    uint4 words[kHeld][kWords];

    LX_DEVICE void load(const void* vector, const Columns<T>& columns) {
        const G* const from = static_cast<const G*>(vector);
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
#pragma unroll
            for (int w = 0; w < kWords; ++w)
                words[i][w] = lx::load_global(
                    reinterpret_cast<const uint4*>(from + columns.reading(i) + w * kPiece<G>));
    }
    LX_DEVICE void unpack(int i, float (&v)[kPiece<T>]) const {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            float part[kPiece<G>];
            unpack_piece<G>(words[i][w], part);
#pragma unroll
            for (int j = 0; j < kPiece<G>; ++j) v[w * kPiece<G> + j] = part[j];
        }
    }
};

template <class T>
LX_DEVICE const T* hidden_row(const DepthMixArgs& args, int e, int64_t row) {
    return static_cast<const T*>(args.hidden[e]) + row * args.hidden_stride[e];
}
template <class T>
LX_DEVICE const T* dmixed_row(const DepthMixArgs& args, int64_t row) {
    return static_cast<const T*>(args.dmixed) + row * args.width;
}
// Returns entry (row, e) of `numbers`, an array (N, k) of floats.
LX_DEVICE float& number_of(const DepthMixArgs& args, const void* numbers, int64_t row, int e) {
    return static_cast<float*>(const_cast<void*>(numbers))[row * args.depths + e];
}
LX_DEVICE float mean_of(const DepthMixArgs& args, int64_t row, int e) {
    return args.layer ? number_of(args, args.mean, row, e) : 0.0f;
}
LX_DEVICE const float* router_row(const DepthMixArgs& args, int e) {
    return static_cast<const float*>(args.router) + e * args.width;
}
// Loads the router's entries for the piece of T that starts at `column`.
template <class T>
LX_DEVICE void load_router(const DepthMixArgs& args, int e, int column, float (&v)[kPiece<T>]) {
    const auto* const from = reinterpret_cast<const uint4*>(router_row(args, e) + column);
#pragma unroll
    for (int w = 0; w < kPiece<T> / 4; ++w) {
        const uint4 words = lx::load_global(from + w);
        v[4 * w] = lx::bit_cast<float>(words.x);
        v[4 * w + 1] = lx::bit_cast<float>(words.y);
        v[4 * w + 2] = lx::bit_cast<float>(words.z);
        v[4 * w + 3] = lx::bit_cast<float>(words.w);
    }
}

// Calls f<T, G>(), where T is the type of hidden states and G the type of gammas and betas.
template <class F>
LaunchStatus with_mix_types(const DepthMixArgs& args, F&& f) {
    return with_dtype(args.dtype, [&]<class T>() {
        if (args.wide_scales) return f.template operator()<T, float>();
        return f.template operator()<T, T>();
    });
}

// Returns whether a block can hold its row in registers: the row must consist of whole, aligned
// pieces, at most kHeld per thread.
inline bool row_is_held(const DepthMixArgs& args) {
    const int64_t size = element_size(args.dtype), piece = 16 / size;
    bool held = args.width % piece == 0 && args.width <= kMixThreads * kHeld * piece &&
                aligned_16(args.mixed, {}, 1) && aligned_16(args.dmixed, {}, 1) &&
                aligned_16(args.router, {}, 1);
    for (int e = 0; e < args.depths; ++e)
        held = held && aligned_16(args.hidden[e], {args.hidden_stride[e]}, size) &&
               aligned_16(args.gamma[e], {}, 1) && aligned_16(args.beta[e], {}, 1) &&
               aligned_16(args.dhidden[e], {}, 1);
    return held;
}
// Returns the number of threads of a block that holds its row.
inline unsigned mix_threads(const DepthMixArgs& args) {
    const int64_t held = kHeld * 16 / element_size(args.dtype);
    return static_cast<unsigned>(ceil_div(ceil_div(args.width, held), lx::kWarpSize) *
                                 lx::kWarpSize);
}

// Declares to the emulator the buffers that all kernels of mixes read.
inline void declare_mix(const DepthMixArgs& args) {
    const int64_t size = element_size(args.dtype);
    [[maybe_unused]] const int64_t scale = args.wide_scales ? 4 : size;
    for (int e = 0; e < args.depths; ++e) {
        declare_batch(args.hidden[e], args.rows, args.width * size, args.hidden_stride[e] * size,
                      lx::Access::kRead);
        LX_BUF(args.gamma[e], args.width * scale, lx::Access::kRead);
        if (args.beta[e]) LX_BUF(args.beta[e], args.width * scale, lx::Access::kRead);
    }
    if (args.router) LX_BUF(args.router, args.depths * args.width * 4, lx::Access::kRead);
}
inline void declare_numbers(const DepthMixArgs& args, const void* numbers, lx::Access access) {
    if (numbers) LX_BUF(numbers, args.rows * args.depths * 4, access);
}

}  // namespace lora_ext
