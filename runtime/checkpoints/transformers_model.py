"""The reward model as a transformers class, for use with transformers and for tests; the kit does not score with it.

`AutoModel` maps model type qwen2 to `Qwen2Model`, which has no head, and silently drops the score head. This class
keeps it: `Qwen2ForRewardModel.from_pretrained(directory)` loads 16-bit, GPTQ, NF4 and LLM.int8 checkpoints with
transformers' own loaders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel


class Qwen2ForRewardModel(Qwen2PreTrainedModel):
    """Qwen2 with the score head `Linear -> ReLU -> Linear`, applied at the last unmasked token."""

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
        """Return scores fp32 [B] for input_ids [B, T]; padding, marked by attention_mask, must be on the right."""
        options = {"use_cache": False} | kwargs
        hidden = self.model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        if attention_mask is None:
            last = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=hidden.device)
        else:
            last = attention_mask.sum(-1) - 1
        rows = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self._head(rows.float()).squeeze(-1)

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the head in fp32: transformers' bitsandbytes loader leaves the two linears in different dtypes."""
        for layer in self.score:
            if isinstance(layer, nn.Linear):
                rows = nn.functional.linear(rows, layer.weight.float(), layer.bias.float())
            else:
                rows = layer(rows)
        return rows
