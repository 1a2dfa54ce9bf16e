// Laws of the CPU twins, checked on every instruction set that this machine can run:
//   close to a float64 reference (tolerance below); untouched rows and padding keep every bit;
//   memory beyond a rank is not used (it holds NaN); a row's bits depend neither on the split into
//   items nor on the other rows of its chunk; apply equals shrink followed by expand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "lora_ext/isa.h"
#include "lora_ext/lora.h"
#include "twin_test.h"

using namespace lora_ext;

void check_plans();  // defined in lora_plan_test.cpp

namespace lora_ext {
namespace scalar {
extern const LoraCpu lora_table;
}
#ifdef LX_WIDE_TABLE
// A table for 64-byte vectors: avx512, or avx2_wide, which tests avx512 code without avx512.
namespace LX_WIDE_TABLE {
extern const LoraCpu lora_table;
}
#endif
}  // namespace lora_ext

namespace {

struct Shape {
    int64_t tokens, in, out;
    std::vector<int32_t> ranks;  // rank of each adapter
    int32_t max_rank;
    bool paged;  // whether the bank consists of pool pages with a table
    bool scaled;
    double inactive;  // fraction of rows with id -1
    bool sorted;
};

template <DType kType>
struct Problem {
    using Ty = Type<kType>;
    using S = typename Ty::S;
    using Acc = typename Ty::Acc;

    Shape shape;
    std::vector<S> a, b, x, y;
    std::vector<Acc> v;
    std::vector<float> scale;
    std::vector<int32_t> table, plan;
    std::vector<int64_t> ids;
    LoraArgs args;

    explicit Problem(const Shape& s) : shape(s) {
        const int32_t num = static_cast<int32_t>(s.ranks.size());
        const int32_t pages = static_cast<int32_t>(ceil_div(s.max_rank, 8));
        LoraBank& bank = args.bank;
        bank.num_adapters = num;
        bank.max_rank = s.max_rank;
        bank.pages_per_slot = pages;
        bank.in_features = static_cast<int32_t>(s.in);
        bank.out_features = static_cast<int32_t>(s.out);
        bank.ranks = shape.ranks.data();
        bank.full_pages = s.paged || s.max_rank % 8 == 0;
        int64_t a_size, b_size;
        if (s.paged) {
            bank.a_row_stride = s.in;
            bank.a_page_stride = 8 * s.in;
            bank.b_row_stride = 8;
            bank.b_page_stride = 8 * s.out;
            std::vector<int32_t> order(num * pages + 3);
            for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
            std::shuffle(order.begin(), order.end(), rng);
            table.assign(order.begin(), order.begin() + num * pages);
            table.push_back(0);
            bank.page_table = table.data();
            a_size = order.size() * bank.a_page_stride;
            b_size = order.size() * bank.b_page_stride;
        } else {
            bank.a_row_stride = s.in + below(3);
            bank.a_page_stride = 8 * bank.a_row_stride;
            bank.a_slot_stride = s.max_rank * bank.a_row_stride;
            bank.b_row_stride = s.max_rank + (bank.full_pages ? 8 * below(2) : below(3));
            bank.b_page_stride = 8;
            bank.b_slot_stride = s.out * bank.b_row_stride;
            a_size = num * bank.a_slot_stride;
            b_size = num * bank.b_slot_stride;
        }
        // All memory except the operands is NaN, so that any use of it makes the result NaN.
        a.assign(a_size, Ty::nan());
        b.assign(b_size, Ty::nan());
        bank.a = a.data();
        bank.b = b.data();
        for (int32_t slot = 0; slot < num; ++slot) {
            for (int32_t r = 0; r < s.ranks[slot]; ++r) {
                for (int64_t k = 0; k < s.in; ++k) a[a_at(slot, r) + k] = Ty::put(uniform());
                for (int64_t o = 0; o < s.out; ++o) b[b_at(slot, r, o)] = Ty::put(uniform());
            }
            scale.push_back(static_cast<float>(0.5 + uniform()));
        }
        if (s.scaled) bank.scale = scale.data();

        args.dtype = kType;
        args.num_tokens = s.tokens;
        args.x_row_stride = s.in + below(4);
        args.y_row_stride = s.out + below(4);
        args.v_row_stride = s.max_rank + below(2);
        x.assign(s.tokens * args.x_row_stride + 1, Ty::nan());
        y.assign(s.tokens * args.y_row_stride + 1, Ty::nan());
        args.x = x.data() + 1;  // rows are unaligned
        args.y = y.data() + 1;
        for (int64_t t = 0; t < s.tokens; ++t) {
            for (int64_t k = 0; k < s.in; ++k)
                x[1 + t * args.x_row_stride + k] = Ty::put(uniform());
            for (int64_t o = 0; o < s.out; ++o)
                y[1 + t * args.y_row_stride + o] = Ty::put(4 * uniform());
            ids.push_back(num == 0 || std::fabs(uniform()) < s.inactive ? -1 : below(num));
        }
        if (s.sorted) std::sort(ids.begin(), ids.end());
        clear_v();
        make_plan();
    }

    void clear_v() {
        v.assign(shape.tokens * args.v_row_stride + 1, std::numeric_limits<Acc>::quiet_NaN());
        args.v = v.data();
    }
    void make_plan() {
        const LoraPlanLayout layout{shape.tokens, args.bank.num_adapters};
        plan.assign(layout.size(), -7);
        LoraPlanArgs p;
        p.adapter_ids = ids.data();
        p.num_tokens = shape.tokens;
        p.num_adapters = args.bank.num_adapters;
        p.plan = plan.data();
        lora_plan_cpu(p);
        args.plan = plan.data();
    }
    int64_t a_at(int32_t slot, int32_t r) const {
        const LoraBank& k = args.bank;
        return (k.page_table ? table[slot * k.pages_per_slot + r / 8] * k.a_page_stride
                             : slot * k.a_slot_stride + r / 8 * k.a_page_stride) +
               r % 8 * k.a_row_stride;
    }
    int64_t b_at(int32_t slot, int32_t r, int64_t o) const {
        const LoraBank& k = args.bank;
        return (k.page_table ? table[slot * k.pages_per_slot + r / 8] * k.b_page_stride
                             : slot * k.b_slot_stride + r / 8 * k.b_page_stride) +
               o * k.b_row_stride + r % 8;
    }

    // The error of y is at most one rounding to its type, plus c = 16 + sqrt(I) / 2 roundings of
    // the sums in the accumulation type, in which v is stored.
    void check(const std::vector<S>& got, const std::string& what) const {
        const double c = 16 + std::sqrt(static_cast<double>(shape.in)) / 2;
        std::vector<double> vs(shape.max_rank), vmag(shape.max_rank);
        for (int64_t t = 0; t < shape.tokens; ++t) {
            const int64_t slot = ids[t];
            const int32_t rank = slot < 0 ? 0 : shape.ranks[slot];
            const double sc = slot >= 0 && shape.scaled ? scale[slot] : 1;
            for (int32_t r = 0; r < rank; ++r) {
                vs[r] = vmag[r] = 0;
                for (int64_t k = 0; k < shape.in; ++k) {
                    const double product =
                        Ty::get(a[a_at(slot, r) + k]) * Ty::get(x[1 + t * args.x_row_stride + k]);
                    vs[r] += sc * product;
                    vmag[r] += std::fabs(sc * product);
                }
            }
            for (int64_t o = 0; o < args.y_row_stride; ++o) {
                const int64_t at = 1 + t * args.y_row_stride + o;
                if (at >= static_cast<int64_t>(y.size())) break;
                if (rank == 0 || o >= shape.out) {
                    EXPECT(!std::memcmp(&got[at], &y[at], sizeof(S)),
                           "%s: row %d column %d was touched", what.c_str(), int(t), int(o));
                    continue;
                }
                double want = Ty::get(y[at]), magnitude = std::fabs(want);
                for (int32_t r = 0; r < rank; ++r) {
                    const double w = Ty::get(b[b_at(slot, r, o)]);
                    want += w * vs[r];
                    magnitude += std::fabs(w) * vmag[r];
                }
                const double bound =
                    1.02 * Ty::kUnit * std::fabs(want) + c * Ty::kSum * magnitude + Ty::kTiny;
                const double error = std::fabs(Ty::get(got[at]) - want);
                EXPECT(error <= bound,
                       "%s: row %d (id %d, rank %d) column %d: got %g, want %g, error %g, bound %g",
                       what.c_str(), int(t), int(slot), rank, int(o), Ty::get(got[at]), want, error,
                       bound);
            }
        }
    }
};

// Calls run(begin, end) on ranges of items of random length, in random order.
template <typename Run>
void in_pieces(int64_t items, Run run) {
    std::vector<int64_t> cuts{0};
    while (cuts.back() < items) cuts.push_back(std::min(items, cuts.back() + 1 + below(4)));
    std::vector<size_t> order(cuts.size() - 1);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t i : order) run(cuts[i], cuts[i + 1]);
}

template <DType kType>
void check_shape(const LoraCpu& isa, const Shape& shape) {
    Problem<kType> p(shape);
    std::string what = std::string(isa.isa) + " " + name_of(kType) +
                       " T=" + std::to_string(shape.tokens) + " I=" + std::to_string(shape.in) +
                       " O=" + std::to_string(shape.out) + " R=" + std::to_string(shape.max_rank) +
                       (shape.paged ? " paged" : " bank");
    const auto original = p.y;
    const auto result = [&](auto&& run) {
        auto y = original;
        p.clear_v();
        p.args.y = y.data() + 1;
        run();
        p.args.y = p.y.data() + 1;
        return y;
    };
    const auto same = [&](const auto& left, const auto& right, const char* law) {
        EXPECT(!std::memcmp(left.data(), right.data(), left.size() * sizeof(left[0])), "%s: %s",
               what.c_str(), law);
    };

    const auto whole = result([&] { isa.apply(p.args, 0, isa.shrink_items(p.args)); });
    p.check(whole, what);
    same(whole, result([&] {
             in_pieces(isa.shrink_items(p.args),
                       [&](int64_t i, int64_t j) { isa.apply(p.args, i, j); });
         }),
         "apply depends on how its items are split");
    same(whole, result([&] {
             in_pieces(isa.shrink_items(p.args),
                       [&](int64_t i, int64_t j) { isa.shrink(p.args, i, j); });
             for (int64_t t = 0; t < shape.tokens; ++t) {
                 const int32_t used = p.ids[t] < 0 ? 0 : shape.ranks[p.ids[t]];
                 for (int32_t r = 0; r < p.args.v_row_stride; ++r)
                     EXPECT(std::isnan(p.v[t * p.args.v_row_stride + r]) == (r >= used),
                            "%s: v[%d][%d] of rank %d", what.c_str(), int(t), r, used);
             }
             in_pieces(isa.expand_items(p.args),
                       [&](int64_t i, int64_t j) { isa.expand(p.args, i, j); });
         }),
         "apply differs from shrink and expand in pieces");

    // Compute single rows, with all other rows inactive.
    const auto ids = p.ids;
    for (int64_t n = 0; n < 8 && n < shape.tokens; ++n) {
        const int64_t t = below(shape.tokens);
        for (int64_t i = 0; i < shape.tokens; ++i) p.ids[i] = i == t ? ids[i] : -1;
        p.make_plan();
        const auto alone = result([&] { isa.apply(p.args, 0, isa.shrink_items(p.args)); });
        const int64_t at = 1 + t * p.args.y_row_stride;
        EXPECT(!std::memcmp(&alone[at], &whole[at], shape.out * sizeof(alone[0])),
               "%s: row %d depends on the other rows of its chunk", what.c_str(), int(t));
    }
}

void check_isa(const LoraCpu& isa) {
    const std::vector<Shape> shapes = {
        {1, 1, 1, {1}, 1, false, true, 0, false},
        {1, 64, 64, {8}, 8, true, false, 0, false},
        {5, 7, 13, {0, 3, 5}, 5, false, true, 0.3, false},
        {16, 576, 1536, {16, 16, 16, 16, 16, 16, 16, 16}, 16, true, true, 0, false},
        {33, 61, 67, {1, 2, 4, 7, 8, 9}, 9, false, true, 0.3, false},
        {33, 61, 67, {1, 2, 4, 7, 8, 9}, 9, true, true, 0.3, false},
        {64, 2049, 130, {8, 16, 32, 64}, 64, false, true, 0.1, false},
        {40, 130, 2049, {8, 16, 32, 64, 12}, 64, true, true, 0.1, false},
        {17, 33, 40, {256, 255, 0}, 256, true, true, 0.1, false},
        {300, 100, 90, {16, 4}, 16, false, false, 0.1, true},
        {257, 1030, 47, {35, 4}, 35, false, true, 0.5, false},
        {700, 24, 50, {16}, 16, true, true, 0, true},
        {20, 16, 16, {}, 0, false, true, 1, false},
        {6, 16, 16, {4, 4}, 4, false, true, 0, false},
        {3, 40, 5000, {4, 4}, 4, false, true, 0, false},
    };
    for (Shape shape : shapes) {
        check_shape<DType::kFloat32>(isa, shape);
        check_shape<DType::kFloat16>(isa, shape);
        check_shape<DType::kBFloat16>(isa, shape);
        check_shape<DType::kFloat64>(isa, shape);
    }
    for (int i = 0; i < 60; ++i) {
        Shape s{1 + below(70),
                1 + below(150),
                1 + below(150),
                {},
                static_cast<int32_t>(1 + below(40)),
                below(2) == 1,
                below(2) == 1,
                0.2,
                below(2) == 1};
        for (int64_t n = 1 + below(6); n-- > 0;)
            s.ranks.push_back(static_cast<int32_t>(below(s.max_rank + 1)));
        check_shape<DType::kFloat32>(isa, s);
        check_shape<DType::kFloat16>(isa, s);
        check_shape<DType::kBFloat16>(isa, s);
        check_shape<DType::kFloat64>(isa, s);
    }
}

// Checks conversions. y += 0 * ... must not change the bits of any 16-bit number (NaN remains NaN),
// and random float32 sums must be rounded as Type::put does.
template <DType kType>
void check_conversion(const LoraCpu& isa) {
    using Ty = Type<kType>;
    const int64_t out = 65536;
    std::vector<uint16_t> y(out), b(8 * out, Ty::put(0)), a(8, Ty::put(1)), x(1, Ty::put(1));
    for (int64_t o = 0; o < out; ++o) y[o] = static_cast<uint16_t>(o);
    std::vector<float> v(8);
    std::vector<int32_t> ids{0}, plan(LoraPlanLayout{1, 1}.size()), table{0}, ranks{1};
    LoraPlanArgs pa;
    pa.adapter_ids = ids.data();
    pa.ids_are_int64 = false;
    pa.num_tokens = pa.num_adapters = 1;
    pa.plan = plan.data();
    lora_plan_cpu(pa);
    LoraArgs args;
    args.dtype = kType;
    LoraBank& bank = args.bank;
    bank.a = a.data();
    bank.b = b.data();
    bank.page_table = table.data();
    bank.ranks = ranks.data();
    bank.a_page_stride = 8;
    bank.a_row_stride = 1;
    bank.b_page_stride = 8 * out;
    bank.b_row_stride = 8;
    bank.num_adapters = bank.max_rank = bank.pages_per_slot = bank.num_pages = 1;
    bank.in_features = 1;
    bank.out_features = static_cast<int32_t>(out);
    bank.full_pages = true;
    args.num_tokens = 1;
    args.x = x.data();
    args.y = y.data();
    args.v = v.data();
    args.x_row_stride = 1;
    args.y_row_stride = out;
    args.v_row_stride = 8;
    args.plan = plan.data();
    isa.apply(args, 0, 1);
    for (int64_t o = 0; o < out; ++o) {
        const double before = Ty::get(static_cast<uint16_t>(o)), after = Ty::get(y[o]);
        EXPECT(std::isnan(before) ? std::isnan(after) : before == after,
               "%s %s: bits %04x became %04x", isa.isa, name_of(kType), int(o), y[o]);
    }
    for (int round = 0; round < 4; ++round) {
        std::vector<uint16_t> y0(out);
        for (int64_t o = 0; o < out; ++o) {
            const double size = std::ldexp(1, static_cast<int>(below(40)) - 26);
            y0[o] = y[o] = Ty::put(uniform() * size);
            b[8 * o] = Ty::put(uniform() * size * std::ldexp(1, -static_cast<int>(below(8))));
        }
        isa.apply(args, 0, 1);
        for (int64_t o = 0; o < out; ++o) {
            const float sum =
                static_cast<float>(Ty::get(y0[o])) + static_cast<float>(Ty::get(b[8 * o]));
            EXPECT(y[o] == Ty::put(sum) || sum == 0, "%s %s: %.9g rounded to %04x, not %04x",
                   isa.isa, name_of(kType), sum, y[o], Ty::put(sum));
        }
    }
}

}  // namespace

int main() {
    check_plans();

    std::vector<const LoraCpu*> tables;
#ifdef LX_ALL_TWINS
    for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
        EXPECT(isa_named(isa_name(isa)) == isa, "%s is not found by its name", isa_name(isa));
        if (!isa_runs(isa)) continue;
        tables.push_back(&twins<LoraCpu>(isa));
        EXPECT(!std::strcmp(tables.back()->isa, isa_name(isa)), "%s has the table of %s",
               isa_name(isa), tables.back()->isa);
    }
    EXPECT(!isa_named("none"), "an unknown instruction set has a name");
    EXPECT(&twins<LoraCpu>(best_isa()) == tables.back(), "the best table is not the last");
#else
    tables.push_back(&scalar::lora_table);
#endif
#ifdef LX_WIDE_TABLE
    if (__builtin_cpu_supports("avx2")) tables.push_back(&LX_WIDE_TABLE::lora_table);
#endif
    for (const LoraCpu* table : tables) {
        check_isa(*table);
        check_conversion<DType::kFloat16>(*table);
        check_conversion<DType::kBFloat16>(*table);
        std::printf("%s: %d failures so far\n", table->isa, failures);
    }
    return failures != 0;
}
