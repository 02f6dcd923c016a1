"""What is refused before anything is computed: models that cannot be followed, wrong inputs, wrong targets."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from srd_lab.conditions import require
from srd_lab.errors import BadInput, Refused
from srd_lab.overflow import largest_square_root


def refuse_checkpoint(name: str) -> None:
    """Refuse (SrdLabError) a call, ``name``, whose forward pass is run again, unseen, during the backward pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__module__ == checkpoint.__name__:
        raise Refused(
            f"{name!r} is checkpointed, and its recomputation cannot be seen; switch checkpointing off"
        )


def check_traceable(name: str, x: Tensor) -> None:
    """Refuse (SrdLabError) an activation call of that name on ``x`` through which nothing can be traced."""
    if not torch.is_grad_enabled():
        raise Refused(
            f"activation {name!r} runs with gradients off (no_grad or reentrant checkpointing inside the model), "
            "so nothing can be traced through it; switch that off"
        )
    refuse_checkpoint(name)
    if x.dim() < 2:
        raise Refused(
            f"activation {name!r} runs on shape {tuple(x.shape)}; expected images along the first axis and "
            "one more axis at least"
        )


def check_model(model: nn.Module) -> None:
    """Refuse (SrdLabError) a model whose calls cannot be followed, whose output depends on the batch or on chance, or that
    is not called with images alone."""
    _check_takes_images(model)
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise Refused(
            "the model has lazy modules that were never run, and so no weights; call model(x) once first"
        )
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise Refused(
            "the model was made in torch.inference_mode, so that no gradient can be taken; make it outside, or pass "
            "copy.deepcopy(model)"
        )
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise Refused(
                f"{where} is a scripted module, whose calls cannot be seen; pass the eager network it was made from"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise Refused(
                f"{where} is {type(module).__name__}, which runs copies elsewhere; pass its .module instead"
            )
        if type(module).__name__ == "OptimizedModule":
            raise Refused(
                f"{where} is a compiled module, whose calls cannot be seen; pass its ._orig_mod instead"
            )
        if module._compiled_call_impl is not None:
            raise Refused(
                f"{where} was compiled in place, so that its calls cannot be seen; pass it as it was before .compile()"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise Refused(f"batch norm {where} uses the statistics of the batch; call model.eval() first")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise Refused(f"dropout {where} is active; call model.eval() first")


def _check_takes_images(model: nn.Module) -> None:
    """Refuse (SrdLabError) a model whose ``forward`` does not take one positional argument."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # written in C, say
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise Refused(
            f"the model's forward({', '.join(signature.parameters)}) cannot be called with the images alone ({error}); wrap "
            "it in a module whose forward(x) gives the rest"
        ) from None


def check_input(x: Tensor, model: nn.Module | None = None) -> None:
    """Refuse (BadInput) anything but a finite float32 / float64 batch (N, C, H, W), of the model's own dtype.

    Example
    -------
    >>> check_input(torch.zeros(3, 8, 8))
    Traceback (most recent call last):
    ...
    srd_lab.errors.BadInput: the input must be a non-empty batch of images (N, C, H, W), got (3, 8, 8); add ...
    """
    if model is not None and not isinstance(model, nn.Module):
        raise BadInput(
            f"the model must be a torch.nn.Module, got {type(model).__name__}; wrap it in a module whose forward(x) calls it"
        )
    if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape:
        got, cure = _not_images(x)
        raise BadInput(f"the input must be a non-empty batch of images (N, C, H, W), got {got}; {cure}")
    if x.layout != torch.strided or x.is_meta:
        raise BadInput(
            f"the input must be a dense tensor with values, got {x.layout} on {x.device}; give x.to_dense() of a real device"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise BadInput(
            f"the input must be float32 or float64, got {x.dtype}; scale pixels to [0, 1] and call x.float()"
        )
    own = None if model is None else next((p for p in model.parameters() if p.is_floating_point()), None)
    if own is not None and own.dtype != x.dtype:
        raise BadInput(
            f"the input is {x.dtype}, but the model's weights are {own.dtype}; bring both to one dtype with .to(...)"
        )
    largest = x.detach().abs().amax()  # NaN where there is one
    require(largest <= largest_square_root(x.dtype), lambda: _refuse_numbers(float(largest), x.dtype))
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise BadInput("no gradient can be taken in torch.inference_mode; use torch.no_grad instead")
    if torch.is_autocast_enabled(x.device.type):
        raise BadInput("explanations are made in full precision; leave torch.autocast around the call out")


def _refuse_numbers(largest: float, dtype: torch.dtype) -> None:
    if not math.isfinite(largest):
        raise BadInput("the input holds NaN or infinite values; expected finite pixels")
    raise BadInput(
        f"the input holds values of {largest:.2g}, whose squares overflow {str(dtype).removeprefix('torch.')}; "
        "expected pixels in [0, 1], or what the model was trained on"
    )


def _not_images(x: object) -> tuple[str, str]:
    """What was given instead of images, and what to do."""
    if not isinstance(x, Tensor):
        cure = (
            "torch.from_numpy(x)" if type(x).__name__ == "ndarray" else "a torch.Tensor of pixels in [0, 1]"
        )
        return type(x).__name__, f"give {cure}"
    cure = "add a batch axis with x[None]" if x.dim() == 3 else "bring it to this shape"
    return str(tuple(x.shape)), "give one image at least" if 0 in x.shape else cure
