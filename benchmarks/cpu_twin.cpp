// Micro-benchmark of the CPU twins, without torch. For each shape, it prints the GB/s of the
// compulsory bytes (adapters once, x once, y read and written) and of a copy in the same run, or
// the GFLOP/s of the twin and of a loop of independent multiply-adds.
//
//   cpu_twin [threads] [isa] [filter]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "lora_ext/isa.h"
#include "lora_ext/lora.h"

using namespace lora_ext;

namespace {

int num_threads = 1;

void parallel(int64_t items, const std::function<void(int64_t, int64_t)>& f) {
    std::vector<std::thread> pool;
    for (int i = 1; i < num_threads; ++i)
        pool.emplace_back([&, i] { f(items * i / num_threads, items * (i + 1) / num_threads); });
    f(0, items / num_threads);
    for (std::thread& t : pool) t.join();
}

// Smallest of several runs: the machine may be shared, and noise only ever adds time.
double seconds(int runs, const std::function<void()>& f) {
    double best = 1e30;
    for (int i = 0; i < runs; ++i) {
        const auto start = std::chrono::steady_clock::now();
        f();
        best = std::min(
            best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

double copy_gbs() {
    const int64_t n = int64_t{96} << 20;
    static std::vector<char> from(n, 1), to(n, 2);
    return 2.0 * n / 1e9 / seconds(5, [&] {
               parallel(n, [&](int64_t i, int64_t j) { std::memcpy(&to[i], &from[i], j - i); });
           });
}

// Ten independent chains of 32-byte vectors fill two pipes of latency four. One thread.
#if defined(__x86_64__)
__attribute__((target("avx2,fma")))
#endif
float fma_chains(int64_t steps) {
    typedef float V __attribute__((vector_size(32)));
    V a = {}, b = a, c = a, d = a, e = a, f = a, g = a, h = a, k = a, l = a, m = a + 0.5f;
    for (int64_t i = 0; i < steps; ++i) {
        a = a * m + m, b = b * m + m, c = c * m + m, d = d * m + m, e = e * m + m;
        f = f * m + m, g = g * m + m, h = h * m + m, k = k * m + m, l = l * m + m;
#if defined(__x86_64__)
        // Hides from the compiler that all chains contain the same numbers.
        asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e));
        asm volatile("" : "+x"(f), "+x"(g), "+x"(h), "+x"(k), "+x"(l));
#endif
    }
    return (a + b + c + d + e + f + g + h + k + l)[0];
}
double fma_gflops() {
    const int64_t steps = 4000000;
    volatile float sink = 0;
    return 10 * 16.0 * steps / 1e9 / seconds(3, [&] { sink = fma_chains(steps); });
}

struct Case {
    const char* name;
    DType dtype;
    int64_t tokens;
    int32_t adapters, in, out;
    std::vector<int32_t> ranks;  // repeated over the adapters
    int runs;
    bool flops;      // compare with the multiply-add peak
    int layers = 1;  // sets of adapters, used in turn
};

void run_case(const LoraCpu& isa, const Case& c, double copy, double peak) {
    const int64_t size = c.dtype == DType::kFloat32 ? 4 : c.dtype == DType::kFloat64 ? 8 : 2;
    const int32_t max_rank = *std::max_element(c.ranks.begin(), c.ranks.end());
    const int32_t pages = static_cast<int32_t>(ceil_div(max_rank, 8));
    std::vector<int32_t> ranks, table(c.adapters * pages);
    double adapter_bytes = 0, flops = 0;
    for (int32_t s = 0; s < c.adapters; ++s) {
        ranks.push_back(c.ranks[s % c.ranks.size()]);
        adapter_bytes += double(ranks[s]) * (c.in + c.out) * size;
        flops += 2.0 * ranks[s] * (c.in + c.out) * c.tokens / c.adapters;
    }
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    const int64_t a_bytes = table.size() * 8 * c.in * size,
                  b_bytes = table.size() * 8 * c.out * size;
    // A repeated 16-bit pattern that is a small normal number in every dtype.
    const auto filled = [](int64_t bytes) {
        std::vector<uint16_t> m(bytes / 2 + 64);
        for (size_t i = 0; i < m.size(); ++i) m[i] = static_cast<uint16_t>(0x2c00 + i * 37 % 512);
        return m;
    };
    auto a = filled(a_bytes * c.layers), b = filled(b_bytes * c.layers),
         x = filled(c.tokens * c.in * size), y = filled(c.tokens * c.out * size),
         v = filled(c.tokens * max_rank * 8);
    std::vector<int32_t> ids(c.tokens), plan(LoraPlanLayout{c.tokens, c.adapters}.size());
    for (int64_t t = 0; t < c.tokens; ++t)
        ids[t] = static_cast<int32_t>(c.tokens > 256 ? t * c.adapters / c.tokens : t % c.adapters);
    lora_plan_cpu({.adapter_ids = ids.data(),
                   .ids_are_int64 = false,
                   .num_tokens = c.tokens,
                   .num_adapters = c.adapters,
                   .plan = plan.data()});
    LoraArgs args;
    args.dtype = c.dtype;
    args.num_tokens = c.tokens;
    args.x = x.data();
    args.x_row_stride = c.in;
    args.y = y.data();
    args.y_row_stride = c.out;
    args.v = v.data();
    args.v_row_stride = max_rank;
    args.plan = plan.data();
    args.bank.page_table = table.data();
    args.bank.ranks = ranks.data();
    args.bank.a_page_stride = int64_t{8} * c.in;
    args.bank.a_row_stride = c.in;
    args.bank.b_page_stride = int64_t{8} * c.out;
    args.bank.b_row_stride = 8;
    args.bank.num_adapters = c.adapters;
    args.bank.max_rank = max_rank;
    args.bank.pages_per_slot = pages;
    args.bank.num_pages = static_cast<int32_t>(table.size());
    args.bank.in_features = c.in;
    args.bank.out_features = c.out;
    args.bank.full_pages = true;
    const auto pass = [&](auto&& op) {
        return seconds(c.runs,
                       [&] {
                           for (int layer = 0; layer < c.layers; ++layer) {
                               LoraArgs now = args;
                               now.bank.a = reinterpret_cast<char*>(a.data()) + a_bytes * layer;
                               now.bank.b = reinterpret_cast<char*>(b.data()) + b_bytes * layer;
                               op(now);
                           }
                       }) /
               c.layers;
    };
    const double apply = pass([&](const LoraArgs& now) {
        parallel(isa.shrink_items(now), [&](int64_t i, int64_t j) { isa.apply(now, i, j); });
    });
    const double shrink = pass([&](const LoraArgs& now) {
        parallel(isa.shrink_items(now), [&](int64_t i, int64_t j) { isa.shrink(now, i, j); });
    });
    const double expand = pass([&](const LoraArgs& now) {
        parallel(isa.expand_items(now), [&](int64_t i, int64_t j) { isa.expand(now, i, j); });
    });
    const double gbs =
        (adapter_bytes + double(c.tokens) * (c.in + 2.0 * c.out) * size) / 1e9 / apply;
    std::printf("%-28s %9.1f us (shrink %8.1f expand %8.1f)  %6.2f GB/s = %3.0f %% of copy", c.name,
                apply * 1e6, shrink * 1e6, expand * 1e6, gbs, 100 * gbs / copy);
    if (c.flops)
        std::printf("  %6.1f GFLOP/s = %3.0f %% of peak (shrink %3.0f, expand %3.0f)",
                    flops / 1e9 / apply, 100 * flops / 1e9 / apply / peak,
                    100 * flops * c.in / (c.in + c.out) / 1e9 / shrink / peak,
                    100 * flops * c.out / (c.in + c.out) / 1e9 / expand / peak);
    std::printf("\n");
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) num_threads = std::max(1, std::atoi(argv[1]));
    const std::optional<Isa> chosen = argc > 2 ? isa_named(argv[2]) : best_isa();
    const std::string filter = argc > 3 ? argv[3] : "";
    if (!chosen || !isa_runs(*chosen)) {
        std::printf("cpu_twin: this machine cannot run \"%s\"\n", argv[2]);
        return 1;
    }
    const LoraCpu& twin = twins<LoraCpu>(*chosen);
    const double copy = copy_gbs(), peak = fma_gflops() * num_threads;
    std::printf("isa %s, %d threads, copy %.2f GB/s, multiply-add (32-byte vectors) %.1f GFLOP/s\n",
                twin.isa, num_threads, copy, peak);
    const DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16;
    const Case cases[] = {
        {"D4 f32", f32, 64, 64, 4096, 14336, {16}, 5, false},
        {"D5 f32", f32, 64, 64, 4096, 4096, {64}, 5, false},
        {"D6 f32", f32, 256, 64, 14336, 4096, {32}, 5, false},
        {"D5 f32 mixed 8-64", f32, 64, 64, 4096, 4096, {8, 16, 32, 64}, 5, false},
        {"D4 bf16", bf16, 64, 64, 4096, 14336, {16}, 5, false},
        {"D4 f16", f16, 64, 64, 4096, 14336, {16}, 5, false},
        {"decode 576-1536 f32", f32, 16, 16, 576, 1536, {16}, 5, false, 50},
        {"decode 1536-576 f32", f32, 16, 16, 1536, 576, {16}, 5, false, 50},
        {"decode 1 row 576-1536 f32", f32, 1, 1, 576, 1536, {16}, 50, false, 50},
        {"decode 576-1536 bf16", bf16, 16, 16, 576, 1536, {16}, 5, false, 50},
        {"decode 1536-576 bf16", bf16, 16, 16, 1536, 576, {16}, 5, false, 50},
        {"decode 1 row 576-1536 bf16", bf16, 1, 1, 576, 1536, {16}, 50, false, 50},
        {"prefill 576-1536 f32", f32, 1024, 8, 576, 1536, {16}, 20, true},
        {"prefill 1536-576 f32", f32, 1024, 8, 1536, 576, {16}, 20, true},
        {"prefill 4096-4096 f32 r64", f32, 512, 4, 4096, 4096, {64}, 5, true},
        {"prefill 576-1536 bf16", bf16, 1024, 8, 576, 1536, {16}, 20, true},
        {"prefill 576-1536 f16", f16, 1024, 8, 576, 1536, {16}, 20, true},
    };
    for (const Case& c : cases)
        if (std::string(c.name).find(filter) != std::string::npos) run_case(twin, c, copy, peak);

    for (int64_t tokens : {1, 16, 32, 256, 8192}) {
        std::vector<int64_t> ids(tokens);
        for (int64_t t = 0; t < tokens; ++t) ids[t] = t * 7 % 64;
        std::vector<int32_t> plan(LoraPlanLayout{tokens, 64}.size());
        const double s = seconds(5, [&] {
            for (int i = 0; i < 1000; ++i)
                lora_plan_cpu({ids.data(), true, nullptr, tokens, 64, plan.data()});
        });
        std::printf("plan T=%d, 64 adapters: %.0f ns\n", int(tokens), s * 1e6);
    }
}
