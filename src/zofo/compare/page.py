"""The report of a comparison: one HTML file that needs nothing else."""

import importlib.util
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from zofo.compare import cells
from zofo.compare.statistics import LEVEL, POWER


def page(report: Mapping[str, Any]) -> str:
    """The page of `report`, the content of report.json; without matplotlib it has no figures, and says so."""
    figures = None
    if importlib.util.find_spec("matplotlib") is not None:
        from zofo.compare.figures import draw  # here, because matplotlib is optional

        figures = draw(report)
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(cells.CELLS)
    template = environment.from_string(files("zofo.compare").joinpath("page.html").read_text(encoding="utf-8"))
    rendered = template.render(report, figures=figures, missing=cells.MISSING, level=LEVEL, power=POWER)
    return rendered.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written to a file
