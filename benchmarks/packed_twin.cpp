// Products with packed weights, without torch: the time at SmolLM2's shapes and its lower bound,
// the time in which all threads read the weight's bytes once, measured in the same run.
//
//   packed_twin [threads] [isa]
//
// A sweep uses so many weights of one shape that no weight is still in an L2 cache when the next
// sweep begins: 64 MB, more than the L3 cache of most machines. Each thread uses its share of
// every weight.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <thread>
#include <vector>

#include "lora_ext/isa.h"
#include "lora_ext/packed_linear.h"

using namespace lora_ext;

namespace {

constexpr int64_t kSweep = int64_t{64} << 20;

// The processor time of the slowest thread. Other work on the machine affects it less than
// wall-clock time.
double seconds(int threads, const std::function<void(int)>& work) {
    std::vector<double> taken(threads);
    const auto measured = [&](int i) {
        timespec start, end;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
        work(i);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
        taken[i] = double(end.tv_sec - start.tv_sec) + 1e-9 * double(end.tv_nsec - start.tv_nsec);
    };
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i) pool.emplace_back(measured, i);
    measured(0);
    for (std::thread& t : pool) t.join();
    return *std::max_element(taken.begin(), taken.end());
}

typedef int64_t Vec __attribute__((vector_size(32), aligned(1)));

#if defined(__x86_64__)
__attribute__((target("avx2")))
#endif
int64_t read_once(const char* p, int64_t bytes) {
    Vec sum[8] = {};
    for (int64_t i = 0; i < bytes; i += 256)
        for (int j = 0; j < 8; ++j) {
            if (j % 2 == 0) __builtin_prefetch(p + i + 4096 + 32 * j);
            sum[j] ^= *reinterpret_cast<const Vec*>(p + i + 32 * j);
        }
    for (int j = 1; j < 8; ++j) sum[0] ^= sum[j];
    return sum[0][0] ^ sum[0][1] ^ sum[0][2] ^ sum[0][3];
}

void run(const PackedLinearCpu& twin, DType dtype, int64_t in, int64_t out, int threads) {
    PackedLinearArgs args;
    args.dtype = dtype;
    args.in_features = in;
    args.out_features = out;
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2, panels = ceil_div(out, kPanel);
    const int64_t panel = panel_steps(args) * kPanel * 4, bytes = panels * panel;
    const int64_t weights = std::max<int64_t>(1, kSweep / bytes);
    // A repeated 16-bit pattern that is a small normal number in both dtypes.
    std::vector<uint16_t> w(weights * bytes / 2), x(32 * in * size / 2), y(32 * out * size / 2);
    for (auto* v : {&w, &x})
        for (size_t i = 0; i < v->size(); ++i)
            (*v)[i] = static_cast<uint16_t>(0x2c00 + i * 37 % 512);
    char* const first = reinterpret_cast<char*>(w.data());
    args.x = x.data();
    args.x_stride = in;
    args.y = y.data();
    const auto sweep = [&](auto&& share) {
        return seconds(threads,
                       [&](int thread) {
                           const int64_t begin = panels * thread / threads;
                           const int64_t end = panels * (thread + 1) / threads;
                           for (int64_t i = 0; i < weights; ++i)
                               share(first + i * bytes, begin, end);
                       }) /
               weights;
    };
    constexpr int64_t kRows[] = {1, 2, 4, 8, 16, 32};
    double floor = 1e30, best[std::size(kRows)];
    std::fill(std::begin(best), std::end(best), 1e30);
    volatile int64_t sink = 0;
    for (int round = 0; round < 15; ++round) {
        floor = std::min(floor, sweep([&](char* p, int64_t begin, int64_t end) {
                             sink = read_once(p + begin * panel, (end - begin) * panel);
                         }));
        for (size_t i = 0; i < std::size(kRows); ++i)
            best[i] = std::min(best[i], sweep([&](char* p, int64_t begin, int64_t end) {
                                   PackedLinearArgs mine = args;
                                   mine.packed = p;
                                   mine.rows = kRows[i];
                                   twin.product(mine, begin, end);
                               }));
    }
    std::printf("%s %4d -> %5d  floor %7.1f us = %5.1f GB/s ", size == 4 ? "f32 " : "bf16", int(in),
                int(out), floor * 1e6, bytes / 1e9 / floor);
    for (size_t i = 0; i < std::size(kRows); ++i)
        std::printf(" %5d: %7.1f us x %.2f", int(kRows[i]), best[i] * 1e6, best[i] / floor);
    std::printf("\n");
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    const std::optional<Isa> isa = argc > 2 ? isa_named(argv[2]) : best_isa();
    if (!isa || !isa_runs(*isa)) {
        std::printf("packed_twin: this machine cannot run \"%s\"\n", argv[2]);
        return 1;
    }
    std::printf("isa %s, %d threads; rows: time x floor\n", isa_name(*isa), threads);
    constexpr int64_t kShapes[][2] = {
        {576, 576}, {576, 192}, {576, 1536}, {1536, 576}, {576, 49152}};
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
        for (const auto& [in, out] : kShapes)
            run(twins<PackedLinearCpu>(*isa), dtype, in, out, threads);
}
