"""Plots as SVG, all in one style. Needs matplotlib (the extra ``bench``); measures nothing."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib
from cycler import cycler

from records import Data, Record
from report import ROWS, Row

matplotlib.use("svg")
from matplotlib import pyplot  # the backend is chosen first
from matplotlib.axes import Axes

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.prop_cycle": cycler(color=["#1b6ca8", "#e08e0b", "#8a8f98", "#b5483a", "#4c9a5f", "#7a5195"]),
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "tgi",  # the same data give the same file
    "svg.fonttype": "none",
}
_COLUMNS = 4

Points = Sequence[tuple[float, float]]


def plot(path: Path, panels: int, draw: Callable[[Sequence[Axes]], None]) -> None:
    """Write an SVG of so many axes."""
    columns = min(panels, _COLUMNS)
    lines = -(-panels // columns)
    with pyplot.style.context(_STYLE):
        figure, grid = pyplot.subplots(
            lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False, layout="constrained"
        )
        axes = list(grid.flat)
        for unused in axes[panels:]:
            unused.remove()
        draw(axes[:panels])
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def bars(data: Data, path: Path) -> None:
    """The table's rows: a panel each, servers side by side in groups of precision, whiskers from lowest to highest."""
    rows = [row for row in ROWS if data.of("cell", workload=row.workload)]

    def draw(axes: Sequence[Axes]) -> None:
        for ax, row in zip(axes, rows, strict=True):
            for number in range(len(data.servers)):
                _bars(ax, data, row, number)
            ax.set_xticks(range(len(data.precisions)), data.precisions)
            ax.set_xlim(-0.5, len(data.precisions) - 0.5)
            ax.set(title=row.title, ylabel=f"{row.unit} ({'less' if row.lower else 'more'} is better)")
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(data.servers))

    if rows:
        plot(path, len(rows), draw)


def _bars(ax: Axes, data: Data, row: Row, number: int) -> None:
    """Those of one server."""
    server, width = data.servers[number], 0.8 / len(data.servers)
    places, middles, below, above = [], [], [], []
    for place, precision in enumerate(data.precisions):
        if values := [cell[row.figure] for cell in data.cells(server, precision, row.workload)]:
            middle = statistics.median(values)
            places.append(place + (number + 0.5) * width - 0.4)
            middles.append(middle)
            below.append(middle - min(values))
            above.append(max(values) - middle)
    whiskers = {"elinewidth": 1, "capsize": 2}
    ax.bar(places, middles, width * 0.92, label=server, yerr=[below, above], error_kw=whiskers)


def curves(path: Path, panels: Sequence[tuple[str, str, str, Mapping[str, Points]]]) -> None:
    """(title, x label, y label, name → points) each."""

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (title, x, y, lines) in zip(axes, panels, strict=True):
            for name, points in lines.items():
                ax.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, label=name)
            ax.set(title=title, xlabel=x, ylabel=y)
            ax.set_ylim(bottom=0)
            if len(lines) > 1:
                ax.legend()

    plot(path, len(panels), draw)


def grouped(records: Iterable[Record], by: str, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Lines for ``curves``: medians of y at each x, a line for each value of ``by``."""

    def key(record: Record) -> tuple[str, float]:
        return str(record[by]), record[x]

    found: dict[str, list[tuple[float, float]]] = {}
    for (name, place), same in groupby(sorted(records, key=key), key=key):
        found.setdefault(name, []).append((place, statistics.median(record[y] for record in same)))
    return found
