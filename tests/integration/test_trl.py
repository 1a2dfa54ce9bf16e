"""from_peft in TRL's trainers, compared with PEFT in the same trainers."""

import copy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny import CONFIGS, VOCAB, make_model, make_peft, word_tokenizer
from torch import Tensor

import lora_ext
from lora_ext.interop.peft import report, to_peft

trl = pytest.importorskip(
    "trl", reason="trl is not installed: it is in the extra `test` (Python 3.11)"
)
datasets = pytest.importorskip("datasets", reason="datasets, a dependency of trl, is not installed")

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
PROMPTS = ["w3 w4 w5", "w9 w8", "w20 w21 w22 w23", "w40"]
BETTER = [" w50 w51", " w52 w53 w54", " w55", " w60 w61"]
WORSE = [" w70", " w71 w72", " w73 w74", " w75"]
TEXTS = [p + a for answers in (BETTER, WORSE) for p, a in zip(PROMPTS, answers, strict=True)]
NAMES = ["red", "green"] * 4


@pytest.fixture(autouse=True)
def no_folder_is_taken_for_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the parent of tests/vllm from the path: TRL would take that folder for the package."""
    tests = str(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != tests])


def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(WORDS)}
    return word_tokenizer(words, None, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [sum(WORDS.index(word) for word in text.split()) / 100 for text in completions]


DATA: dict[str, dict[str, Any]] = {
    "SFT": {"text": TEXTS},
    "DPO": {"prompt": PROMPTS, "chosen": BETTER, "rejected": WORSE},
    "KTO": {"prompt": PROMPTS * 2, "completion": BETTER + WORSE, "label": [True] * 4 + [False] * 4},
    "Reward": {"chosen": TEXTS[:4], "rejected": TEXTS[4:]},
    "GRPO": {"prompt": PROMPTS},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"num_generations": 4, "max_completion_length": 4, "beta": 0.1},
}


def train(
    kind: str,
    model: Any,
    folder: Path,
    *,
    columns: Mapping[str, Any] | None = None,
    trainer: Any = None,
    saves: bool = False,
    resume: bool = False,
    given: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return the trainer after four steps on the CPU without autocast.

    Other settings are TRL's defaults. ``given`` are arguments of the trainer.
    """
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_strategy": "steps" if saves else "no",
            "save_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            **OPTIONS.get(kind, {}),
            **options,
        },
    )
    made = (trainer or getattr(trl, f"{kind}Trainer"))(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(DATA[kind] if columns is None else columns),
        processing_class=tokenizer(),
        **{**({"reward_funcs": rewards} if kind == "GRPO" else {}), **(given or {})},
    )
    made.train(resume_from_checkpoint=resume)
    return made


def one_adapter(dropout: float = 0.0) -> Any:
    fields = {**CONFIGS["llama"]["green"], "lora_dropout": dropout}
    return make_peft(make_model("llama"), {"default": fields}).train()


def classifier_with_a_head() -> Any:
    """Return a classifier whose new head PEFT trains together with the adapter."""
    config: Any = make_model("llama").config
    config.num_labels = 1
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    fields = {**CONFIGS["llama"]["red"], "task_type": "SEQ_CLS"}
    return make_peft(model, {"default": fields}).train()


def weights_of(model: Any, part: str = ".default.") -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if part in k}


def assert_learned(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> None:
    """Check that adapters learned the same up to a few float64 roundings (1e-14 measured)."""
    assert got.keys() == expected.keys() <= start.keys() and got
    for key, weight in expected.items():
        way = (weight - start[key]).norm()
        assert way > 0, key
        assert (got[key] - weight).norm() <= 1e-10 * way, key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "Reward", "GRPO"])
def test_trained_adapters_equal_those_of_peft(kind: str, tmp_path: Path) -> None:
    theirs = (classifier_with_a_head() if kind == "Reward" else one_adapter()).double()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    start = weights_of(ours)
    logs = [
        train(kind, model, tmp_path / side).state.log_history
        for side, model in (("theirs", theirs), ("ours", ours))
    ]
    assert_learned(weights_of(ours), weights_of(theirs), start)
    assert report(ours).taken and not report(ours).left
    for got, expected in zip(*reversed(logs), strict=True):
        for key in expected.keys() & {"loss", "rewards/margins", "logps/chosen", "kl", "reward"}:
            assert got[key] == pytest.approx(expected[key], rel=1e-6), key
    if kind in ("DPO", "KTO", "GRPO"):  # These trainers use a reference model.
        reference = weights_of(ours, ".ref.")
        assert {k.replace(".ref.", ".default.") for k in reference} == start.keys()
        for key, weight in reference.items():
            assert torch.equal(weight, start[key.replace(".ref.", ".default.")])


@pytest.mark.parametrize("first", ["chunked_loss", "the trainer"])
def test_chunked_loss_warns_once_that_sft_computes_its_own(first: str, tmp_path: Path) -> None:
    class Late(trl.SFTTrainer):
        def create_optimizer(self, *args: Any) -> Any:
            lora_ext.chunked_loss(self.model)
            return super().create_optimizer(*args)

    model = one_adapter()
    if first == "chunked_loss":
        lora_ext.chunked_loss(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train("SFT", model, tmp_path, trainer=None if first == "chunked_loss" else Late)
    assert ["TRL's trainers" in str(w.message) for w in caught].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO", "by name"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    by_name = kind == "by name"
    kind, how = ("SFT", BY_NAME) if by_name else (kind, {})
    unbroken = two_adapters(0.3) if by_name else lora_ext.from_peft(one_adapter(0.3))
    broken, resumed = copy.deepcopy(unbroken), copy.deepcopy(unbroken)
    train(kind, unbroken, tmp_path / "a", **how)
    train(kind, broken, tmp_path / "b", **how, saves=True, max_steps=2)
    train(kind, resumed, tmp_path / "b", **how, resume=True)
    expected = weights_of(unbroken, "lora_")
    for key, weight in weights_of(resumed, "lora_").items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.slow
def test_adapter_made_by_the_trainer_has_the_base_as_reference(tmp_path: Path) -> None:
    """Check DPO with a ``peft_config``: DPO adds the adapter, and disables it in the reference."""
    found = []
    for take in (lambda model: model, lora_ext.from_peft):

        class Taken(trl.DPOTrainer):
            def create_optimizer(self, *args: Any) -> Any:
                take(self.model)  # noqa: B023  # used in this iteration of the loop
                return super().create_optimizer(*args)

        config = peft.LoraConfig(r=4, target_modules="all-linear")
        model = make_model("llama").double().train()
        trainer = train(
            "DPO", model, tmp_path, trainer=Taken, given={"peft_config": config}, logging_steps=4
        )
        found.append((weights_of(trainer.model), trainer.state.log_history[0]))
    (expected, log), (got, ours) = found
    assert report(trainer.model).taken
    assert_learned(got, expected, dict.fromkeys(expected, torch.zeros(())))
    assert ours["rewards/margins"] == pytest.approx(log["rewards/margins"], rel=1e-6) != 0


@pytest.mark.slow
@pytest.mark.parametrize("batching", [False, True], ids=["generate", "continuous batching"])
def test_completions_use_the_adapter(batching: bool, tmp_path: Path) -> None:
    said: dict[str, list[str]] = {"theirs": [], "ours": [], "base": []}
    for side, texts in said.items():
        model = one_adapter()
        if side != "theirs":
            lora_ext.from_peft(model)
        if side == "base":
            model.base_model.disable_adapter_layers()

        def heard(completions: list[str], texts: list[str] = texts, **_: Any) -> list[float]:
            texts.extend(completions)
            return rewards(completions)

        train(
            "GRPO",
            model,
            tmp_path,
            given={"reward_funcs": heard},
            max_steps=1,
            beta=0.0,
            use_transformers_continuous_batching=batching,
            transformers_continuous_batching_config={"num_blocks": 16, "max_batch_tokens": 64},
        )
    assert said["ours"] == said["theirs"] != said["base"]


class ByName:
    """Collator that repeats the column ``adapter`` ``times`` times and adds it as
    ``adapter_names``."""

    def __init__(self, collator: Any, times: int = 1):
        self.collator, self.times = collator, times

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        names = [row["adapter"] for row in rows] * self.times
        rest = [{k: v for k, v in row.items() if k != "adapter"} for row in rows]
        return {**self.collator(rest), "adapter_names": names}


class NamedTrainer(trl.SFTTrainer):
    """Trainer that unfreezes all adapters, because PEFT and a resumed Trainer freeze inactive
    ones."""

    def create_optimizer(self, *args: Any) -> Any:
        self.model.set_requires_grad(NAMES[:2])
        return super().create_optimizer(*args)


BY_NAME: dict[str, Any] = {
    "columns": {"text": TEXTS, "adapter": NAMES},
    "trainer": NamedTrainer,
    "given": {"data_collator": ByName(trl.trainer.sft_trainer.DataCollatorForLanguageModeling(0))},
    "remove_unused_columns": False,
}


def two_adapters(dropout: float = 0.0) -> Any:
    fields = {n: {**CONFIGS["llama"][n], "lora_dropout": dropout} for n in NAMES[:2]}
    return lora_ext.from_peft(make_peft(make_model("llama"), fields).train())


@pytest.mark.slow
def test_adapters_trained_in_one_batch_equal_separate_runs_of_peft(tmp_path: Path) -> None:
    """Check one batch with rows of two adapters. Its loss is the mean of twice as many tokens, so
    the learning rate is doubled."""
    texts = [f"w{i} w{i + 20} w{i + 40} w{i + 60}" for i in range(3, 11)]
    options: Any = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "max_steps": 2,
    }
    ours = two_adapters().double()
    start = weights_of(ours, "lora_")
    mixed = {**BY_NAME, **options, "columns": {"text": texts, "adapter": NAMES}}
    train("SFT", ours, tmp_path / "ours", **mixed, learning_rate=0.2)
    for name in NAMES[:2]:
        alone: Any = to_peft(two_adapters().double())
        alone.set_adapter(name)
        own = {"text": [text for text, n in zip(texts, NAMES, strict=True) if n == name]}
        options |= {"per_device_train_batch_size": 2, "learning_rate": 0.1}
        train("SFT", alone, tmp_path / name, columns=own, **options)
        part = f".{name}."
        assert_learned(weights_of(ours, part), weights_of(alone, part), start)


@pytest.mark.slow
def test_names_beside_a_reference_adapter_raise(tmp_path: Path) -> None:
    fields = {"default": CONFIGS["llama"]["green"], "red": CONFIGS["llama"]["red"]}
    names = ["default", "red"]
    pairs = trl.trainer.dpo_trainer.DataCollatorForPreference(0)  # chosen rows, then rejected ones
    by_name = {
        "columns": {**DATA["DPO"], "adapter": names * 2},
        "remove_unused_columns": False,
    }

    def model() -> Any:
        ours: Any = lora_ext.from_peft(make_peft(make_model("llama"), fields).train())
        ours.set_requires_grad(names)
        return ours

    given = {"data_collator": ByName(pairs, times=2)}
    with pytest.raises(ValueError, match=r"'ref' is active.*to the trainer as ref_model"):
        train("DPO", model(), tmp_path, given=given, **by_name)
    ours, start = model(), weights_of(model(), "lora_")
    train("DPO", ours, tmp_path, given={**given, "ref_model": make_model("llama")}, **by_name)
    for key, weight in weights_of(ours, "lora_").items():
        assert not torch.equal(weight, start[key]), key
