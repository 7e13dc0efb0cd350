"""Models brought in while the server answers already."""

from __future__ import annotations

import threading
from argparse import Namespace

from runtime.api import journal
from runtime.api.service import Service
from runtime.demo_variant import DemoVariant
from runtime.errors import KitError
from runtime.machine_arguments import plan_scorer
from runtime.scorer import Scorer
from runtime.variant import open_variants


class Loading(threading.Thread):
    """Loads what the command line names, else the demo's 4-bit variant, and says in the service how far it is."""

    def __init__(self, service: Service, arguments: Namespace):
        super().__init__(name="loading", daemon=True)
        self._service = service
        self._arguments = arguments
        self._demo = DemoVariant()

    def run(self) -> None:
        """Load all, or leave in the service why not."""
        try:
            self._load()
        except KitError as error:
            self._service.failure = str(error)
            journal.write("failed", error=str(error))
        except Exception as error:  # the server goes on, to say what happened
            self._service.failure = f"loading failed with {type(error).__name__}; the log says why."
            journal.write_error(error)

    def stop(self) -> None:
        """End what takes long."""
        self._demo.stop()

    def _load(self) -> None:
        sources = self._arguments.model
        if not sources:
            if not self._demo.finished:
                self._tell("quantizing the demo, which takes a few minutes once")
                self._demo.make(self._tell)
            sources = [str(self._demo.output)]
        self._tell(f"reading {', '.join(sources)}")
        variants = open_variants(sources)
        for number, variant in enumerate(variants, 1):
            self._tell(f"loading {variant.label}, {number} of {len(variants)}")
            scorer = Scorer(variant.checkpoint, plan_scorer(variant.checkpoint, self._arguments))
            if scorer.plan.shares[0].device.kind == "cuda":
                scorer.warm_up()
            self._service.add(variant, scorer)
        self._service.ready = True
        self._tell("ready")
        journal.write("ready", models=list(self._service.models))

    def _tell(self, status: str) -> None:
        self._service.status = status
