"""What a request says its answer must be: OpenAI's `response_format`, and beyond it `structured_outputs` in vLLM's form (choice, regex, json)."""

from __future__ import annotations

from typing import Any

from ..errors import MastersError, MissingExtraError, RequestError
from .constraint import Constraint, read_constraint
from .grammar import check_grammar

FIELDS = ("response_format", "structured_outputs")
# Of a schema, a pattern, or all choices together: reading one costs time before any token is made.
MOST_CHARACTERS = 32_768


def read_format(raw: dict[str, Any]) -> Constraint | None:
    """The constraint in a request's fields, None where its answer is free. Raises RequestError, naming the field, for one that can't be read or met."""
    given = {name: wish for name in FIELDS if (wish := _wish(name, raw.get(name)))}
    if len(given) > 1:
        raise RequestError("'response_format' and 'structured_outputs' together; expected one of them", param="structured_outputs")
    for name, wish in given.items():
        try:
            return _constraint(wish)
        except MissingExtraError as error:
            raise RequestError(f"'{name}': {error}, where the server runs", param=name, code="unsupported_parameter") from None
        except MastersError as error:
            raise RequestError(f"'{name}': {error}", param=name) from None
    return None


def _constraint(wish: dict[str, Any]) -> Constraint | None:
    constraint = read_constraint(**wish)
    if constraint is not None:
        texts = constraint.choices or (constraint.pattern or constraint.json_schema or "",)
        if (size := sum(map(len, texts))) > MOST_CHARACTERS:
            raise RequestError(f"it has {size:,} characters; at most {MOST_CHARACTERS:,} are read")
        if constraint.choices is None:
            check_grammar(constraint)
    return constraint


def _wish(name: str, value: Any) -> dict[str, Any]:
    """The field as keywords of `read_constraint`; empty where it wants nothing."""
    match name, value:
        case (_, None) | ("response_format", {"type": "text"}):
            return {}
        case "response_format", {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case "response_format", {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
        case "structured_outputs", {"choice": list(choices)} if len(value) == 1:
            return {"choices": choices}
        case "structured_outputs", {"regex": str(pattern)} if len(value) == 1:
            return {"pattern": pattern}
        case "structured_outputs", {"json": dict(schema) | str(schema)} if len(value) == 1:
            return {"json_schema": schema}
    forms = {
        "response_format": '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}',
        "structured_outputs": '{"choice": […]}, {"regex": "…"} or {"json": {…}}',
    }
    raise RequestError(f"'{name}' is of a form that is not known; expected {forms[name]}", param=name)
