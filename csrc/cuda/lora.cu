// The LoRA launchers. They choose kernels only by sizes known to the host, so a captured graph
// always contains the same kernels. No function here allocates memory or waits for the device. The
// kernels for T tokens are:
//
//   T <= 256   chunks of 16 rows     shrink_decode, expand with four warps along the outputs
//   T >  256   chunks of 64 or 128   shrink, expand with a warp per 16 rows
//   bank of rank > 256               run_gemm_* (lora_gemm.cuh) for reduce and expand, and for
//                                    shrink if T > 256
#include "lora_train.cuh"

namespace lora_ext {
namespace {

constexpr int kDecodeTokens = 256;

// Returns the division of the sum over in-features for large ranks at prefill. The number of splits
// is chosen to give about 198 blocks, that is, 1.5 for each multiprocessor of an H100. A
// multiprocessor holds two blocks, so many more blocks would need a second wave. The number of
// splits is the same for every device, because it determines the bits of the result.
SumOrder gemm_order(const LoraArgs& args) {
    const int64_t in = args.bank.in_features;
    const int64_t tiles = ceil_div(args.num_tokens, lora_chunk_rows(args.num_tokens)) *
                          ceil_div(args.bank.max_rank, kGemmColumns);
    int splits = 1;
    while (splits < 8 && tiles * splits < 198 && in >= int64_t{1024} * splits) splits *= 2;
    const int64_t width = ceil_div(lx::max<int64_t>(ceil_div(in, splits), 1), 128) * 128;
    return {splits, static_cast<int>(width)};
}

bool is_decode(const LoraArgs& args) {
    return args.num_tokens <= kDecodeTokens;
}

// Returns the layout of the splits in the workspace, whose rows are padded to whole pages.
Partials partials(const LoraArgs& args) {
    const int64_t row = int64_t{kPageRanks} * args.bank.pages_per_slot;
    const bool gemm = large_rank(args.bank);
    SumOrder order = gemm && !is_decode(args) ? gemm_order(args) : sum_order(args.bank.in_features);
    bool scaled = gemm && order.count == 1;  // a GEMM reads v without scaling it
    if (!gemm && !is_decode(args) && projection_slices(args, false).finished) {
        order.count = 1;
        scaled = true;
    }
    return {static_cast<float*>(args.workspace),
            row,
            row * args.num_tokens,
            order.count,
            order.width,
            static_cast<int>(row),
            scaled && !has_factors(args)};
}

// Returns whether the splits of v are summed in a separate launch before expand. At prefill, each
// block of 512 outputs reads all splits. If one launch would read about 16 MB more than a sum and
// an expand of this sum read together, two launches are faster (estimated). The result is bitwise
// the same.
bool sums_splits_first(const LoraArgs& args, const Partials& v) {
    const int64_t again = ceil_div(args.bank.out_features, 512) - 1;
    if (large_rank(args.bank)) return !v.scaled;
    return !is_decode(args) &&
           (v.splits - 1) * v.split_stride * int64_t{sizeof(float)} * again >= 16 << 20;
}

bool shrink_is_direct(const LoraArgs& args) {
    return partials(args).splits == 1 && args.bank.out_features == 0;
}

LaunchStatus check(const LoraArgs& args) {
    if (args.bank.max_rank < 0) return kInvalidValue;
    if (!args.plan && args.num_tokens > kPlanlessTokens) return kInvalidValue;
    return 0;
}

bool empty(const LoraArgs& args) {
    return args.num_tokens == 0 || args.bank.max_rank == 0 || args.bank.num_adapters == 0;
}

LaunchStatus run_shrink(const Module& module, void* stream) {
    const LoraArgs& args = module.args;
    const Partials& v = module.v;
    if (is_decode(args)) return run_shrink_decode(std::span(&module, 1), stream);
    if (large_rank(args.bank)) {
        declare_common(args);
        declare_a(args);
        declare_v(args, v, lx::Access::kWrite);
        return run_gemm_shrink(args, v, stream);
    }
    const LoraArgs sums = has_factors(args) ? without_factors(args) : args;
    return run_shrink_rows({sums, {}, v.data, v.row_stride}, projection_slices(sums, false),
                           stream);
}

// Returns whether a module leaves y unchanged, because one of its sizes is zero.
bool adds_nothing(const LoraArgs& args) {
    return empty(args) || args.bank.out_features == 0 || args.bank.in_features == 0;
}

// Returns whether a module may share launches with siblings. Prefill and large ranks use separate
// launches, since their blocks fill the machine. Unaligned modules also use separate launches,
// since their kernels have no spare registers.
bool shares_launches(const LoraArgs& args) {
    return is_decode(args) && !large_rank(args.bank) && shrink_aligned(args) &&
           expand_aligned(args);
}

LaunchStatus apply_one(const LoraArgs& args, void* stream) {
    Module module{args, partials(args)};
    Partials& v = module.v;
    if (const LaunchStatus status = run_shrink(module, stream)) return status;
    if (sums_splits_first(args, v)) {
        LoraArgs sum = args;  // in place: a warp overwrites only what it has read itself
        sum.v = v.data;
        sum.v_row_stride = v.row_stride;
        if (const LaunchStatus status = run_reduce(sum, v, stream)) return status;
        v.splits = 1;
        v.scaled = true;
    }
    return run_expand(std::span(&module, 1), true, stream);
}

}  // namespace

bool lora_reads_float8(const LoraArgs& args) {
    const bool shrinks = args.x, expands = args.y;
    return args.dtype != DType::kFloat32 && is_decode(args) && !large_rank(args.bank) &&
           (!shrinks || shrink_aligned(args)) && (!expands || expand_aligned(args));
}

int64_t lora_workspace_bytes(const LoraArgs& args) {
    if (empty(args) || args.bank.in_features == 0 || shrink_is_direct(args)) return 0;
    const Partials v = partials(args);
    return v.splits * v.split_stride * static_cast<int64_t>(sizeof(float));
}

LaunchStatus launch_lora_shrink(const LoraArgs& args, void* stream) {
    if (const LaunchStatus status = check(args)) return status;
    if (empty(args)) return 0;
    Partials v = partials(args);
    if (v.splits == 1) {
        v.data = static_cast<float*>(args.v);
        v.row_stride = args.v_row_stride;
        v.row_floats = args.bank.max_rank;
        v.scaled = !has_factors(args);
        const LaunchStatus status = run_shrink({args, v}, stream);
        return status || v.scaled ? status : run_reduce(args, v, stream);
    }
    if (const LaunchStatus status = run_shrink({args, v}, stream)) return status;
    return run_reduce(args, v, stream);
}

LaunchStatus launch_lora_expand(const LoraArgs& args, void* stream) {
    if (const LaunchStatus status = check(args)) return status;
    if (empty(args) || args.bank.out_features == 0) return 0;
    const Module module{
        args, {static_cast<float*>(args.v), args.v_row_stride, 0, 1, 0, args.bank.max_rank, true}};
    return run_expand(std::span(&module, 1), false, stream);
}

LaunchStatus launch_lora_apply(std::span<const LoraArgs> modules, void* stream) {
    Module together[kMaxSiblings];
    size_t count = 0;
    for (const LoraArgs& args : modules) {
        if (const LaunchStatus status = check(args)) return status;
        if (adds_nothing(args)) continue;
        if (count == kMaxSiblings) return kInvalidValue;
        together[count++] = {args, partials(args)};
    }
    const std::span<const Module> live(together, count);
    bool share = count > 1;
    for (const auto& [args, v] : live)
        share = share && shares_launches(args) && args.bank.float8 == live[0].args.bank.float8;
    if (share) {
        if (const LaunchStatus status = run_shrink_decode(live, stream)) return status;
        return run_expand(live, true, stream);
    }
    for (const Module& module : live)
        if (const LaunchStatus status = apply_one(module.args, stream)) return status;
    return 0;
}

// ------------------------------------------------------------------------------------------------
// Buffers of the emulator. Its "device" pointers are ordinary memory, so the host may read them.

#ifdef LX_EMULATE
namespace {

int32_t rank_of(const LoraBank& bank, int slot) {
    return bank.ranks ? lx::min(lx::max(bank.ranks[slot], 0), bank.max_rank) : bank.max_rank;
}

// Calls f(address, ranks) for each page: the address of its first element, and how many of the
// page's ranks the adapter uses.
template <class F>
void for_each_page(const LoraBank& bank, const void* base, int64_t slot_stride, int64_t page_stride,
                   int64_t size, F&& f) {
    for (int slot = 0; slot < bank.num_adapters; ++slot) {
        for (int page = 0; page * kPageRanks < rank_of(bank, slot); ++page) {
            int64_t at = slot * slot_stride + page * page_stride;
            if (bank.page_table) {
                const int32_t entry = bank.page_table[slot * bank.pages_per_slot + page];
                if (entry < 0 || entry >= bank.num_pages) continue;
                at = entry * page_stride;
            }
            f(static_cast<const char*>(base) + at * size,
              lx::min(rank_of(bank, slot) - page * kPageRanks, kPageRanks));
        }
    }
}

}  // namespace

void declare_common(const LoraArgs& args, lx::Access access) {
    const LoraBank& bank = args.bank;
    if (args.plan) {
        const LoraPlanLayout layout{args.num_tokens, bank.num_adapters};
        LX_BUF(args.plan, layout.size() * 4, access);
    } else {
        LX_BUF(args.ids.adapter_ids, args.num_tokens * (args.ids.ids_are_int64 ? 8 : 4), access);
        if (args.ids.num_valid) LX_BUF(args.ids.num_valid, 4, access);
    }
    if (bank.ranks) LX_BUF(bank.ranks, bank.num_adapters * 4, access);
    [[maybe_unused]] const int64_t pages = int64_t{4} * bank.num_adapters * bank.pages_per_slot;
    if (bank.scale) LX_BUF(bank.scale, bank.scale_per_page ? pages : bank.num_adapters * 4, access);
    if (bank.groups) LX_BUF(bank.groups, pages, access);
    if (args.weights)
        LX_BUF_ROWS(args.weights, args.num_tokens, bank.num_groups * 4, args.weights_row_stride * 4,
                    access);
    if (bank.page_table) LX_BUF(bank.page_table, pages, access);
}

void declare_a(const LoraArgs& args, lx::Access access) {
    const LoraBank& bank = args.bank;
    int64_t size = element_size(args.dtype);
    LX_BUF_ROWS(args.x, args.num_tokens, bank.in_features * size, args.x_row_stride * size, access);
    size = page_size(args);
    for_each_page(bank, bank.a, bank.a_slot_stride, bank.a_page_stride, size,
                  [&](const void* a_page, int ranks) {
                      LX_BUF_ROWS(a_page, ranks, bank.in_features * size, bank.a_row_stride * size,
                                  access);
                  });
}

void declare_b(const LoraArgs& args) {
    const LoraBank& bank = args.bank;
    const int64_t size = page_size(args);
    for_each_page(bank, bank.b, bank.b_slot_stride, bank.b_page_stride, size,
                  [&](const void* b_page, int ranks) {
                      LX_BUF_ROWS(b_page, bank.out_features,
                                  (bank.full_pages ? kPageRanks : ranks) * size,
                                  bank.b_row_stride * size, lx::Access::kConstant);
                  });
}

void declare_v(const LoraArgs& args, const Partials& v, lx::Access access) {
    for (int split = 0; split < v.splits; ++split) {
        float* v_rows = v.data + split * v.split_stride;
        const int64_t floats = access == lx::Access::kRead ? v.row_floats : args.bank.max_rank;
        LX_BUF_ROWS(v_rows, args.num_tokens, floats * 4, v.row_stride * 4, access);
    }
}
#else
void declare_common(const LoraArgs&, lx::Access) {}
void declare_a(const LoraArgs&, lx::Access) {}
void declare_b(const LoraArgs&) {}
void declare_v(const LoraArgs&, const Partials&, lx::Access) {}
#endif

}  // namespace lora_ext
