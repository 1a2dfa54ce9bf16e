"""Controller that switches the adapted layers of a model on and off according to masks."""

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
    """Controller that switches groups of adapted layers of one model on and off.

    Call :meth:`step` before each optimizer step; in evaluation mode, all groups are on. With the
    default ``sync="seed"``, a layer that is off computes only its base layer, and its adapter's
    parameters get no gradient. Call ``zero_grad(set_to_none=True)``, so that the optimizer skips
    these parameters. Blocks below the lowest active layer build no graph.

    Args:
        model: Model with layers of :mod:`lora_ext.nn` or PEFT, before or after ``from_peft``.
        config: Settings of the schedule, of the groups and of inactive layers.
        total_steps: T, number of optimizer steps of the whole training.
        adapter: Name of the adapter whose layers are switched.

    Attributes:
        schedule: :class:`CopraSchedule` that draws the masks.
        layers: :class:`lora_ext.nn.LayerGroups` that the masks are applied to.

    Raises:
        ValueError: If no layer has the adapter, or the adapter is merged into a layer; if
            ``group_by`` is unknown, or an int that does not divide the number of layers; if the
            adapter scales the output of a layer and ``sync`` is "tensor"; or if
            :class:`CopraSchedule` raises it.
        TypeError: If ``total_steps`` is not an int.

    Source: arXiv 2410.22911.
    """

    def __init__(
        self, model: nn.Module, config: CopraConfig, total_steps: int, adapter: str = "default"
    ):
        found = adapted_layers(model, adapter)
        where = "CopraController"
        groups: Any = config.group_by
        given = f"{groups!r} for the modules {', '.join(found)}"
        whole = isinstance(groups, int) and not isinstance(groups, bool)
        known = groups >= 1 if whole else groups in ("block", "module")
        require(known, where, "group_by", "'block', 'module' or a number above 0", given)
        divides = not whole or len(found) % groups == 0
        require(divides, where, "group_by", f"a number that divides {len(found)}", given)
        merged = f"{adapter!r} merged, which cannot be skipped; unmerge it first"
        for name, layer in found.items():
            apart = adapter not in layer.merged_adapters  # pyright: ignore[reportOperatorIssue]
            require(apart, where, name, "an adapter not merged into the base weight", merged)
        count = len(LayerGroups(model, adapter, groups))
        self.config = config
        self.adapter = adapter
        self.schedule = CopraSchedule(config, count, total_steps)
        self.layers: LayerGroups = _KINDS[config.sync](model, adapter, groups)
        self._next = 0
        self._removed = False

    @property
    def groups(self) -> list[list[str]]:
        """Full names of the layers of each group, in the order of ``model.named_modules()``."""
        return [list(names) for names in self.layers.names]

    @property
    def mask(self) -> Tensor:
        """Mask ``(num_groups,)`` bool, True for the groups that are on in the current mode
        (training or evaluation) of the layers."""
        return self.layers.mask

    def step(self, step: int | None = None) -> Tensor:
        """Set the training mask of one optimizer step; in evaluation mode, all groups are on.

        Args:
            step: Index of the optimizer step, from 0. The default is 0 in the first call, and
                afterwards the index of the previous call plus 1.

        Returns:
            Mask ``(num_groups,)`` bool, True for the groups that are on.

        Raises:
            ValueError: If the step is negative, or the adapter is merged into a layer that would be
                switched off.
            TypeError: If the step is not an int.
        """
        step = self._next if step is None else step
        mask = self.schedule.mask(step)
        self._set(mask, training_only=True)
        self._next = step + 1
        return mask

    def set_mask(self, mask: Mask) -> None:
        """Switch groups on and off in training and evaluation, until the mask is set again.

        Args:
            mask: ``(num_groups,)`` bool, True for the groups to switch on.

        Raises:
            ValueError: If the mask is not ``(num_groups,)`` bool, or the adapter is merged into
                a layer that would be switched off. No layer is changed in this case.
        """
        self._set(mask)

    def activate_all(self) -> None:
        """Switch all groups on, in training and evaluation."""
        self._set([True] * len(self.layers))

    def coalition(self, mask: Mask) -> AbstractContextManager[None]:
        """Return a context manager that applies ``mask`` as :meth:`set_mask` does, and restores
        every layer at the end of the ``with`` block."""
        self._check_in_use()
        return self.layers.masked(mask)

    def remove(self) -> None:
        """Switch all layers on and remove all hooks. After that, setting a mask raises
        RuntimeError."""
        if not self._removed:
            self.activate_all()
            remove_gates(self.layers)
            if isinstance(self.layers, TouchedGroups):
                self.layers.remove()
            self._removed = True

    def state_dict(self) -> dict[str, Any]:
        """Return a dictionary with the index of the next step and the settings that determine all
        masks, as numbers and strings."""
        return {"step": self._next, **self._mask_settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`, and set the mask of its last step.

        Raises:
            ValueError: If the state's keys or settings, such as ``total_steps``, differ from the
                controller's. The controller is then unchanged.
        """
        fixed, where = self._mask_settings(), "CopraController.load_state_dict"
        expected = f"the keys {['step', *fixed]}"
        require(state.keys() == {"step", *fixed}, where, "state", expected, list(state))
        for name, value in fixed.items():
            require(state[name] == value, where, name, repr(value), repr(state[name]))
        step = integer(where, "step", state["step"], 0)
        if step:
            self.step(step - 1)
        self._next = step

    def _mask_settings(self) -> dict[str, Any]:
        names, ramp = ("group_by", "seed", "min_active", "p0", "p1", "ramp_ratio"), self.config.ramp
        return {
            "total_steps": self.schedule.total_steps,
            "num_groups": self.schedule.num_groups,
            **{name: getattr(self.config, name) for name in names},
            "ramp": getattr(ramp, "__qualname__", type(ramp).__name__) if callable(ramp) else ramp,
        }

    def _set(self, mask: Mask, training_only: bool = False) -> None:
        self._check_in_use()
        # A controller with another `sync` may have left gates, or layers that are switched off.
        if isinstance(self.layers, GatedGroups):
            LayerGroups.set_mask(self.layers, [True] * len(self.layers))
        else:
            remove_gates(self.layers)
        self.layers.set_mask(mask, training_only)

    def _check_in_use(self) -> None:
        if self._removed:
            raise RuntimeError("CopraController: the controller was removed; create a new one")
