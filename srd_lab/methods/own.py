"""Methods from elsewhere, by name, on the signature of all others.

===============================  ==========================================================================================
``package.module:Class``         an explainer of yours, with ``explain_with_logits``: see :class:`srd_lab.types.Explainer`
``path/file.py:Class``           the same from a file
``captum:CLASS``                 an attribution of captum, such as ``captum:IntegratedGradients?n_steps=32``; one of a layer
                                 takes its module by name: ``captum:LayerGradCam?layer=features``
``zennit:COMPOSITE``             the gradient under a composite of zennit, such as ``zennit:EpsilonPlusFlat``
``pytorch_grad_cam:CLASS``       a class of grad-cam, whose map is its own, in [0, 1], without a gradient; the layer by name:
                                 ``pytorch_grad_cam:GradCAMPlusPlus?layer=layer4``
===============================  ==========================================================================================

Options stand behind a ``?``. Maps of these libraries are summed over channels, signed. They run on the network proper, fed
with normalised images; so one can look at *their* implementation under attack, beside ours.

Example
-------
>>> own_method("captum:InputXGradient").explain(model, x).shape
torch.Size([2, 64, 64])
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab.engine.attribution import Attribution, attribution
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue, Refused, SrdLabError, Unavailable, first_line
from srd_lab.logits import check_target, class_logits
from srd_lab.parts import call, make, split_options
from srd_lab.types import Explainer


@dataclass(frozen=True)
class OwnMethod(Explainer):
    """A method from elsewhere, whose results are checked.

    name : as in the table above. part : what it stands for, which is not stored with a run.
    """

    name: str
    part: Any = field(repr=False, compare=False, metadata={"stored": False})

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        found = self.part.explain_with_logits(model, x, target)
        if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
            raise BadValue(
                f"{self.name} gives a {type(found).__name__}; expected a pair of tensors: maps and logits"
            )
        maps, logits = found
        if maps.dim() != 3 or len(maps) != len(x):
            raise BadValue(
                f"{self.name} gives maps of shape {tuple(maps.shape)} for {len(x)} images; expected ({len(x)}, h, w)"
            )
        if logits.dim() != 2 or len(logits) != len(x):
            raise BadValue(
                f"{self.name} gives logits of shape {tuple(logits.shape)} for {len(x)} images; expected ({len(x)}, classes)"
            )
        return maps, logits


def own_method(name: str) -> Explainer:
    """The method from elsewhere of that name. Raises BadValue for what is no method, Unavailable without its library."""
    kind, _, rest = name.partition(":")
    if kind in SOURCES:
        return OwnMethod(name, SOURCES[kind](name, *split_options(rest)))
    made = make(name)
    if not callable(getattr(made, "explain_with_logits", None)):
        raise BadValue(
            f"{name} gives a {type(made).__name__} without explain_with_logits(model, x, target); expected an explainer"
        )
    return OwnMethod(name, made)


@dataclass(frozen=True)
class _Attribution:
    """What another library computes: ``attribute(run, classes)`` -> (N, C, h, w)."""

    name: str
    attribute: Callable[[Attribution, Tensor], Any]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        with attribution(model, x) as run:
            logits = class_logits(run.network(run.given.clone()))
            classes = check_target(target, logits)
            try:
                found = self.attribute(run, classes)
            except (SrdLabError, MemoryError):
                raise
            except Exception as error:
                raise Refused(f"{self.name} fails: {first_line(error)} ({type(error).__name__})") from error
            if not isinstance(found, Tensor) or found.dim() != 4:
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise Refused(f"{self.name} gives {shape}, which is no map (N, C, h, w)")
            return run.finish(found.sum(1)), run.finish(logits)


class _Logits(nn.Module):
    """A network that puts out its logits, whatever stands around them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return class_logits(self.network(x))


def _captum(name: str, kind: str, options: dict[str, Any]) -> _Attribution:
    try:
        import captum.attr as captum
    except ImportError:
        raise Unavailable(f"{name} needs captum; `pip install captum`") from None
    known = getattr(captum, kind, None)
    if not isinstance(known, type) or not issubclass(known, captum.Attribution):
        raise BadValue(
            f"captum.attr has no attribution {kind!r}; expected one such as IntegratedGradients or LayerGradCam"
        )
    layer = _layer(name, options)
    if (layer is not None) != kind.startswith(("Layer", "GuidedGradCam")):
        raise BadValue(f"{name}: the attributions of a layer take layer=NAME, and no others do")

    def attribute(run: Attribution, classes: Tensor) -> Any:
        places = [] if layer is None else [_module(name, run.network, layer)]
        return known(_Logits(run.network), *places).attribute(run.given, target=classes, **options)

    return _Attribution(name, attribute)


def _layer(name: str, options: dict[str, Any]) -> str | None:
    """The option ``layer``, which is taken away, as it was written: ``0.10`` is no number."""
    options.pop("layer", None)
    return next((part[6:] for part in name.partition("?")[2].split("&") if part.startswith("layer=")), None)


def _module(name: str, network: nn.Module, layer: str) -> nn.Module:
    while isinstance(network, SmoothModel):  # a surrogate under attack has the modules of its original
        network = network.model
    modules = dict(network.named_modules())
    if layer not in modules:
        some = ", ".join(list(modules)[1:9])
        raise BadValue(f"{name}: the network has no module {layer!r}; its first ones are {some}")
    return modules[layer]


def _zennit(name: str, kind: str, options: dict[str, Any]) -> _Attribution:
    try:
        from zennit import canonizers
        from zennit.composites import COMPOSITES
    except ImportError:
        raise Unavailable(f"{name} needs zennit; `pip install zennit`") from None
    known = {composite.__name__: composite for composite in COMPOSITES.values()}
    if kind not in known:
        raise BadValue(f"zennit has no composite {kind!r}; it has {', '.join(sorted(known))}")
    canonise = options.pop("canonise", "")
    if canonise and not hasattr(canonizers, canonise):
        raise BadValue(
            f"{name}: zennit has no canonizer {canonise!r}; expected one such as SequentialMergeBatchNorm"
        )

    def attribute(run: Attribution, classes: Tensor) -> Any:
        own = {"canonizers": [getattr(canonizers, canonise)()]} if canonise else {}
        composite = call(name, known[kind], options | own)
        with composite.context(run.network) as changed:
            chosen = class_logits(changed(run.given)).gather(1, classes[:, None]).sum()
            return torch.autograd.grad(chosen, run.given, create_graph=run.differentiable)[0]

    return _Attribution(name, attribute)


def _grad_cam(name: str, kind: str, options: dict[str, Any]) -> _Attribution:
    try:
        import pytorch_grad_cam as library
        from pytorch_grad_cam.base_cam import BaseCAM
    except ImportError:
        raise Unavailable(f"{name} needs grad-cam; `pip install 'srd-lab[peers-cam]'`") from None
    known = getattr(library, kind, None)
    if not isinstance(known, type) or not issubclass(known, BaseCAM) or known is BaseCAM:
        raise BadValue(
            f"pytorch_grad_cam has no method {kind!r}; expected one such as GradCAM or GradCAMPlusPlus"
        )
    layer = _layer(name, options)
    if (layer is None) != (kind == "FullGrad"):
        raise BadValue(f"{name}: the methods of pytorch_grad_cam take layer=NAME, all but FullGrad")

    def attribute(run: Attribution, classes: Tensor) -> Any:
        places = [] if layer is None else [_module(name, run.network, layer)]
        targets = [lambda logits, k=int(k): logits[k] for k in classes]
        with _gradients_kept(run.network), contextlib.redirect_stderr(io.StringIO()):  # bars of its progress
            method = call(name, known, {"model": _Logits(run.network), "target_layers": places} | options)
            try:
                found = method(run.given.detach().clone().requires_grad_(), targets)
            finally:
                method.activations_and_grads.release()
        return torch.as_tensor(found).to(run.given)[:, None]

    return _Attribution(name, attribute)


@contextlib.contextmanager
def _gradients_kept(network: nn.Module) -> Iterator[None]:
    """Within: gradients of parameters are free for use; afterwards they are what they were."""
    kept = [(parameter, parameter.grad) for parameter in network.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


SOURCES: dict[str, Callable[[str, str, dict[str, Any]], Any]] = {
    "captum": _captum,
    "zennit": _zennit,
    "pytorch_grad_cam": _grad_cam,
}
