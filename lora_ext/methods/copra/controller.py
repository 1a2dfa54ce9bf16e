"""The controller: puts the masks of a schedule, or of a caller, onto the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import integer, require
from lora_ext.layers import LayerGroups, Mask, adapted_layers

from ._sync import GatedGroups, TouchedGroups, remove_gates
from .config import CopraConfig
from .schedule import CopraSchedule

_KINDS = {"seed": LayerGroups, "touch": TouchedGroups, "tensor": GatedGroups}


class CopraController:
    """Switches the groups of adapted layers of one model.

    Call :meth:`step` before each optimizer step; the masks of evaluation are all on. A layer that
    is off computes its base layer and nothing more, its parameters get no gradient, and an
    optimizer leaves them and their state alone if gradients are set to None, as
    ``zero_grad(set_to_none=True)`` does. Blocks below the lowest active layer build no graph.

    Args:
        model: its layers are :mod:`lora_ext.nn`'s or PEFT's, before or after ``from_peft``.
        config: of schedule, groups and what a layer that is off costs.
        total_steps: T, optimizer steps of the whole training.
        adapter: whose layers are switched.

    Attributes:
        schedule: the :class:`CopraSchedule`.
        layers: the :class:`lora_ext.nn.LayerGroups`.

    Raises:
        TypeError: ``total_steps`` that is no int. ValueError: no layer has the adapter; one in
            which it is merged, naming it; a ``group_by`` that is unknown, or a number that does
            not divide that of the layers, listing them; DoRA with ``sync="tensor"``; what
            :class:`CopraSchedule` refuses.

    Source: arXiv 2410.22911.
    """

    def __init__(
        self, model: nn.Module, config: CopraConfig, total_steps: int, adapter: str = "default"
    ):
        found = adapted_layers(model, adapter)
        where = "CopraController"
        groups: Any = config.group_by
        _check_groups(groups, list(found))
        merged = f"{adapter!r} merged into it: it cannot be skipped; unmerge it first"
        for name, layer in found.items():
            apart = adapter not in layer.merged_adapters  # pyright: ignore[reportOperatorIssue]
            require(apart, where, name, "an adapter apart from the base weight", merged)
        count = len(LayerGroups(model, adapter, groups))
        self.config = config
        self.adapter = adapter
        self.schedule = CopraSchedule(config, count, total_steps)
        self.layers: LayerGroups = _KINDS[config.sync](model, adapter, groups)
        self._next = 0
        self._removed = False

    @property
    def groups(self) -> list[list[str]]:
        """The names of the layers of each group, in the model's order and with its names."""
        return [list(names) for names in self.layers.names]

    @property
    def mask(self) -> Tensor:
        """``(num_groups,)`` bool: the groups that are on, in the mode that the layers are in."""
        return self.layers.mask

    def step(self, step: int | None = None) -> Tensor:
        """Let the groups of one optimizer step train; in evaluation all are on.

        Args:
            step: counted from 0; default is the one after the last, at first 0.

        Returns:
            ``(num_groups,)`` bool, those that train.

        Raises:
            TypeError, ValueError: a step that is no int, or below 0; a layer that would be off and
                is merged, naming it.
        """
        step = self._next if step is None else step
        mask = self.schedule.mask(step)
        self._set(mask, training_only=True)
        self._next = step + 1
        return mask

    def set_mask(self, mask: Mask) -> None:
        """Switch groups on and off in training and evaluation, until the next call or step.

        Args:
            mask: ``(num_groups,)`` bool, True for the groups that take part.

        Raises:
            ValueError: a mask of another length or kind, or a layer that would be off and is
                merged, naming it. The layers are as they were then.
        """
        self._set(mask)

    def activate_all(self) -> None:
        """Switch all groups on, in training and evaluation; ends what :meth:`set_mask` set."""
        self._set([True] * len(self.layers))

    def coalition(self, mask: Mask) -> AbstractContextManager[None]:
        """A ``with`` block in which :meth:`set_mask` of ``mask`` holds, in both modes; after it,
        also after an exception, every layer is as it was before."""
        self._check_in_use()
        return self.layers.masked(mask)

    def remove(self) -> None:
        """Give the layers back: all are on, and no hook is left. The controller is done then."""
        if not self._removed:
            self.activate_all()
            remove_gates(self.layers)
            if isinstance(self.layers, TouchedGroups):
                self.layers.remove()
            self._removed = True

    def state_dict(self) -> dict[str, Any]:
        """The step that comes next, and what masks follow from; numbers and names alone."""
        return {"step": self._next, **self._fixed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called; the mask of its last step holds again.

        Raises:
            ValueError: a state with other keys, or of another schedule (another total of steps, for
                one), naming what differs. The controller is then as it was.
        """
        fixed, where = self._fixed(), "CopraController.load_state_dict"
        expected = f"the keys {['step', *fixed]}"
        require(state.keys() == {"step", *fixed}, where, "state", expected, list(state))
        for name, value in fixed.items():
            require(state[name] == value, where, name, repr(value), repr(state[name]))
        step = integer(where, "step", state["step"], 0)
        if step:
            self.step(step - 1)
        self._next = step

    def _fixed(self) -> dict[str, Any]:
        """What all masks follow from, beside the step."""
        names, ramp = ("group_by", "seed", "min_active", "p0", "p1", "ramp_ratio"), self.config.ramp
        return {
            "total_steps": self.schedule.total_steps,
            "num_groups": self.schedule.num_groups,
            **{name: getattr(self.config, name) for name in names},
            "ramp": getattr(ramp, "__qualname__", type(ramp).__name__) if callable(ramp) else ramp,
        }

    def _set(self, mask: Mask, training_only: bool = False) -> None:
        self._check_in_use()
        # What a controller of another kind has left: flags, or gates.
        if isinstance(self.layers, GatedGroups):
            LayerGroups.set_mask(self.layers, [True] * len(self.layers))
        else:
            remove_gates(self.layers)
        self.layers.set_mask(mask, training_only)

    def _check_in_use(self) -> None:
        if self._removed:
            raise RuntimeError("CopraController: expected one that is in use, found a removed one")


def _check_groups(group_by: Any, names: list[str]) -> None:
    listed = f"of these modules: {', '.join(names)}"
    whole = isinstance(group_by, int) and not isinstance(group_by, bool)
    fits = group_by >= 1 if whole else group_by in ("block", "module")
    found = f"{group_by!r} {listed}"
    require(fits, "CopraController", "group_by", "'block', 'module' or a number above 0", found)
    divides = not whole or len(names) % group_by == 0
    expected = f"a number that divides {len(names)}"
    require(divides, "CopraController", "group_by", expected, found)
