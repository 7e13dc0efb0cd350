"""A Scorer in a process of its own, as Ray runs it.

What a user can mend is returned rather than raised: Ray would make a remote traceback of it.
"""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from dataclasses import dataclass

import torch

from runtime.checkpoint import open_checkpoint
from runtime.devices import find_devices
from runtime.errors import KitError
from runtime.machine_arguments import plan_scorer
from runtime.placement import Plan
from runtime.scorable import Scorable
from runtime.score_window import score_window
from runtime.scored_row import Record
from runtime.scorer import Scorer
from runtime.version import kit_version


@dataclass(frozen=True)
class Whereabouts:
    """Where an actor runs.

    Attributes:
        budget: bytes of the host's memory that may be used, for all who share it.
        kit: version of the kit that is installed there.
    """

    host: str
    pid: int
    budget: int
    kit: str


class ScoringActor:
    """Planned, then loaded, then given windows; any of it again after a new one took its place."""

    def whereabouts(self) -> Whereabouts:
        """Ask before anything is loaded."""
        return Whereabouts(socket.gethostname(), os.getpid(), find_devices("cpu").host.budget, kit_version())

    def prepare(self, source: str, options: Namespace, token_budget: int | None) -> Plan | KitError:
        """Open the checkpoint here and plan for it, with `options` as `plan_scorer` takes them."""
        try:
            self._checkpoint = open_checkpoint(source)
            self._plan = plan_scorer(self._checkpoint, options, token_budget)
            return self._plan
        except KitError as fault:
            return _named(fault)

    def load(self, threads: int) -> KitError | None:
        """Bring the model in, to compute with `threads` CPU threads."""
        torch.set_num_threads(threads)
        try:
            self._scorer = Scorer(self._checkpoint, self._plan)
            return None
        except KitError as fault:
            return _named(fault)

    def score(self, window: list[Scorable]) -> list[Record] | KitError:
        """Records of rendered rows."""
        try:
            return score_window(self._scorer.scores, window, self._scorer.checkpoint)
        except KitError as fault:
            return fault


def _named(fault: KitError) -> KitError:
    """The fault with the machine it happened on: what is there may not be here."""
    return type(fault)(f"on {socket.gethostname()}: {fault}")
