"""Compare the accuracies of `runtime.preference_benchmarks` with those of the benchmarks' own code, on the same scores.

    git clone https://github.com/allenai/reward-bench        # likewise THU-KEG/RM-Bench, ScalerLab/JudgeBench and
    python benchmarks/benchmark_rules.py --reward-bench reward-bench --rm-bench RM-Bench --judgebench JudgeBench \\
        --rmb RMB-Reward-Model-Benchmark                     # Zhou-Zoey/RMB-Reward-Model-Benchmark

Each repository's scoring functions are imported from its files and run unchanged; what those files import for their
models is replaced by empty modules. RewardBench's code needs `pip install datasets pandas`. JudgeBench and RMB publish
scores of real reward models on their rows, which are used. RewardBench, RewardBench 2 and RM-Bench get rows of the same
keys with invented texts, and random scores, many of them equal. The script prints a table and one JSON line, and ends
with status 1 if an accuracy differs by more than 1e-9.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from runtime.preference_benchmarks.accuracy import Accuracy, measure  # noqa: E402
from runtime.preference_benchmarks.registry import BENCHMARKS  # noqa: E402
from runtime.preference_benchmarks.rows import BenchmarkRows  # noqa: E402
from tests.helpers import benchmark_rows  # noqa: E402

TOLERANCE = 1e-9
Comparison = tuple[str, str, int, dict[str, tuple[float, float]]]
"""Benchmark, data, rows, and (theirs, ours) by section."""


def main() -> int:
    arguments = parse()
    compared: list[Comparison] = []
    for option, compare in COMPARISONS.items():
        if directory := getattr(arguments, option):
            with tempfile.TemporaryDirectory() as work:
                compared += compare(directory, Path(work))
    if not compared:
        sys.exit("no repository was given; see --help.")
    worst = 0.0
    for name, data, rows, pairs in compared:
        difference = max(abs(theirs - ours) for theirs, ours in pairs.values())
        worst = max(worst, difference)
        print(f"{name:<14} {data:<52} {rows:>6,} rows  {len(pairs):>3} figures  largest difference {difference:.1e}")
    results = [
        {"benchmark": name, "data": data, "rows": rows, "theirs_and_ours": pairs}
        for name, data, rows, pairs in compared
    ]
    print(json.dumps({"machine": describe_machine(), "largest_difference": worst, "results": results}))
    return 0 if worst <= TOLERANCE else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in COMPARISONS:
        parser.add_argument(f"--{option.replace('_', '-')}", type=Path, metavar="DIR", help="the repository's files")
    return parser.parse_args()


def load(path: Path, *stand_ins: str) -> Any:
    """Import a file of a repository, with empty modules in place of what it imports for models."""
    for name in stand_ins:
        stand_in = ModuleType(name)
        stand_in.__getattr__ = lambda attribute: object  # type: ignore[method-assign]
        stand_in.__path__ = []  # a package
        sys.modules.setdefault(name, stand_in)
    spec = importlib.util.spec_from_file_location(f"theirs_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_accuracy(name: str, rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[float]], work: Path) -> Accuracy:
    """The accuracy of the evaluation command, from a file of rows and a file of scores."""
    source, scores_file = work / "rows.jsonl", work / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records = ({"where": f"rows.jsonl:{line}", "scores": list(each)} for line, each in enumerate(scores, start=1))
    scores_file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    checked = BenchmarkRows.check(BENCHMARKS[name], str(source))
    return measure(checked.benchmark, checked.judge(scores_file))


def random_scores(seed: int, counts: Sequence[int]) -> list[list[float]]:
    """With an even seed a few values, so that many are equal; else normal numbers."""
    draw = random.Random(seed)
    return [[draw.randint(0, 4) / 2 if seed % 2 == 0 else draw.gauss(0, 1) for _ in range(count)] for count in counts]


def drawn(seed: int) -> str:
    return f"invented texts, random scores{', many equal' if seed % 2 == 0 else ''}, seed {seed}"


def compare_reward_bench(repository: Path, work: Path) -> Iterator[Comparison]:
    utils = load(repository / "rewardbench" / "utils.py", "rewardbench", "rewardbench.models", "torch")
    constants = load(repository / "rewardbench" / "constants.py")
    for seed in range(4):
        rows = [
            row | {"subset": subset}
            for number, subset in enumerate(constants.EXAMPLE_COUNTS)
            for row in benchmark_rows.reward_bench(5 + number, seed)
        ]
        scores = random_scores(seed, [2] * len(rows))
        won: dict[str, list[int]] = {}
        for row, (chosen, rejected) in zip(rows, scores, strict=True):
            won.setdefault(row["subset"], []).append(1 if chosen > rejected else 0)
        theirs = {subset: sum(results) / len(results) for subset, results in won.items()}
        theirs |= utils.calculate_scores_per_section(constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, theirs)
        theirs["all rows"] = sum(map(sum, won.values())) / len(rows)
        ours = our_accuracy("rewardbench", rows, scores, work)
        yield "RewardBench", drawn(seed), len(rows), paired(theirs, ours)
    yield from compare_reward_bench_2(utils, work)


def compare_reward_bench_2(utils: Any, work: Path) -> Iterator[Comparison]:
    from datasets import Dataset

    for seed in range(4):
        rows = benchmark_rows.reward_bench_2(120, seed)
        scores = random_scores(seed, [row["total_completions"] for row in rows])
        unrolled = [
            {"text": text, "scores": score, "id": row["id"], "subset": row["subset"]}
            for row, each in zip(rows, scores, strict=True)
            for text, score in zip(row["chosen"] + row["rejected"], each, strict=True)
        ]
        rolled = utils.reroll_and_score_dataset(Dataset.from_list(unrolled), [len(each) for each in scores])
        rolled = rolled.add_column("num_correct", [row["num_correct"] for row in rows])
        theirs = {}
        for subset in ("Factuality", "Math"):
            results = [each["results"] for each in rolled if each["subset"] == subset]
            theirs[subset] = sum(results) / len(results)
        ties = Dataset.from_list([each for each in rolled if each["subset"] == "Ties"])
        theirs["Ties"] = utils.process_single_model(ties)[1]
        theirs["mean of subsets"] = sum(theirs.values()) / len(theirs)
        ours = our_accuracy("rewardbench-2", rows, scores, work)
        yield "RewardBench 2", drawn(seed), len(rows), paired(theirs, ours)


def compare_rm_bench(repository: Path, work: Path) -> Iterator[Comparison]:
    stand_ins = ("fastchat", "fastchat.conversation", "rewardbench", "rewardbench.utils", "datasets", "transformers")
    utils = load(repository / "scripts" / "utils.py", *stand_ins)
    names = {"easy_acc": "easy", "normal_acc": "normal", "hard_acc": "hard", "total_avg_acc": "overall"}
    for seed in range(4):
        rows = benchmark_rows.rm_bench(203, seed)
        scores = random_scores(seed, [6] * len(rows))
        scored = [
            {"domain": row["domain"], "score_chosen": each[:3], "score_rejected": each[3:]}
            for row, each in zip(rows, scores, strict=True)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = {names.get(name, name): value for name, value in utils.compute_accuracy(scored).items()}
        yield "RM-Bench", drawn(seed), len(rows), paired(theirs, our_accuracy("rm-bench", rows, scores, work))


def compare_judgebench(repository: Path, work: Path) -> Iterator[Comparison]:
    metrics = load(repository / "utils" / "metrics.py")
    sections = {"knowledge": "mmlu-pro", "reasoning": "livebench-reasoning", "math": "livebench-math"}
    sections |= {"coding": "livecodebench", "overall": ""}
    for path in sorted(repository.glob("outputs/*judge_name=reward_model*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_answer = [row["judgments"][0]["judgment"]["scores"] for row in rows]
        scores = [each if row["label"] == "A>B" else each[::-1] for row, each in zip(rows, by_answer, strict=True)]
        theirs = {
            name: metrics.compute_final_metrics(rows, False, lambda row, start=start: row["source"].startswith(start))
            / 100
            for name, start in sections.items()
        }
        model = path.stem.partition("judge_model=")[2]
        yield (
            "JudgeBench",
            f"published, {model}",
            len(rows),
            paired(theirs, our_accuracy("judgebench", rows, scores, work)),
        )


def compare_rmb(repository: Path, work: Path) -> Iterator[Comparison]:
    """RMB publishes rewards and results without the rows, so only the rule for pairs is compared."""
    for path in sorted(repository.glob("eval/result/*_result.json")):
        published = json.loads(path.read_text(encoding="utf-8"))
        theirs = [row["is_correct"] for row in published]
        ours = [
            BENCHMARKS["rmb"].judge(row, [row["chosen_reward"], row["reject_reward"]], "")[0].won for row in published
        ]
        figures = {"pairs": (sum(theirs) / len(theirs), sum(ours) / len(ours))}
        figures["rows judged alike"] = (1.0, sum(a == b for a, b in zip(theirs, ours, strict=True)) / len(theirs))
        yield "RMB", f"published, {path.stem.removesuffix('_result')}", len(published), figures


def paired(theirs: dict[str, float], ours: Accuracy) -> dict[str, tuple[float, float]]:
    """(theirs, ours) by section or group; theirs must all be known to us."""
    known = ours.groups | {name: section.accuracy.value or 0.0 for name, section in ours.sections.items()}
    return {name: (float(value), known[name]) for name, value in theirs.items()}


COMPARISONS = {
    "reward_bench": compare_reward_bench,
    "rm_bench": compare_rm_bench,
    "judgebench": compare_judgebench,
    "rmb": compare_rmb,
}

if __name__ == "__main__":
    sys.exit(main())
