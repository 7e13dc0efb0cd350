"""Quantize a model in many ways and hold each against the unquantized one on held-out preference pairs.

    python benchmarks/variants.py --pairs pairs.jsonl.gz --count 500 --work /tmp/variants --json result.json

Each variant is made by the ordinary command from the same calibration rows; then every variant scores the same
pairs, none of which was calibrated on, and its figures stand in one table, with 95 % bootstrap intervals in
the JSON. `plain bf16` is the unquantized model as transformers computes it in bfloat16. `--only NAME ...` picks
variants, `--dtype bfloat16` trades exactness for speed. `gptq-4, fp8 products` is the model of `gptq-4`, scored in fp8.
Finished variants and scores are kept in --work and reused.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration.conversations import load_rows  # noqa: E402
from calibration.sampling import Sample, sample  # noqa: E402
from quantize.outcome import prompt_groups  # noqa: E402
from quantize.repair import Evidence, Repair, fit_repair  # noqa: E402
from quantize.run import main as quantize  # noqa: E402
from runtime.chat import Rendered, Renderer  # noqa: E402
from runtime.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from runtime.errors import ConversationError  # noqa: E402
from runtime.figures import Figures, measure_figures  # noqa: E402
from runtime.numerics import FLOAT8, NUMERICS, PLAIN_BFLOAT16  # noqa: E402
from runtime.qwen2 import ScoreHead  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402
from runtime.sweep import read_head  # noqa: E402

FP8 = "gptq-4, fp8 products"
VARIANTS = {
    "gptq-8": ["--bits", "8"],
    "gptq-4": ["--bits", "4"],
    FP8: ["--bits", "4"],
    "nf4": ["--method", "nf4"],
    "int8": ["--method", "int8"],
    "rtn-4": ["--method", "rtn"],
    "gptq-4, columns in order": ["--no-activation-order"],
    "gptq-4, scales when a group is entered": ["--no-activation-order", "--no-static-groups"],
    "gptq-4, min-max scales": ["--no-importance-scales"],
    "gptq-4, no correction": ["--no-correction"],
    "gptq-4, not refined": ["--refine-passes", "0"],
    "gptq-4, refined ten times": ["--refine-passes", "10"],
    "gptq-4, plain": [
        "--no-activation-order",
        "--no-static-groups",
        "--no-importance-scales",
        "--no-correction",
        "--refine-passes",
        "0",
        "--scored-share",
        "0",
    ],
    "gptq-4, desc_act": ["--desc-act", "--no-static-groups"],
    "gptq-4, asymmetric": ["--asymmetric"],
    "gptq-4, all tokens alike": ["--scored-share", "0"],
    "gptq-4, scored share 1/2": ["--scored-share", "0.5"],
    "gptq-4, damp 0.001": ["--damp-percent", "0.001"],
    "gptq-4, damp 0.05": ["--damp-percent", "0.05"],
    "gptq-4, 64 rows": ["--rows", "64"],
    "gptq-4, 192 rows": ["--rows", "192"],
}


def main() -> int:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model)
    head = read_head(checkpoint)
    pairs = draw_pairs(arguments)
    calibration = draw_calibration(checkpoint)
    rows = pairs + [row.rendered for row in calibration.calibration]
    print(f"{len(pairs) // 2} pairs, {sum(len(row.token_ids) for row in pairs):,} tokens", file=sys.stderr)
    reference = hidden_states(arguments, "reference", arguments.model, rows)
    floor = hidden_states(arguments, "floor", arguments.model, pairs).bfloat16()
    expected = by_pair(head(reference[: len(pairs)]))
    table = {"plain bf16": (measure_figures(expected, by_pair(head(floor))), None, "")}
    for name in arguments.only or VARIANTS:
        hidden = hidden_states(arguments, name, str(make(arguments, name)), rows)
        repair = repair_of(head, reference[len(pairs) :], hidden[len(pairs) :], calibration)
        original, repaired = (by_pair(each(hidden[: len(pairs)])) for each in (head, repair.head))
        table[name] = (measure_figures(expected, repaired), measure_figures(expected, original), repair.kind)
        print_table({name: table[name]})
    print_table(table)
    result = {"model": arguments.model, "pairs": len(pairs) // 2, "dtype": arguments.dtype, "variants": {}}
    for name, (repaired, original, kind) in table.items():
        result["variants"][name] = {
            "arguments": VARIANTS.get(name, []),
            "repair": kind,
            "repaired": repaired.model_dump(),
            "original_head": original.model_dump() if original else None,
        }
    if arguments.json is None:
        print(json.dumps(result))
    else:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="preference pairs to compare on, TRL's formats")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=256, help="leave out longer conversations")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[*VARIANTS], metavar="NAME")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def draw_pairs(arguments: argparse.Namespace) -> list[Rendered]:
    """Chosen and rejected in turn, of one pair a prompt, so that intervals do not count a prompt twice."""
    checkpoint = open_checkpoint(arguments.model)
    renderer = Renderer.from_directory(checkpoint.directory, arguments.max_tokens)
    by_prompt: dict[str, list] = {}
    for pair in load_rows(arguments.pairs).pairs:
        by_prompt.setdefault(repr(pair.prompt), []).append(pair)
    generator = random.Random(arguments.seed)
    prompts = sorted(by_prompt)
    generator.shuffle(prompts)
    drawn: list[Rendered] = []
    for spare in range(max(map(len, by_prompt.values()))):  # a second pair of a prompt only when prompts run out
        for prompt in prompts:
            if len(drawn) >= 2 * arguments.count:
                return drawn
            if spare < len(by_prompt[prompt]):
                pair = by_prompt[prompt][spare]
                try:
                    drawn += [renderer.render(each) for each in (pair.chosen_conversation, pair.rejected_conversation)]
                except ConversationError:
                    del drawn[len(drawn) // 2 * 2 :]
    return drawn


def draw_calibration(checkpoint: Checkpoint) -> Sample:
    """The rows that the command calibrates on by default: what a repair is fitted on."""
    renderer = Renderer.from_directory(checkpoint.directory, checkpoint.architecture.max_position_embeddings)
    return sample(load_rows(), renderer, rows_wanted=128, parity_pairs=0)


def make(arguments: argparse.Namespace, name: str) -> Path:
    """Quantize, unless an earlier run did; repairs are fitted here, so that both heads can be told apart."""
    directory = arguments.work / slug("gptq-4" if name == FP8 else name)
    if not (directory / "parity.json").exists():
        command = ["--model", arguments.model, "--output", str(directory), "--parity-pairs", "2", "--resume"]
        command += ["--dtype", arguments.dtype, "--no-repair", *VARIANTS[name]]
        assert quantize(command) == 0, name
    return directory


def hidden_states(arguments: argparse.Namespace, name: str, model: str, rows: list[Rendered]) -> torch.Tensor:
    """What the head of `model` starts from [rows, H], computed once and kept."""
    file = arguments.work / f"{slug(name)}.{arguments.dtype}.{len(rows)}.npy"
    if not file.exists():
        numerics = {"floor": PLAIN_BFLOAT16, FP8: FLOAT8}.get(name, NUMERICS[arguments.dtype])
        np.save(file, Scorer(open_checkpoint(model), numerics=numerics).hidden_at_scored(rows).numpy())
    return torch.from_numpy(np.load(file))


def repair_of(head: ScoreHead, reference: torch.Tensor, quantized: torch.Tensor, calibration: Sample) -> Repair:
    """The repair that the command would have made, from hidden states at the calibration rows."""
    features, groups = head.features(reference), prompt_groups(calibration)
    return fit_repair(head, Evidence(features, head.features(quantized), head.score(features), groups))


def by_pair(scores: torch.Tensor) -> np.ndarray:
    """Scores [2 pairs] to [pairs, 2]."""
    return scores.double().numpy().reshape(-1, 2)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def print_table(rows: dict[str, tuple[Figures, Figures | None, str]]) -> None:
    """Figures after the repair that was kept; the shift with the original head beside it."""
    table = Table("variant", "agreement", "Spearman", "mean shift", "unrepaired", "after affine", "repair", "flips")
    for name, (figures, original, kind) in rows.items():
        table.add_row(
            name,
            _interval(figures.agreement, 3),
            _interval(figures.spearman, 4),
            _interval(figures.mean_shift, 3),
            f"{original.mean_shift.value:.3f}" if original else "",
            f"{figures.shift_after_affine.value:.3f}",
            kind,
            str(figures.flips),
        )
    Console(stderr=True, width=140).print(table)


def _interval(estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
