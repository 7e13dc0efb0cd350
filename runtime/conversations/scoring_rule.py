"""Which token of a conversation is scored, and what its system turn is: rules of the checkpoint, read off its template.

Every reward model is scored at the end of the rendered conversation, but the ends differ:

* WorldPM's template appends `<|endoftext|>` to the last turn, and that token is scored.
* Other templates, such as that of Qwen2.5-Math-RM-72B, append nothing. The last token is scored: the line break after
  the last `<|im_end|>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.conversations.conversation import ChatMessage

END_OF_CONVERSATION = "<|endoftext|>"
LAST_TOKEN = "last"  # in `scored_token` of a config.json


def probe(response: str) -> list[ChatMessage]:
    """A conversation that ends in `response`."""
    roles_and_texts = (("system", ""), ("user", "a"), ("assistant", response))
    return [{"role": role, "content": text} for role, text in roles_and_texts]


@dataclass(frozen=True)
class ScoringRule:
    """What a checkpoint scores.

    Attributes:
        end_token: the special token that is scored; None if it is the last token, whatever that is.
        description: for the user, such as "the final `<|endoftext|>`".
    """

    end_token: str | None
    description: str

    @classmethod
    def of_template(cls, end: str, special_tokens: Sequence[str], last_token: str) -> ScoringRule | None:
        r"""Return the rule, or None if the template does not end a conversation with a special token.

        Args:
            end: what the template appends to the last response.
            special_tokens: the tokenizer's.
            last_token: text of the last token of a conversation, such as "\n".
        """
        if end.rstrip().endswith(END_OF_CONVERSATION):
            return cls(END_OF_CONVERSATION, f"the final `{END_OF_CONVERSATION}`")
        closing = max((token for token in special_tokens if token in end), key=end.rfind, default=None)
        if closing is None:  # the last token would be one of the response
            return None
        shown = last_token.encode("unicode_escape").decode()
        place = "" if last_token == closing else f" after `{closing}`"
        return cls(None, f"the last token, `{shown}`{place}")

    @property
    def name(self) -> str:
        """As in `scored_token` of the config.json that is written."""
        return self.end_token or LAST_TOKEN

    @property
    def empty_system(self) -> bool:
        """Whether a conversation without a system turn gets an empty one.

        WorldPM was trained with an empty system turn, which its template would fill with a default text. The default
        text of another model's template is meant: Qwen2.5-Math-RM was trained with "Please reason step by step ...".
        """
        return self.end_token is not None

    def with_system(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return the messages that the template is given."""
        if messages[0]["role"] == "system" or not self.empty_system:
            return list(messages)
        return [{"role": "system", "content": ""}, *messages]
