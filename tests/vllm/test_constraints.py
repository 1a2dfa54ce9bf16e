"""Constraints of requests in a vLLM engine, combined with adapters."""

import re

import pytest

from lora_ext.interop.vllm._constraints import KEY, PROCESSOR

# A text is the concatenation of the letters of its tokens. Token 2 is the end token.
FORMS = {
    r"(w[3-9]){2}w1[0-9]": {"regex": "(w[3-9]){2}w1[0-9]"},
    r"(w7w8|w9)": {"choice": ["w7w8", "w9"]},
    r"(?!.*w5).*w42.*": '{"keywords": {"all_of": ["w42"], "none_of": ["w5"]}}',
}
NAMES = ["a", None, "b", "a"]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14], [17, 18]]


def asked(engine, forms, **more):
    """Return the texts and tokens of requests, one per form; a form may be None."""
    from vllm import SamplingParams

    how = [
        SamplingParams(
            max_tokens=10, seed=i, extra_args=None if form is None else {KEY: form}, **more
        )
        for i, form in enumerate(forms)
    ]
    found = engine.ask("generate", NAMES[: len(forms)], how, prompts=PROMPTS)
    return [(o.outputs[0].finish_reason, list(o.outputs[0].token_ids)) for o in found]


def check(found, forms):
    for (reason, tokens), pattern in zip(found, forms, strict=False):
        assert reason == "stop" and tokens[-1] == 2
        text = "".join(f"w{t}" for t in tokens[:-1])
        assert re.fullmatch(pattern, text), (pattern, text)


@pytest.fixture(scope="module")
def engine(make_engine):
    with make_engine(logits_processors=[PROCESSOR]) as made:
        yield made


@pytest.mark.parametrize("warm", [0.0, 1.0, 1.7])
def test_every_row_satisfies_its_form_and_uses_its_adapter(engine, warm):
    (plain,) = asked(engine, [None], temperature=warm)
    forms = [None, *FORMS]
    found = asked(engine, [None, *FORMS.values()], temperature=warm)
    check(found[1:], forms[1:])
    if warm == 0:
        assert found[0] == plain  # the only row of the batch without a form
    assert len({tuple(t) for _, t in found}) == 4


def test_unsatisfiable_form_raises_and_the_engine_keeps_working(engine):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    long = {KEY: {"regex": "(w3){30}"}}
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 31"):
        engine.llm.generate("w3 w4", SamplingParams(max_tokens=10, extra_args=long), use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="stop: expected none"):
        params = SamplingParams(stop="w3", extra_args={KEY: {"regex": "w3"}})
        engine.llm.generate("w3 w4", params, use_tqdm=False)
    check(asked(engine, FORMS.values()), FORMS)


def test_engine_without_the_processor_rejects_forms(make_engine):
    with make_engine() as made, pytest.raises(ValueError, match=r"expected logits_processors=\["):
        asked(made, FORMS.values())
