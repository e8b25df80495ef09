"""How a handler may really be called, through the wrappers around it.

`inspect.signature` shows the innermost function of a chain of `functools.wraps`. The outermost one
is what is called. A wrapper that takes ``*args`` or ``**kwargs`` passes on what it is given, and may
add arguments of its own: dependency injection does that. One that takes certain parameters takes
those and no others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from types import FunctionType, MethodType
from typing import Any

_ANYTHING = Signature(
    [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]
)


def signature_of(handler: Callable[..., Any]) -> tuple[Signature, frozenset[str]]:
    """Return how *handler* may be called, and which parameters a wrapper of it may supply.

    Raises:
        ValueError: It cannot be inspected.
        TypeError: It is not callable.
    """
    kind = type(
        handler
    )  # not isinstance: a transparent proxy, as of wrapt, looks like its function
    if isinstance(handler, functools.partial) and issubclass(kind, functools.partial):
        signature, supplied = signature_of(handler.func)
        stand_in = functools.partial(_with(signature), *handler.args, **handler.keywords)
        return inspect.signature(stand_in), supplied
    if isinstance(handler, MethodType) and kind is MethodType:
        signature, supplied = signature_of(handler.__func__)
        return inspect.signature(MethodType(_with(signature), object())), supplied
    shown, inner = (getattr(handler, name, None) for name in ("__signature__", "__wrapped__"))
    if isinstance(shown, Signature):
        return _through(_own(handler), shown, frozenset())
    if callable(inner):
        return _through(_own(handler), *signature_of(inner))
    call = getattr(kind, "__call__", None)  # noqa: B004 - what it is, not whether it is there
    if isinstance(call, FunctionType):
        return signature_of(MethodType(call, handler))
    return inspect.signature(handler), frozenset()


def _own(handler: Callable[..., Any]) -> Signature:
    """Return the signature of what is called itself; of what is not Python, that it takes anything."""
    if type(handler) is FunctionType:
        copy = FunctionType(handler.__code__, {}, None, handler.__defaults__, handler.__closure__)
        copy.__kwdefaults__ = handler.__kwdefaults__
        return inspect.signature(copy)
    call = getattr(type(handler), "__call__", None)  # noqa: B004 - as above
    if isinstance(call, FunctionType):
        return signature_of(MethodType(call, handler))[0]
    return _ANYTHING


def _through(
    own: Signature, inner: Signature, supplied: frozenset[str]
) -> tuple[Signature, frozenset[str]]:
    """Return the signature of a wrapper with its ``*args`` and ``**kwargs`` spelt out.

    Args:
        own: The signature of the wrapper.
        inner: That of what is inside it.
        supplied: The parameters of what is inside that another wrapper may supply.
    """
    kinds = [each.kind for each in own.parameters.values()]
    any_positional, any_keyword = (
        Parameter.VAR_POSITIONAL in kinds,
        Parameter.VAR_KEYWORD in kinds,
    )
    named = {each.name: each for each in own.parameters.values() if not _is_variable(each)}
    passed_on: dict[str, Parameter] = {}
    for each in inner.parameters.values():
        if each.name in named:
            continue
        if _is_positional(each) and any_positional:
            passed_on[each.name] = each
        elif each.kind is Parameter.VAR_POSITIONAL and any_positional:
            passed_on[each.name] = each
        elif each.kind is Parameter.VAR_KEYWORD and any_keyword:
            passed_on[each.name] = each
        elif not _is_variable(each) and each.kind is not Parameter.POSITIONAL_ONLY and any_keyword:
            passed_on[each.name] = each.replace(kind=Parameter.KEYWORD_ONLY)
    supplied = frozenset(name for name in passed_on if _is_required(passed_on[name])) | (
        supplied & passed_on.keys()
    )
    return _in_order([*named.values(), *passed_on.values()]), supplied


def _in_order(parameters: list[Parameter]) -> Signature:
    """Return a signature of parameters that come from several functions.

    After one with a default Python allows no positional one without: such a default is dropped,
    because the others can only be given by position if that one is, too.
    """
    ordered = sorted(parameters, key=lambda each: each.kind)
    last = max((n for n, each in enumerate(ordered) if _is_needed(each)), default=-1)
    return Signature(
        [
            each.replace(default=Parameter.empty) if n < last and _is_positional(each) else each
            for n, each in enumerate(ordered)
        ]
    )


def _is_needed(parameter: Parameter) -> bool:
    return _is_positional(parameter) and _is_required(parameter)


def _is_positional(parameter: Parameter) -> bool:
    return parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def _is_variable(parameter: Parameter) -> bool:
    return parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and not _is_variable(parameter)


def _with(signature: Signature) -> Callable[..., None]:
    """Return a function that shows *signature*, for `inspect` to bind arguments to."""

    def stand_in(*args: object, **kwargs: object) -> None: ...

    vars(stand_in)["__signature__"] = signature
    return stand_in
