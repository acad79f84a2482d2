"""Loading teachers and students from Hugging Face folders, and refusing pairs that do not fit before any work starts."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from ..errors import MastersError, ModelError, RecipeError
from ..samples import Sample
from .families import SUPPORTED, check_config, family_of
from .forward import packing_error
from .inputs import CollatePixels, Encoder, Prompt
from .mask import maskable
from .recipe import Mask
from .stored import StoredTensors, read_header, stored_weights, weight_files

PACKING_TOLERANCE = 1e-3  # of states in float32, relative


def read_config(folder: Path) -> Any:
    """The configuration of a vision-language model of a supported family. Raises ModelError for anything else."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model in {folder}; expected a Hugging Face folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder}/config.json can't be read ({_first_line(error)}); expected the configuration of a Hugging Face model") from None
    check_config(config)
    return config


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model in `folder` with weights of `dtype`. Raises ModelError if weights are missing or damaged."""
    read_config(folder)
    count_weights(folder)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:  # safetensors, transformers and torch each raise their own kinds
        raise ModelError(f"the weights in {folder} can't be loaded ({_first_line(error)}); expected a whole checkpoint, download it again") from None
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks the weight {sorted(info['missing_keys'])[0]}; expected a whole checkpoint, download it again")
    return model


def count_weights(folder: Path) -> int:
    """How many numbers the checkpoint in `folder` holds, from its files' headers. Raises ModelError, naming the file, where one is missing or cut."""
    return sum(math.prod(place.shape) for file in weight_files(folder) for place in read_header(file))


def skeleton(config: Any) -> Any:
    """A model of this configuration without weights, on the meta device: names, shapes and which weights are shared, in no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def weights_to_mask(folder: Path, mask: Mask, dtype: torch.dtype) -> StoredTensors:
    """The weights of the model in `folder` that `mask` is about, as a model of `dtype` computes with them, read from the files one at a time."""
    model = skeleton(read_config(folder))
    chosen = maskable(model, family_of(model.config.model_type).LANGUAGE, mask.exclude, mask.include)
    return StoredTensors(stored_weights(folder, model), chosen, dtype)


def load_processor(folder: Path) -> Any:
    """The processor in `folder`. Raises ModelError, naming torchvision, where its family's processor can't be built without it."""
    try:
        processor = _processor(folder)
    except ImportError as error:
        raise ModelError(f"the processor in {folder} needs a package that is missing ({_first_line(error)}); install it, often torchvision") from None
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"no processor in {folder} ({_first_line(error)}); expected tokenizer, processor and chat template files beside the weights") from None
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise ModelError(f"the processor in {folder} has no image processor or no chat template; expected those of a vision-language chat model")
    return processor


def _processor(folder: Path) -> Any:
    """The whole processor or, without torchvision, the one for images and text: only a processor's part for videos needs it."""
    name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(folder, local_files_only=True).model_type)
    kind: Any = getattr(transformers, name or "", None)
    video = inspect.signature(kind).parameters.get("video_processor") if kind else None
    if not is_torchvision_available() and video is not None and video.default is None:
        return without_videos(kind).from_pretrained(folder, local_files_only=True)
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def without_videos(kind: Any) -> Any:
    """A processor class that takes and saves all its parts but the one for videos."""
    kept = [part for part in kind.get_attributes() if part != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: kept), "__module__": kind.__module__})


def check_pair(teacher: Path, student: Path) -> None:
    """Raise ModelError unless both models are of one family, tokenizer and chat template, and the teacher is the larger.

    How an image becomes tokens may differ (`teacher_encoder`): answers alone are compared, token by token.
    """
    ours, theirs = read_config(student), read_config(teacher)
    if ours.model_type != theirs.model_type:
        raise ModelError(f"{teacher} is a {theirs.model_type}, {student} a {ours.model_type}; expected teacher and student of one family")
    large, small = count_weights(teacher), count_weights(student)
    if large < small:
        raise ModelError(
            f"the teacher {teacher} ({large:,} weights) is smaller than the student {student} ({small:,}); expected the larger model as teacher, swap them"
        )
    left, right = load_processor(student), load_processor(teacher)
    if left.tokenizer.get_vocab() != right.tokenizer.get_vocab():
        raise ModelError(f"the tokenizers of {teacher} and {student} differ; expected one vocabulary, since the loss compares the models token by token")
    size = 1 + max(left.tokenizer.get_vocab().values())
    for folder, config in ((teacher, theirs), (student, ours)):
        if config.get_text_config().vocab_size < size:
            raise ModelError(
                f"{folder} has {config.get_text_config().vocab_size:,} ids for a vocabulary of {size:,}; expected at least as many as its tokenizer"
            )
    if left.chat_template != right.chat_template:
        raise ModelError(f"the chat templates of {teacher} and {student} differ; expected the same, or the teacher would see another prompt")
    for folder, processor, config in ((teacher, right, theirs), (student, left, ours)):
        check_images = getattr(family_of(config.model_type), "check_images", None)
        if check_images:
            check_images(folder, processor, config)


def teacher_encoder(teacher: Path, encoder: Encoder) -> Encoder:
    """What a teacher reads questions through: `encoder`, the student's, where its own processor has the same settings, or else one of its own.

    Towers of two sizes cut an image into other tiles and patches, so each model has its own image tokens in the same text.
    """
    processor = load_processor(teacher)
    if _image_settings(processor) == _image_settings(encoder.processor):
        return encoder
    return Encoder(processor, encoder.longest, positions=encoder.positions)


def longest_prompt(configs: Sequence[Any], wanted: int, answer: int) -> int:
    """How many tokens a prompt may have: `wanted`, or what the shortest context of the models leaves beside an `answer` of so many."""
    contexts = [context for config in configs if (context := getattr(config.get_text_config(), "max_position_embeddings", None))]
    left = min(contexts, default=wanted + answer) - answer
    if left < 1:
        raise RecipeError(f"'answers.max_tokens' is {answer}, and the models read {left + answer} tokens in all; expected room for a prompt, lower it")
    return min(wanted, left)


def check_prompts(teacher: Path, encoder: Encoder, samples: Sequence[Sample]) -> None:
    """Raise ModelError unless the teacher's own processor makes of all texts the ids that `encoder`, the student's, does, and reads the same question.

    Where its settings for images are the student's, it must make the same tensors of the first question: equal settings are not enough, merges of a
    tokenizer or another program may differ. Where they are its own, it must still read the whole text, and every image in its place.
    """
    theirs = Encoder(load_processor(teacher), encoder.longest, positions=encoder.positions)
    if theirs.eos != encoder.eos:
        raise ModelError(f"{teacher} ends its answers with the id {theirs.eos}, the student with {encoder.eos}; expected one end token")
    for sample in samples:
        for text in (sample.prompt, *sample.answers):
            if theirs.answer(text) != encoder.answer(text):
                raise ModelError(
                    f"the tokenizers of {teacher} and the student split '{text[:80]}' differently; expected the same ids, copy one's files to the other"
                )
    if teacher_encoder(teacher, encoder) is not encoder:
        _check_own_images(teacher, theirs, encoder, max(samples, key=lambda sample: len(sample.images)))
        return
    mine, other = encoder.prompt(samples[0]), theirs.encode(samples[0])
    if not torch.equal(mine.ids, other.ids):
        raise ModelError(f"{teacher} reads question '{samples[0].id}' as {len(other.ids)} tokens, the student as {len(mine.ids)} others; expected one prompt")
    if mine.pixels.keys() != other.pixels.keys() or not all(torch.equal(t, other.pixels[name]) for name, t in mine.pixels.items()):
        raise ModelError(f"the image processors of {teacher} and the student make different tensors of question '{samples[0].id}'; expected the same image")


def _check_own_images(teacher: Path, theirs: Encoder, ours: Encoder, sample: Sample) -> None:
    """Raise ModelError unless both prompts of a question hold the same text, and image tokens wherever the template puts images."""
    if theirs.image_tokens != ours.image_tokens:
        raise ModelError(f"{teacher} marks images with the ids {theirs.image_tokens}, the student with {ours.image_tokens}; expected the same tokens")
    for name, encoder in ((str(teacher), theirs), ("the student", ours)):
        if not reads_whole(encoder, sample):
            raise ModelError(f"the processor of {name} leaves text or images of question '{sample.id}' out; expected all of it, each image in its place")


def reads_whole(encoder: Encoder, sample: Sample) -> bool:
    """Whether a prompt's ids are the template's text in order, with image tokens, whatever their number and company, in place of each run of images."""
    chat, found = encoder.chat(sample), encoder.encode(sample).ids.tolist()
    marks = encoder.tokenizer.convert_ids_to_tokens(encoder.image_tokens)
    texts = re.split("|".join(map(re.escape, marks)), chat) if marks else [chat]
    if len(texts) != len(sample.images) + 1:
        return False
    pieces = [encoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    first, *middle, last = pieces if len(pieces) > 1 else [pieces[0], []]
    if found[: len(first)] != first or found[len(found) - len(last) :] != last or len(found) < len(first) + len(last):
        return False
    if not sample.images:
        return len(found) == len(first)
    place = len(first)
    for piece in [*filter(None, middle), last]:
        end = len(found) - len(last) if piece is last else _find(found, piece, place)
        if end < place or not set(found[place:end]).intersection(encoder.image_tokens):
            return False
        place = end + len(piece)
    return True


def _find(ids: list[int], piece: list[int], start: int) -> int:
    """Where `piece` stands in `ids` from `start` on, or -1."""
    return next((i for i in range(start, len(ids) - len(piece) + 1) if ids[i : i + len(piece)] == piece), -1)


def freeze_vision(model: Any) -> None:
    """Leave the language model and the projector to train, wherever that stands; the vision tower keeps its weights."""
    family = family_of(model.config.model_type)
    tower = [name for name, _ in model.named_parameters() if any(part in name for part in family.VISION) and not any(part in name for part in family.PROJECTOR)]
    if not tower:
        raise ModelError(f"no weight is named after {' or '.join(family.VISION)}; expected the vision tower there, or set train.freeze_vision=false")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in tower)


def check_rules(model: Any, prompt: Prompt, collate_pixels: CollatePixels, shared: bool) -> None:
    """Raise ModelError unless responses packed behind `prompt` get the states of the model's own forward: other models than the known ones may not."""
    try:
        apart = packing_error(model, prompt, collate_pixels, shared)
    except MastersError:
        raise
    except Exception as error:  # whatever an unknown model makes of inputs that it does not expect
        raise ModelError(f"a {model.config.model_type} can't read packed responses ({_first_line(error)}); expected one of {', '.join(SUPPORTED)}") from None
    if not apart < PACKING_TOLERANCE:
        raise ModelError(f"packed responses of a {model.config.model_type} are {apart:.1%} off its own forward; expected one of {', '.join(SUPPORTED)}")


def frozen(model: Any) -> Any:
    """The model for inference alone."""
    return model.eval().requires_grad_(False)


def _image_settings(processor: Any) -> dict[str, Any]:
    """What decides which tensors and which tokens an image becomes."""
    skipped = ("processor_class", "image_processor_type", "chat_template", "tokenizer", "image_processor", "video_processor")
    settings = processor.to_dict() | processor.image_processor.to_dict()
    return {key: value for key, value in settings.items() if key not in skipped}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
