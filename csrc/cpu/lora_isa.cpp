// Batched LoRA on the CPU, compiled once per instruction set (LX_ISA names the namespace).
#include <cstdint>
#include <cstring>

#include "lora_ext/lora.h"

namespace lora_ext::LX_ISA {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

inline uint32_t bits_of(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline float load(float v) {
    return v;
}
inline double load(double v) {
    return v;
}
inline float load(BFloat v) {
    return float_of(uint32_t{v.bits} << 16);
}
inline float load(Half v) {
    const uint32_t magnitude = v.bits & 0x7fffu;
    uint32_t u = bits_of(float_of(magnitude << 13) * 0x1p112f);
    if (magnitude >= 0x7c00u) u |= 0x7f800000u;
    return float_of(u | (v.bits & 0x8000u) << 16);
}

inline void store(float* p, float v) {
    *p = v;
}
inline void store(double* p, double v) {
    *p = v;
}
inline void store(BFloat* p, float v) {
    const uint32_t u = bits_of(v);
    p->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
inline void store(Half* p, float v) {
    const uint32_t u = bits_of(v), magnitude = u & 0x7fffffffu;
    uint32_t h;
    if (magnitude > 0x7f800000u) {
        h = 0x7e00;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        h = 0x7c00;
    } else if (magnitude < 0x38800000u) {  // subnormal: let the adder round at 2^-24
        h = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        h = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
    }
    p->bits = static_cast<uint16_t>(h | (u >> 16 & 0x8000u));
}

template <typename T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};

constexpr int64_t kOutBlock = 1024;

template <typename T>
const T* page(const void* base, const LoraBank& bank, int32_t slot, int32_t p, int64_t slot_stride,
              int64_t page_stride) {
    const T* first = static_cast<const T*>(base);
    if (bank.page_table)
        return first + bank.page_table[int64_t{slot} * bank.pages_per_slot + p] * page_stride;
    return first + slot * slot_stride + p * page_stride;
}

struct Chunk {
    int32_t slot, len, rank;
    const int32_t* rows;
};

Chunk chunk_at(const LoraArgs& args, int64_t c) {
    const LoraPlanLayout layout{args.num_tokens, args.bank.num_adapters};
    const int32_t* chunk = args.plan + layout.chunks() + 4 * c;
    const int32_t rank = args.bank.ranks ? args.bank.ranks[chunk[0]] : args.bank.max_rank;
    return {chunk[0], chunk[2], rank, args.plan + layout.perm() + chunk[1]};
}

template <typename T>
void shrink(const LoraArgs& args, int64_t begin, int64_t end) {
    using Acc = typename AccOf<T>::type;
    const LoraBank& bank = args.bank;
    for (int64_t c = begin; c < end; ++c) {
        const Chunk chunk = chunk_at(args, c);
        const Acc scale = bank.scale ? bank.scale[chunk.slot] : 1;
        for (int32_t i = 0; i < chunk.len; ++i) {
            const T* x = static_cast<const T*>(args.x) + chunk.rows[i] * args.x_row_stride;
            Acc* v = static_cast<Acc*>(args.v) + chunk.rows[i] * args.v_row_stride;
            for (int32_t r = 0; r < chunk.rank; ++r) {
                const T* a = page<T>(bank.a, bank, chunk.slot, r / 8, bank.a_slot_stride,
                                     bank.a_page_stride) +
                             r % 8 * bank.a_row_stride;
                Acc sum = 0;
                for (int32_t k = 0; k < bank.in_features; ++k) sum += load(a[k]) * load(x[k]);
                v[r] = scale * sum;
            }
        }
    }
}

template <typename T>
void expand_block(const LoraArgs& args, const Chunk& chunk, int64_t o_begin, int64_t o_end) {
    using Acc = typename AccOf<T>::type;
    const LoraBank& bank = args.bank;
    if (chunk.rank == 0) return;
    for (int32_t i = 0; i < chunk.len; ++i) {
        T* y = static_cast<T*>(args.y) + chunk.rows[i] * args.y_row_stride;
        const Acc* v = static_cast<const Acc*>(args.v) + chunk.rows[i] * args.v_row_stride;
        for (int64_t o = o_begin; o < o_end; ++o) {
            Acc sum = 0;
            for (int32_t r = 0; r < chunk.rank; ++r)
                sum += v[r] * load(page<T>(bank.b, bank, chunk.slot, r / 8, bank.b_slot_stride,
                                           bank.b_page_stride)[o * bank.b_row_stride + r % 8]);
            store(y + o, load(y[o]) + sum);
        }
    }
}

template <typename T>
void expand(const LoraArgs& args, int64_t begin, int64_t end) {
    const int64_t out = args.bank.out_features;
    const int64_t blocks = ceil_div(out, kOutBlock);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t o = item % blocks * kOutBlock;
        expand_block<T>(args, chunk_at(args, item / blocks), o,
                        o + kOutBlock < out ? o + kOutBlock : out);
    }
}

template <typename T>
void apply(const LoraArgs& args, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
        shrink<T>(args, c, c + 1);
        expand_block<T>(args, chunk_at(args, c), 0, args.bank.out_features);
    }
}

#define LX_BY_DTYPE(name)                                               \
    void name##_any(const LoraArgs& args, int64_t begin, int64_t end) { \
        switch (args.dtype) {                                           \
            case DType::kFloat32:                                       \
                return name<float>(args, begin, end);                   \
            case DType::kFloat16:                                       \
                return name<Half>(args, begin, end);                    \
            case DType::kBFloat16:                                      \
                return name<BFloat>(args, begin, end);                  \
            case DType::kFloat64:                                       \
                return name<double>(args, begin, end);                  \
        }                                                               \
    }
LX_BY_DTYPE(shrink)
LX_BY_DTYPE(expand)
LX_BY_DTYPE(apply)
#undef LX_BY_DTYPE

int64_t shrink_items(const LoraArgs& args) {
    return args.plan[kPlanNumChunks];
}
int64_t expand_items(const LoraArgs& args) {
    return args.plan[kPlanNumChunks] * ceil_div(args.bank.out_features, kOutBlock);
}

}  // namespace

#define LX_STRING_(x) #x
#define LX_STRING(x) LX_STRING_(x)
extern const LoraCpu table;
const LoraCpu table = {LX_STRING(LX_ISA), shrink_items, shrink_any,
                       expand_items,      expand_any,   apply_any};

}  // namespace lora_ext::LX_ISA
