"""The pictures of a run. Matplotlib is imported inside the functions alone, without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "draw_comparison",
    "draw_curves",
    "draw_grid",
    "draw_operations",
    "draw_points",
    "draw_steering",
    "draw_text",
]


def _figure(width: float, height: float) -> Any:
    # A Figure of its own, not pyplot: nothing global is set, no window can open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """By rename, so that no half picture is left where a disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Images ``(n, h, w, c)`` in [0, 1] as one, with a line of one pixel between them."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.5)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    return sheet


def draw_grid(path: Path, panels: Sequence[tuple[str, np.ndarray]], *, columns: int = 10) -> None:
    """Panels of images side by side.

    Args:
      path: the PNG file.
      panels: titles and images ``(n, h, w, c)`` in [-1, 1], ``c`` 1 or 3.
      columns: images in a row of a panel.
    """
    figure = _figure(5.0 * len(panels), 5.4)
    for axes, (title, images) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        sheet = mosaic(np.clip((np.nan_to_num(images) + 1) / 2, 0, 1), columns)
        if sheet.shape[-1] == 1:
            axes.imshow(sheet[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        else:
            axes.imshow(sheet, interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    _save(figure, path)


def draw_points(path: Path, panels: Sequence[tuple[str, np.ndarray]]) -> None:
    """Scatter plots side by side, on the axes of the last one.

    Args:
      path: the PNG file.
      panels: titles and points ``(n, d)``, of which the first two coordinates are drawn.
    """
    figure = _figure(4.6 * len(panels), 4.8)
    last = panels[-1][1][:, :2]
    low, high = last.min(axis=0), last.max(axis=0)
    margin = 0.1 * (high - low) + 1e-6
    for axes, (title, points) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        axes.scatter(points[:, 0], points[:, 1 % points.shape[1]], s=2, alpha=0.4, linewidths=0)
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[-1] - margin[-1], high[-1] + margin[-1])
        axes.set_title(title)
    _save(figure, path)


def draw_curves(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Loss, gradient norm and speed against the step, from the lines of ``metrics.jsonl``."""
    figure = _figure(12.0, 3.4)
    names = (
        ("loss", "training loss"),
        ("grad_norm", "norm of the gradient"),
        ("examples_per_second", "examples per second"),
    )
    for axes, (name, title) in zip(figure.subplots(1, 3), names, strict=True):
        steps = [line["step"] for line in lines if line.get(name) is not None]
        axes.plot(steps, [line[name] for line in lines if line.get(name) is not None])
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_comparison(path: Path, rows: Sequence[dict[str, Any]], reference: str) -> None:
    """Quality against evaluations, a line for each solver, from the rows of ``Comparison``.

    Args:
      path: the PNG file.
      rows: ``solver``, ``evaluations``, ``rmse`` or ``None``, and a distance to the data.
      reference: what the RMSE is taken to.
    """
    kind = "frechet" if "frechet" in rows[0] else "sliced_wasserstein"
    title = {"frechet": "Frechet distance", "sliced_wasserstein": "sliced Wasserstein distance"}
    panels = (("rmse", f"RMSE to {reference}"), (kind, f"{title[kind]} to the data"))
    names = list(dict.fromkeys(row["solver"] for row in rows))
    figure = _figure(12.0, 4.8)
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, name in enumerate(names):
            own = [r for r in rows if r["solver"] == name and r[key] is not None]
            marker = "osD^vPX*"[i % 8]
            x, y = [r["evaluations"] for r in own], [r[key] for r in own]
            # Drawn empty where it is left out, so that both panels have the same colours.
            axes.plot(x, y, marker=marker, markersize=4, color=f"C{i % 10}", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({r["evaluations"] for r in rows})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_xlabel("evaluations of the network")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.axhline(rows[0]["data_to_data"], color="gray", linestyle=":", label="data to data")
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_steering(
    path: Path,
    title: str,
    levels: np.ndarray,
    ess: np.ndarray,
    resampled: np.ndarray,
    history: np.ndarray,
    shown_at: np.ndarray,
) -> None:
    """Steered particles on their way to the data, and the effective sample size under them.

    Args:
      path: the PNG file.
      title: of the whole.
      levels: noise levels of the steps, ``(steps,)``.
      ess: shares of the particles, ``(populations, steps)``.
      resampled: ``(populations, steps)``.
      history: particles at some steps, ``(times, shown, h, w, c)`` about as large as data in [-1,
        1] at every noise level, or points ``(times, shown, 2)``.
      shown_at: those steps, ``(times,)``.
    """
    figure = _figure(10.0, 7.0)
    figure.suptitle(title)
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    steps = np.arange(1, len(levels) + 1)
    if history.ndim == 5:
        tiles = history.transpose(1, 0, 2, 3, 4).reshape(-1, *history.shape[2:])
        sheet = mosaic(np.clip((np.nan_to_num(tiles) + 1) / 2, 0, 1), len(shown_at))
        gray = {"cmap": "gray", "vmin": 0, "vmax": 1} if sheet.shape[-1] == 1 else {}
        above.imshow(sheet[..., 0] if gray else sheet, interpolation="nearest", **gray)
        width = history.shape[3] + 1
        above.set_xticks((np.arange(len(shown_at)) + 0.5) * width, [str(n + 1) for n in shown_at])
        above.set_yticks([])
    else:
        flat = history.reshape(*history.shape[:2], -1)
        for i in range(flat.shape[1]):
            above.plot(shown_at + 1, flat[:, i, 0], marker=".", color=f"C{i % 10}")
        above.set_ylabel("first coordinate")
    above.set_xlabel("after step")
    for own, when in zip(ess, resampled, strict=True):
        below.plot(steps, own, color="C0", alpha=max(0.15, 1 / len(ess)))
        below.plot(steps[when], own[when], "v", color="C3", markersize=4)
    below.set_ylim(0, 1.05)
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_ylabel("effective share of particles")
    above_level = below.twinx()
    above_level.semilogy(steps, levels, color="gray", linestyle=":")
    above_level.set_ylabel("sigma / alpha")
    below.grid(alpha=0.3)
    _save(figure, path)


def draw_operations(
    path: Path, title: str, panels: Sequence[tuple[str, Sequence[tuple[str, float]]]]
) -> None:
    """Bars of what takes the time of a step, the backward pass in another colour.

    Args:
      path: the PNG file.
      title: of the whole.
      panels: one above the other, titles and rows: what it is (ending in ``", backward"`` where it
        is of that) and its share of the time, the longest first.
    """
    counts = [len(rows) for _, rows in panels]
    figure = _figure(9.0, 0.8 + sum(0.8 + 0.24 * n for n in counts))
    figure.suptitle(f"{title}\nblue: forward and update, orange: backward")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[3 + n for n in counts])
    for axes, (name, rows) in zip(every[:, 0], panels, strict=True):
        colours = ["C1" if row[0].endswith(", backward") else "C0" for row in rows]
        axes.barh(-np.arange(len(rows)), [100 * share for _, share in rows], color=colours)
        names = [row[0] if len(row[0]) <= 60 else "\u2026" + row[0][-59:] for row in rows]
        axes.set_yticks(-np.arange(len(rows)), names, fontsize=8)
        axes.set_xlabel("% of the time in operations")
        axes.set_title(name, fontsize=10)
        axes.margins(y=0.02)
    _save(figure, path)


def draw_text(path: Path, title: str, texts: Sequence[str], at: np.ndarray) -> None:
    """Texts in a fixed-width type, each character in the colour of the step that brought it.

    Args:
      path: the PNG file.
      title: of the whole.
      texts: of one length ``l``; line breaks and tabs are shown as signs.
      at: those steps, ``(len(texts), l)``; below 0 for a prompt's, which are drawn in black.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    columns = 64
    signs = str.maketrans({"\n": "\u21b5", "\t": "\u2192", "\r": "\u21b5"})
    rows = -(-at.shape[1] // columns)
    lines = len(texts) * (rows + 0.6)
    figure = _figure(9.6, 1.0 + 0.24 * lines)
    axes = figure.subplots()
    # The last colours of the map are too light for type.
    colours = ListedColormap(colormaps["plasma"](np.linspace(0, 0.85, 256)))
    norm = Normalize(0, max(1, int(at.max())))
    for i, (text, steps) in enumerate(zip(texts, at, strict=True)):
        for j, (character, step) in enumerate(zip(text.translate(signs), steps, strict=True)):
            colour = "black" if step < 0 else colours(norm(step))
            place = (j % columns, i * (rows + 0.6) + j // columns)
            axes.text(*place, character, color=colour, family="monospace", fontsize=10)
    axes.set_xlim(-1, columns)
    axes.set_ylim(lines, -1)
    axes.axis("off")
    axes.set_title(title)
    figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        orientation="horizontal",
        label="step in which a character appeared",
        fraction=0.04,
        aspect=60,
    )
    _save(figure, path)
