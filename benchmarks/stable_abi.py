"""Time calls through torch's stable ABI and its C++ API, for two ops with our schemas.

``python benchmarks/stable_abi.py`` compiles two small files (a minute) and prints a table. The ops
only read their arguments and create their outputs, so the times are the overhead of a call. The
backward of the training op is a C++ ``autograd::Function``, which the stable ABI lacks, or is
registered with ``torch.library.register_autograd``. ``--ours`` compiles nothing and times two of
our ops: the backward of one is in C++, that of the other in Python. Times are processor times: the
least of many short interleaved runs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

ADAPTERS = "Tensor? ranks=None, Tensor? page_table=None, Tensor? plan=None"
SCHEMAS = {
    "apply_": "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor adapter_ids, "
    f"Tensor? scale=None, {ADAPTERS}) -> ()",
    "linear": "(Tensor x, Tensor a, Tensor b, Tensor adapter_ids, Tensor? scale=None, "
    "Tensor? ranks=None, float dropout_p=0.0, Tensor? plan=None) -> (Tensor, Tensor)",
    "linear_backward": "(Tensor dy, Tensor x, Tensor v, Tensor a, Tensor b, Tensor adapter_ids, "
    "Tensor? scale, Tensor? ranks, float dropout_p, Tensor? plan) -> (Tensor, Tensor, Tensor)",
}
DEFS = "\n".join(f'    m.def("{name}{schema}");' for name, schema in SCHEMAS.items())

BODY = """
using OT = OPT<Tensor>;
void apply_(Tensor y, Tensor x, Tensor a, Tensor b, Tensor ids, OT scale, OT ranks, OT pages,
            OT plan) {
    CHECK(x.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == b.size(1));
    CHECK(a.size(2) == x.size(1));
    CHECK(ids.size(0) == x.size(0) && x.data_ptr() && y.data_ptr() && a.data_ptr() && b.data_ptr());
}
std::tuple<Tensor, Tensor> linear(Tensor x, Tensor a, Tensor b, Tensor ids, OT scale, OT ranks,
                                  double p, OT plan) {
    CHECK(x.dim() == 2 && a.size(2) == x.size(1) && ids.size(0) == x.size(0));
    return {EMPTY(x, x.size(0), b.size(1)), EMPTY(x, x.size(0), a.size(1))};
}
std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, Tensor v, Tensor a,
        Tensor b, Tensor ids, OT scale, OT ranks, double p, OT plan) {
    CHECK(dy.dim() == 2 && dy.size(1) == b.size(1));
    return {LIKE(x), LIKE(a), LIKE(b)};
}
"""
CPP = (
    """
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
using at::Tensor;
template <class T> using OPT = std::optional<T>;
#define CHECK(x) TORCH_CHECK(x)
#define EMPTY(t, n, m) at::empty({n, m}, t.options())
#define LIKE(t) at::empty_like(t)
"""
    + BODY
    + """
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
template <class F> auto op(const char* name) {
    static auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
    return handle;
}
struct Linear : torch::autograd::Function<Linear> {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& a,
            const Tensor& b, const Tensor& ids, const OT& scale, const OT& ranks, double p,
            const OT& plan) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        auto [y, v] =
            op<decltype(linear)>("probe_cpp::linear").call(x, a, b, ids, scale, ranks, p, plan);
        ctx->save_for_backward({x, v, a, b, ids});
        ctx->mark_non_differentiable({v});
        ctx->set_materialize_grads(false);
        return {y, v};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& g) {
        const auto s = ctx->get_saved_variables();
        auto [dx, da, db] = op<decltype(linear_backward)>("probe_cpp::linear_backward").call(
            g[0], s[0], s[1], s[2], s[3], s[4], {}, {}, 0.0, {});
        return {dx, da, db, {}, {}, {}, {}, {}};
    }
};
std::tuple<Tensor, Tensor> linear_autograd(Tensor x, Tensor a, Tensor b, Tensor ids, OT scale,
                                           OT ranks, double p, OT plan) {
    auto out = Linear::apply(x, a, b, ids, scale, ranks, p, plan);
    return {out[0], out[1]};
}
TORCH_LIBRARY(probe_cpp, m) {
"""
    + DEFS
    + """
}
TORCH_LIBRARY_IMPL(probe_cpp, CPU, m) {
    m.impl("apply_", TORCH_FN(apply_));
    m.impl("linear", TORCH_FN(linear));
    m.impl("linear_backward", TORCH_FN(linear_backward));
}
TORCH_LIBRARY_IMPL(probe_cpp, Autograd, m) { m.impl("linear", TORCH_FN(linear_autograd)); }
"""
)
STABLE = (
    """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
using torch::stable::Tensor;
template <class T> using OPT = std::optional<T>;
#define CHECK(x) STD_TORCH_CHECK(x)
#define EMPTY(t, n, m) torch::stable::new_empty(t, {n, m})
#define LIKE(t) torch::stable::empty_like(t)
"""
    + BODY
    + """
STABLE_TORCH_LIBRARY(probe_stable, m) {
"""
    + DEFS
    + """
}
STABLE_TORCH_LIBRARY_IMPL(probe_stable, CPU, m) {
    m.impl("apply_", TORCH_BOX(&apply_));
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linear_backward", TORCH_BOX(&linear_backward));
}
"""
)


def build(name: str, source: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.cpp"
        file.write_text(source)
        cpp_extension.load(
            name,
            [str(file)],
            extra_cflags=["-O1", "-std=c++20"],
            build_directory=folder,
            is_python_module=False,
        )


def differentiable() -> None:
    """Register a backward of the stable op in Python, with the formula of the C++ function."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        x, a, b, ids, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], a, b, ids)

    def backward(ctx: Any, dy: Any, dv: Any) -> Any:
        x, v, a, b, ids = ctx.saved_tensors
        run = torch.ops.probe_stable.linear_backward.default
        return *run(dy, x, v, a, b, ids, None, None, 0.0, None), None, None, None, None, None

    torch.library.register_autograd("probe_stable::linear", backward, setup_context=setup)


def least(
    runs: dict[str, Callable[[], Any]], calls: int = 300, rounds: int = 60
) -> dict[str, float]:
    """Return the least microseconds per call of each run; the runs are interleaved."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.process_time()
            for _ in range(calls):
                run()
            best[name] = min(best[name], (time.process_time() - begun) / calls * 1e6)
    return best


def ours() -> None:
    """Time ``lora_linear_forward``, with a backward in C++, and ``lora_apply``, with a backward in
    Python."""
    import lora_ext  # noqa: F401  (registers the ops)

    ops = torch.ops.lora_ext
    x, a, b = torch.zeros(4, 64), torch.zeros(2, 8, 64), torch.zeros(2, 64, 8)
    ids, dy = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 64)
    calls: dict[str, Callable[..., Any]] = {
        "C++": lambda x, a, b: ops.lora_linear_forward.default(x, None, None, a, b, ids)[0],
        "Python": lambda x, a, b: ops.lora_apply.default(x, a, b, ids),
    }
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    with torch.inference_mode():
        bare = least({k: lambda f=f: f(x, a, b) for k, f in calls.items()}, 200, 25)
    forward = least({k: lambda f=f: f(*leaves) for k, f in calls.items()}, 200, 25)
    whole = least({k: lambda f=f: f(*leaves).backward(dy) for k, f in calls.items()}, 200, 25)
    print(f"{'processor microseconds per call':38}{'C++':>8}{'Python':>8}")
    for name, row in (("inference", bare), ("forward", forward), ("with backward", whole)):
        print(f"{name:38}{row['C++']:8.1f}{row['Python']:8.1f}")


def main() -> None:
    torch.set_num_threads(1)
    if "--ours" in sys.argv:
        return ours()
    build("probe_cpp", CPP)
    build("probe_stable", STABLE)
    differentiable()
    x, y = torch.zeros(4, 64), torch.zeros(4, 64)
    a, b, ids = torch.zeros(2, 8, 64), torch.zeros(2, 64, 8), torch.zeros(4, dtype=torch.int64)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    serve, train, both = {}, {}, {}
    for name in ("probe_cpp", "probe_stable"):
        ops = getattr(torch.ops, name)
        apply_, linear = ops.apply_.default, ops.linear.default

        def forward(linear: Any = linear) -> Any:
            return linear(*leaves, ids)[0]

        def step(forward: Any = forward) -> None:
            forward().backward(y)

        serve[name] = lambda apply_=apply_: apply_(y, x, a, b, ids)
        train[name], both[name] = forward, step
    with torch.inference_mode():
        rows = {"serving call, inference mode": least(serve)}
    rows["training call, forward"] = least(train)
    rows["training call, forward and backward"] = least(both)
    print(f"torch {torch.__version__}; microseconds per call, least of 60 runs of 300 calls")
    print(f"{'':38}{'C++':>8}{'stable':>8}{'more':>8}")
    for name, found in rows.items():
        one, two = found["probe_cpp"], found["probe_stable"]
        print(f"{name:38}{one:8.2f}{two:8.2f}{two - one:8.2f}")


if __name__ == "__main__":
    main()
