"""The ids of a chat, as the tokenizer's template writes it."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = ("bos_token", "eos_token")
"""By which templates name special tokens."""


class ChatPrompts:
    """Makes prompts of chats.

    Hugging Face's tokenizers do it as transformers does: the template has all special tokens that the
    prompt is to have, so the tokenizer adds none. Others know no template. There its special tokens are
    looked up by their ids, and only those that the template has written count: a message that spells
    one stays text.

    Args:
        tokenizer: Megatron's, with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._hugging_face = getattr(tokenizer._tokenizer, "tokenizer", None)
        if not hasattr(self._hugging_face, "apply_chat_template"):
            self._hugging_face = None
            mark = f"\0{secrets.randbits(64)}"  # no client can guess it, and no filter changes it
            special = {name: token for name in NAMES if (token := self._id_of(name)) is not None}
            self._marks = {name: f"{mark}-{place}\0" for place, name in enumerate(special)}
            self._ids = {self._marks[name]: token for name, token in special.items()}

    def ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt that asks for the answer to ``messages``.

        Raises:
            Exception: what the template raises.
        """
        template = self._tokenizer.chat_template
        if self._hugging_face is not None:
            one = template if isinstance(template, str) else None  # of several it takes the default
            return self._hugging_face.apply_chat_template(
                messages,
                chat_template=one,
                add_generation_prompt=True,
                return_dict=False,
            )
        from transformers.utils.chat_template_utils import _compile_jinja_template

        text = _compile_jinja_template(template).render(
            messages=messages, add_generation_prompt=True, **self._marks
        )
        ids: list[int] = []
        for part in re.split(f"({'|'.join(self._ids)})", text) if self._ids else [text]:
            if part in self._ids:
                ids.append(self._ids[part])
            elif part:
                ids += self._tokenizer.tokenize(part)
        return ids

    def _id_of(self, name: str) -> int | None:
        """The id of a special token, if the tokenizer has one."""
        try:
            found = getattr(self._tokenizer, name.removesuffix("_token"))
        except Exception:  # its library may raise anything for one that it lacks
            return None
        return found if isinstance(found, int) and found >= 0 else None
