"""Exported programs: ``--model FILE.pt2``, what ``torch.export.save`` has written.

Loading one may unpickle and evaluate what the file holds: it is code of the user's own, as a factory is.

The program keeps the modules of the network that it was made of, but calls operators of torch's dispatcher
(``aten.batch_norm``) where a network calls functions (``F.batch_norm``). Methods know the functions: each operator is
replaced by its own.

Example
-------
::

    program = torch.export.export(net.eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: Dim("n")},))
    torch.export.save(program, "net.pt2")

    # srd-lab explain --model net.pt2 photo.jpg
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.errors import BadValue, BadWeights, first_line
from srd_lab.types import Preprocessing

EXPORT = "torch.export.export(net.eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: torch.export.Dim('n')},))"


def exported_network(file: Path) -> tuple[nn.Module, Preprocessing]:
    """The network of an exported program, with ImageNet's preprocessing at the size that it was exported for.

    Raises BadWeights where the file is not there or is none, and BadValue for a program of one batch size alone, of other
    inputs than images, or in training mode.
    """
    if not file.is_file():
        raise BadWeights(f"there is no file {file}; expected what torch.export.save has written")
    try:
        with _quiet():
            program = torch.export.load(file)
            network = torch.export.unflatten(program)
    except Exception as error:  # the readers fail on a damaged file in every way there is
        raise BadWeights(
            f"{file} cannot be loaded as an exported program: {first_line(error)} ({type(error).__name__}); "
            "write it by torch.export.save, with this version of torch"
        ) from None
    side = _side(file, program)
    module: Any
    for module in network.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            if node.op == "call_function":
                _check_mode(file, node)
                node.target = function_of(node.target)
        if hasattr(module, "finalize"):
            module.finalize()  # writes the code anew, which
            module._run_with_interpreter = False  # then runs, as Python of one's own does
    usual = Preprocessing()
    return network, usual if side is None else replace(usual, size=side)


def _side(file: Path, program: Any) -> int | None:
    """The side in pixels that the images of a program must have; None = any."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shapes = [tuple(getattr(node.meta.get("val"), "shape", ())) for node in inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise BadValue(f"{file} takes inputs of shape {shapes}; expected one, images (N, 3, H, W)")
    batch, _, height, width = shapes[0]
    limits = None if isinstance(batch, int) else program.range_constraints.get(batch.node.expr)
    if limits is None or limits.lower > 1 or limits.upper < 10**6:
        few = batch if limits is None else f"{limits.lower} to {limits.upper}"
        raise BadValue(f"{file} takes batches of {few} images alone; export it for any number: {EXPORT}")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    if height != width:
        raise BadValue(f"{file} wants images of {height} x {width} pixels; squares alone are made here")
    return height


_TRAINING = {"batch_norm": 5, "instance_norm": 5, "dropout": 2}  # place of the argument that says so


def _check_mode(file: Path, node: Any) -> None:
    place = _TRAINING.get(_name_of(node.target), 99)
    if len(node.args) > place and node.args[place] is True:
        raise BadValue(f"{file} was exported in training mode; call eval() before the export: {EXPORT}")


# --- operators as functions ---------------------------------------------------------------------------------


def _batch_norm(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    _: Any,
) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, own: bool, momentum: float, eps: float, _: Any
) -> Tensor:
    return F.instance_norm(x, mean, var, weight, bias, own, momentum, eps)


def _layer_norm(
    x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: Any = None
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _group_norm(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: Any = None
) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end, step),)]


def _index(x: Tensor, indices: list[Any]) -> Tensor:
    return x[tuple(slice(None) if index is None else index for index in indices)]


# whose arguments come in another order than those of the function, or that have no function
_WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "slice": _slice,
    "index": _index,
    "sym_size": Tensor.size,
}
# that networks call by torch.nn.functional, with the operator's arguments
_FUNCTIONAL = {
    *("conv1d", "conv2d", "conv3d", "linear", "pad", "dropout", "scaled_dot_product_attention"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("relu", "relu_", "relu6", "leaky_relu", "hardtanh", "elu", "selu", "celu", "prelu", "silu", "mish"),
    *("hardswish", "hardsigmoid", "gelu", "softplus"),
}


def _name_of(target: Any) -> str:
    """``batch_norm`` of ``aten.batch_norm.default``; empty for what is no operator of aten."""
    space, _, rest = str(target).partition(".")
    return rest.partition(".")[0] if isinstance(target, torch._ops.OpOverload) and space == "aten" else ""


def function_of(target: Any) -> Any:
    """The function of torch that an operator of its dispatcher is; others as they are.

    Example
    -------
    >>> function_of(torch.ops.aten.relu.default) is torch.nn.functional.relu
    True
    """
    name = _name_of(target)
    if not name or name in _WRITTEN_OUT:
        return _WRITTEN_OUT.get(name, target)
    places = (F,) if name in _FUNCTIONAL else (torch, torch._C._nn, Tensor)
    return next((getattr(place, name) for place in places if hasattr(place, name)), target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within: torch.export logs no warnings; what fails is raised."""
    log = logging.getLogger("torch.export")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
