"""The Python of the README, and of the notes that start a reader off, runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tiny import make_model, make_peft

ROOT = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in ("README.md", "docs/mtpc.md")
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    )
]


def _save_base_model(path: Path) -> None:
    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "who", "are", "you", "?"])}
    words |= {f"w{i}": i for i in range(len(words), 97)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    make_model("llama").save_pretrained(path)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_the_readme_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _save_base_model(tmp_path / "base-model")
    configs = {name: {"r": 4, "target_modules": "all-linear"} for name in ("pirate", "haiku")}
    make_peft(make_model("llama"), configs).save_pretrained(tmp_path / "adapters")
    scope: dict[str, object] = {}
    exec(compile(block, "<block>", "exec"), scope)
    answers = scope.get("answers")
    if isinstance(answers, torch.Tensor):
        assert len({tuple(row.tolist()) for row in answers}) == 3  # each row had its own adapter
