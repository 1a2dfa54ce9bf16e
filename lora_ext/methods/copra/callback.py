"""CopRA under transformers' Trainer."""

from __future__ import annotations

import warnings
from typing import Any

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "CopraCallback: transformers is not installed; run `pip install transformers`"
    ) from error

from lora_ext._checks import instance

from .controller import CopraController


class CopraCallback(TrainerCallback):
    """Sets the mask of every step: ``Trainer(..., callbacks=[CopraCallback(controller)])``.

    The mask is that of ``state.global_step``, so the micro-batches of an accumulated step share
    it, a resumed run has the masks of an unbroken one, and all processes have the same. After the
    training all layers are on. A warning tells where the Trainer takes another number of steps than
    the controller was made for: its schedule would end early, or never.

    Args:
        controller: made with the number of optimizer steps that the Trainer will take.

    Raises:
        TypeError: something else than a :class:`CopraController`.

    Source: arXiv 2410.22911.
    """

    def __init__(self, controller: CopraController):
        instance("CopraCallback", "controller", controller, CopraController)
        self.controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare the Trainer's steps with those of the schedule."""
        own = self.controller.schedule.total_steps
        if state.max_steps != own:
            expected = f"one made with total_steps={state.max_steps}, the steps of this Trainer"
            told = f"CopraCallback: controller: expected {expected}, found {own}"
            warnings.warn(told, stacklevel=2)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the mask of the optimizer step whose first micro-batch comes next."""
        self.controller.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch all layers on once the last step is done."""
        self.controller.activate_all()
