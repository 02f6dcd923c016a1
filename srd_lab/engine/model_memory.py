"""What is remembered of a model as long as it lives: what was found of it once, and what other modules keep of it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from srd_lab.engine.interceptor import functions_of

_memories: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()
_found: WeakKeyDictionary[nn.Module, dict[str, set[str]]] = WeakKeyDictionary()


def memory_of(model: nn.Module) -> dict[Any, Any]:
    """What other modules remember of a model as long as it lives; a surrogate shares that of its original."""
    return _memories.setdefault(model, {})


def state_of(model: nn.Module) -> str:
    """What tells a model as it is from what hooks, or another ``forward``, make of it."""
    hooks = (
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )
    return f"{sum(hooks)} hooks, forward {id(vars(model).get('forward'))}"


def found_of(model: nn.Module) -> set[str]:
    """What was found of the model as it is."""
    return _found.setdefault(model, {}).setdefault(state_of(model), set())


def passes_as(surrogate: nn.Module, original: nn.Module) -> None:
    """``surrogate`` need not be asked what ``original`` was asked: it differs in its activations alone."""
    found_of(original)
    _found[surrogate] = _found[original]
    _memories[surrogate] = memory_of(original)


def has_changed(model: nn.Module, network: nn.Module) -> bool:
    """Whether ``network``, which was just run, has called other functions of torch than when it was asked, as one with an
    exchanged part does; what was found of it, and of the ``model`` that it is a part of, is then forgotten."""
    key = has_changed, state_of(network)
    known: set[int] = memory_of(network).setdefault(key, set())
    changed = bool(known) and functions_of(network) not in known
    if changed:
        for part in (model, network):
            found_of(part).clear()
            memory_of(part).clear()
        memory_of(network)[key] = known
    known.add(functions_of(network))
    return changed
