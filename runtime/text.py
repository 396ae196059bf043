"""Prompts to padded token ids, and ids to text.

Flows in: strings and the bundle's tokenizer. Flows out: ids and mask, int64 [B,L]; or ids in, a string out. Knows
nothing of embeddings.
"""

from __future__ import annotations

import html
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Tokenizer

from .errors import UserError
from .spec import TextEncoderSpec


def clean(prompt: str) -> str:
    """A prompt as Wan's were before training: broken Unicode mended, HTML entities resolved twice, spaces single."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class PromptTokenizer:
    """A `tokenizers` file with the model's fixed length; `cleaned` prompts go through `clean` first."""

    def __init__(self, tokenizer: Tokenizer, length: int, cleaned: bool = False):
        self._tokenizer, self.length, self._cleaned = tokenizer, length, cleaned
        tokenizer.no_padding()  # a published file may ask for its own
        tokenizer.no_truncation()

    @classmethod
    def from_file(cls, path: Path, spec: TextEncoderSpec, remedy: str) -> PromptTokenizer:
        """Raises UserError, which ends with the remedy, when the file is not a tokenizer."""
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")), spec.length, spec.cleaned)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a readable tokenizer file ({error}); {remedy}") from error

    def __call__(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> ids and mask, int64 [B,L], padded with zeros.

        Raises UserError when a prompt has more tokens than the model was trained for or is not valid text.
        """
        ids = np.zeros((len(prompts), self.length), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"the prompt {prompt!r} is not valid UTF-8; pass UTF-8 text") from error
            tokens = self._tokenizer.encode(clean(prompt) if self._cleaned else prompt).ids
            if len(tokens) > self.length:
                raise UserError(
                    f"the prompt has {len(tokens)} tokens, the model reads {self.length}; shorten it: {prompt[:60]!r}"
                )
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def text(self, ids: list[int]) -> str:
        """The words of these ids."""
        return self._tokenizer.decode(ids)
