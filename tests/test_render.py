"""Figures have the parts that their docstrings promise, for every size that the commands make."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from srd_lab import render
from srd_lab.render import PictureRow, pictures

METHODS = ["srd", "gradient", "grad_input", "guided_backprop", "integrated_gradients", "lrp_zplus"]


def png(figure: Figure) -> np.ndarray:
    """The figure's pixels (H, W, 3), drawn as a file would be; a warning from the layout is an error."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def check_nothing_clipped(figure: Figure) -> None:
    """The outermost pixels are all white: no text or box runs out of the figure."""
    pixels = png(figure)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def rows(n: int, height: int = 16, width: int = 16, with_target: bool = True) -> list[PictureRow]:
    numbers = np.random.default_rng(0)
    image = numbers.random((3, height, width))
    raw = numbers.normal(size=(height, width))
    target = torch.rand(3, height, width) if with_target else None
    moved = torch.from_numpy(image + 0.008)
    scores = "to original: SSIM 0.31, PCC 0.42\nto target: SSIM 0.71, PCC -0.82"
    label = "pair 12 golden retriever → school bus, costs $5 or $6"
    return [PictureRow(label, image, moved, raw, -raw, 0 * raw, target, scores) for _ in range(n)]


def scores(methods: list[str], low: float = 0.2) -> dict[str, dict[str, np.ndarray]]:
    numbers = np.random.default_rng(1)
    return {
        name: {"ssim": numbers.uniform(0.2, 1, 30), "pcc": numbers.uniform(low, 1, 30)} for name in methods
    }


def test_heat_endpoints_and_shape() -> None:
    from matplotlib import colormaps

    colours = render.heat(np.array([[0.0, 1.0, -3.0, 7.0, 0.5]]))
    ends = [np.round(255 * np.array(colormaps["inferno"](end)[:3])) for end in (0.0, 1.0)]
    assert colours.shape == (1, 5, 3)
    assert colours.dtype == np.uint8
    assert (colours[0, [0, 2]] == ends[0]).all()
    assert (colours[0, [1, 3]] == ends[1]).all()
    assert len(np.unique(colours[0], axis=0)) == 3


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ([-2.0, 1.0, 0.0], [1.0, 0.5, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([3.0, 3.0, 3.0], [1.0, 1.0, 1.0]),
        ([np.nan, 2.0, np.inf], [0.0, 1.0, 0.0]),
    ],
)
def test_strength_of_signed_zero_constant_and_broken_maps(raw: list[float], shown: list[float]) -> None:
    assert render.strength(np.array([raw])).tolist() == [shown]


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("with_target", [True, False])
def test_picture_grid_columns_and_texts(n: int, with_target: bool) -> None:
    figure = render.picture_grid(rows(n, with_target=with_target))
    pictures = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title() for axes in pictures if axes.get_title()]
    columns = 6 + with_target
    assert len(pictures) == columns * n
    assert titles[:3] == ["original", "adversarial", "difference × 50\n(grey = none)"]
    assert len(titles) == columns
    assert sum("SSIM 0.31" in axes.get_xlabel() for axes in pictures) == n
    assert sum("golden" in text.get_text() for text in figure.texts) == n
    check_nothing_clipped(figure)


def test_picture_grid_without_an_aim_has_five_columns() -> None:
    figure = render.picture_grid(
        [replace(row, map_target=None, scores="PCC -0.12\nSSIM 0.31") for row in rows(2, with_target=False)]
    )
    assert len([axes for axes in figure.axes if axes.images]) == 10
    check_nothing_clipped(figure)


def test_picture_grid_keeps_the_shape_of_wide_images_and_shows_no_change_as_grey() -> None:
    row = rows(1, height=20, width=40)[0]
    same = PictureRow("same", row.original, row.original, row.map_original, row.map_original, row.map_target)
    figure = render.picture_grid([same])
    difference = figure.axes[2]
    box = difference.get_window_extent()
    assert box.width / box.height == pytest.approx(2)
    assert "× 1\n" in difference.get_title()
    assert np.all(np.asarray(difference.images[0].get_array()) == 0.5)


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.0, 1), (0.5, 1), (0.9, 1), (0.25, 2), (0.01, 50), (1e-6, 1000)]
)
def test_magnification_never_clips(largest: float, factor: int) -> None:
    assert pictures._magnification(largest) == factor


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("with_control", [True, False])
def test_box_plots(count: int, with_control: bool) -> None:
    methods = METHODS[:count]
    control = scores(methods) if with_control else None
    title = "SSIM and PCC between the maps of the original and of the adversarial image, 100 pairs, vgg16"
    figure = render.box_plots(scores(methods), control, title)
    assert [axes.get_ylabel() for axes in figure.axes] == ["SSIM", "PCC"]
    for axes in figure.axes:
        assert sum(isinstance(patch, PathPatch) for patch in axes.patches) == count * (1 + with_control)
        shown = [text.get_text().replace("\n", "") for text in axes.get_xticklabels()]
        assert shown == methods
        assert axes.get_ylim() == pytest.approx((-0.02, 1.02))
    (legend,) = figure.legends
    assert "middle half" in legend.get_title().get_text().replace("\n", " ")
    check_nothing_clipped(figure)


def test_box_plots_show_negative_correlation_and_leave_nan_out() -> None:
    values = scores(["srd"], low=-0.75)
    values["srd"]["pcc"][:5] = np.nan
    ssim, pcc = render.box_plots(values).axes
    assert ssim.get_ylim()[0] == pytest.approx(-0.02)
    assert pcc.get_ylim()[0] < values["srd"]["pcc"][5:].min()
    assert len(np.asarray(pcc.collections[0].get_offsets())) == 25


def test_box_plots_are_the_same_each_time() -> None:
    first, second = (png(render.box_plots(scores(METHODS[:2]))) for _ in range(2))
    assert (first == second).all()


def test_box_plots_of_nothing_finite() -> None:
    check_nothing_clipped(render.box_plots({"srd": {"ssim": np.array([np.nan]), "pcc": np.array([])}}))


def test_member_heat_has_a_cell_for_every_attack_that_ran() -> None:
    reached = {"srd": {"S": 0.4, "P": 0.31, "U*": 0.5}, "sobel": {"S": 0.98}}
    figure = render.member_heat(reached, ["S", "P", "U*"], "vgg16 on scenes")
    (axes,) = figure.axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "0.40", (1, 0): "0.31", (2, 0): "0.50", (0, 1): "0.98"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["S", "P", "U*"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["srd", "sobel"]
    (legend,) = figure.legends
    assert "* on the first images only" in legend.get_title().get_text().replace("\n", " ")
    check_nothing_clipped(figure)


def test_budget_curves_have_the_interval_as_their_band() -> None:
    curves = {"srd": {0.5: (0.85, 0.8, 0.9), 1.0: (0.6, 0.5, 0.7), 2.0: (0.4, 0.3, 0.5)}}
    figure = render.budget_curves(curves, "l2", "vgg16 on scenes")
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "srd"]
    np.testing.assert_allclose(line.get_xydata(), [[0.5, 0.85], [1, 0.6], [2, 0.4]])
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {(1.0, 0.5), (1.0, 0.7)} <= set(map(tuple, np.asarray(corners).tolist()))
    check_nothing_clipped(figure)


@pytest.mark.parametrize("inputs", [["zeros"], ["zeros", "ones", "normal"]])
def test_apop_bars(inputs: list[str]) -> None:
    settings = ("original", "apop", "apop_relu")
    table = {
        (name, setting): (0.25 * (k + 1), 0.25 * k, 0.25 * k + 0.3)
        for name in inputs
        for k, setting in enumerate(settings)
    }
    figure = render.apop_bars(table, 0.962, 0.1, "APOP, vgg16 on scenes")
    axes = figure.axes[0]
    assert [round(bar.get_height(), 2) for bar in axes.patches] == [0.25] * len(inputs) + [0.5] * len(
        inputs
    ) + [0.75] * len(inputs)
    ends = [tuple(line[:, 1]) for bars in axes.collections for line in bars.get_segments()]  # type: ignore[attr-defined]
    assert ends == [table[name, setting][1:] for setting in settings for name in inputs]
    assert [text.get_text() for text in axes.get_xticklabels()] == inputs
    assert "95 % Wilson interval" in figure.legends[0].get_title().get_text().replace("\n", " ")
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"ordinary pass", "APOP", "APOP & ReLU", "real images (96.2 %)", "chance (10.0 %)"}
    check_nothing_clipped(figure)


@pytest.mark.parametrize("count", [1, 15, 94])
def test_binarisation_curve(count: int) -> None:
    names = [f"features.denseblock.{i}" for i in range(count)]
    figure = render.binarisation_curve(names, list(np.linspace(0.1, 1, count)), 0.96, 0.1, "Binarised, vgg16")
    axes = figure.axes[0]
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == list(range(1, count + 1))
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert (shown == names) == (count <= 24)
    assert "order" in axes.get_xlabel()
    check_nothing_clipped(figure)


@pytest.mark.parametrize("over", ["mse", "linf"])
def test_perturbation_has_a_line_per_method_and_the_number_of_pairs(over: str) -> None:
    reached, pairs = np.linspace(0, 1e-3, 25), np.repeat([9, 5], (20, 5))
    median = np.linspace(1, 0.2, 25)
    bands = dict.fromkeys(METHODS, (median, median - 0.1, median + 0.1))
    figure = render.perturbation(over, reached, pairs, {"ssim": bands, "pcc": bands}, "vgg16, 9 pairs")
    ssim, pcc, below, _ = figure.axes
    for axes, label in ((ssim, "SSIM"), (pcc, "PCC")):
        assert [line.get_label() for line in axes.lines] == METHODS
        assert axes.get_ylabel() == label
    assert ("MSE" in below.get_xlabel()) == (over == "mse")
    assert below.lines[0].get_ydata().tolist() == pairs.tolist()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == METHODS
    check_nothing_clipped(figure)


def test_binarisation_draws_the_intervals_that_it_is_given() -> None:
    ends = [(0.4, 0.6), (0.7, 0.9)]
    figure = render.binarisation_curve(["a", "b"], [0.5, 0.8], 0.9, 0.1, ends=ends)
    (bars,) = figure.axes[0].collections
    assert [tuple(line[:, 1]) for line in bars.get_segments()] == ends  # type: ignore[attr-defined]
    without = render.binarisation_curve(["a", "b"], [0.5, 0.8], 0.9, 0.1)
    assert not without.axes[0].collections
    assert "Wilson" not in without.legends[0].get_title().get_text()


def test_perturbation_of_no_change_at_all() -> None:
    zero = np.zeros(3)
    bands = {"ssim": {"srd": (zero + 1, zero + 1, zero + 1)}}
    check_nothing_clipped(render.perturbation("mse", zero, zero.astype(int) + 2, bands))


@pytest.mark.parametrize("methods", [METHODS, ["srd"]])
def test_manipulation_figure_shows_three_maps_and_a_box_per_method(methods: list[str]) -> None:
    shown = {method: rows(2) for method in methods}
    figure = render.manipulation_figure(shown, scores(methods), "vgg16 on scenes, 30 pairs")
    pictures_, panels = figure.axes[:-2], figure.axes[-2:]
    assert len(pictures_) == 3 * (1 + len(methods))
    assert all(axes.images for axes in pictures_)
    for axes, name in zip(panels, ("SSIM", "PCC"), strict=True):
        assert axes.get_ylabel() == name
        assert len([patch for patch in axes.patches if isinstance(patch, PathPatch)]) == len(methods)
    check_nothing_clipped(figure)


def test_map_sheet_scales_each_map_by_itself() -> None:
    numbers = np.random.default_rng(0)
    raw = numbers.normal(size=(8, 8))
    sheet = [
        render.SheetRow("n0/image.JPEG", numbers.random((3, 8, 8)), {"scalar": 7 * raw, "SRD": 0 * raw})
    ] * 2
    figure = render.map_sheet({"resnet50": sheet, "vgg16": sheet[:1]}, "Fig. 7")
    scalar, srd = (figure.axes[i].images[0].get_array() for i in (1, 2))
    np.testing.assert_allclose(scalar, np.clip(raw / np.quantile(np.abs(raw), 0.995), -1, 1))
    assert not np.any(srd)
    assert any("resnet50" in text.get_text() and "image" in text.get_text() for text in figure.texts)
    check_nothing_clipped(figure)


def test_binarisation_panels_have_a_curve_per_network() -> None:
    panels = {"vgg16": ([0.5, 0.6, 0.7], 0.9), "resnet18": ([0.1] * 17, 0.8)}
    figure = render.binarisation_panels(panels, 0.001, "Fig. 6")
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert [len(axes.lines[0].get_ydata()) for axes in figure.axes] == [3, 17]
    check_nothing_clipped(figure)


def test_import_is_lazy_and_drawing_leaves_no_global_state() -> None:
    code = """
import sys, srd_lab.render
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams["font.size"]
srd_lab.render.apop_bars({("zeros", "apop"): (0.5, 0.4, 0.6)}, 1, 0.1).savefig("/dev/null", format="png")
assert matplotlib.rcParams["font.size"] == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_sheet_has_a_column_per_method_and_signed_colours() -> None:
    up = np.zeros((8, 8))
    up[:, :4], up[:, 4:] = 1.0, -1.0
    names = [f"A method's long name {k}" for k in range(3)]
    rows = [render.SheetRow("great white shark, or so", np.zeros((3, 8, 8)), dict.fromkeys(names, up))] * 2
    figure = render.method_sheet(rows, "resnet18 on imagenet")
    check_nothing_clipped(figure)
    pictures = [axes.images[0] for axes in figure.axes]
    assert len(pictures) == 2 * (1 + 3) + 1, "the last is the scale"
    for picture in pictures[1:4]:
        shown = picture.cmap(picture.norm(np.asarray(picture.get_array())))
        assert (shown[:, 0, 0] > shown[:, 0, 2]).all()  # red where positive
        assert (shown[:, 7, 2] > shown[:, 7, 0]).all()  # blue where negative
    assert {text.get_text() for text in figure.texts} >= {"image", *names}


def test_a_method_sheet_leaves_white_what_a_row_lacks_and_clips_no_name() -> None:
    up = np.ones((8, 8))
    names = [
        "Guided Backprop: a class with a name of many, many words",
        "c-Excitation BP: hammerhead shark (4)",
    ]
    image = np.zeros((3, 8, 8))
    rows = [
        render.SheetRow("a", image, {names[1]: up}),
        render.SheetRow("b", image, dict.fromkeys(names, up)),
    ]
    for order in (rows, rows[::-1]):
        figure = render.method_sheet(order)
        check_nothing_clipped(figure)
        places = [round(axes.get_position().x0, 3) for axes in figure.axes[:-1]]
        assert len(places) == 5
        assert len(set(places)) == 3, "a map of one row stands below that of another row with its name"


def test_a_rank_chart_puts_the_best_mean_rank_on_top() -> None:
    ranks = {"fidelity": {"a": 3.0, "b": 1.0, "c": 2.0}, "stability": {"a": 2.0, "b": 1.0}}
    figure = render.rank_chart(ranks, "resnet18 on scenes")
    check_nothing_clipped(figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mean rank", "fidelity", "stability"]
    assert [text.get_text() for text in axes.texts] == ["1.0", "1", "1", "2.0", "2", "2.5", "3", "2"]
