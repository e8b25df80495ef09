"""A dict that cannot be changed, and can be copied and pickled as any other."""

from __future__ import annotations

from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A read-only dict. ``types.MappingProxyType`` can be neither pickled nor copied deeply."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("This mapping is read-only; make a dict of it")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)
