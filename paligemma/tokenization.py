"""Text to token ids and back, with Gemma's tokenizer.

A user cannot type the tokens <image>, bos, eos and pad: their names in a text are tokenised as ordinary characters. As in
transformers, all other special tokens are recognised, including those that a fine-tuned model added. Decoding works token by
token, so that an answer can be shown while it is generated. Checked in tests/test_processing_paligemma.py.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from paligemma.errors import PromptError
from paligemma.vocabulary import CODE_TOKENS, LOCATION_OR_CODE, LOCATION_TOKENS

if TYPE_CHECKING:
    import numpy as np
    import torch

SPACE = "▁"  # how Gemma's vocabulary writes a space
BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token for one byte; characters without a token are written as bytes


class TextStream:
    """Decodes token ids one by one as they are generated, and returns only complete characters.

    Together, the returned texts are the whole text. A character without a token is generated as UTF-8 bytes, one token per byte.
    These bytes are held back until the character is complete.

    Args:
        tokenizer: a tokenizer like Gemma's.
        skipped_ids: ids that give no text, such as eos.
    """

    def __init__(self, tokenizer: Tokenizer, skipped_ids: frozenset[int] = frozenset()):
        self.tokenizer = tokenizer
        self.skipped_ids = skipped_ids
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """The complete characters that can be shown after this token; "" for an id that is skipped or unknown."""
        is_known = 0 <= token_id < 2**32 and token_id not in self.skipped_ids  # tokenizers takes 32-bit ids only
        token = self.tokenizer.id_to_token(token_id) if is_known else None
        if token is None:
            return ""
        byte = BYTE.fullmatch(token)
        if byte:
            return self.decoder.decode(bytes.fromhex(byte[1]))
        return self.end() + token.replace(SPACE, " ")

    def end(self) -> str:
        """The text of bytes that are still held back: U+FFFD, or "" if there are none. Call this method after the last token."""
        return self.decoder.decode(b"", final=True)


class PromptTokenizer:
    """Encodes prompts and decodes answers.

    Args:
        tokenizer: a tokenizer like Gemma's, with <loc>, <seg> and <image>.
        ids: image_token_id, pad_token_id, bos_token_id, eos_token_id, newline_token_id.
        context: the maximum number of tokens that the model can read. encode refuses a text with more than context * (length of
            the longest token) characters, because it has more than `context` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, ids: dict[str, int], context: int):
        self.tokenizer = tokenizer
        self.ids = ids
        self.image_token_id = ids["image_token_id"]
        self.pad_token_id = ids["pad_token_id"]
        self.bos_token_id = ids["bos_token_id"]
        self.eos_token_id = ids["eos_token_id"]
        self.newline_token_id = ids["newline_token_id"]
        self.vocab_size = tokenizer.get_vocab_size()  # the embedding can have more rows, which are untrained
        self.context = context
        names = [tokenizer.id_to_token(number) for number in (self.pad_token_id, self.bos_token_id, self.eos_token_id)]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        self.loc_seg_ids = {token: tokenizer.token_to_id(token) for token in LOCATION_TOKENS + CODE_TOKENS}
        self.location_ids = range(self.loc_seg_ids[LOCATION_TOKENS[0]], self.loc_seg_ids[LOCATION_TOKENS[-1]] + 1)
        self.code_ids = range(self.loc_seg_ids[CODE_TOKENS[0]], self.loc_seg_ids[CODE_TOKENS[-1]] + 1)
        added = tokenizer.get_added_tokens_decoder().items()
        control = {number: token.content for number, token in added if token.special and token.content not in self.loc_seg_ids}
        self.control_ids = frozenset(control)  # all special tokens except <loc> and <seg>; decode drops them
        reserved_ids = {self.image_token_id, self.pad_token_id, self.bos_token_id, self.eos_token_id}
        # Maps ids to names of the control tokens that a user cannot type. A text is cut after the first character of such a
        # name, so that the tokenizer does not recognise the token.
        self.reserved_tokens = {number: token for number, token in control.items() if number in reserved_ids}
        cuts = (f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in self.reserved_tokens.values() if len(t) > 1)
        self.cut = re.compile("|".join(cuts))

    def encode(self, text: str, notes: list[str] | None = None) -> list[int]:
        """The ids of a text. Nothing is added to the text, and its characters never become <image>, bos, eos or pad.

        Raises: PromptError if the text is not a str, cannot be encoded as UTF-8, or is too long for the model.
        """
        if not isinstance(text, str):
            raise PromptError(f"the text is {text!r:.40}. A text (str) is needed.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error
        if self.is_too_long(text):
            limit = self.context * self.longest_token
            raise PromptError(f"the text has {len(text)} characters, but at most {limit} can fit. Shorten it.")
        typed = [token for token in self.reserved_tokens.values() if token in text]
        if typed and notes is not None:
            notes.append(f"{', '.join(typed)} in the text is read as ordinary text, not as a token of the model.")
        return [number for number, _ in self.ids_with_ends(text)]

    def ids_with_ends(self, text: str) -> Iterator[tuple[int, int]]:
        """Each id of a text, with the position in the text at which the characters of the id end."""
        start = 0
        for token in LOCATION_OR_CODE.finditer(text):
            if token.start() > start:
                yield from self.encode_characters(text[start : token.start()], start)
            yield self.loc_seg_ids[token[0]], token.end()
            start = token.end()
        yield from self.encode_characters(text[start:], start)

    def encode_characters(self, text: str, start: int) -> list[tuple[int, int]]:
        """Like ids_with_ends, for a part of a text without <loc> and <seg>; `start` is the position of the part."""
        parts = self.cut.split(text) if any(token in text for token in self.reserved_tokens.values()) else [text]
        ids = []
        for part in parts:
            encoding = self.tokenizer.encode(part, add_special_tokens=False)
            if self.reserved_tokens.keys().isdisjoint(encoding.ids):
                ids += [(number, start + end) for number, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]
            else:  # BPE merged characters into a reserved token, which must not be returned. Each byte gets its own token.
                byte_ids = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in part.encode())
                ids += [(number, start + len(part)) for number in byte_ids]
            start += len(part)
        return ids

    @cached_property
    def longest_token(self) -> int:
        """The length of the longest token, in characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def is_too_long(self, text: str) -> bool:
        """Whether the text is too long for the model even if each of its tokens is as long as the longest token."""
        return len(text) > self.context and len(text) > self.context * self.longest_token

    def shorten(self, text: str, count: int) -> str:
        """The longest beginning of the text that has at most `count` tokens, or a slightly shorter beginning."""
        # A beginning of more than count * longest_token characters has more than `count` tokens, so the rest is not tokenised.
        beginning = text[: count * self.longest_token] if len(text) > count else text
        ends = [end for _, end in self.ids_with_ends(beginning)]
        if len(ends) <= count and beginning == text:
            return text
        kept = min(count, len(ends))
        while kept > 0 and len(self.encode(text[: ends[kept - 1]])) > count:
            # A beginning that is tokenised alone can have more tokens than the same characters have within the whole text.
            kept -= 1 + kept // 16
        return text[: ends[kept - 1]] if kept > 0 else ""

    def decode(self, ids: "Iterable[int] | torch.Tensor | np.ndarray") -> str:
        """The text of token ids. <loc> and <seg> are kept, and control tokens are dropped."""
        stream = self.stream()
        numbers = ids.tolist() if hasattr(ids, "tolist") else ids  # much faster than iterating over a tensor or an array
        return "".join(stream.put(token) for token in numbers) + stream.end()

    def stream(self) -> TextStream:
        """A TextStream, which decodes the ids of an answer while it is generated."""
        return TextStream(self.tokenizer, self.control_ids)

    def unused_ids(self, num_rows: int) -> list[int]:
        """The ids below `num_rows` that belong to no token. A model must not generate them.

        Args: num_rows: the number of rows of the embedding.
        """
        is_unused = [self.tokenizer.id_to_token(number) is None for number in range(self.vocab_size, num_rows)]
        # The tokenizer has self.vocab_size tokens. If no token has an id from self.vocab_size up, all lower ids belong to tokens,
        # so the slow check of the lower ids is skipped.
        start = self.vocab_size if all(is_unused) else 0
        return [number for number in range(start, num_rows) if self.tokenizer.id_to_token(number) is None]
