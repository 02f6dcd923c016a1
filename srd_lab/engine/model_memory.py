"""What is remembered of a model as long as it lives: what was found of it once, and what other modules keep of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from srd_lab.engine.interceptor import functions_of

State = tuple[tuple[Any, ...], int]  # of a model, and of its weights
_memories: WeakKeyDictionary[nn.Module, dict[State, dict[Any, Any]]] = WeakKeyDictionary()
_trained: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()  # the state from which a model is trained
_originals: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()
_STATES = 8  # of a model, of which what was found is kept
_PLAIN = {bool, int, float, str, type(None)}
_OF_TORCH = set(vars(nn.Module()))  # attributes that every module has: hooks, parameters, modules
_DEEP = 3  # containers in containers that are looked into
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_settled = local()


def memory_of(model: nn.Module) -> dict[Any, Any]:
    """What other modules remember of a model as it is, with these weights; a surrogate shares that of its original."""
    model = _original_of(model)
    states, key = _memories.setdefault(model, {}), _state_and_weights(model)
    if key not in states and len(states) == _STATES:
        del states[next(iter(states))]
    return states.setdefault(key, {})


def found_of(model: nn.Module) -> set[str]:
    """What was found of the model as it is, with these weights."""
    found: set[str] = memory_of(model).setdefault(found_of, set())
    return found


@contextmanager
def trained(model: nn.Module) -> Iterator[None]:
    """Within: training changes the weights of ``model`` by small steps, and what is remembered of it stays true."""
    _trained[model] = _state_and_weights(model)
    try:
        yield
    finally:
        del _trained[model]


@contextmanager
def settled() -> Iterator[None]:
    """Within: no model changes, and so its state is looked at once."""
    if getattr(_settled, "known", None) is not None:
        yield
        return
    _settled.known = {}
    try:
        yield
    finally:
        _settled.known = None


def passes_as(surrogate: nn.Module, original: nn.Module) -> None:
    """``surrogate`` need not be asked what ``original`` was asked: it differs in its activations alone."""
    _originals[surrogate] = ref(_original_of(original))


def has_changed(model: nn.Module, network: nn.Module) -> bool:
    """Whether ``network``, which was just run, has called other functions of torch than when it was asked, as one with an
    exchanged part does; what was found of it, and of the ``model`` that it is a part of, is then forgotten."""
    known: set[int] = memory_of(network).setdefault(has_changed, set())
    changed = bool(known) and functions_of(network) not in known
    if changed:
        for part in (model, network):
            memory_of(part).clear()
        memory_of(network)[has_changed] = known
    known.add(functions_of(network))
    return changed


def _original_of(model: nn.Module) -> nn.Module:
    of = _originals.get(model)
    return (of and of()) or model


def _state_and_weights(model: nn.Module) -> State:
    """The state of a model, and a number that changes when torch writes into a parameter or a buffer, or another one takes
    its place; not when somebody writes through ``.data``."""
    model = _original_of(model)
    if model in _trained:
        return _trained[model]
    known: dict[nn.Module, State] | None = getattr(_settled, "known", None)
    if known is None:
        return _looked_at(model)
    if model not in known:
        known[model] = _looked_at(model)
    return known[model]


def _looked_at(model: nn.Module) -> State:
    hooks, attributes, weights, seen = 0, list[Any](), [], set[int]()
    for module in model.modules():
        own = vars(module)
        hooks += sum(len(own[name]) for name in _HOOKS)
        attributes += [_told(value, seen) for name, value in own.items() if name not in _OF_TORCH]
        weights += [
            _version(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
    told = (
        *attributes,
        *(module.training for module in model.modules()),
    )  # not its hash: -1 and -2 have the same
    return (hooks, id(vars(model).get("forward")), told), hash(tuple(weights))


def _told(value: Any, seen: set[int], deep: int = 0) -> Any:
    """What tells an attribute from what it was before, numbers in containers and in objects too; each of these once.

    seen : ids of containers and objects that were told already.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return _version(value)
    if isinstance(value, nn.Module | type) or callable(value) or deep == _DEEP or id(value) in seen:
        return id(value)
    seen.add(id(value))
    if isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:  # no pairs, which are made for the look, and share their ids with what is made next
        named = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        parts = [part for pair in list(named.items()) for part in pair]
    return type(value).__name__, *(_told(part, seen, deep + (type(part) is not tuple)) for part in parts)


def _version(t: Tensor) -> tuple[int, int, int]:
    try:
        return id(t), 0 if t.is_inference() else t._version, t.data_ptr()
    except (
        RuntimeError,
        ValueError,
    ):  # a tensor without memory of its own: quantised, sparse, or not made yet
        return id(t), 0, 0
