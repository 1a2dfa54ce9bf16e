// One micro-kernel per wrapper of lx/device.h: a warp feeds it fixed inputs and dumps every
// register. The emulator's dump is compared with formulas (test_wrappers.py), a GPU's dump with
// tests/golden (tools/wrapper_goldens.py).
//
// `in`: 4096 32-bit words, `out`: 4096. On a GPU both are device memory.
#include "lx/device.h"
#include "lx/pairs.h"

namespace {

constexpr int kWords = 4096;

// Shared memory holds in[0 .. 255]: 32 rows of 8 16-bit elements.
template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
    LX_SHARED(uint32_t, s, 128);
    const int lane = lx::lane_id();
    for (int i = lane; i < 128; i += 32) s[i] = in[i];
    lx::syncwarp();
    const uint32_t* row = &s[lane % (8 * kMatrices) * 4];
    uint32_t r[kMatrices];
    if constexpr (kMatrices == 1) {
        kTransposed ? lx::ldmatrix_x1_trans(r, row) : lx::ldmatrix_x1(r, row);
    } else if constexpr (kMatrices == 2) {
        kTransposed ? lx::ldmatrix_x2_trans(r, row) : lx::ldmatrix_x2(r, row);
    } else {
        kTransposed ? lx::ldmatrix_x4_trans(r, row) : lx::ldmatrix_x4(r, row);
    }
    for (int i = 0; i < kMatrices; ++i) out[lane * kMatrices + i] = r[i];
}

// `in` contains registers, lane by lane: in [0, 128) those of A, in [128, 192) those of B, and in
// [192, 320) those of the accumulator.
template <class T>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = lx::lane_id();
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = in[lane * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = in[128 + lane * 2 + i];
    for (int i = 0; i < 4; ++i) d[i] = lx::bit_cast<float>(in[192 + lane * 4 + i]);
    if constexpr (std::is_same_v<T, float>) {
        lx::mma_m16n8k8_tf32(d, a, b);
    } else {
        lx::mma_m16n8k16<T>(d, a, b);
    }
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = lx::bit_cast<uint32_t>(d[i]);
}

// Lane L copies the first L % (kBytes + 1) bytes of its chunk and zeros the rest.
template <int kBytes>
__global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
    LX_SHARED(uint32_t, s, 32 * kBytes / 4);
    const int lane = lx::lane_id();
    lx::cp_async<kBytes>(&s[lane * kBytes / 4], &in[lane * kBytes / 4], lane % (kBytes + 1));
    lx::cp_async_commit();
    lx::cp_async_wait_group<0>();
    for (int i = 0; i < kBytes / 4; ++i) {
        out[lane * kBytes / 4 + i] = s[lane * kBytes / 4 + i];
    }
}

__global__ void shuffle_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = lx::lane_id();
    const uint32_t x = in[lane];
    int column = 0;
    auto put = [&](uint32_t value) { out[column++ * 32 + lane] = value; };
    for (int width = 8; width <= 32; width *= 2) {
        put(lx::shfl_sync(lx::kFullMask, x, lane * 3 + 1, width));
        put(lx::shfl_up_sync(lx::kFullMask, x, 3, width));
        put(lx::shfl_down_sync(lx::kFullMask, x, 3, width));
        put(lx::shfl_xor_sync(lx::kFullMask, x, 9, width));
    }
}

__global__ void vote_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = lx::lane_id();
    const uint32_t x = in[lane], few = x % 5;
    int column = 0;
    auto put = [&](uint32_t value) { out[column++ * 32 + lane] = value; };
    put(lx::ballot_sync(lx::kFullMask, few < 2));
    put(lx::any_sync(lx::kFullMask, few == 7));
    put(lx::all_sync(lx::kFullMask, few < 5));
    put(lx::match_any_sync(lx::kFullMask, few));
    put(lx::reduce_add_sync(lx::kFullMask, x));
    put(lx::reduce_min_sync(lx::kFullMask, x));
    put(lx::reduce_max_sync(lx::kFullMask, x));
    put(static_cast<uint32_t>(lx::reduce_min_sync(lx::kFullMask, static_cast<int32_t>(x))));
    put(lx::reduce_and_sync(lx::kFullMask, x | 0xffff0000u));
    put(lx::reduce_or_sync(lx::kFullMask, x & 0xffffu));
    put(lx::reduce_xor_sync(lx::kFullMask, x));
}

__global__ void bits_kernel(const uint32_t* in, uint32_t* out) {
    const int lane = lx::lane_id();
    const uint32_t x = in[lane], y = in[32 + lane];
    int column = 0;
    auto put = [&](uint32_t value) { out[column++ * 32 + lane] = value; };
    put(static_cast<uint32_t>(lx::popc(x)));
    put(static_cast<uint32_t>(lx::ffs(x)));
    put(static_cast<uint32_t>(lx::clz(x)));
    put(lx::brev(x));
    put(lx::funnel_shift_left(x, y, 7));
    put(lx::funnel_shift_right(x, y, 7));
    const float f = static_cast<float>(static_cast<int32_t>(x)) * 0x1p-20f;
    put(lx::to_tf32(f));
    put(lx::pack_floats<lx::bf16>(f, -f));
    put(lx::pack_floats<lx::f16>(f, -f));
    put(lx::byte_permute(x, y, 0x5140));
    put(lx::byte_permute(x, y, 0x2763));
    const uint32_t u = x & 0xbfffbfffu, v = y & 0xbfffbfffu;  // finite
    put(lx::subtract_pairs<lx::bf16>(u, v));
    put(lx::subtract_pairs<lx::f16>(u, v));
}

// Exponentials of the words as integers times 2^-24: from -128 to -64, and from 0 to 64.
__global__ void exp_kernel(const uint32_t* in, uint32_t* out) {
    for (int i = lx::lane_id(); i < 512; i += 32) {
        const float x = static_cast<float>(static_cast<int32_t>(in[i])) * 0x1p-24f;
        out[i] = lx::bit_cast<uint32_t>(lx::exp_approx(x));
    }
}

using Kernel = void (*)(const uint32_t*, uint32_t*);
struct Entry {
    const char* name;
    Kernel kernel;
};
const Entry kEntries[] = {
    {"ldmatrix_x1", ldmatrix_kernel<1, false>},
    {"ldmatrix_x2", ldmatrix_kernel<2, false>},
    {"ldmatrix_x4", ldmatrix_kernel<4, false>},
    {"ldmatrix_x1_trans", ldmatrix_kernel<1, true>},
    {"ldmatrix_x2_trans", ldmatrix_kernel<2, true>},
    {"ldmatrix_x4_trans", ldmatrix_kernel<4, true>},
    {"mma_bf16", mma_kernel<lx::bf16>},
    {"mma_f16", mma_kernel<lx::f16>},
    {"mma_tf32", mma_kernel<float>},
    {"cp_async_4", cp_async_kernel<4>},
    {"cp_async_8", cp_async_kernel<8>},
    {"cp_async_16", cp_async_kernel<16>},
    {"shuffle", shuffle_kernel},
    {"vote", vote_kernel},
    {"bits", bits_kernel},
    {"exp", exp_kernel},
};

}  // namespace

#define LX_EXPORT extern "C" __attribute__((visibility("default")))

LX_EXPORT const char* wrapper_name(int64_t index) {
    constexpr int64_t kCount = sizeof(kEntries) / sizeof(kEntries[0]);
    return index < kCount ? kEntries[index].name : nullptr;
}
LX_EXPORT int wrapper(int64_t index, const uint32_t* in, uint32_t* out) {
    LX_BUF(in, kWords * 4, lx::Access::kRead);
    LX_BUF(out, kWords * 4, lx::Access::kWrite);
    return LX_LAUNCH(kEntries[index].kernel, 1, 32, 0, nullptr, in, out);
}

#ifndef LX_EMULATE
// Like `wrapper`, but with `in` and `out` in host memory, for tools/wrapper_goldens.py. Other
// functions of this file do not call the CUDA runtime, except wrapper_device.
LX_EXPORT int wrapper_on_device(int64_t index, const uint32_t* in, uint32_t* out) {
    uint32_t* memory = nullptr;
    int error = cudaMalloc(&memory, 2 * kWords * 4);
    if (error != 0) return error;
    cudaMemcpy(memory, in, kWords * 4, cudaMemcpyHostToDevice);
    cudaMemset(memory + kWords, 0, kWords * 4);
    error = wrapper(index, memory, memory + kWords);
    if (error == 0) error = cudaMemcpy(out, memory + kWords, kWords * 4, cudaMemcpyDeviceToHost);
    cudaFree(memory);
    return error;
}
LX_EXPORT const char* wrapper_device(int* devices) {
    static cudaDeviceProp properties;
    if (cudaGetDeviceCount(devices) != cudaSuccess || *devices == 0) return "no CUDA device";
    cudaGetDeviceProperties(&properties, 0);
    return properties.name;
}
#endif
