"""One picture of a run: a panel for each operation and mode. TFLOP/s by provider as bars, quartiles as whiskers; over
several lengths as lines, quartiles shaded, the roofline of the machine's measured product and copy dashed."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure.env import headline, say_threads
from fastattn.bench.measure.roofline import attainable
from fastattn.bench.measure.rows import Row, rate_unit, say_against, say_rate, say_time
from fastattn.bench.report.growth import families, say_family
from fastattn.bench.report.terminal import by_op, say_case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by every kind of colour vision; PyTorch in grey, as the ground to stand on.
COLORS = {
    "fastattn": "#0072B2",
    "fastattn-cuda": "#00508A",
    "fastattn-triton": "#56B4E9",
    "fastattn-reference": "#88B8D8",
    "sdpa": "#8C8C8C",
    "sdpa-math": "#CC79A7",
    "flex": "#E69F00",
    "fa2": "#F0C040",
    "fa3": "#009E73",
    "fa4": "#D55E00",
    "xformers": "#7A5BA6",
}
ROOF = "#9A9A9A"
SPARE = ("#A65628", "#5B7F00", "#C2186B", "#000000")
NAME_HEIGHT = 0.075
"""Of a panel of lines: the least distance between two names at its right edge."""

WIDE = 200
"""Of an axis: the last over the first rate from which powers of ten are ticks enough."""

LEAST_LINE = 3
"""Lengths of a line; runs without one are drawn as bars."""

FOOT = 0.17
"""Inches at a figure's foot, for the line about the machine."""

BEYOND_BARS = 1.5
"""Times the longest bar: as wide as a panel is, for what is written behind the bar."""


def draw(paths: list[Path], rows: list[Row], environment: dict[str, Any]) -> None:
    """Write the picture to each path, by its ending. Without a timed row nothing is drawn (ValueError)."""
    import matplotlib

    timed = [row for row in rows if row.timed]
    if not timed:
        raise ValueError("plot: no row was timed, there is nothing to draw")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit, scale = rate_unit(rows[0].device)
    providers = list(dict.fromkeys(row.provider for row in rows))
    colors = _colors(providers)
    modes = list(dict.fromkeys(row.mode for row in rows))
    line_of = families(row.case for row in timed)
    bars = max(list(line_of.values()).count(line) for line in line_of.values()) < LEAST_LINE
    panels = by_op(rows) if bars else _by_line(rows, line_of)
    cases = max(len({row.case for row in of_panel}) for of_panel in panels.values())
    tall = 0.3 + (0.21 * len(providers) + 0.12) * cases if bars else 2.6
    grid = [[[row for row in of_panel if row.mode == mode] for mode in modes] for of_panel in panels.values()]
    if len(modes) == 1 and len(grid) > 1:  # two and two
        alone = [shown for [shown] in grid] + [[]] * (len(grid) % 2)
        grid = [alone[at : at + 2] for at in range(0, len(alone), 2)]
    height = 1.15 + (tall + 0.42) * len(grid)
    settings = {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "axes.titlesize": 10}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(
            len(grid),
            len(grid[0]),
            figsize=(0.9 + 4.6 * len(grid[0]), height),
            squeeze=False,
            sharex="col" if bars else False,
            layout="constrained",
        )
        for line, of_line in zip(axes, grid, strict=True):
            for panel, shown in zip(line, of_line, strict=True):
                if not shown:
                    panel.set_axis_off()
                    continue
                if bars:
                    _bars(panel, shown, colors)
                else:
                    _lines(panel, shown, colors, environment.get("ceilings"))
                panel.set_title(f"{shown[0].case.op}, {shown[0].mode}", loc="left", fontweight="bold", pad=4)
                if not bars or len({row.case for row in shown}) == 1:
                    sizes = say_family([row.case for row in shown])
                    panel.set_title(sizes, loc="right", fontsize=7.5, color="#555555", pad=4)
                if bars and panel is not line[0] and _labels(panel) == _labels(line[0]):
                    panel.set_yticklabels([])
        if bars:
            for column, of_column in zip(axes.T, zip(*grid, strict=True), strict=True):
                last = [panel for panel, shown in zip(column, of_column, strict=True) if shown][-1]
                last.set_xlabel(f"useful {unit} (median and quartiles), longer is faster")
                last.tick_params(axis="x", labelbottom=True)
                measured = timed if len(modes) == 1 else [row for shown in of_column for row in shown if row.timed]
                rates = [row.tflops(row.quartiles_ms[0]) for row in measured]
                last.set_xlim(0, max(rates, default=1.0) * scale * BEYOND_BARS)
        dtypes = ", ".join(dict.fromkeys(row.case.dtype for row in rows))
        where = environment["gpu"] or f"{environment['cpu']}, {say_threads(environment)}"
        baseline = f"; speed-up against {rows[0].baseline}" if rows[0].baseline else ""
        if bars:
            figures = f"{unit}, median time{baseline}"
        else:
            figures = "median rate, quartiles shaded" + ("; dashed: its roofline" if "ceilings" in environment else "")
        wide = len(grid[0]) > 1
        title = f"Attention on {where}, {dtypes}{': ' if wide else chr(10)}{figures}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.text(0.99, 0.04 / height, headline(environment), ha="right", va="bottom", fontsize=6, color="#777777")
        figure.get_layout_engine().set(rect=(0, FOOT / height, 1, 1 - FOOT / height))
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _by_line(rows: list[Row], line_of: dict[BenchCase, BenchCase]) -> dict[str, list[Row]]:
    """A panel a line of cases that differ in length alone; what has no time goes with its own line."""
    every = families(row.case for row in rows)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(line_of.get(row.case, every[row.case]).name, []).append(row)
    return panels


def _bars(panel: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    """A group of bars a case; who could not run says why in its place."""
    place, ticks = 0.0, []
    for case, group in groupby(rows, key=lambda row: row.case):
        of_case = list(group)
        if len({row.case for row in rows}) > 1:
            panel.text(0, place - 0.62, f" {say_case(case)}", fontsize=7, color="#555555", va="center")
        for row in of_case:
            ticks.append((place, row.who))
            if row.timed:
                _bar(panel, place, row, colors[row.provider])
            else:
                panel.text(0, place, f" {_short(row)}", va="center", fontsize=7.5, style="italic", color="#777777")
            place += 1
        place += 0.75
    panel.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    panel.set_ylim(place - 1.15, -0.95 if len({row.case for row in rows}) > 1 else -0.6)
    panel.tick_params(axis="y", length=0)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("fastattn") else "normal")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.axvline(0, color="#444444", linewidth=0.8)
    panel.grid(axis="x", color="#E4E4E4", linewidth=0.7)
    panel.set_axisbelow(True)


def _bar(panel: Axes, place: float, row: Row, color: str) -> None:
    low, high = row.quartiles_ms
    scale = rate_unit(row.device)[1]
    rate, fast, slow = (scale * row.tflops(each) for each in (row.median_ms, low, high))
    panel.barh(place, rate, height=0.78, color=color)
    panel.errorbar(rate, place, xerr=[[rate - slow], [fast - rate]], color="#222222", linewidth=0.9, capsize=2)
    speedup = f"  {say_against(row)}"
    panel.annotate(
        f"{say_rate(row)}   {say_time(row.median_ms)}{speedup}",
        (fast, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color="#222222",
    )


def _lines(panel: Axes, rows: list[Row], colors: dict[str, str], measured: dict[str, Any] | None) -> None:
    """TFLOP/s over the key length on logarithms, a line a provider with its name at the end, quartiles shaded."""
    from matplotlib.ticker import LogLocator, NullLocator

    ends: list[tuple[float, str, str, str]] = []
    for name in dict.fromkeys(row.provider for row in rows):
        timed = sorted((row for row in rows if row.provider == name and row.timed), key=lambda row: row.case.kv_len)
        if not timed:
            continue
        lengths = [row.case.kv_len for row in timed]
        ours = name.startswith("fastattn")
        panel.plot(
            lengths,
            [row.tflops() for row in timed],
            color=colors[name],
            marker="o",
            markersize=4,
            linewidth=2.2 if ours else 1.5,
            zorder=3 if ours else 2,
        )
        slow, fast = zip(
            *((row.tflops(row.quartiles_ms[1]), row.tflops(row.quartiles_ms[0])) for row in timed), strict=True
        )
        panel.fill_between(lengths, slow, fast, color=colors[name], alpha=0.2, linewidth=0)
        ends.append((timed[-1].tflops(), timed[-1].who, colors[name], "bold" if ours else "normal"))
    ceiling = _roofline(panel, rows, measured)
    if ceiling is not None:
        ends.append((ceiling, "roofline", ROOF, "normal"))
    lengths = sorted({row.case.kv_len for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{each // 1024}k" if each % 1024 == 0 else str(each) for each in lengths])
    panel.set_xlim(lengths[0] * 0.92, lengths[-1] * 1.08)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    # Between powers of ten too, where there are few of them.
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < WIDE else (1,)))
    panel.yaxis.set_minor_locator(NullLocator())
    unit, scale = rate_unit(rows[0].device)
    panel.yaxis.set_major_formatter(lambda rate, _: f"{scale * rate:g}")
    _name_ends(panel, ends)
    panel.set_xlabel("keys")
    panel.set_ylabel(f"useful {unit}")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E4E4E4", linewidth=0.7)
    panel.set_axisbelow(True)


def _roofline(panel: Axes, rows: list[Row], measured: dict[str, Any] | None) -> float | None:
    """What the machine's measured product and copy allow, dashed; its last height, None where there is none."""
    if measured is None:
        return None
    heights = {row.case.kv_len: attainable(row, measured) for row in rows}
    points = sorted((length, height) for length, height in heights.items() if height is not None)
    if not points:
        return None
    panel.plot(*zip(*points, strict=True), color=ROOF, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
    return points[-1][1]


def _name_ends(panel: Axes, ends: list[tuple[float, str, str, str]]) -> None:
    """Each line's name right of its last point, moved up where two would lie on each other."""
    low, high = map(math.log, panel.get_ylim())
    last = -1.0
    for rate, name, color, weight in sorted(ends):
        last = max((math.log(rate) - low) / (high - low), last + NAME_HEIGHT)
        panel.annotate(
            name,
            (1.0, last),
            xycoords="axes fraction",
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=color,
            fontweight=weight,
        )


def _labels(panel: Axes) -> list[str]:
    return [label.get_text() for label in panel.get_yticklabels()]


def _colors(providers: list[str]) -> dict[str, str]:
    spare = iter(SPARE * len(providers))
    return {name: COLORS.get(name) or next(spare) for name in providers}


def _short(row: Row) -> str:
    reason = row.reason or "not timed"
    return reason if len(reason) <= 44 else reason[:43] + "…"
