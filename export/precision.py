"""What each part of a model is stored as: one word for all parts, one per part, or one for every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import MastersError

WORDS = ("fp32", "fp16", "int8", "int4")  # from exact to coarse
AUTO = "auto"
BLOCK_SIZES = (16, 32, 64, 128)
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
INT8_SUMS = 4  # the accuracy level at which MatMulNBits may round what it is given; below it, it computes in float32
INT4_METHODS = ("rtn", "k-quant", "gptq")
EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Storage:
    """How one weight is stored: a word of WORDS, and for int4 the weights that share a scale, the method that rounds them, and how its product sums."""

    word: str
    block_size: int = 32
    method: str = "rtn"
    accuracy_level: int = 0

    def __str__(self) -> str:
        return f"int4/{self.block_size}" if self.word == "int4" else self.word


@dataclass(frozen=True)
class Precision:
    """A word of WORDS for each part, and how int4 is laid out; `layers` has single weights of a part that are stored otherwise, by '<part> <weight>'."""

    vision: str
    embed: str
    decoder: str
    block_size: int = 32
    accuracy_level: int = 0
    method: str = "rtn"
    layers: Mapping[str, Storage] = field(default_factory=dict)
    tied_embed: str | None = None  # what the embedding is stored as instead where the model's head is the same matrix

    def __str__(self) -> str:
        return f"vision={self.vision},decoder={self.decoder},embed={self.embed}"

    def of_model(self, tied: bool) -> Precision:
        """The same for a model whose head is its embedding, or is not."""
        return replace(self, embed=self.tied_embed) if tied and self.tied_embed else self

    def shares_table(self) -> bool:
        """Whether head and embedding are stored alike, so that a model in which they are one matrix needs it once."""
        embed, head = self.storage("embed", EMBED), self.storage("decoder", HEAD)
        return embed.word == head.word and (embed.word != "int4" or embed.block_size == head.block_size)

    def exact(self) -> bool:
        """Whether every part keeps the weights as they are."""
        return self.vision == self.embed == self.decoder == "fp32"

    def storage(self, part: str, weight: str) -> Storage:
        """How one weight of vision, embed or decoder is stored."""
        method = "rtn" if part == "embed" else self.method  # a row is looked up by standard operators, which know no zero point
        return self.layers.get(f"{part} {weight}") or Storage(getattr(self, part), self.block_size, method, self.accuracy_level)

    def rounding(self, part: str) -> str:
        """The word by which a part's arithmetic is judged beside PyTorch's with the same weights: int8 where any product rounds its activations."""
        word = str(getattr(self, part))
        mixed = [storage.word for name, storage in self.layers.items() if name.startswith(f"{part} ")]
        rounds = "int8" in mixed or (part != "embed" and "int4" in (word, *mixed) and self.accuracy_level >= INT8_SUMS)
        return "int8" if rounds else word


def parse_precision(text: str, block_size: int = 32, accuracy_level: int = 0, method: str = "rtn") -> Precision:
    """Read 'int4', 'auto' or 'vision=int8,decoder=int4,embed=int8'; a part that is not named stays fp32. Raises MastersError."""
    if block_size not in BLOCK_SIZES:
        raise MastersError(f"block size {block_size} is not possible; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if accuracy_level not in ACCURACY_LEVELS:
        raise MastersError(f"accuracy level {accuracy_level} is unknown; expected 0 (unset), 1 (fp32), 2 (fp16), 3 (bf16) or 4 (int8)")
    if method not in INT4_METHODS:
        raise MastersError(f"unknown int4 method '{method}'; expected one of {', '.join(INT4_METHODS)}")
    words = _by_part(text) if "=" in text else _whole(text)
    # A table that is stored for the head anyway costs nothing more.
    return Precision(*words, block_size, accuracy_level, method, tied_embed="int4" if text == "int4" else None)


def _by_part(text: str) -> tuple[str, str, str]:
    """The words of vision, embed and decoder."""
    parts: dict[str, str] = {}
    for pair in text.split(","):
        part, _, word = (piece.strip() for piece in pair.partition("="))
        if part not in ("vision", "embed", "decoder") or word not in WORDS or part in parts:
            raise MastersError(
                f"can't read '{pair}' in the precision '{text}'; expected each of vision, embed, decoder at most once, as in 'vision=int8,decoder=int4'"
            )
        parts[part] = word
    return parts.get("vision", "fp32"), parts.get("embed", "fp32"), parts.get("decoder", "fp32")


def coarsest(words: list[str]) -> str:
    """The least exact of some words."""
    return max(words, key=WORDS.index)


def _whole(word: str) -> tuple[str, str, str]:
    if word not in (*WORDS, AUTO):
        raise MastersError(
            f"unknown precision '{word}'; expected one of {', '.join(WORDS)}, {AUTO}, or one per part as in 'vision=int8,decoder=int4,embed=int8'"
        )
    if word == "int4":  # int4 halves the decoder's memory traffic; a vision tower computes, and int8 computes faster
        return "int8", "int8", "int4"
    return word, word, word
