"""The rule of each benchmark against the plainest way to say it, on random scores that are often equal."""

from __future__ import annotations

import json
import math
import random
from itertools import product
from pathlib import Path
from statistics import mean

import pytest

from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row
from runtime.preference_benchmarks.accuracy import Accuracy, measure
from runtime.preference_benchmarks.registry import BENCHMARKS
from runtime.preference_benchmarks.rows import BenchmarkRows
from tests.helpers.benchmark_rows import ROWS
from tests.helpers.tiny_score import write_jsonl

ERROR = "too long"


def evaluate(name: str, rows: list[dict], directory: Path, scores: list[list[float] | None]) -> Accuracy:
    """The accuracy by scores in the order that the scoring command gives them."""
    source = write_jsonl(directory / "rows.jsonl", rows)
    checked = BenchmarkRows.check(BENCHMARKS[name], str(source))
    records = [
        {"where": f"rows.jsonl:{number}", **({"scores": each} if each else {"error": ERROR})}
        for number, each in enumerate(scores, start=1)
    ]
    return measure(checked.benchmark, checked.judge(write_jsonl(directory / "scores.jsonl", records)))


def draw_scores(name: str, rows: list[dict], seed: int = 0) -> list[list[float]]:
    """Few distinct values, so that many are equal."""
    draw, options = random.Random(seed), RowOptions(BENCHMARKS[name].format)
    counts = [len(read_row(row, "", options).responses) for row in rows]
    return [[draw.randint(0, 3) / 2 for _ in range(count)] for count in counts]


def sections(result: Accuracy) -> dict[str, float | None]:
    return {name: section.accuracy.value for name, section in result.sections.items()}


def test_reward_bench_weighs_subsets_with_the_published_counts(tmp_path):
    rows = ROWS["rewardbench"](60)
    scores = draw_scores("rewardbench", rows)
    result = evaluate("rewardbench", rows, tmp_path, scores)
    won = [float(chosen > rejected) for chosen, rejected in scores]
    by_subset = {
        subset: mean(win for win, row in zip(won, rows, strict=True) if row["subset"] == subset)
        for subset in {row["subset"] for row in rows}
    }
    assert result.groups == pytest.approx(by_subset)
    expected = {
        "Chat": (100 * by_subset["alpacaeval-easy"] + 28 * by_subset["mt-bench-easy"]) / 128,
        "Safety": by_subset["donotanswer"],
        "Reasoning": (984 * by_subset["math-prm"] + 164 * by_subset["hep-python"]) / 1148,
    }
    expected |= {"mean of sections": mean(expected.values()), "all rows": mean(won)}
    assert sections(result) == pytest.approx(expected)


def ties_score(rows: list[dict], scores: list[list[float]]) -> float:
    of = {}
    for row, each in zip(rows, scores, strict=True):
        kind, number = row["id"].split(":")
        right, wrong = each[: row["num_correct"]], each[row["num_correct"] :]
        of[kind, number] = (min(right) - max(wrong), max(right) - min(right))
    numbers = {number for _, number in of}
    total = 0.3 * mean(of["tied", n][0] > 0 for n in numbers) + 0.3 * mean(of["ref", n][0] > 0 for n in numbers)
    for number in numbers:
        (reference, _), (tied, spread) = of["ref", number], of["tied", number]
        hard = min(reference, tied)
        ratio = math.nan if not spread and not hard else math.copysign(math.inf, hard) if not spread else hard / spread
        closeness = 0 if math.isnan(ratio) else math.tanh(ratio - 1)
        total += (0.2 * (tied > spread) + 0.2 * (hard > spread) + 0.01 * closeness) / len(numbers)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_reward_bench_2_shares_a_win_and_rates_ties_by_margins(tmp_path, seed):
    rows = ROWS["rewardbench-2"](48)
    scores = draw_scores("rewardbench-2", rows, seed)
    result = evaluate("rewardbench-2", rows, tmp_path, scores)
    expected = {}
    for subset in ("Factuality", "Math"):
        chosen = [each for each, row in zip(scores, rows, strict=True) if row["subset"] == subset]
        expected[subset] = mean((each[0] == max(each)) / each.count(max(each)) for each in chosen)
    ties = [(row, each) for each, row in zip(scores, rows, strict=True) if row["subset"] == "Ties"]
    expected["Ties"] = ties_score([row for row, _ in ties], [each for _, each in ties])
    assert result.groups == pytest.approx(expected)
    assert sections(result) == pytest.approx(expected | {"mean of subsets": mean(expected.values())})
    assert result.sections["Ties"].accuracy.low is None and result.sections["Math"].accuracy.low is not None


def test_rm_bench_compares_every_style_with_every_other(tmp_path):
    rows = ROWS["rm-bench"](50)
    scores = draw_scores("rm-bench", rows)
    result = evaluate("rm-bench", rows, tmp_path, scores)
    won: dict[tuple[str, str], list[bool]] = {}
    for row, each in zip(rows, scores, strict=True):
        for chosen, rejected in product(range(3), repeat=2):
            level = "normal" if chosen == rejected else "hard" if rejected > chosen else "easy"
            for domain in {row["domain"], row["domain"].partition("-")[0]}:
                won.setdefault((domain, level), []).append(each[chosen] > each[3 + rejected])
    share = {key: mean(wins) for key, wins in won.items()}
    levels, domains = ("easy", "normal", "hard"), ("chat", "code", "math", "safety")
    expected = {
        domain: mean(share[domain, level] for level in levels)
        for domain in (*domains, "safety-refuse", "safety-response")
    }
    expected |= {level: mean(share[domain, level] for domain in domains) for level in levels}
    expected["overall"] = mean(expected[domain] for domain in domains)
    assert sections(result) == pytest.approx(expected)
    assert expected["overall"] == pytest.approx(mean(expected[level] for level in levels))
    assert result.sections["hard"].rows == 50


def test_rmb_wants_the_best_response_above_all_others(tmp_path):
    rows = ROWS["rmb"](80)
    scores = draw_scores("rmb", rows)
    result = evaluate("rmb", rows, tmp_path, scores)
    won: dict[str, list[bool]] = {}
    for row, each in zip(rows, scores, strict=True):
        kind = "pairs" if "pair_uid" in row else "best of N"
        goal = "helpfulness" if "Helpfulness" in row["category_path"] else "harmlessness"
        won.setdefault(f"{goal}, {kind}", []).append(all(each[0] > other for other in each[1:]))
    expected = {name: mean(wins) for name, wins in won.items()}
    assert len(expected) == 4
    assert sections(result) == pytest.approx(expected | {"mean of sections": mean(expected.values())})


def test_ppe_human_leaves_out_the_ties_of_people(tmp_path):
    rows = ROWS["ppe-human"](50)
    scores = draw_scores("ppe-human", rows)
    result = evaluate("ppe-human", rows, tmp_path, scores)
    won = [each[0] > each[1] for each, row in zip(scores, rows, strict=True) if "tie" not in row["winner"]]
    assert sections(result) == pytest.approx({"human preference": mean(won)})
    assert (result.rows, result.sections["human preference"].rows) == (50, len(won))


def test_ppe_correctness_counts_the_sampled_pairs(tmp_path):
    rows = ROWS["ppe-math"](30)
    rows[3]["sampled_conflict_pairs"] *= 2  # drawn twice counts twice
    scores = draw_scores("ppe-math", rows)
    result = evaluate("ppe-math", rows, tmp_path, scores)
    won = [
        each[i] > each[j] if row["scores"][i] else each[j] > each[i]
        for row, each in zip(rows, scores, strict=True)
        for i, j in row["sampled_conflict_pairs"]
    ]
    assert sections(result) == pytest.approx({"correctness": mean(won)})
    assert result.sections["correctness"].rows == 30


def test_judge_bench_decides_equal_scores_for_the_second_response(tmp_path):
    rows = ROWS["judgebench"](60)
    scores = draw_scores("judgebench", rows)
    result = evaluate("judgebench", rows, tmp_path, scores)
    by_source: dict[str, list[bool]] = {}
    for row, (right, wrong) in zip(rows, scores, strict=True):
        first, second = (right, wrong) if row["label"] == "A>B" else (wrong, right)
        by_source.setdefault(row["source"], []).append(("A>B" if first > second else "B>A") == row["label"])
    everything = [win for wins in by_source.values() for win in wins]
    assert sections(result) == pytest.approx(
        {
            "knowledge": mean(by_source["mmlu-pro-law"] + by_source["mmlu-pro-math"]),
            "reasoning": mean(by_source["livebench-reasoning"]),
            "math": mean(by_source["livebench-math"]),
            "coding": mean(by_source["livecodebench"]),
            "overall": mean(everything),
        }
    )


@pytest.mark.parametrize("name", ROWS)
def test_rows_without_scores_are_lost(tmp_path, name):
    rows = ROWS[name](12)
    result = evaluate(name, rows, tmp_path, [None] * len(rows))
    assert result.errors == [ERROR] * len(rows)
    assert all(section.accuracy.value <= 0 for section in result.sections.values())  # Ties may be a little below 0
    assert all(set(section.shares.values()) == {0} for section in result.sections.values())


@pytest.mark.parametrize("name", ROWS)
def test_perfect_scores_win_everything(tmp_path, name):
    rows, options = ROWS[name](12), RowOptions(BENCHMARKS[name].format)
    scores = []
    for row in rows:
        reading = read_row(row, "", options)
        better = {index for index, _ in reading.preferences}
        scores.append([float(index in better) for index in range(len(reading.responses))])
    result = evaluate(name, rows, tmp_path, scores)
    for section, accuracy in sections(result).items():
        ties = {"Ties": 1.01, "mean of subsets": 3.01 / 3}.get(section, 1)  # as RewardBench 2 defines it
        assert accuracy == pytest.approx(ties)


def test_every_benchmark_has_a_reader_for_its_published_numbers():
    published = json.loads((Path(__file__).parents[2] / "runtime/preference_benchmarks/published.json").read_text())
    for benchmarks in published["accuracy"].values():
        for name, percents in benchmarks.items():
            rows = ROWS.get(name, ROWS["ppe-math"])(60)
            benchmark = BENCHMARKS[name]
            groups = {}
            for row in rows:
                reading = read_row(row, "", RowOptions(benchmark.format))
                for outcome in benchmark.judge(row, [0.0] * len(reading.responses), ""):
                    groups[outcome.group] = groups.get(outcome.group, 0) + outcome.of
            known = set(benchmark.sections(groups)) | {"Chat Hard"}  # whose subsets the invented rows lack
            assert set(percents) <= known and all(50 < percent < 100 for percent in percents.values())
