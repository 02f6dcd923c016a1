"""Parts of one's own by name: networks, data sets, methods and metrics that the package does not know.

``package.module:name`` and ``path/file.py:name`` stand for what a module calls so, with options behind a ``?``, joined by
``&``: ``mine.py:Net?width=64&bias=False``. The code that is named runs with the user's rights.

Example
-------
>>> split_options("smoothgrad?samples=50&sigma=0.1")
('smoothgrad', {'samples': 50, 'sigma': 0.1})
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from srd_lab.errors import BadValue, SrdLabError, first_line

# sources of data -> what stands behind the colon, and the module and class in srd_lab/data that make a data set of it
FOLDERS = {
    "imagenet": ("DIR", "imagenet:ImageNetFolder"),
    "imagenet-s": ("DIR", "imagenet_s:ImageNetS"),
    "imagefolder": ("DIR", "imagefolder:ImageFolder"),
    "voc": ("DIR", "voc:Voc"),
    "pictures": ("DIR", "table:Pictures"),
    "table": ("FILE", "table:Table"),
    "hf-dataset": ("NAME_OR_DIR", "hub:HubData"),
    "wds": ("PATTERN", "shards:Shards"),
}
# words in front of a colon that are no modules: libraries, and sources of data
LIBRARIES = ("timm", "captum", "zennit", "pytorch_grad_cam")
_NO_MODULES = (*LIBRARIES, "hf", "hub", "live", *FOLDERS, "cifar10", "cifar100")
EXPECTED = "expected package.module:name or path/file.py:name"


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """What stands in front of the ``?``, and the options behind it: numbers, True, False, None and other Python literals as
    such, all else as text.

    Raises BadValue for an option that is not ``name=value``, or is given twice.
    """
    name, _, behind = text.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, behind.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise BadValue(f"{text}: {part!r} is no option; write name=value, joined by &")
        if key in options:
            raise BadValue(f"{text}: {key} is given twice")
        options[key] = _literal(value)
    return name, options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def is_own(name: str) -> bool:
    """Whether a name is that of a part from elsewhere, such as ``timm:resnet18``, ``mine.py:net`` or ``net.pt2``."""
    return ":" in (plain := name.partition("?")[0]) or plain.endswith(".pt2")


def is_place(name: str) -> bool:
    """Whether ``name``, without its options, is spelled as ``package.module:name`` or ``path/file.py:name``."""
    module, colon, attribute = name.rpartition(":")
    if (
        not colon
        or name.partition(":")[0] in _NO_MODULES
        or not all(part.isidentifier() for part in attribute.split("."))
    ):
        return False
    return module.endswith(".py") or all(part.isidentifier() for part in module.split("."))


def find(place: str) -> Any:
    """What ``package.module:name`` or ``path/file.py:name`` stands for.

    Raises BadValue where there is no such file or module, its import fails, or it has nothing of that name.
    """
    if not is_place(place):
        raise BadValue(f"{place!r} names no part of yours; {EXPECTED}")
    where, _, attribute = place.rpartition(":")
    found: Any = _module(where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BadValue(f"{where} has no {attribute!r}; it has {_names(found)}")
        found = getattr(found, part)
    return found


def make(text: str) -> Any:
    """What ``place?name=value`` makes: the object of that place, called with the options.

    Raises BadValue as :func:`find` does, and where the call fails or does not take the options.
    """
    place, options = split_options(text)
    factory = find(place)
    if not callable(factory):
        raise BadValue(
            f"{place} is a {type(factory).__name__} and cannot be called; name a function or a class"
        )
    return call(text, factory, options)


_LIVE: dict[str, Any] = {}
_LOADED: dict[str, None] = {}  # names of the modules that parts came from


@contextlib.contextmanager
def live(part: Any) -> Iterator[str]:
    """Within: a name by which an object in hand is a part, for studies that take names."""
    part_itself = part[0] if isinstance(part, tuple) else part
    # of a wrapper that only adds a normalisation the network's own kind
    kind = type(getattr(part_itself, "network", part_itself)).__name__
    name = f"live:{kind}-{len(_LIVE) + 1}"
    _LIVE[name] = part
    try:
        yield name
    finally:
        del _LIVE[name]


def spoken(name: str) -> str:
    """A name as titles have it: that of an object in hand without what only tells it from others.

    Example
    -------
    >>> spoken("live:ResNet-1"), spoken("timm:resnet18")
    ('ResNet', 'timm:resnet18')
    """
    return name.removeprefix("live:").rpartition("-")[0] if name.startswith("live:") else name


def living(name: str) -> Any:
    """The object behind a name that :func:`live` gave. Raises BadValue where it is gone."""
    if name not in _LIVE:
        raise BadValue(f"{name} is no object of this process; give a name that can be found again")
    return _LIVE[name]


def code_in(text: str) -> list[str]:
    """The parts among what a text names (``smoothed(mine.py:Method?a=1,0.1)``, ``a.py:net,hub:REPO:NAME``) that are code, of
    the user's or from elsewhere, and none of the libraries that are installed here."""
    found = re.findall(r"[^\s,()?&=]+:[^\s,()?&]+|[^\s,()?&=]+\.pt2\b", text)
    return [
        name
        for name in dict.fromkeys(found)
        if is_place(name) or name.startswith(("hub:", "hf:")) or name.endswith(".pt2")
    ]


def code_of(text: str) -> dict[str, str]:
    """``place`` -> SHA-256, in hexadecimal digits, of the file that it is in, of every part from a module or a file that a
    text names: ``smoothed(mine.py:Method?a=1,0.1)``. What cannot be imported is left out.
    """
    found = {}
    for place in code_in(text):
        if not place.startswith(("hub:", "hf:")):
            try:
                module = None if place.endswith(".pt2") else _module(place.rpartition(":")[0])
                file = Path(place).expanduser() if module is None else getattr(module, "__file__", None)
                found[place] = hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
            except (SrdLabError, OSError):
                continue
    return found


def modules_of_the_user() -> list[ModuleType]:
    """The modules that parts came from and that are installed nowhere: another process may not have them."""
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]
    found = []
    for name in _LOADED:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module and file and not any(Path(file).resolve().is_relative_to(place) for place in installed):
            found.append(module)
    return [module for module in found if module.__name__.partition(".")[0] != "srd_lab"]


def call(text: str, factory: Any, options: dict[str, Any]) -> Any:
    """``factory(**options)``, whose failure is one line about ``text`` (BadValue)."""
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise BadValue(
            f"{text}: {error}; options stand behind a ?, as in {text.partition('?')[0]}?name=value"
        ) from None
    except ValueError:  # no signature to be had
        pass
    try:
        return factory(**options)
    except SrdLabError:
        raise
    except Exception as error:
        raise BadValue(f"{text} fails: {first_line(error)} ({type(error).__name__})") from error


def _module(where: str) -> ModuleType:
    if where.endswith(".py"):
        return _from_file(Path(where).expanduser())
    if os.getcwd() not in sys.path:  # the command's own folder stands there instead
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(where)
        _LOADED[where] = None
        return module
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise BadValue(f"there is no module {where}; install it, or run where it lies") from None
        raise _failed(where, error) from error
    except Exception as error:
        raise _failed(where, error) from error


def _from_file(file: Path) -> ModuleType:
    """The module in a file, imported once."""
    if not file.is_file():
        raise BadValue(f"there is no file {file}; {EXPECTED}")
    digits = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    name = f"srd_lab_part_{file.stem if file.stem.isidentifier() else ''}_{digits}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _LOADED[name] = None
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise _failed(str(file), error) from error
    return module


def _failed(where: str, error: Exception) -> BadValue:
    return BadValue(f"{where} cannot be imported: {first_line(error)} ({type(error).__name__})")


def _names(found: Any, most: int = 8) -> str:
    home = getattr(found, "__name__", None)
    names = [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", home) == home
    ]
    return (
        ", ".join(names[:most]) + ("..." if len(names) > most else "")
        if names
        else "nothing that can be called"
    )
