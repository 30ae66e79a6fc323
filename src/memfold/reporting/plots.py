"""The figures of a comparison as PNG and PDF; the same runs give the same bytes."""

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from memfold.files import replacing
from memfold.reporting.details import draw_curves, draw_densities, draw_memory
from memfold.reporting.drawing import house_style
from memfold.reporting.planes import draw_plane
from memfold.reporting.records import Comparison, Setting
from memfold.reporting.statistics import (
    AXES,
    at_best_bits,
    at_most_bits,
    common_request,
    points,
)
from memfold.reporting.styles import Style, comparison_styles

__all__ = ["draw"]

_DOTS_PER_INCH = 150


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw all figures of all settings.

    Args:
        comparison: What to draw.
        folder: Is made if need be; files of the same names are replaced, others stay.

    Returns:
        The files written, two for each figure.

    Raises:
        InputError: A file cannot be written.
    """
    looks = comparison_styles(comparison)
    files = []
    with house_style():
        for setting, stem in _stems(sorted({run.setting for run in comparison.runs})):
            for name, figure in _figures(comparison, setting, looks):
                files += _save(figure, folder / f"{stem}-{name}")
    return files


def _figures(
    comparison: Comparison, setting: Setting, looks: dict[str, Style]
) -> Iterator[tuple[str, Figure]]:
    runs = [run for run in comparison.runs if run.setting == setting]
    references = [r for r in comparison.references if r.setting == setting]
    bits = max(run.bits for run in runs)
    widest = [run for run in runs if run.bits == bits]
    for axis in AXES.values():
        found = points(widest, axis)
        shown = references if axis.key == "ratio" else ()
        if found:
            note = f"{bits} bits a value"
            yield axis.key, draw_plane(found, axis, looks, note=note, references=shown)
    if len({run.bits for run in runs}) > 1:
        axis = AXES["stored_bytes"]
        found = at_best_bits(points(runs, axis))
        yield f"{axis.key}-best_bits", draw_plane(found, axis, looks, note="best bits a value")
    request, trained = common_request(runs), at_most_bits(runs)
    for name, figure in (
        ("memory", draw_memory(trained, request, looks)),
        ("curves", draw_curves(trained, request, looks)),
        ("density", draw_densities(trained, request, looks)),
    ):
        if figure is not None:
            yield name, figure


def _stems(settings: Sequence[Setting]) -> Iterator[tuple[Setting, str]]:
    """Name files after settings; where two would share a name, add a digest."""
    plain = {s: "-".join(re.sub(r"[^\w.]+", "_", part) for part in s.parts) for s in settings}
    for setting, stem in plain.items():
        if list(plain.values()).count(stem) > 1:
            stem = f"{stem}-{zlib.crc32(repr(setting).encode()):08x}"
        yield setting, stem


def _save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure without dates and versions, so that the same runs give the same bytes."""
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    contents = (_to_png(figure), io.BytesIO())
    figure.set_layout_engine("none")  # it has done its work, which takes as long as drawing
    metadata = {"Creator": None, "Producer": None, "CreationDate": None}
    figure.savefig(contents[1], format="pdf", metadata=metadata)
    for file, written in zip(files, contents, strict=True):
        with replacing(file) as opened:
            opened.write(written.getvalue())
    return files


def _to_png(figure: Figure) -> io.BytesIO:
    """Draw with a palette: a third of the bytes, and no difference that can be seen."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DOTS_PER_INCH)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    contents = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(contents, "PNG", dpi=(_DOTS_PER_INCH,) * 2)
    return contents
