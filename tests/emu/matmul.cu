// Computes y = x w^T with cp.async, ldmatrix and mma. x (m, k) and w (n, k) are 16-bit, y (m, n) is
// float32. k must be a multiple of 8, so that a row consists of whole 16-byte chunks.
//
// A block of 4 warps computes 32 x 32 outputs, a warp 16 x 16. There are two stages of 32 columns.
#include "lx/device.h"

namespace {

constexpr int kTile = 32, kDepth = 32, kPad = 8, kRow = kDepth + kPad, kThreads = 128;

template <class T>
LX_DEVICE void load_tile(T* tile, const T* from, int64_t rows, int64_t k, int64_t row0,
                         int64_t k0) {
    const int r = static_cast<int>(threadIdx.x) / 4, c = static_cast<int>(threadIdx.x) % 4 * 8;
    const bool inside = row0 + r < rows && k0 + c < k;
    lx::cp_async<16>(&tile[r * kRow + c], inside ? from + (row0 + r) * k + k0 + c : from,
                     inside ? 16 : 0);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    matmul_kernel(const T* x, const T* w, float* y, int64_t m, int64_t n, int64_t k) {
    LX_SHARED(T, xs, 2 * kTile * kRow);
    LX_SHARED(T, ws, 2 * kTile * kRow);
    const int lane = lx::lane_id(), warp = lx::warp_id();
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
    const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
    const int wr = warp / 2 * 16, wc = warp % 2 * 16;
    float d[2][4] = {};

    const int steps = static_cast<int>((k + kDepth - 1) / kDepth);
    auto stage = [&](int step) {
        const int64_t k0 = static_cast<int64_t>(step) * kDepth;
        load_tile(xs + step % 2 * kTile * kRow, x, m, k, row0, k0);
        load_tile(ws + step % 2 * kTile * kRow, w, n, k, column0, k0);
        lx::cp_async_commit();
    };
    stage(0);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            stage(step + 1);
            lx::cp_async_wait_group<1>();
        } else {
            lx::cp_async_wait_group<0>();
        }
        lx::syncthreads();  // The copies of all threads for this stage are complete.
        const T* xt = xs + step % 2 * kTile * kRow;
        const T* wt = ws + step % 2 * kTile * kRow;
        for (int k0 = 0; k0 < kDepth; k0 += 16) {
            uint32_t a[4], b[4];
            // Matrices 0 to 3 of A start at rows +0, +8, +0, +8 and columns +0, +0, +8, +8.
            lx::ldmatrix_x4(a, &xt[(wr + lane % 16) * kRow + k0 + lane / 16 * 8]);
            // Those of B start at columns (rows of w) +0, +0, +8, +8 and at k +0, +8, +0, +8.
            lx::ldmatrix_x4(b, &wt[(wc + lane / 16 * 8 + lane % 8) * kRow + k0 + lane / 8 % 2 * 8]);
            for (int half = 0; half < 2; ++half) {
                const uint32_t bh[2] = {b[2 * half], b[2 * half + 1]};
                lx::mma_m16n8k16<T>(d[half], a, bh);
            }
        }
        lx::syncthreads();  // All threads have read the stage, so it may be refilled.
    }
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + wr + lane / 4 + i / 2 * 8;
            const int64_t column = column0 + wc + half * 8 + lane % 4 * 2 + i % 2;
            if (row < m && column < n) y[row * n + column] = d[half][i];
        }
    }
}

// The same product in tf32. A warp computes 16 x 8 outputs and loads operands from global memory.
__global__ void __launch_bounds__(32)
    matmul_tf32_kernel(const float* x, const float* w, float* y, int64_t m, int64_t n, int64_t k) {
    const int g = lx::lane_id() / 4, t = lx::lane_id() % 4;
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * 16;
    const int64_t column0 = static_cast<int64_t>(blockIdx.x) * 8;
    auto at = [&](const float* p, int64_t rows, int64_t row, int64_t column) {
        return lx::to_tf32(row < rows && column < k ? p[row * k + column] : 0.0f);
    };
    float d[4] = {};
    for (int64_t k0 = 0; k0 < k; k0 += 8) {
        const uint32_t a[4] = {at(x, m, row0 + g, k0 + t), at(x, m, row0 + g + 8, k0 + t),
                               at(x, m, row0 + g, k0 + t + 4), at(x, m, row0 + g + 8, k0 + t + 4)};
        const uint32_t b[2] = {at(w, n, column0 + g, k0 + t), at(w, n, column0 + g, k0 + t + 4)};
        lx::mma_m16n8k8_tf32(d, a, b);
    }
    for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + g + i / 2 * 8, column = column0 + t * 2 + i % 2;
        if (row < m && column < n) y[row * n + column] = d[i];
    }
}

template <class T>
int matmul(const T* x, const T* w, float* y, int64_t m, int64_t n, int64_t k) {
    LX_BUF(x, m * k * sizeof(T), lx::Access::kRead);
    LX_BUF(w, n * k * sizeof(T), lx::Access::kRead);
    LX_BUF(y, m * n * sizeof(float), lx::Access::kWrite);
    if constexpr (std::is_same_v<T, float>) {
        const dim3 grid(static_cast<unsigned>((n + 7) / 8), static_cast<unsigned>((m + 15) / 16));
        return LX_LAUNCH(matmul_tf32_kernel, grid, 32, 0, nullptr, x, w, y, m, n, k);
    } else {
        const dim3 grid(static_cast<unsigned>((n + kTile - 1) / kTile),
                        static_cast<unsigned>((m + kTile - 1) / kTile));
        return LX_LAUNCH(matmul_kernel<T>, grid, kThreads, 0, nullptr, x, w, y, m, n, k);
    }
}

}  // namespace

#define LX_EXPORT extern "C" __attribute__((visibility("default")))

LX_EXPORT int matmul_bf16(const lx::bf16* x, const lx::bf16* w, float* y, int64_t m, int64_t n,
                          int64_t k) {
    return matmul(x, w, y, m, n, k);
}
LX_EXPORT int matmul_f16(const lx::f16* x, const lx::f16* w, float* y, int64_t m, int64_t n,
                         int64_t k) {
    return matmul(x, w, y, m, n, k);
}
LX_EXPORT int matmul_tf32(const float* x, const float* w, float* y, int64_t m, int64_t n,
                          int64_t k) {
    return matmul(x, w, y, m, n, k);
}
