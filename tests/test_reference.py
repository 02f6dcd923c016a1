"""The slow oracle, checked against loops, identities and the outputs of the authors' published code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor

DATA = Path(__file__).parent / "data"
GRAPHS = ref.toy_graphs()
ALIVE = [name for name in GRAPHS if name != "dead_field"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are so small that threads cost more than they bring, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def authors_graph(data: dict[str, np.ndarray]) -> ref.Graph:
    """Their net up to the last ReLU; layers carry their index in the published layer list."""
    steps: list[ref.Step] = []
    last, index, conv = ref.INPUT, 0, 0
    for entry in data["cfg"][:-1]:
        if entry == "M":
            steps.append(ref.MaxPool(f"pool_{index}", last))
            index += 1
        else:
            weight, bias = (torch.from_numpy(data[f"conv{conv}.{part}"]) for part in ("weight", "bias"))
            steps.append(ref.Conv(f"conv_{index}", last, weight, bias, padding=1))
            steps.append(ref.Activation(f"relu_{index + 1}", f"conv_{index}"))
            index, conv = index + 2, conv + 1
        last = steps[-1].name
    return ref.Graph(data["x"].shape[1:], tuple(steps))


def authors_pairs(name: str) -> list[tuple[str, Tensor, Tensor]]:
    """(key, published, ours) for every image and layer."""
    data = dict(np.load(DATA / f"{name}.npz"))
    graph = authors_graph(data)
    pairs = []
    for x, start, image in zip(data["x"], data["start"], range(len(data["x"])), strict=True):
        relevance = ref.srd(graph, torch.from_numpy(x), torch.from_numpy(start))
        published = {key: data[key][image] for key in data if key.startswith("relu_")}
        published[ref.INPUT] = data["input_relevance"][image]
        assert set(published) == set(relevance) - {graph.output}
        pairs += [(key, torch.from_numpy(value), relevance[key]) for key, value in published.items()]
    return pairs


def test_equals_the_authors_code_without_bias() -> None:
    for _, published, ours in authors_pairs("authors_srd_nobias"):
        torch.testing.assert_close(ours, published, rtol=0, atol=1e-9)


def test_is_close_to_the_authors_code_with_bias() -> None:
    """They share biases by ||w x_i||, the paper by ||x_i||: other numbers, nearly the same maps."""
    for _, published, ours in authors_pairs("authors_srd_bias"):
        correlation = torch.corrcoef(torch.stack([published.flatten(), ours.flatten()]))[0, 1]
        assert correlation > 0.999
        close(ours.sum(), published.sum(), 1e-9)
        assert (ours - published).abs().max() > 1e-6


@pytest.mark.parametrize("name", GRAPHS)
def test_contributions_sum_to_the_target(name: str) -> None:
    graph = GRAPHS[name]
    x = ref.toy_input(graph)
    tensors = ref.forward(graph, x)
    unshared = ref.unshared(graph, x)
    for target, parts in ref.contributions(graph, x).items():
        step = graph.step(target)
        u = tensors[step.source if isinstance(step, ref.Activation) else target]
        total = sum((part.sum(0) for part in parts.values()), torch.zeros_like(u))
        alive = unshared[target].abs() < 1e-10
        close(total * alive, u * alive)
        if name in ALIVE:
            assert alive.all()


@pytest.mark.parametrize("name", ref.SEQUENTIAL)
def test_every_layer_of_a_sequential_net_holds_all_relevance(name: str) -> None:
    graph = GRAPHS[name]
    start = ref.toy_start(graph)
    for relevance in ref.srd(graph, ref.toy_input(graph), start).values():
        close(relevance.sum(), start.sum())


@pytest.mark.parametrize("name", ALIVE)
def test_ratios_to_post_activations_sum_to_one(name: str) -> None:
    """<u, v> = ||v||^2 behind a ReLU; only a position that is off altogether cannot share its relevance."""
    graph = GRAPHS[name]
    x = ref.toy_input(graph)
    tensors = ref.forward(graph, x)
    for target, rest in ref.unshared(graph, x, values="post").items():
        close(rest, (tensors[target] == 0).all(0).double())


@pytest.mark.parametrize("name", GRAPHS)
def test_relevance_is_conserved_over_every_cut(name: str) -> None:
    """What crosses from layers up to k to targets behind k, and what these absorbed, is all of the start."""
    graph = GRAPHS[name]
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    relevance = ref.srd(graph, x, start)
    received = {**relevance, graph.output: start}
    absorbed = ref.unshared(graph, x)
    ratios = ref.all_ratios(graph, x)
    for k in range(len(graph.layers)):
        early = graph.layers[: k + 1]
        late = [target for target in graph.targets if target not in early]
        if not late:
            continue
        crossing = torch.zeros((), dtype=torch.float64)
        for target in late:
            crossing += (absorbed[target] * received[target]).sum()
            for layer, ratio in ratios[target].items():
                if layer in early:
                    crossing += (ratio @ received[target].flatten()).sum()
        close(crossing, start.sum())
    if name in ALIVE:
        close(relevance[ref.INPUT].sum(), start.sum())
    else:
        assert absorbed["relu2"].max() == 1  # a field without a single active neuron keeps its bias to itself
        assert all(torch.isfinite(r).all() for r in relevance.values())
        assert (relevance[ref.INPUT].sum() - start.sum()).abs() > 1e-3


@pytest.mark.parametrize("unit", ["vector", "scalar"])
@pytest.mark.parametrize("values", ["pre", "post"])
@pytest.mark.parametrize("name", ["residual", "preactivation"])
def test_relevance_of_every_layer_is_returned_in_call_order(
    name: str, values: ref.Values, unit: ref.Unit
) -> None:
    """residual ends in an activation, which holds the start; preactivation in a pool, which is no layer."""
    graph = GRAPHS[name]
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    tensors = ref.forward(graph, x)
    relevance = ref.srd(graph, x, start, unit=unit, values=values)
    assert list(relevance) == [ref.INPUT, *graph.activations]
    for layer, r in relevance.items():
        assert r.shape == tensors[layer].shape[1:]
        assert torch.isfinite(r).all()
    if name == "residual":
        assert torch.equal(relevance[graph.output], start)


@pytest.mark.parametrize("name", GRAPHS)
def test_forward_equals_backward(name: str) -> None:
    graph = GRAPHS[name]
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    relevance = ref.srd(graph, x, start)
    fields = ref.forward_erfs(graph, x)
    close(torch.einsum("p,phw->hw", start.flatten(), fields[graph.output]), relevance[ref.INPUT])
    for layer in graph.layers:
        ratios = ref.sharing_ratios(graph, x, layer, graph.output, paths="all")
        close((ratios @ start.flatten()).reshape(relevance[layer].shape), relevance[layer])
    # One position of a middle layer: its ERF is the input map of the net cut off there.
    middle = graph.activations[1]
    shorter = graph.until(middle)
    one = torch.zeros_like(relevance[middle])
    one[1, 1] = 1
    close(fields[middle].reshape(*one.shape, *x.shape[1:])[1, 1], ref.srd(shorter, x, one)[ref.INPUT])


def test_bias_shares_equal_eq_11_in_loops() -> None:
    """One convolution on the input, every index written out: stride, padding, dilation, groups."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, 3, 2, generator=random, dtype=torch.float64)
    bias = torch.randn(6, generator=random, dtype=torch.float64)
    step = ref.Conv("conv", ref.INPUT, weight, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    graph = ref.Graph((4, 6, 7), (step,))
    x = ref.toy_input(graph)
    x[:, 2, 3] = 0
    parts = ref.contributions(graph, x)["conv"][ref.INPUT]
    expected = torch.zeros_like(parts)
    _, height, width = parts.shape[1:]
    for row in range(height):
        for column in range(width):
            field = []
            for a in range(3):
                for b in range(2):
                    y, z = 2 * row + a - 1, column + 2 * b - 2
                    if 0 <= y < 6 and 0 <= z < 7:
                        field.append((a, b, y, z))
            norms = sum(x[:, y, z].norm() for _, _, y, z in field)
            for a, b, y, z in field:
                for out in range(6):
                    group = slice(0, 2) if out < 3 else slice(2, 4)
                    linear = weight[out, :, a, b] @ x[group, y, z]
                    share = bias[out] * x[:, y, z].norm() / norms
                    expected[y * 7 + z, out, row, column] = linear + share
    close(parts, expected)
    close(parts.sum(0), ref.forward(graph, x)["conv"])


def test_batch_norm_behind_a_convolution_is_one_convolution() -> None:
    graph = GRAPHS["residual"]
    steps: list[ref.Step] = []
    for step in graph.steps:
        if isinstance(step, ref.BatchNorm):
            conv = steps.pop()
            assert isinstance(conv, ref.Conv)
            bias = torch.zeros_like(step.shift) if conv.bias is None else conv.bias
            weight = conv.weight * step.scale[:, None, None, None]
            folded = step.scale * bias + step.shift
            steps.append(
                ref.Conv(step.name, conv.source, weight, folded, conv.stride, conv.padding, conv.dilation)
            )
        else:
            steps.append(step)
    plain = ref.Graph(graph.input_shape, tuple(steps))
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    expected = ref.srd(plain, x, start)
    for layer, relevance in ref.srd(graph, x, start).items():
        close(relevance, expected[layer])


def test_batch_norm_by_itself_keeps_its_shift_at_its_position() -> None:
    """As a 1x1 convolution on the same PFVs would."""
    graph = GRAPHS["dense"]
    steps: list[ref.Step] = []
    for step in graph.steps:
        if isinstance(step, ref.BatchNorm) and not step.source.startswith("conv"):
            steps.append(ref.Conv(step.name, step.source, step.scale.diag()[:, :, None, None], step.shift))
        else:
            steps.append(step)
    pointwise = ref.Graph(graph.input_shape, tuple(steps))
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    expected = ref.srd(pointwise, x, start)
    for layer, relevance in ref.srd(graph, x, start).items():
        close(relevance, expected[layer])


@pytest.mark.parametrize("kind", ["leaky_relu", "elu", "silu", "gelu", "tanh", "softplus"])
def test_other_activations_conserve_too(kind: str) -> None:
    graph = ref.with_activation(GRAPHS["residual"], kind, beta=3.0)
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    close(ref.srd(graph, x, start)[ref.INPUT].sum(), start.sum())


def test_neurons_without_bias_give_gradient_times_input() -> None:
    """LRP-0 of a bias-free ReLU net is gradient times input, for the signal the start injects."""
    graph = GRAPHS["vgg_nobias"]
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    relevance = ref.srd(graph, x, start, unit="scalar")
    leaf = x.clone().requires_grad_(True)
    p = ref.forward(graph, leaf)[graph.output]
    signal = (p * start / (p**2).sum(0)).detach()
    (gradient,) = torch.autograd.grad((p * signal).sum(), leaf)
    close(relevance[ref.INPUT], (x * gradient).sum(0))
    for layer in relevance.values():
        close(layer.sum(), start.sum())
    vectors = ref.srd(graph, x, start)[ref.INPUT]
    assert (relevance[ref.INPUT] - vectors).abs().max() > 1e-3


def test_post_activation_reference_differs_from_the_default() -> None:
    graph = GRAPHS["vgg_nobias"]
    x, start = ref.toy_input(graph), ref.toy_start(graph)
    default, other = (ref.srd(graph, x, start, values=values)[ref.INPUT] for values in ("pre", "post"))
    assert (default - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("style", ["modules", "shared_inplace", "functional"])
def test_module_computes_the_graph(name: str, style: ref.Style) -> None:
    graph = GRAPHS[name]
    encoder, full = ref.as_module(graph, style), ref.with_head(graph, "mlp")
    images = torch.stack([ref.toy_input(graph, seed) for seed in range(2)])
    kept = images.clone()
    expected = torch.stack([ref.forward(graph, image)[graph.output] for image in images])
    close(encoder(images), expected)
    classifier = ref.as_module(full, style)
    close(classifier.encode(images, graph.output), expected)
    close(classifier.head(expected, graph.output), classifier(images))
    close(classifier(images)[0], ref.forward(full, images[0])["logits"])
    close(images, kept, 0)
    assert not any(p.requires_grad for p in classifier.parameters())
    relus = [module for module in encoder.modules() if isinstance(module, torch.nn.ReLU)]
    assert len(relus) == {"modules": len(graph.activations), "shared_inplace": 1, "functional": 0}[style]
    # Overwriting must not break the ordinary gradient.
    gradients = []
    for network in (classifier, ref.as_module(full, "modules")):
        leaf = images.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad(network(leaf).sum(), leaf)[0])
    close(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", ["leaky_relu", "elu", "silu", "gelu", "tanh", "softplus"])
def test_module_has_every_activation(kind: str) -> None:
    graph = ref.with_activation(GRAPHS["conv_read_twice"], kind, beta=2.0)
    x = ref.toy_input(graph)
    for style in ("modules", "shared_inplace", "functional"):
        close(ref.as_module(graph, style)(x[None])[0], ref.forward(graph, x)[graph.output])


def bounds(graph: ref.Graph) -> tuple[Tensor, Tensor]:
    channels = graph.input_shape[0]
    spread = torch.linspace(4, 5, channels, dtype=torch.float64)[:, None, None]
    return -spread, spread + 0.5


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("head", "kind"), [("gap", "relu"), ("mlp", "relu"), ("gap", "softplus")])
def test_zplus_keeps_the_logit_and_its_sign(name: str, head: Literal["gap", "mlp"], kind: str) -> None:
    graph = ref.with_activation(ref.with_head(GRAPHS[name], head), kind, beta=5.0)
    x = ref.toy_input(graph)
    tensors = ref.forward(graph, x)
    logits = tensors["logits"]
    target = int(logits.argmax())
    relevance = ref.lrp_zplus(graph, x, target, *bounds(graph))
    # A neuron that nothing but its bias makes active has no one to pass its relevance to.
    absorbed = torch.zeros((), dtype=torch.float64)
    for name_of, parts in ref.affine_matrices(graph, x, positive=True).items():
        if name_of == "logits":
            continue
        if ref.INPUT not in parts:
            received = sum(tensors[k].flatten() @ matrix for k, matrix in parts.items())
            absorbed += relevance[name_of].flatten()[received == 0].sum()
    sign = logits[target].sign()
    assert all((r * sign >= -1e-12).all() for r in relevance.values())
    close(relevance[ref.INPUT].sum() + absorbed, logits[target], 1e-9)
    assert relevance[ref.INPUT].abs().max() > 0


def test_zplus_written_out() -> None:
    """Two layers, every sum in loops; both layers have positive and negative weights and biases."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    w1, w2, w3 = draw(4, 6), draw(3, 4), draw(2, 3)
    graph = ref.Graph(
        (6, 1, 1),
        (
            ref.Conv("conv1", ref.INPUT, w1[:, :, None, None], draw(4)),
            ref.Activation("relu1", "conv1"),
            ref.Flatten("flat", "relu1"),
            ref.Linear("fc", "flat", w2, draw(3)),
            ref.Activation("relu2", "fc"),
            ref.Linear("logits", "relu2", w3, draw(2)),
        ),
    )
    x = draw(6, 1, 1)
    low, high = bounds(graph)
    tensors = ref.forward(graph, x)
    got = ref.lrp_zplus(graph, x, 1, low, high)

    def plus(w: float) -> float:
        return max(w, 0.0)

    def share(values: list[float], weights: Tensor, received: list[float]) -> list[float]:
        out = [0.0] * len(values)
        for j, r in enumerate(received):
            total = sum(v * plus(float(weights[j, i])) for i, v in enumerate(values))
            for i, v in enumerate(values):
                out[i] += v * plus(float(weights[j, i])) / total * r if total > 0 else 0.0
        return out

    r2 = share(tensors["relu2"].tolist(), w3, [0.0, float(tensors["logits"][1])])
    r1 = share(tensors["relu1"].flatten().tolist(), w2, r2)
    r0 = [0.0] * 6
    for j in range(4):
        terms = []
        for i in range(6):
            w, lo, hi = float(w1[j, i]), float(low[i, 0, 0]), float(high[i, 0, 0])
            terms.append(float(x[i, 0, 0]) * w - lo * plus(w) + hi * plus(-w))
        for i in range(6):
            r0[i] += terms[i] / sum(terms) * r1[j]
    assert max(map(abs, r0)) > 0
    for layer, expected in (("relu2", r2), ("relu1", r1), (ref.INPUT, r0)):
        close(got[layer].flatten(), torch.tensor(expected, dtype=torch.float64))


def test_positive_parts_are_taken_per_layer() -> None:
    graph = ref.with_head(GRAPHS["conv_conv"], "gap")
    x = ref.toy_input(graph)
    exact, positive = ref.affine_matrices(graph, x), ref.affine_matrices(graph, x, positive=True)
    # One convolution between two activations: the matrix's own positive part; two: something else.
    close(positive["relu3"]["relu2"], exact["relu3"]["relu2"].clamp(min=0))
    difference = positive["relu2"]["relu1"] - exact["relu2"]["relu1"].clamp(min=0)
    assert difference.abs().max() > 1e-3


def test_zplus_refuses_negative_activations() -> None:
    graph = ref.with_head(ref.with_activation(GRAPHS["vgg_bias"], "tanh"), "gap")
    with pytest.raises(ValueError, match="never negative"):
        ref.lrp_zplus(graph, ref.toy_input(graph), 0, *bounds(graph))


def test_integrated_gradients_are_complete() -> None:
    graph = ref.with_head(ref.with_activation(GRAPHS["vgg_bias"], "softplus", 2.0), "gap")
    network, x = ref.as_module(graph), ref.toy_input(graph)
    baseline = 0.1 * ref.toy_input(graph, seed=5)
    gap = (network(x[None]) - network(baseline[None]))[0, 2]
    tolerances: dict[ref.Rule, float] = {"midpoint": 0.01, "trapezoid": 0.01, "left": 0.2, "right": 0.2}
    for rule, tolerance in tolerances.items():
        total = ref.integrated_gradients(network, x, 2, baseline=baseline, steps=30, rule=rule).sum()
        assert abs(total - gap) < tolerance * max(1.0, abs(gap)), rule
    # On a linear model one step is exact, whichever the rule.
    weight = torch.arange(24, dtype=torch.float64).reshape(2, 12)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 2, 2)
    for rule in tolerances:
        got = ref.integrated_gradients(lambda a: F.linear(a.flatten(1), weight), x, 1, steps=1, rule=rule)
        close(got, x * weight[1].reshape(x.shape))


@pytest.mark.parametrize("head", ["gap", "mlp"])
def test_contrastive_start_is_the_gradcam_of_the_logit_minus_the_mean(head: Literal["gap", "mlp"]) -> None:
    graph = GRAPHS["vgg_bias"]
    full = ref.as_module(ref.with_head(graph, head))
    features = ref.forward(graph, ref.toy_input(graph))[graph.output]

    def rest(a: Tensor) -> Tensor:
        return full.head(a, graph.output)

    positive = 0
    for target in range(5):
        leaf = features[None].clone().requires_grad_(True)
        y = rest(leaf)[0]
        (gradient,) = torch.autograd.grad(y[target] - y.mean(), leaf)
        expected = (gradient.mean(dim=(2, 3), keepdim=True) * leaf.detach()).sum(1)[0].clamp(min=0)
        start = ref.gradcam_start(features, rest, target)
        close(start, expected)
        positive += int(start.max() > 0)
        without_mean = ref.gradcam_start(features, rest, target, mode="gradcam")
        assert start.max() == 0 or (start - without_mean).abs().max() > 1e-6
    assert positive > 0
