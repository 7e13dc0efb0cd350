"""Quantize a model with many settings and compare each variant with the unquantized model on held-out pairs.

    python benchmarks/variants.py --pairs pairs.jsonl.gz --count 500 --work /tmp/variants --json result.json

Each variant is made by `quantize/run.py` from the same calibration set and scores the same held-out pairs. The table
has one row per variant; the JSON adds 95 % bootstrap intervals. `plain bf16` is the unquantized model computed in
bfloat16 throughout, as by transformers. `gptq-4, fp8 products` is the `gptq-4` variant, scored in fp8. `--only NAME
...` selects variants; `--dtype bfloat16` is faster and less exact. Finished variants and scores are
kept in --work and reused.
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

from calibration.sampling import Sample, sample  # noqa: E402
from calibration.sources import load_rows  # noqa: E402
from quantize.report.head_recalibration import HeadRecalibration, RecalibrationData, recalibrate_head  # noqa: E402
from quantize.report.scores import prompt_groups  # noqa: E402
from quantize.run import main as quantize  # noqa: E402
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from runtime.common.errors import ConversationError  # noqa: E402
from runtime.conversations.rendering import RenderedConversation, Renderer  # noqa: E402
from runtime.evaluation.metrics import ParityMetrics, measure_metrics  # noqa: E402
from runtime.execution.block_loading import read_head  # noqa: E402
from runtime.modeling.precision import FLOAT8, PRECISIONS, PURE_BFLOAT16  # noqa: E402
from runtime.modeling.qwen2 import ScoreHead  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

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
    "gptq-4, not refined": ["--descent-passes", "0"],
    "gptq-4, refined ten times": ["--descent-passes", "10"],
    "gptq-4, plain": [
        "--no-activation-order",
        "--no-static-groups",
        "--no-importance-scales",
        "--no-correction",
        "--descent-passes",
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
    pairs = draw_pairs(arguments.model, arguments.pairs, arguments.count, arguments.max_tokens, arguments.seed)
    calibration = draw_calibration(checkpoint)
    rows = pairs + [row.rendered for row in calibration.calibration]
    print(f"{len(pairs) // 2} pairs, {sum(len(row.token_ids) for row in pairs):,} tokens", file=sys.stderr)
    reference = hidden_states(arguments, "reference", arguments.model, rows)
    floor = hidden_states(arguments, "floor", arguments.model, pairs).bfloat16()
    expected = by_pair(head(reference[: len(pairs)]))
    table = {"plain bf16": (measure_metrics(expected, by_pair(head(floor))), None, "")}
    for name in arguments.only or VARIANTS:
        hidden = hidden_states(arguments, name, str(make(arguments, name)), rows)
        repair = recalibrate(head, reference[len(pairs) :], hidden[len(pairs) :], calibration)
        original, repaired = (by_pair(each(hidden[: len(pairs)])) for each in (head, repair.head))
        table[name] = (measure_metrics(expected, repaired), measure_metrics(expected, original), repair.kind)
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
    parser.add_argument("--pairs", required=True, help="held-out preference pairs in a TRL format")
    parser.add_argument("--count", type=int, default=500, help="number of pairs (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="skip longer conversations (default %(default)s)")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True, help="directory for variants and scores")
    parser.add_argument("--only", nargs="*", choices=[*VARIANTS], metavar="NAME", help="variants to run (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here (default: standard output)")
    return parser.parse_args()


def draw_pairs(model: str, source: str, count: int, max_tokens: int, seed: int) -> list[RenderedConversation]:
    """Alternating chosen and rejected conversations of `count` pairs from `source`.

    A prompt's second pair is drawn only when all prompts are used, since bootstrap intervals assume independent pairs.
    """
    checkpoint = open_checkpoint(model)
    renderer = Renderer.from_directory(checkpoint.directory, max_tokens)
    by_prompt: dict[str, list] = {}
    for pair in load_rows(source).pairs:
        by_prompt.setdefault(repr(pair.prompt), []).append(pair)
    generator = random.Random(seed)
    prompts = sorted(by_prompt)
    generator.shuffle(prompts)
    drawn: list[RenderedConversation] = []
    for turn in range(max(map(len, by_prompt.values()))):
        for prompt in prompts:
            if len(drawn) >= 2 * count:
                return drawn
            if turn < len(by_prompt[prompt]):
                pair = by_prompt[prompt][turn]
                try:
                    drawn += [renderer.render(each) for each in (pair.chosen_conversation, pair.rejected_conversation)]
                except ConversationError:
                    del drawn[len(drawn) // 2 * 2 :]
    return drawn


def draw_calibration(checkpoint: Checkpoint) -> Sample:
    """The default calibration set of `quantize/run.py`, on which the head is recalibrated."""
    renderer = Renderer.from_directory(checkpoint.directory, checkpoint.model_config.max_position_embeddings)
    return sample(load_rows(), renderer, rows_wanted=128, parity_pairs=0)


def make(arguments: argparse.Namespace, name: str) -> Path:
    """Quantize, unless an earlier run did. The head is recalibrated later, so that both heads can be compared."""
    directory = arguments.work / slug("gptq-4" if name == FP8 else name)
    if not (directory / "parity.json").exists():
        command = ["--model", arguments.model, "--output", str(directory), "--parity-pairs", "2", "--resume"]
        command += ["--dtype", arguments.dtype, "--no-recalibration", *VARIANTS[name]]
        assert quantize(command) == 0, name
    return directory


def hidden_states(
    arguments: argparse.Namespace, name: str, model: str, rows: list[RenderedConversation]
) -> torch.Tensor:
    """Hidden states [rows, H] at the scored tokens, computed once and cached in a file."""
    file = arguments.work / f"{slug(name)}.{arguments.dtype}.{len(rows)}.npy"
    if not file.exists():
        precision = {"floor": PURE_BFLOAT16, FP8: FLOAT8}.get(name, PRECISIONS[arguments.dtype])
        np.save(file, Scorer(open_checkpoint(model), precision=precision).hidden_at_scored_tokens(rows).numpy())
    return torch.from_numpy(np.load(file))


def recalibrate(
    head: ScoreHead, reference: torch.Tensor, quantized: torch.Tensor, calibration: Sample
) -> HeadRecalibration:
    """Recalibrate the head as `quantize/run.py` does, from hidden states of the calibration set."""
    features, groups = head.features(reference), prompt_groups(calibration)
    return recalibrate_head(head, RecalibrationData(features, head.features(quantized), head.score(features), groups))


def by_pair(scores: torch.Tensor) -> np.ndarray:
    """Scores [2 pairs] to [pairs, 2]."""
    return scores.double().numpy().reshape(-1, 2)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def print_table(rows: dict[str, tuple[ParityMetrics, ParityMetrics | None, str]]) -> None:
    """Print metrics with the recalibrated head, and the mean shift with the original head."""
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
