"""One picture of a run: a panel for each operation and mode. TFLOP/s by provider as bars, quartiles as whiskers; over
several lengths as lines, quartiles shaded, the roofline of the machine's measured product and copy dashed."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.bench.env import headline, say_threads
from fastattn.bench.report import by_op, say_case
from fastattn.bench.roofline import attainable
from fastattn.bench.rows import Row, say_against, say_rate, say_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by every kind of colour vision; PyTorch in grey, as the ground to stand on.
COLORS = {
    "fastattn": "#0072B2",
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

MOST_BARS = 2
"""Panels with more cases than this are drawn as lines over the length."""


def draw(paths: list[Path], rows: list[Row], environment: dict[str, Any]) -> None:
    """Write the picture to each path, by its ending. Without a timed row nothing is drawn (ValueError)."""
    import matplotlib

    timed = [row for row in rows if row.timed]
    if not timed:
        raise ValueError("plot: no row was timed, there is nothing to draw")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    providers = list(dict.fromkeys(row.provider for row in rows))
    colors = _colors(providers)
    ops, modes = by_op(rows), list(dict.fromkeys(row.mode for row in rows))
    cases = max(len({row.case for row in of_op}) for of_op in ops.values())
    bars = cases <= MOST_BARS
    tall = 0.3 + (0.21 * len(providers) + 0.12) * cases if bars else 2.6
    settings = {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "axes.titlesize": 10}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(
            len(ops),
            len(modes),
            figsize=(0.9 + 4.6 * len(modes), 1.15 + (tall + 0.42) * len(ops)),
            squeeze=False,
            sharex="col" if bars else False,
            layout="constrained",
        )
        for line, (op, of_op) in zip(axes, ops.items(), strict=True):
            for panel, mode in zip(line, modes, strict=True):
                shown = [row for row in of_op if row.mode == mode]
                if bars:
                    _bars(panel, shown, colors)
                else:
                    _lines(panel, shown, colors, environment.get("ceilings"))
                panel.set_title(f"{op}, {mode}", loc="left", fontweight="bold", pad=4)
                if bars and panel is not line[0] and _labels(panel) == _labels(line[0]):
                    panel.set_yticklabels([])
        if bars:
            for panel in axes[-1]:
                panel.set_xlabel("useful TFLOP/s (median and quartiles), longer is faster")
            for panel, mode in zip(axes[0], modes, strict=True):
                most = max((row.tflops(row.quartiles_ms[0]) for row in timed if row.mode == mode), default=1.0)
                panel.set_xlim(0, most * 1.42)
        dtypes = ", ".join(dict.fromkeys(row.case.dtype for row in rows))
        where = environment["gpu"] or f"{environment['cpu']}, {say_threads(environment)}"
        baseline = f"; speed-up against {rows[0].baseline}" if rows[0].baseline else ""
        if bars:
            figures = f"TFLOP/s, median time{baseline}"
        else:
            figures = "median rate, quartiles shaded" + ("; dashed: its roofline" if "ceilings" in environment else "")
        title = f"Attention on {where}, {dtypes}: {figures}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.text(0.99, 0.004, headline(environment), ha="right", va="bottom", fontsize=6, color="#777777")
        figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _bars(panel: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    """A group of bars a case; who could not run says why in its place."""
    place, ticks = 0.0, []
    for case, group in groupby(rows, key=lambda row: row.case):
        of_case = list(group)
        if len({row.case for row in rows}) > 1:
            panel.text(0, place - 0.62, say_case(case), fontsize=7, color="#555555", va="center")
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
    rate, fast, slow = row.tflops(), row.tflops(low), row.tflops(high)
    panel.barh(place, rate, height=0.78, color=color)
    panel.errorbar(rate, place, xerr=[[rate - slow], [fast - rate]], color="#222222", linewidth=0.9, capsize=2)
    speedup = f"  {say_against(row)}"
    panel.annotate(
        f"{say_rate(rate)}   {say_time(row.median_ms)}{speedup}",
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
    if not lengths:
        panel.set_axis_off()
        return
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{each // 1024}k" if each % 1024 == 0 else str(each) for each in lengths])
    panel.set_xlim(lengths[0] * 0.92, lengths[-1] * 1.08)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    # Between powers of ten too, where there are few of them.
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < WIDE else (1,)))
    panel.yaxis.set_minor_locator(NullLocator())
    small = high < 1
    panel.yaxis.set_major_formatter(lambda rate, _: f"{1e3 * rate if small else rate:g}")
    _name_ends(panel, ends)
    panel.set_xlabel("keys")
    panel.set_ylabel("useful GFLOP/s" if small else "useful TFLOP/s")
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
