"""Answers from any server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp's server, `masters serve`.

Every request carries the whole sampling, so that no server's own defaults count. Many requests are under way at once; one that fails for a reason
that may pass is repeated, later each time; one that fails for good makes a failed answer, and the others go on. The tokens that were sampled come
from the server where it tells them (see sampled.py). A server that refuses the key or the model, or that fails over and over, stops the run.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

from ..errors import ImageError, MastersError, RunError
from ..images import open_image
from ..progress import say
from ..samples import Sample
from .generate import Generated, Sampling, failed
from .inputs import Encoder
from .sampled import read_choices, read_texts

# What only some servers know. One that refuses such a field gets the next request without it: the fields that decide how is sampled are never left out.
OPTIONAL = ("return_token_ids", "logprobs", "top_logprobs", "logit_bias", "cache_salt", "repeat_penalty", "repeat_last_n", "samplers", "min_p")
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # what a server answers that may answer otherwise later
LONGEST_PAUSE = 60.0  # seconds
GIVE_UP = 32  # questions that fail one after the other, none answered between them
NEVER = -100  # the bias of OpenAI's protocol under which a token is not drawn


@dataclass(frozen=True)
class Endpoint:
    """Where answers are asked for. In `url` and `model` {source}, {number}, {name} and {ratio} stand for the weights that shall answer."""

    url: str = ""  # up to and with /v1
    model: str = ""
    key_variable: str = "MASTERS_ENDPOINT_KEY"  # the environment variable that holds the key; none is sent where it is not set
    concurrency: int = 64  # requests at once
    per_request: int = 0  # answers of a question asked for in one request; 0: all
    timeout: float = 600.0  # seconds for one request
    retries: int = 5
    pause: float = 0.5  # seconds before the first retry, twice as long before each one after it


@dataclass(frozen=True)
class Draw:
    """How many answers a question gets and what their random numbers follow from; `weights` names whose answers they are."""

    count: int
    sampling: Sampling
    seed: int
    weights: str


class _Refused(MastersError):
    """The server has understood a request and will not answer it: asking again is of no use."""


class _Passing(MastersError):
    """A failure that may not come again; `wait` is how long the server asks to be left alone, in seconds."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def ask(endpoint: Endpoint, encoder: Encoder | None, samples: Sequence[Sample], draw: Draw) -> Iterator[tuple[Sample, list[Generated]]]:
    """Every sample with its `draw.count` answers, in the order in which the server finishes them.

    With an `encoder` an answer comes with its tokens; without one, as from a judge, its text alone counts.
    What went wrong with one question is told by the `reason` of its failed answers. Raises RunError where it concerns all of them: a refused key or
    model, a server that can't be reached, or GIVE_UP questions in a row that failed.
    """
    with asyncio.Runner() as runner:
        client = _Client(endpoint, encoder, draw)
        waiting, running, failures = iter(samples), set[asyncio.Task[tuple[Sample, list[Generated]]]](), 0
        try:
            runner.run(client.prepare(samples[0]))
            while True:
                while len(running) < 2 * endpoint.concurrency and (sample := next(waiting, None)) is not None:
                    running.add(runner.get_loop().create_task(client.question(sample)))
                if not running:
                    return
                for task in runner.run(_first_done(running)):
                    sample, answers = task.result()
                    running.remove(task)
                    failures = failures + 1 if all(answer.finish == "failed" for answer in answers) else 0
                    yield sample, answers
                    if failures >= GIVE_UP:
                        raise RunError(f"{endpoint.url} failed {failures} questions in a row, lastly with: {answers[0].reason}; see to it, then run again")
        finally:
            runner.run(client.close(running))


async def _first_done(tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    return (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]


class _Client:
    """One server, asked for one model's answers."""

    def __init__(self, endpoint: Endpoint, encoder: Encoder | None, draw: Draw) -> None:
        self.endpoint, self.encoder, self.draw = endpoint, encoder, draw
        key = os.environ.get(endpoint.key_variable, "") if endpoint.key_variable else ""
        limits = httpx2.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # One deadline for a whole request: a server that sends a byte now and then would pass any limit between two of them.
        self.http = httpx2.AsyncClient(timeout=None, limits=limits, headers=headers, trust_env=False)
        self.url = endpoint.url.rstrip("/")
        self.left_out: set[str] = set()
        self.slots = asyncio.Semaphore(endpoint.concurrency)

    async def prepare(self, sample: Sample) -> None:
        """Empty the server's caches, and ask one question to learn what it refuses, whether it tells token ids, and whether it reads our prompts."""
        for cache in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):  # vLLM's, where they are switched on
            try:
                async with asyncio.timeout(self.endpoint.timeout):
                    await self.http.post(f"{self.url.removesuffix('/v1')}/{cache}")
            except (httpx2.HTTPError, TimeoutError):
                break  # the question below finds out why
        try:
            body = await self._complete(await asyncio.to_thread(self._request, sample, 1, 0))
        except (_Passing, ImageError, _Refused):
            return  # of this question alone, perhaps; the others tell
        self._tell(sample, body)

    def _tell(self, sample: Sample, body: dict[str, Any]) -> None:
        if self.encoder is None:
            return
        usage = body.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        try:
            ours = len(self.encoder.prompt(sample).ids)
        except MastersError:
            return
        if isinstance(read, int) and read != ours:
            say(f"warning: {self.url} read {read} tokens where this model's own template and image processor give {ours} (question '{sample.id}')")
        answers = read_choices(body, 1, sample, self.encoder)
        choices = body.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict) and choices[0].get("token_ids"):
            self.left_out |= {"logprobs", "top_logprobs"}  # they were asked for their ids alone
        if answers[0].finish != "failed" and not answers[0].told:
            say(f"{self.url} tells no token ids: answers are tokenised again, and kept where that gives their text back")

    async def close(self, running: set[asyncio.Task[Any]]) -> None:
        """End what is under way: after an error, nobody waits for it."""
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.http.aclose()

    async def question(self, sample: Sample) -> tuple[Sample, list[Generated]]:
        """All answers to one question, in requests of `per_request`."""
        size = self.endpoint.per_request or self.draw.count
        parts = [(first, min(size, self.draw.count - first)) for first in range(0, self.draw.count, size)]
        found = await asyncio.gather(*(self._answers(sample, count, first) for first, count in parts))
        return sample, [answer for answers in found for answer in answers]

    async def _answers(self, sample: Sample, count: int, first: int) -> list[Generated]:
        try:
            async with self.slots:
                request = await asyncio.to_thread(self._request, sample, count, first)
            for attempt in range(self.endpoint.retries + 1):
                try:
                    async with self.slots:
                        return self._read(await self._complete(request), count, sample)
                except _Passing as error:
                    if attempt == self.endpoint.retries:
                        return [failed(f"{error}, {attempt + 1} times")] * count
                    # Half of it at random, so that requests which failed together don't come back together.
                    pause = min(LONGEST_PAUSE, self.endpoint.pause * 2**attempt) * random.uniform(0.5, 1.0)
                    await asyncio.sleep(min(LONGEST_PAUSE, max(pause, error.wait)))
        except (_Refused, ImageError) as error:
            return [failed(str(error))] * count
        raise AssertionError("unreachable")

    def _read(self, body: dict[str, Any], count: int, sample: Sample) -> list[Generated]:
        return read_texts(body, count) if self.encoder is None else read_choices(body, count, sample, self.encoder)

    async def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of one answered request, without the optional fields that the server has refused."""
        while True:
            sent = {name: value for name, value in request.items() if name not in self.left_out}
            status, body, wait = await self._post(sent)
            if status == 200:
                return _object(body)
            refused = refused_fields(body, sent) if status in (400, 422) else set()
            if not refused:
                raise self._failure(status, body, wait)
            self.left_out |= refused

    async def _post(self, request: dict[str, Any]) -> tuple[int, bytes, float]:
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self.http.post(f"{self.url}/chat/completions", json=request)
        except TimeoutError:
            raise _Passing(f"no answer within {self.endpoint.timeout:g} s") from None
        except httpx2.InvalidURL as error:
            raise RunError(f"'{self.url}' is no address of a server ({error}); expected one such as http://localhost:8000/v1") from None
        except httpx2.HTTPError as error:  # no connection, or one that broke off in the midst of an answer
            raise _Passing(f"{type(error).__name__}: {_one_line(str(error))}") from None
        asked = response.headers.get("retry-after", "")
        return response.status_code, response.content, float(asked) if asked.isdecimal() else 0.0

    def _failure(self, status: int, body: bytes, wait: float) -> MastersError:
        said = _one_line(body.decode("utf-8", "replace"))
        if status in (401, 403):
            held = "was refused" if os.environ.get(self.endpoint.key_variable) else "is not set"
            return RunError(f"{self.url} answered {status} ({said}): the key in ${self.endpoint.key_variable} {held}; set one that it accepts, then run again")
        if status == 404:
            return RunError(
                f"{self.url} answered 404 ({said}); expected it to serve the model '{self.endpoint.model}' under /chat/completions, mend url or name"
            )
        return _Passing(f"the server answered {status} ({said})", wait) if status in AGAIN else _Refused(f"the server answered {status} ({said})")

    def _request(self, sample: Sample, count: int, first: int) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in sample.images]
        content.append({"type": "text", "text": sample.prompt})
        place = f"{self.draw.seed}/{self.draw.weights}/{sample.id}/{first}"
        request = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "n": count,
            "seed": int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "little") >> 1,
            "stream": False,
            **sampling_fields(self.draw.sampling, self.encoder.longest if self.encoder else 0),
            "cache_salt": hashlib.sha256(self.draw.weights.encode()).hexdigest(),  # vLLM: other weights share no prefix
        }
        return request | token_fields(self.encoder) if self.encoder else request


def refused_fields(body: bytes, sent: Mapping[str, Any]) -> set[str]:
    """The optional fields of those `sent` that a refusal is about: its `param`, where it has one, since its message may also list what is known."""
    text = body.decode("utf-8", "replace")
    try:
        param = json.loads(text)["error"]["param"]
    except (ValueError, TypeError, KeyError, RecursionError):
        param = None
    named = {param} if isinstance(param, str) and param in sent else {name for name in sent if name in text}
    return named.intersection(OPTIONAL)


def token_fields(encoder: Encoder) -> dict[str, Any]:
    """What makes a server tell the tokens that it draws, and never draw an image's."""
    told = {"return_token_ids": True, "logprobs": True, "top_logprobs": 1}
    return told | ({"logit_bias": {str(token): NEVER for token in encoder.image_tokens}} if encoder.image_tokens else {})


def sampling_fields(sampling: Sampling, longest: int) -> dict[str, Any]:
    """A sampling in a request's fields; each under every name that a server has for it, since one that is left out is filled by a default.

    `longest` is how many tokens a prompt may have.
    """
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        # llama.cpp's: its own name for the penalty, over the whole context, and the order in which transformers applies all of them.
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": longest + sampling.max_tokens,
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
    }


def data_url(image: Path | bytes) -> str:
    """An image as a data: URL: the file's own bytes where any decoder shows them as training will, and otherwise its pixels anew, as PNG."""
    raw = image if isinstance(image, bytes) else _read(image)
    opened = open_image(raw)  # refuses what training would refuse
    with Image.open(io.BytesIO(raw)) as plain:
        kind, mode, turned = plain.format, plain.mode, plain.getexif().get(0x0112, 1) != 1
    if kind not in ("JPEG", "PNG") or mode != "RGB" or turned or "transparency" in opened.info:
        raw, kind = _as_png(opened), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"no image file at {path} ({error.strerror}); expected a JPEG, PNG, WebP, GIF or BMP file there") from None


def _as_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise _Passing(f"the answer is no JSON: {_one_line(body[:200].decode('utf-8', 'replace'))!r}") from None
    if not isinstance(found, dict):
        raise _Passing(f"the answer is {type(found).__name__}, expected an object with 'choices'")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160]
