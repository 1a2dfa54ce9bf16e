// Calls of lora_apply in one stream, whose launches run one after the other or overlap. Linked with
// the decode kernels alone.
#include <cstring>
#include <vector>

#include "emu/emu.h"
#include "lora_train.cuh"

namespace lora_ext {

// Stages that decode up to rank 256 does not have.
Slices projection_slices(const LoraArgs&, bool, bool) {
    return {};
}
LaunchStatus run_shrink_rows(const Projection&, const Slices&, void*) {
    return kInvalidValue;
}
LaunchStatus run_weigh(const LoraArgs&, const Partials&, float, FloatRows, FloatRows, bool, void*) {
    return kInvalidValue;
}
LaunchStatus run_gemm_shrink(const LoraArgs&, const Partials&, void*) {
    return kInvalidValue;
}
LaunchStatus run_gemm_reduce(const LoraArgs&, const Partials&, float, bool, void*) {
    return kInvalidValue;
}
LaunchStatus run_gemm_expand(const LoraArgs&, const Partials&, bool, void*) {
    return kInvalidValue;
}

namespace {

struct Copies {
    uint32_t* to[8];
    const uint32_t* from[8];
    int words[8];
};

// Overwrites everything that the next launch reads, and lets it start before.
__global__ void overwrite_kernel(const __grid_constant__ Copies copies) {
    lx::grid_dependency_launch();
    for (int k = 0; k < 8; ++k)
        for (int i = lx::thread_rank(); i < copies.words[k]; i += 32)
            copies.to[k][i] = copies.from[k][i];
}

using T = lx::bf16;
constexpr int kRows = 20, kSlots = 3, kRank = 16, kPages = 2, kWidth = 1024;

struct alignas(16) Word {
    unsigned char bytes[16];
};
template <class E>
struct Array {
    std::vector<Word> words;
    int count;
    explicit Array(int count) : words((count * sizeof(E) + 15) / 16), count(count) {}
    E* data() { return reinterpret_cast<E*>(words.data()); }
    E& operator[](int i) { return data()[i]; }
};

uint32_t random_state;
int below(int n) {
    random_state = random_state * 1664525u + 1013904223u;
    return static_cast<int>((random_state >> 8) % static_cast<uint32_t>(n));
}
Array<T> random_values(int count, int largest) {
    Array<T> values(count);
    for (int i = 0; i < count; ++i)
        values[i] = lx::from_float<T>(static_cast<float>(below(2 * largest + 1) - largest) / 8);
    return values;
}

// What the calls read, in two versions; overwrite_kernel replaces the first by the second.
struct Inputs {
    Array<T> x = random_values(kRows * kWidth, 8), a = random_values(kSlots * kRank * kWidth, 4);
    Array<float> scale{kSlots};
    Array<int32_t> ids{kRows}, table{kSlots * kPages},
        plan{static_cast<int>(LoraPlanLayout{kRows, kSlots}.size())};

    explicit Inputs(int turn) {
        for (int i = 0; i < kSlots; ++i) scale[i] = 0.5f + i + turn;
        for (int i = 0; i < kRows; ++i) ids[i] = (i * (turn + 1) + turn) % (kSlots + 1) - 1;
        for (int i = 0; i < table.count; ++i) table[i] = (i + turn) % table.count;
    }
};

LaunchStatus run(bool planned, unsigned char* out) {
    random_state = 1;
    Inputs now(0), later(1);
    Array<T> b = random_values(kSlots * kPages * kWidth * kPageRanks, 4);
    Array<T> y = random_values(kRows * kWidth, 8), z = random_values(kRows * kWidth, 8);

    LoraArgs args;
    args.dtype = DType::kBFloat16;
    LoraBank& bank = args.bank;
    bank.a = now.a.data(), bank.b = b.data();
    bank.page_table = now.table.data(), bank.scale = now.scale.data();
    bank.a_row_stride = kWidth, bank.b_row_stride = kPageRanks;
    bank.a_page_stride = bank.b_page_stride = kPageRanks * kWidth;
    bank.num_adapters = kSlots, bank.max_rank = kRank, bank.pages_per_slot = kPages;
    bank.num_pages = kSlots * kPages, bank.full_pages = true;
    bank.in_features = bank.out_features = kWidth;
    args.num_tokens = kRows, args.x_row_stride = args.y_row_stride = kWidth;
    args.ids.adapter_ids = now.ids.data(), args.ids.ids_are_int64 = false;
    args.ids.num_tokens = kRows, args.ids.num_adapters = kSlots;

    LaunchStatus status = 0;  // the first error; later launches run all the same
    const auto note = [&](LaunchStatus found) { status = status ? status : found; };
    const auto plan = [&](Inputs& inputs) {
        LoraPlanArgs ids = args.ids;
        ids.adapter_ids = inputs.ids.data(), ids.plan = inputs.plan.data();
        note(launch_lora_plan(ids, nullptr));
    };
    plan(later), plan(now);
    if (planned) args.plan = now.plan.data();
    Array<float> workspace(static_cast<int>(lora_workspace_bytes(args) / 4));
    args.workspace = workspace.data();
    const auto apply = [&](Array<T>& from, Array<T>& to) {
        args.x = from.data(), args.y = to.data();
        note(launch_lora_apply(std::span(&args, 1), nullptr));
    };
    apply(now.x, y);
    apply(y, z);      // reads what the previous expand writes
    apply(now.x, z);  // adds to what the previous expand writes
    const auto overwrite = [&](auto... arrays) {
        Copies copies{};
        int k = 0;
        const auto add = [&](auto& to, auto& from) {
            copies.to[k] = reinterpret_cast<uint32_t*>(to.data());
            copies.from[k] = reinterpret_cast<const uint32_t*>(from.data());
            copies.words[k] = to.count * static_cast<int>(sizeof(to[0])) / 4;
            LX_BUF(to.data(), copies.words[k] * 4, lx::Access::kWrite);
            LX_BUF(from.data(), copies.words[k] * 4, lx::Access::kRead);
            ++k;
        };
        ((add(now.*arrays, later.*arrays)), ...);
        note(LX_LAUNCH(overwrite_kernel, 1, 32, 0, nullptr, copies));
    };
    overwrite(&Inputs::x, &Inputs::a, &Inputs::scale, &Inputs::ids, &Inputs::table, &Inputs::plan);
    apply(now.x, y);
    note(lx::emu::synchronize());
    memcpy(out, y.data(), kRows * kWidth * sizeof(T));
    memcpy(out + kRows * kWidth * sizeof(T), z.data(), kRows * kWidth * sizeof(T));
    return status;
}

}  // namespace
}  // namespace lora_ext

// `out` receives y and z, 2 x 20 x 1024 numbers of 16 bits.
extern "C" __attribute__((visibility("default"))) int overlap_chain(int64_t overlapping,
                                                                    int64_t planned, void* out) {
    lx::emu::Options options = lx::emu::options();
    options.overlapping = static_cast<lx::emu::Overlapping>(overlapping);
    lx::emu::set_options(options);
    return lora_ext::run(planned != 0, static_cast<unsigned char*>(out));
}
