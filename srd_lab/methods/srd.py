"""Sharing Ratio Decomposition (Han, Kim and Kwak, ICLR 2024).

A pointwise feature vector (PFV) is the vector along channels at one position. The pre-activation PFV u_j of a layer
is the sum of what the PFVs of the layer before contribute to it, u_j = sum_i vhat_ij, and PFV i takes the share
``mu_ij = <vhat_ij, u_j> / ||u_j||^2`` of its relevance (Eq. 5-8; the printed Eq. 6 divides by ||vhat_ij||, which does
not sum to 1). As one backward pass: an activation replaces its derivative by ``u R / ||u||^2`` with R = <v, G>, and
everything affine keeps its vector-Jacobian product. Biases and shifts are shared by Eq. 11. Gates, the scale of a
normalisation that depends on the input and attention weights count as constants (:mod:`srd_lab.engine.norms_and_attention`).

The pass starts at the encoder output with ``mu = relu(sum_k alpha_k A_k)``, alpha the spatial mean of the gradient of
``y_c - mean_k y_k`` (Eq. 3, 4, 9).

Example
-------
>>> SRD().explain(model, x).shape                          # (N, H, W)
torch.Size([2, 64, 64])
>>> SRD(level="high").explain(model, x, target=3).shape    # (N, H / 8, W / 8)
torch.Size([2, 8, 8])
>>> method = SRD(start="ones")
>>> torch.allclose(method.relevance(model, x)["input"], method.explain(model, x))
True
>>> torch.allclose(method.conserved(model, x) + sum(method.leaks(model, x).values()), torch.ones(2))
True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from srd_lab.catalogue import method
from srd_lab.engine import rules
from srd_lab.engine.attribution import ON_LEAK, attribution, check_conserved, row_of, slope_of
from srd_lab.engine.encoder_end import ANOTHER_ENCODER
from srd_lab.engine.srd_passes import BackwardPasses, Start
from srd_lab.engine.srd_trace import SRDTrace
from srd_lab.errors import BadInput, BadValue, Refused
from srd_lab.logits import check_target, class_logit
from srd_lab.types import Explainer

STARTS = ("contrastive", "gradcam", "ones")
UNITS = ("vector", "scalar")
VALUES = ("pre", "post")
LEAKS = ("dead fields", "constants", "other")
_RULES = {
    ("vector", "pre"): rules.srd_vector,
    ("vector", "post"): rules.srd_vector_post,
    ("scalar", "pre"): rules.srd_scalar,
    ("scalar", "post"): rules.srd_scalar_post,
}


@method(
    "srd_low",
    title="SRD, low",
    paper="Han et al. 2024",
    resolution="low",
    passes="3",
    tested="definition",
    level="low",
)
@method(
    "srd_high",
    title="SRD, high",
    paper="Han et al. 2024",
    resolution="high",
    passes="4",
    tested="definition",
    level="high",
)
@method(
    "srd", title="SRD, input", paper="Han et al. 2024", resolution="input", passes="4", tested="definition"
)
@dataclass(frozen=True)
class SRD(Explainer):
    """Sharing Ratio Decomposition.

    Every method takes a model, images x (N, C, H, W) and classes ``target``: (N,), one for all, or None for the predicted
    ones. Results are differentiable if and only if x asks for a gradient. SrdLabError is raised for models and inputs that
    cannot be explained, for options that are not known, and where the model has no such layer.

    encoder : dotted name of the submodule whose output is the encoder output, "" = the model itself, None = found
        (the last map with spatial extent before global pooling or flattening; the last tokens before one of them is
        picked or all are averaged).
    start : relevance at the encoder output: "contrastive" (Eq. 4), "gradcam" (no class mean), "ones" (section 4.3,
        class-agnostic).
    level : resolution of the map: "input"; "high" = the last activation at 1/8 of the input (28 of 224) that all of the
        relevance passes; "low" = the encoder output; or the name of an activation call or of a submodule (its last
        activation). Relevance of tokens is laid on the grid of their patches; class and register tokens keep theirs.
    unit : "vector", or "scalar" for every neuron on its own (LRP-0, no bias shares; the ablation of Fig. 7).
    values : "pre"- or "post"-activation reference vector (Fig. 7).
    on_leak : "error" or "warn" where not all relevance that started arrives, and neither rounding nor :meth:`leaks`
        explains it.
    """

    encoder: str | None = None
    start: str = "contrastive"
    level: str | int = "input"
    unit: str = "vector"
    values: str = "pre"
    on_leak: str = "error"

    squares = True  # for ``refuse_overflow``

    def __post_init__(self) -> None:
        options = {"start": STARTS, "unit": UNITS, "values": VALUES, "on_leak": ON_LEAK}
        for field, allowed in options.items():
            value = getattr(self, field)
            if not isinstance(value, str) or value not in allowed:
                raise BadValue(
                    f"SRD {field}={value!r:.40} is not known; expected one of {', '.join(allowed)}"
                )

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Signed relevance (N, h, w) at ``level``; (N, H, W) at the input; the model's output, from one forward pass."""
        with self._passes(model, x) as passes:
            if not isinstance(passes.output, Tensor):
                check_target(target, passes.output)
            start = self._start(passes, target)
            found = self._at_level(passes, start)
            if self.level in ("input", "high") and (self.unit, self.values) == ("vector", "pre"):
                check_conserved(
                    start.relevance, found, passes.leaks(start), self.on_leak, passes.trace.rounding
                )
            return found, passes.run.finish(passes.output)

    def relevance(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        start: str | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Relevance of every layer: key "input" (N, H, W) and one key per activation call of the encoder in call
        order (N, h, w), or (N, S) on tokens.

        start : overrides the start, by name or as a tensor of that shape at the encoder output.

        Input relevance refers to x, or to the normalised tensor where the model begins with a normalisation.
        The sum is the same at every cut through the network, up to what :meth:`leaks` reports.
        """
        with self._passes(model, x) as passes:
            return passes.everywhere(self._start(passes, target, start))

    def conserved(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        start: str | Tensor | None = None,
    ) -> Tensor:
        """Share (N,) of the relevance at the encoder output that arrives at the input; 0 where there was none.

        start : see :meth:`relevance`.

        1 minus this is the leak, which can have either sign; :meth:`leaks` says where it went.
        """
        with self._passes(model, x) as passes:
            begin = self._start(passes, target, start)
            return passes.run.finish(rules.divide(_total(passes.at_input(begin)), _total(begin.relevance)))

    def leaks(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        start: str | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What became of the relevance that did not arrive: shares (N,) of that at the encoder output, by cause.
        With :meth:`conserved` they sum to 1; all are 0 where the encoder output had none.

        start : see :meth:`relevance`. Not differentiable.

        dead fields : went to a vector, or to a bias whose whole receptive field is, zero.
        constants : went to what no pixel had a part in, such as a class token put among the others.
        other : all else, which is rounding. unit="scalar" and values="post" do not conserve, and show it here.
        """
        # One image at a time: inside windows, or in (S, N, D) layouts, a sum over the batch is not easily split.
        each = [
            self._leaks_of_one(model, x[i : i + 1], row_of(target, i, len(x)), row_of(start, i, len(x)))
            for i in range(len(x))
        ]
        return {cause: torch.stack([one[cause] for one in each]) for cause in LEAKS}

    def _leaks_of_one(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None, start: str | Tensor | None
    ) -> dict[str, Tensor]:
        with self._passes(model, x.detach()) as passes:
            begin = self._start(passes, target, start)
            total, arrived = begin.relevance.sum(), passes.at_input(begin).sum()
            found = passes.leaks(begin).by_cause
            leaks = {cause: found.get(cause, torch.zeros_like(total)) for cause in LEAKS[:-1]}
            leaks[LEAKS[-1]] = total - arrived - torch.stack([*leaks.values()]).sum()
            return {cause: rules.divide(amount, total).detach() for cause, amount in leaks.items()}

    def erf(
        self, model: nn.Module, x: Tensor, layer: str | int, positions: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Effective receptive fields (Eq. 1-2) of PFVs, (N, P, H, W). Each sums to 1, up to the leaks.

        layer : an activation call, by index, name, or submodule (its last).
        positions : P pairs (row, column) on its map, or (index,) on tokens.

        One backward pass per position.
        """
        if not len(positions):
            raise BadValue("no positions were given; expected pairs (row, column)")
        with self._passes(model, x) as passes:
            index = passes.trace.call_index(layer)
            starts = (passes.from_position(index, position) for position in positions)
            return torch.stack([passes.at_input(start) for start in starts], 1)

    def sharing_ratio(self, model: nn.Module, x: Tensor, source: str | int, target: str | int) -> Tensor:
        """Sharing ratios mu_{i->j} (Eq. 6) between neighbouring layers: (N, h_j, w_j, h_i, w_i), one axis instead of two on
        tokens. Entry [n, j] is a map over i; where other activations lie on paths from i to j, the sum over all (Eq. 17).

        source : the activation call of i, or "input". target : that of j, behind it; see :meth:`erf`.

        One backward pass per position of ``target``.
        """
        with self._passes(model, x) as passes:
            j = passes.trace.call_index(target)
            places = tuple(passes.trace.u[j].shape[2:])
            starts = (passes.from_position(j, position) for position in product(*map(range, places)))
            if source == "input":
                shares = [passes.at_input(start) for start in starts]
            else:
                i = passes.trace.call_index(source)
                if i >= j:
                    raise BadValue(
                        f"layer {source!r} does not come before {target!r}; swap source and target"
                    )
                shares = [passes.at_call(start, i) for start in starts]
            return torch.stack(shares, 1).unflatten(1, places)

    @contextmanager
    def _passes(self, model: nn.Module, x: Tensor) -> Iterator[BackwardPasses]:
        rule, with_bias = _RULES[self.unit, self.values], self.unit == "vector"
        with attribution(model, x, split=False) as run:
            trace = run.recording(SRDTrace(model, rule, self.encoder, with_bias=with_bias))
            trace.keeps_maps = self.level == "high"
            yield BackwardPasses(run, trace, post=self.values == "post")

    def _start(
        self, passes: BackwardPasses, target: Tensor | int | None, start: str | Tensor | None = None
    ) -> Start:
        return passes.from_encoder(_start_relevance(passes, target, self.start if start is None else start))

    def _at_level(self, passes: BackwardPasses, start: Start) -> Tensor:
        if self.level == "input":
            return passes.at_input(start)
        index = None
        if self.level == "low":
            found = passes.run.finish(start.relevance)
        elif self.level == "high":
            found = passes.at_high(start)
        else:
            index = passes.trace.call_index(self.level)
            found = passes.at_call(start, index)
        return found if self.level == "high" else passes.over_image(found, index, f"level {self.level!r}")


def _start_relevance(passes: BackwardPasses, target: Tensor | int | None, start: str | Tensor) -> Tensor:
    """Relevance (N, ...) at the positions of the encoder output (Eq. 3, 4, 9)."""
    end, logits = passes.trace.end(), passes.output
    passes.check_rows("the encoder", end.output, ANOTHER_ENCODER)
    encoded = end.output.movedim(end.channels, 1)
    shape = (encoded.shape[0], *encoded.shape[2:])
    if isinstance(start, Tensor):
        if start.shape != shape:
            raise BadInput(
                f"start must hold the relevance at the encoder output, shape {shape}, got {tuple(start.shape)}"
            )
        return start.to(encoded)
    if start == "ones":
        if target is not None and isinstance(logits, Tensor):
            check_target(target, logits)  # it has no part in the map; a wrong one is a mistake all the same
        return encoded.new_ones(shape)
    if start not in STARTS:
        raise BadValue(f"start={start!r} is not known; expected a tensor or one of {', '.join(STARTS)}")
    if logits is end.output or not isinstance(logits, Tensor) or logits.dim() != 2:
        raise Refused(
            f'start={start!r} needs class logits behind the encoder; use start="ones" or give a tensor'
        )
    score = class_logit(logits, target)
    if start == "contrastive":
        score = score - logits.mean(1)
    slope = slope_of(score, end.output, differentiable=passes.run.differentiable, retain=True)
    alpha = slope.movedim(end.channels, 1).mean([*range(2, slope.dim())], keepdim=True)
    return torch.relu((alpha * encoded).sum(1))


def _total(relevance: Tensor) -> Tensor:
    """Sum over positions, (N,)."""
    return relevance.flatten(1).sum(1)
