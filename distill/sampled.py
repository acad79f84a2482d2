"""The tokens behind a server's answer: as the server tells them, or else from the text, where tokenising it gives the text back.

The loss scores the tokens that were sampled. An answer whose tokens are not known for sure is a failed one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..samples import Sample
from .generate import Generated, failed
from .inputs import Encoder

FINISHES = ("stop", "length")
LOST = "\ufffd"  # what a decoder writes for bytes that are no character


def read_choices(body: dict[str, Any], count: int, sample: Sample, encoder: Encoder) -> list[Generated]:
    """`count` answers from the body of a chat completion; those that it lacks, or that can't be used, are failed ones with the reason."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return [failed("the answer has no choices")] * count
    usage = body.get("usage")
    drawn = usage.get("completion_tokens") if isinstance(usage, dict) and len(choices) == 1 else None
    found = [replace(_choice(choice, drawn, sample, encoder), usage=_usage(body)) for choice in choices[:count]]
    lacking = failed(f"the server sent {len(choices)} of {count} answers; set answers.endpoint.per_request to {len(choices)}")
    return found + [lacking] * (count - len(found))


def _choice(choice: Any, drawn: Any, sample: Sample, encoder: Encoder) -> Generated:
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(content, str | None):
        return failed("a choice has no message")
    finish = choice.get("finish_reason")
    if finish not in FINISHES:
        return failed(f"the answer ended by {str(finish)[:40]!r}, expected stop or length")
    try:
        told = told_ids(choice)
        ids = spelled_ids(content or "", sample, encoder, finish, drawn) if told is None else checked_ids(told, content or "", encoder)
    except ValueError as error:
        return failed(str(error))
    if finish == "stop" and not (ids and ids[-1] in encoder.tokenizer.all_special_ids):
        ids = [*ids, encoder.eos]  # some servers keep the end token to themselves
    return Generated(encoder.text(ids), tuple(ids), finish, told=told is not None)


def read_texts(body: dict[str, Any], count: int) -> list[Generated]:
    """`read_choices` where the text alone is wanted, and no tokens."""
    choices = body.get("choices")
    found = [replace(_text(choice), usage=_usage(body)) for choice in choices[:count]] if isinstance(choices, list) else []
    return found + [failed(f"the server sent {len(found)} of {count} answers")] * (count - len(found))


def _text(choice: Any) -> Generated:
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        return failed("a choice has no text")
    finish = choice.get("finish_reason")
    return Generated(content, (), finish, told=False) if finish in FINISHES else failed(f"the answer ended by {str(finish)[:40]!r}, expected stop or length")


def _usage(body: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and of the answer where there is one alone; 0 where the server does not tell."""
    usage, choices = body.get("usage"), body.get("choices")
    told = usage if isinstance(usage, dict) else {}
    read, written = (found if isinstance(found := told.get(key), int) else 0 for key in ("prompt_tokens", "completion_tokens"))
    return read, written if isinstance(choices, list) and len(choices) == 1 else 0


def told_ids(choice: dict[str, Any]) -> list[int] | None:
    """The ids that a server tells: vLLM's token_ids, or those beside llama.cpp's log-probabilities, or vLLM's 'token_id:N' in place of their texts."""
    ids = choice.get("token_ids")
    if ids is None:
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        if not isinstance(content, list) or not all(isinstance(token, dict) for token in content):
            return None
        ids = [token.get("id", _numbered(token.get("token"))) for token in content]
        if None in ids or not ids:
            return None
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError("the token ids are no list of whole numbers")
    return ids


def _numbered(token: Any) -> int | None:
    name, _, number = token.partition(":") if isinstance(token, str) else ("", "", "")
    return int(number) if name == "token_id" and number.isdecimal() else None


def checked_ids(ids: list[int], text: str, encoder: Encoder) -> list[int]:
    """`ids` up to their first end token. Raises ValueError unless they are this tokenizer's, spell `text` and hold no image."""
    if any(not 0 <= i < encoder.vocabulary for i in ids):
        raise ValueError(f"a token id is outside the vocabulary of {encoder.vocabulary}; expected a server with this model's tokenizer")
    if any(i in encoder.image_tokens for i in ids):
        raise ValueError("the answer holds an image token")
    kept = ids[: ids.index(encoder.eos) + 1] if encoder.eos in ids else ids
    # A server may hold back the last bytes of a character that was cut.
    ours, theirs = encoder.text(kept).rstrip(LOST).strip(), text.rstrip(LOST).strip()
    if ours != theirs:
        raise ValueError(f"the token ids spell {ours[:40]!r}, the answer says {theirs[:40]!r}; expected a server with this model's tokenizer")
    return kept


def spelled_ids(text: str, sample: Sample, encoder: Encoder, finish: str, drawn: Any) -> list[int]:
    """The ids of `text`, without an end token. Raises ValueError where they can't be those that were sampled.

    They must spell the text, continue the prompt with no token across its end, and be as many as the server says (`drawn`, end token in or out).
    """
    if LOST in text:
        raise ValueError("the text holds bytes that are no character, whose tokens can't be told from it")
    tokenizer = encoder.tokenizer
    prompt = encoder.processor.apply_chat_template(encoder.turns(sample), add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    # What the template puts before an answer comes first: most servers strip it, and the model has learned it.
    forms = [text] if not text or text.startswith(encoder.before_answer) else [encoder.before_answer + text, text]
    for form in forms:
        ids: list[int] = tokenizer(form, add_special_tokens=False).input_ids
        spelled = tokenizer.decode(ids) == form and not any(i in tokenizer.all_special_ids for i in ids)
        follows = tokenizer(prompt + form, add_special_tokens=False).input_ids == [*before, *ids]
        if spelled and follows and (not isinstance(drawn, int) or drawn in (len(ids), len(ids) + (finish == "stop"))):
            return ids
    raise ValueError(f"tokenising {text[:40]!r} does not give tokens that spell it, continue the prompt and are as many as were sampled")
