"""How Tortoise registers our models: under one app label, and never by an import alone."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from tortoise.connection import ConnectionHandler
from tortoise.context import get_current_context
from tortoise.models import MetaInfo, Model

from tortoise_auth.exceptions import ConfigurationError

_NOT_REGISTERED = "<not registered>"
"""The label of our models until they are registered. Tortoise leaves models of another label alone."""

_labels: WeakKeyDictionary[ConnectionHandler, str] = WeakKeyDictionary()
"""The app that has our models, for each set of connections: every start of Tortoise has its own."""

_claimable: set[MetaInfo] = set()
"""What Tortoise has just found in our module, and is about to label."""


class OwnModels:
    """The models of the library, as ``tortoise_auth.models.__models__``.

    Tortoise iterates over that attribute each time a configuration names our module. Only then can
    an app have the models. A module of the host that imports one of them does not get it: its
    migrations would create our tables, and drop them when the import is gone.
    """

    def __init__(self, *models: type[Model]) -> None:
        self._models = models
        for model in models:
            model._meta.__class__ = OwnMeta

    def __iter__(self) -> Iterator[type[Model]]:
        _claimable.update(model._meta for model in self._models)
        return iter(self._models)


class OwnMeta(MetaInfo):
    """What Tortoise keeps about a model of ours, with the two assignments of a registration watched."""

    __slots__ = ()

    @property
    def app(self) -> str | None:
        """The label of the app that has our models now; ``None`` lets Tortoise set it."""
        if self in _claimable:
            return None
        handler = _current_handler()
        return _NOT_REGISTERED if handler is None else _labels.get(handler, _NOT_REGISTERED)

    @app.setter
    def app(self, label: str | None) -> None:
        _claimable.discard(self)
        handler = _current_handler()
        if handler is None or label is None:
            return
        first = _labels.setdefault(handler, label)
        if first != label:
            # The next start, with a mended configuration, may have the same connections.
            del _labels[handler]
            _claimable.clear()
            raise ConfigurationError(_registered_twice(first, label))

    @property
    def default_connection(self) -> str | None:
        """The alias of the connection on which our tables are."""
        alias: str | None = _default_connection.__get__(self)
        return alias

    @default_connection.setter
    def default_connection(self, alias: str | None) -> None:
        if alias is not None:
            prepare(alias)
        _default_connection.__set__(self, alias)


_default_connection = MetaInfo.__dict__["default_connection"]


def prepare(alias: str) -> None:
    """Prepare a connection that will have our tables; it is not open yet."""


def _current_handler() -> ConnectionHandler | None:
    context = get_current_context()
    return None if context is None else context.connections


def _registered_twice(first: str, second: str) -> str:
    return (
        f"The tables of tortoise_auth are registered twice: the apps {first!r} and {second!r} both "
        'name "tortoise_auth.models". Nothing was written. Keep one of the two. For tables in your '
        "own migrations, delete the entry that tortoise_auth.app_config() made. For the migrations "
        'that come with the library, keep that entry, and delete the string "tortoise_auth.models" '
        'from "models" of the other app.'
    )
