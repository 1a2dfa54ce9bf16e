// out[b] = sum of the 256 values of block b, computed with shared memory, then with shuffles.
#include "lx/device.h"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    reduction_kernel(const float* x, int64_t n, float* out) {
    LX_SHARED(float, partial, kThreads);
    const int t = static_cast<int>(threadIdx.x);
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + t;
    partial[t] = i < n ? x[i] : 0.0f;
    lx::syncthreads();
    for (int half = kThreads / 2; half >= lx::kWarpSize; half /= 2) {
        if (t < half) partial[t] += partial[t + half];
        lx::syncthreads();
    }
    if (t < lx::kWarpSize) {
        float sum = partial[t];
        for (int step = lx::kWarpSize / 2; step > 0; step /= 2) {
            sum += lx::shfl_down_sync(lx::kFullMask, sum, step);
        }
        if (t == 0) out[blockIdx.x] = sum;
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int reduction(const float* x, int64_t n,
                                                                float* out) {
    const int64_t blocks = (n + kThreads - 1) / kThreads;
    LX_BUF(x, n * sizeof(float), lx::Access::kRead);
    LX_BUF(out, blocks * sizeof(float), lx::Access::kWrite);
    return LX_LAUNCH(reduction_kernel, static_cast<unsigned>(blocks), kThreads, 0, nullptr, x, n,
                     out);
}
