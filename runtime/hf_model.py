"""The same model as a transformers class, for those who work with transformers and for our own checks.

A bare `AutoModel` resolves model type qwen2 to the headless `Qwen2Model` and drops the score head without a
word; this class keeps it: `Qwen2ForRewardModel.from_pretrained(directory)` reads 16-bit, GPTQ, NF4 and
LLM.int8 checkpoints through transformers' own loaders. The kit itself does not use it to score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel


class Qwen2ForRewardModel(Qwen2PreTrainedModel):
    """Qwen2 with the head `Linear -> ReLU -> Linear`, read at the last token that is not masked."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]

    def __init__(self, config: Qwen2Config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, 1)
        )
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """input_ids [B, T], right-padded under attention_mask, to scores fp32 [B]."""
        options = {"use_cache": False} | kwargs
        hidden = self.model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        if attention_mask is None:
            last = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=hidden.device)
        else:
            last = attention_mask.sum(-1) - 1
        rows = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self._head(rows.float()).squeeze(-1)

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        """In fp32, whichever dtypes a loader left the two linears in: transformers' bitsandbytes one mixes them."""
        for layer in self.score:
            if isinstance(layer, nn.Linear):
                rows = nn.functional.linear(rows, layer.weight.float(), layer.bias.float())
            else:
                rows = layer(rows)
        return rows
