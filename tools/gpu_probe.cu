// Measures the constants that the estimates in docs/gpu.md assume, on the GPU in about ten seconds.
//
//     nvcc -O3 -std=c++20 -arch=native tools/gpu_probe.cu -o probe && ./probe
//
// Prints one line "name value unit" per constant as soon as it is measured. Not yet run on a GPU.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

namespace {

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "gpu_probe: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}
#define CHECK(call) check((call), #call)

void say(const char* name, double value, const char* unit) {
    std::printf("%s %.4g %s\n", name, value, unit);
    std::fflush(stdout);
}

// Returns the time in ms of the work that `work` enqueues on the stream: the median of nine runs,
// after a warm-up run.
template <class Work>
double measured(cudaStream_t stream, Work work) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 10; ++i) {
        CHECK(cudaEventRecord(begin, stream));
        work();
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i > 0) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// --- launches ------------------------------------------------------------------------------------
__global__ void nothing() {}

// Lets the next kernel start and waits for the previous one, as the two kernels of decoding do.
__global__ void hand_on() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

double launch_us(cudaStream_t stream, bool dependent) {
    constexpr int kLaunches = 200;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = 132;
    config.blockDim = 128;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kLaunches; ++i)
        CHECK(cudaLaunchKernelEx(&config, dependent ? hand_on : nothing));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    const double ms = measured(stream, [&] { CHECK(cudaGraphLaunch(ready, stream)); });
    CHECK(cudaGraphExecDestroy(ready));
    CHECK(cudaGraphDestroy(graph));
    return ms * 1e3 / kLaunches;
}

// --- memory --------------------------------------------------------------------------------------
__global__ void chase(const uint32_t* next, int steps, uint32_t* last, long long* clocks) {
    uint32_t at = 0;
    const long long begin = clock64();
    for (int i = 0; i < steps; ++i) at = __ldcg(next + at);
    *clocks = clock64() - begin;
    *last = at;
}

// Returns the cycles of a load that depends on the previous load, over a ring of cache lines in
// random order.
double chase_clocks(cudaStream_t stream, size_t bytes) {
    constexpr size_t kLine = 128 / sizeof(uint32_t);
    const size_t lines = bytes / 128;
    std::vector<uint32_t> order(lines), next(lines * kLine, 0);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin() + 1, order.end(), std::mt19937(0));
    for (size_t i = 0; i < lines; ++i) {
        next[order[i] * kLine] = static_cast<uint32_t>(order[(i + 1) % lines] * kLine);
    }
    uint32_t *ring, *last;
    long long* clocks;
    CHECK(cudaMalloc(&ring, next.size() * sizeof(uint32_t)));
    CHECK(cudaMalloc(&last, sizeof *last));
    CHECK(cudaMalloc(&clocks, sizeof *clocks));
    CHECK(cudaMemcpy(ring, next.data(), next.size() * sizeof(uint32_t), cudaMemcpyHostToDevice));
    constexpr int kSteps = 20000;
    if (lines <= kSteps) {  // one round brings the ring into L2
        chase<<<1, 1, 0, stream>>>(ring, static_cast<int>(lines), last, clocks);
    }
    chase<<<1, 1, 0, stream>>>(ring, kSteps, last, clocks);
    long long took = 0;
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(&took, clocks, sizeof took, cudaMemcpyDeviceToHost));
    CHECK(cudaFree(ring));
    CHECK(cudaFree(last));
    CHECK(cudaFree(clocks));
    return static_cast<double>(took) / kSteps;
}

double copy_tb_s(cudaStream_t stream) {
    constexpr size_t kBytes = size_t{1} << 30;
    char *from, *to;
    CHECK(cudaMalloc(&from, kBytes));
    CHECK(cudaMalloc(&to, kBytes));
    CHECK(cudaMemset(from, 1, kBytes));
    const double ms = measured(stream, [&] {
        CHECK(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, stream));
    });
    CHECK(cudaFree(from));
    CHECK(cudaFree(to));
    return 2.0 * kBytes / ms * 1e-9;
}

// --- arithmetic ----------------------------------------------------------------------------------
constexpr int kRounds = 4096, kChains = 8;

// Independent chains of tensor-core products; their result is used, so that none is optimised away.
__global__ void products(float* out) {
    float c[kChains][4] = {};
    uint32_t a[4], b[2];
    for (uint32_t& word : a) word = 0x3f803f80u + threadIdx.x;  // two bfloat16 near 1
    for (uint32_t& word : b) word = 0x3f803f80u + blockIdx.x;
    for (int i = 0; i < kRounds; ++i) {
#pragma unroll
        for (int k = 0; k < kChains; ++k) {
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(c[k][0]), "+f"(c[k][1]), "+f"(c[k][2]), "+f"(c[k][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
    float sum = 0;
    for (auto& chain : c) {
        for (float value : chain) sum += value;
    }
    if (sum == -1.0f) *out = sum;
}

__global__ void exponentials(float* out) {
    float x[kChains];
    for (int k = 0; k < kChains; ++k) x[k] = -1.0f / (1 + threadIdx.x + k);
    for (int i = 0; i < kRounds; ++i) {
#pragma unroll
        for (int k = 0; k < kChains; ++k) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[k]));
    }
    float sum = 0;
    for (float value : x) sum += value;
    if (sum == -1.0f) *out = sum;
}

template <class Kernel>
double seconds_on_all(cudaStream_t stream, Kernel kernel, int blocks) {
    float* out;
    CHECK(cudaMalloc(&out, sizeof *out));
    const double ms = measured(stream, [&] { kernel<<<blocks, 512, 0, stream>>>(out); });
    CHECK(cudaFree(out));
    return ms * 1e-3;
}

}  // namespace

int main() {
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, 0));
    int driver = 0, khz = 0;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
    std::printf("card %s, sm_%d%d, driver's CUDA %d\n", card.name, card.major, card.minor, driver);
    say("multiprocessors", card.multiProcessorCount, "");
    say("clock", khz * 1e-3, "MHz at most");
    say("shared_memory", card.sharedMemPerBlockOptin / 1024.0, "KiB a block");
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    say("launch", launch_us(stream, false), "us, empty, in a graph");
    if (card.major >= 9) say("dependent_launch", launch_us(stream, true), "us, likewise");
    say("l2_latency", chase_clocks(stream, size_t{2} << 20), "clocks");
    say("dram_latency", chase_clocks(stream, size_t{1} << 30), "clocks");
    say("copy", copy_tb_s(stream), "TB/s, read and written");
    const int blocks = card.multiProcessorCount * 4, warps = blocks * 16;
    const double flops = 2.0 * 16 * 8 * 16 * kRounds * kChains * warps;
    say("mma_bf16", flops / seconds_on_all(stream, products, blocks) * 1e-12, "TFLOP/s");
    const double made = 32.0 * kRounds * kChains * warps;
    say("exp2", made / seconds_on_all(stream, exponentials, blocks) * 1e-12, "T/s");
    return 0;
}
