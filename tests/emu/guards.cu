// Kernels for testing the emulator's checks. Each has a correct form and a form with a mistake.
// test_guards.py names the check that must report the mistake; the correct form has no report.
#include "lx/resident.h"

namespace {

constexpr int kCount = 1024;  // elements of `in` and `out`

// A pipeline of cp.async over four tiles, in which each of these mistakes can be made.
enum class Mistake { kNone, kWaitOneFewer, kNoBarrierAfterWait, kNoBarrierBeforeRefill, kNoCommit };

template <Mistake kMistake>
__global__ void pipeline_kernel(const float* in, float* out) {
    constexpr int kTile = 256;
    LX_SHARED(float, tile, 2 * kTile);
    const int t = static_cast<int>(threadIdx.x);  // 64 threads, 4 floats each
    auto stage = [&](int step) {
        lx::cp_async<16>(&tile[step % 2 * kTile + 4 * t], &in[step * kTile + 4 * t]);
        if (kMistake != Mistake::kNoCommit || step < 3) lx::cp_async_commit();
    };
    stage(0);
    for (int step = 0; step < 4; ++step) {
        if (step < 3) stage(step + 1);
        if (kMistake == Mistake::kWaitOneFewer || (step < 3 && kMistake != Mistake::kNoCommit)) {
            lx::cp_async_wait_group<1>();
        } else {
            lx::cp_async_wait_group<0>();
        }
        if (kMistake != Mistake::kNoBarrierAfterWait) lx::syncthreads();
        if (kMistake != Mistake::kNoCommit || step < 3) {
            const float* s = tile + step % 2 * kTile;
            for (int i = 0; i < 4; ++i) out[step * kTile + 4 * t + i] = s[kTile - 1 - (4 * t + i)];
        }
        if (kMistake != Mistake::kNoBarrierBeforeRefill) lx::syncthreads();
    }
}

template <bool kBroken>
__global__ void partial_sums_kernel(const float* in, float* out) {
    LX_SHARED(float, partial, 2);
    float sum = in[threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += lx::shfl_xor_sync(lx::kFullMask, sum, step);
    if (lx::lane_id() == 0) partial[lx::warp_id()] = sum;
    if (!kBroken) lx::syncthreads();
    if (threadIdx.x == 0) out[0] = partial[0] + partial[1];
}

// Writes a 7 x 9 matrix with a row stride of 16. Mistakes: one more column or row.
template <bool kBroken>
__global__ void column_guard_kernel(const float* in, float* out) {
    const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
    if (row < 7 && column < 9 + kBroken) out[row * 16 + column] = in[0];
}
template <bool kBroken>
__global__ void row_guard_kernel(const float* in, float* out) {
    const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
    if (row < 7 + kBroken && column < 9) out[row * 16 + column] = in[0];
}

template <bool kBroken>
__global__ void blocks_share_a_counter_kernel(const float*, float* out) {
    auto* counter = reinterpret_cast<int*>(out);
    if (threadIdx.x != 0) return;
    if (kBroken) {
        *counter += 1;
    } else {
        lx::atomic_add(counter, 1);
    }
}

template <bool kBroken>
__global__ void neighbour_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 32);
    const int t = static_cast<int>(threadIdx.x);
    s[t] = in[t];
    if (!kBroken) lx::syncwarp();
    out[t] = s[t ^ 1];
}

// Two half warps, each with its own syncwarp: it does not order lanes of different halves.
template <bool kBroken>
__global__ void half_warp_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 32);
    const int t = static_cast<int>(threadIdx.x);
    s[t] = in[t];
    lx::syncwarp(t < 16 ? 0xffffu : 0xffff0000u);
    out[t] = s[kBroken ? 31 - t : t ^ 15];
}

template <bool kBroken>
__global__ void shared_past_end_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 32);
    const int t = static_cast<int>(threadIdx.x);
    s[t + kBroken] = in[t];
    out[t] = s[t + kBroken];
}

template <bool kBroken>
__global__ void divergent_barrier_kernel(const float* in, float* out) {
    if (kBroken && threadIdx.x < 16) {
        lx::syncthreads();
    } else {
        lx::syncthreads();
    }
    out[threadIdx.x] = in[threadIdx.x];
}

template <bool kBroken>
__global__ void mixed_collectives_kernel(const float*, float* out) {
    unsigned x = 0;
    if (!kBroken || threadIdx.x < 16) {
        x = lx::shfl_xor_sync(lx::kFullMask, 1u, 1);
    } else {
        x = lx::ballot_sync(lx::kFullMask, true);
    }
    out[threadIdx.x] = static_cast<float>(x);
}

template <bool kBroken>
__global__ void misaligned_kernel(const float* in, float* out) {
    const float4 x = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + (kBroken ? 2 : 0));
    out[threadIdx.x] = x.x + x.y + x.z + x.w;
}

template <bool kBroken>
__global__ void read_only_kernel(const float* in, float* out) {
    float* target = kBroken ? const_cast<float*>(in) : out;
    target[threadIdx.x] = 1;
}

template <bool kBroken>
__global__ void unwritten_shared_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 32);
    if (!kBroken || threadIdx.x != 7) s[threadIdx.x] = in[threadIdx.x];
    lx::syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}

template <bool kBroken>  // `out` is declared as kWrite, so its old values must not be read
__global__ void unwritten_output_kernel(const float* in, float* out) {
    if (!kBroken) out[threadIdx.x] = 0;
    out[threadIdx.x] += in[threadIdx.x];
}

// Warp 0 writes and warp 1 reads. The mistake: the barrier waits for 96 threads, not 64.
template <bool kBroken>
__global__ void named_barrier_count_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 32);
    const int lane = lx::lane_id(), threads = kBroken ? 96 : 64;
    if (lx::warp_id() == 0) {
        s[lane] = in[lane];
        lx::bar_arrive(1, threads);
    } else {
        lx::bar_sync(1, threads);
        out[lane] = s[31 - lane];
    }
}
template <bool kBroken>  // mistake: warp 0 writes again before warp 1 has read
__global__ void named_barrier_refill_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 32);
    const int lane = lx::lane_id();
    if (lx::warp_id() == 0) {
        s[lane] = in[lane];
        lx::bar_arrive(1, 64);
        if (!kBroken) lx::bar_sync(2, 64);
        s[lane] = in[lane];
    } else {
        lx::bar_sync(1, 64);
        out[lane] = s[31 - lane];
        if (!kBroken) lx::bar_arrive(2, 64);
    }
}

template <bool kBroken>
__global__ void read_before_wait_kernel(const float* in, float* out) {
    float x = 0;
    if (kBroken) x = in[threadIdx.x];
    if (threadIdx.x == 0) lx::grid_dependency_wait();
    lx::syncthreads();  // thread 0 has waited for the previous kernel
    out[threadIdx.x] = x + in[threadIdx.x];
}
template <bool kBroken>
__global__ void never_waits_kernel(const float*, float*) {
    if (!kBroken) lx::grid_dependency_wait();
}

// The last block to finish adds the numbers written by all blocks.
template <bool kBroken>
__global__ void last_block_kernel(const float* in, float* out) {
    LX_SHARED(int, is_last, 1);
    if (threadIdx.x == 0) {
        out[1 + blockIdx.x] = in[blockIdx.x];
        if (!kBroken) lx::fence_device();
        const int before = lx::atomic_add(reinterpret_cast<int*>(out), 1);
        lx::fence_device();
        is_last[0] = before == static_cast<int>(gridDim.x) - 1;
    }
    lx::syncthreads();
    if (is_last[0] && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) sum += lx::load_l2(&out[1 + b]);
        out[1 + gridDim.x] = sum;
    }
}

// Concurrent blocks: in each of two rounds, every block reads its neighbour's number.
enum class Handing { kRight, kUnfenced, kUnread, kOneTooFew, kOneTooMany };

template <Handing kHanding>
__global__ void hand_on_kernel(const float* in, float* out) {
    auto* counter = reinterpret_cast<unsigned*>(out);
    float own = in[blockIdx.x];
    for (unsigned round = 1; round <= 2; ++round) {
        float* numbers = out + 1 + (round - 1) * gridDim.x;
        if (threadIdx.x == 40) numbers[blockIdx.x] = own;
        lx::syncthreads();
        if (threadIdx.x == 0) {
            if (kHanding != Handing::kUnfenced) lx::fence_device();
            lx::atomic_add(counter, 1u);
            lx::wait_at_least(counter, round * gridDim.x + (kHanding == Handing::kOneTooMany) -
                                           (kHanding == Handing::kOneTooFew));
            if (kHanding != Handing::kUnread) lx::fence_device();
        }
        lx::syncthreads();
        own = numbers[(blockIdx.x + 1) % gridDim.x] + 1;
    }
    if (threadIdx.x == 7) out[1 + 2 * gridDim.x + blockIdx.x] = own;
}

template <bool kBroken>
__global__ void too_much_shared_kernel(const float* in, float* out) {
    LX_SHARED(float, a, 8192);
    LX_SHARED(float, b, kBroken ? 4097 : 4096);
    a[threadIdx.x] = b[threadIdx.x] = in[0];
    out[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}

struct Large {
    float x[64];
};
template <bool kBroken>  // the compiler turns this copy into a call of memcpy
__global__ void struct_copy_kernel(const float* in, float* out) {
    const auto* from = reinterpret_cast<const Large*>(in + (kBroken ? kCount - 63 : kCount - 64));
    *reinterpret_cast<Large*>(out) = *from;
}

template <bool kBroken>
__global__ void ldmatrix_row_kernel(const float* in, float* out) {
    LX_SHARED(float, s, 64);
    s[threadIdx.x] = s[threadIdx.x + 32] = in[threadIdx.x];
    lx::syncwarp();
    uint32_t r[1];
    lx::ldmatrix_x1(r, &s[threadIdx.x % 8 * 4 + (kBroken ? 2 : 0)]);
    out[threadIdx.x] = lx::bit_cast<float>(r[0]);
}

template <bool kBroken>
__global__ void deep_stack_kernel(const float* in, float* out) {
    volatile float deep[kBroken ? 14000 : 16];
    deep[threadIdx.x % 16] = in[0];
    auto use = [&](int i) __attribute__((noinline)) { return deep[i]; };
    out[threadIdx.x] = use(static_cast<int>(threadIdx.x) % 16);
}

template <bool kBroken>
__global__ void trap_kernel(const float*, float*) {
    if (kBroken) lx::trap();
}

// The registers of A are swapped. No check reports this; only the results are wrong.
template <bool kBroken>
__global__ void swapped_registers_kernel(const float* in, float* out) {
    uint32_t a[4], b[2] = {lx::bit_cast<uint32_t>(in[0]), lx::bit_cast<uint32_t>(in[0])};
    for (int i = 0; i < 4; ++i) a[i] = lx::bit_cast<uint32_t>(in[4 * threadIdx.x + i]);
    if (kBroken) {
        const uint32_t swap = a[1];
        a[1] = a[2];
        a[2] = swap;
    }
    float d[4] = {};
    lx::mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}

using Kernel = void (*)(const float*, float*);

struct Shape {
    unsigned grid = 1, block = 32;
    bool dependent = false, resident = false;
    lx::Access out = lx::Access::kReadWrite;
    int rows = 1, row = kCount, stride = kCount;
};

int run(Kernel kernel, const float* in, float* out, const Shape& s) {
    LX_BUF(in, kCount * sizeof(float), lx::Access::kRead);
    LX_BUF_ROWS(out, s.rows, s.row * sizeof(float), s.stride * sizeof(float), s.out);
    if (s.resident) return LX_LAUNCH_RESIDENT(kernel, s.grid, s.block, 0, nullptr, in, out);
    return s.dependent ? LX_LAUNCH_PDL(kernel, s.grid, s.block, 0, nullptr, in, out)
                       : LX_LAUNCH(kernel, s.grid, s.block, 0, nullptr, in, out);
}

}  // namespace

// Waits before it lets the next kernel start, unless it is broken.
template <bool kBroken>
__global__ void release_kernel(float* data) {
    if (kBroken) lx::grid_dependency_launch();
    lx::grid_dependency_wait();
    if (!kBroken) lx::grid_dependency_launch();
    data[threadIdx.x] += 1;
}

// This kernel may start before the one that writes its input, which is thus not kConstant.
extern "C" __attribute__((visibility("default"))) int guard_constant_of_a_neighbour(int64_t broken,
                                                                                    const float* in,
                                                                                    float* out) {
    LX_BUF(in, kCount * sizeof(float), lx::Access::kRead);
    LX_BUF(out, kCount * sizeof(float), lx::Access::kReadWrite);
    if (const int status = LX_LAUNCH(read_before_wait_kernel<false>, 1, 32, 0, nullptr, in, out))
        return status;
    LX_BUF(out, kCount * sizeof(float), broken ? lx::Access::kConstant : lx::Access::kRead);
    LX_BUF(const_cast<float*>(in), kCount * sizeof(float), lx::Access::kReadWrite);
    return LX_LAUNCH_PDL(read_before_wait_kernel<false>, 1, 32, 0, nullptr, out,
                         const_cast<float*>(in));
}

// Three launches. The third reads `out`, which the first writes, before it waits for the second.
extern "C" __attribute__((visibility("default"))) int guard_released_before_the_wait(
    int64_t broken, const float* in, float* out) {
    float* const data = const_cast<float*>(in);
    LX_BUF(in, kCount * sizeof(float), lx::Access::kRead);
    LX_BUF(out, kCount * sizeof(float), lx::Access::kReadWrite);
    if (const int status = LX_LAUNCH(read_before_wait_kernel<false>, 1, 32, 0, nullptr, in, out))
        return status;
    LX_BUF(data, kCount * sizeof(float), lx::Access::kReadWrite);
    const int status = broken ? LX_LAUNCH_PDL(release_kernel<true>, 1, 32, 0, nullptr, data)
                              : LX_LAUNCH_PDL(release_kernel<false>, 1, 32, 0, nullptr, data);
    if (status) return status;
    LX_BUF(out, kCount * sizeof(float), lx::Access::kConstant);
    LX_BUF(data, kCount * sizeof(float), lx::Access::kReadWrite);
    return LX_LAUNCH_PDL(read_before_wait_kernel<true>, 1, 32, 0, nullptr, out, data);
}

#define GUARD(name, good, bad, ...)                                                                \
    extern "C" __attribute__((visibility("default"))) int guard_##name(                            \
        int64_t broken, const float* in, float* out) {                                             \
        Shape shape;                                                                               \
        __VA_ARGS__;                                                                               \
        return run(broken ? static_cast<Kernel>(bad) : static_cast<Kernel>(good), in, out, shape); \
    }
#define PIPELINE(name, mistake)                                                     \
    GUARD(name, pipeline_kernel<Mistake::kNone>, pipeline_kernel<Mistake::mistake>, \
          shape.block = 64)
#define HAND_ON(name, mistake, ...)                                                \
    GUARD(name, hand_on_kernel<Handing::kRight>, hand_on_kernel<Handing::mistake>, \
          shape.block = 64, shape.grid = 5, shape.resident = true;                 \
          __VA_ARGS__)
#define KERNEL(name, ...) GUARD(name, name##_kernel<false>, name##_kernel<true>, __VA_ARGS__)

PIPELINE(wait_one_fewer, kWaitOneFewer)
PIPELINE(no_barrier_after_wait, kNoBarrierAfterWait)
PIPELINE(no_barrier_before_refill, kNoBarrierBeforeRefill)
PIPELINE(no_commit, kNoCommit)
KERNEL(partial_sums, shape.block = 64)
KERNEL(column_guard, shape.block = 128, shape.rows = 7, shape.row = 9, shape.stride = 16)
KERNEL(row_guard, shape.block = 128, shape.rows = 7, shape.row = 9, shape.stride = 16)
KERNEL(blocks_share_a_counter, shape.grid = 3)
KERNEL(neighbour, )
KERNEL(half_warp, )
KERNEL(shared_past_end, )
KERNEL(divergent_barrier, )
KERNEL(mixed_collectives, )
KERNEL(misaligned, )
KERNEL(read_only, )
KERNEL(unwritten_shared, )
KERNEL(unwritten_output, shape.out = lx::Access::kWrite)
KERNEL(named_barrier_count, shape.block = 64)
KERNEL(named_barrier_refill, shape.block = 64)
KERNEL(read_before_wait, shape.dependent = true)
KERNEL(never_waits, shape.dependent = true)
KERNEL(last_block, shape.grid = 5)
HAND_ON(hand_on_unfenced, kUnfenced, )
HAND_ON(hand_on_unread, kUnread, )
HAND_ON(hand_on_too_few, kOneTooFew, )
HAND_ON(hand_on_too_many, kOneTooMany, )
HAND_ON(hand_on_in_turn, kRight, if (broken) shape.resident = false)
HAND_ON(hand_on_too_wide, kRight, if (broken) shape.grid = 133)
KERNEL(too_much_shared, )
KERNEL(struct_copy, shape.block = 1)
KERNEL(ldmatrix_row, )
KERNEL(deep_stack, )
KERNEL(trap, )
KERNEL(swapped_registers, )
