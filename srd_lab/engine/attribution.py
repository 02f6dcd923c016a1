"""What every method does before and after its own work.

Example
-------
::

    with attribution(model, x) as run:
        trace = run.recording(Gated(run.network, rules.guided))
        logits = trace.run(run.given.clone())
        with trace.live():
            slope = slope_of(class_logit(logits, target), run.given, differentiable=run.differentiable)
        return run.finish(slope.abs().sum(1)), run.finish(logits)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from srd_lab.conditions import require
from srd_lab.engine.alignment import Alignment
from srd_lab.engine.hidden_activations import check_no_hidden_activation
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.interceptor import Watch
from srd_lab.engine.live_pass import Leaks
from srd_lab.engine.model_checks import check_images_apart
from srd_lab.engine.model_memory import has_changed, settled
from srd_lab.engine.model_slope import false_slope
from srd_lab.engine.preconditions import check_input
from srd_lab.errors import Leak, Refused, SrdLabError, SrdLabWarning, first_line
from srd_lab.normalise import split_normalisation
from srd_lab.runtime import is_out_of_memory

ON_LEAK = ("error", "warn")
Trace = TypeVar("Trace", bound=ImageTrace)


@dataclass(frozen=True)
class Attribution:
    """What a method has while it explains; made by :func:`attribution`.

    normalise, network : the two parts of the model; the identity and the model itself where it is not split.
    given : (N, C, H, W), what the network is to be fed with; in the graph, and not the caller's tensor.
    differentiable : whether the map must be differentiable in x. traced : not empty where a rule is followed.
    """

    normalise: nn.Module
    network: nn.Module
    given: Tensor
    differentiable: bool
    _on_exit: ExitStack
    traced: list[bool] = field(default_factory=list)

    def recording(self, trace: Trace) -> Trace:
        """``trace``, whose recorded tensors are released when the attribution ends, also by an error."""
        self._on_exit.callback(trace.release)
        if trace.sees_all:
            check_no_hidden_activation(self.network, self.given)
            self.traced.append(True)
        return trace

    def check_again(self, model: nn.Module, x: Tensor, slopes: bool) -> str:
        """What is asked of a model before, as it is now another one; arguments are those of :func:`attribution`."""
        check_images_apart(model, x)
        if self.traced:
            check_no_hidden_activation(self.network, self.given)
        return false_slope(model, x) if slopes else ""

    def alignment(self, trace: ImageTrace) -> Alignment:
        """Which maps of the network lie over the image; ``trace`` has followed it."""
        return Alignment.of(self.network, self.given, trace.sequence)

    def finish(self, t: Tensor) -> Tensor:
        """A result as the caller gets it: with its graph if and only if x asks for a gradient."""
        return t if self.differentiable else t.detach()


@contextmanager
def attribution(
    model: nn.Module, x: Tensor, *, split: bool = True, slopes: bool = True
) -> Iterator[Attribution]:
    """Within: gradients are on, and ``x`` has passed the model's normalisation; after it, what was recorded is released.

    x : images (N, C, H, W), as :func:`srd_lab.engine.preconditions.check_input` wants them.
    split : whether the map is one of the normalised image; if not, of ``x`` and the model as a whole.
    slopes : whether the map is made of gradients, of which a model's own may be false.

    Raises SrdLabError for inputs and models that cannot be explained.
    """
    check_input(x, model)
    differentiable = x.requires_grad and torch.is_grad_enabled()
    leaf = x if differentiable else x.detach().requires_grad_()
    normalise, network = split_normalisation(model) if split else (nn.Identity(), model)
    with torch.enable_grad(), settled(), ExitStack() as on_exit:
        try:
            check_images_apart(model, x)
            false = false_slope(model, x) if slopes else ""
            given = normalise(leaf.clone())  # a normalisation may work in place
            run = Attribution(normalise, network, given, differentiable, on_exit)
            yield run
            if has_changed(model, network):
                false = run.check_again(model, x, slopes)
            if false:
                warnings.warn(false, SrdLabWarning, stacklevel=2)
        except SystemError as error:  # of a scripted function that we refused something in
            raise error.__cause__ if isinstance(error.__cause__, SrdLabError) else error from None
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise Refused(
                f"the model cannot be followed: {first_line(error)} (raised by torch); use another method on it"
            ) from error


def plain_logits(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output (N, K) for images x (N, C, H, W), differentiable if and only if x asks for a gradient."""
    check_input(x, model)
    with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
        return Watch(model).run(x.clone())  # a network may change its input in place


def slope_of(
    outputs: Tensor | list[Tensor],
    x: Tensor,
    signals: Tensor | list[Tensor] | None = None,
    *,
    differentiable: bool,
    retain: bool = False,
) -> Tensor:
    """The gradient of ``outputs`` by ``x``, of the shape of ``x``; arguments and errors are those of :func:`slopes_of`."""
    return slopes_of(outputs, [x], signals, differentiable=differentiable, retain=retain)[0]


def slopes_of(
    outputs: Tensor | list[Tensor],
    xs: Sequence[Tensor],
    signals: Tensor | list[Tensor] | None = None,
    *,
    differentiable: bool,
    retain: bool = False,
) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """The gradients of ``outputs`` by each of ``xs``, of their shapes; None for one that the outputs do not depend on.

    outputs : any shapes. xs : what to differentiate by.
    signals : weights of the entries of each output, of its shape; None gives every entry the weight 1.
    differentiable : whether the gradients keep their graph. retain : whether the graph of the outputs is needed again.

    Raises SrdLabError where no gradient leads from the outputs to the first of ``xs``.
    """
    tops = outputs if isinstance(outputs, list) else [outputs]
    weights = signals if isinstance(signals, list) or signals is None else [signals]
    if weights is None:
        tops = [top.sum() for top in tops]
    if not any(top.requires_grad for top in tops):
        raise no_gradient()
    first, *others = torch.autograd.grad(
        tops,
        xs,
        weights,
        create_graph=differentiable,
        retain_graph=differentiable or retain,
        allow_unused=True,
    )
    if first is None:
        raise no_gradient()
    return first, *others


def no_gradient() -> Refused:
    """The refusal of a model that cuts autograd's graph."""
    return Refused(
        "no gradient leads from the model's output back to the image: it is detached on the way, runs under no_grad, or is "
        "quantised; pass the network without that, or choose a method that needs no gradient (`random`, `sobel`)"
    )


def row_of(value: Any, i: int, n: int) -> Any:
    """Image ``i``'s entry where ``value`` has one for each of ``n`` images."""
    each = isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[i : i + 1] if each and len(value) == n else value


def check_conserved(started: Tensor, arrived: Tensor, leaks: Leaks, on_leak: str, rounding: float) -> None:
    """Refuse a map with less or more relevance than it should have: an operation was taken for what it is not.

    started, arrived : relevance of N images, (N, ...). leaks : what is known not to have been passed on.
    on_leak : "error" or "warn". rounding : the share of the relevance that rounding may cost.

    Raises Leak, or warns, where their difference is more than rounding: of all images together; or of one, by more than all
    that is known to have leaked. What is not finite passes, and ``Explainer.explain`` refuses it.
    """
    started, arrived = (t.detach().reshape(len(t), -1) for t in (started, arrived))
    missing, size = (started.sum(1) - arrived.sum(1)), started.abs().sum(1) + arrived.abs().sum(1)
    together = missing.sum() - leaks.total
    alone = (missing.abs() - leaks.size).clamp_min(0)  # whose relevance leaked is not known
    shares = torch.cat([(together.abs() / size.sum())[None], alone / size])
    require(~(shares > rounding).any(), lambda: _complain(shares, on_leak))


def _complain(shares: Tensor, on_leak: str) -> None:
    said = (
        f"the relevance that arrives differs from what started by {float(2 * shares.nan_to_num().max()):.1%}, for no known "
        "reason: the model does something that the rule does not fit; use another method on it, and please report the model"
    )
    if on_leak == "error":
        raise Leak(said)
    warnings.warn(said, SrdLabWarning, stacklevel=5)  # of whoever checks
