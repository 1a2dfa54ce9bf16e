"""Calls in the speculative decoder visit few files, and never call back into an importing file."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from methods.toy import make_draft, make_model, prompts
from serving.test_ways import BELOW, ROOT

MOST_STAYS = 10


def test_decoder_goes_down_through_few_files() -> None:
    decoder = make_draft(make_model("llama"), "hmm").decoder()
    ids, mask = prompts(2)
    functions: dict[tuple[str, int], None] = {}  # functions in the order of their first call

    def on(frame: FrameType, event: str, _: Any) -> None:
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        inside = path.is_relative_to(ROOT / "lora_ext/methods") and not code.co_name.startswith("<")
        if event == "call" and inside:
            file = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            functions.setdefault((file, code.co_firstlineno))

    sys.setprofile(on)
    try:
        decoder.generate(ids, mask, max_new_tokens=6, eos_token_id=2, seed=3)
    finally:
        sys.setprofile(None)
    stays = [file for file, _ in itertools.groupby(file for file, _ in functions)]
    climbs = [(file, above) for file, above in itertools.pairwise(stays) if file in BELOW[above]]
    assert not climbs and 1 < len(stays) <= MOST_STAYS, stays
