"""Judges that are asked: a model in this process or a server, text only. Rows of answers get their verdicts here, each distinct answer once.

Empty and repetitive answers are wrong without asking (judge.py). What was asked for in vain stays open, and is asked for again by the next run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..errors import MastersError, ModelError, RunError
from ..progress import bar
from ..samples import Sample
from . import models, ranks
from .answers import Heard
from .buffer import Shelf
from .claims import fingerprints
from .endpoint import GIVE_UP, Draw, Endpoint, ask
from .families import family_of
from .flops import Shape, shape_of
from .generate import Generated, Sampling, failed, generate
from .inputs import Encoder
from .judge import Judge, Verdict, judge
from .judge_prompts import VERSION, Ask, Case, judge_cases
from .parallel import place, sharding, within
from .recipe import Recipe
from .responses import Response
from .verdicts import VerdictFile, verdict_key

LONGEST = 4096  # tokens of a judge's prompt
STAND_IN = Sample("\0", (), "?")  # what a process reads that has nothing to judge while others do: they compute the same layers
CASES = 32 * GIVE_UP  # judged by a server before they are kept

JudgeTally = Callable[[Sequence[Case], Heard], None]  # told of a batch, with what was asked and replied, before it is kept


def at_once(sample: Sample, text: str) -> Verdict:
    """What needs no judge: an empty or repetitive answer is wrong, and without ground truth there is no verdict. The others are open."""
    found = judge(sample, text)
    return found if found.reason in ("empty", "repetitive") or not sample.answers else Verdict(None, "not judged yet", "")


def judge_name(settings: Judge, mark: str) -> str:
    """A judge's identity; `mark` is a hash of its weights where they are ours."""
    who = f"model {mark[:16]}" if settings.kind == "model" else f"endpoint {settings.endpoint.model}"
    return f"{who}, prompts {VERSION}, {settings.max_tokens} tokens"


def judge_rows(
    rows: Mapping[str, Sequence[Response]],
    samples: Sequence[Sample],
    settings: Judge,
    name: str,
    kept: Path,
    asker: Callable[[], AbstractContextManager[Ask]],
    tally: JudgeTally | None = None,
) -> dict[str, list[Response]]:
    """The rows of several shelves with their verdicts, as far as the judge `name` could tell; those in the file `kept` are not asked for again.

    `asker` is opened if there is something to ask. Raises RunError if more than `settings.max_unjudged` of the answers stay without a verdict.
    """
    by_id, file = {sample.id: sample for sample in samples}, VerdictFile(kept)
    open_rows = [row for shelf in rows.values() for row in shelf if is_open(row, by_id[row.sample])]
    keys = {(row.sample, row.text): verdict_key(by_id[row.sample], row.text, name) for row in open_rows}
    texts = {key: pair for pair, key in keys.items() if key not in file.known}
    cases = [Case(by_id[sample], text, key, file.failures.get(key, 0)) for key, (sample, text) in texts.items()]
    if cases:
        _ask_all(cases, settings, name, file, asker, tally)
    missing = Verdict(None, "the judge gave no verdict", name)
    said = {pair: file.known.get(key, missing) for pair, key in keys.items()}
    judged = {shelf: [_with(row, said.get((row.sample, row.text))) for row in found] for shelf, found in rows.items()}
    _refuse_many(judged, by_id, settings.max_unjudged, name)
    return judged


def is_open(row: Response, sample: Sample) -> bool:
    """Whether a verdict is wanted and not there."""
    return row.finish != "failed" and row.verdict is None and bool(sample.answers)


def _ask_all(
    cases: Sequence[Case], settings: Judge, name: str, file: VerdictFile, asker: Callable[[], AbstractContextManager[Ask]], tally: JudgeTally | None
) -> None:
    """Batch by batch, each kept when it is finished; of one length together, as little of a batch is padding."""
    size = CASES if settings.kind == "endpoint" else settings.batch * ranks.count()
    order = sorted(cases, key=lambda case: (case.attempt, len(case.sample.prompt) + len(case.text), case.key))
    attempts = [list(group) for _, group in itertools.groupby(order, key=lambda case: case.attempt)]
    batches = [group[start : start + size] for group in attempts for start in range(0, len(group), size)]
    with asker() as asked:
        for batch in bar(batches, f"judging {len(cases):,} answers"):
            heard: list[tuple[Sample, Sequence[Generated]]] = []
            verdicts = [dataclasses.replace(verdict, judge=name) for verdict in judge_cases(batch, _noted(asked, heard), settings.max_tokens)]
            if tally:
                tally(batch, heard)
            file.add([case.key for case in batch], verdicts)


def _noted(asked: Ask, heard: list[tuple[Sample, Sequence[Generated]]]) -> Ask:
    """`asked`, its prompts and replies added to `heard`."""

    def noted(samples: Sequence[Sample], sampling: Sampling, seed: int) -> dict[str, Generated]:
        found = asked(samples, sampling, seed)
        heard.extend((sample, [found[sample.id]]) for sample in samples)
        return found

    return noted


def _with(row: Response, verdict: Verdict | None) -> Response:
    return dataclasses.replace(row, verdict=verdict.value, judge=verdict.judge, reason=verdict.reason) if verdict else row


def _refuse_many(rows: Mapping[str, Sequence[Response]], samples: Mapping[str, Sample], most: float, name: str) -> None:
    wanted = [row for shelf in rows.values() for row in shelf if row.finish != "failed" and samples[row.sample].answers]
    without = [row for row in wanted if row.verdict is None]
    if len(without) > most * len(wanted):
        raise RunError(
            f"{len(without)} of {len(wanted)} answers have no verdict by the judge ({name}); the others are kept: choose a judge that ends with "
            f"<answer>1</answer> or <answer>0</answer>, run again to ask it once more, or raise judge.max_unjudged from {most:g}"
        )


def judge_shelves(
    given: Mapping[str, Sequence[Response]],
    samples: Sequence[Sample],
    recipe: Recipe,
    teacher: str,
    buffer: Path,
    asker: Callable[[], AbstractContextManager[Ask]],
    tally: JudgeTally | None = None,
) -> dict[str, list[Response]]:
    """`judge_rows` by a recipe's judge, the shelves in `buffer` written anew where verdicts came; `teacher` names the default judge's fingerprint."""
    prints = fingerprints(recipe)
    name = judge_name(recipe.judge, prints.get("judge") or prints[teacher])
    found = judge_rows(given, samples, recipe.judge, name, buffer / "verdicts.jsonl", asker, tally)
    for shelf, rows in found.items():
        if rows != given[shelf]:
            Shelf(buffer, shelf).close(rows)
    ranks.wait()
    return found


# Whom to ask


@contextmanager
def open_judge(recipe: Recipe, folder: Path, teacher: Callable[[], Any]) -> Iterator[Ask]:
    """The judge of a recipe, for as long as the block lasts; where none is named, the unmasked `teacher` with the processor in `folder`."""
    settings, dtype = recipe.judge, getattr(torch, recipe.train.dtype)
    if settings.kind == "endpoint":
        yield from_server(settings.endpoint)
    elif settings.model is None:
        yield from_model(teacher(), judge_encoder(folder, settings.max_tokens))
    else:
        shard = sharding() is not None and recipe.train.shard_teacher is not False
        with ranks.in_turn():  # the machine's memory holds one whole judge at a time
            model = place(models.frozen(load_judge(settings.model, dtype)), dtype, shard)
        yield from_model(model, judge_encoder(settings.model, settings.max_tokens))


def judge_shape(settings: Judge, teacher: Path) -> Shape | None:
    """What a judge's operations are counted from, by default the teacher's in this folder; None where a server computes."""
    return None if settings.kind == "endpoint" else shape_of(AutoConfig.from_pretrained(settings.model or teacher, local_files_only=True))


def from_server(endpoint: Endpoint) -> Ask:
    """A server's replies; the main process asks, all get them."""

    def asked(samples: Sequence[Sample], sampling: Sampling, seed: int) -> dict[str, Generated]:
        draw = Draw(1, sampling, seed, f"judge/{VERSION}")
        found = {sample.id: reply for sample, [reply] in ask(endpoint, None, samples, draw)} if ranks.is_main() else {}
        return ranks.agreed(found)

    return asked


def from_model(model: Any, encoder: Encoder) -> Ask:
    """A model's replies, each process's to its part of the prompts; one that is too long for the model fails."""
    kind = model.config.model_type
    collate = family_of(kind).collate_pixels if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else lambda rows: {}

    def asked(samples: Sequence[Sample], sampling: Sampling, seed: int) -> dict[str, Generated]:
        mine, found = samples[ranks.index() :: ranks.count()], {}
        read = {}
        for sample in mine:
            try:
                read[sample] = encoder.encode(sample)
            except MastersError as error:
                found[sample.id] = failed(str(error))
        if read or ranks.count() > 1:
            read = read or {STAND_IN: encoder.encode(STAND_IN)}
            replies = within(model, generate, encoder, collate, list(read), 1, sampling, seed, "judge", list(read.values()))
            found |= {sample.id: reply for sample, [reply] in zip(read, replies, strict=True)}
        return {key: reply for part in ranks.gathered(found) for key, reply in part.items()}

    return asked


def judge_encoder(folder: Path, max_tokens: int) -> Encoder:
    """What turns a judge's prompts into its tokens: the processor of a vision-language model, or a language model's tokenizer."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST + max_tokens
    longest = max(1, min(LONGEST, context - max_tokens))
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return JudgeEncoder(models.load_processor(folder), longest, cache_bytes=0, positions=family_of(config.model_type).positions)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"no tokenizer in {folder} ({str(error).splitlines()[0][:160]}); expected its files beside the weights") from None
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no chat template or no end token; expected those of a chat model, which a judge must be")
    return JudgeEncoder(TextProcessor(tokenizer), longest, cache_bytes=0)


def load_judge(folder: Path, dtype: torch.dtype) -> Any:
    """The weights of a judge, a vision-language model or a language model. Raises ModelError where they can't be loaded."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model in {folder}; expected a Hugging Face folder with a config.json as judge.model")
    if AutoConfig.from_pretrained(folder, local_files_only=True).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return models.load_model(folder, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # safetensors, transformers and torch each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"the judge in {folder} can't be loaded ({reason}); expected a whole checkpoint of a chat model") from None


class JudgeEncoder(Encoder):
    """An encoder of prompts alone: what a judge says is read, and never continued or trained on, which some templates would not allow."""

    def _text_before_answer(self) -> str:
        return ""


class TextProcessor:
    """A language model's tokenizer behind the calls of a processor that `Encoder` makes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        plain = [{"role": turn["role"], "content": "".join(part.get("text", "") for part in turn["content"])} for turn in turns]
        # Templates without a thinking mode take no notice; the two steps are all the thinking there is.
        text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False)
        assert isinstance(text, str)
        return text

    def __call__(self, text: Sequence[str], images: None, return_tensors: str, add_special_tokens: bool) -> Any:
        return self.tokenizer(list(text), return_tensors=return_tensors, add_special_tokens=add_special_tokens, return_token_type_ids=False)
