"""CopRA callback for the Trainer of transformers."""

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
    """Callback that sets the mask of every step:
    ``Trainer(..., callbacks=[CopraCallback(controller)])``.

    The mask is that of ``state.global_step``. The micro-batches of an accumulated step therefore
    share it, a resumed run has the masks of an uninterrupted one, and all processes have the same.
    After the training all layers are on.

    Args:
        controller: Controller made with the number of optimizer steps that the Trainer will take.

    Raises:
        TypeError: If ``controller`` is not a :class:`CopraController`.

    Warns:
        UserWarning: If the Trainer takes another number of steps, since the schedule would then end
            early or never.

    Source: arXiv 2410.22911.
    """

    def __init__(self, controller: CopraController):
        instance("CopraCallback", "controller", controller, CopraController)
        self.controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare the Trainer's number of steps with that of the schedule."""
        own = self.controller.schedule.total_steps
        if state.max_steps != own:
            expected = f"one made with total_steps={state.max_steps}, the steps of this Trainer"
            message = f"CopraCallback: controller: expected {expected}, found {own}"
            warnings.warn(message, stacklevel=2)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the mask of the optimizer step that begins."""
        self.controller.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch all layers on after the last step."""
        self.controller.activate_all()
