"""Pictures and figures: the only package that draws.

Every figure function returns a ``matplotlib.figure.Figure`` that stands alone (no pyplot state, no
display needed); ``figure_bytes`` or ``Run.save_figure`` writes it, the same figure to the same bytes.

Figures are made of arrays and names: it imports the modules at the top of ``srd_lab`` and nothing else of this project;
matplotlib is imported here and nowhere else. Begin with :func:`explanation` in :mod:`srd_lab.render.overlays`, the figure of
one map.
"""

from srd_lab.render.accuracy import apop_bars, binarisation_curve, binarisation_panels
from srd_lab.render.certificate import certificate_plot
from srd_lab.render.comparison import score_intervals
from srd_lab.render.files import figure_bytes
from srd_lab.render.overlays import OVERLAYS, edges, explanation, overlay, strongest
from srd_lab.render.pictures import PictureRow, heat, picture_grid, save_picture, signed, strength
from srd_lab.render.plots import box_plots, manipulation_figure, perturbation, rank_chart
from srd_lab.render.robustness import budget_curves, member_heat
from srd_lab.render.sheets import SheetRow, map_sheet, method_sheet, sheet_pages

__all__ = [
    "OVERLAYS",
    "PictureRow",
    "SheetRow",
    "apop_bars",
    "binarisation_curve",
    "binarisation_panels",
    "box_plots",
    "budget_curves",
    "certificate_plot",
    "edges",
    "explanation",
    "figure_bytes",
    "heat",
    "manipulation_figure",
    "map_sheet",
    "member_heat",
    "method_sheet",
    "overlay",
    "perturbation",
    "picture_grid",
    "rank_chart",
    "save_picture",
    "score_intervals",
    "sheet_pages",
    "signed",
    "strength",
    "strongest",
]
