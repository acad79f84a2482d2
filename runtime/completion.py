"""Answers in the form of OpenAI's chat completions, whole or as the chunks of a stream; `timings` is an addition of ours, in milliseconds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from .answer import Answer, Timings, TokenLogprob
from .detokenize import TokenBytes

# JSON has no infinity; OpenAI writes this for what is out of reach.
NEVER = -9999.0


@dataclass(frozen=True)
class Completion:
    """What all chunks of one answer share."""

    model: str
    spell: TokenBytes
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], token_ids: bool = False) -> dict[str, Any]:
        """The answers of all choices as one object; with `token_ids` each says the tokens that were drawn, its end token included."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": answer.finish_reason,
                "logprobs": self.logprobs(Covered(self.spell).grow(answer.logprobs, answer.text)) if answer.logprobs else None,
            }
            | ({"token_ids": list(answer.token_ids)} if token_ids else {})
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": usage(answers), "timings": [timings(answer.timings) for answer in answers]}

    def begin(self, index: int) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None})

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        told = self.logprobs(logprobs) if logprobs else None
        return self._chunk({"index": index, "delta": {"content": text}, "finish_reason": None, "logprobs": told})

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        last = {"index": index, "delta": {}, "finish_reason": answer.finish_reason, "logprobs": None}
        return self._chunk(last) | {"timings": timings(answer.timings)}

    def bill(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return self._object("chat.completion.chunk", []) | {"usage": usage(answers)}

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [self._token(one.token, one.logprob) | {"top_logprobs": [self._token(token, logprob) for token, logprob in one.top]} for one in tokens],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelt = self.spell(token)
        # A special token adds no text, yet has a name.
        name = spelt.decode("utf-8", "replace") or self.spell.tokenizer.id_to_token(token) or ""
        return {"token": name, "logprob": max(logprob, NEVER), "bytes": list(spelt)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """The prompt counts once, however many answers it got."""
    prompt, said = max(answer.prompt_tokens for answer in answers), sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def timings(times: Timings) -> dict[str, float | None]:
    return {
        "image_preprocess": times.image_preprocess,
        "image_encode": times.image_encode,
        "prefill": times.prefill,
        "first_token": times.first_token,
        "decode_per_token": times.decode_per_token,
        "total": times.total,
    }


class Covered:
    """Which tokens a growing text shows: those of a stop string, or held back still, begin after its end."""

    def __init__(self, spell: TokenBytes) -> None:
        self._spell = spell
        self._count, self._place, self._begun = 0, 0, False

    def grow(self, tokens: Sequence[TokenLogprob], text: str) -> Sequence[TokenLogprob]:
        """Of all `tokens` so far, those that begin within `text`, the whole of it so far, and have not been given before."""
        end, before = len(text.encode()), self._count
        while self._count < len(tokens) and self._place < end:
            piece = self._spell(tokens[self._count].token)
            # White space at the very start is not shown.
            piece = piece if self._begun else piece.lstrip()
            self._begun = self._begun or bool(piece)
            self._place += len(piece)
            self._count += 1
        return tokens[before : self._count]


def error_object(message: str, kind: str = "server_error", param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: RequestError) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
    return error_object(str(error), kinds.get(error.status, "invalid_request_error"), error.param, error.code)
