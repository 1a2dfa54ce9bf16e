// Leaves whose logits are the output of a linear layer. The logits are computed in chunks, so that
// they are never all in memory: a library's GEMM computes a chunk, and the leaf kernels process it
// in place.
//
// Shapes: h (B, D); emit (K, C, V, D); x (B, K); e (B, K, C).
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

#include "lora_ext/circuit.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/circuit.h"
#include "ops/circuit_args.h"
#include "ops/gemm.h"
#include "ops/settings.h"
#include "ops/stream.h"

namespace lora_ext {
namespace {

// Maximum size of the logits of one chunk.
constexpr int64_t kLogitBytes = int64_t{64} << 20;

const CircuitCpu& twin() {
    return chosen_twins<CircuitCpu>();
}

// Arguments of one call. For each position and chunk of rows, the library computes logits = h @
// emit[k].T, and the leaf kernels process them in place.
struct Emission {
    const char* op;
    Tensor h, emit, x;
    int64_t rows, n_token, components, vocab, width, chunk_rows;
    Tensor logits;

    Emission(const char* op, const Tensor& h_in, const Tensor& emit_in, const Tensor& x_in)
        : op(op) {
        dtype_of(op, "h", h_in);
        check_dim(op, "h", h_in, 2, "(B, D)");
        check_like(op, "emit", emit_in, h_in, "h");
        check_dim(op, "emit", emit_in, 4, "(K, C, V, D)");
        rows = h_in.size(0);
        n_token = emit_in.size(0);
        components = emit_in.size(1);
        vocab = emit_in.size(2);
        width = emit_in.size(3);
        require(h_in.size(1) == width, op, "h.shape[1]", expected("emit.shape[3] = ", width),
                found(h_in.size(1)));
        require(n_token > 0 && components > 0 && vocab > 0, op, "emit",
                expected("at least one position, component and token"), found(emit_in.sizes()));
        check_tokens(op, x_in, rows, n_token, vocab, h_in.device());
        h = h_in.contiguous();
        emit = emit_in.contiguous();
        x = x_in.contiguous();
        const int64_t row_bytes = components * vocab * static_cast<int64_t>(h.element_size());
        chunk_rows = std::clamp<int64_t>(kLogitBytes / row_bytes, 1, std::max<int64_t>(rows, 1));
        logits = at::empty({chunk_rows, components * vocab}, h.options());
    }

    Tensor weights(int64_t k) const { return emit.select(0, k).view({components * vocab, width}); }

    // Calls f(k, first row, rows of h, logits, arguments of the leaf kernels) for each position k
    // and chunk of rows.
    template <typename F>
    void for_chunks(F&& f) {
        for (int64_t k = 0; k < n_token; ++k) {
            const Tensor w = weights(k).t();
            for (int64_t first = 0; first < rows; first += chunk_rows) {
                const int64_t count = std::min(chunk_rows, rows - first);
                const Tensor part = h.narrow(0, first, count);
                Tensor out = logits.narrow(0, 0, count);
                at::mm_out(out, spaced(part), w);
                CircuitLeafArgs args;
                args.dtype = dtype_of(op, "h", h);
                args.rows = count;
                args.n_token = 1;
                args.components = components;
                args.vocab = vocab;
                args.logits = out.const_data_ptr();
                args.logits_stride = components * vocab;
                args.x = x.const_data_ptr<int64_t>() + first * n_token + k;
                args.x_stride = n_token;
                args.e_stride = n_token * components;
                f(k, first, part, out, args);
            }
        }
    }
    // Return the address of element (first, k, 0) of a tensor (B, K, C).
    char* at(const Tensor& t, int64_t first, int64_t k) const {
        return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) +
               (first * n_token + k) * components * t.element_size();
    }
    // Computes e and the norms of a chunk.
    void gather(CircuitLeafArgs& args, const Tensor& e, const Tensor& norm, int64_t first,
                int64_t k) const {
        args.e = at(e, first, k);
        args.top = at(norm[0], first, k);
        args.log_sum = at(norm[1], first, k);
        if (launches_kernels(h))
            check_launch(op, launch_circuit_leaf(args, current_stream(h)));
        else
            for_items(args.rows, components * vocab, kSerialExps,
                      [&](int64_t begin, int64_t end) { twin().leaf(args, begin, end); });
    }
};

}  // namespace

Tensor emission_gather(const Tensor& h, const Tensor& emit, const Tensor& x) {
    Emission chunks("emission_gather", h, emit, x);
    const c10::DeviceGuard guard(h.device());
    const NoAutocast no_autocast;
    const auto options = h.options().dtype(accumulator_of(h));
    const std::array<int64_t, 3> shape{chunks.rows, chunks.n_token, chunks.components};
    Tensor e = at::empty(shape, options);
    const Tensor norm = at::empty({2, shape[0], shape[1], shape[2]}, options);
    chunks.for_chunks([&](int64_t k, int64_t first, const Tensor&, const Tensor&,
                          CircuitLeafArgs& args) { chunks.gather(args, e, norm, first, k); });
    return e;
}

std::tuple<Tensor, Tensor> emission_gather_backward(const Tensor& de_in, const Tensor& h,
                                                    const Tensor& emit, const Tensor& x,
                                                    bool need_h, bool need_emit) {
    constexpr auto op = "emission_gather_backward";
    Emission chunks(op, h, emit, x);
    const auto type = accumulator_of(h);
    const auto options = h.options().dtype(type);
    const std::array<int64_t, 3> shape{chunks.rows, chunks.n_token, chunks.components};
    check_dtype(op, "de", de_in, type);
    check_shape(op, "de", de_in, "(B, K, C)", shape, h.device());
    const Tensor de = de_in.contiguous();
    const c10::DeviceGuard guard(h.device());
    const NoAutocast no_autocast;
    const Tensor e = at::empty(shape, options);
    const Tensor norm = at::empty({2, shape[0], shape[1], shape[2]}, options);
    const auto nothing = [&] { return at::empty({0}, h.options()); };
    // dh is summed over positions, and demit over chunks of rows, in float32.
    Tensor dh = need_h ? at::zeros(h.sizes(), options) : nothing();
    Tensor demit = need_emit ? at::empty(emit.sizes(), h.options()) : nothing();
    if (need_emit && chunks.rows == 0) demit.zero_();
    Tensor sum;
    chunks.for_chunks([&](int64_t k, int64_t first, const Tensor& part, const Tensor& logits,
                          CircuitLeafArgs& args) {
        chunks.gather(args, e, norm, first, k);
        args.de = chunks.at(de, first, k);
        args.dlogits = logits.mutable_data_ptr();
        if (launches_kernels(h))
            check_launch(op, launch_circuit_leaf_backward(args, current_stream(h)));
        else
            for_items(args.rows, chunks.components * chunks.vocab, kSerialExps,
                      [&](int64_t begin, int64_t end) { twin().leaf_backward(args, begin, end); });
        if (need_h)
            dh.narrow(0, first, part.size(0)).add_(at::mm(spaced(logits), chunks.weights(k)));
        if (!need_emit) return;
        const Tensor own = at::mm(logits.t(), part);
        Tensor to = demit.select(0, k).view(own.sizes());
        if (chunks.chunk_rows >= chunks.rows) {
            to.copy_(own);
            return;
        }
        sum = first == 0 ? own.to(type) : sum.add_(own);
        if (first + part.size(0) == chunks.rows) to.copy_(sum);
    });
    return {need_h ? dh.to(h.scalar_type()) : dh, demit};
}

}  // namespace lora_ext
