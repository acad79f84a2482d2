"""Random models of the real sizes of SmolVLM-256M, SmolVLM-500M and InternVL3.5-1B, and the forms in which each program wants them.

Made once into a cache folder, $MASTERS_BENCHMARKS or ~/.cache/masters-benchmarks: the Hugging Face folder in bfloat16, bundles by precision, and what peers
read. Tokenizers have the models' real number of entries, or reading one would cost less than it does.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from masters.files import whole_folder, write_json

SHAPES = ("256m", "500m", "internvl-1b")
NARROW = "int4/128/4"  # the fastest form of ours on ONNX Runtime's own kernels: blocks of 128, products in int8
TOWER = "vision=fp16+decoder=int4+embed=int4/128/4@vision=openvino-bf16"  # and with the tower on AMX, where onnxruntime-ep-openvino is installed
# One tile: the published settings make up to 17 (InternVL: 13) of a picture.
SMOLVLM_SIDE, INTERNVL_SIDE = 512, 448
MARKS = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>"]  # pad, begin, end
SMOLVLM_MARKS = ["<fake_token_around_image>", "<image>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]
INTERNVL_MARKS = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cache_folder() -> Path:
    return Path(os.environ.get("MASTERS_BENCHMARKS") or Path.home() / ".cache" / "masters-benchmarks")


def model_folder(shape: str) -> Path:
    """The Hugging Face folder of a random model of `shape`, made if it is not there."""
    folder = cache_folder() / shape / "model"
    if not folder.exists():
        with whole_folder(folder) as part:
            (build_internvl if shape == "internvl-1b" else build_smolvlm)(part, shape)
    return folder


def bundle_folder(shape: str, form: str) -> Path:
    """Our export of that model: `form` is a precision, or with block size and accuracy level behind it, as in int4/128/4; + for a precision's commas.

    Random weights have no answers to protect: what quantisation does to them is not judged.
    """
    precision, *layout = form.split("/")
    settings: dict[str, Any] = dict(zip(("block_size", "accuracy_level"), map(int, layout), strict=False))
    folder = cache_folder() / shape / re.sub(r"[^\w]", "-", form)
    if not folder.exists():
        from masters.export import ExportConfig, export

        export(ExportConfig(model_folder(shape), "onnx", folder, precision.replace("+", ","), allow_mismatch=True, **settings))
    return folder


def picture_file() -> Path:
    """A JPEG of a photograph's detail, 640 x 480: reading and resizing belong to an answer."""
    import numpy as np
    from PIL import Image

    path = cache_folder() / "picture.jpg"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        layers = [Image.fromarray(rng.integers(0, 256, (3 * s, 4 * s, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC) for s in (2, 16, 80)]
        Image.fromarray(np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0).astype(np.uint8)).save(path, quality=90)
    return path


def build_smolvlm(folder: Path, shape: str) -> None:
    import torch
    from shapes import smolvlm
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    from masters.demo.models import TEMPLATE, save_model

    words = tokenizer(49280, SMOLVLM_MARKS)
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(smolvlm(shape, words))
    images = Idefics3ImageProcessorPil(size={"longest_edge": SMOLVLM_SIDE}, max_image_size={"longest_edge": SMOLVLM_SIDE})
    save_model(folder, model, Idefics3Processor(images, words, image_seq_len=64, chat_template=TEMPLATE))


def build_internvl(folder: Path, shape: str) -> None:
    import torch
    from shapes import internvl3_5_1b
    from transformers import InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    words = tokenizer(151936, list(INTERNVL_MARKS.values()))
    words._set_model_specific_special_tokens(INTERNVL_MARKS)
    torch.manual_seed(0)
    InternVLForConditionalGeneration(internvl3_5_1b(words)).to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": INTERNVL_SIDE, "width": INTERNVL_SIDE}, max_patches=1).save_pretrained(folder)
    write_json(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": 256})
    (folder / "chat_template.jinja").write_text(CHATML)


def tokenizer(entries: int, marks: list[str]) -> Any:
    """A byte-level BPE of exactly `entries`, trained on the Python code that is installed here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=MARKS + marks, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(sources(entries // 16), trainer)
    if raw.get_vocab_size() != entries:
        raise RuntimeError(f"the code installed here gave a tokenizer of {raw.get_vocab_size()} entries, {entries} are needed; install more packages")
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=MARKS[1], eos_token=MARKS[2], pad_token=MARKS[0], padding_side="left")


def sources(count: int) -> Iterator[str]:
    places = dict.fromkeys([sysconfig.get_path("stdlib"), *(place for place in sys.path if place.endswith("site-packages"))])
    files = (file for place in places for file in sorted(Path(place).rglob("*.py")))
    for file in itertools.islice(files, count):
        yield file.read_text(encoding="utf-8", errors="ignore")
