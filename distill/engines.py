"""Where answers come from: a model in this process, an endpoint that runs already, or a server that we start on a folder of weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..samples import Sample
from .answers import Asking, Engine, Source, in_process
from .endpoint import Draw, Endpoint, ask
from .generate import Generated
from .inputs import CollatePixels, Encoder
from .launch import serving
from .recipe import Answers


@dataclass(frozen=True)
class Weights:
    """How a source's weights are had: as a model in this process, for as long as the block lasts, or as a checkpoint folder.

    `folder` is given a place where it may write one, and returns it, or another folder where they stand already.
    """

    model: Callable[[], AbstractContextManager[Any]]
    folder: Callable[[Path], Path]


@contextmanager
def open_engine(
    name: str,
    wanted: Answers,
    source: Source,
    asking: Asking,
    encoder: Encoder,
    collate: CollatePixels,
    weights: Weights,
    place: Path,
    images: Mapping[str, str],
) -> Iterator[Engine]:
    """The engine `name` of the recipe's `wanted` with a source's weights; a server of our own writes its log and finds its folder below `place`.

    `images` are the digests of the images of each question's id.
    """
    if name == "transformers":
        with weights.model() as model:
            yield in_process(model, encoder, collate, source, asking, wanted.processes, images)
    elif name == "endpoint":
        yield from_endpoint(wanted.endpoint, encoder, source, asking)
    else:
        with _removed_after(place / source.shelf) as written, serving(wanted.vllm, weights.folder(written), source.shelf, place / f"{source.shelf}.log") as url:
            yield from_endpoint(dataclasses.replace(wanted.endpoint, url=url, model=source.shelf), encoder, source, asking)


def from_endpoint(endpoint: Endpoint, encoder: Encoder, source: Source, asking: Asking) -> Engine:
    """The engine that is a server at `endpoint`, whose url and model are `source`'s."""
    named = name_weights(endpoint, source)
    draw = Draw(source.count, asking.sampling, asking.seed, source.shelf)

    def answer(batches: Sequence[Sequence[Sample]]) -> Iterator[tuple[Sample, list[Generated]]]:
        return ask(named, encoder, [sample for batch in batches for sample in batch], draw)

    return answer


@contextmanager
def _removed_after(folder: Path) -> Iterator[Path]:
    """A place for a checkpoint that is wanted within this block alone; what a killed run has left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def name_weights(endpoint: Endpoint, source: Source) -> Endpoint:
    """The endpoint with {source}, {number}, {name} and {ratio} replaced in url and model."""
    values = {"source": source.kind, "number": str(source.number), "name": source.model, "ratio": f"{source.ratio:g}"}

    def filled(text: str) -> str:
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", value)
        return text

    return dataclasses.replace(endpoint, url=filled(endpoint.url), model=filled(endpoint.model))


def check_names(endpoint: Endpoint, sources: Iterable[Source]) -> None:
    """Raise RecipeError if the endpoint's url and model are the same for different weights: the server would answer both with one of them."""
    owners: dict[tuple[str, str], tuple[str, str, float]] = {}
    for source in sources:
        named, weights = name_weights(endpoint, source), (source.kind, source.model, source.ratio)
        before = owners.setdefault((named.url, named.model), weights)
        if before != weights:
            ours, theirs = (f"the {kind} {name} at mask ratio {ratio:g}" for kind, name, ratio in (weights, before))
            raise RecipeError(
                f"answers.endpoint asks '{named.model}' at {named.url} for {theirs} and for {ours}; expected {{ratio}}, {{name}} or {{source}} in its model or "
                "url, one served model for each, or answers.engine=vllm, which starts a server for each"
            )
