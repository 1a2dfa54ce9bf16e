// Code shared by the circuit kernels of the training path, in addition to the walk: stores of rows
// of logits, and declarations of buffers.
#pragma once

#include "circuit_walk.cuh"
#include "launch.cuh"

namespace lora_ext {

// Stores the first n values of a piece, each rounded once. If `aligned`, the piece is whole and is
// stored in one access.
template <class T>
LX_DEVICE void store_values(T* p, int n, bool aligned, const float (&v)[kPiece<T>]) {
    if (aligned) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 2) {
                w[i] = lx::pack_floats<T>(v[2 * i], v[2 * i + 1]);
            } else {
                w[i] = lx::bit_cast<uint32_t>(v[i]);
            }
        }
        *reinterpret_cast<uint4*>(p) = {w[0], w[1], w[2], w[3]};
    } else {
#pragma unroll
        for (int j = 0; j < kPiece<T>; ++j)
            if (j < n) p[j] = lx::from_float<T>(v[j]);
    }
}

// Declares the rows of a batch; a stride of 0 means one row for the whole batch.
inline void declare_batch([[maybe_unused]] const void* p, [[maybe_unused]] int64_t rows,
                          [[maybe_unused]] int64_t row_bytes, [[maybe_unused]] int64_t stride_bytes,
                          [[maybe_unused]] lx::Access access) {
    LX_BUF_ROWS(p, stride_bytes == 0 ? 1 : rows, row_bytes, stride_bytes, access);
}

}  // namespace lora_ext
