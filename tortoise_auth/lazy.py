"""Libraries that are loaded on first use, because importing them takes long."""

from __future__ import annotations

import importlib


class LazyModule:
    """Stands for a module, and imports it when one of its names is used.

    Unlike ``importlib.util.LazyLoader`` it leaves ``sys.modules`` alone, where the rest of the
    process would meet the module half loaded.

    Example::

        if TYPE_CHECKING:
            import jwt
        else:
            jwt = LazyModule("jwt")

    Args:
        name: The full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # pytest and inspect ask every object for names of their own
            raise AttributeError(f"module {self._name!r} is not loaded for {name!r}")
        # The value is not kept: a test may replace it in the module itself.
        return getattr(importlib.import_module(self._name), name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._name}>"
