"""From token ids to text that can be shown at once: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet

# GPT-2's alphabet: the printable bytes stand for themselves, the others for the characters from 256 on.
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
_AS_LATIN = {ord(character): byte for character, byte in BYTE_OF.items()}


class TextStream:
    """Text as it grows, token by token; special tokens are left out, white space at the very start too.

    What `push` and `finish` return, put together, is what the tokenizer makes of all ids at once. No piece ends within a character, and
    one that the last token leaves unfinished is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), lead: str | None = None) -> None:
        """`lead` is all that is left out at the very start; None leaves out white space of any kind."""
        self.tokenizer = tokenizer
        self.lead = lead
        self.stop = tuple(text for text in stop if text)
        self.stopped = False  # a stop string came; the text ends before it
        self._ids: list[int] = []
        self._shown, self._whole = 0, 0  # ids[:whole] is decoded to whole characters; ids[shown:whole] is the context of what follows
        self._held = ""
        self._begun = False

    def push(self, token: int) -> str:
        """The text that can be shown after one more token, often ''."""
        self._ids.append(token)
        text = self._undecoded()
        if text and not text.endswith(BROKEN):
            self._held += text
            self._shown, self._whole = self._whole, len(self._ids)
        return self._screen()

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._undecoded().rstrip(BROKEN)
        self._whole = len(self._ids)
        shown = self._screen()
        return shown + self._release(len(self._held))

    def _undecoded(self) -> str:
        """The text of the ids since the last whole character. Decoders treat a text's start and its inside differently: hence the context."""
        context = self.tokenizer.decode(self._ids[self._shown : self._whole])
        return self.tokenizer.decode(self._ids[self._shown :])[len(context) :]

    def _screen(self) -> str:
        """Show all but a stop string and what may become one."""
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self._release(len(self._held))
        return self._release(len(self._held) - max((_overlap(self._held, text) for text in self.stop), default=0))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        if not self._begun:
            piece = piece.lstrip() if self.lead is None else piece.removeprefix(self.lead)
            self._begun = bool(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class TokenBytes:
    """What each single token adds to a text, as bytes: a character may take several tokens. Special tokens add nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bytewise = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self.special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}

    def __call__(self, token: int) -> bytes:
        text = self.tokenizer.id_to_token(token) or ""  # a vocabulary may be padded with ids that mean nothing
        if token in self.special:
            return b""
        if self.bytewise and BYTE_OF.keys() >= set(text):
            return text.translate(_AS_LATIN).encode("latin-1")
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", text):  # SentencePiece's form
            return bytes.fromhex(byte[1])
        return text.replace("▁", " ").encode()
