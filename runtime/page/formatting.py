"""Numbers as the page writes them."""

from __future__ import annotations

from runtime.api.service import ServedModel


def signed(value: float, decimals: int = 3) -> str:
    """Format a number with its sign: `+1.234`, `−0.500`, `0.000`."""
    text = f"{abs(value):.{decimals}f}"
    sign = "" if not float(text) else "+" if value > 0 else "−"
    return sign + text


def percent(share: float) -> str:
    """Format a probability in whole percent; only exactly 0 and 1 become `0 %` and `100 %`."""
    text = f"{100 * share:.0f}"
    if text in ("0", "100") and 0 < share < 1:
        return "under 1 %" if share < 0.5 else "over 99 %"
    return f"{text} %"


def duration(seconds: float) -> str:
    """Format a duration: `0.42 s`, `12 s`, `3 min 20 s`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def bits_per_weight(model: ServedModel) -> str:
    """Format the stored bits per weight: `4.16`, or `16` for an unquantized bf16 model."""
    checkpoint = model.variant.checkpoint
    quantization = checkpoint.quantization
    if quantization is None:
        return str(8 * checkpoint.model_config.dtype.itemsize)
    return f"{quantization.bits_per_weight(checkpoint.model_config):.2f}"
