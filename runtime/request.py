"""Requests to /v1/chat/completions: from untrusted bytes to a frozen Request, or a RequestError that names the field and the reason.

The form is OpenAI's. What this runtime can't do is refused rather than ignored, and so is a field that nobody knows: it is a typing error.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import ImageError, RequestError
from ..images import MAX_PIXELS, image_size
from .chat import Message, text_message
from .options import Options
from .response_format import FIELDS as FORMATS
from .response_format import read_format
from .sampling import Sampling

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
READ = (
    *("messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"),
    *("n", "stream", "stream_options", "logprobs", "top_logprobs", "return_token_ids", *FORMATS),
)
# They steer OpenAI's own service, not the answer.
IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls")
# What a field that this runtime can't serve may hold: what means that it is not wanted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_TOP_LOGPROBS = 8, 4, 256, 20
# A progressive JPEG of a camera has about ten scans; each one more makes a decoder go over the whole picture again.
MOST_SCANS = 64


@dataclass(frozen=True)
class Limits:
    """What a request may ask of this server."""

    model: str
    context: int  # tokens, prompt and answer together
    characters: int  # more text than this can't fit the context
    max_tokens: int = 512  # of an answer whose request names no length
    images: int = 16
    pixels: int = MAX_PIXELS  # of all images of a request together


@dataclass(frozen=True)
class Request:
    """What a client wants: `images` are encoded bytes, one for each {"type": "image"} part of `messages`, in order."""

    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    options: Options
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    token_ids: bool = False  # whether each choice says the tokens that were drawn, as vLLM's server does


def read_request(body: bytes, limits: Limits) -> Request:
    """The request in `body`. Raises RequestError; images are checked by their heads, so that a damaged or huge one is refused before it waits."""
    raw = _object(body)
    _check_fields(raw)
    _check_model(raw.get("model"), limits.model)
    messages, images = _messages(raw.get("messages"), limits)
    stream = _flag(raw, "stream")
    told = _include_usage(raw.get("stream_options"), stream), _token_ids(raw, stream)
    return Request(messages, images, _options(raw, limits), _whole(raw, "n", 1, 1, MOST_CHOICES), stream, *told)


def _object(body: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("the body is nested too deeply; expected a chat completion request") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a number of thousands of digits
        raise RequestError(f"the body is no valid JSON ({str(error)[:120]}); expected one object in UTF-8") from None
    if not isinstance(raw, dict):
        raise RequestError(f"the body is {show(raw)}; expected an object with 'messages'")
    return {name: value for name, value in raw.items() if value is not None}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check_fields(raw: dict[str, Any]) -> None:
    for name, value in raw.items():
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            raise RequestError(f"'{name}' is {show(value)}, which this server can't do; leave the field out", param=name, code="unsupported_parameter")
        if name not in READ and name not in IGNORED and name not in UNSUPPORTED:
            raise RequestError(f"unknown field {show(name)}; expected fields of {', '.join(READ)}", param=_plain(name)[:64], code="unknown_parameter")


def _check_model(name: Any, served: str) -> None:
    if name not in (None, served):
        raise RequestError(f"the model {show(name)} is not here; this server has '{served}'", status=404, param="model", code="model_not_found")


def _options(raw: dict[str, Any], limits: Limits) -> Options:
    sampling = Sampling(
        temperature=_number(raw, "temperature", 0.0, 0, 2),
        top_k=_whole(raw, "top_k", 0, 0, 2**31),
        # 0 is allowed by OpenAI and leaves the likeliest token alone.
        top_p=max(_number(raw, "top_p", 1.0, 0, 1), 1e-6),
        min_p=_number(raw, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(raw, "repetition_penalty", 1.0, 0.01, 100),
        # Random generators take no negative seeds; OpenAI's are signed.
        seed=_whole(raw, "seed", 0, -(2**63), 2**63 - 1) % 2**64 if "seed" in raw else None,
    )
    return Options(_max_tokens(raw, limits), _stop(raw.get("stop")), sampling, _top_logprobs(raw), read_format(raw))


def _max_tokens(raw: dict[str, Any], limits: Limits) -> int:
    """The newer of the two names wins; more than the context takes is cut to it when the prompt's length is known."""
    for name in ("max_completion_tokens", "max_tokens"):
        if name in raw:
            return min(_whole(raw, name, 1, 1, 2**31), limits.context)
    return limits.max_tokens


def _stop(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS:
        raise RequestError(f"'stop' is {show(value)}; expected a string or a list of at most {MOST_STOPS}", param="stop")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_STOP:
            raise RequestError(f"'stop' holds {show(text)}; expected strings of 1 to {LONGEST_STOP} characters", param="stop")
        _check_text(text, "stop")
    return tuple(texts)


def _top_logprobs(raw: dict[str, Any]) -> int | None:
    top = _whole(raw, "top_logprobs", 0, 0, MOST_TOP_LOGPROBS)
    if _flag(raw, "logprobs"):
        return top
    if top:
        raise RequestError("'top_logprobs' without 'logprobs'; expected \"logprobs\": true beside it", param="top_logprobs")
    return None


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not stream:
        raise RequestError(f"'stream_options' is {show(value)}; expected an object, and \"stream\": true beside it", param="stream_options")
    return _flag(value, "include_usage")


def _token_ids(raw: dict[str, Any], stream: bool) -> bool:
    wanted = _flag(raw, "return_token_ids")
    if wanted and stream:
        raise RequestError("'return_token_ids' beside \"stream\": true; expected one of them, ids come with whole answers alone", param="return_token_ids")
    return wanted


def _messages(raw: Any, limits: Limits) -> tuple[tuple[Message, ...], tuple[bytes, ...]]:
    if not isinstance(raw, list) or not raw:
        raise RequestError(f"'messages' is {show(raw)}; expected a list with at least one turn of the user", param="messages")
    if len(raw) > limits.context:
        raise _too_long(f"{len(raw)} messages", limits)
    images: list[bytes] = []
    messages = tuple(_message(turn, f"messages[{number}]", images, limits) for number, turn in enumerate(raw))
    if messages[-1]["role"] != "user":
        raise RequestError(f"the last message is the {messages[-1]['role']}'s; expected a turn of the user to answer", param="messages")
    length = sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if length > limits.characters:
        raise _too_long(f"{length:,} characters of text", limits)
    return messages, tuple(images)


def _too_long(found: str, limits: Limits) -> RequestError:
    message = f"{found} can't fit the model's context of {limits.context} tokens; send fewer or shorter messages"
    return RequestError(message, param="messages", code="context_length_exceeded")


def _message(turn: Any, where: str, images: list[bytes], limits: Limits) -> Message:
    """One turn in the template's form; its images are appended to `images`."""
    if not isinstance(turn, dict):
        raise RequestError(f"{where} is {show(turn)}; expected an object with 'role' and 'content'", param="messages")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}.role is {show(role)}; expected one of {', '.join(ROLES)}", param="messages")
    if any(turn.get(name) for name in ("tool_calls", "function_call", "audio")):
        raise RequestError(f"{where} holds a call or audio; this model takes text and images only", param="messages", code="unsupported_parameter")
    content = turn.get("content")
    if isinstance(content, str):
        _check_text(content, f"{where}.content")
        if role == "user" and not content.strip():
            raise RequestError(f"{where}.content is empty; expected a question", param="messages")
        return text_message(ROLES[role], content)
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content is {show(content)}; expected a string or a list of parts", param="messages")
    if len(content) > limits.context:
        raise _too_long(f"{len(content)} parts of a message", limits)
    parts = [part for number, one in enumerate(content) for part in _part(one, role, f"{where}.content[{number}]", images, limits)]
    return {"role": ROLES[role], "content": parts}


def _part(part: Any, role: str, where: str, images: list[bytes], limits: Limits) -> Iterator[dict[str, str]]:
    match part:
        case {"type": "text", "text": str(text)}:
            _check_text(text, where)
            yield {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            if role != "user":
                raise RequestError(f"{where} is an image in a turn of the {role}; expected images in the user's turns only", param="messages")
            images.append(_image(url, where))
            _check_images(images, where, limits)
            yield {"type": "image"}
        case {"type": str(kind)} if kind not in ("text", "image_url"):
            raise RequestError(f"{where} is of type {show(kind)}; this model takes 'text' and 'image_url'", param="messages", code="unsupported_parameter")
        case _:
            raise RequestError(f'{where} is {show(part)}; expected {{"type": "text", "text": …}} or {{"type": "image_url", …}}', param="messages")


def _image(url: str, where: str) -> bytes:
    """The bytes in a data: URL. Nothing else is taken: a server that fetches what strangers name can be sent anywhere."""
    if not url.startswith("data:"):
        raise RequestError(f"{where}: the image is {show(url)}; expected a data: URL, this server fetches nothing, send the image itself", param="messages")
    kind, comma, data = url[5:].partition(",")
    if not comma or not re.fullmatch(r"(image/[\w.+-]{1,60})?(;[\w.+=-]{1,60}){0,3};base64", kind[:256]):
        raise RequestError(f"{where}: the image's URL begins with {show(url[:40])}; expected 'data:image/png;base64,' or the like", param="messages")
    try:
        image = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise RequestError(f"{where}: the image is no valid base64 ({error}); expected the whole of an encoded file", param="messages") from None
    if image.startswith(b"\xff\xd8") and image.count(b"\xff\xda") > MOST_SCANS:
        raise RequestError(f"{where}: the JPEG has over {MOST_SCANS} scans; save it again as an ordinary one", param="messages", code="invalid_image")
    return image


def _check_images(images: list[bytes], where: str, limits: Limits) -> None:
    """The last of `images`, and all of them together."""
    if len(images) > limits.images:
        raise RequestError(f"more than {limits.images} images; send fewer in one request", param="messages")
    try:
        pixels = sum(math.prod(image_size(image)) for image in images)
    except ImageError as error:
        raise RequestError(f"{where}: {error}", param="messages", code="invalid_image") from None
    if pixels > limits.pixels:
        message = f"{where}: the images have {pixels / 1e6:.0f} megapixels so far; at most {limits.pixels / 1e6:.0f} in one request, scale them down"
        raise RequestError(message, param="messages", code="invalid_image")


def _check_text(text: str, where: str) -> None:
    if text != _plain(text):
        raise RequestError(f"{where} holds half of a surrogate pair, which is no character; expected valid Unicode", param=where.partition("[")[0])


def _plain(text: str) -> str:
    """`text` with what can't be written as UTF-8 replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _number(raw: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"'{name}' is {show(value)}; expected a number from {low} to {high}", param=name)
    return float(value)


def _whole(raw: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"'{name}' is {show(value)}; expected a whole number from {low} to {high}", param=name)
    return value


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool | None):
        raise RequestError(f"'{name}' is {show(value)}; expected true or false", param=name)
    return bool(value)


def show(value: Any) -> str:
    """A value from outside, short and on one line, whatever its size and depth."""
    match value:
        case None | True | False:
            return {None: "missing", True: "true", False: "false"}[value]
        case str():
            return "'" + " ".join(_plain(value[:60]).split()) + ("…'" if len(value) > 60 else "'")
        case int() | float():
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            return text if len(text) <= 24 else f"{text[:20]}…"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"
