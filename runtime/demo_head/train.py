"""Train the demo's score head on preference pairs, and say how good it is on prompts it never saw.

    python -m runtime.demo_head.train PAIRS.jsonl.gz --features features.safetensors --output head.safetensors

The backbone stays as it is. Each conversation becomes one vector, what the head sees at the scored token, and
the head is fitted to those (see `fitting`). `--features` keeps the vectors: computing them takes an hour on one
core, everything else a minute, and a run that was cut off goes on from what is stored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runtime.chat import Rendered, Renderer
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.conversation import Message, PreferencePair, digest_messages, parse_row
from runtime.demo_head.features import Backbone, FeatureStore, by_two_percent, within_a_step
from runtime.demo_head.fitting import NETWORKS, NoiseMetric, fit_linear, fit_network, fold, head_scores
from runtime.files import whole_file
from runtime.numerics import FLOAT32, PLAIN_BFLOAT16
from runtime.rows import read_rows

HELD_OUT = 0.18  # the share of prompts that nothing is fitted or chosen on
FLOOR_CONVERSATIONS, BF16_CONVERSATIONS, TWO_PERCENT_CONVERSATIONS = 50, 1000, 200
STEP_SEEDS, STEP_CONVERSATIONS = 40, 24
# Chosen by cross-validation within the training prompts, and by what 4-bit GPTQ does to the scores.
BF16_WEIGHT, TWO_PERCENT_WEIGHT, STEP_WEIGHT = 800.0, 100.0, 2.0
EXACT = "bf16-products"  # the variant that is trained on


def main(argv: Sequence[str] | None = None) -> None:
    """Read, compute features, fit, write the head, and print what it is worth as JSON."""
    arguments = parse(argv)
    # 1. Pairs, and the distinct conversations in them, rendered as they will be scored.
    checkpoint = open_checkpoint("demo")
    renderer = Renderer.from_directory(checkpoint.directory, checkpoint.architecture.max_position_embeddings)
    pairs = read_pairs(arguments.pairs, arguments.max_characters)
    both = {digest_messages(c): c for pair in pairs for c in sides(pair)}
    rendered = {key: renderer.render(conversation) for key, conversation in both.items()}
    held_out = {digest_messages(c) for pair in pairs if is_held_out(pair) for c in sides(pair)}
    # 2. What the head sees of each, and how rounding moves that.
    store = FeatureStore(arguments.features)
    store.add(EXACT, rendered, partial(Backbone, checkpoint))
    noises = measure_noises(store, checkpoint, rendered, held_out)
    # 3. Fit, and write.
    training = [pair for pair in pairs if not is_held_out(pair)]
    head = fit(*pair_features(store, training), noises)
    with whole_file(arguments.output) as temporary:
        save_file(head, temporary, metadata={"format": "pt"})
    # 4. Say what it is worth.
    testing = [pair for pair in pairs if is_held_out(pair)]
    result = {"training_pairs": len(training), **accuracy(head, store, testing)}
    print(json.dumps({**result, **noise_floor(head, store, held_out)}, indent=2))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="preference pairs: JSONL, JSON or Parquet, also gzipped")
    parser.add_argument("--output", type=Path, required=True, help="the head to write (safetensors)")
    parser.add_argument("--features", type=Path, required=True, help="file in which features are kept")
    parser.add_argument("--max-characters", type=int, default=4000, help="leave out longer conversations")
    return parser.parse_args(argv)


def read_pairs(path: Path, max_characters: int) -> list[PreferencePair]:
    """The pairs both of whose conversations are short enough."""
    parsed = (parse_row(row, where) for where, row in read_rows(path))
    pairs = (pair for pair in parsed if isinstance(pair, PreferencePair))
    return [pair for pair in pairs if max(map(characters, sides(pair))) <= max_characters]


def sides(pair: PreferencePair) -> tuple[list[Message], list[Message]]:
    """The chosen and the rejected conversation."""
    return pair.chosen_conversation, pair.rejected_conversation


def characters(messages: list[Message]) -> int:
    """Characters in all of a conversation's turns."""
    return sum(len(message["content"]) for message in messages)


def is_held_out(pair: PreferencePair) -> bool:
    """By a lot drawn from the prompt's text, so that all pairs of a prompt fall on the same side."""
    text = json.dumps(pair.prompt, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 >= 1 - HELD_OUT


def pair_features(store: FeatureStore, pairs: Sequence[PreferencePair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, H] of the chosen and of the rejected conversations."""
    chosen, rejected = zip(*(map(digest_messages, sides(pair)) for pair in pairs), strict=True)
    return store.rows(EXACT, list(chosen)), store.rows(EXACT, list(rejected))


def measure_noises(
    store: FeatureStore, checkpoint: Checkpoint, rendered: Mapping[str, Rendered], held_out: set[str]
) -> list[tuple[float, torch.Tensor]]:
    """Weights, and changes [m, H] of the features of conversations that are trained on.

    Of held-out ones only what the noise floor is measured on is computed.
    """
    trainable = sorted(set(rendered) - held_out)
    floor = draw(store, "float32", sorted(held_out), FLOOR_CONVERSATIONS)
    store.add("float32", {key: rendered[key] for key in floor}, partial(Backbone, checkpoint, FLOAT32))
    rounded = draw(store, "plain-bf16", trainable, BF16_CONVERSATIONS)
    some = {key: rendered[key] for key in (*rounded, *floor)}
    store.add("plain-bf16", some, partial(Backbone, checkpoint, PLAIN_BFLOAT16))
    moved = draw(store, "two-percent", trainable, TWO_PERCENT_CONVERSATIONS)
    some = {key: rendered[key] for key in moved}
    store.add("two-percent", some, partial(Backbone, checkpoint, disturb=by_two_percent))
    steps = []
    for seed in range(STEP_SEEDS):
        variant = f"step-{seed}"
        keys = draw(store, variant, trainable, STEP_CONVERSATIONS, seed)
        some = {key: rendered[key] for key in keys}
        store.add(variant, some, partial(Backbone, checkpoint, disturb=within_a_step, seed=seed))
        steps.append(store.rows(variant, keys) - store.rows(EXACT, keys))
    return [
        (BF16_WEIGHT, store.rows("plain-bf16", rounded) - store.rows(EXACT, rounded)),
        (TWO_PERCENT_WEIGHT, store.rows("two-percent", moved) - store.rows(EXACT, moved)),
        (STEP_WEIGHT, torch.cat(steps)),
    ]


def draw(store: FeatureStore, variant: str, keys: Sequence[str], wanted: int, seed: int = 0) -> list[str]:
    """Those of `keys` that `variant` is stored for, or else a lot drawn from them."""
    stored = sorted(set(store.keys(variant)) & set(keys))
    return stored or random.Random(seed).sample(keys, min(wanted, len(keys)))


def fit(
    chosen: torch.Tensor, rejected: torch.Tensor, noises: list[tuple[float, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The head's four tensors, from features [n, H] of training pairs."""
    features = torch.cat((chosen, rejected))
    metric = NoiseMetric.measure(features, noises)
    z_chosen, z_rejected = metric.to_z(chosen), metric.to_z(rejected)
    start = fit_linear(z_chosen, z_rejected)
    networks = [fit_network(z_chosen, z_rejected, start, seed) for seed in range(NETWORKS)]
    return fold(networks, metric, features)


def accuracy(head: dict[str, torch.Tensor], store: FeatureStore, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """The share of pairs ranked as preferred, beside what length alone gets right, in all and by category."""
    chosen, rejected = pair_features(store, pairs)
    right = (head_scores(head, chosen) > head_scores(head, rejected)).tolist()
    longer = [characters(pair.chosen) > characters(pair.rejected) for pair in pairs]
    rows = list(zip(pairs, right, longer, strict=True))

    def summary(category: str | None) -> dict[str, float]:
        kept = [(hit, by_length) for pair, hit, by_length in rows if category in (None, pair.category)]
        hits, by_length = (sum(column) / len(kept) for column in zip(*kept, strict=True))
        return {"pairs": len(kept), "accuracy": round(hits, 4), "longer_wins": round(by_length, 4)}

    categories = sorted({pair.category for pair in pairs})
    return {"held_out": summary(None), "by_category": {category: summary(category) for category in categories}}


def noise_floor(head: dict[str, torch.Tensor], store: FeatureStore, held_out: set[str]) -> dict[str, Any]:
    """How far plain bf16, head included, moves scores from float32: mean |shift| in standard deviations."""
    keys = [key for key in store.keys("float32") if key in held_out]
    exact = head_scores(head, store.rows("float32", keys))
    rounded = head_scores(head, store.rows("plain-bf16", keys).bfloat16())
    scores = head_scores(head, store.rows(EXACT, store.keys(EXACT)))
    return {
        "score_mean": round(scores.mean().item(), 4),
        "score_std": round(scores.std().item(), 4),
        "bf16_shift": {
            "conversations": len(keys),
            "value": round(((rounded - exact).abs().mean() / scores.std()).item(), 4),
        },
    }


if __name__ == "__main__":
    main()
