"""The demo's two tiny vision-language models: Idefics3 as Hugging Face has it, with a SigLIP tower, pixel shuffle and a Llama decoder.

The processor of this architecture works without torchvision, and its folder loads with the ordinary Auto classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from .data import SIDE, texts

PATCH, SHUFFLE = 8, 2
IMAGE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
INIT = 0.08
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<end_of_utterance>"
SPECIAL = [PAD, START, END, "<fake_token_around_image>", "<image>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]

# SmolVLM's template.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Widths and depths of the two sizes; every width is a multiple of 32, which int4 blocks and Core ML states ask for.
TEXT = {
    "teacher": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "student": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=32),
}
VISION = {
    "teacher": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=3),
    "student": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2),
}


def build_tokenizer(vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the demo's texts, every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    # With and without the space that follows 'Assistant:'.
    tokenizer.train_from_iterator((form for text in texts() for form in (text, f"User:{text}", f"Assistant: {text}")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD, padding_side="left")


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """The processor for 64 x 64 pictures, shown whole: one tile, 16 image tokens."""
    side = {"longest_edge": SIDE}
    image_processor = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=TEMPLATE)


def build_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Idefics3ForConditionalGeneration:
    """An untrained model of `size` ('teacher' or 'student') in float32."""
    torch.manual_seed(seed)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    # Hugging Face's 0.02 is meant for widths in the thousands; so narrow a model would take long to wake.
    text = dict(
        initializer_range=INIT,
        model_type="llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **TEXT[size],
        **ids,
    )
    vision = dict(initializer_range=INIT, image_size=SIDE, patch_size=PATCH, **VISION[size])
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(text_config=text, vision_config=vision, scale_factor=SHUFFLE, image_token_id=image_token, tie_word_embeddings=True, **ids)
    return Idefics3ForConditionalGeneration(config)


def save_model(folder: Path, model: Idefics3ForConditionalGeneration, processor: Idefics3Processor) -> None:
    """Write an ordinary Hugging Face folder with bfloat16 weights."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
