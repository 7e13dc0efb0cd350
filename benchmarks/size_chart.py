"""Draw how far quantized scores move over the size of the model, from results of `variants.py`.

    python benchmarks/size_chart.py benchmarks/results/variants-*-bf16.json --output docs/size.svg

Each result is one model. A point is the mean shift of a variant, a bar its 95 % interval. Beyond the largest model a
band shows what the points allow for the 72B: its upper edge is the largest shift that was measured, its lower edge
follows a straight line through the points (least squares of log shift over log weights). Both are extrapolations over
a factor of fifty or more in size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

WEIGHTS_72B = 70.2e9
SERIES = {  # variant: label, colour
    "gptq-4": ("GPTQ, 4 bits", "#b3261e"),
    "nf4": ("NF4, calibrated", "#7b4fb5"),
    "gptq-4.5": ("GPTQ, 4.5 bits", "#c77700"),
    "plain bf16": ("unquantized, bf16", "#5f6b7a"),
    "gptq-8": ("GPTQ, 8 bits", "#1f6fb2"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 64, 170, 24, 56
X_RANGE, Y_RANGE = (5e7, 1.5e11), (0.01, 0.2)
Y_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2)


def main() -> int:
    arguments = parse()
    results = sorted((json.loads(file.read_text()) for file in arguments.results), key=lambda r: r["block_weights"])
    arguments.output.write_text(draw(results))
    for name in SERIES:
        if (shifts := points(results, name)) and len(shifts) > 1:
            low, high = extrapolate(shifts)
            print(f"{name}: {low:.3f} to {high:.3f} at 72B, extrapolated from {len(shifts)} models", file=sys.stderr)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of variants.py, one per model")
    parser.add_argument("--output", type=Path, required=True, help="the SVG file to write")
    return parser.parse_args()


def points(results: list[dict[str, Any]], name: str) -> list[tuple[float, float, float, float]]:
    """(weights, shift, low, high) of one variant in every result that has it; several draws are averaged."""
    found = []
    for result in results:
        if draws := result["variants"].get(name, {}).get("draws"):
            shifts = [draw["repaired"]["mean_shift"] for draw in draws]
            means = (float(np.mean([shift[key] for shift in shifts])) for key in ("value", "low", "high"))
            found.append((float(result["block_weights"]), *means))
    return found  # type: ignore[return-value]


def extrapolate(shifts: list[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Bounds of the shift at 72B: by the fitted line and by the largest shift, in ascending order."""
    slope, offset = np.polyfit(np.log([each[0] for each in shifts]), np.log([each[1] for each in shifts]), 1)
    fitted = math.exp(slope * math.log(WEIGHTS_72B) + offset)
    low, high = sorted((fitted, max(each[1] for each in shifts)))
    return low, high


def x_of(weights: float) -> float:
    share = math.log(weights / X_RANGE[0]) / math.log(X_RANGE[1] / X_RANGE[0])
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def y_of(shift: float) -> float:
    share = math.log(min(max(shift, Y_RANGE[0]), Y_RANGE[1]) / Y_RANGE[0]) / math.log(Y_RANGE[1] / Y_RANGE[0])
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(results: list[dict[str, Any]]) -> str:
    """The chart as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" role="img" aria-label="Mean shift of quantized scores over model size">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for tick in Y_TICKS:
        parts.append(line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick), "#e3e6ea"))
        parts.append(text(LEFT - 8, y_of(tick) + 4, f"{tick:g}", "end"))
    for result in results:
        parts.append(
            text(x_of(result["block_weights"]), HEIGHT - BOTTOM + 20, label(result["block_weights"]), "middle")
        )
    parts.append(text(x_of(WEIGHTS_72B), HEIGHT - BOTTOM + 20, "72B: extrapolated", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "weights in the blocks", "middle"))
    parts.append(text(LEFT - 50, TOP - 8, "mean shift (standard deviations)", "start"))
    parts += [part for name in SERIES for part in draw_series(results, name)]
    return "\n".join([*parts, "</svg>", ""])


def draw_series(results: list[dict[str, Any]], name: str) -> list[str]:
    shifts, (title, colour) = points(results, name), SERIES[name]
    if not shifts:
        return []
    path = " ".join(f"{x_of(each[0]):.1f},{y_of(each[1]):.1f}" for each in shifts)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for weights, shift, low, high in shifts:
        parts.append(line(x_of(weights), y_of(low), x_of(weights), y_of(high), colour))
        parts.append(f'<circle cx="{x_of(weights):.1f}" cy="{y_of(shift):.1f}" r="4" fill="{colour}"/>')
    end = y_of(shifts[-1][1])
    if len(shifts) > 1:
        low, high = extrapolate(shifts)
        start, stop = x_of(shifts[-1][0]), x_of(WEIGHTS_72B)
        band = f"{start:.1f},{end:.1f} {stop:.1f},{y_of(high):.1f} {stop:.1f},{y_of(low):.1f}"
        parts.append(f'<polygon points="{band}" fill="{colour}" opacity="0.12"/>')
        end = (y_of(high) + y_of(low)) / 2
    parts.append(text(WIDTH - RIGHT + 8, end + 4, title, "start", colour))
    return parts


def label(weights: float) -> str:
    return f"{weights / 1e9:.2g}B" if weights >= 1e9 else f"{weights / 1e6:.3g}M"


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def text(x: float, y: float, words: str, anchor: str, colour: str = "#30363d") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


if __name__ == "__main__":
    sys.exit(main())
