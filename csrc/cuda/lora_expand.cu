// Expand: y[t, :] = round(y[t, :] + b[s] v[t, :]), where s is the adapter of row t and v is first
// summed over its splits.
//
// One block per (tile of rows, range of outputs, module). A warp owns 16 rows of one adapter and 32
// outputs at a time: v is operand A of mma, the rows of the B pages are operand B, loaded as in
// lora_tile.cuh. Columns are numbered so that a lane holds 8 adjacent outputs of rows g and g + 8
// (g = lane / 4). y is read and written once, 16 bytes per access. Loads are issued a step or a
// product ahead, so that an iteration of a loop waits for memory once. Decode: the warps of a block
// share 16 rows and divide the outputs; two memory round trips (find_tile) precede the first byte
// of B. Prefill: the warps divide the rows of a chunk, and all but the first read B from L1; in a
// short chunk they also divide the outputs. Bound: bytes of the B pages (decode), of y (prefill).
#include "lora_expand.cuh"

namespace lora_ext {
namespace {

constexpr int kDecodeShared = 6 * 1024;  // minimum shared memory per block, in bytes

// Minimum blocks per multiprocessor, to hide the latency of decode. With five, registers spill on
// sm_100. The host, which only chooses the outputs per block, always assumes five.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kDecodeBlocks = 4;
#else
constexpr int kDecodeBlocks = 5;
#endif
template <class P, bool kAligned, int kWarpsM>
constexpr int kMinBlocks = kWarpsM > 1                ? 2
                           : !kAligned                ? 3
                           : std::is_same_v<P, float> ? 4
                                                      : kDecodeBlocks;

template <class P, bool kAligned, int kWarpsM, int kWarpsN, int kModules, bool kFactors>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * 32, kMinBlocks<P, kAligned, kWarpsM>)
    lora_expand_kernel(const __grid_constant__ Modules<kModules> modules,
                       const __grid_constant__ Tiling tiling, int block_outputs) {
    using T = typename PagesOf<P>::Row;
    using E = typename PagesOf<P>::Element;
    constexpr int kRows = kTileRows * kWarpsM;
    // The next launch may start at once. If it is a shrink, it waits before all its accesses.
    lx::grid_dependency_launch();
    LX_SHARED(int32_t, row_of, kRows);
    LX_SHARED(const E*, page_of, kFusedPages);
    LX_SHARED(unsigned, row_max, kRows);
    LX_SHARED(float, unscale, kRows);
    LX_SHARED(Found, found, 1);
    LX_DYN_SHARED(fragments);
    const Module& module = modules.each[kModules > 1 ? blockIdx.z : 0];
    const LoraArgs& args = module.args;
    const Partials& v = module.v;
    const LoraBank& bank = args.bank;
    const int begin = static_cast<int>(blockIdx.y) * block_outputs;
    const int lane = lx::lane_id();
    int number = 0;  // number of page `lane` of the slot
    float scale = 1;
    const auto also = [&](int slot) {
        number = page_number(bank, slot, lane);
        if (!kFactors && !v.scaled && bank.scale) scale = bank.scale[slot];
    };
    const RowTile tile = find_tile<kRows>(args, tiling, static_cast<int>(blockIdx.x), row_of, also);
    // The grid fits the largest module, so smaller modules have blocks without work.
    if (tile.rank == 0 || (kModules > 1 && begin >= bank.out_features)) {
        // They wait nevertheless: the next grid waits only for this grid, and therefore this grid
        // must not end before the grid that writes v.
        lx::grid_dependency_wait();
        return;
    }
    static_assert(kFusedPages == lx::kWarpSize);
    const E* const page = page_at<E, kAligned>(bank, bank.b, tile.slot, number, bank.b_slot_stride,
                                               bank.b_page_stride);
    if (lx::warp_id() == 0) page_of[lane] = page;
    const unsigned pages = lx::ballot_sync(lx::kFullMask, lane * kPageRanks < tile.rank && page);
    if (lx::thread_rank() == 0) found[0] = {tile.rows, tile.rank, pages};
    lx::syncthreads();  // row_of, page_of and found are complete
    if (pages == 0) {
        lx::grid_dependency_wait();
        return;
    }
    const int end =
        static_cast<int>(lx::min<int64_t>(int64_t{begin} + block_outputs, bank.out_features));
    using Work = Lane<P, kAligned, kWarpsM, kWarpsN>;

    // Loads of b and y do not depend on v and are issued before the wait for v.
    Loads<P, kAligned> even{}, odd{};
    {
        const Work work(args, {tile.rows, tile.rank, pages}, end, page_of, row_of);
        const int o = begin + work.warp_n * kWarpOutputs;
        if constexpr (kAligned)
            work.load_own_b(even.b, work.page(0), work.ranks(0) > 0, o);
        else
            work.load_b(even.b, 0, o);
        T* const y_at[2] = {work.y_row[0] + o, work.y_row[1] + o};
        if constexpr (kAligned) work.template load_y<true>(even.y, y_at, 0, o);
    }
    lx::grid_dependency_wait();
    build_fragments<T, kRows, kFactors>(args, v, tile, scale, row_of, fragments, row_max, unscale);
    lx::syncthreads();

    const Work work(args, found[0], end, page_of, row_of);
    if (work.warp_m * kTileRows >= work.found.rows) return;  // the whole warp returns
    const int stride = work.stride;
    int o = begin + work.warp_n * kWarpOutputs;
    T* y_at[2] = {work.y_row[0] + o, work.y_row[1] + o};

    // If there is one block of ranks, and each lane has all ranks of its 16 bytes or none, two sets
    // of registers (even, odd) alternate. While the step in one set is multiplied and stored, the
    // loads of the next step into the other set are in flight. As soon as a set has been used, the
    // loads of the step after the next start to fill it. Nothing is copied or masked: a lane
    // without ranks never loads B, and its registers stay zero. (float32 has too few registers for
    // two sets.)
    if constexpr (kAligned && sizeof(T) == 2) {
        if (work.blocks == 1 && work.found.rank % kVec<T> == 0) {
            const E* const own_page = work.page(0);
            const bool own = work.ranks(0) > 0;
            const auto step = [&](Loads<P, kAligned>& now) {
                float acc[4][4] = {};
                work.multiply(acc, now.b, fragments, 0);
                work.load_own_b(now.b, own_page, own, o + 2 * stride);
                lx::syncwarp();  // the loads of B are issued before the sums of y
                work.store_y(now.y, y_at, acc, unscale, o);
                work.load_y(now.y, y_at, 2 * stride, o + 2 * stride);
                lx::syncwarp();
                y_at[0] += stride, y_at[1] += stride;
                o += stride;
            };
            work.load_own_b(odd.b, own_page, own, o + stride);
            work.load_y(odd.y, y_at, stride, o + stride);
#pragma unroll 1
            while (true) {
                step(even);
                if (o >= end) return;
                step(odd);
                if (o >= end) return;
            }
        }
    }
    // Otherwise a step has one product per block of ranks. During each product, the B of the next
    // product is loaded, and during the last product of a step also the step's y. keep_own then
    // waits for these loads, and replaces ranks that the adapter does not have by zero.
    work.keep_own(even.b, even.b, 0);
#pragma unroll 1
    for (; o < end; o += stride) {
        float acc[4][4] = {};
#pragma unroll 1
        for (int block = 0; block < work.blocks; ++block) {
            const bool last = block + 1 == work.blocks;
            const int next = last ? 0 : block + 1;
            if (last) work.load_y(even.y, y_at, 0, o);
            work.load_b(odd.b, next, last ? o + stride : o);
            work.multiply(acc, even.b, fragments, block);
            work.keep_own(even.b, odd.b, next);
        }
        work.store_y(even.y, y_at, acc, unscale, o);
        y_at[0] += stride, y_at[1] += stride;
    }
}

template <class P, bool kAligned, int kWarpsM, int kWarpsN, int kModules, bool kFactors = false>
LaunchStatus launch_expand(std::span<const Module> modules, int outputs, bool dependent,
                           void* stream) {
    using T = typename PagesOf<P>::Row;
    if constexpr (!kFactors) {
        for (const Module& module : modules)
            if (has_factors(module.args) && !module.v.scaled)
                return launch_expand<P, kAligned, kWarpsM, kWarpsN, kModules, true>(
                    modules, outputs, dependent, stream);
    }
    constexpr int kRows = kTileRows * kWarpsM;
    const LoraArgs& args = modules[0].args;
    const int64_t out = largest(modules, [](const LoraBank& bank) { return bank.out_features; });
    while (ceil_div(out, outputs) > kMaxGridY) outputs *= 2;
    const dim3 grid(num_tiles(args, kRows), static_cast<unsigned>(ceil_div(out, outputs)),
                    static_cast<unsigned>(modules.size()));
    const int fragments = fragment_bytes<T, kRows>(
        static_cast<int>(largest(modules, [](const LoraBank& bank) { return bank.max_rank; })));
    // With kDecodeShared as the minimum, five decode blocks use as much shared memory as four
    // blocks of shrink, about 37 KiB with static and reserved memory. A multiprocessor can then run
    // both kernels without first finishing all blocks of one to change its memory configuration.
    const int bytes = lx::max(fragments, kWarpsM == 1 ? kDecodeShared : 0);
    constexpr int kThreads = kWarpsM * kWarpsN * 32;
    const Modules<kModules> all(modules);
    return dependent
               ? LX_LAUNCH_PDL(
                     (lora_expand_kernel<P, kAligned, kWarpsM, kWarpsN, kModules, kFactors>), grid,
                     kThreads, bytes, stream, all, tiling(args, kRows), outputs)
               : LX_LAUNCH((lora_expand_kernel<P, kAligned, kWarpsM, kWarpsN, kModules, kFactors>),
                           grid, kThreads, bytes, stream, all, tiling(args, kRows), outputs);
}

// Returns the outputs per block at decode that minimize an estimated time. A wave consists of all
// blocks that fit on the device at once. The start of a block takes about as long as kHead steps,
// and then each warp has one step per 128 outputs. The grid has a block for each entry that a plan
// may have, so the time is the sum for two batches: one of as many adapters as possible and one of
// a single adapter. The choice does not change the bits of an output.
int decode_outputs(std::span<const Module> modules, int blocks_per_multiprocessor) {
    constexpr int kHead = 4, kStep = 128;
    const LoraArgs& args = modules[0].args;
    const int64_t at_once = int64_t{blocks_per_multiprocessor} * lx::max(1, lx::multiprocessors());
    int best = kStep;
    int64_t least = INT64_MAX;
    for (int outputs = kStep; outputs <= 8 * kStep; outputs *= 2) {
        int64_t time = 0;
        for (const int64_t tiles :
             {int64_t{num_tiles(args, kTileRows)}, ceil_div(args.num_tokens, int64_t{kTileRows})}) {
            int64_t blocks = 0;
            for (const Module& module : modules)
                blocks += tiles * ceil_div(module.args.bank.out_features, outputs);
            time += ceil_div(blocks, at_once) * (kHead + outputs / kStep);
        }
        if (time < least) best = outputs, least = time;
    }
    return best;
}

}  // namespace

LaunchStatus run_expand(std::span<const Module> modules, bool dependent, void* stream) {
    const LoraArgs& args = modules[0].args;
    const LoraBank& bank = args.bank;
    const bool aligned = expand_aligned(args);
    for (const auto& [each, partials] : modules) {
        const int64_t size = element_size(each.dtype);
        declare_common(each);
        declare_b(each);
        declare_v(each, partials, lx::Access::kRead);
        // expand reads y, the plan and its bank before it waits for the kernel that writes v. This
        // is safe because shrink either is not a dependent launch, or waits before it lets expand
        // start. In both cases every earlier writer has ended, and shrink and reduce write only v.
        // If shrink waited later, y might be incomplete; the emulator would report this for two
        // consecutive calls that add to the same y.
        if (dependent)
            LX_BUF_ROWS(each.y, each.num_tokens, each.bank.out_features * size,
                        each.y_row_stride * size, lx::Access::kConstant);
        LX_BUF_ROWS(each.y, each.num_tokens, each.bank.out_features * size,
                    each.y_row_stride * size, lx::Access::kReadWrite);
    }
    if (large_rank(bank)) return run_gemm_expand(args, modules[0].v, dependent, stream);
    return with_dtype(args.dtype, [&]<class T>() {
        // Decode needs enough blocks to fill the machine. Prefill needs many outputs per block, so
        // that each fragment of v is used many times.
        const int chunk_rows = lora_chunk_rows(args.num_tokens);
        const auto few = [&](int blocks) {
            return chunk_rows == 16 ? decode_outputs(modules, blocks) : 256;
        };
        if constexpr (sizeof(T) == 2) {
            if (bank.float8) {
                const int outputs = few(kMinBlocks<Float8<T>, true, 1>);
                return modules.size() > 1 ? launch_expand<Float8<T>, true, 1, 4, kMaxSiblings>(
                                                modules, outputs, dependent, stream)
                                          : launch_expand<Float8<T>, true, 1, 4, 1>(
                                                modules, outputs, dependent, stream);
            }
        }
        if (modules.size() > 1)
            return launch_expand<T, true, 1, 4, kMaxSiblings>(modules, few(kMinBlocks<T, true, 1>),
                                                              dependent, stream);
        if (!aligned)
            return launch_expand<T, false, 1, 4, 1>(modules, few(kMinBlocks<T, false, 1>),
                                                    dependent, stream);
        if (chunk_rows == 16)
            return launch_expand<T, true, 1, 4, 1>(modules, few(kMinBlocks<T, true, 1>), dependent,
                                                   stream);
        // The fragments of 128 rows of a high rank exceed the shared memory of some devices.
        const bool small = chunk_rows == 64 ||
                           fragment_bytes<T, 8 * kTileRows>(bank.max_rank) > most_dynamic_bytes();
        if (small) return launch_expand<T, true, 4, 2, 1>(modules, 512, dependent, stream);
        return launch_expand<T, true, 8, 1, 1>(modules, 512, dependent, stream);
    });
}

}  // namespace lora_ext
