"""The class logits in what a model puts out, and the classes that are explained.

A model with one logit y tells two classes apart: class 1 has the logit y and class 0 its negative, so that whatever is
explained, attacked or scored works on ``[-y, y]``. Its probabilities are those of the sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srd_lab.conditions import require
from srd_lab.errors import BadInput, Refused


def class_logits(output: Any) -> Any:
    """The logits (N, K), K >= 2, in the output of a model.

    output : logits (N, K), (N, 1) or (N,); a tuple or list that begins with them; a mapping or an object that has them
        under ``logits``, or a mapping with one tensor. Anything else is handed back as it is.

    Raises Refused for a tensor of whole, complex or sparse numbers, for one of no classes, and for one output that a sigmoid
    made, as far as autograd's graph shows it.

    Example
    -------
    >>> class_logits({"logits": torch.tensor([[2.0]])})    # one logit: two classes
    tensor([[-2.,  2.]])
    """
    found = tensor_of(output)
    if isinstance(found, Tensor) and not (found.is_floating_point() and found.layout == torch.strided):
        kind = f"{found.layout}, {found.dtype}".removeprefix("torch.strided, ")
        raise Refused(
            f"the model's output must be dense logits of floating point, got {kind}; pass a module whose forward() returns "
            "them as the last layer does, before a class is chosen"
        )
    if isinstance(found, Tensor) and 0 in found.shape[1:]:
        raise _no_logits(found)
    if not isinstance(found, Tensor) or found.dim() not in (1, 2) or found[:1].numel() != 1:
        return found
    if _made_by(found.grad_fn).startswith("Sigmoid"):
        raise Refused(
            "the model's one output is a probability, which a sigmoid made; expected its logit: take the sigmoid off"
        )
    y = found.reshape(-1, 1)
    return torch.cat([-y, y], 1)


def _made_by(node: Any) -> str:
    """The name of the node of autograd's graph, past views, that made an output; empty where there is no graph."""
    while node is not None and any(
        word in node.name() for word in ("View", "Squeeze", "Select", "Reshape", "Clone")
    ):
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name())


def is_among(logits: Tensor, output: Any) -> bool:
    """Whether ``logits`` are the very tensor that the model put out, and not two made of one.

    logits : as :func:`class_logits` found them. output : of the model, as there.
    """
    return tensor_of(output) is logits


def probabilities(output: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The probabilities (N, K) of the classes, in [0, 1]: softmax of the logits, sigmoid of one logit.

    output : logits in one of the forms of :func:`class_logits`. dtype : to compute in; None is that of the logits.
    """
    logits = class_logits(output)
    one = tensor_of(output).numel() == len(logits)
    return torch.softmax(
        logits / 2 if one else logits, 1, dtype
    )  # the softmax of -y/2, y/2 is the sigmoid of y


def check_target(target: Any, logits: Any) -> Tensor:
    """Class indices (N,) int64 on the logits' device.

    target : class indices, one per image or one for all; None is the predicted class. logits : (N, K).

    Raises Refused for what is no logits (N, K), and BadInput for what is no class of theirs.

    Example
    -------
    >>> check_target(1, torch.zeros(2, 3))
    tensor([1, 1])
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise _no_logits(logits)
    n, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    if isinstance(target, Tensor) and target.layout != torch.strided:
        raise BadInput(f"targets must be dense class indices, got {target.layout}; give target.to_dense()")
    try:
        index = torch.as_tensor(target)
        index = index if index.is_floating_point() or index.is_complex() else index.to(_whole(index))
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(
            f"targets must be class indices, one per image or one for all, got {target!r:.60}; give an int, a list of "
            f"{n} ints, or None for the predicted classes"
        ) from None
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise BadInput(f"targets must be integer class indices, got {index.dtype}")
    if index.dim() == 0:
        index = index.expand(n)
    if index.shape != (n,):
        raise BadInput(f"expected one target per image, shape ({n},), got {tuple(index.shape)}")

    def refuse() -> None:
        raise BadInput(f"target out of range: the model has classes 0..{classes - 1}, got {index.tolist()}")

    require(((index >= 0) & (index < classes)).all(), refuse)
    return index.long().to(logits.device)


def _whole(index: Tensor) -> torch.dtype:
    """The type that ``index`` is looked at in: torch finds no least one of uint16 and its like."""
    return index.dtype if index.dtype == torch.bool else torch.int64


def check_logits(logits: Any) -> Tensor:
    """``logits``, as they are. Raises Refused where they are no (N, K)."""
    check_target(None, logits)
    return logits


def class_logit(logits: Tensor, target: Tensor | int | None) -> Tensor:
    """The logit (N,) of every image's class; arguments and errors are those of :func:`check_target`."""
    classes = check_target(target, logits)
    return logits.gather(1, classes[:, None])[:, 0]


def tensor_of(output: Any) -> Any:
    """The tensor in a model's output that holds its logits, as :func:`class_logits` finds it; the output itself where none
    does."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    tensors = [t for t in output.values() if isinstance(t, Tensor)] if isinstance(output, Mapping) else []
    return tensors[0] if len(tensors) == 1 else output


def _no_logits(output: Any) -> Refused:
    return Refused(
        f"the model's output must be logits (N, K), got {_described(output)}; pass a module whose forward() returns them "
        "alone, first in a tuple, or under 'logits'"
    )


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(repr, output))}"
    return f"a {type(output).__name__}"
