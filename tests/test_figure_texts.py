"""No text of a figure covers another or leaves the page, whatever is drawn: long names, one bar or many, awkward shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from srd_lab import render

NUMBERS = np.random.default_rng(0)
LONG = "smoothed(integrated_gradients?baseline=black&steps=64,0.1,64)"
NAMES = ["srd", "integrated_gradients", LONG, f"{LONG} (model resnet18, data imagenet)"]
METHODS = [f"{name}{k}" for k in range(7) for name in NAMES][:27]
ATTACKS = ["combined", "top_k", "polish", "transfer", "dissimilarity*", "mass_centre*", "black_box*"]
TITLE = "vgg16 on imagenet-s:/a/long/way/to/the/data, 200 of 12419 images, their own class explained " * 2
FILE = "holiday_2024-06-12_with-a-very-long-name_that-somebody-gave-it (copy 2) final.JPEG"
IMAGE = NUMBERS.random((3, 12, 12))
MAP = NUMBERS.normal(size=(12, 12))


def texts(figure: Figure) -> list[Text]:
    """The texts that are seen."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = {
        tick
        for own in figure.axes
        for axes in (own, *own.child_axes)
        for axis in (axes.xaxis, axes.yaxis)
        for label in [*axis.get_ticklabels(which="both")]
        if not _inside(label, axes, axis is axes.xaxis)
        for tick in [label]
    }
    return [text for text in found if text not in hidden and all(a.get_visible() for a in _axes_of(text))]


def _axes_of(text: Text) -> list:
    return [text.axes] if text.axes is not None else []


def _inside(label: Text, axes: object, across: bool) -> bool:
    low, high = sorted(axes.get_xlim() if across else axes.get_ylim())  # type: ignore[attr-defined]
    return bool(low - 1e-9 <= label.get_position()[0 if across else 1] <= high + 1e-9)


def ink(figure: Figure, text: Text) -> np.ndarray:
    """Where a text alone is drawn, bool (H, W): rotated boxes would overlap where letters do not."""
    width, height = figure.canvas.get_width_height(physical=True)
    renderer = RendererAgg(width, height, figure.dpi)
    text.draw(renderer)
    return np.asarray(renderer.buffer_rgba())[..., 3] > 0


def check(figure: Figure) -> None:
    """Draw the figure; every text lies on the page and apart from the others."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    covered = np.zeros(canvas.get_width_height(physical=True)[::-1], dtype=int)
    for k, text in enumerate(texts(figure), 1):
        box = text.get_window_extent(renderer)
        said = repr(text.get_text())
        assert page.x0 <= box.x0 and box.x1 <= page.x1, f"{said} leaves the page at the side"  # noqa: PT018
        assert page.y0 <= box.y0 and box.y1 <= page.y1, f"{said} leaves the page above or below"  # noqa: PT018
        own = ink(figure, text)
        assert own.any(), f"{said} is not drawn"
        met = set(covered[own].tolist()) - {0}
        assert not met, f"{said} covers {[texts(figure)[other - 1].get_text() for other in met]}"
        covered[own] = k


def scores(names: list[str], spread: float = 1.0) -> dict[str, dict[str, np.ndarray]]:
    return {name: {k: 1 - spread * NUMBERS.random(9) for k in ("ssim", "pcc")} for name in names}


def sheet_rows(
    count: int, names: list[str], label: str = f"{FILE}\nshark\nprobability 0.123"
) -> list[render.SheetRow]:
    return [render.SheetRow(label, IMAGE, dict.fromkeys(names, MAP), IMAGE[0] > 0.3) for _ in range(count)]


def picture_rows(count: int, height: int, width: int) -> list[render.PictureRow]:
    image, raw = NUMBERS.random((3, height, width)), NUMBERS.normal(size=(height, width))
    said = "to original: SSIM -0.31, PCC -0.42\nto target: SSIM -0.71, PCC -0.82"
    label = "great white shark, white shark, man-eater → hammerhead, hammerhead shark; by dissimilarity"
    return [render.PictureRow(label, image, image, raw, raw, raw, image, said) for _ in range(count)]


def accuracies(inputs: list[str]) -> dict[tuple[str, str], tuple[float, float, float]]:
    values = [(0.999, 0.99, 1.0), (0.1, 0.05, 0.2), (0.96, 0.94, 0.98)]
    settings = ("original", "apop", "apop_relu")
    return {(name, s): value for name in inputs for s, value in zip(settings, values, strict=True)}


def curves(names: list[str]) -> dict[str, dict[float, tuple[float, float, float]]]:
    return {name: dict.fromkeys((0.5, 1.0, 2.0, 4.0), (0.5, 0.4, 0.7)) for name in names}


def bands(names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    middle = np.linspace(1, -0.4, 20)
    return dict.fromkeys(names, (middle, middle - 0.1, middle + 0.1))


def intervals(names: list[str], count: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    near = {name: (0.91234 + k * 1e-5, 0.91, 0.914) for k, name in enumerate(names)}
    return {f"worst_local_top_k_of_the_map_{k}": near for k in range(count)}


def ranks(methods: list[str], metrics: int) -> dict[str, dict[str, float]]:
    named = [f"A metric with a long name, number {k}" for k in range(metrics)]
    return {name: {m: float(k + 1) for k, m in enumerate(methods)} for name in named}


def certificate(names: list[str]) -> Figure:
    sizes = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    some = {name: (sizes, np.linspace(1, 0.1, 5)) for name in names}
    return render.certificate_plot(some, some, 3 * 224 * 224, title=TITLE)


Case = tuple[str, Callable[[], Figure]]


def of_pictures() -> Iterator[Case]:
    """Name of a case, and what draws it."""
    shapes = {"square": (24, 24), "wide": (10, 30), "tall": (30, 10)}
    for shape, (height, width) in shapes.items():
        image, raw = NUMBERS.random((3, height, width)), NUMBERS.normal(size=(height, width))
        for how in render.OVERLAYS:
            for kind, map_ in (
                ("signed", raw),
                ("unsigned", abs(raw)),
                ("zero", 0 * raw),
                ("nan", raw * np.nan),
            ):
                yield (
                    f"explanation-{shape}-{how}-{kind}",
                    lambda i=image, m=map_, h=how: render.explanation(i, m, LONG, TITLE[:150], h),
                )
        for count in (1, 6):
            yield (
                f"picture_grid-{shape}-{count}",
                lambda n=count, h=height, w=width: render.picture_grid(picture_rows(n, h, w)),
            )
    for count, methods in ((1, ["srd"]), (1, METHODS), (3, NAMES), (30, METHODS[:3])):
        rows = sheet_rows(count, methods)
        yield (
            f"method_sheet-{count}-{len(methods)}",
            lambda r=rows: render.method_sheet(r, TITLE, "the object's outlines or boxes"),
        )
    yield "method_sheet-short", lambda: render.method_sheet(sheet_rows(1, ["s"], "a"), "t")
    yield (
        "map_sheet",
        lambda: render.map_sheet({LONG: sheet_rows(2, NAMES), "vgg16": sheet_rows(1, ["SRD"])}, TITLE),
    )
    yield "map_sheet-1", lambda: render.map_sheet({"vgg16": sheet_rows(1, ["SRD"])})


def of_scores() -> Iterator[Case]:
    """Name of a case, and what draws it."""
    for names in (["srd"], NAMES, METHODS[:12]):
        n = len(names)
        yield f"box_plots-{n}", lambda m=names: render.box_plots(scores(m, 1.8), scores(m), TITLE)
        yield f"box_plots-alone-{n}", lambda m=names: render.box_plots(scores(m))
        yield f"budget_curves-{n}", lambda m=names: render.budget_curves(curves(m), "legacy", TITLE)
        yield f"certificate-{n}", lambda m=names: certificate(m)
        yield (
            f"perturbation-{n}",
            lambda m=names: render.perturbation(
                "mse",
                np.linspace(0, 1e-3, 20),
                np.repeat([9, 5], (12, 8)),
                {"ssim": bands(m), "pcc": bands(m)},
                TITLE,
            ),
        )
        yield f"score_intervals-{n}", lambda m=names: render.score_intervals(intervals(m, 5), m[0], TITLE)
        yield f"score_intervals-one-{n}", lambda m=names: render.score_intervals(intervals(m, 1), m[0])
        yield (
            f"member_heat-{n}",
            lambda m=names: render.member_heat({n: dict.fromkeys(ATTACKS, 0.5) for n in m}, ATTACKS, TITLE),
        )
        yield (
            f"manipulation-{n}",
            lambda m=names: render.manipulation_figure(
                dict.fromkeys(m, picture_rows(1, 12, 12)), scores(m), TITLE
            ),
        )
    for methods, metrics in ((["srd"], 1), (METHODS, 15)):
        yield f"rank_chart-{metrics}", lambda m=methods, k=metrics: render.rank_chart(ranks(m, k), TITLE)


def of_accuracies() -> Iterator[Case]:
    """Name of a case, and what draws it."""
    for inputs in (["zeros"], ["zeros", "ones", "normal"]):
        yield f"apop_bars-{len(inputs)}", lambda i=inputs: render.apop_bars(accuracies(i), 0.962, 0.1, TITLE)
    for count in (1, 15, 24, 94):
        calls, values = [f"features.denseblock{k}.denselayer{k}.relu" for k in range(count)], [0.9] * count
        ends = [(0.85, 0.95)] * count
        yield (
            f"binarisation_curve-{count}",
            lambda c=calls, v=values, e=ends: render.binarisation_curve(c, v, 0.96, 0.1, TITLE, e),
        )
    for count in (1, 8):
        panels = {f"wide_resnet50_2_with_gelu_{k}": ([0.9] * 50, 0.96) for k in range(count)}
        yield f"binarisation_panels-{count}", lambda p=panels: render.binarisation_panels(p, 0.001, TITLE)


CASES = dict((*of_pictures(), *of_scores(), *of_accuracies()))


@pytest.mark.parametrize("case", CASES)
def test_texts_are_apart_and_on_the_page(case: str) -> None:
    check(CASES[case]())


def test_what_covers_another_text_or_leaves_the_page_is_noticed() -> None:
    figure = Figure(figsize=(2, 2))
    figure.text(0.5, 0.5, "here")
    check(figure)
    other = figure.text(0.5, 0.5, "there")
    with pytest.raises(AssertionError, match="'there' covers"):
        check(figure)
    other.set_position((0.9, 0.2))
    with pytest.raises(AssertionError, match="'there' leaves the page at the side"):
        check(figure)


def test_names_of_columns_stand_upright_in_lines_where_they_fit() -> None:
    wide = render.method_sheet(sheet_rows(1, ["SRD, input: ring", "Grad-CAM: star"]), "t")
    names = [text for text in wide.texts if ":" in text.get_text() and "ring" in text.get_text()]
    assert [text.get_rotation() for text in names] == [0]
    slanted = render.method_sheet(sheet_rows(1, NAMES), "t")
    assert {text.get_rotation() for text in slanted.texts} == {0, 35}


def test_panels_of_one_kind_of_score_have_one_axis() -> None:
    found = {
        "worst PCC": {"a": (0.5, 0.4, 0.6), "b": (0.0, -0.1, 0.1)},
        "noise PCC": {"a": (0.99, 0.98, 1.0), "b": (1.0, 1.0, 1.0)},
        "sparseness": {"a": (0.3, 0.2, 0.4), "b": (0.3, 0.2, 0.4)},
    }
    worst, noise, other = render.score_intervals(found, "a").axes[:3]
    assert worst.get_xlim() == noise.get_xlim()
    assert other.get_xlim()[0] > worst.get_xlim()[0]


def test_every_figure_function_is_tried() -> None:
    """A function that returns a figure has cases above, or is no figure function."""
    drawing = {
        name
        for name in render.__all__
        if getattr(getattr(render, name), "__annotations__", {}).get("return") == "Figure"
    }
    tried = " ".join(CASES)
    aliases = {"certificate_plot": "certificate", "manipulation_figure": "manipulation"}
    missing = [name for name in drawing if aliases.get(name, name) not in tried]
    assert len(drawing) > 10
    assert not missing


def test_nothing_crosses_the_numbers_below_the_bars() -> None:
    figure = render.apop_bars(accuracies(["zeros", "ones"]), 0.962, 0.0)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    numbers = [text.get_window_extent() for text in axes.texts]
    assert len(numbers) == 6
    assert all(a.x1 < b.x0 for a, b in pairwise(sorted(numbers, key=lambda box: box.x0)))
    assert max(box.y1 for box in numbers) < axes.get_window_extent().y0, "bars and lines end at the axis"
    assert [text.get_text() for text in axes.texts][:2] == ["99.9", "99.9"]
