"""Pictures and figures: the only package that draws.

Every figure function returns a ``matplotlib.figure.Figure`` that stands alone (no pyplot state, no
display needed); ``figure.savefig(path)`` or ``Run.save_figure`` writes it.
"""

from srd_lab.render.certificate import certificate_plot
from srd_lab.render.comparison import score_intervals
from srd_lab.render.pictures import (
    PictureRow,
    SheetRow,
    heat,
    map_sheet,
    method_sheet,
    overlay,
    picture_grid,
    save_picture,
    signed,
    strength,
)
from srd_lab.render.plots import (
    apop_bars,
    binarisation_curve,
    binarisation_panels,
    box_plots,
    manipulation_figure,
    perturbation,
    rank_chart,
)
from srd_lab.render.robustness import budget_curves, member_heat

__all__ = [
    "PictureRow",
    "SheetRow",
    "apop_bars",
    "binarisation_curve",
    "binarisation_panels",
    "box_plots",
    "budget_curves",
    "certificate_plot",
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
    "signed",
    "strength",
]
