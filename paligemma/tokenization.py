"""Text to token ids and back, with Gemma's tokenizer.

Text from a user never becomes <image>, bos, eos or pad: these names are tokenised as ordinary characters. Every other special
token, also one that a fine-tuned model added, is recognised, as in transformers. Decoding works token by token, so that an answer
can be shown while it is generated. Checked in tests/test_processing_paligemma.py.
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

SPACE = "▁"  # Gemma's vocabulary writes a space like this
BYTE = re.compile("<0x([0-9A-F]{2})>")  # byte fallback: the token of one byte, for characters that have no token


class TextStream:
    """Text from token ids as they are generated, in whole characters. All its parts joined are the text of all ids.

    A character without a token is generated as the bytes of its UTF-8, one token per byte. These bytes are held back until they
    form a character.

    Args:
        tokenizer: a tokenizer like Gemma's.
        silent: ids that have no text.
    """

    def __init__(self, tokenizer: Tokenizer, silent: frozenset[int] = frozenset()):
        self.tokenizer = tokenizer
        self.silent = silent
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """The text that became certain with this token; "" for an id that the tokenizer does not know."""
        is_known = 0 <= token_id < 2**32 and token_id not in self.silent  # tokenizers takes 32-bit ids only
        token = self.tokenizer.id_to_token(token_id) if is_known else None
        if token is None:
            return ""
        byte = BYTE.fullmatch(token)
        if byte:
            return self.decoder.decode(bytes.fromhex(byte[1]))
        return self.end() + token.replace(SPACE, " ")

    def end(self) -> str:
        """The text that was held back: U+FFFD if the answer stopped within a character, otherwise ""."""
        return self.decoder.decode(b"", final=True)


class PromptTokenizer:
    """Encodes prompts and decodes answers.

    Args:
        tokenizer: a tokenizer like Gemma's, with <loc>, <seg> and <image>.
        ids: image_token_id, pad_token_id, bos_token_id, eos_token_id, newline_token_id.
        context: the number of tokens that the model can read. Longer texts are refused before they are tokenised.
    """

    def __init__(self, tokenizer: Tokenizer, ids: dict[str, int], context: int):
        self.tokenizer = tokenizer
        self.ids = ids
        self.image_token_id = ids["image_token_id"]
        self.pad_token_id = ids["pad_token_id"]
        self.bos_token_id = ids["bos_token_id"]
        self.eos_token_id = ids["eos_token_id"]
        self.newline_token_id = ids["newline_token_id"]
        self.vocab_size = tokenizer.get_vocab_size()  # the embedding can have more rows; those are untrained
        self.context = context
        added = [tokenizer.id_to_token(number) for number in (self.pad_token_id, self.bos_token_id, self.eos_token_id)]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        self.added_ids = {token: tokenizer.token_to_id(token) for token in LOCATION_TOKENS + CODE_TOKENS}
        self.location_ids = range(self.added_ids[LOCATION_TOKENS[0]], self.added_ids[LOCATION_TOKENS[-1]] + 1)
        self.code_ids = range(self.added_ids[CODE_TOKENS[0]], self.added_ids[CODE_TOKENS[-1]] + 1)
        decoder = tokenizer.get_added_tokens_decoder().items()
        special = {number: token.content for number, token in decoder if token.special and token.content not in self.added_ids}
        self.control_ids = frozenset(special)  # ids without text
        reserved = {self.image_token_id, self.pad_token_id, self.bos_token_id, self.eos_token_id}
        self.reserved_tokens = {number: token for number, token in special.items() if number in reserved}
        # Splits a reserved token after its first character, so that the tokenizer does not recognise it.
        cuts = (f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in self.reserved_tokens.values() if len(t) > 1)
        self.cut = re.compile("|".join(cuts))

    def encode(self, text: str, notes: list[str] | None = None) -> list[int]:
        """The ids of a text as it is: nothing is added, and <image>, bos, eos and pad in it are ordinary characters.

        Raises: PromptError if the text is not valid UTF-8, or too long for the model.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error
        if self.is_too_long(text):
            most = self.context * self.longest_token
            raise PromptError(f"the text has {len(text)} characters, but at most {most} can fit. Shorten it.")
        typed = [token for token in self.reserved_tokens.values() if token in text]
        if typed and notes is not None:
            notes.append(f"{', '.join(typed)} in the text is read as ordinary text, not as a token of the model.")
        return [number for number, _ in self.ids_with_ends(text)]

    def ids_with_ends(self, text: str) -> Iterator[tuple[int, int]]:
        """Each id of a text, with the position in the text at which its characters end."""
        start = 0
        for token in LOCATION_OR_CODE.finditer(text):
            if token.start() > start:
                yield from self.encode_characters(text[start : token.start()], start)
            yield self.added_ids[token[0]], token.end()
            start = token.end()
        yield from self.encode_characters(text[start:], start)

    def encode_characters(self, text: str, start: int) -> list[tuple[int, int]]:
        """Like ids_with_ends, for a part without <loc> and <seg> that begins at `start`. Returns no id of a reserved token."""
        parts = self.cut.split(text) if any(token in text for token in self.reserved_tokens.values()) else [text]
        ids = []
        for part in parts:
            encoding = self.tokenizer.encode(part, add_special_tokens=False)
            if self.reserved_tokens.keys().isdisjoint(encoding.ids):
                ids += [(number, start + end) for number, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]
            else:  # the merges themselves can produce a reserved token; bytes are never merged
                byte_ids = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in part.encode())
                ids += [(number, start + len(part)) for number in byte_ids]
            start += len(part)
        return ids

    @cached_property
    def longest_token(self) -> int:
        """The length of the longest token, in characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def is_too_long(self, text: str) -> bool:
        """Whether the text cannot fit into the model's context even if each of its tokens is as long as the longest one."""
        return len(text) > self.context and len(text) > self.context * self.longest_token

    def shorten(self, text: str, count: int) -> str:
        """The longest beginning of the text that has at most `count` tokens, or nearly the longest."""
        beginning = text[: count * self.longest_token] if len(text) > count else text  # more cannot fit
        ends = [end for _, end in self.ids_with_ends(beginning)]
        if len(ends) <= count and beginning == text:
            return text
        kept = min(count, len(ends))
        while kept > 0 and len(self.encode(text[: ends[kept - 1]])) > count:
            kept -= 1 + kept // 16  # the beginning alone can need more tokens than it has inside the whole text
        return text[: ends[kept - 1]] if kept > 0 else ""

    def decode(self, ids: "Iterable[int] | torch.Tensor | np.ndarray") -> str:
        """The text of token ids. <loc> and <seg> are kept, control tokens are dropped, nothing is added."""
        stream = self.stream()
        numbers = ids.tolist() if hasattr(ids, "tolist") else ids  # much faster than iterating over a tensor or an array
        return "".join(stream.put(token) for token in numbers) + stream.end()

    def stream(self) -> TextStream:
        """For text that is shown while it is generated: put(id) returns the text that became certain, end() the rest."""
        return TextStream(self.tokenizer, self.control_ids)

    def unused_ids(self, num_rows: int) -> list[int]:
        """The ids below `num_rows` (vocab_size of text_config) that no token has, and that a model must not generate."""
        is_unused = [self.tokenizer.id_to_token(number) is None for number in range(self.vocab_size, num_rows)]
        # If these are all unused, the tokens have exactly the ids 0 to vocab_size - 1, and looking at those would take long.
        start = self.vocab_size if all(is_unused) else 0
        return [number for number in range(start, num_rows) if self.tokenizer.id_to_token(number) is None]
