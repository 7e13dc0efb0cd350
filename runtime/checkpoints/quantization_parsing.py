"""Read a `quantization_config` of this kit or another writer.

Supported: GPTQ (as in AutoGPTQ, GPTQModel, vLLM and SGLang), and NF4 and LLM.int8 of bitsandbytes. Any other option
raises an error that names it.
"""

from __future__ import annotations

import re
from typing import Any

from runtime.checkpoints.quantization_config import OVERRIDABLE_OPTIONS, Override, QuantizationConfig
from runtime.common.errors import CheckpointError, brief

# GPTQ options that change the meaning of the stored tensors, with the only supported value.
_REQUIRED_GPTQ_OPTIONS = {"pack_dtype": "int32", "is_marlin_format": False, "rotation": None, "adapter": None}
# Limits of `dynamic`. One rule per linear of the 72B is 560; a rule may list all blocks.
_MAX_RULES, _MAX_PATTERN, _MAX_PATHS = 1024, 4096, 1_000_000
_NAME_LENGTH = 40  # of a linear; the ways in which one repetition can match it


def read_quantization_config(config: dict[str, Any], where: str = "config.json") -> QuantizationConfig:
    """Read a `quantization_config`; `where` names it in error messages.

    Raises:
        CheckpointError: an option is not supported; names the option and its value.
    """
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # early transformers versions did not write it
    if method == "gptq":
        return _gptq_from_config(config, where)
    if method == "bitsandbytes":
        return _bitsandbytes_from_config(config, where)
    raise _unsupported(where, "quant_method", method, "'gptq' or 'bitsandbytes'")


def _gptq_from_config(config: dict[str, Any], where: str) -> QuantizationConfig:
    for key, value in _REQUIRED_GPTQ_OPTIONS.items():
        _choice(config, key, (value,), value, where)
    stored_as = "checkpoint_format" if config.get("checkpoint_format") else "format"  # GPTQModel writes both
    return QuantizationConfig(
        method="gptq",
        bits=_choice(config, "bits", (4, 8), None, where),
        group_size=_group_size(config, where),
        sym=_flag(config, "sym", True, where),
        desc_act=_flag(config, "desc_act", False, where),
        damp_percent=_damp_percent(config, where),
        static_groups=_flag(config, "static_groups", False, where),
        true_sequential=_flag(config, "true_sequential", True, where),
        checkpoint_format=_choice(config, stored_as, ("gptq", "gptq_v2"), "gptq", where),
        overrides=_overrides(config.get("dynamic") or {}, config, where),
    )


def _group_size(config: dict[str, Any], where: str) -> int:
    value = config.get("group_size", -1)
    if type(value) is not int or (value < 1 and value != -1):
        raise _unsupported(where, "group_size", value, "a positive whole number or -1")
    return value


def _damp_percent(config: dict[str, Any], where: str) -> float:
    value = config.get("damp_percent")
    if value is None:
        return 0.01
    if type(value) not in (int, float):
        raise _unsupported(where, "damp_percent", value, "a number")
    return float(value)


def _overrides(dynamic: Any, config: dict[str, Any], where: str) -> tuple[Override, ...]:
    """Read the rules of `dynamic`. Those that skip modules are ignored, since the tensors show which were skipped."""
    if not isinstance(dynamic, dict):
        raise _unsupported(where, "dynamic", dynamic, "an object")
    if len(dynamic) > _MAX_RULES:
        raise _unsupported(where, "dynamic", f"with {len(dynamic)} rules", f"at most {_MAX_RULES}")
    overrides = []
    for rule, options in dynamic.items():
        if rule.startswith("-:"):
            continue
        key = f"dynamic[{rule!r:.100}]"
        if not isinstance(options, dict):
            raise _unsupported(where, key, options, "an object")
        if unknown := sorted(options.keys() - set(OVERRIDABLE_OPTIONS)):
            raise _unsupported(where, f"{key}[{unknown[0]!r}]", options[unknown[0]], " or ".join(OVERRIDABLE_OPTIONS))
        pattern = rule.removeprefix("+:")
        if not _is_safe_pattern(pattern):
            raise _unsupported(where, "dynamic", rule[:100], "a simple pattern")
        merged = {key: value for key, value in config.items() if key != "dynamic"} | options
        overrides.append(Override(pattern, _gptq_from_config(merged, where)))
    return tuple(overrides)


def _is_safe_pattern(pattern: str) -> bool:
    """Whether a name is matched in bounded time: of its ways to match, there must be at most `_MAX_PATHS`."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    plain = re.sub(r"\\.", "x", pattern)  # an escaped character is no operator, and neither is one of a class
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain).replace("(?:", "(")
    if len(pattern) > _MAX_PATTERN or "(?" in plain or re.search(r"\)[*+?{]", plain):
        return False  # flags and lookarounds; a repeated group may take exponential time
    paths, alternatives = _NAME_LENGTH ** len(re.findall(r"[*+?{]", plain)), [1]
    for character in plain:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")":
            paths *= alternatives.pop()
    return paths * alternatives[0] <= _MAX_PATHS


def _bitsandbytes_from_config(config: dict[str, Any], where: str) -> QuantizationConfig:
    if _flag(config, "load_in_8bit", False, where):
        _choice(config, "llm_int8_has_fp16_weight", (False,), False, where)
        return QuantizationConfig(method="int8", bits=8)
    if not _flag(config, "load_in_4bit", False, where):
        raise _unsupported(where, "load_in_4bit", config.get("load_in_4bit"), "true, or load_in_8bit true")
    _choice(config, "bnb_4bit_quant_type", ("nf4",), "fp4", where)  # bitsandbytes' own default is fp4
    _choice(config, "bnb_4bit_quant_storage", ("uint8",), "uint8", where)
    compute_dtype = _choice(config, "bnb_4bit_compute_dtype", ("bfloat16", "float16", "float32"), "float32", where)
    double_quant = _flag(config, "bnb_4bit_use_double_quant", False, where)
    return QuantizationConfig(method="nf4", bits=4, double_quant=double_quant, compute_dtype=compute_dtype)


def _choice(config: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any, where: str) -> Any:
    value = config.get(key)
    value = default if value is None else value
    # The type is compared too, because True == 1 == 1.0.
    if value not in allowed or type(value) not in {type(choice) for choice in allowed}:
        raise _unsupported(where, key, value, " or ".join(repr(choice) for choice in allowed))
    return value


def _flag(config: dict[str, Any], key: str, default: bool, where: str) -> bool:
    value: bool = _choice(config, key, (True, False), default, where)
    return value


def _unsupported(where: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: quantization_config has {key} {brief(value)}, which is not supported; {expected} was expected."
    )
