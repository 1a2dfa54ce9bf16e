"""Isolation of tenants from other tenants that cause overflows, flood the service with calls, or
close."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from test_service import VOCAB, datum, factors, held, llama, together

from lora_ext.serving import Sampling
from lora_ext.tenants import Datum, Sample, Service

NAN = float("nan")


def assert_like(expected: Sample, found: list[Sample]) -> None:
    """Check that the tokens are equal, and the log-probabilities equal up to the rounding of
    another batch."""
    assert [each.tokens for each in found] == [expected.tokens]
    assert found[0].logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.slow
def test_overflowing_adapter_fails_only_its_own_samples() -> None:
    with Service(llama()) as service:
        good, bad = service.create(4), service.create(4, seed=1)
        with torch.no_grad():  # finite factors with a product that overflows
            for parameter in bad.adapter.parameters.values():
                parameter.normal_().mul_(1e30)
        samplers = good.sampler(), bad.sampler()
        (alone,) = samplers[0].sample([1, 2, 3], 8, seed=1)
        for heat in (1.0, 0.0):
            spoilt = samplers[1].begin([1, 2, 3], 8, 2, temperature=heat)
            assert_like(alone, samplers[0].sample([1, 2, 3], 8, seed=1))
            for future in spoilt:
                with pytest.raises(ValueError, match="logprobs: expected finite"):
                    future.result()
        assert_like(alone, samplers[0].sample([1, 2, 3], 8, seed=1))


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_draw_from_invalid_logits_returns_a_token(bad: float) -> None:
    for logits in (torch.full((5,), bad), torch.tensor([0.0, bad, NAN, 1.0, 2.0])):
        for how in (Sampling(), Sampling(top_k=2, top_p=0.5), Sampling(0.0)):
            assert 0 <= int(how.draw(logits)) < 5


@pytest.mark.slow
def test_running_samples_of_a_closed_tenant_finish() -> None:
    with Service(llama()) as service:
        good, gone = service.create(4), service.create(4, seed=1)
        mine, theirs = good.sampler(), gone.sampler()
        begun = theirs.begin([1, 2], 30)
        gone.close()
        del theirs  # unloads the adapter during its sample
        (expected,) = mine.sample([1, 2], 5, seed=1)
        assert len(begun[0].result().tokens) == 30
        assert_like(expected, mine.sample([1, 2], 5, seed=1))


def test_queued_calls_of_a_closed_tenant_are_dropped_without_changing_a_bit() -> None:
    def run(leaves: bool) -> list[torch.Tensor]:
        with Service(llama()) as service:
            good, gone = service.create(4), service.create(4, seed=1)
            dropped = []
            with held(service):
                if leaves:
                    dropped = [gone.forward_backward([datum(2)]), gone.optim_step(1e-2)]
                    gone.close(wait=False)
                result = good.forward_backward([datum(1)])
            for future in dropped:
                with pytest.raises(RuntimeError, match="dropped: the tenant is closed"):
                    future.result()
            good.optim_step(1e-2).result()
            return [*result.result().logprobs, *factors(good)]

    assert all(map(torch.equal, run(False), run(True)))


def test_flood_of_tokens_delays_other_tenants_by_one_round() -> None:
    with Service(llama(), max_tokens=128) as service:
        flood, other = service.create(2), service.create(2)
        order: list[str] = []

        def recorded(name: str, future: Future[Any]) -> Future[Any]:
            future.add_done_callback(lambda _: order.append(f"{name} {service.counts['steps']}"))
            return future

        data = [datum(i, 64) for i in range(20)]  # ten steps of two data each
        together(
            service,
            lambda: recorded("flood", flood.forward(data)),
            lambda: recorded("other", other.forward([datum(1)])),
        )
        # Three queues take turns, one of which belongs to the service.
        assert order == ["other 3", "flood 11"]


def test_many_targets_of_one_row_need_no_memory_for_other_rows() -> None:
    # One token has 5000 targets. The 200 tokens of another tenant must not need 200 * 5000 entries.
    many = 5000
    with Service(llama(), max_tokens=512) as service:
        flood, other = service.create(2), service.create(2)
        targets = torch.arange(many)[None] % VOCAB
        wide, long = Datum([1], {"target_tokens": targets}), datum(1, 200)
        alone = other.forward([long]).result().logprobs[0]
        seen: list[int] = []
        inner = service._step._of_rows

        def spy(*args: torch.Tensor) -> torch.Tensor:
            seen.append(args[-1].numel())
            return inner(*args)

        service._step._of_rows = spy  # pyright: ignore[reportAttributeAccessIssue]
        found = together(service, lambda: flood.forward([wide]), lambda: other.forward([long]))
        assert seen == [many + 200]
        assert torch.allclose(found[1].logprobs[0], alone, atol=1e-6)
        law = found[0].logprobs[0][0, :VOCAB].exp()
        assert found[0].logprobs[0].shape == (1, many) and abs(float(law.sum()) - 1) < 1e-5


def test_overflowing_gradient_norm_changes_no_parameter() -> None:
    with Service(llama()) as service:
        tenant = service.create(4)
        before = factors(tenant)
        tenant.forward_backward([datum(1, weights=torch.full((20,), 1e22))]).result()
        with pytest.raises(ValueError, match="gradients: expected a norm"):
            tenant.optim_step(1e-2).result()
        assert all(map(torch.equal, before, factors(tenant)))
        assert tenant.optim_step(1e-2).result().metrics == {"grad_norm:mean": 0.0}


class Letters:
    """Tokenizer with one letter per token. It counts the calls of ``decode``."""

    asked = 0

    def decode(self, tokens: list[int], **_: object) -> str:
        self.asked += 1
        return "".join(chr(0x4E00 + token) for token in tokens)


@pytest.mark.slow
def test_stop_text_is_found_in_few_decodes() -> None:
    letters = Letters()
    with Service(llama(), tokenizer=letters) as service:
        sampler = service.sampler()
        (whole,) = sampler.sample([1, 2], 60, seed=5)
        text = letters.decode(whole.tokens[40:42])
        first = letters.decode(whole.tokens).index(text) + 2
        letters.asked = 0
        (cut,) = sampler.sample([1, 2], 60, seed=5, stop=["no such text", text])
        assert cut.tokens == whole.tokens[:first] and cut.stop_reason == "stop"
        assert letters.asked <= 8  # one call for the whole text, then a bisection of 60 tokens
        assert sampler.sample([1, 2], 60, seed=5, stop=["no such text"])[0].tokens == whole.tokens
