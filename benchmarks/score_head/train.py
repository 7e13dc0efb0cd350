"""Train the score head of the demo or of a test bed on preference pairs; measure its accuracy on held-out prompts.

    python -m benchmarks.score_head.train PAIRS.jsonl.gz --features features.safetensors --output head.safetensors

The backbone is not trained. Each conversation gives one feature vector, the head's input at the scored token, and the
head is fitted to these (see `fitting.py`). Computing the features takes over an hour on one core for the demo, the rest
a minute. They are stored in --features, from which an interrupted run is resumed.
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

from benchmarks.score_head.features import Backbone, FeatureStore, quantization_step_noise, two_percent_noise
from benchmarks.score_head.fitting import NETWORKS, NoiseMetric, fit_linear, fit_network, head_scores, merge_networks
from quantize.solver.settings import usable_group_size
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.model_config import BLOCK_LINEARS
from runtime.common.files import atomic_file
from runtime.conversations.conversation import ChatMessage, PreferencePair, digest_messages
from runtime.conversations.rendering import RenderedConversation, Renderer
from runtime.conversations.row_files import read_rows
from runtime.conversations.row_shapes import parse_row
from runtime.modeling.precision import FLOAT32, PURE_BFLOAT16

HELD_OUT_FRACTION = 0.18  # of the prompts
NOISE_FLOOR_CONVERSATIONS, BF16_CONVERSATIONS, TWO_PERCENT_CONVERSATIONS = 50, 1000, 200
STEP_SEEDS, STEP_CONVERSATIONS = 40, 24
# Chosen by cross-validation within the training prompts, and by the effect of 4-bit GPTQ on the scores.
BF16_WEIGHT, TWO_PERCENT_WEIGHT, STEP_WEIGHT = 800.0, 100.0, 2.0
BASE_VARIANT = "bf16-products"  # the features that the head is trained on


def main(argv: Sequence[str] | None = None) -> None:
    """Run the training end to end and print the head's accuracy as JSON."""
    arguments = parse(argv)
    # 1. Read the pairs and render their distinct conversations.
    checkpoint = open_checkpoint(arguments.model)
    renderer = Renderer.from_directory(checkpoint.directory, checkpoint.model_config.max_position_embeddings)
    pairs = read_pairs(arguments.pairs, arguments.max_characters)
    both = {digest_messages(c): c for pair in pairs for c in both_conversations(pair)}
    rendered = {key: renderer.render(conversation) for key, conversation in both.items()}
    held_out = {digest_messages(c) for pair in pairs if is_held_out(pair) for c in both_conversations(pair)}
    # 2. Compute the features, and how rounding noise changes them.
    store = FeatureStore(arguments.features)
    store.add(BASE_VARIANT, rendered, partial(Backbone, checkpoint))
    noises = measure_noises(store, checkpoint, rendered, held_out, arguments.noise_share)
    # 3. Fit and write the head.
    training = [pair for pair in pairs if not is_held_out(pair)]
    head = fit(*pair_features(store, training), noises)
    with atomic_file(arguments.output) as temporary:
        save_file(head, temporary, metadata={"format": "pt"})
    # 4. Measure the accuracy.
    testing = [pair for pair in pairs if is_held_out(pair)]
    result = {"training_pairs": len(training), **accuracy(head, store, testing)}
    print(json.dumps({**result, **noise_floor(head, store, held_out)}, indent=2))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="preference pairs: JSONL, JSON or Parquet, also gzipped")
    parser.add_argument("--model", default="demo", help="checkpoint whose head is trained (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the head to write (safetensors)")
    parser.add_argument("--features", type=Path, required=True, help="file that stores the features (safetensors)")
    parser.add_argument(
        "--max-characters", type=int, default=4000, help="skip longer conversations (default %(default)s)"
    )
    parser.add_argument(
        "--noise-share",
        type=float,
        default=1.0,
        help="share of the conversations and draws that measure rounding noise, for slow backbones (default 1)",
    )
    return parser.parse_args(argv)


def read_pairs(path: Path, max_characters: int) -> list[PreferencePair]:
    """Read the pairs whose conversations both have at most `max_characters`."""
    parsed = (parse_row(row, where) for where, row in read_rows(path))
    pairs = (pair for pair in parsed if isinstance(pair, PreferencePair))
    return [pair for pair in pairs if max(map(characters, both_conversations(pair))) <= max_characters]


def both_conversations(pair: PreferencePair) -> tuple[list[ChatMessage], list[ChatMessage]]:
    """The chosen and the rejected conversation."""
    return pair.chosen_conversation, pair.rejected_conversation


def characters(messages: list[ChatMessage]) -> int:
    """Number of characters in all turns."""
    return sum(len(message["content"]) for message in messages)


def is_held_out(pair: PreferencePair) -> bool:
    """Whether the pair is held out, decided by a hash of its prompt, so that a prompt's pairs are never split."""
    text = json.dumps(pair.prompt, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 >= 1 - HELD_OUT_FRACTION


def pair_features(store: FeatureStore, pairs: Sequence[PreferencePair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, H] of the chosen and the rejected conversations."""
    chosen, rejected = zip(*(map(digest_messages, both_conversations(pair)) for pair in pairs), strict=True)
    return store.rows(BASE_VARIANT, list(chosen)), store.rows(BASE_VARIANT, list(rejected))


def measure_noises(
    store: FeatureStore,
    checkpoint: Checkpoint,
    rendered: Mapping[str, RenderedConversation],
    held_out: set[str],
    share: float = 1.0,
) -> list[tuple[float, torch.Tensor]]:
    """(weight, changes of features [m, H]) of each kind of noise, on training conversations.

    For held-out conversations, only the features for the noise floor are computed. `share` scales the number of
    training conversations, and of draws of the step noise.
    """
    trainable = sorted(set(rendered) - held_out)
    floor = stored_or_sampled_keys(store, "float32", sorted(held_out), NOISE_FLOOR_CONVERSATIONS)
    store.add("float32", {key: rendered[key] for key in floor}, partial(Backbone, checkpoint, FLOAT32))
    rounded = stored_or_sampled_keys(store, "plain-bf16", trainable, round(share * BF16_CONVERSATIONS))
    some = {key: rendered[key] for key in (*rounded, *floor)}
    store.add("plain-bf16", some, partial(Backbone, checkpoint, PURE_BFLOAT16))
    moved = stored_or_sampled_keys(store, "two-percent", trainable, round(share * TWO_PERCENT_CONVERSATIONS))
    some = {key: rendered[key] for key in moved}
    store.add("two-percent", some, partial(Backbone, checkpoint, add_noise=two_percent_noise))
    widths = [checkpoint.model_config.linear_shape(name)[1] for name in BLOCK_LINEARS]
    step_noise = partial(quantization_step_noise, group_size=usable_group_size(128, widths)[0])
    steps = []
    for seed in range(round(share * STEP_SEEDS)):
        variant = f"step-{seed}"
        keys = stored_or_sampled_keys(store, variant, trainable, STEP_CONVERSATIONS, seed)
        some = {key: rendered[key] for key in keys}
        store.add(variant, some, partial(Backbone, checkpoint, add_noise=step_noise, seed=seed))
        steps.append(store.rows(variant, keys) - store.rows(BASE_VARIANT, keys))
    return [
        (BF16_WEIGHT, store.rows("plain-bf16", rounded) - store.rows(BASE_VARIANT, rounded)),
        (TWO_PERCENT_WEIGHT, store.rows("two-percent", moved) - store.rows(BASE_VARIANT, moved)),
        (STEP_WEIGHT, torch.cat(steps)),
    ]


def stored_or_sampled_keys(
    store: FeatureStore, variant: str, keys: Sequence[str], wanted: int, seed: int = 0
) -> list[str]:
    """Those of `keys` with stored features of `variant`; if there are none, a random sample."""
    stored = sorted(set(store.keys(variant)) & set(keys))
    return stored or random.Random(seed).sample(keys, min(wanted, len(keys)))


def fit(
    chosen: torch.Tensor, rejected: torch.Tensor, noises: list[tuple[float, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Fit the head's four tensors to features [n, H] of training pairs."""
    features = torch.cat((chosen, rejected))
    metric = NoiseMetric.measure(features, noises)
    z_chosen, z_rejected = metric.to_z(chosen), metric.to_z(rejected)
    start = fit_linear(z_chosen, z_rejected)
    networks = [fit_network(z_chosen, z_rejected, start, seed) for seed in range(NETWORKS)]
    return merge_networks(networks, metric, features)


def accuracy(head: dict[str, torch.Tensor], store: FeatureStore, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Pairwise accuracy of the head and of the rule that the longer response wins, overall and by category."""
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
    """Mean absolute change of scores from float32 to pure bf16, head included, in standard deviations."""
    keys = [key for key in store.keys("float32") if key in held_out]
    exact = head_scores(head, store.rows("float32", keys))
    rounded = head_scores(head, store.rows("plain-bf16", keys).bfloat16())
    scores = head_scores(head, store.rows(BASE_VARIANT, store.keys(BASE_VARIANT)))
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
