"""The rules of Qwen2's tokenizer: how a text is normalized and split before byte pairs are merged."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

# The splitting rule of Qwen2's tokenizer.json.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def set_qwen2_rules(tokenizer: Tokenizer) -> None:
    """Give a BPE tokenizer the normalizer and the splitting rule of Qwen2's `tokenizer.json`.

    transformers 5 builds these rules for model type qwen2, whatever `tokenizer.json` and `tokenizer_class` say
    (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`), so a checkpoint with other rules would get other token ids there.
    """
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
