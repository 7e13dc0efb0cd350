"""Group rows by prompt and order the prompts: seeded, stratified by category, independent of the order of the rows."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from calibration.sources import ConversationRow
from runtime.conversations.conversation import PreferencePair

SourceRow = PreferencePair | ConversationRow


def group_by_prompt(source_rows: Iterable[SourceRow], seed: int) -> list[list[SourceRow]]:
    """Group rows by prompt, in seeded order within each group."""
    prompts: defaultdict[str, list[SourceRow]] = defaultdict(list)
    for source_row in source_rows:
        prompts[_prompt_key(source_row)].append(source_row)
    return [
        sorted(source_rows, key=lambda source_row: _seeded_uniform(source_row.id, seed))
        for source_rows in prompts.values()
    ]


def _prompt_key(source_row: SourceRow) -> str:
    """Digest of the user and assistant turns before the response: letters and digits only, case-folded."""
    turns = source_row.prompt if isinstance(source_row, PreferencePair) else source_row.messages[:-1]
    words = [
        (turn["role"], "".join(filter(str.isalnum, turn["content"].casefold())))
        for turn in turns
        if turn["role"] != "system"
    ]
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _seeded_uniform(name: str, seed: int) -> float:
    """A pseudo-random number in [0, 1) that depends on the arguments only."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


def stratified_order(prompts: list[list[SourceRow]], seed: int) -> list[list[SourceRow]]:
    """Order prompts so that every leading part has the categories in proportion.

    Systematic sampling: the i-th of a category's n prompts has position (i + u) / n, with a random u in [0, 1) per
    category, so that categories with a single prompt are spread out too.
    """
    strata: defaultdict[str, list[list[SourceRow]]] = defaultdict(list)
    for source_rows in sorted(prompts, key=lambda source_rows: _seeded_uniform(source_rows[0].id, seed)):
        strata[source_rows[0].top_category].append(source_rows)
    placed = [
        ((index + _seeded_uniform(top_category, seed)) / len(stratum), top_category, source_rows)
        for top_category, stratum in strata.items()
        for index, source_rows in enumerate(stratum)
    ]
    return [source_rows for _, _, source_rows in sorted(placed, key=lambda entry: entry[:2])]


def round_robin(prompts: list[list[SourceRow]]) -> list[tuple[int, SourceRow]]:
    """(index of the prompt, row): one row of each prompt, then a second row of each, and so on."""
    placed = [(depth, index) for index, source_rows in enumerate(prompts) for depth in range(len(source_rows))]
    return [(index, prompts[index][depth]) for depth, index in sorted(placed)]
