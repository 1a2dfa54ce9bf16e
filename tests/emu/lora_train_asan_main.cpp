// The training kernels in the asan flavour: both launchers, in buffers and a workspace of exact
// size, against loops. Numbers are small integers, so sums are exact in any order. Masks are those
// of launch_lora_dropout on ones, with one seed for all adapters, then with one per adapter. With
// the argument "workspace" the workspace is one float too short.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "emu/emu.h"
#include "lora_ext/lora_train.h"
#include "lx/device.h"

using namespace lora_ext;

namespace {

bool short_workspace = false;

// Buffer of exactly `size` elements on the heap, `shift` elements past a 16-byte boundary.
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
    int64_t pad, shift;  // elements between rows; past a 16-byte boundary
};

void require(bool holds, const Shape& s, const char* what, int64_t at = -1) {
    if (holds) return;
    printf("%s: T=%d I=%d O=%d R=%d, element %d\n", what, int(s.tokens), int(s.in), int(s.out),
           s.max_rank, int(at));
    exit(3);
}

template <class T>
void run(const Shape& s, bool per_adapter) {
    const int slots = static_cast<int>(s.ranks.size()), seeds = per_adapter ? slots : 1;
    const int64_t R = s.max_rank, x_row = s.in + s.pad, dy_row = s.out + s.pad;
    Exact<int64_t> ids(s.tokens), seed(seeds);
    Exact<int32_t> ranks(slots), plan(LoraPlanLayout{s.tokens, slots}.size());
    Exact<T> x((s.tokens - 1) * x_row + s.in, s.shift), a(slots * R * s.in, s.shift),
        b(slots * s.out * R, s.shift), dy((s.tokens - 1) * dy_row + s.out, s.shift),
        dx((s.tokens - 1) * x_row + s.in, s.shift), da(a.size), db(b.size), ones(s.tokens * s.in),
        keep(seeds * s.tokens * s.in);
    Exact<float> v((s.tokens - 1) * (R + 1) + R), dv(v.size);
    auto fill = [](const Exact<T>& to) {
        for (int64_t i = 0; i < to.size; ++i)
            to[i] = lx::from_float<T>(static_cast<float>(below(3) - 1));
    };
    fill(x), fill(a), fill(b), fill(dy), fill(dx);
    for (int64_t i = 0; i < ones.size; ++i) ones[i] = lx::from_float<T>(1.0f);
    for (int64_t t = 0; t < s.tokens; ++t) ids[t] = below(slots + 1) - 1;
    ids[s.tokens - 1] = 0;  // so that a kernel uses the last float of the workspace
    for (int i = 0; i < slots; ++i) ranks[i] = s.ranks[i];
    for (int i = 0; i < seeds; ++i) seed[i] = i - s.tokens;

    LoraTrainArgs args;
    LoraArgs& lora = args.lora;
    lora.dtype = std::is_same_v<T, float>     ? DType::kFloat32
                 : std::is_same_v<T, lx::f16> ? DType::kFloat16
                                              : DType::kBFloat16;
    LoraBank& bank = lora.bank;
    bank.a = a.data(), bank.b = b.data(), bank.ranks = ranks.data();
    bank.a_row_stride = s.in, bank.a_page_stride = 8 * s.in, bank.a_slot_stride = R * s.in;
    bank.b_row_stride = R, bank.b_page_stride = 8, bank.b_slot_stride = s.out * R;
    bank.num_adapters = slots, bank.max_rank = s.max_rank;
    bank.pages_per_slot = (s.max_rank + 7) / 8, bank.full_pages = R % 8 == 0;
    bank.in_features = static_cast<int32_t>(s.in);
    bank.out_features = static_cast<int32_t>(s.out);
    lora.num_tokens = s.tokens;
    lora.v = v.data(), args.dv = dv.data();
    lora.v_row_stride = args.dv_row_stride = R + 1;
    lora.x = ones.data(), lora.x_row_stride = s.in;
    for (int i = 0; i < seeds; ++i) {
        args.dropout = {seed.data() + i, 1u << 31, 2.0f};
        T* const masks = keep.data() + i * s.tokens * s.in;
        require(launch_lora_dropout(args, masks, nullptr) == 0, s, "dropout");
    }
    args.dropout.seed = seed.data();
    args.dropout.per_adapter = per_adapter;
    lora.x = x.data(), lora.x_row_stride = args.dx_row_stride = x_row;
    args.dy = dy.data(), args.dy_row_stride = dy_row, args.dx = dx.data();
    args.da = da.data(), args.db = db.data();

    // Compute the expected results with loops.
    std::vector<float> want_dx(dx.size), want_da(a.size), want_db(b.size);
    for (int64_t i = 0; i < dx.size; ++i) want_dx[i] = lx::to_float(dx[i]);
    std::vector<int64_t> rows(slots);  // number of earlier rows of each adapter
    for (int64_t t = 0; t < s.tokens; ++t) {
        const int64_t slot = ids[t];
        const int64_t place = slot >= 0 ? rows[slot]++ : 0;
        const T* const mask =
            keep.data() + (per_adapter && slot >= 0 ? slot * s.tokens + place : t) * s.in;
        for (int64_t r = 0; slot >= 0 && r < ranks[slot]; ++r) {
            float v_at = 0, dv_at = 0;
            const T* a_row = a.data() + (slot * R + r) * s.in;
            auto kept = [&](int64_t i) { return lx::to_float(mask[i]) != 0; };
            for (int64_t i = 0; i < s.in; ++i)
                if (kept(i)) v_at += 2 * lx::to_float(a_row[i]) * lx::to_float(x[t * x_row + i]);
            for (int64_t o = 0; o < s.out; ++o)
                dv_at += 2 * lx::to_float(b[(slot * s.out + o) * R + r]) *
                         lx::to_float(dy[t * dy_row + o]);
            for (int64_t o = 0; o < s.out; ++o)
                want_db[(slot * s.out + o) * R + r] += v_at * lx::to_float(dy[t * dy_row + o]);
            for (int64_t i = 0; i < s.in; ++i) {
                if (!kept(i)) continue;
                want_da[(slot * R + r) * s.in + i] += dv_at * lx::to_float(x[t * x_row + i]);
                want_dx[t * x_row + i] += dv_at * lx::to_float(a_row[i]);
            }
        }
    }

    require(
        launch_lora_plan({ids.data(), true, nullptr, s.tokens, slots, plan.data()}, nullptr) == 0,
        s, "plan");
    lora.plan = plan.data();
    auto run_in = [&](int64_t bytes, auto launcher, const char* what) {
        Exact<float> workspace(bytes / 4 - (short_workspace && bytes > 0));
        args.workspace = bytes > 0 ? workspace.data() : nullptr;
        require(launcher(args, nullptr) == 0, s, what);
    };
    run_in(lora_train_shrink_workspace_bytes(args), launch_lora_train_shrink, "shrink");
    run_in(lora_train_backward_workspace_bytes(args), launch_lora_train_backward, "backward");
    auto check = [&](const Exact<T>& got, const std::vector<float>& want, const char* what) {
        for (int64_t i = 0; i < got.size; ++i)
            require(lx::to_float(got[i]) == lx::to_float(lx::from_float<T>(want[i])), s, what, i);
    };
    check(da, want_da, "da");
    check(db, want_db, "db");
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t i = t * x_row; i < t * x_row + s.in; ++i)
            require(lx::to_float(dx[i]) == lx::to_float(lx::from_float<T>(want_dx[i])), s, "dx", i);
}

}  // namespace

// A fake stack per thread of a kernel would take ten times as long as everything else.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
    return "detect_stack_use_after_return=0";
}

int main(int count, char** words) {
    short_workspace = count > 1 && std::string_view(words[1]) == "workspace";
    const std::vector<Shape> shapes = {
        {1, 1, 1, {1}, 1, 0, 0},
        {33, 65, 37, {0, 7, 3}, 7, 3, 1},
        {40, 136, 72, {8, 72}, 72, 8, 0},
        {66, 24, 1032, {16, 5}, 16, 0, 0},  // slices of the outputs
        {33, 24, 1032, {40, 64}, 64, 0, 0},
        {1100, 24, 40, {8}, 8, 0, 0},         // ranges of the rows
        {4100, 8, 8, {2}, 2, 0, 0},           // tiles of 128 rows
        {260, 24, 136, {264, 8}, 264, 0, 0},  // ranks above 256, aligned and not
        {258, 33, 20, {5, 257}, 257, 3, 1},
    };
    for (uint64_t seed = 0; seed < 2; ++seed) {
        lx::emu::set_seed(seed);
        for (const Shape& shape : shapes)
            for (const bool per_adapter : {false, true}) {
                run<float>(shape, per_adapter);
                run<lx::f16>(shape, per_adapter);
                run<lx::bf16>(shape, per_adapter);
            }
    }
    puts("exact");
}
