"""Adapter types of PEFT that cannot be read as factors, with the reasons."""

_FULL = "its update has no low rank"
_ROTATES = "it rotates the base weight, which needs the weight"
_CONVERTS = "; PEFT's save_as_lora writes an approximation as LORA"

_REFUSED = {
    "RANDLORA": f"{_FULL}, by design{_CONVERTS}",
    "HIRA": f"it multiplies the base weight by B A element by element{_CONVERTS}",
    "C3A": f"{_FULL}{_CONVERTS}",
    "FOURIERFT": f"{_FULL}{_CONVERTS}",
    "WAVEFT": f"{_FULL}{_CONVERTS}",
    "SHIRA": f"{_FULL}: it changes scattered entries{_CONVERTS}",
    "SUPERTUNING": _FULL,
    "OFT": _ROTATES,
    "BOFT": _ROTATES,
    "HRA": _ROTATES,
    "ROAD": "it rotates the outputs",
    "LILY": "its update depends on the mean over the batch",
    "POLY": "it mixes A and B apart, with a weight for each task",
    "PSOFT": f"it needs the base weight{_CONVERTS}",
}


def refusal(name: str) -> str:
    """Return why a ``peft_type`` is not supported."""
    return _REFUSED.get(name, "no kind of this name is registered (lora_ext.kinds.register_kind)")
