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
    """Callback that sets the mask of active layers before every optimizer step, for ``Trainer(...,
    callbacks=[CopraCallback(controller)])``.

    For a given schedule, the mask depends only on ``state.global_step``. The mask is therefore the
    same for all micro-batches of an accumulated step, in all processes, and in a resumed run. After
    training, all layers are on.

    Args:
        controller: Controller created with the number of optimizer steps that the Trainer takes.

    Raises:
        TypeError: If ``controller`` is not a :class:`CopraController`.

    Warns:
        UserWarning: If the controller was created for a different number of steps, since the
            schedule would then end too early or too late.

    Source: arXiv 2410.22911.
    """

    def __init__(self, controller: CopraController):
        instance("CopraCallback", "controller", controller, CopraController)
        self.controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn if the Trainer's number of steps differs from that of the schedule."""
        own = self.controller.schedule.total_steps
        if state.max_steps != own:
            expected = f"total_steps={state.max_steps}, the number of steps of this Trainer"
            message = f"CopraCallback: controller: expected {expected}, found {own}"
            warnings.warn(message, stacklevel=2)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the mask of the optimizer step that is about to begin."""
        self.controller.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch all layers on after the last step."""
        self.controller.activate_all()
