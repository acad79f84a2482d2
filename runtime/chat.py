"""From chat messages to token ids: the model's own template in jinja2's immutable sandbox, then its tokenizer.

The template sees what transformers 5.23 lets it see (`raise_exception`, `strftime_now`, `tojson`, the special tokens), so that a prompt
comes out the same, character for character.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from ..errors import BundleError, DataError
from ..files import read_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = dict[str, Any]  # role, and content: a list of {"type": "text", "text": …} and {"type": "image"}


@dataclass(frozen=True)
class ChatFormat:
    """How a model wants to be talked to: its template, its special tokens and its tokenizer."""

    template: jinja2.Template
    special: dict[str, str]
    tokenizer: Tokenizer

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the model's next turn. Raises DataError where the template refuses the messages."""
        try:
            return self.template.render(messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self.special)
        except Exception as error:  # the template is somebody's program: it may raise anything
            raise DataError(f"the chat template refuses these messages ({error}); expected turns of user and assistant in the order that it asks for") from None

    def encode(self, prompt: str) -> np.ndarray:
        """Token ids int64 [S] of a rendered prompt; a start token that the template wrote itself is not added again."""
        begins = self.special.get("bos_token")
        encoded = self.tokenizer.encode(prompt, add_special_tokens=not (begins and prompt.startswith(begins)))
        return np.asarray(encoded.ids, dtype=np.int64)


def read_chat_format(folder: Path) -> ChatFormat:
    """The chat format of a bundle or a Hugging Face folder. Raises BundleError, naming the file that is missing or damaged."""
    try:
        config = read_json(folder / "tokenizer_config.json")
    except DataError as error:
        raise BundleError(f"{error}; a bundle holds the model's tokenizer") from None
    return ChatFormat(_read_template(folder, config), _special_tokens(config), _read_tokenizer(folder / "tokenizer.json"))


def user_message(question: str, images: int = 0) -> Message:
    """A user's turn: its images first, then the text."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]}


def fill_marks(prompt: str, mark: str, pictures: Sequence[str]) -> str:
    """`prompt` with its marks replaced by the tokens of the pictures that stand there. Raises DataError unless there are as many marks as pictures."""
    texts = prompt.split(mark)
    if len(texts) - 1 != len(pictures):
        raise DataError(f"the prompt holds {len(texts) - 1} '{mark}' marks for {len(pictures)} images; expected one each, take it out of the question's text")
    return texts[0] + "".join(picture + text for picture, text in zip(pictures, texts[1:], strict=True))


def text_message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise BundleError(f"no tokenizer at {file}; expected the model's tokenizer.json there, export the bundle again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{file} is no tokenizer ({error}); copy the bundle again, or export again") from None
    # A file may carry the padding and truncation of its training.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_template(folder: Path, config: dict[str, Any]) -> jinja2.Template:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named ones, in older folders
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not isinstance(source, str):
        raise BundleError(f"no chat template in {folder}; expected {file.name}, or 'chat_template' in tokenizer_config.json")
    try:
        return sandbox().from_string(source)
    except jinja2.TemplateError as error:
        raise BundleError(f"the chat template in {folder} does not parse ({error}); take it from the model again") from None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by their role; a file holds each as a string, or as an object with its content."""
    found = {name: config[name] for name in SPECIAL_TOKENS if config.get(name)}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in found.items()}


def sandbox() -> ImmutableSandboxedEnvironment:
    """The environment in which chat templates run: they are code from strangers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=_PlainNamespace)
    return environment


class _PlainNamespace(Namespace):
    """jinja's namespace without names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # jinja's own signature, which lets a template use the name 'self'.
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it only shows what it encloses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the namespace name '{name}' begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # The type itself would hand the template its class attributes.
    return dict(*args, **kwargs)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
