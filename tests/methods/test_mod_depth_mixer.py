"""`DepthMixer`: formula, routers, accepted norms and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_ext import reference
from lora_ext.methods.mod import ModConfig
from lora_ext.methods.mod.layers import _norm_form
from lora_ext.nn import DepthMixer

WIDTH = 6


def rms(weight: list[float], eps: float = 0.0) -> nn.RMSNorm:
    norm = nn.RMSNorm(len(weight), eps=eps, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
    return norm


def random_norms(k: int, kind: type[nn.Module] = nn.RMSNorm, seed: int = 0) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    norms: list[nn.Module] = []
    for _ in range(k):
        norm = kind(WIDTH, eps=1e-5, dtype=torch.float64)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(WIDTH, generator=generator, dtype=torch.float64))
        norms.append(norm)
    return norms


def random_hiddens(k: int, *shape: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64) for _ in range(k)]


def test_mix_equals_a_known_result():
    config = ModConfig(k=2, router="fixed", fixed_weights=(0.25, 0.75))
    mixer = DepthMixer([rms([1, 2]), rms([1, 1])], config)
    hiddens = [torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[1.0, 0.0]]).double()]
    mixed, weights = mixer(hiddens)
    expected = torch.tensor([[1.27279221, 0.56568542]], dtype=torch.float64)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-8)
    assert weights.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("k", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("router", ["token", "static"])
def test_mix_is_the_softmax_weighted_sum_of_normed_states(k: int, kind: Any, router: Any):
    mixer = DepthMixer(random_norms(k, kind), ModConfig(k=k, router=router))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (mixer.router, mixer.bias):
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hiddens = random_hiddens(k, 2, 5)
    normed = [n(h) for n, h in zip([*mixer.norms, mixer.final_norm], hiddens, strict=True)]
    logits = mixer.bias.expand(2, 5, k) if mixer.bias is not None else None
    if router == "token":
        logits = normed[-1] @ mixer.router.T + logits
    expected = logits.softmax(-1)
    mixed, weights = mixer(hiddens)
    torch.testing.assert_close(weights, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(weights, mixer.weights(hiddens), rtol=1e-11, atol=1e-12)
    sums = sum(expected[..., e, None] * n for e, n in enumerate(normed))
    torch.testing.assert_close(mixed, sums, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mixer.normed(hiddens), normed, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("router", ["token", "static"])
@pytest.mark.parametrize(("k", "mass"), [(2, 0.9), (3, 0.9), (3, 1 / 3), (5, 0.01), (1, 0.9)])
def test_initial_weight_of_the_last_state_is_final_mass(router: Any, k: int, mass: float):
    mixer = DepthMixer(random_norms(k), ModConfig(k=k, router=router, final_mass=mass))
    _, weights = mixer(random_hiddens(k, 4))
    expected = torch.tensor(
        [(1 - mass) / max(k - 1, 1)] * (k - 1) + [mass if k > 1 else 1.0], dtype=torch.float64
    )
    torch.testing.assert_close(weights, expected.expand(4, k), rtol=1e-12, atol=0)


def test_static_weights_do_not_depend_on_the_position():
    static = DepthMixer(random_norms(3), ModConfig(router="static"))
    token = DepthMixer(random_norms(3), ModConfig())
    with torch.no_grad():
        static.bias.add_(torch.randn(3))
        token.router.add_(torch.randn(3, WIDTH))
    hiddens = random_hiddens(3, 2, 4)
    assert static(hiddens)[1].flatten(0, 1).unique(dim=0).shape == (1, 3)
    assert token(hiddens)[1].flatten(0, 1).unique(dim=0).shape == (8, 3)


def test_fixed_router_has_no_parameter_and_accepts_zero_weights():
    config = ModConfig(router="fixed", fixed_weights=[0.0, 0.0, 1.0])  # pyright: ignore
    mixer = DepthMixer(random_norms(3), config)
    assert not [n for n, _ in mixer.named_parameters() if not n.startswith("norms.")]
    hiddens = random_hiddens(3, 4)
    torch.testing.assert_close(mixer(hiddens)[0], mixer.final_norm(hiddens[-1]))


@given(st.permutations(range(3)), st.floats(0.1, 10))
def test_mix_is_invariant_to_order_and_without_eps_to_scale(order: list[int], size: float):
    weights, norms = [0.2, 0.3, 0.5], [rms([0.5, 1, -2]), rms([1, 1, 3]), rms([2, 0.1, 1])]
    generator = torch.Generator().manual_seed(0)
    hiddens = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    mixes = []
    for places, factor in ((range(3), 1.0), (order, size)):
        config = ModConfig(router="fixed", fixed_weights=tuple(weights[e] for e in places))
        mixer = DepthMixer([norms[e] for e in places], config)
        mixes.append(mixer([factor * hiddens[e] for e in places])[0])
    torch.testing.assert_close(mixes[0], mixes[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [2, 10])
def test_gradients_reach_states_norms_and_router(k: int):
    mixer = DepthMixer(random_norms(k), ModConfig(k=k))
    with torch.no_grad():
        mixer.router.add_(torch.randn(k, WIDTH, generator=torch.Generator().manual_seed(5)))
    names = [n for n, _ in mixer.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    hiddens = [h.requires_grad_() for h in random_hiddens(k, 2)]

    def run(*values: Tensor) -> Tensor:
        given = dict(zip(names, values[k:], strict=True))
        return torch.func.functional_call(mixer, given, (values[:k],))[0]

    assert torch.autograd.gradcheck(run, (*hiddens, *parameters))


# -------------------------------------------------------------------------------------------------
# Ownership of the last norm


def test_shared_last_norm_is_no_submodule_but_is_moved_by_to():
    norms = random_norms(3)
    mixer = DepthMixer(norms, ModConfig())
    assert list(mixer.state_dict()) == ["router", "bias", "norms.0.weight", "norms.1.weight"]
    assert mixer.final_norm is norms[-1]
    mixer.to(torch.float32)
    assert {p.dtype for n in norms for p in n.parameters()} == {torch.float32}
    assert mixer([h.float() for h in random_hiddens(3, 4)])[0].dtype == torch.float32
    own = DepthMixer(random_norms(3), ModConfig(share_final_norm=False))
    assert "norms.2.weight" in own.state_dict()
    for made in (mixer, own):
        other = copy.deepcopy(made)
        assert other.final_norm is not made.final_norm
        hiddens = [h.to(made.router.dtype) for h in random_hiddens(3, 4)]
        assert torch.equal(other(hiddens)[0], made(hiddens)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_mixes_in_float32_and_rounds_once(dtype: torch.dtype):
    norms = [n.to(dtype) for n in random_norms(3)]
    mixer = DepthMixer(norms, ModConfig())
    assert mixer.router.dtype == torch.float32
    hiddens = [h.to(dtype) for h in random_hiddens(3, 4)]
    mixed, weights = mixer(hiddens)
    assert (mixed.dtype, weights.dtype) == (dtype, torch.float32)
    gammas = [n.weight for n in norms]
    exact = reference.depth_mix(
        [h.double() for h in hiddens], [g.double() for g in gammas], weights.double(), 1e-5
    )
    torch.testing.assert_close(mixed.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# Kinds of norms


def _transformers_norm(model: str, name: str) -> nn.Module:
    return getattr(getattr(transformers.models, model), f"modeling_{model}").__dict__[name](WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "kind", "offset"),
    [
        (lambda: nn.RMSNorm(WIDTH, eps=1e-3), "rms", 0),
        (lambda: nn.RMSNorm(WIDTH), "rms", 0),
        (lambda: nn.LayerNorm(WIDTH), "layer", 0),
        (lambda: nn.LayerNorm(WIDTH, bias=False), "layer", 0),
        (lambda: _transformers_norm("llama", "LlamaRMSNorm"), "rms", 0),
        (lambda: _transformers_norm("gemma2", "Gemma2RMSNorm"), "rms", 1),
        (lambda: _transformers_norm("cohere", "CohereLayerNorm"), "layer", 0),
    ],
)
def test_norms_are_recognised_by_their_outputs(
    norm: Any, kind: str, offset: int, dtype: torch.dtype
):
    made = norm().to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    form = _norm_form(made, "test")
    assert (form.kind, form.offset) == (kind, offset)
    hiddens = [h.to(dtype) for h in random_hiddens(1, 5)]
    mixer = DepthMixer([made], ModConfig(k=1))
    got, wanted = mixer.normed(hiddens)[0], made(hiddens[0])
    tolerance = 1e-6 if dtype != torch.bfloat16 else 0.03
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


class _Half(nn.Module):
    """RMSNorm with a halved output, which is no known kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.Identity(),
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: nn.PReLU(WIDTH),
        _Half,
    ],
)
def test_other_modules_are_refused_as_norms(norm: Any):
    made = norm()
    if isinstance(made, nn.BatchNorm1d):
        made.eval().running_mean.fill_(1.0)
    with pytest.raises(
        TypeError, match=r"DepthMixer: norms: 0: expected a norm like RMSNorm or LayerNorm"
    ):
        DepthMixer([made], ModConfig(k=1))


# -------------------------------------------------------------------------------------------------
# Errors


def test_norms_of_another_number_width_or_kind_are_refused():
    with pytest.raises(ValueError, match=r"DepthMixer: norms: expected k = 3 modules, found 2"):
        DepthMixer(random_norms(2), ModConfig())
    for other in (nn.RMSNorm(WIDTH + 1), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=0.1)):
        norms = [other.double(), *random_norms(2)]
        with pytest.raises(ValueError, match=r"DepthMixer: norms: 0: expected .*, found "):
            DepthMixer(norms, ModConfig())


@pytest.mark.parametrize(
    "wrong",
    [lambda h: h[:1], lambda h: h.float(), lambda h: h.to("meta")],
    ids=["shape", "dtype", "device"],
)
def test_states_that_differ_are_refused(wrong: Any):
    mixer, hiddens = DepthMixer(random_norms(3), ModConfig()), random_hiddens(3, 4)
    hiddens[1] = wrong(hiddens[1])
    for use in (mixer, mixer.normed, mixer.weights):
        with pytest.raises(ValueError, match=r"DepthMixer: hiddens: 1: expected .*, found "):
            use(hiddens)
        with pytest.raises(ValueError, match=r"hiddens: expected k = 3 tensors, found 2"):
            use(hiddens[:2])
