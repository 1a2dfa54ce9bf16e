// Drafting from a circuit and verifying the draft, compiled once per instruction set.
//
// Lanes run over the vocabulary, or over the states. The order of a sum of exponentials depends
// only on the length of the row.
#include "lora_ext/circuit_decode.h"

#include "by_dtype.h"
#include "circuit_walk.h"
#include "draw.h"

namespace lora_ext::LX_ISA {
namespace {

// Allocates the scratch arrays of one row of the batch. Each array occupies whole cache lines, so
// that its last vector can be loaded and stored as a whole.
struct Scratch {
    char* next;
    static int64_t bytes(int64_t size) { return (size + 63) / 64 * 64; }
    template <typename E>
    E* take(int64_t n) {
        E* const p = reinterpret_cast<E*>(next);
        next += bytes(n * int64_t{sizeof(E)});
        return p;
    }
};

template <typename T>
LX_INLINE Acc<T> get(const T* p) {
    return load_n(p, 1)[0];
}
template <typename A>
LX_INLINE A exp_of(A x) {
    return exp(splat<VecA<A>>(x))[0];
}

template <typename T>
Acc<T> largest(const T* row, int64_t n) {
    Vec<T> top = load_padded(row, n);
    for (int64_t i = kLanes<T>; i < n; i += kLanes<T>) top = max(top, load_padded(row + i, n - i));
    return max_lane(top);
}
// Return the first index of the maximum.
template <typename T>
int64_t argmax_of(const T* row, int64_t n) {
    const Acc<T> top = largest(row, n);
    for (int64_t i = 0; i < n; ++i)
        if (get(row + i) == top) return i;
    return 0;
}

// ------------------------------------------------------------------------------------------------
// The leaves of one position, C rows of V logits of any dtype.

// Normalisers of the C rows of logits. log p = logit - top - log_sum loses no digits of large
// logits. If log_sum is -inf, no token of the row is possible.
template <typename A>
struct Norms {
    A *top, *log_sum;
    A log_p(int64_t z, A logit) const {
        return log_sum[z] == kImpossible<A> ? kImpossible<A> : logit - top[z] - log_sum[z];
    }
};

template <typename A>
struct LeafOps {
    // `w` is scratch for one row, here and below.
    void (*norms)(const void* rows, int64_t C, int64_t V, A* w, Norms<A> norms);
    // e[z] = log p(v | z) for token v
    void (*at)(const void* rows, int64_t C, int64_t V, int64_t v, Norms<A> norms, A* e);
    int64_t (*draw)(const void* rows, int64_t z, int64_t V, A uniform, A* w);
    // out[v] = log sum_z exp(log_state[z]) p(v | z)
    void (*mixture)(const void* rows, int64_t C, int64_t V, const A* log_state, Norms<A> norms,
                    A* out);
    int64_t (*argmax)(const void* rows, int64_t z, int64_t V);
    int64_t size;
};

template <typename T>
struct Leaf {
    using A = Acc<T>;
    static const T* row(const void* rows, int64_t z, int64_t V) {
        return static_cast<const T*>(rows) + z * V;
    }
    static void norms(const void* rows, int64_t C, int64_t V, A* w, Norms<A> norms) {
        for (int64_t z = 0; z < C; ++z) {
            const SoftmaxRow<T> soft(row(rows, z, V), V, w);
            norms.top[z] = soft.top;
            norms.log_sum[z] = log_of(soft.sum);
        }
    }
    static void at(const void* rows, int64_t C, int64_t V, int64_t v, Norms<A> norms, A* e) {
        for (int64_t z = 0; z < C; ++z) e[z] = norms.log_p(z, get(row(rows, z, V) + v));
    }
    static int64_t draw_from(const void* rows, int64_t z, int64_t V, A uniform, A* w) {
        SoftmaxRow<T>(row(rows, z, V), V, w);
        return draw(w, V, uniform);
    }
    static void mixture(const void* rows, int64_t C, int64_t V, const A* log_state, Norms<A> norms,
                        A* out) {
        for (int64_t v = 0; v < V; v += kLanes<T>) {
            const auto for_terms = [&](auto&& f) __attribute__((always_inline)) {
                for (int64_t z = 0; z < C; ++z)
                    if (log_state[z] != kImpossible<A> && norms.log_sum[z] != kImpossible<A>)
                        f(load_padded(row(rows, z, V) + v, V - v) - norms.top[z] +
                          (log_state[z] - norms.log_sum[z]));
            };
            Vec<T> top = splat<Vec<T>>(kImpossible<A>), total{};
            for_terms([&](Vec<T> term) { top = max(top, term); });
            const Vec<T> shift = top == kImpossible<A> ? Vec<T>{} : top;
            for_terms([&](Vec<T> term) { total += exp<false>(term - shift); });
            store_n(out + v, log(total) + shift, min(V - v, kLanes<T>));
        }
    }
    static int64_t argmax(const void* rows, int64_t z, int64_t V) {
        return argmax_of(row(rows, z, V), V);
    }
    static constexpr LeafOps<A> ops{norms, at, draw_from, mixture, argmax, sizeof(T)};
};

// Leaves of one row of the batch.
template <typename A>
struct Leaves {
    const LeafOps<A>& ops;
    const char* rows;
    int64_t C, V;

    static const LeafOps<A>& ops_of(DType dtype) {
        if constexpr (sizeof(A) == 8)
            return Leaf<double>::ops;
        else
            return dtype == DType::kFloat16    ? Leaf<Half>::ops
                   : dtype == DType::kBFloat16 ? Leaf<BFloat>::ops
                                               : Leaf<float>::ops;
    }
    Leaves(const CircuitLogits& l, int64_t row)
        : ops(ops_of(l.dtype)),
          rows(static_cast<const char*>(l.leaf) + row * l.leaf_stride * ops.size),
          C(l.circuit.components),
          V(l.vocabulary) {}
    const void* at(int64_t k) const { return rows + k * C * V * ops.size; }
};

// ------------------------------------------------------------------------------------------------
// Sampling and conditionals

// Writes softmax(cur) to `state`, padded with zeros, and returns log sum exp(cur).
template <typename A>
A posterior_of(const A* cur, int64_t width, A* state) {
    const A shift = shift_of(max_of(cur, width)), sum = exp_of(cur, shift, width, state);
    const A factor = sum > 0 ? 1 / sum : 0;
    for (int64_t i = 0; i < width; i += kLanes<A>) store(state + i, load(state + i) * factor);
    return log_of(sum) + shift;
}

template <typename P>
void sample_row(const CircuitSampleArgs& args, int64_t row, Scratch scratch) {
    using A = Acc<P>;
    const CircuitParams& circuit = args.logits.circuit;
    const Leaves<A> leaves(args.logits, row);
    const int64_t K = circuit.n_token, C = leaves.C, V = leaves.V, width = whole_vectors<P>(C);
    A* const walk = scratch.take<A>(circuit_walk_scratch<A>(circuit));
    A *const state = scratch.take<A>(width), *const e = scratch.take<A>(width),
             *const w = scratch.take<A>(V);
    const Norms<A> norms{scratch.take<A>(width), scratch.take<A>(width)};
    for (int64_t z = 0; z < width; ++z) e[z] = 0;
    const A* uniforms = static_cast<const A*>(args.uniforms) + row * K * 2;
    circuit_walk<P>(circuit, row, walk, [&](int64_t k, const A* cur, double) -> const A* {
        const int64_t at = row * K + k;
        const void* rows = leaves.at(k);
        const A total = posterior_of(cur, width, state);
        store_rounded(static_cast<A*>(args.posterior) + at * C, state, C);
        int64_t token = args.evidence ? args.evidence[at] : -1;
        if (token < 0)
            token =
                leaves.ops.draw(rows, draw(state, C, uniforms[2 * k]), V, uniforms[2 * k + 1], w);
        args.tokens[at] = token;
        leaves.ops.norms(rows, C, V, w, norms);
        leaves.ops.at(rows, C, V, token, norms, e);
        for (int64_t z = 0; z < width; z += kLanes<A>)
            store(state + z, load(cur + z) + load(e + z));
        const A shift = shift_of(max_of(state, width));
        const A joint = log_of(exp_of(state, shift, width, state)) + shift;
        static_cast<A*>(args.conditional)[at] = joint == kImpossible<A> ? joint : joint - total;
        return e;
    });
}

template <typename P>
void conditional_row(const CircuitConditionalArgs& args, int64_t row, Scratch scratch) {
    using A = Acc<P>;
    CircuitParams circuit = args.logits.circuit;
    const Leaves<A> leaves(args.logits, row);
    const int64_t K = circuit.n_token, C = leaves.C, V = leaves.V, width = whole_vectors<P>(C);
    const int64_t last = args.k[row];
    if (circuit.kind != CircuitKind::kBTree) circuit.n_token = last + 1;
    A* const walk = scratch.take<A>(circuit_walk_scratch<A>(circuit));
    A *const state = scratch.take<A>(width), *const e = scratch.take<A>(width),
             *const w = scratch.take<A>(V);
    const Norms<A> norms{scratch.take<A>(width), scratch.take<A>(width)};
    for (int64_t z = 0; z < width; ++z) e[z] = 0;
    circuit_walk<P>(circuit, row, walk, [&](int64_t k, const A* cur, double) -> const A* {
        const int64_t token = k < last ? args.x[row * K + k] : -1;
        const void* rows = leaves.at(k);
        if (token >= 0 || k == last) leaves.ops.norms(rows, C, V, w, norms);
        if (k == last) {
            const A total = posterior_of(cur, width, state);
            for (int64_t z = 0; z < width; ++z)
                state[z] = total == kImpossible<A> ? total : cur[z] - total;
            leaves.ops.mixture(rows, C, V, state, norms, static_cast<A*>(args.out) + row * V);
        }
        if (token >= 0)
            leaves.ops.at(rows, C, V, token, norms, e);
        else
            for (int64_t z = 0; z < C; ++z) e[z] = 0;
        return e;
    });
}

int64_t sample_scratch(const CircuitLogits& l) {
    const bool wide = l.dtype == DType::kFloat64;
    const int64_t size = wide ? 8 : 4;
    const int64_t walk =
        wide ? circuit_walk_scratch<double>(l.circuit) : circuit_walk_scratch<float>(l.circuit);
    return Scratch::bytes(walk * size) + 4 * Scratch::bytes(l.circuit.components * size) +
           Scratch::bytes(l.vocabulary * size);
}

// ------------------------------------------------------------------------------------------------
// Max-product. The upward pass computes the best value below each state of a latent, and the best
// state of a latent for each state of its parent. The downward pass reads these choices.

// Writes log softmax(logits) + below to `out` and returns the first index of the maximum.
template <typename P>
int64_t best_step(const P* logits, const Acc<P>* below, int64_t n, Acc<P>* out) {
    using A = Acc<P>;
    const SoftmaxRow<P> soft(logits, n, out);
    A top = soft.top, log_sum = log_of(soft.sum);
    const Norms<A> norm{&top, &log_sum};
    for (int64_t z = 0; z < n; ++z) out[z] = norm.log_p(0, get(logits + z)) + below[z];
    return argmax_of(out, n);
}

template <typename P>
void argmax_row(const CircuitArgmaxArgs& args, int64_t row, Scratch scratch) {
    using A = Acc<P>;
    const CircuitParams& circuit = args.logits.circuit;
    const Leaves<A> leaves(args.logits, row);
    const int64_t K = circuit.n_token, C = leaves.C, V = leaves.V;
    const int64_t M = circuit_num_transitions(circuit.kind, K);
    const int64_t* const evidence = args.evidence ? args.evidence + row * K : nullptr;
    A* const best = scratch.take<A>(K * C);     // best value of a position, by its state
    A* const stepped = scratch.take<A>(M * C);  // best value of a latent, by its parent's state
    A *const value = scratch.take<A>(C), *const sums = scratch.take<A>(C),
             *const w = scratch.take<A>(V);
    const Norms<A> norms{scratch.take<A>(C), scratch.take<A>(C)};
    int32_t* const choices = scratch.take<int32_t>(M * C);
    int32_t* const states = scratch.take<int32_t>(M + 1) + 1;

    for (int64_t k = 0; k < K; ++k) {
        leaves.ops.norms(leaves.at(k), C, V, w, norms);
        if (evidence && evidence[k] >= 0)
            leaves.ops.at(leaves.at(k), C, V, evidence[k], norms, best + k * C);
        else
            for (int64_t z = 0; z < C; ++z) best[k * C + z] = norms.log_p(z, norms.top[z]);
    }
    for (int64_t m = M - 1; m >= -1; --m) {
        const CircuitLatent latent = circuit_latent(circuit.kind, K, m);
        for (int64_t z = 0; z < C; ++z) {
            A sum = 0;
            for (int64_t inner : latent.inner)
                if (inner >= 0) sum += stepped[inner * C + z];
            for (int64_t k = 0; k < latent.num_leaves; ++k)
                sum += best[(latent.first_leaf + k) * C + z];
            value[z] = sum;
        }
        if (m < 0) break;  // the root has no matrix
        const P* const matrix =
            static_cast<const P*>(circuit.trans) + row * circuit.trans_stride + m * C * C;
        for (int64_t z = 0; z < C; ++z) {
            const int64_t choice = best_step(matrix + z * C, value, C, sums);
            choices[m * C + z] = static_cast<int32_t>(choice);
            stepped[m * C + z] = sums[choice];
        }
    }
    A* const zeros = norms.top;
    for (int64_t z = 0; z < C; ++z) zeros[z] = 0;
    const P* const prior = static_cast<const P*>(circuit.prior) + row * circuit.prior_stride;
    states[-1] = static_cast<int32_t>(circuit.prior ? best_step(prior, value, C, sums)
                                                    : best_step<A>(zeros, value, C, sums));
    static_cast<A*>(args.value)[row] = sums[states[-1]];
    for (int64_t m = -1; m < M; ++m) {
        const CircuitLatent latent = circuit_latent(circuit.kind, K, m);
        for (int64_t inner : latent.inner)
            if (inner >= 0) states[inner] = choices[inner * C + states[m]];
        for (int64_t k = latent.first_leaf; k < latent.first_leaf + latent.num_leaves; ++k)
            args.tokens[row * K + k] = evidence && evidence[k] >= 0
                                           ? evidence[k]
                                           : leaves.ops.argmax(leaves.at(k), states[m], V);
    }
}

int64_t argmax_scratch(const CircuitLogits& l) {
    const int64_t size = l.dtype == DType::kFloat64 ? 8 : 4;
    const int64_t K = l.circuit.n_token, C = l.circuit.components;
    const int64_t M = circuit_num_transitions(l.circuit.kind, K);
    return Scratch::bytes(K * C * size) + Scratch::bytes(M * C * size) +
           4 * Scratch::bytes(C * size) + Scratch::bytes(l.vocabulary * size) +
           Scratch::bytes(M * C * 4) + Scratch::bytes((M + 1) * 4);
}

// ------------------------------------------------------------------------------------------------
// Verification

// p = max(0, p - sum_z posterior[z] softmax(leaf[z])); `e` and `q` are scratch for one row.
template <typename L>
void subtract_mixture(const void* leaf, const Acc<L>* posterior, int64_t C, int64_t V, Acc<L>* e,
                      Acc<L>* q, Acc<L>* p) {
    for (int64_t v = 0; v < V; v += kLanes<L>) store(q + v, Vec<L>{});
    for (int64_t z = 0; z < C; ++z) {
        if (!(posterior[z] > 0)) continue;
        const SoftmaxRow<L> soft(static_cast<const L*>(leaf) + z * V, V, e);
        if (!(soft.sum > 0)) continue;
        const Vec<L> weight = splat<Vec<L>>(posterior[z] / soft.sum);
        for (int64_t v = 0; v < V; v += kLanes<L>)
            store(q + v, fma(weight, load(e + v), load(q + v)));
    }
    for (int64_t v = 0; v < V; v += kLanes<L>)
        store(p + v, max(Vec<L>{}, load(p + v) - load(q + v)));
}
template <typename A>
void subtract_mixture(DType dtype, const void* leaf, int64_t at, const A* posterior, int64_t C,
                      int64_t V, A* e, A* q, A* p) {
    const auto subtract = [&]<typename L>(const L* leaf) {
        subtract_mixture<L>(leaf + at, posterior, C, V, e, q, p);
    };
    if constexpr (sizeof(A) == 8)
        subtract(static_cast<const double*>(leaf));
    else if (dtype == DType::kFloat16)
        subtract(static_cast<const Half*>(leaf));
    else if (dtype == DType::kBFloat16)
        subtract(static_cast<const BFloat*>(leaf));
    else
        subtract(static_cast<const float*>(leaf));
}

template <typename T>
void verify_row(const SpecVerifyArgs& args, int64_t row, Scratch scratch) {
    using A = Acc<T>;
    const int64_t K = args.n_token, C = args.components, V = args.vocabulary;
    const T* const target = static_cast<const T*>(args.target) + row * args.target_stride;
    const int64_t* const tokens = args.tokens + row * K;
    const A* const uniforms = static_cast<const A*>(args.uniforms) + row * (K + 1);
    int64_t k = args.num_evidence ? args.num_evidence[row] : 0;
    if (args.inverse_temperature == 0) {
        while (k < K && argmax_of(target + k * V, V) == tokens[k]) ++k;
        args.accepted[row] = k;
        args.next_token[row] = argmax_of(target + k * V, V);
        return;
    }

    A *const p = scratch.take<A>(V), *const residual = scratch.take<A>(V),
             *const e = scratch.take<A>(V), *const q = scratch.take<A>(V);
    const A scale = static_cast<A>(args.inverse_temperature);
    for (; k <= K; ++k) {
        const T* const logits = target + k * V;
        const A shift = shift_of(largest(logits, V));
        for (int64_t v = 0; v < V; v += kLanes<T>)
            store(p + v, (load_padded(logits + v, V - v) - shift) * scale);
        const A at = k < K ? p[tokens[k]] : 0;
        const SoftmaxRow<A> soft(p, V, p);
        if (k == K) break;
        const A log_q = static_cast<const A*>(args.conditional)[row * K + k];
        const bool drawn = soft.sum > 0 && log_q != kImpossible<A>;  // otherwise p / q is undefined
        if (drawn && uniforms[k] < exp_of(at - log_of(soft.sum) - log_q)) continue;
        const Vec<A> factor = splat<Vec<A>>(soft.sum > 0 ? 1 / soft.sum : 0);
        for (int64_t v = 0; v < V; v += kLanes<A>) store(residual + v, load(p + v) * factor);
        subtract_mixture(args.leaf_dtype, args.leaf, row * args.leaf_stride + k * C * V,
                         static_cast<const A*>(args.posterior) + (row * K + k) * C, C, V, e, q,
                         residual);
        break;
    }
    args.accepted[row] = k;
    const bool whole = k == K || !(largest(residual, V) > 0);
    args.next_token[row] = draw(whole ? p : residual, V, uniforms[K]);
}

int64_t verify_scratch(const SpecVerifyArgs& args) {
    return 4 * Scratch::bytes(args.vocabulary * (args.target_dtype == DType::kFloat64 ? 8 : 4));
}

// ------------------------------------------------------------------------------------------------
// Table of functions

// Calls f<P>(row) for all rows, where P is the C++ type of `dtype`.
template <typename F>
void for_rows(DType dtype, int64_t begin, int64_t end, F&& f) {
    with_dtype(dtype, [&]<typename P>() {
        for (int64_t row = begin; row < end; ++row) f.template operator()<P>(row);
    });
}
void sample(const CircuitSampleArgs& args, int64_t begin, int64_t end, void* scratch) {
    for_rows(args.logits.circuit.dtype, begin, end, [&]<typename P>(int64_t row) {
        sample_row<P>(args, row, {static_cast<char*>(scratch)});
    });
}
void conditional_dist(const CircuitConditionalArgs& args, int64_t begin, int64_t end,
                      void* scratch) {
    for_rows(args.logits.circuit.dtype, begin, end, [&]<typename P>(int64_t row) {
        conditional_row<P>(args, row, {static_cast<char*>(scratch)});
    });
}
void argmax(const CircuitArgmaxArgs& args, int64_t begin, int64_t end, void* scratch) {
    for_rows(args.logits.circuit.dtype, begin, end, [&]<typename P>(int64_t row) {
        argmax_row<P>(args, row, {static_cast<char*>(scratch)});
    });
}
void verify(const SpecVerifyArgs& args, int64_t begin, int64_t end, void* scratch) {
    for_rows(args.target_dtype, begin, end, [&]<typename T>(int64_t row) {
        verify_row<T>(args, row, {static_cast<char*>(scratch)});
    });
}

}  // namespace

extern const CircuitDecodeCpu decode_table;
const CircuitDecodeCpu decode_table = {LX_ISA_NAME,      sample_scratch, sample,
                                       conditional_dist, argmax_scratch, argmax,
                                       verify_scratch,   verify};

}  // namespace lora_ext::LX_ISA
