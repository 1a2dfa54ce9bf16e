// Adds the partial sums of ranges of rows, which lora_train_weights.cu computes. Bound: bytes of
// the partial sums.
#include "lora_train_weights.cuh"

namespace lora_ext {
namespace {

// Adds the ranges of each adapter that has several ranges, one band of 128 columns per block.
template <class T, int kPages>
__global__ void __launch_bounds__(kGradientThreads, 3)
    lora_train_weights_reduce_kernel(const __grid_constant__ Gradient args,
                                     const __grid_constant__ GradientShape shape) {
    LX_DYN_SHARED(columns);
    const int band = static_cast<int>(blockIdx.x % kGradientBands<T>);
    const unsigned index = blockIdx.x / kGradientBands<T>;
    const GradientBlock block = find_block<T, kPages>(args, shape, index, false);
    if (block.num_rows <= shape.range_rows || block.ranks == 0) return;
    const int pages = (block.ranks + 15) / 16 * 2;
    const int ranges = (block.num_rows + shape.range_rows - 1) / shape.range_rows;
    const int64_t tiles = int64_t{shape.slices} * shape.groups;
    const float4* from = parts_of<T, kPages>(shape, block, index % static_cast<unsigned>(tiles)) +
                         band * kPages * kGradientThreads;
    const int64_t stride = tiles * (kGradientBands<T> * kPages * kGradientThreads);
    // Eight loads are in flight together. Instead of a missing page or range, another one is
    // loaded, and its value is not used.
    constexpr int kBatch = 8 / kPages;
    BandSums<kPages> total = {};
#pragma unroll 1
    for (int first = 0; first < ranges; first += kBatch) {
        float4 part[kBatch][kPages];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
#pragma unroll
            for (int j = 0; j < kPages; ++j)
                part[k][j] = from[lx::min(first + k, ranges - 1) * stride +
                                  (kPages == 2 || j < pages ? j : 0) * kGradientThreads];
        }
        lx::syncwarp();  // keeps the compiler from moving loads down
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
#pragma unroll
            for (int j = 0; j < kPages; ++j) {
                if (first + k >= ranges || (kPages > 2 && j >= pages)) continue;
                total[j][0] += part[k][j].x;
                total[j][1] += part[k][j].y;
                total[j][2] += part[k][j].z;
                total[j][3] += part[k][j].w;
            }
        }
    }
    store_band<T, kPages>(args, block, band, total, reinterpret_cast<float*>(columns));
}

}  // namespace

LaunchStatus add_ranges(const Gradient& args, const GradientShape& shape, void* stream) {
    const int64_t tiles = int64_t{shape.slices} * shape.groups;
    return with_pages(args, [&]<class T, int kPages>() {
        const unsigned grid = static_cast<unsigned>(tiles * args.num_adapters * kGradientBands<T>);
        return LX_LAUNCH((lora_train_weights_reduce_kernel<T, kPages>), grid, kGradientThreads,
                         kGradientBand * store_row(kPages) * 4, stream, args, shape);
    });
}

}  // namespace lora_ext
