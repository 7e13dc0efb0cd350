"""Rows with the keys of each public benchmark and invented texts."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]
_WORDS = ("the", "and", "thing", "story", "answer", "counts", "sleep", "early", "north", "seven")


def _texts(seed: int) -> Any:
    draw = random.Random(seed)
    return lambda: " ".join(draw.choice(_WORDS) for _ in range(draw.randint(2, 8)))


def reward_bench(count: int = 12, seed: int = 0) -> list[Row]:
    text, subsets = _texts(seed), ("alpacaeval-easy", "mt-bench-easy", "math-prm", "hep-python", "donotanswer")
    return [
        {
            "prompt": text(),
            "chosen": text(),
            "chosen_model": "a",
            "rejected": text(),
            "rejected_model": "b",
            "subset": subsets[number % len(subsets)],
            "id": number,
        }
        for number in range(count)
    ]


def reward_bench_2(count: int = 12, seed: int = 0) -> list[Row]:
    """Two thirds are best of four; the others are prompts of Ties, each with a reference and a tied row."""
    text = _texts(seed)
    rows = []
    for number in range(count):
        ties = number % 3 == 2
        kinds = [("ref", 1, 4), ("tied", 3, 5)] if ties else [("", 1, 3)]
        for kind, right, wrong in kinds:
            rows.append(
                {
                    "id": f"{kind}:{number}" if ties else str(number),
                    "prompt": text(),
                    "chosen": [text() for _ in range(right)],
                    "rejected": [text() for _ in range(wrong)],
                    "num_correct": right,
                    "num_incorrect": wrong,
                    "total_completions": right + wrong,
                    "models": ["m"] * (right + wrong),
                    "subset": "Ties" if ties else ("Factuality", "Math")[number % 2],
                    "additional_metadata": {"category": None},
                }
            )
    return rows


def rm_bench(count: int = 10, seed: int = 0) -> list[Row]:
    text, domains = _texts(seed), ("chat", "code", "math", "safety-refuse", "safety-response")
    return [
        {
            "id": number,
            "prompt": text(),
            "chosen": [text() for _ in range(3)],
            "rejected": [text() for _ in range(3)],
            "domain": domains[number % len(domains)],
        }
        for number in range(count)
    ]


def rmb(count: int = 12, seed: int = 0) -> list[Row]:
    text = _texts(seed)

    def answer() -> Row:
        return {"llm_name": "m", "answer": text()}

    rows: list[Row] = []
    for number in range(count):
        goal = ("Helpfulness/Chat/Discussion", "Harmlessness/S1")[number % 2]
        prompt = [{"content": text(), "language": "English", "role": "user"}]
        if number % 4 < 2:
            row = {"pair_uid": str(number), "chosen": answer(), "reject": answer()}
            rows.append({"conversation_input": prompt, **row, "category_path": f"Pairwise_set/{goal}"})
        else:
            losers = [answer() for _ in range(2 + number % 3)]
            row = {"bon_uid": str(number), "bon_best": answer(), "loser_list": losers}
            rows.append({"conversation_input": prompt, **row, "category_path": f"BoN_set/{goal}"})
    return rows


def ppe_human(count: int = 12, seed: int = 0) -> list[Row]:
    text, winners = _texts(seed), ("model_a", "model_b", "tie", "model_a", "tie (bothbad)")
    return [
        {
            "question_id": f"q{number}",
            "prompt": text(),
            "response_1": text(),
            "response_2": text(),
            "winner": winners[number % len(winners)],
            "language": "English",
        }
        for number in range(count)
    ]


def ppe_correctness(count: int = 8, seed: int = 0, responses: int = 6) -> list[Row]:
    text, draw = _texts(seed), random.Random(seed)
    rows = []
    for number in range(count):
        truth = [True, False, *(draw.random() < 0.5 for _ in range(responses - 2))]
        pairs = [[i, j] for i in range(responses) for j in range(responses) if truth[i] != truth[j]]
        rows.append(
            {
                "question_id": f"q{number}",
                "prompt": text(),
                "model_name": "m",
                **{f"response_{index + 1}": text() for index in range(responses)},
                "scores": truth,
                "sampled_conflict_pairs": draw.sample(pairs, 5),
            }
        )
    return rows


def judge_bench(count: int = 12, seed: int = 0) -> list[Row]:
    text = _texts(seed)
    sources = ("mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench")
    return [
        {
            "pair_id": f"p{number}",
            "original_id": number,
            "source": sources[number % len(sources)],
            "question": text(),
            "response_model": "m",
            "response_A": text(),
            "response_B": text(),
            "label": ("A>B", "B>A")[number % 2],
        }
        for number in range(count)
    ]


ROWS = {
    "rewardbench": reward_bench,
    "rewardbench-2": reward_bench_2,
    "rm-bench": rm_bench,
    "rmb": rmb,
    "ppe-human": ppe_human,
    "ppe-math": ppe_correctness,
    "judgebench": judge_bench,
}
"""Makes rows, by the name of the benchmark; the data sets of PPE's correctness are alike."""
