"""The errors that Masters raises on purpose. Each message says what was found, what was expected and what to do.

The command line prints one of these as a single line and exits with 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "DataError",
    "ImageError",
    "LengthError",
    "MastersError",
    "MissingExtraError",
    "ModelError",
    "ParityError",
    "RecipeError",
    "RequestError",
    "RunError",
]


class MastersError(Exception):
    """Root of the tree: an input, an environment or a result that Masters refuses, with the reason in one line."""


class DataError(MastersError):
    """A file of questions or one of its rows can't be used."""


class ImageError(DataError):
    """An image can't be read, is truncated, or is too large to decode safely."""


class LengthError(DataError):
    """A question takes more tokens than are read; it is never cut, least of all inside an image."""


class RecipeError(MastersError):
    """A recipe has an unknown key, a value out of range, or two settings that contradict each other."""


class ModelError(MastersError):
    """A model folder is incomplete, is no vision-language model, or does not fit its partner."""


class RunError(MastersError):
    """A run folder can't be continued: another recipe's, another process's, or damaged."""


class BundleError(MastersError):
    """An exported bundle is incomplete, was changed after export, or is made for another target."""


class ParityError(MastersError):
    """An exported graph does not agree with the PyTorch model; the message names stage, tensor and difference."""


class RequestError(MastersError):
    """A request that the server refuses, with the HTTP status that says why."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_after: int | None = None) -> None:
        """`param` is the field at fault, `code` a word for programs, `retry_after` in seconds."""
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


class MissingExtraError(MastersError):
    """A command needs packages of an extra that is not installed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error for an optional dependency that is absent."""
    return MissingExtraError(f"the package '{package}' is not installed; this needs the '{extra}' extra: pip install 'masters[{extra}]'")
