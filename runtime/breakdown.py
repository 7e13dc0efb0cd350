"""Where two runs disagree: parity by margin, by category, and by how the two responses differ in style.

Quantizing can keep the overall agreement and still cost one ability, or make longer answers win. So every
group also carries how often each run prefers the chosen response: among pairs whose chosen response is the
longer one, that is how often it lets the longer one win.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from runtime.figures import Estimate, margins, proportion, spread, tidy
from runtime.scored_pair import PairScores, scores_of

MARGIN_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # in standard deviations of the reference scores
SIMILAR_LENGTH = 1.2  # responses within this ratio of each other count as equally long

LENGTHS = ("chosen longer", "similar length", "chosen shorter")
MARKDOWN = ("chosen has more", "the same", "chosen has less")

_MARKDOWN_MARK = re.compile(
    r"^[ ]{0,8}(?:\#{1,6}\s | [-*+]\s | \d{1,3}[.)]\s | >\s | ``` | \|.*\|)"  # heading, list, quote, table
    r"| \*\*(?=\S) | `[^`\n]+`",  # bold, inline code
    re.MULTILINE | re.VERBOSE,
)


class Group(BaseModel):
    """Parity within some of the pairs. `mean_shift` is in standard deviations of ALL reference scores."""

    model_config = ConfigDict(frozen=True)

    name: str
    pairs: int
    flips: int
    agreement: Estimate
    noise_agreement: float | None
    mean_shift: float | None
    reference_accuracy: float
    quantized_accuracy: float


def by_margin(pairs: Sequence[PairScores]) -> list[Group]:
    """Bins of the absolute reference margin, narrowest first; empty bins are left out."""
    unit = _unit(pairs)
    names = [f"{low:g} to {high:g}" for low, high in zip(MARGIN_EDGES, MARGIN_EDGES[1:], strict=False)]
    names.append(f"{MARGIN_EDGES[-1]:g} or more")

    def name_of(pair: PairScores) -> str:
        margin = abs(pair.reference_margin) / unit if unit else 0.0
        return names[int(np.searchsorted(MARGIN_EDGES, margin, side="right")) - 1]

    return _groups(pairs, name_of, names)


def by_area(pairs: Sequence[PairScores]) -> list[Group]:
    """What stands before the slash of a category such as "objective/maths", in alphabetical order."""
    return _groups(pairs, _area, sorted({_area(pair) for pair in pairs}))


def by_category(pairs: Sequence[PairScores]) -> list[Group]:
    """Categories in alphabetical order."""
    return _groups(pairs, lambda pair: pair.category, sorted({pair.category for pair in pairs}))


def by_style(pairs: Sequence[PairScores]) -> dict[str, list[Group]]:
    """Groups by which response is longer, and by which carries more markdown."""
    return {
        "length": _groups(pairs, length_style, LENGTHS),
        "markdown": _groups(pairs, markdown_style, MARKDOWN),
    }


def length_style(pair: PairScores) -> str:
    """One of `LENGTHS`, from the characters of the two responses."""
    chosen, rejected = len(_text(pair.chosen)), len(_text(pair.rejected))
    if max(chosen, rejected) <= SIMILAR_LENGTH * min(chosen, rejected):
        return LENGTHS[1]
    return LENGTHS[0] if chosen > rejected else LENGTHS[2]


def markdown_style(pair: PairScores) -> str:
    """One of `MARKDOWN`, from the number of headings, list items, quotes, tables, code and bold spans."""
    chosen, rejected = (len(_MARKDOWN_MARK.findall(_text(side))) for side in (pair.chosen, pair.rejected))
    return MARKDOWN[1 - (chosen > rejected) + (chosen < rejected)]


def _groups(pairs: Sequence[PairScores], name_of: Callable[[PairScores], str], names: Sequence[str]) -> list[Group]:
    unit = _unit(pairs)
    members: dict[str, list[PairScores]] = {name: [] for name in names}
    for pair in pairs:
        members[name_of(pair)].append(pair)
    return [_group(name, inside, unit) for name, inside in members.items() if inside]


def _group(name: str, pairs: Sequence[PairScores], unit: float) -> Group:
    reference, quantized = scores_of(pairs, "reference"), scores_of(pairs, "quantized")
    noise = scores_of(pairs, "noise_floor")
    assert reference is not None and quantized is not None
    wins = np.sign(margins(reference))
    same = wins == np.sign(margins(quantized))
    return Group(
        name=name,
        pairs=len(pairs),
        flips=sum(pair.flipped for pair in pairs),
        agreement=proportion(int(same.sum()), len(pairs)),
        noise_agreement=None if noise is None else tidy(np.mean(wins == np.sign(margins(noise)))),
        mean_shift=tidy(np.abs(quantized - reference).mean() / unit) if unit else None,
        reference_accuracy=float(np.mean(wins > 0)),
        quantized_accuracy=float(np.mean(margins(quantized) > 0)),
    )


def _unit(pairs: Sequence[PairScores]) -> float:
    reference = scores_of(pairs, "reference")
    assert reference is not None
    return spread(reference)


def _area(pair: PairScores) -> str:
    return pair.category.partition("/")[0]


def _text(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)
