"""Asking a vision-language model questions about images: one answer, a stream, or a chat that keeps its cache between turns."""

from __future__ import annotations

import importlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Unpack

import numpy as np

from ..errors import BundleError, DataError
from ..images import ImageSource, open_image
from ..manifest import Manifest, verify_files
from .answer import Answer, Clock, Making, Stream
from .batch import answer_all
from .chat import ChatFormat, Message, read_chat_format, text_message, user_message
from .graphs import Parts, ResizableCache
from .memory import MB
from .options import Options, Wishes, read_options
from .pictures import Picture, PictureMemory, new_picture
from .pixels import Grid, Pixels
from .prepared import Prepared
from .steps import Context, Steps
from .writer import Guides, Writer

HASHES, SELF_TEST = "comparing its files with their hashes", "its self-test"

__all__ = ["HASHES", "SELF_TEST", "Chat", "Context", "Options", "Picture", "Vlm", "common_prefix", "load_family", "prompt_keys"]


@dataclass(frozen=True)
class Seen:
    """An image of a prompt: as encoded before, or as it is to be encoded now and kept under `name`."""

    name: bytes | None
    what: Picture | Pixels

    @property
    def grid(self) -> Grid:
        return self.what.grid if isinstance(self.what, Picture) else self.what.grids[0]


class Vlm:
    """A vision-language model on this device. Answers are independent of each other; threads may share one."""

    def __init__(self, manifest: Manifest, folder: Path, parts: Parts, image_cache_mb: float = 0, chat_format: ChatFormat | None = None) -> None:
        """`folder` holds tokenizer and chat template, read now unless they come along. Raises BundleError where they are missing or the family is unknown."""
        self.manifest = manifest
        self.folder = folder
        self.parts = parts
        self.unverified: tuple[str, ...] = ()  # of HASHES and SELF_TEST
        self.prepared: Prepared | None = None  # whose graphs are run in place of the bundle's
        self.memory = PictureMemory(int(image_cache_mb * MB))  # a chat has its own pictures anyway
        self.format = chat_format or read_chat_format(folder)
        self.family = load_family(manifest.model_type)
        for key in ("eos_token_ids", "image_token_id"):
            if key not in manifest.generation:
                raise BundleError(f"the manifest of {folder} lacks generation.{key}; expected the model's token ids there, export the bundle again")
        self.guides = Guides(self.format.tokenizer, manifest.decoder.vocab_size, manifest.generation["eos_token_ids"])

    def answer(self, question: str, images: Sequence[ImageSource] = (), *, system: str | None = None, **options: Unpack[Wishes]) -> Answer:
        """The whole answer; arguments and errors as for `stream`."""
        return self.stream(question, images, system=system, **options).answer

    def stream(
        self,
        question: str,
        images: Sequence[ImageSource] = (),
        *,
        system: str | None = None,
        **options: Unpack[Wishes],
    ) -> Stream:
        """Ask `question` about `images` (paths, encoded bytes, PIL images or uint8 arrays); the answer comes piece by piece.

        The `options` stand in options.Wishes. Nothing runs before the first piece is asked for. Raises RecipeError for an option out of range;
        the stream raises ImageError for an image that can't be read, DataError for a prompt that does not fit the model's context, and
        RecipeError for a constraint that can't be met.
        """
        return self.chat(system).stream(question, images, **options)

    def answer_batch(
        self,
        questions: Iterable[tuple[str, Sequence[ImageSource]]],
        *,
        system: str | None = None,
        at_once: int = 8,
        **options: Unpack[Wishes],
    ) -> Iterator[Answer]:
        """The answers to independent `questions` (text and images each), in their order, `at_once` written together: for evaluation.

        Each is the answer that `answer` gives, but for rounding, and its timings share their steps with the others. Errors as for `stream`.
        """
        return answer_all(self, questions, read_options(**options), system, at_once)

    def reply(self, messages: Sequence[Message], images: Sequence[ImageSource] = (), options: Options | None = None, context: Context | None = None) -> Stream:
        """The next turn of a conversation that is given whole; `images` belong to its {"type": "image"} parts, in order.

        Errors as for `stream`. A `context` that is passed again for another answer to the same prompt saves computing the prompt.
        """
        chat = Chat(self)
        chat.context = context or chat.context
        return chat._reply(messages, images, options or Options())

    def chat(self, system: str | None = None) -> Chat:
        """A conversation that remembers its turns."""
        return Chat(self, system)

    def verify(self, *what: str) -> None:
        """Compare the files with their hashes and run the golden self-test, as far as that is still to be done. Raises BundleError as `load` does."""
        from .golden import self_test  # which is written in terms of this class

        for one in set(what or self.unverified) & set(self.unverified):
            if one == HASHES:
                (self.prepared.verify if self.prepared else verify_files)(self.folder, self.manifest)
            else:
                self_test(self, self.folder / str(self.manifest.golden))
                if self.prepared:
                    self.prepared.note_passed()
            self.unverified = tuple(other for other in self.unverified if other != one)

    def see(self, images: Sequence[ImageSource], alone: bool = True) -> list[Pixels]:
        """Each image decoded and preprocessed; `alone` as `shown_alone` has it."""
        settings = self.manifest.preprocessing if alone else self.manifest.preprocessing | {"together": True}
        return [self.family.preprocess([open_image(image)], settings) for image in images]

    def shown_alone(self, images: int) -> bool:
        """Whether each image of a prompt with `images` of them looks as if it were the only one: False for several where the family shows those smaller."""
        return images <= 1 or not getattr(self.family, "ALONE_IN_TILES", False)

    def encode(self, pixels: Pixels) -> np.ndarray:
        """The features float32 [n_image_tokens, hidden] that take the places of the images' tokens."""
        features = self.parts.encode_images(pixels)
        # Most vision graphs give them as they are needed.
        return self.family.pack(features, pixels.grids, self.manifest.preprocessing) if hasattr(self.family, "pack") else features

    def prompt_ids(self, messages: Sequence[Message], grids: Sequence[Grid]) -> np.ndarray:
        """Token ids int64 [S] of the prompt for the next turn, image tokens in place."""
        return self.format.encode(self.family.expand(self.format.render(messages), grids, self.manifest.preprocessing))

    def positions(self, ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray | None:
        """Positions int64 [3, S] of a prompt's tokens in a family that places an image's tokens in a plane, None where tokens are simply counted."""
        if not hasattr(self.family, "positions"):
            return None
        return np.asarray(self.family.positions(ids, grids, self.manifest.preprocessing, self.manifest.generation["image_token_id"]))


class Chat:
    """A conversation: every turn sees the earlier ones, and only what is new is computed. For one thread at a time.

    A turn that fails, or whose stream is dropped before its end, leaves the conversation as it was.
    """

    def __init__(self, vlm: Vlm, system: str | None = None) -> None:
        self.vlm = vlm
        self.messages: list[Message] = [text_message("system", system)] if system else []
        self.pictures: list[Picture] = []
        self.context = Context()

    def answer(self, question: str, images: Sequence[ImageSource] = (), **options: Unpack[Wishes]) -> Answer:
        """The next turn's whole answer; options as for Vlm.stream, but for `system`."""
        return self.stream(question, images, **options).answer

    def stream(self, question: str, images: Sequence[ImageSource] = (), **options: Unpack[Wishes]) -> Stream:
        """The next turn, piece by piece."""
        return self._stream(question, images, read_options(**options))

    def _stream(self, question: str, images: Sequence[ImageSource], options: Options) -> Stream:
        making = Making()
        return Stream(self._turn(question, images, options, making), making)

    def _reply(self, messages: Sequence[Message], images: Sequence[ImageSource], options: Options) -> Stream:
        making = Making()
        return Stream(self._respond(messages, [], images, options, making), making)

    def _turn(self, question: str, images: Sequence[ImageSource], options: Options, making: Making) -> Generator[str, None, Answer]:
        messages, pictures = [*self.messages, user_message(question, len(images))], list(self.pictures)
        answer = yield from self._respond(messages, pictures, images, options, making)
        if answer.token_ids:
            self.messages, self.pictures = [*messages, text_message("assistant", answer.text)], pictures
        return answer

    def _respond(
        self, messages: Sequence[Message], pictures: list[Picture], images: Sequence[ImageSource], options: Options, making: Making
    ) -> Generator[str, None, Answer]:
        """Answer `messages`; the encoded `images` are added to `pictures`, those of earlier turns."""
        writer, complete = self._prepare(messages, pictures, images, options, making)
        return (yield from self._generate(writer, pictures)) if complete else writer.answer()

    def _prepare(
        self, messages: Sequence[Message], pictures: list[Picture], images: Sequence[ImageSource], options: Options, making: Making
    ) -> tuple[Writer, bool]:
        """All before the decoder; and whether it was done to the end, rather than cancelled."""
        clock = making.clock = Clock()
        alone = self.vlm.shown_alone(len(pictures) + len(images))
        seen = self._look(images, alone, clock)
        ids = self.vlm.prompt_ids(messages, [*(picture.grid for picture in pictures), *(one.grid for one in seen)])
        # Before any image is encoded, which takes seconds: the prompt may not fit, the constraint may not be met.
        writer = Writer(self.vlm, ids, self._room(len(ids), options.max_tokens), options, making)
        for one in seen:
            if making.cancelled.is_set():
                return writer, False
            pictures.append(self._encode(one, clock))
        return writer, True

    def _look(self, images: Sequence[ImageSource], alone: bool, clock: Clock) -> list[Seen]:
        """Each image preprocessed, or remembered as encoded."""
        start = time.perf_counter()
        names = [self.vlm.memory.name(image, alone) for image in images]
        seen = [Seen(name, self.vlm.memory.find(name) or self.vlm.see([image], alone)[0]) for name, image in zip(names, images, strict=True)]
        clock.preprocess = time.perf_counter() - start
        return seen

    def _encode(self, seen: Seen, clock: Clock) -> Picture:
        if isinstance(seen.what, Picture):
            return seen.what
        start = time.perf_counter()
        picture = new_picture(seen.grid, self.vlm.encode(seen.what))
        clock.encode += time.perf_counter() - start
        self.vlm.memory.keep(seen.name, picture)
        return picture

    def _generate(self, writer: Writer, pictures: Sequence[Picture]) -> Generator[str, None, Answer]:
        logits = self._prefill(writer.prompt, pictures, len(writer.prompt) + writer.budget, writer.making.clock)
        steps = Steps(self.vlm.parts, self.context, writer.prompt, writer.budget, writer.options.lookup)
        while True:
            if piece := writer.take(logits):
                yield piece
            if writer.over():
                break
            logits = steps.after(writer.tokens)
        if piece := writer.finish():
            yield piece
        return writer.answer(steps.guessed)

    def _room(self, prompt: int, wanted: int) -> int:
        """How many tokens the answer may have after a prompt of `prompt`."""
        context = self.vlm.manifest.decoder.context
        if prompt >= context:
            raise DataError(
                f"the prompt is {prompt} tokens long, images and earlier turns included; the model takes {context} in all, ask less or show fewer images"
            )
        return min(wanted, context - prompt)

    def _prefill(self, ids: np.ndarray, pictures: Sequence[Picture], capacity: int, clock: Clock) -> np.ndarray:
        """Logits float32 [vocab] after the prompt, of which only what the cache does not hold yet is computed."""
        start = time.perf_counter()
        keys = prompt_keys(ids, pictures, self.vlm.manifest.generation["image_token_id"])
        if (logits := self._again(keys, capacity)) is not None:
            return logits
        known = self._reuse(keys, capacity)
        embeds = self.vlm.parts.embed(ids[known:])
        places = keys[known:] < 0
        if places.any():
            features = np.concatenate([picture.features for picture in pictures])
            # A copy: the engine may hand out its own memory.
            embeds = embeds.copy()
            embeds[places] = features[len(features) - int(places.sum()) :]
        positions = self.vlm.positions(ids, [picture.grid for picture in pictures])
        logits = self.vlm.parts.decode(embeds, self.context.cache, None if positions is None else positions[:, known:])
        # Copied for the same reason.
        self.context.keys, self.context.prompt, self.context.logits = keys, keys, logits.copy()
        clock.prefill = time.perf_counter() - start
        return logits

    def _again(self, keys: np.ndarray, capacity: int) -> np.ndarray | None:
        """The logits after the prompt `keys` if it is this context's last one: another answer to it begins there, with exactly the same numbers."""
        context = self.context
        if context.logits is None or not isinstance(context.cache, ResizableCache) or not np.array_equal(context.prompt, keys):
            return None
        context.cache.keep(len(keys), capacity)
        context.keys = keys
        return context.logits

    def _reuse(self, keys: np.ndarray, capacity: int) -> int:
        """Bring the cache to the longest beginning that it shares with `keys`, short of the last position, whose logits are wanted."""
        context = self.context
        context.logits = None  # until the new prompt has been run
        known = min(common_prefix(context.keys, keys), len(keys) - 1)
        if known and isinstance(context.cache, ResizableCache):
            context.cache.keep(known, capacity)
        else:
            known, context.cache = 0, self.vlm.parts.new_cache(capacity)
        context.keys = keys[:known]
        return known


def load_family(model_type: str) -> ModuleType:
    """The family's module in runtime/families. Raises BundleError if there is none."""
    name = f"{__package__}.families.{model_type}"
    try:
        if model_type.isidentifier():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    known = ", ".join(sorted(file.stem for file in (Path(__file__).parent / "families").glob("*.py") if file.stem != "__init__"))
    raise BundleError(f"the bundle's model_type is '{model_type}'; this version of the runtime knows {known}; install a newer one")


def prompt_keys(ids: np.ndarray, pictures: Sequence[Picture], image_token: int) -> np.ndarray:
    """`ids` with each image token replaced by its picture's key, int64 [S]: equal keys mean equal input to the decoder.

    Raises BundleError if the features don't fill the image tokens exactly.
    """
    places = ids == image_token
    keys = [key for picture in pictures for key in [picture.key] * len(picture.features)]
    if int(places.sum()) != len(keys):
        raise BundleError(f"the vision graph gave {len(keys)} features for {int(places.sum())} image tokens; expected as many, export the bundle again")
    filled = ids.copy()
    filled[places] = keys
    return filled


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries two arrays share."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size
