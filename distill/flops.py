"""Operations of a model's passes, counted from its configuration: 2 for a multiplication and an addition.

A weight of a linear layer takes 2 for every token that meets it forward, 2 more for the token's gradient and 2 for its own (Kaplan et al. 2020, section 2.1).
Attention takes 4 for every pair of tokens, layer and width of all heads, the whole square of a sequence (Chowdhery et al. 2022, appendix B), and 2.5 times
that backward, where fused kernels compute the scores again (Dao 2023, FlashAttention-2, section 4.1). Norms, activations and rotations are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import family_of
from .models import skeleton
from .reading import Reading
from .recipe import Recipe

ATTENTION_BACK = 2.5


@dataclass(frozen=True)
class Shape:
    """What a model's operations follow from: weights by what meets them, and the layers and the widths of its attention."""

    language: int  # every token
    head: int  # every token whose logits are computed
    layers: int
    width: int
    vision: int = 0  # every patch
    projector: int = 0  # every `shrink` patches
    behind: int = 0  # those of the projector that stand behind trained weights of it, and so hand a gradient on
    shrink: int = 1
    vision_layers: int = 0
    vision_width: int = 0


def shape_of(config: Any) -> Shape:
    """The shape of a vision-language model, or of a language model, of this configuration."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    if vision is None:
        return _shape_of_text(config)
    family, model = family_of(config.model_type), skeleton(config)
    width = int(vision.hidden_size)
    language = seen = projector = behind = 0
    shrink, parents = 1, set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            if "Norm" in type(module).__name__ and any(part in f"{name}." for part in family.PROJECTOR):
                parents |= {name.rpartition(".")[0], f"{name.rpartition('.')[0]}.mlp"}
            continue
        size = module.weight.numel()
        if any(part in f"{name}." for part in family.PROJECTOR):
            shrink = max(1, int(module.in_features) // width) if isinstance(module, nn.Linear) and not projector else shrink
            projector += size
            behind += size if (parent := name.rpartition(".")[0]) in parents else 0
            parents.add(parent)
        elif any(part in f"{name}." for part in family.VISION):
            seen += size
        elif any(part in f"{name}." for part in family.LANGUAGE):
            language += size
    depth = int(getattr(vision, "depth", 0) or vision.num_hidden_layers)
    head = model.get_output_embeddings().weight.numel()
    return Shape(language, head, text.num_hidden_layers, _heads_width(text), seen, projector, behind, shrink, depth, width)


def _shape_of_text(config: Any) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    language = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return Shape(language, head.weight.numel(), config.num_hidden_layers, _heads_width(config))


def _heads_width(text: Any) -> int:
    heads = int(text.num_attention_heads)
    return heads * int(getattr(text, "head_dim", None) or text.hidden_size // heads)


def forward(shape: Shape, read: Reading) -> float:
    """Operations of reading."""
    return _language(shape, read) + _tower(shape, read) + 2 * shape.head * read.logits


def _language(shape: Shape, read: Reading) -> float:
    return 2 * shape.language * read.tokens + 4 * shape.layers * shape.width * read.pairs


def _tower(shape: Shape, read: Reading) -> float:
    projected = 2 * shape.projector * read.patches / shape.shrink
    return 2 * shape.vision * read.patches + projected + 4 * shape.vision_layers * shape.vision_width * read.patch_pairs


def backward(shape: Shape, read: Reading, full: bool = True, tower: bool = False) -> float:
    """Operations of the gradients: of all states, and of the weights if training is `full` and not of adapters alone; of the `tower` if it is trained.

    Logits are computed a second time on the way back (token_stats.py).
    """
    states = 2 * shape.language * read.tokens * (2 if full else 1) + ATTENTION_BACK * 4 * shape.layers * shape.width * read.pairs
    head = 2 * shape.head * read.logits * (3 if full else 2)
    projected = 2 * (shape.projector + shape.behind) * read.patches / shape.shrink if full else 0
    behind = 4 * shape.vision * read.patches + ATTENTION_BACK * 4 * shape.vision_layers * shape.vision_width * read.patch_pairs if tower else 0
    return states + head + projected + behind


def update(student: Shape, own: Reading, teacher_head: int, teacher: float, recipe: Recipe) -> float:
    """Operations of one pass of an update on what a student reads; `teacher` are those of the teacher's forward without its logits, 0 where it is cached.

    `teacher_head` is the size of the teacher's output matrix, 0 where no teacher is looked at.
    """
    objective, full = recipe.objective, recipe.lora is None
    logits = 2 * own.logits
    found = forward(student, own) + backward(student, own, full, not recipe.train.freeze_vision and full)
    found += teacher + logits * teacher_head * (2 if objective.distill else 1)
    if objective.beta:
        found += forward(student, own) + (logits * student.head if objective.kl == "full" else 0)
    return found + (_language(student, own) if recipe.train.gradient_checkpointing else 0)
