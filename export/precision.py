"""What each part of a model is stored as: one word for all parts, or one per part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import MastersError

WORDS = ("fp32", "fp16", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128)
ACCURACY_LEVELS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Precision:
    """A word of WORDS for each part, and how int4 is laid out."""

    vision: str
    embed: str
    decoder: str
    block_size: int = 32
    accuracy_level: int = 0

    def __str__(self) -> str:
        return f"vision={self.vision},decoder={self.decoder},embed={self.embed}"

    def exact(self) -> bool:
        """Whether every part keeps the weights as they are."""
        return self.vision == self.embed == self.decoder == "fp32"


def parse_precision(text: str, block_size: int = 32, accuracy_level: int = 0) -> Precision:
    """Read 'int4' or 'vision=int8,decoder=int4,embed=int8'; a part that is not named stays fp32. Raises MastersError."""
    if block_size not in BLOCK_SIZES:
        raise MastersError(f"block size {block_size} is not possible; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if accuracy_level not in ACCURACY_LEVELS:
        raise MastersError(f"accuracy level {accuracy_level} is unknown; expected 0 (unset), 1 (fp32), 2 (fp16), 3 (bf16) or 4 (int8)")
    if "=" not in text:
        return replace(_whole(text), block_size=block_size, accuracy_level=accuracy_level)
    parts: dict[str, str] = {}
    for pair in text.split(","):
        part, _, word = (piece.strip() for piece in pair.partition("="))
        if part not in ("vision", "embed", "decoder") or word not in WORDS or part in parts:
            raise MastersError(
                f"can't read '{pair}' in the precision '{text}'; expected each of vision, embed, decoder at most once, as in 'vision=int8,decoder=int4'"
            )
        parts[part] = word
    # A row of the embedding is looked up, not multiplied: blocks of 4 bits would need GatherBlockQuantized, which browsers' builds lack.
    if parts.get("embed") == "int4":
        raise MastersError("the embedding can't be int4, no browser build of ONNX Runtime can look it up; expected fp32, fp16 or int8, write embed=int8")
    return Precision(**{"vision": "fp32", "embed": "fp32", "decoder": "fp32"} | parts, block_size=block_size, accuracy_level=accuracy_level)


def _whole(word: str) -> Precision:
    if word not in WORDS:
        raise MastersError(f"unknown precision '{word}'; expected one of {', '.join(WORDS)}, or one per part as in 'vision=int8,decoder=int4,embed=int8'")
    if word == "int4":  # int4 halves the decoder's memory traffic; a vision tower computes, and int8 computes faster
        return Precision("int8", "int8", "int4")
    return Precision(word, word, word)
