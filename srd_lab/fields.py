"""The values of a dataclass's fields, held against their annotations: a wrong one is refused before it does anything."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from srd_lab.errors import BadValue

_NUMBERS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}


def checked(cls: Any) -> Any:
    """The class ``cls``, which, as a dataclass, refuses (BadValue) to be made with what its annotations do not allow.

    Looked at are numbers, truth values, text, ``Literal``, None, tuples of these, and either of several; a field of another
    kind is not. A float may be given as an int; neither infinite nor NaN.

    Example
    -------
    >>> from dataclasses import dataclass
    >>> @checked
    ... @dataclass(frozen=True)
    ... class Noise:
    ...     size: float = 0.1
    >>> Noise(size="much")
    Traceback (most recent call last):
    ...
    srd_lab.errors.BadValue: Noise: size must be a finite number, got 'much'
    """
    if is_dataclass(cls):
        _check_before(cls)
    return cls


def _check_before(cls: Any) -> None:
    init: Callable[..., None] = cls.__init__
    signature = inspect.signature(init)

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            given = signature.bind(self, *args, **kwargs).arguments
            check_fields(cls, given, cls.__name__)
        init(self, *args, **kwargs)

    cls.__init__ = __init__


def check_fields(cls: type, values: Mapping[str, Any], what: str) -> None:
    """Raise BadValue for the first of ``values``, by the names of the fields of ``cls``, that its annotation does not allow.

    what : whose values they are, for the message.
    """
    for name, hint in _hints(cls).items():
        if name in values and not _fits(values[name], hint):
            got = " ".join(repr(values[name]).split())
            raise BadValue(f"{what}: {name} must be {_said(hint)}, got {got:.60}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        hints = get_type_hints(cls)
    except NameError:  # imported for type checkers only
        return {}
    return {field.name: hints[field.name] for field in fields(cls) if _is_known(hints[field.name])}


def _is_known(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return all(map(_is_known, get_args(hint)))
    if get_origin(hint) is tuple:
        return get_args(hint)[1:] == (...,) and _is_known(get_args(hint)[0])
    return hint in _NUMBERS or hint is type(None) or get_origin(hint) is Literal


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint)


def _said(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType, Literal):
        *most, last = map(repr if get_origin(hint) is Literal else _said, get_args(hint))
        return f"{', '.join(most)} or {last}" if most else str(last)
    if get_origin(hint) is tuple:
        return f"a tuple of {_said(get_args(hint)[0])}"
    return "None" if hint is type(None) else _NUMBERS[hint]
