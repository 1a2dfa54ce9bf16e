// The training path of circuits on the CPU, compiled once per instruction set.
//
//   leaf           e = log softmax(logits)[x]                            lanes run over V
//   leaf_backward  dlogit[v] = de (1[v = x] - softmax(logits)[v])        lanes over V
//   scan           the walk of circuit_walk.h                            lanes over states
//   scan_backward  the walk in reverse                                   lanes over states
//
// Backward, with A = log softmax of trans, and the gradients g of a prefix and h of a conditional,
// which is logsumexp(cur + e) - logsumexp(cur); impossible values have gradient 0:
//   at a position  de = (g + h) softmax(cur + e) + the gradient from the right
//                  dcur = de - h softmax(cur)
//   a step         X[z, z'] = dout[z'] exp(cur[z] + A[z, z'] - out[z'])    dcur[z] = sum_z' X
//   a projection   Y[z, z'] = du[z] exp(A[z, z'] + up[z'] - u[z])          dup[z'] = sum_z Y
//   the logits     X + Y - softmax(trans[z]) sum_z' (X + Y)[z, z']
// X is computed as p[z] E[z, z'] r[z'] (p and E: circuit_walk.h) with r = dout / exp(out - top). If
// exp(out - top) is below kTrusted for a state, X is computed from the logarithms instead for the
// whole vector that contains this state; the exponent is then at most 0. The same holds for Y, row
// by row.
//
// Each row of the batch, and each row of V logits, is computed by a single thread in a fixed order.
// The result therefore depends neither on the number of threads nor on the rest of the batch.
#include "by_dtype.h"
#include "circuit_walk.h"

namespace lora_ext::LX_ISA {
namespace {

// ------------------------------------------------------------------------------------------------
// Leaves

constexpr int64_t kLeafBytes = 16384;  // bytes of logits that stay in L1 for a second read

template <typename T>
LX_INLINE Acc<T> max_of_logits(const T* x, int64_t n) {
    constexpr int L = kLanes<T>;
    Vec<T> most = load_padded(x, n), other = most;
    int64_t i = L;
    for (; i + 2 * L <= n; i += 2 * L) {
        most = max(most, load(x + i));
        other = max(other, load(x + i + L));
    }
    for (; i < n; i += L) most = max(most, load_padded(x + i, n - i));
    return max_lane(max(most, other));
}
// Return the sum of exp(x - top), where top is the maximum of x. If top is -inf, return 0, or NaN
// if x contains NaN, which the maximum skips. Prefetches the logits that max_of_logits reads next.
template <typename T>
LX_INLINE Acc<T> sum_exp_of_logits(const T* x, int64_t n, Acc<T> top) {
    constexpr int L = kLanes<T>;
    constexpr int64_t kAhead = kLeafBytes / static_cast<int64_t>(sizeof(T));
    const Vec<T> shift = splat<Vec<T>>(top);
    Vec<T> even{}, odd{};
    int64_t i = 0;
    if (top == kImpossible<Acc<T>>) {
        for (; i < n; i += L) even += exp(load_padded(x + i, n - i));
        return lane_sum(even);
    }
    for (; i + 2 * L <= n; i += 2 * L) {
        __builtin_prefetch(x + i + kAhead);
        __builtin_prefetch(x + i + L + kAhead);
        even += exp_below(load(x + i), shift);
        odd += exp_below(load(x + i + L), shift);
    }
    for (; i < n; i += L) even += exp_below(load_padded(x + i, n - i), shift);
    return lane_sum(even + odd);
}

// Writes the maximum `top` of each of `rows` rows of n logits (0 if all are -inf), and the sum of
// exp(x - top). Short rows are processed in groups, all maxima before all sums, so that the chains
// of operations of several rows overlap. A long row is processed block by block.
template <typename T>
void log_sums(const T* x, int64_t rows, int64_t n, Acc<T>* top, Acc<T>* sum) {
    using A = Acc<T>;
    const int64_t block = kLeafBytes / static_cast<int64_t>(sizeof(T));
    if (n <= block) {
        const int64_t group = block / n;
        for (int64_t first = 0; first < rows; first += group) {
            const int64_t last = min(rows, first + group);
            for (int64_t i = first; i < last; ++i) top[i] = max_of_logits(x + i * n, n);
            for (int64_t i = first; i < last; ++i) {
                sum[i] = sum_exp_of_logits(x + i * n, n, top[i]);
                top[i] = shift_of(top[i]);
            }
        }
        return;
    }
    for (int64_t i = 0; i < rows; ++i, x += n) {
        A most = kImpossible<A>, total = 0;
        for (int64_t v = 0; v < n; v += block) {
            const int64_t width = min(block, n - v);
            const A here = max_of_logits(x + v, width), next = here > most ? here : most;
            total = total * exp(splat<Vec<T>>(most - shift_of(next)))[0] +
                    sum_exp_of_logits(x + v, width, next);
            most = next;
        }
        top[i] = shift_of(most);
        sum[i] = total;
    }
}

template <typename T>
void leaf(const CircuitLeafArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    constexpr int L = kLanes<T>;
    const int64_t n = args.components, vocab = args.vocab;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / args.n_token, k = item % args.n_token;
        const T* logits =
            static_cast<const T*>(args.logits) + b * args.logits_stride + k * n * vocab;
        const int64_t x = args.x[b * args.x_stride + k];
        const int64_t at = b * args.e_stride + k * n;
        for (int64_t z = 0; z < n; z += L) {
            const int64_t lanes = min(L, n - z);
            A top[L] = {}, sum[L] = {}, at_x[L] = {};
            if (x >= 0) {
                const T* rows = logits + z * vocab;
                log_sums(rows, lanes, vocab, top, sum);
                for (int64_t i = 0; i < lanes; ++i) at_x[i] = load_n(rows + i * vocab + x, 1)[0];
            }
            const Vec<T> total = load(sum), log_sum = log(total);
            const Vec<T> other = splat<Vec<T>>(x < 0 ? A(0) : kImpossible<A>);
            const Vec<T> e = total == Vec<T>{} ? other : load(at_x) - load(top) - log_sum;
            store_n(static_cast<A*>(args.e) + at + z, e, lanes);
            store_n(static_cast<A*>(args.top) + at + z, load(top), lanes);
            store_n(static_cast<A*>(args.log_sum) + at + z, log_sum, lanes);
        }
    }
}

template <typename T>
void leaf_backward(const CircuitLeafArgs& args, int64_t begin, int64_t end) {
    using A = Acc<T>;
    constexpr int L = kLanes<T>;
    const int64_t n = args.components, vocab = args.vocab;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / args.n_token, k = item % args.n_token;
        const int64_t at = b * args.e_stride + k * n;
        const int64_t x = args.x[b * args.x_stride + k];
        const A* de = static_cast<const A*>(args.de) + at;
        const A* top = static_cast<const A*>(args.top) + at;
        const A* log_sum = static_cast<const A*>(args.log_sum) + at;
        for (int64_t z = 0; z < n; ++z) {
            const T* row =
                static_cast<const T*>(args.logits) + b * args.logits_stride + (k * n + z) * vocab;
            T* out = static_cast<T*>(args.dlogits) + (item * n + z) * vocab;
            const A g = x < 0 ? A(0) : de[z];
            if (g == 0) {
                for (int64_t v = 0; v < vocab; ++v) out[v] = T{};
                continue;
            }
            const A p = exp(load_n(row + x, 1) - top[z] - log_sum[z])[0];
            const auto value = [&](Vec<T> logit) __attribute__((always_inline)) {
                return exp<false>(logit - top[z] - log_sum[z]) * -g;
            };
            int64_t v = 0;
            for (; v + L <= vocab; v += L) store(out + v, value(load(row + v)));
            if (v < vocab) store_n(out + v, value(load_n(row + v, vocab - v)), vocab - v);
            store_n(out + x, splat<Vec<T>>(g * (1 - p)), 1);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Scan

template <typename P>
void scan(const CircuitScanArgs& args, int64_t begin, int64_t end, void* scratch) {
    using A = Acc<P>;
    constexpr int L = kLanes<P>;
    const CircuitParams& c = args.params;
    const int64_t n = c.components, width = whole_vectors<P>(n);
    const int64_t slots = circuit_num_states(c.kind, c.n_token);
    A* const e = static_cast<A*>(scratch);
    A* const terms = e + width;
    for (int64_t b = begin; b < end; ++b) {
        const auto observe = [&](int64_t k, const A* cur, double base) -> const A* {
            const int64_t at = b * c.n_token + k;
            copy_padded(static_cast<const A*>(args.e) + b * args.e_stride + k * n, n, e);
            const A before = shift_of(max_of(cur, width));
            const A weight = exp_of(cur, before, width, terms);
            const A scale = weight == 0 ? A(0) : 1 / weight;
            for (int64_t i = 0; i < width; i += L) store(terms + i, load(terms + i) * scale);
            store_rounded(static_cast<A*>(args.posterior) + at * n, terms, n);
            for (int64_t i = 0; i < width; i += L) store(terms + i, load(cur + i) + load(e + i));
            const A after = shift_of(max_of(terms, width));
            const A total = exp_of(terms, after, width, terms);
            const A value = after + log_of(total);
            static_cast<A*>(args.prefix)[at] = static_cast<A>(base + value);
            static_cast<A*>(args.conditional)[at] =
                total == 0 ? kImpossible<A> : value - before - log_of(weight);
            return e;
        };
        A* const walk = terms + width;
        if (args.states) {
            A* const states = static_cast<A*>(args.states) + b * slots * n;
            circuit_walk<P>(c, b, walk, observe, [&](int64_t slot, const A* vector) {
                store_rounded(states + slot * n, vector, n);
            });
        } else {
            circuit_walk<P>(c, b, walk, observe);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Backward of the scan

// Backward of one row of the batch, which visits the positions from right to left.
template <typename P>
struct Reverse {
    using A = Acc<P>;
    using V = Vec<P>;
    static constexpr int L = kLanes<P>;
    static constexpr int64_t kVectors = CircuitStep<P>::kVectors + 10;  // plus two per tree level

    const CircuitScanArgs& args;
    const CircuitParams& c;
    int64_t b, n, width;
    CircuitStep<P> step;
    const A *e, *states;
    A *de, *terms, *cur, *out, *d, *ratio, *up, *up_weight, *u, *u_weight, *prior, *levels;

    Reverse(const CircuitScanArgs& args, int64_t b, A* scratch)
        : args(args),
          c(args.params),
          b(b),
          n(c.components),
          width(whole_vectors<P>(n)),
          step(c, b, scratch),
          e(static_cast<const A*>(args.e) + b * args.e_stride),
          states(static_cast<const A*>(args.states) +
                 b * circuit_num_states(c.kind, c.n_token) * n),
          de(static_cast<A*>(args.de) + b * c.n_token * n) {
        A* next = scratch + step.kVectors * width;
        A** const vectors[] = {&terms, &cur,       &out, &d,        &ratio,
                               &up,    &up_weight, &u,   &u_weight, &prior};
        for (A** vector : vectors) {
            *vector = next;
            next += width;
        }
        levels = next;
        log_prior<P>(c, b, prior, terms);
    }

    void load_state(int64_t slot, A* to) const { copy_padded(states + slot * n, n, to); }
    void clear(A* x) const {
        for (int64_t i = 0; i < width; i += L) store(x + i, V{});
    }
    A gradient_at(const void* of, int64_t k) const {
        return of ? static_cast<const A*>(of)[b * c.n_token + k] : A(0);
    }

    // Backward of position k. On entry x is cur, and `gradient` is the gradient of cur + e_k from
    // the positions to the right; on return x is cur + e_k, and `gradient` is the gradient of cur.
    // Writes de_k, which includes dup if given, because e_k is also a term of up.
    void position(int64_t k, A* x, A* gradient, const A* dup) {
        A* const before = ratio;
        const A weight = exp_of(x, shift_of(max_of(x, width)), width, before);
        add_leaf(k, x);
        const A total = exp_of(x, shift_of(max_of(x, width)), width, terms);
        const bool possible = total != 0;
        const A own = gradient_at(args.dconditional, k);
        const V g = splat<V>(possible ? (gradient_at(args.dprefix, k) + own) / total : 0);
        const V less = splat<V>(possible ? -own / weight : 0);
        for (int64_t i = 0; i < width; i += L) {
            const V both = fma(g, load(terms + i), load(gradient + i));
            store(terms + i, dup ? both + load(dup + i) : both);
            store(gradient + i, fma(less, load(before + i), both));
        }
        store_rounded(de + k * n, terms, n);
    }
    void add_leaf(int64_t k, A* x) const {
        copy_padded(e + k * n, n, terms);
        add_to(x, terms, width);
    }

    // Loads up and u of matrix m, and computes exp(up - top) and exp(u - top), where top is the
    // maximum of up.
    void load_projection(int64_t m) const {
        load_state(3 * m + 1, up);
        load_state(3 * m + 2, u);
        const A shift = shift_of(max_of(up, width));
        exp_of(up, shift, width, up_weight);
        exp_of(u, shift, width, u_weight);
    }
    // Coefficients of row z of Y. The row is E * up_weight * `linear` or, if u_weight[z] is below
    // kTrusted, `exact` times the exponential of exact logarithms.
    struct RowOfY {
        A linear, exact, minus, top;
    };
    LX_INLINE RowOfY row_of_y(int64_t z, A du, const SoftmaxRow<P>& soft) const {
        if (u[z] == kImpossible<A> || soft.sum == 0) return {};
        if (u_weight[z] < kTrusted<A>) return {0, du, u[z] + soft.log_sum(), soft.top};
        return {du / soft.sum / u_weight[z], 0, 0, 0};
    }
    LX_INLINE V y_at(const RowOfY& y, const P* a, int64_t i) const {
        if (y.exact == 0) return load(step.row + i) * load(up_weight + i) * y.linear;
        return exp(load_padded(a + i, n - i) - y.top + load(up + i) - y.minus) * y.exact;
    }

    // Writes the sum of Y over its rows to dup. load_projection(m) must have been called.
    void project(int64_t m, const A* du, A* dup) const {
        clear(dup);
        for (int64_t z = 0; z < n; ++z) {
            if (du[z] == 0) continue;
            const P* a = step.matrix_row(m, z);
            const RowOfY y = row_of_y(z, du[z], SoftmaxRow<P>(a, n, step.row));
            for (int64_t i = 0; i < width; i += L) store(dup + i, load(dup + i) + y_at(y, a, i));
        }
    }

    // Backward of a step: adds the sums of X over its columns to dcur and, if wanted, writes the
    // gradient of the logits of matrix m. du is the gradient of the projection that load_projection
    // loaded, or nullptr.
    void trace(int64_t m, const A* from, const A* dout, const A* du, A* dcur) const {
        const A shift = shift_of(max_of(from, width));
        exp_of(from, shift, width, step.weights);
        // exact[i] is nonzero if the vector of columns at i is computed from logarithms.
        A* const exact = step.u;
        for (int64_t i = 0; i < width; i += L) {
            const V value = load(out + i), weight = exp(value - shift);
            const V possible = value == kImpossible<A> ? V{} : splat<V>(1);
            const bool lost = max_lane(weight < kTrusted<A> ? possible : V{}) > 0;
            const V g = possible * load(dout + i);
            exact[i] = lost;
            store(ratio + i, lost ? g : value == kImpossible<A> ? V{} : g / weight);
        }
        for (int64_t z = 0; z < n; ++z) {
            P* const to =
                args.dtrans ? static_cast<P*>(args.dtrans) +
                                  ((b * circuit_num_transitions(c.kind, c.n_token) + m) * n + z) * n
                            : nullptr;
            const P* a = step.matrix_row(m, z);
            const SoftmaxRow<P> soft(a, n, step.row);
            if (soft.sum == 0) {
                for (int64_t i = 0; to && i < n; ++i) to[i] = P{};
                continue;
            }
            const A inverse = 1 / soft.sum, p = step.weights[z] * inverse;
            const RowOfY y = du ? row_of_y(z, du[z], soft) : RowOfY{};
            V sum_x{}, sum_y{};
            for (int64_t i = 0; i < width; i += L) {
                V x;
                if (exact[i] == 0) {
                    x = load(step.row + i) * p * load(ratio + i);
                } else {
                    const V value = load(out + i);
                    const V log_x =
                        load_padded(a + i, n - i) - soft.top + (from[z] - soft.log_sum()) - value;
                    x = load(ratio + i) * (value == kImpossible<A> ? V{} : exp(log_x));
                }
                sum_x += x;
                if (du) {
                    const V more = y_at(y, a, i);
                    sum_y += more;
                    x += more;
                }
                store(terms + i, x);
            }
            const A total = lane_sum(sum_x);
            dcur[z] += total;
            if (!to) continue;
            const V share = splat<V>(-(total + lane_sum(sum_y)) * inverse);
            for (int64_t i = 0; i < width; i += L)
                store(terms + i, fma(share, load(step.row + i), load(terms + i)));
            store_rounded(to, terms, n);
        }
    }

    void store_prior_gradient(const A* dcur) const {
        if (!args.dprior) return;
        exp_of(prior, A(0), width, terms);
        V sum{};
        for (int64_t i = 0; i < width; i += L) sum += load(dcur + i);
        const A total = lane_sum(sum);
        for (int64_t i = 0; i < width; i += L)
            store(terms + i, fma(splat<V>(-total), load(terms + i), load(dcur + i)));
        store_rounded(static_cast<P*>(args.dprior) + b * n, terms, n);
    }

    void chain() {
        clear(d);
        for (int64_t k = c.n_token - 1; k >= 0; --k) {
            load_state(k, cur);
            position(k, cur, d, nullptr);
            if (k == 0 || c.kind != CircuitKind::kHMM) continue;
            load_state(k, out);
            load_state(k - 1, cur);
            add_leaf(k - 1, cur);
            normalise(cur, width);
            A* const dcur = levels;
            clear(dcur);
            trace(k - 1, cur, d, nullptr, dcur);
            for (int64_t i = 0; i < width; i += L) store(d + i, load(dcur + i));
        }
        store_prior_gradient(d);
    }

    // Loads the vector cur that enters the left or the right child of `node`.
    void load_cur(const CircuitNode& node, bool right, A* to) const {
        if (node.matrix < 0)
            for (int64_t i = 0; i < width; i += L) store(to + i, load(prior + i));
        else
            load_state(3 * node.matrix, to);
        if (!right) return;
        const CircuitNode left = node.child(false);
        copy_padded(left.is_leaf() ? e + left.lo * n : states + (3 * left.matrix + 2) * n, n,
                    terms);
        add_to(to, terms, width);
        normalise(to, width);
    }

    // Level l of the path to position k has two vectors, at levels + 2 l width: first dup, the
    // gradient of the level's up, then dcur, the accumulated gradient of its cur.
    void tree() {
        const CircuitNode root{0, c.n_token, -1};
        const auto dup_at = [&](int64_t l) { return levels + 2 * l * width; };
        const auto dcur_at = [&](int64_t l) { return levels + (2 * l + 1) * width; };
        // Loads the gradient of a child's u into d. It is a sum, because u is added to both up and
        // cur.
        const auto load_du = [&](int64_t l) {
            for (int64_t i = 0; i < width; i += L)
                store(d + i, load(dup_at(l) + i) + load(dcur_at(l) + i));
        };
        clear(dup_at(0));
        clear(dcur_at(0));
        for (int64_t k = c.n_token - 1; k >= 0; --k) {
            int64_t level = 0;
            CircuitNode node = root;
            for (CircuitNode child = node.toward(k); !child.is_leaf(); child = node.toward(k)) {
                if (child.hi == k + 1) {
                    load_du(level);
                    load_projection(child.matrix);
                    project(child.matrix, d, dup_at(level + 1));
                    clear(dcur_at(level + 1));
                }
                node = child;
                ++level;
            }
            load_cur(node, k >= node.middle(), cur);
            position(k, cur, dcur_at(level), dup_at(level));
            for (; level > 0 && node.lo == k; --level) {
                const CircuitNode parent = root.below(k, level - 1);
                load_du(level - 1);
                load_projection(node.matrix);
                load_state(3 * node.matrix, out);
                load_cur(parent, node.lo != parent.lo, cur);
                trace(node.matrix, cur, dcur_at(level), d, dcur_at(level - 1));
                node = parent;
            }
        }
        store_prior_gradient(dcur_at(0));
    }
};

template <typename P>
void scan_backward(const CircuitScanArgs& args, int64_t begin, int64_t end, void* scratch) {
    for (int64_t b = begin; b < end; ++b) {
        Reverse<P> reverse(args, b, static_cast<Acc<P>*>(scratch));
        if (args.params.kind == CircuitKind::kBTree)
            reverse.tree();
        else
            reverse.chain();
    }
}

// ------------------------------------------------------------------------------------------------
// Table of functions

int64_t scan_scratch(const CircuitScanArgs& args) {
    int64_t bytes = 0;
    with_dtype(args.params.dtype, [&]<typename P>() {
        const int64_t width = whole_vectors<P>(args.params.components);
        const int64_t levels = circuit_tree_levels(args.params.n_token) + 1;
        const int64_t forward = circuit_walk_scratch<Acc<P>>(args.params) + 2 * width;
        const int64_t backward = (Reverse<P>::kVectors + 2 * levels) * width;
        bytes = static_cast<int64_t>(sizeof(Acc<P>)) * (forward > backward ? forward : backward);
    });
    return bytes;
}
}  // namespace

extern const CircuitCpu circuit_table;
const CircuitCpu circuit_table = {LX_ISA_NAME,  LX_BY_DTYPE(leaf), LX_BY_DTYPE(leaf_backward),
                                  scan_scratch, LX_BY_DTYPE(scan), LX_BY_DTYPE(scan_backward)};

}  // namespace lora_ext::LX_ISA
