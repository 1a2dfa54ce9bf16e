// Losses over a vocabulary on the CPU, compiled once per instruction set; formulas in vocab.h.
//
// An item is a row of the batch, with all its hidden states. The first pass over a chunk finds the
// largest logit; the second computes exponentials from the row, which is then in cache. Sums run
// along lanes for a block of columns, then over blocks, then over lanes.
#include "lora_ext/vocab.h"

#include "by_dtype.h"
#include "parts.h"
#include "vec_math.h"

namespace lora_ext::LX_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // columns summed before they are added to the total

template <typename A>
constexpr A kImpossible = -A(__builtin_huge_val());

template <typename A>
LX_INLINE A shift_of(A top) {
    return top == kImpossible<A> ? 0 : top;
}
// Return exp of one number, computed as a vector.
template <typename T>
LX_INLINE Acc<T> exp_of(Acc<T> x) {
    return exp(splat<Vec<T>>(x))[0];
}
template <typename T>
LX_INLINE Acc<T> log_of(Acc<T> x) {
    return log(splat<Vec<T>>(x))[0];
}
template <typename T>
LX_INLINE Acc<T> log1p_of(Acc<T> x) {
    const Acc<T> u = 1 + x;  // log(u) / (u - 1) is insensitive to the rounding of u
    return u == 1 ? x : log_of<T>(u) * (x / (u - 1));
}

template <typename V>
LX_INLINE Ints<V> lane_numbers() {
    Ints<V> numbers{};
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(V{}[0])); ++i) numbers[i] = i;
    return numbers;
}
// Return v with -inf in the lanes from `count` on.
template <typename V>
LX_INLINE V or_impossible(V v, int64_t count) {
    using E = Element<V>;
    if (count == static_cast<int64_t>(sizeof(V) / sizeof(E))) return v;
    return lane_numbers<V>() < static_cast<typename Float<E>::Int>(count)
               ? v
               : splat<V>(kImpossible<E>);
}

// Adds up to two sums over n columns to `first` and `second`. add_terms(index, count, parts) adds
// the terms of one vector of columns to `parts`.
template <typename T, typename F>
LX_INLINE void add_up(int64_t n, Acc<T>& first, Acc<T>& second, F&& add_terms) {
    Vec<T> totals[2] = {};
    for (int64_t block = 0; block < n; block += kBlock) {
        Vec<T> parts[2] = {};
        for_vectors<T>(block, min(n, block + kBlock),
                       [&](int64_t i, int64_t count)
                           __attribute__((always_inline)) { add_terms(i, count, parts); });
        totals[0] += parts[0];
        totals[1] += parts[1];
    }
    first += lane_sum(totals[0]);
    second += lane_sum(totals[1]);
}

// Conversion of a product with W: z = softcap(raw) / tau.
template <typename T, bool kCapped>
struct Logit {
    using V = Vec<T>;
    Acc<T> cap, inverse_cap, inverse_tau;

    explicit Logit(const VocabArgs& args)
        : cap(static_cast<Acc<T>>(args.softcap)),
          inverse_cap(static_cast<Acc<T>>(kCapped ? 1 / args.softcap : 0)),
          inverse_tau(static_cast<Acc<T>>(1 / args.tau)) {}

    // slope = tau dz/draw.
    LX_INLINE V of(V raw, V& slope) const {
        if constexpr (kCapped) {
            const V x = raw * inverse_cap, t = exp<false>(max(x, -x) * -2);
            const V size = (1 - t) / (1 + t), tanh = x < V{} ? -size : size;
            slope = 1 - tanh * tanh;
            return tanh * cap * inverse_tau;
        } else {
            slope = splat<V>(1);
            return raw * inverse_tau;
        }
    }
    LX_INLINE V of(V raw) const {
        V slope;
        return of(raw, slope);
    }
    LX_INLINE Acc<T> of_one(const T* p) const { return of(load_n(p, 1))[0]; }

    // Return the largest of the row's logits and `top`.
    LX_INLINE Acc<T> largest(const T* row, int64_t n, Acc<T> top) const {
        V most = splat<V>(kImpossible<Acc<T>>);
        for_vectors<T>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            most = max(most, or_impossible(load_part(row + i, count), count));
        });
        const Acc<T> z = of(splat<V>(max_lane(most)))[0];  // z increases with raw
        return z > top ? z : top;
    }
};

template <typename A>
LX_INLINE void scale_row(A* row, int64_t n, A factor) {
    for (int64_t j = 0; j < n; ++j) row[j] *= factor;
}

template <typename T>
struct State {
    Acc<T>*top, *sum, *third;

    State(const VocabArgs& args, int64_t e, int64_t n) {
        const int64_t stride = args.hiddens * args.rows;
        top = static_cast<Acc<T>*>(args.state) + e * args.rows + n;
        sum = top + stride;
        third = sum + stride;
    }
    // Sets a larger top and returns the factor that rescales the sums so far.
    LX_INLINE Acc<T> raise(Acc<T> largest) const {
        const Acc<T> fade = exp_of<T>(*top - shift_of(largest));
        *top = largest;
        *sum *= fade;
        return fade;
    }
};
template <typename T>
LX_INLINE T* logits_of(const VocabArgs& args, int64_t e, int64_t n) {
    return static_cast<T*>(args.logits) + (e * args.rows + n) * args.columns;
}
template <typename T>
LX_INLINE Acc<T>* products_of(const VocabArgs& args, int64_t e, int64_t n) {
    return static_cast<Acc<T>*>(args.products) + (e * args.rows + n) * args.width;
}
template <typename T>
LX_INLINE void fade_products(const VocabArgs& args, int64_t e, int64_t n, Acc<T> fade) {
    if (args.products && args.first > 0 && fade != 1)
        scale_row(products_of<T>(args, e, n), args.width, fade);
}
// Return the label's column in this chunk, or -1.
LX_INLINE int64_t label_column(const VocabArgs& args, int64_t n) {
    const int64_t y = args.labels[n] - args.first;
    return y >= 0 && y < args.columns ? y : -1;
}

// ------------------------------------------------------------------------------------------------
// Cross entropy

template <typename T, bool kCapped>
void cross_entropy_update(const VocabArgs& args, int64_t n) {
    using V = Vec<T>;
    if (args.labels[n] == args.ignore_index) return;
    const Logit<T, kCapped> logit(args);
    const State<T> state(args, 0, n);
    T* const row = logits_of<T>(args, 0, n);
    if (args.first == 0) {
        *state.top = kImpossible<Acc<T>>;
        *state.sum = 0;
        *state.third = Acc<T>(__builtin_nan(""));  // NaN until the label's chunk is read
    }
    const int64_t y = label_column(args, n);
    if (y >= 0) *state.third = logit.of_one(row + y);
    const Acc<T> fade = state.raise(logit.largest(row, args.columns, *state.top));
    const V shift = splat<V>(shift_of(*state.top));
    const Ints<V> numbers = lane_numbers<V>() - static_cast<typename Float<Acc<T>>::Int>(y);
    const bool kept = args.products != nullptr;
    Acc<T> none = 0;
    add_up<T>(args.columns, *state.sum, none,
              [&](int64_t i, int64_t count, V* parts) __attribute__((always_inline)) {
                  V slope;
                  const V z = or_impossible(logit.of(load_part(row + i, count), slope), count);
                  const Ints<V> at = numbers + static_cast<typename Float<Acc<T>>::Int>(i);
                  const V e =
                      y >= 0 ? (at == 0 ? V{} : exp<false>(z - shift)) : exp<false>(z - shift);
                  parts[0] += e;
                  if (kept) store_part(row + i, e * slope, count);
              });
    fade_products<T>(args, 0, n, fade);
}

template <typename T, bool kCapped>
void cross_entropy_finish(const VocabArgs& args, int64_t n) {
    using A = Acc<T>;
    A* const loss = static_cast<A*>(args.loss) + n;
    A* const lse = static_cast<A*>(args.lse) + n;
    A* const d = args.products ? products_of<T>(args, 0, n) : nullptr;
    if (args.labels[n] == args.ignore_index) {
        *loss = *lse = 0;
        for (int64_t j = 0; d && j < args.width; ++j) d[j] = 0;
        return;
    }
    const State<T> state(args, 0, n);
    const A top = *state.top, others = *state.sum, target = *state.third;
    const A own = exp_of<T>(target - shift_of(top));
    const A log_sum = own == 1 ? log1p_of<T>(others) : log_of<T>(others + own);
    *lse = top + log_sum;
    *loss = (top - target) + log_sum;
    if (!d) return;
    const A inverse = 1 / (others + own), ratio = target / static_cast<A>(args.softcap);
    const A away = others * inverse * (kCapped ? 1 - ratio * ratio : 1);
    const A* const w = static_cast<const A*>(args.targets) + n * args.width;
    for (int64_t j = 0; j < args.width; ++j) d[j] = d[j] * inverse - away * w[j];
}

template <typename T, bool kCapped>
void cross_entropy_gradient(const VocabArgs& args, int64_t n) {
    using V = Vec<T>;
    T* const row = logits_of<T>(args, 0, n);
    const bool counts = args.labels[n] != args.ignore_index;
    const Logit<T, kCapped> logit(args);
    const V lse = splat<V>(static_cast<const Acc<T>*>(args.lse)[n]);
    const auto y = static_cast<typename Float<Acc<T>>::Int>(label_column(args, n));
    for_vectors<T>(0, args.columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        V slope, d{};
        if (counts) {
            const V q = exp<false>(logit.of(load_part(row + i, count), slope) - lse);
            const auto at = lane_numbers<V>() + static_cast<typename Float<Acc<T>>::Int>(i);
            d = (at == y ? q - 1 : q) * slope;
        }
        store_part(row + i, d, count);
    });
}

// ------------------------------------------------------------------------------------------------
// Divergence from the teacher, the last of the hidden states

LX_INLINE bool counts(const VocabArgs& args, int64_t n) {
    return !args.mask || args.mask[n];
}

template <typename T, bool kCapped>
void kl_update(const VocabArgs& args, int64_t n) {
    using V = Vec<T>;
    if (!counts(args, n)) return;
    const Logit<T, kCapped> logit(args);
    const int64_t last = args.hiddens - 1;
    const bool kept = args.products != nullptr;
    const State<T> teacher(args, last, n);
    T* const z_k = logits_of<T>(args, last, n);
    if (args.first == 0) *teacher.top = kImpossible<Acc<T>>, *teacher.sum = 0;
    const Acc<T> fade_k = teacher.raise(logit.largest(z_k, args.columns, *teacher.top));
    const V shift_k = splat<V>(shift_of(*teacher.top));
    for (int64_t e = 0; e < last; ++e) {
        const State<T> state(args, e, n);
        T* const z_e = logits_of<T>(args, e, n);
        if (args.first == 0) *state.top = kImpossible<Acc<T>>, *state.sum = *state.third = 0;
        const Acc<T> fade = state.raise(logit.largest(z_e, args.columns, *state.top));
        *state.third *= fade_k;
        const V shift = splat<V>(shift_of(*state.top));
        add_up<T>(args.columns, *state.sum, *state.third,
                  [&](int64_t i, int64_t count, V* parts) __attribute__((always_inline)) {
                      const V k = or_impossible(logit.of(load_part(z_k + i, count)), count);
                      const V z = or_impossible(logit.of(load_part(z_e + i, count)), count);
                      const V p = exp<false>(k - shift_k), q = exp<false>(z - shift);
                      parts[0] += q;
                      parts[1] += p == V{} ? V{} : p * (k - z);
                      if (kept) store_part(z_e + i, q, count);
                  });
        fade_products<T>(args, e, n, fade);
    }
    Acc<T> none = 0;
    add_up<T>(args.columns, *teacher.sum, none,
              [&](int64_t i, int64_t count, V* parts) __attribute__((always_inline)) {
                  const V k = or_impossible(logit.of(load_part(z_k + i, count)), count);
                  const V p = exp<false>(k - shift_k);
                  parts[0] += p;
                  if (kept) store_part(z_k + i, p, count);
              });
    fade_products<T>(args, last, n, fade_k);
}

template <typename T>
LX_INLINE Acc<T> share_of(const VocabArgs& args) {  // tau^2 / students, divided by tau
    return static_cast<Acc<T>>(args.tau / static_cast<double>(args.hiddens - 1));
}

template <typename T, bool>
void kl_finish(const VocabArgs& args, int64_t n) {
    using A = Acc<T>;
    const int64_t last = args.hiddens - 1;
    A* const loss = static_cast<A*>(args.loss) + n;
    *loss = 0;
    const State<T> teacher(args, last, n);
    for (int64_t e = 0; e <= last; ++e) {
        const State<T> state(args, e, n);
        A* const lse = static_cast<A*>(args.lse) + e * args.rows + n;
        A* const d = args.products ? products_of<T>(args, e, n) : nullptr;
        if (!counts(args, n)) {
            *lse = 0;
            for (int64_t j = 0; d && j < args.width; ++j) d[j] = 0;
            continue;
        }
        *lse = *state.top + log_of<T>(*state.sum);
        if (e == last) continue;
        *loss += *state.third / *teacher.sum +
                 ((*state.top - *teacher.top) + log_of<T>(*state.sum / *teacher.sum));
        if (!d) continue;
        const A* const d_k = products_of<T>(args, last, n);
        const A own = share_of<T>(args) / *state.sum, other = share_of<T>(args) / *teacher.sum;
        for (int64_t j = 0; j < args.width; ++j) d[j] = d[j] * own - d_k[j] * other;
    }
    if (last > 0) *loss *= share_of<T>(args) * static_cast<A>(args.tau);
}

template <typename T, bool kCapped>
void kl_gradient(const VocabArgs& args, int64_t n) {
    using V = Vec<T>;
    const Logit<T, kCapped> logit(args);
    const int64_t last = args.hiddens - 1;
    const Acc<T>* const lse = static_cast<const Acc<T>*>(args.lse) + n;
    const V lse_k = splat<V>(lse[last * args.rows]);
    const T* const z_k = logits_of<T>(args, last, n);
    for (int64_t e = 0; e < last; ++e) {
        T* const z_e = logits_of<T>(args, e, n);
        const V lse_e = splat<V>(lse[e * args.rows]);
        for_vectors<T>(
            0, args.columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                V slope, d{};
                if (counts(args, n)) {
                    const V q = exp<false>(logit.of(load_part(z_e + i, count), slope) - lse_e);
                    const V p = exp<false>(logit.of(load_part(z_k + i, count)) - lse_k);
                    d = (q - p) * slope * share_of<T>(args);
                }
                store_part(z_e + i, d, count);
            });
    }
}

// ------------------------------------------------------------------------------------------------

#define LX_VOCAB_TWIN(name)                                                      \
    template <typename T>                                                        \
    void name##_rows(const VocabArgs& args, int64_t begin, int64_t end) {        \
        for (int64_t n = begin; n < end; ++n)                                    \
            args.softcap > 0 ? name<T, true>(args, n) : name<T, false>(args, n); \
    }
LX_VOCAB_TWIN(cross_entropy_update)
LX_VOCAB_TWIN(cross_entropy_finish)
LX_VOCAB_TWIN(cross_entropy_gradient)
LX_VOCAB_TWIN(kl_update)
LX_VOCAB_TWIN(kl_finish)
LX_VOCAB_TWIN(kl_gradient)

}  // namespace

extern const VocabCpu vocab_table;
const VocabCpu vocab_table = {LX_BY_DTYPE(cross_entropy_update_rows),
                              LX_BY_DTYPE(cross_entropy_finish_rows),
                              LX_BY_DTYPE(cross_entropy_gradient_rows),
                              LX_BY_DTYPE(kl_update_rows),
                              LX_BY_DTYPE(kl_finish_rows),
                              LX_BY_DTYPE(kl_gradient_rows)};

}  // namespace lora_ext::LX_ISA
