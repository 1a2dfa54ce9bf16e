// The scan of circuits: prefix[k] = logsumexp(cur_k + e_k), posterior[k] = softmax(cur_k),
// conditional[k] = logsumexp(log posterior[k] + e_k); and its backward pass from right to left.
//
// With up to 32 states a warp walks a row of the batch, four rows per block; with more, a block of
// up to 256 threads walks a row. Bound: bytes of the transition logits, read from memory once
// forward and once backward; their gradient is written once.
//
// Backward, with A = log softmax of trans, and the gradients g of a prefix and h of a conditional;
// the gradient of an impossible state is 0:
//   at a position  de = (g + h) softmax(cur + e) + the gradient from the right
//                  dcur = de - h softmax(cur)
//   a step         X[z, z'] = dout[z'] exp(cur[z] + A[z, z'] - out[z'])    dcur[z] = sum_z' X
//   a projection   Y[z, z'] = du[z] exp(A[z, z'] + up[z'] - u[z])          dup[z'] = sum_z Y
//   the logits     X + Y - softmax(trans[z]) sum_z' (X + Y)[z, z']
// X is computed as p[z] P[z, z'] ratio[z'] with P = exp(A) if exp(out[z'] - top) is at least
// kTrusted. Otherwise it is computed from the logarithms, whose difference is at most 0. Y is
// computed in the same way, row by row.
#include "circuit_kernels.cuh"

namespace lora_ext {
namespace {

constexpr int kRowsPerBlock = 4;  // if a warp walks a row
constexpr float kNotExact = __builtin_huge_valf();

// Sets the team's row and its share of shared memory. Returns false if the team has no row.
template <class Team>
LX_DEVICE bool find_row(const CircuitParams& c, int64_t floats, unsigned char* shared, int64_t& row,
                        float*& scratch) {
    constexpr bool kWarp = Team::kScratch == 0;
    row = kWarp ? int64_t{blockIdx.x} * kRowsPerBlock + lx::warp_id() : int64_t{blockIdx.x};
    scratch = reinterpret_cast<float*>(shared) + (kWarp ? lx::warp_id() * floats : 0);
    return row < c.rows;
}

// Without the minimum of one block per multiprocessor, the compiler would use at most 64 registers
// and spill the rest.
template <class P, class Team>
__global__ void __launch_bounds__(256, 1)
    circuit_scan_kernel(const __grid_constant__ CircuitScanArgs args, int64_t floats,
                        bool aligned) {
    LX_DYN_SHARED(shared);
    const CircuitParams& c = args.params;
    int64_t row;
    float* scratch;
    if (!find_row<Team>(c, floats, shared, row, scratch)) return;
    const CircuitWalk<P, Team> walk(c, row, aligned, scratch);
    const float* const leaves = static_cast<const float*>(args.e) + row * args.e_stride;
    float* const states = args.states
                              ? static_cast<float*>(args.states) +
                                    row * circuit_num_states(c.kind, c.n_token) * c.components
                              : nullptr;
    const auto observe = [&](int64_t k, const float* cur, double base) {
        const float* e = leaves + k * walk.n;
        const int64_t at = row * c.n_token + k;
        const float before = shift_of(walk.max_of(cur));
        const float weight =
            walk.reduce(0.0f, add, [&](int z) { return lx::exp_approx(cur[z] - before); });
        const float scale = weight == 0 ? 0 : 1 / weight;
        walk.for_own([&](int z) {
            static_cast<float*>(args.posterior)[at * walk.n + z] =
                lx::exp_approx(cur[z] - before) * scale;
        });
        const float after =
            shift_of(walk.reduce(kImpossible, larger, [&](int z) { return cur[z] + e[z]; }));
        const float total =
            walk.reduce(0.0f, add, [&](int z) { return lx::exp_approx(cur[z] + e[z] - after); });
        if (walk.team.rank() == 0) {
            const float value = after + logf(total);
            static_cast<float*>(args.prefix)[at] = static_cast<float>(base + value);
            static_cast<float*>(args.conditional)[at] =
                total == 0 ? kImpossible : value - before - logf(weight);
        }
        return e;
    };
    walk.run(observe, [&](int64_t slot, const float* vector) {
        if (states) walk.for_own([&](int z) { states[slot * walk.n + z] = vector[z]; });
    });
}

// ------------------------------------------------------------------------------------------------
// Backward

constexpr int64_t kReverseVectors = 8;  // vectors in shared memory besides those of the walk

template <class P, class Team>
struct CircuitReverse {
    const CircuitScanArgs& args;
    const CircuitParams& c;
    CircuitWalk<P, Team> walk;  // its vectors contain dup and dcur of each level
    int64_t row;
    int n;
    const float *e, *states;
    float* de;
    float *cur, *out, *d, *ratio, *up, *up_weight, *q, *prior;

    LX_DEVICE CircuitReverse(const CircuitScanArgs& args, int64_t row, bool aligned, float* scratch)
        : args(args),
          c(args.params),
          walk(args.params, row, aligned, scratch),
          row(row),
          n(walk.n),
          e(static_cast<const float*>(args.e) + row * args.e_stride),
          states(static_cast<const float*>(args.states) +
                 row * circuit_num_states(c.kind, c.n_token) * n),
          de(static_cast<float*>(args.de) + row * c.n_token * n) {
        float* const own = scratch + circuit_walk_floats(c, Team::kScratch);
        cur = own;
        out = own + n;
        d = own + 2 * n;
        ratio = own + 3 * n;
        up = own + 4 * n;
        up_weight = own + 5 * n;
        q = own + 6 * n;
        prior = own + 7 * n;
        walk.start(prior);
    }

    LX_DEVICE float gradient_at(const void* of, int64_t k) const {
        return of ? static_cast<const float*>(of)[row * c.n_token + k] : 0.0f;
    }
    LX_DEVICE void clear(float* x) const {
        walk.for_own([&](int z) { x[z] = 0; });
    }

    // Computes the gradients at position k, where x is cur. `gradient` contains the gradient from
    // the right on entry and that of cur on return. de_k becomes the gradient of cur + e_k plus
    // dup, the gradient of `up`, which includes e_k.
    LX_DEVICE void position(int64_t k, const float* x, float* gradient, const float* dup) const {
        const float* at = e + k * n;
        const float before = shift_of(walk.max_of(x));
        const float weight =
            walk.reduce(0.0f, add, [&](int z) { return lx::exp_approx(x[z] - before); });
        const float after =
            shift_of(walk.reduce(kImpossible, larger, [&](int z) { return x[z] + at[z]; }));
        const float total =
            walk.reduce(0.0f, add, [&](int z) { return lx::exp_approx(x[z] + at[z] - after); });
        const bool possible = total != 0;
        const float own = gradient_at(args.dconditional, k);
        const float g = possible ? (gradient_at(args.dprefix, k) + own) / total : 0;
        const float less = possible ? own / weight : 0;
        walk.for_own([&](int z) {
            const float both = gradient[z] + g * lx::exp_approx(x[z] + at[z] - after);
            de[k * n + z] = dup ? both + dup[z] : both;
            gradient[z] = both - less * lx::exp_approx(x[z] - before);
        });
    }

    // Loads `up`, its exponentials, and for each row of Y the factor that y_at uses.
    LX_DEVICE void load_projection(int64_t m, const float* du) const {
        const float *up_state = states + (3 * m + 1) * n, *u_state = up_state + n;
        const float shift =
            shift_of(walk.reduce(kImpossible, larger, [&](int z) { return up_state[z]; }));
        walk.for_own([&](int z) {
            up[z] = up_state[z];
            up_weight[z] = lx::exp_approx(up_state[z] - shift);
            const float u = u_state[z], weight = lx::exp_approx(u - shift);
            const bool lost = weight < kTrusted && u != kImpossible;
            walk.u[z] = lost ? u : kNotExact;
            q[z] = u == kImpossible ? 0 : lost ? du[z] : du[z] / weight;
        });
    }
    // y_at returns Y[z, j] and x_at returns X[z, j], computed from p = P[z, j] and its logarithm
    // log_p().
    template <class F>
    LX_DEVICE float y_at(int z, int j, float p, F&& log_p) const {
        if (walk.u[z] == kNotExact) return q[z] * p * up_weight[j];
        return q[z] * lx::exp_approx(log_p() + up[j] - walk.u[z]);
    }
    template <class F>
    LX_DEVICE float x_at(int z, int j, float p, F&& log_p) const {
        if (out[j] == kNotExact) return walk.weights[z] * p * ratio[j];
        return ratio[j] * lx::exp_approx(cur[z] + log_p() - out[j]);
    }

    // Computes dup[z'] = sum over z of Y[z, z'].
    LX_DEVICE void project(int64_t m, const float* du, float* dup) const {
        walk.for_own([&](int z) { walk.take_row(m, z); });
        load_projection(m, du);
        walk.team.sync();
        const P* a = walk.matrix_row(m, 0);
        walk.for_own([&](int j) {
            float sum = 0;
            for (int z = 0; z < n; ++z)
                sum += y_at(z, j, walk.p_at(a, z, j), [&] { return walk.log_p(a, z, j); });
            dup[j] = sum;
        });
        walk.team.sync();
    }

    // Backward pass of the step through matrix m: dcur[z] += sum over z' of X[z, z'], and the
    // gradient of the logits. du is the gradient of the projection through the matrix, or nullptr.
    LX_DEVICE void trace(int64_t m, int64_t slot, const float* dout, const float* du,
                         float* dcur) const {
        const float shift = shift_of(walk.max_of(cur));
        walk.for_own([&](int z) {
            walk.take_row(m, z);
            walk.weights[z] = lx::exp_approx(cur[z] - shift);
            const float value = states[slot * n + z], weight = lx::exp_approx(value - shift);
            const bool lost = weight < kTrusted && value != kImpossible;
            out[z] = lost ? value : kNotExact;
            ratio[z] = value == kImpossible ? 0 : lost ? dout[z] : dout[z] / weight;
        });
        if (du) load_projection(m, du);
        walk.team.sync();
        const P* a = walk.matrix_row(m, 0);
        float* const total = d;  // sum of X + Y of each row; replaces du, which is no longer needed
        walk.for_own([&](int z) {
            float sum_x = 0, sum_y = 0;
            walk.for_probabilities(m, z, [&](int j, float p, const auto& log_p) {
                sum_x += x_at(z, j, p, log_p);
                if (du) sum_y += y_at(z, j, p, log_p);
            });
            dcur[z] += sum_x;
            total[z] = sum_x + sum_y;
        });
        walk.team.sync();
        if (!args.dtrans) return;
        P* const to = static_cast<P*>(args.dtrans) +
                      (row * circuit_num_transitions(c.kind, c.n_token) + m) * n * n;
        walk.for_own([&](int j) {
            for (int z = 0; z < n; ++z) {
                const float p = walk.p_at(a, z, j);
                const auto log_p = [&] { return walk.log_p(a, z, j); };
                float g = x_at(z, j, p, log_p) - total[z] * p;
                if (du) g += y_at(z, j, p, log_p);
                to[int64_t{z} * n + j] = lx::from_float<P>(g);
            }
        });
        walk.team.sync();
    }

    LX_DEVICE void store_prior_gradient(const float* dcur) const {
        if (!args.dprior) return;
        const float total = walk.reduce(0.0f, add, [&](int z) { return dcur[z]; });
        walk.for_own([&](int z) {
            static_cast<P*>(args.dprior)[row * n + z] =
                lx::from_float<P>(dcur[z] - total * lx::exp_approx(prior[z]));
        });
    }

    LX_DEVICE void chain() {
        float *dcur = walk.vectors, *before = walk.vectors + n;
        clear(dcur);
        for (int64_t k = c.n_token - 1; k >= 0; --k) {
            const float* state = states + k * n;
            position(k, state, dcur, nullptr);
            if (k == 0 || c.kind != CircuitKind::kHMM) continue;
            walk.for_own([&](int z) {
                cur[z] = states[(k - 1) * n + z] + e[(k - 1) * n + z];
                before[z] = 0;
            });
            walk.normalise(cur);
            trace(k - 1, k, dcur, nullptr, before);
            float* const old = dcur;
            dcur = before;
            before = old;
        }
        store_prior_gradient(dcur);
    }

    // Loads cur of `node` at the position before its left or right child.
    LX_DEVICE void load_cur(const CircuitNode& node, bool right) const {
        const CircuitNode left = node.child(false);
        const float* from = node.matrix < 0 ? prior : states + 3 * node.matrix * n;
        const float* u = left.is_leaf() ? e + left.lo * n : states + (3 * left.matrix + 2) * n;
        walk.for_own([&](int z) { cur[z] = from[z] + (right ? u[z] : 0.0f); });
        if (right)
            walk.normalise(cur);
        else
            walk.team.sync();
    }

    // Level l of the path to position k has two vectors, at vectors + 2 l n: first dup, the
    // gradient of the level's up, then dcur, the accumulated gradient of its cur (see run_tree of
    // the walk).
    LX_DEVICE void tree() {
        const CircuitNode root{0, c.n_token, -1};
        const auto dup_at = [&](int level) { return walk.vectors + 2 * level * n; };
        const auto dcur_at = [&](int level) { return walk.vectors + (2 * level + 1) * n; };
        // Writes to d the gradient of u, which a child adds to both up and cur.
        const auto load_du = [&](int level) {
            walk.for_own([&](int z) { d[z] = dup_at(level)[z] + dcur_at(level)[z]; });
        };
        clear(dup_at(0));
        clear(dcur_at(0));
        for (int64_t k = c.n_token - 1; k >= 0; --k) {
            int level = 0;
            CircuitNode node = root;
            for (CircuitNode child = node.toward(k); !child.is_leaf(); child = node.toward(k)) {
                if (child.hi == k + 1) {
                    load_du(level);
                    project(child.matrix, d, dup_at(level + 1));
                    clear(dcur_at(level + 1));
                }
                node = child;
                ++level;
            }
            load_cur(node, k >= node.middle());
            position(k, cur, dcur_at(level), dup_at(level));
            for (; level > 0 && node.lo == k; --level) {
                const CircuitNode parent = root.below(k, level - 1);
                load_cur(parent, node.lo != parent.lo);
                load_du(level - 1);
                trace(node.matrix, 3 * node.matrix, dcur_at(level), d, dcur_at(level - 1));
                node = parent;
            }
        }
        store_prior_gradient(dcur_at(0));
    }
};

template <class P, class Team>
__global__ void __launch_bounds__(256, 1)
    circuit_scan_backward_kernel(const __grid_constant__ CircuitScanArgs args, int64_t floats,
                                 bool aligned) {
    LX_DYN_SHARED(shared);
    int64_t row;
    float* scratch;
    if (!find_row<Team>(args.params, floats, shared, row, scratch)) return;
    CircuitReverse<P, Team> reverse(args, row, aligned, scratch);
    if (args.params.kind == CircuitKind::kBTree)
        reverse.tree();
    else
        reverse.chain();
}

// ------------------------------------------------------------------------------------------------
// Launch

void declare(const CircuitScanArgs& args, bool back) {
    const CircuitParams& c = args.params;
    const int64_t size = element_size(c.dtype), vector = c.components * 4;
    const int64_t matrices = circuit_num_transitions(c.kind, c.n_token);
    const int64_t prior_bytes = c.components * size,
                  trans_bytes = matrices * c.components * prior_bytes;
    declare_batch(args.e, c.rows, c.n_token * vector, args.e_stride * 4, lx::Access::kRead);
    if (c.prior)
        declare_batch(c.prior, c.rows, prior_bytes, c.prior_stride * size, lx::Access::kConstant);
    if (trans_bytes > 0)
        declare_batch(c.trans, c.rows, trans_bytes, c.trans_stride * size, lx::Access::kConstant);
    if (args.states)
        LX_BUF(args.states, c.rows * circuit_num_states(c.kind, c.n_token) * vector,
               back ? lx::Access::kRead : lx::Access::kWrite);
    if (!back) {
        LX_BUF(args.prefix, c.rows * c.n_token * 4, lx::Access::kWrite);
        LX_BUF(args.conditional, c.rows * c.n_token * 4, lx::Access::kWrite);
        LX_BUF(args.posterior, c.rows * c.n_token * vector, lx::Access::kWrite);
        return;
    }
    if (args.dprefix) LX_BUF(args.dprefix, c.rows * c.n_token * 4, lx::Access::kRead);
    if (args.dconditional) LX_BUF(args.dconditional, c.rows * c.n_token * 4, lx::Access::kRead);
    LX_BUF(args.de, c.rows * c.n_token * vector, lx::Access::kWrite);
    if (args.dprior) LX_BUF(args.dprior, c.rows * prior_bytes, lx::Access::kWrite);
    if (args.dtrans) LX_BUF(args.dtrans, c.rows * trans_bytes, lx::Access::kWrite);
}

LaunchStatus launch(const CircuitScanArgs& args, bool back, void* stream) {
    const CircuitParams& c = args.params;
    if (c.rows == 0) return 0;
    if (c.rows > INT32_MAX || c.components > INT16_MAX + 1) return kInvalidValue;
    const int64_t size = element_size(c.dtype);
    const bool aligned = aligned_16(c.trans, {c.trans_stride, c.components}, size);
    const bool warp = c.components <= kWarpStates;
    const int64_t extra = back ? kReverseVectors * c.components : 0;
    const int64_t floats =
        (circuit_walk_floats(c, warp ? WarpTeam::kScratch : BlockTeam::kScratch) + extra + 3) / 4 *
        4;
    const unsigned threads = warp ? kRowsPerBlock * 32 : block_team_size(c.components);
    const auto blocks = static_cast<unsigned>(warp ? ceil_div(c.rows, kRowsPerBlock) : c.rows);
    const auto bytes = static_cast<size_t>(4 * floats * (warp ? kRowsPerBlock : 1));
    declare(args, back);
    return with_dtype(c.dtype, [&]<class P>() {
        if (warp)
            return back ? LX_LAUNCH((circuit_scan_backward_kernel<P, WarpTeam>), blocks, threads,
                                    bytes, stream, args, floats, aligned)
                        : LX_LAUNCH((circuit_scan_kernel<P, WarpTeam>), blocks, threads, bytes,
                                    stream, args, floats, aligned);
        return back ? LX_LAUNCH((circuit_scan_backward_kernel<P, BlockTeam>), blocks, threads,
                                bytes, stream, args, floats, aligned)
                    : LX_LAUNCH((circuit_scan_kernel<P, BlockTeam>), blocks, threads, bytes, stream,
                                args, floats, aligned);
    });
}

}  // namespace

LaunchStatus launch_circuit_scan(const CircuitScanArgs& args, void* stream) {
    return launch(args, false, stream);
}
LaunchStatus launch_circuit_scan_backward(const CircuitScanArgs& args, void* stream) {
    return launch(args, true, stream);
}

}  // namespace lora_ext
