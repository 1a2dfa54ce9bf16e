// The LoRA kernels in the asan flavour: every launcher on every path, in buffers of exact size,
// against a double loop. All numbers are small integers, so sums are exact in any order, and y is
// the exact sum rounded once. Memory that an adapter does not own (ranks beyond its own, free
// pages, gaps between rows) is poisoned at the eight-byte granularity of asan; the workspace has
// exactly lora_workspace_bytes().
//
// With the argument "workspace" the workspace is one float too short; with "overread" the launchers
// are called with one input feature too many. Only asan detects either mistake.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "emu/emu.h"
#include "lora_ext/lora.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

bool short_workspace = false, overread = false;

// Exactly `size` elements on the heap, followed by asan's redzone. `shift` elements are skipped at
// the front, so that data() is aligned only to its elements.
template <class T>
struct Exact {
    std::unique_ptr<T[]> memory;
    int64_t shift, size;

    explicit Exact(int64_t n, int64_t shift = 0)
        : memory(new T[n + shift]), shift(shift), size(n) {}
    T* data() const { return memory.get() + shift; }
    T& operator[](int64_t i) const { return data()[i]; }
};

uint32_t random_state = 1;
int below(int n) {
    random_state = random_state * 1664525u + 1013904223u;
    return static_cast<int>((random_state >> 8) % static_cast<uint32_t>(n));
}

struct Shape {
    int64_t tokens, in, out;
    std::vector<int32_t> ranks;
    int32_t max_rank;
    bool paged, planned;
    int64_t pad;    // elements between rows
    int64_t shift;  // elements past a 16-byte boundary
};

template <class T>
constexpr DType kType = std::is_same_v<T, float>     ? DType::kFloat32
                        : std::is_same_v<T, lx::f16> ? DType::kFloat16
                                                     : DType::kBFloat16;

void require(bool holds, const Shape& s, const char* what, int64_t row = -1, int64_t column = -1) {
    if (holds) return;
    printf("%s: T=%d I=%d O=%d R=%d %s %s, row %d column %d\n", what, int(s.tokens), int(s.in),
           int(s.out), s.max_rank, s.paged ? "pages" : "bank", s.planned ? "planned" : "planless",
           int(row), int(column));
    exit(3);
}

template <class T>
void run(const Shape& s) {
    const int slots = static_cast<int>(s.ranks.size()), pages = (s.max_rank + 7) / 8;
    const int64_t x_row = s.in + s.pad, y_row = s.out + s.pad;
    const int num_pages = s.paged ? slots * pages + 1 : 0;
    const int64_t b_ranks = s.paged ? 8 : s.max_rank;
    const int64_t b_rows = s.paged ? num_pages * s.out : slots * s.out;
    const int64_t a_rows = s.paged ? 8 * num_pages : int64_t{slots} * s.max_rank;

    Exact<int64_t> ids(s.tokens);
    Exact<int32_t> ranks(slots), table(slots * pages);
    Exact<float> scale(slots);
    Exact<T> x((s.tokens - 1) * x_row + s.in, s.shift), y((s.tokens - 1) * y_row + s.out, s.shift);
    Exact<T> a(a_rows * s.in, s.shift), b(b_rows * b_ranks, s.shift);
    const T nan = lx::from_float<T>(__builtin_nanf(""));
    auto fill = [](const Exact<T>& to, int largest) {
        for (int64_t i = 0; i < to.size; ++i)
            to[i] = lx::from_float<T>(static_cast<float>(below(2 * largest + 1) - largest));
    };
    const Exact<T> y_too(y.size, s.shift), y_three(y.size, s.shift);
    // Output of a sibling module that has half as many output features.
    const int64_t half = s.out < 16 ? s.out / 2 : s.out / 16 * 8, half_row = half + s.pad;
    const Exact<T> y_half(half > 0 ? (s.tokens - 1) * half_row + half : 0, s.shift);
    fill(x, 2), fill(y, 9), fill(a, 1), fill(b, 1);
    for (int64_t t = 0; t < s.tokens; ++t) ids[t] = below(slots + 1) - 1;
    for (int i = 0; i < slots; ++i) ranks[i] = s.ranks[i], scale[i] = i % 2 ? 2.0f : 0.5f;
    for (int i = 0; i < slots * pages; ++i)  // the last page first; -1 for pages beyond the rank
        table[i] = i % pages * 8 < ranks[i / pages] ? num_pages - 1 - i : -1;

    LoraArgs args;
    args.dtype = kType<T>;
    LoraBank& bank = args.bank;
    bank.a = a.data(), bank.b = b.data();
    bank.ranks = ranks.data(), bank.scale = scale.data();
    bank.a_row_stride = s.in, bank.b_row_stride = b_ranks;
    bank.a_slot_stride = s.paged ? 8 * s.in : s.max_rank * s.in;
    bank.b_slot_stride = s.out * b_ranks;
    bank.a_page_stride = 8 * s.in, bank.b_page_stride = s.paged ? 8 * s.out : 8;
    bank.num_adapters = slots, bank.max_rank = s.max_rank, bank.pages_per_slot = pages;
    bank.in_features = static_cast<int32_t>(s.in) + overread,
    bank.out_features = static_cast<int32_t>(s.out);
    bank.full_pages = s.paged || s.max_rank % 8 == 0;
    if (s.paged) bank.page_table = table.data(), bank.num_pages = num_pages;
    auto a_at = [&](int slot, int r) {
        return (s.paged ? table[slot * pages + r / 8] * bank.a_page_stride
                        : slot * bank.a_slot_stride + r / 8 * bank.a_page_stride) +
               r % 8 * s.in;
    };
    auto b_at = [&](int slot, int r, int64_t o) {
        return (s.paged ? table[slot * pages + r / 8] * bank.b_page_stride
                        : slot * bank.b_slot_stride + r / 8 * bank.b_page_stride) +
               o * b_ranks + r % 8;
    };
    for (int64_t i = 0; i < y.size; ++i) y_too[i] = y_three[i] = y[i];
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t o = 0; o < half; ++o) y_half[t * half_row + o] = y[t * y_row + o];
    // Beyond the ranks, A is poisoned, and B is NaN, since kernels load its rows as a whole.
    std::vector<bool> a_owned(a_rows), b_owned(b.size);
    for (int slot = 0; slot < slots; ++slot)
        for (int r = 0; r < ranks[slot]; ++r) {
            a_owned[a_at(slot, r) / s.in] = true;
            for (int64_t o = 0; o < s.out; ++o) b_owned[b_at(slot, r, o)] = true;
        }
    for (int64_t row = 0; row < a_rows; ++row)
        if (!a_owned[row]) ASAN_POISON_MEMORY_REGION(&a[row * s.in], s.in * sizeof(T));
    for (int64_t i = 0; i < b.size; ++i)
        if (!b_owned[i]) b[i] = nan;
    if (s.paged) ASAN_POISON_MEMORY_REGION(b.data(), s.out * 8 * sizeof(T));  // page 0 is free
    for (int64_t t = 0; s.pad > 0 && t + 1 < s.tokens; ++t) {
        ASAN_POISON_MEMORY_REGION(&x[t * x_row + s.in], s.pad * sizeof(T));
        ASAN_POISON_MEMORY_REGION(&y[t * y_row + s.out], s.pad * sizeof(T));
        ASAN_POISON_MEMORY_REGION(&y_too[t * y_row + s.out], s.pad * sizeof(T));
    }

    args.num_tokens = s.tokens;
    args.x = x.data(), args.x_row_stride = x_row;
    args.y = y.data(), args.y_row_stride = y_row;
    args.ids.adapter_ids = ids.data(), args.ids.num_tokens = s.tokens;
    args.ids.num_adapters = slots;
    Exact<int32_t> plan(LoraPlanLayout{s.tokens, slots}.size());
    if (s.planned) {
        args.ids.plan = plan.data();
        require(launch_lora_plan(args.ids, nullptr) == 0, s, "plan");
        args.plan = plan.data();
    }

    // Compute the expected v and y with loops.
    std::vector<float> want_v(s.tokens * s.max_rank), want_y(s.tokens * s.out);
    for (int64_t t = 0; t < s.tokens; ++t) {
        const int slot = static_cast<int>(ids[t]), rank = slot < 0 ? 0 : ranks[slot];
        for (int r = 0; r < rank; ++r) {
            const T* row = a.data() + a_at(slot, r);
            int sum = 0;
            for (int64_t i = 0; i < s.in; ++i)
                sum += static_cast<int>(lx::to_float(row[i]) * lx::to_float(x[t * x_row + i]));
            want_v[t * s.max_rank + r] = scale[slot] * static_cast<float>(sum);
        }
        for (int64_t o = 0; o < s.out; ++o) {
            float sum = lx::to_float(y[t * y_row + o]);
            for (int r = 0; r < rank; ++r)
                sum += lx::to_float(b[b_at(slot, r, o)]) * want_v[t * s.max_rank + r];
            want_y[t * s.out + o] = lx::to_float(lx::from_float<T>(sum));
        }
    }

    auto with_workspace = [&](auto launch, LoraArgs sized, const char* what) {
        const int64_t bytes = lora_workspace_bytes(sized);
        Exact<float> workspace(bytes / 4 - (short_workspace && bytes > 0));
        sized.workspace = bytes > 0 ? workspace.data() : nullptr;
        require(launch(sized, nullptr) == 0, s, what);
    };
    auto check_rows = [&](const Exact<T>& got, int64_t row, int64_t out, const char* what) {
        for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t o = 0; o < out; ++o)
                require(lx::to_float(got[t * row + o]) == want_y[t * s.out + o], s, what, t, o);
    };
    auto check_y = [&](const Exact<T>& got, const char* what) {
        check_rows(got, y_row, s.out, what);
    };

    // Test shrink and expand, then apply. The last row of v has no padding after its ranks.
    Exact<float> v((s.tokens - 1) * (s.max_rank + 1) + s.max_rank);
    args.v = v.data(), args.v_row_stride = s.max_rank + 1;
    LoraArgs shrink = args, expand = args;
    shrink.y = nullptr, shrink.bank.b = nullptr, shrink.bank.out_features = 0;
    expand.x = nullptr, expand.bank.a = nullptr, expand.bank.in_features = 0;
    with_workspace(launch_lora_shrink, shrink, "shrink");
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int r = 0; r < (ids[t] < 0 ? 0 : ranks[ids[t]]); ++r)
            require(v[t * args.v_row_stride + r] == want_v[t * s.max_rank + r], s, "v", t, r);
    require(launch_lora_expand(expand, nullptr) == 0, s, "expand");
    check_y(y, "expand");
    args.y = y_too.data(), args.v = nullptr;
    const auto apply = [](const LoraArgs& one, void* stream) {
        return launch_lora_apply(std::span(&one, 1), stream);
    };
    with_workspace(apply, args, "apply");
    check_y(y_too, "apply");
    LoraArgs both[2] = {args, args};
    both[0].y = y_three.data();
    both[1].y = y_half.data(), both[1].y_row_stride = half_row;
    both[1].bank.out_features = static_cast<int32_t>(half);
    const Exact<float> first(lora_workspace_bytes(both[0]) / 4);
    const Exact<float> second(lora_workspace_bytes(both[1]) / 4);
    both[0].workspace = first.data(), both[1].workspace = second.data();
    require(launch_lora_apply(both, nullptr) == 0, s, "siblings");
    check_y(y_three, "siblings");
    check_rows(y_half, half_row, half, "the second sibling");
}

}  // namespace

// A fake stack per thread of a kernel would take ten times as long as everything else.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
    return "detect_stack_use_after_return=0";
}

int main(int count, char** words) {
    const std::string_view mode = count > 1 ? words[1] : "";
    short_workspace = mode == "workspace";
    overread = mode == "overread";
    const std::vector<Shape> shapes = {
        // decode without a plan: one row, odd sizes and offsets, several splits, aligned rows
        {1, 1, 1, {1}, 1, false, false, 0, 0},
        {7, 65, 33, {0, 1, 7, 8}, 8, true, false, 3, 1},
        {19, 2049, 65, {7, 16}, 16, false, false, 1, 0},
        {32, 128, 72, {8, 16, 1, 0}, 16, true, false, 0, 0},
        // decode with a plan
        {33, 65, 257, {7, 0, 1}, 7, false, true, 0, 0},
        {40, 576, 128, {8, 16, 96}, 96, true, true, 8, 0},
        {5, 64, 2049, {96, 8}, 96, false, true, 1, 0},
        // prefill: chunks of 64 or 128 rows, aligned and unaligned rows
        {260, 128, 64, {16, 7, 0}, 16, true, true, 0, 0},
        {257, 65, 65, {1, 8}, 8, false, true, 3, 1},
        {4100, 64, 40, {8, 7}, 8, true, true, 0, 0},
        {300, 1032, 72, {96, 16}, 96, false, true, 8, 0},
        // large ranks: several splits without a plan, unaligned rows, pages and chunks of 64 rows
        {6, 520, 136, {264, 8}, 264, true, false, 0, 0},
        {17, 33, 35, {257, 0, 9}, 257, false, true, 3, 1},
        {260, 48, 136, {8, 264}, 264, true, true, 0, 0},
    };
    for (uint64_t seed = 0; seed < 2; ++seed) {
        lx::emu::set_seed(seed);
        for (const Shape& shape : shapes) {
            run<float>(shape);
            run<lx::f16>(shape);
            run<lx::bf16>(shape);
        }
    }
    puts("exact");
}
