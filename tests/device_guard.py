"""A device that is none: it computes on the CPU, refuses what an accelerator refuses, and counts what a program waits for.

    python tests/device_guard.py      # the table of docs/scale.md

A tensor on the device ``guard`` says that it lies there, and holds its numbers on the CPU. Every call that reaches PyTorch's
dispatcher passes :class:`Guard`, also those of autograd's thread. It refuses a call that mixes ``guard`` and the CPU, and
notes what makes the program wait until the device is done, as ``torch.cuda.set_sync_debug_mode`` does on CUDA: numbers that
Python asks for, sizes that hang on numbers, copies from one device to the other.

A backend is registered once and for all: whoever imports this module has a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ATEN = torch.ops.aten
COPIES = (ATEN.copy_.default, ATEN._to_copy.default)
PICKS = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default)
FILLS = (ATEN.masked_fill.Tensor, ATEN.masked_fill_.Tensor)  # with a tensor, whose number is asked for
WITH_NUMBERS = (
    *COPIES,
    *PICKS,
    *FILLS,
    ATEN.fill_.Tensor,
)  # beside what is pointwise: one number may lie on the CPU

_setup_privateuseone_for_python_backend("guard")
DEVICE = torch.device("guard", 0)
_KERNELS = torch.library.Library("aten", "IMPL")  # as long as it lives
MIXED: list[str] = []  # all that was refused: whoever runs a model may catch the error
_guards: list[Guard] = []
_generators: dict[
    int, torch.Generator
] = {}  # those of the device; a call is given another object with its address


class OnDevice(Tensor):
    """A tensor that says that it lies on the device.

    numbers : what it holds, on the CPU.
    """

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        size, strides, offset = numbers.shape, numbers.stride(), numbers.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, size, strides=strides, storage_offset=offset, dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"  # without asking for its numbers

    def tolist(self) -> Any:
        return self.cpu().tolist()  # as PyTorch does it for tensors of its own

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Generator(torch.Generator):
    """A random number generator, of the device too; the numbers are drawn on the CPU."""

    def __new__(cls, device: Any = CPU) -> Generator:
        there = torch.device(device).type == DEVICE.type
        made = super().__new__(cls, CPU if there else device)
        if there:
            _generators[made._cdata] = made
        return made


torch.Generator = Generator  # type: ignore[misc]


class Mixed(RuntimeError):
    """What an accelerator refuses: tensors of two devices in one call."""


class Guard(TorchDispatchMode):
    """Within: calls are refused that mix devices, and those noted that wait for the device.

    waits : one line for each, what and where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> Guard:
        _guards.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _guards.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if mixture := mixed(func, args, kwargs):
            MIXED.append(f"{func} at {place_of_call()}: {mixture}")
            raise Mixed(MIXED[-1])
        if waits(func, args, kwargs):
            self.waits.append(f"{func} at {place_of_call()}")
        return computed(func, args, kwargs)


def mixed(func: Any, args: Any, kwargs: Any) -> str:
    """What of a call is not on one device with the rest, in words; empty where all is."""
    given = tree_leaves((args, kwargs))
    tensors = [t for t in given if isinstance(t, Tensor)]
    here, there = ([t for t in tensors if isinstance(t, OnDevice) == on] for on in (False, True))
    made_there = bool(there) or _asked(kwargs) == DEVICE.type
    generators = [g for g in given if isinstance(g, torch._C.Generator)]
    if any((g._cdata in _generators) != made_there for g in generators):
        return "its generator is of another device"
    if not there or not here or func in COPIES:
        return ""
    if func in PICKS:  # indices may lie on the CPU, from where they are copied
        values = [args[0], *args[2:3]] if len(args) > 2 else [args[0]]
        here = [t for t in values if not isinstance(t, OnDevice)]
    may_be_number = torch.Tag.pointwise in func.tags or func in WITH_NUMBERS
    wrong = [t for t in here if t.dim() > 0 or not may_be_number]
    return f"{', '.join(str(tuple(t.shape)) for t in wrong)} on the CPU" if wrong else ""


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a program waits for the device in this call."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, OnDevice)]
    if func is ATEN._to_copy.default:
        moves = bool(there) != (_asked(kwargs, DEVICE if there else CPU) == DEVICE.type)
        return moves
    if not there:
        return False
    if func is ATEN.copy_.default:
        moves = len(there) < len(tensors) and not (isinstance(args[0], OnDevice) and args[1].dim() == 0)
        return moves
    if func in PICKS:
        return _picks_by_numbers(func, args)
    if func in FILLS:
        return isinstance(args[2], OnDevice)
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _picks_by_numbers(func: Any, args: Any) -> bool:
    """Whether an index is a mask, of which the places are asked for, or lies on the CPU."""
    indices = [t for t in args[1] if t is not None]
    masks = [t for t in indices if t.dtype in (torch.bool, torch.uint8)]
    if func is not ATEN.index.Tensor and len(masks) == len(indices) == 1 and args[2].numel() == 1:
        # one number where a mask is, which PyTorch fills in; Python's numbers come as tensors of the CPU on CUDA alone
        return isinstance(args[2], OnDevice) and not getattr(args[2], "is_number", False)
    return bool(masks) or any(not isinstance(t, OnDevice) for t in indices)


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a call, computed on the CPU, on the device that it belongs to."""
    there = any(isinstance(t, OnDevice) for t in tree_leaves((args, kwargs)))
    made_there = _asked(kwargs, DEVICE if there else CPU) == DEVICE.type
    on_cpu = {
        name: CPU if name == "device" and value is not None else value for name, value in kwargs.items()
    }
    out = func(*tree_map(_numbers, args), **tree_map(_numbers, on_cpu))
    if not made_there or (func is ATEN.copy_.default and not isinstance(args[0], OnDevice)):
        return out
    out = tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, out)
    if func is ATEN.scalar_tensor.default:
        out.is_number = True
    return return_and_correct_aliasing(func, args, kwargs, out)


def place_of_call() -> str:
    """File and line of the package, which is running; "PyTorch" where none is, as in what autograd does alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.parent.name != "tests":
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "PyTorch"


def on_device(t: Tensor) -> Tensor:
    """A copy of t on the device, of which nobody waits."""
    return OnDevice(t.detach().clone())


def _empty_strided(size: Any, strides: Any, **kwargs: Any) -> OnDevice:
    return OnDevice(torch.empty_strided(size, strides, dtype=kwargs.get("dtype"), device=CPU))


def _copy(to: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
    for guard in _guards:
        guard.waits.append(f"numbers of Python at {place_of_call()}")
    _numbers(to).copy_(_numbers(values))
    return to


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, OnDevice) else value


def _asked(kwargs: Any, otherwise: torch.device = CPU) -> str:
    """The type of the device that a call names."""
    named = kwargs.get("device")
    return cast(str, (otherwise if named is None else torch.device(named)).type)


# torch.tensor and new_tensor hide from the dispatcher what they make
_KERNELS.impl("empty_strided", _empty_strided, "PrivateUse1")
_KERNELS.impl("copy_", _copy, "PrivateUse1")
