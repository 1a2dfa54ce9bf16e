"""Planning versus reasoning: two synthetic tasks with a solver and scores, effective ranks of
trained adapters, and a sweep over ranks.

Source: "Planning vs Reasoning: Ablations to Test Capabilities of LoRA layers" (arXiv 2412.00029).
"""

from lora_ext.adapter import effective_rank, lora_singular_values, rank_report

from .ranks import RankMonitor, SweepPoint, rank_sweep, select_modules
from .symbols import SymbolModel, collate_symbols, encode_symbols
from .tasks import HashChain, HashHop, HashInstance, solve
from .text import collate, evaluate

__all__ = [
    "HashChain", "HashHop", "HashInstance", "RankMonitor", "SweepPoint", "SymbolModel", "collate",
    "collate_symbols", "effective_rank", "encode_symbols", "evaluate", "lora_singular_values",
    "rank_report", "rank_sweep", "select_modules", "solve",
]  # fmt: skip
