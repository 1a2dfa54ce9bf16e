"""Where the checks of :mod:`lora_ext._checks` were; what still imports them from here is served."""

from lora_ext._checks import (
    FLOATS,
    require,
    require_dim,
    require_dtype,
    require_flags,
    require_shape,
)

__all__ = ["FLOATS", "require", "require_dim", "require_dtype", "require_flags", "require_shape"]
