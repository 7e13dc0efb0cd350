"""What turns windows of rows into records: a Scorer in this process, or several on a Ray cluster."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Generator, Iterable
from importlib.util import find_spec
from typing import Protocol

from rich.console import Console

from runtime.chat import Renderer
from runtime.checkpoint import Checkpoint
from runtime.errors import PlanError
from runtime.machine_arguments import plan_scorer
from runtime.placement import Plan
from runtime.placement_table import print_placement
from runtime.scorable import Scorable
from runtime.score_window import score_window
from runtime.scored_row import Record
from runtime.scorer import Scorer

Window = tuple[list[Scorable], str]
"""Rendered rows, and the digest of the input up to and with the last of them."""
Scored = tuple[list[Record], str]
"""Their records, and the same digest."""


class Engine(Protocol):
    """Used as a context: plan, `show`, `load`, then `scored`.

    Attributes:
        plan: which block lives where; of several scorers, the first one's.
        renderer: what turns rows into tokens; it is here, wherever the scorers are.
    """

    plan: Plan
    renderer: Renderer

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, console: Console) -> None:
        """Print what is about to be loaded."""

    def load(self) -> None:
        """Bring the model in. Sums are split over as many threads as torch is set to here."""

    def scored(self, windows: Iterable[Window]) -> Generator[Scored, None, None]:
        """Records of each window, in order.

        Raises:
            NonFiniteError: as `score_window`.
            KitError: the windows end with it.
        """


class LocalEngine:
    """One Scorer, in this process, which takes each window as it is asked for its records."""

    def __init__(self, checkpoint: Checkpoint, arguments: Namespace, token_budget: int | None):
        self.plan = plan_scorer(checkpoint, arguments, token_budget)
        self.renderer = Renderer.from_directory(checkpoint.directory, checkpoint.architecture.max_position_embeddings)
        self._checkpoint = checkpoint
        self._scorer: Scorer | None = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, console: Console) -> None:
        print_placement(self.plan, console)

    def load(self) -> None:
        self._scorer = Scorer(self._checkpoint, self.plan)

    def scored(self, windows: Iterable[Window]) -> Generator[Scored, None, None]:
        assert self._scorer is not None
        for rows, digest in windows:
            yield score_window(self._scorer.scores, rows, self._checkpoint), digest


def open_engine(arguments: Namespace, checkpoint: Checkpoint, token_budget: int | None, console: Console) -> Engine:
    """The engine that `--engine` names, planned but not loaded; `token_budget` counts where the options name none.

    Raises:
        PlanError: it cannot be had here, or there is no room for the model.
    """
    if arguments.engine == "local":
        return LocalEngine(checkpoint, arguments, token_budget)
    if find_spec("ray") is None:
        raise PlanError("--engine ray needs Ray, which is not installed; pip install -c constraints.txt -e '.[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if not os.environ.get("RAY_ADDRESS"):
        # The one switch that makes Ray listen on 127.0.0.1 alone; it is read when Ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from runtime.ray_engine import RayEngine

    return RayEngine(checkpoint, arguments, token_budget, console)
