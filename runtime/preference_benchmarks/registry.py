"""The benchmarks, by the names that `--benchmark` takes."""

from __future__ import annotations

from runtime.common.errors import ConfigurationError
from runtime.preference_benchmarks.benchmark import Benchmark
from runtime.preference_benchmarks.judge_bench import JUDGE_BENCH
from runtime.preference_benchmarks.ppe import CORRECTNESS_BENCHMARKS, HUMAN_PREFERENCE
from runtime.preference_benchmarks.reward_bench import REWARD_BENCH
from runtime.preference_benchmarks.reward_bench_2 import REWARD_BENCH_2
from runtime.preference_benchmarks.rm_bench import RM_BENCH
from runtime.preference_benchmarks.rmb import RMB

BENCHMARKS = {
    each.name: each
    for each in (REWARD_BENCH, REWARD_BENCH_2, RM_BENCH, RMB, HUMAN_PREFERENCE, *CORRECTNESS_BENCHMARKS, JUDGE_BENCH)
}


def parse_benchmark(text: str) -> tuple[Benchmark, str]:
    """The benchmark and the source of ``NAME`` or ``NAME=SOURCE``; the source defaults to its hub data set.

    Raises:
        ConfigurationError: there is no such benchmark, or it has no hub data set and no source is given.
    """
    name, _, source = text.partition("=")
    if name not in BENCHMARKS:
        raise ConfigurationError(
            f"--benchmark is {text!r}; one of {', '.join(BENCHMARKS)} was expected, or NAME=FILES."
        )
    benchmark = BENCHMARKS[name]
    if not source and not benchmark.source:
        raise ConfigurationError(
            f"{benchmark.title} is in no hub data set; name a local copy: --benchmark {name}=DIRECTORY."
        )
    return benchmark, source or benchmark.source
