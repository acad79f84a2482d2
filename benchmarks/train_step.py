"""What a training step costs beside its peers: questions a second, memory, and on a GPU the share of its arithmetic that is put to use.

    python benchmarks/train_step.py [--device cpu|cuda] [--shape deep] [--objective paper|jsd] [--rounds 3] [--checkpointing] [--only ours,trl]

G = 8 answers of R tokens to a question with an image, whose prompt is 8 times as long, Qwen3-VL's real vocabulary of 151,936. Contenders, each in fresh
processes that take turns:

    ours    prompt and image once, answers behind it; heads at answer positions, in chunks (masters.distill.forward and objective)
    cached  the same with teacher_signal: cached: the teacher's states were kept before, and it is not in memory; what keeping them cost is left out
    plain   the same objective as one writes it with transformers: 8 rows of prompt and answer, full logits, autograd
    trl     TRL's DistillationTrainer.compute_loss (8 rows, chunked divergence), its generation left out; it knows no rewards, so 'jsd' alone

'paper' is JSD, policy term and k3 against the starting point; 'jsd' the divergence alone. All losses must agree before anything is printed. TRL's GKDTrainer
hands no images to its models, so it is not compared. Nothing is checkpointed unless --checkpointing, which is TRL's default, is given; then all are.
CPU: float32, a small pair of models; --shape deep has as much more weight in its layers than in its head as the real pair, and wants 10 GB.
CUDA: Qwen3-VL-8B teaches 2B, bfloat16 autocast over float32 weights of the student, frozen models in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

G, VOCABULARY, BETA = 8, 151_936, 0.1
IMAGE, IMAGE_START, IMAGE_END = 151_655, 151_652, 151_653
MIB = 2**20
# Dense bfloat16 tera-FLOPs a second by the makers' data sheets.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


@dataclass(frozen=True)
class Shape:
    """A pair of models and the questions of one step."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    student_vision: dict[str, Any]
    teacher_vision: dict[str, Any]
    grid: tuple[int, int]  # patches of the image
    answer: int  # tokens; the prompt has 8 times as many
    questions: int


_TINY = dict(head_dim=16, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
_TINY_EYE = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, num_position_embeddings=64, deepstack_visual_indexes=[0])
_EYE = dict(num_heads=16, patch_size=16, num_position_embeddings=2304)
SHAPES = {
    # Layers narrow and many, so that they outweigh the head as far as a CPU's patience allows: 0.9 to 1 for the student (real: 4.5), 1.9 for the teacher (12).
    "cpu": Shape(
        dict(_TINY, hidden_size=64, intermediate_size=2560, num_hidden_layers=16, tie_word_embeddings=True),
        dict(_TINY, hidden_size=96, intermediate_size=3840, num_hidden_layers=24),
        _TINY_EYE,
        _TINY_EYE,
        (8, 8),
        16,
        1,
    ),
    # The real pair's proportions: layers 4.5 and 12 times the head.
    "deep": Shape(
        dict(_TINY, hidden_size=64, intermediate_size=13800, num_hidden_layers=16, tie_word_embeddings=True),
        dict(_TINY, hidden_size=96, intermediate_size=25000, num_hidden_layers=24),
        _TINY_EYE,
        _TINY_EYE,
        (8, 8),
        16,
        1,
    ),
    "cuda": Shape(
        dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True),
        dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8),
        dict(_EYE, depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]),
        dict(_EYE, depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]),
        (32, 32),
        128,
        1,  # peers keep the activations of 9,216 tokens a question: more needs --checkpointing
    ),
}


@dataclass
class Setup:
    """Models and one step's data, as every contender gets them; one may drop a model that it has done with."""

    shape: Shape
    objective: str
    device: torch.device
    student: Any
    teacher: Any
    initial: Any | None
    prompts: list[Tensor]  # int64 [P] on the CPU, as an encoder gives them
    answers: Tensor  # int64 [questions, G, R]
    pixels: list[dict[str, Tensor]]
    verdicts: Tensor  # [G]


def build(text: dict[str, Any], vision: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    import transformers

    size = text["hidden_size"]
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[2, 3, 3] if size < 1024 else [24, 20, 20], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict({"head_dim": 128}, **text, vocab_size=VOCABULARY, rope_parameters=rope, pad_token_id=0, max_position_embeddings=32768),
        vision_config=dict(vision, out_hidden_size=size),
        image_token_id=IMAGE,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)


def set_up(shape: Shape, objective: str, device: torch.device, checkpointing: bool) -> Setup:
    from masters.distill.models import freeze_vision, frozen

    narrow = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = build(shape.student, shape.student_vision, torch.float32, device, 1)
    teacher = frozen(build(shape.teacher, shape.teacher_vision, narrow, device, 2))
    freeze_vision(student)
    initial = frozen(copy.deepcopy(student).to(narrow)) if objective == "paper" else None
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a student that has learned something, so that its KL is not 0
        student.lm_head.weight.mul_(1.05)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    height, width = shape.grid
    image = torch.tensor([IMAGE_START, *[IMAGE] * (height * width // 4), IMAGE_END])
    rest = 8 * shape.answer - len(image)
    prompts = [torch.cat([torch.randint(100, 150_000, (5,), generator=random), image, torch.randint(100, 150_000, (rest - 5,), generator=random)])]
    prompts = prompts * shape.questions
    pixels = [
        dict(pixel_values=torch.randn(height * width, 3 * 2 * 16 * 16, generator=random), image_grid_thw=torch.tensor([[1, height, width]]))
        for _ in range(shape.questions)
    ]
    answers = torch.randint(100, 150_000, (shape.questions, G, shape.answer), generator=random)
    return Setup(shape, objective, device, student.train(), teacher, initial, prompts, answers, pixels, torch.tensor([1.0, 0.0] * (G // 2), device=device))


def cached(setup: Setup) -> Callable[[], Tensor]:
    return ours(setup, keep=True)


def ours(setup: Setup, keep: bool = False) -> Callable[[], Tensor]:
    from masters.distill import rewards
    from masters.distill.families import qwen3_vl as family
    from masters.distill.forward import Group, PackedBatch, move, pack, response_states
    from masters.distill.inputs import Prompt
    from masters.distill.objective import Heads, ObjectiveWeights, loss, row_stats

    processor = SimpleNamespace(image_token_id=IMAGE, image_processor=SimpleNamespace(merge_size=2))
    full, counts = setup.objective == "paper", torch.ones(G, device=setup.device)
    weights = ObjectiveWeights() if full else ObjectiveWeights(policy=0.0, beta=0.0)

    def packed() -> PackedBatch:
        prompts = [Prompt(ids, pixels, family.positions(ids, pixels, processor)) for ids, pixels in zip(setup.prompts, setup.pixels, strict=True)]
        groups = [Group(p, tuple(tuple(a) for a in answers.tolist())) for p, answers in zip(prompts, setup.answers, strict=True)]
        return move(pack(groups, 0, family.collate_pixels), setup.device)

    @torch.no_grad()
    def teacher(batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.device.type == "cuda"):
            return response_states(setup.teacher, batch), setup.teacher.lm_head.weight

    kept = teacher(packed()) if keep else None
    if keep:
        setup.teacher = None

    def step() -> Tensor:
        batch = packed()
        theirs, their_head = kept or teacher(batch)
        with torch.no_grad():
            initial = None if setup.initial is None else response_states(setup.initial, batch)
        states = response_states(setup.student, batch)
        heads = Heads(states, setup.student.lm_head.weight, theirs, their_head, initial, setup.initial and setup.initial.lm_head.weight)
        stats = row_stats(heads, batch.tokens, batch.rows, batch.count, "jsd", "k3")
        advantages = [
            rewards.advantages(rewards.total_reward(setup.verdicts, rewards.distillation_reward("jsd_minmax", d, d), True, True), counts)
            for d in stats.divergence.detach().split(G)
        ]
        return sum(loss(stats, torch.cat(advantages), torch.full_like(stats.divergence, 1 / batch.count), weights), start=torch.zeros((), device=setup.device))

    return step


def rows_of(setup: Setup) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prompts [B, P], answers [B, R] and image tensors of one row an answer."""
    prompts = torch.stack(setup.prompts).repeat_interleave(G, 0).to(setup.device)
    answers = setup.answers.flatten(0, 1).to(setup.device)
    images = {name: torch.cat([pixels[name] for pixels in setup.pixels for _ in range(G)]).to(setup.device) for name in setup.pixels[0]}
    kinds = torch.cat([(prompts == IMAGE).int(), torch.zeros_like(answers, dtype=torch.int)], 1)
    return prompts, answers, images | {"mm_token_type_ids": kinds}


def plain(setup: Setup) -> Callable[[], Tensor]:
    def step() -> Tensor:
        prompts, answers, images = rows_of(setup)
        ids, start = torch.cat([prompts, answers], 1), prompts.shape[1] - 1

        def logs(model: Any) -> Tensor:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images).logits
            return torch.log_softmax(logits[:, start:-1].float(), -1)

        with torch.no_grad():
            teacher = logs(setup.teacher)
            first = None if setup.initial is None else logs(setup.initial).gather(2, answers[..., None])[..., 0]
        student = logs(setup.student)
        mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
        jsd = 0.5 * (teacher.exp() * (teacher - mixture)).sum(-1) + 0.5 * (student.exp() * (student - mixture)).sum(-1)
        divergence = jsd.mean(1)
        if first is None:
            return divergence.mean()
        own = student.gather(2, answers[..., None])[..., 0]
        d = divergence.detach().view(-1, G)
        reward = setup.verdicts + (d.amax(1, True) - d) / (d.amax(1, True) - d.amin(1, True))
        advantage = ((reward - reward.mean(1, True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
        k3 = (first - own).exp() - (first - own) - 1
        return (divergence - advantage * (own - own.detach()).exp().mean(1) + BETA * k3.mean(1)).mean()

    return step


def trl(setup: Setup) -> Callable[[], Tensor]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer

    from masters.demo.models import build_tokenizer

    tokenizer = build_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    settings: dict[str, Any] = dict(bf16=False, gradient_checkpointing=False, report_to=[], beta=0.5, use_cpu=setup.device.type == "cpu")
    config = DistillationConfig(tempfile.mkdtemp(), **settings)
    trainer = DistillationTrainer(setup.student, setup.teacher, config, Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer)

    def step() -> Tensor:
        prompts, answers, images = rows_of(setup)
        inputs = dict(images, prompt_ids=prompts, completion_ids=answers, num_items_in_batch=torch.tensor(float(answers.numel()), device=setup.device))
        inputs |= dict(prompt_mask=torch.ones_like(prompts), completion_mask=torch.ones_like(answers))
        found: Tensor = trainer.compute_loss(trainer.model.train(), inputs)
        return found

    return step


CONTENDERS: dict[str, Callable[[Setup], Callable[[], Tensor]]] = {"ours": ours, "cached": cached, "plain": plain, "trl": trl}


def measure(name: str, setup: Setup, steps: int) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of whole updates in this process, which should be a fresh one."""
    device, step = setup.device, CONTENDERS[name](setup)
    trained = [p for p in setup.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def update() -> tuple[float, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = step()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach()), float(norm)

    loss, norm = update()  # the first one makes the optimizer's state and compiles what is compiled
    before = settle(device)
    seconds, processor = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    whole = torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")
    found = dict(loss=loss, norm=norm, seconds=seconds, processor=processor, peak=whole / MIB, above=(whole - before) / MIB)
    return found | {"flops": flops(name, setup)}


def settle(device: torch.device) -> int:
    """Forget the peak so far; the bytes held now: models, optimizer and, on a CPU, the libraries."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew
    return status("VmRSS")


def status(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def flops(name: str, setup: Setup) -> float:
    """Floating-point operations of the products in one step's forward and backward passes, nothing counted that is computed a second time.

    2 a weight and token forward, 4 more backward; attention 4 x width a pair of tokens and layer forward, 8 more backward. Vision towers are frozen.
    """
    shape, models = setup.shape, [(model, passes) for model, passes in ((setup.student, 3), (setup.teacher, 1), (setup.initial, 1)) if model is not None]
    prompt, answer = 8 * shape.answer, shape.answer
    if name in ("ours", "cached"):
        tokens, images, heads = prompt + G * (answer - 1), 1, G * answer
        pairs = prompt * (prompt + 1) / 2 + G * ((answer - 1) * prompt + answer * (answer - 1) / 2)
    else:
        tokens, images = G * (prompt + answer), G
        heads, pairs = G * answer if name == "trl" else tokens, G * (prompt + answer) * (prompt + answer + 1) / 2
    total = 0.0
    for model, passes in models:
        text = model.config.text_config
        layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
        total += passes * 2 * (layers * tokens + VOCABULARY * text.hidden_size * heads)
        total += passes * 4 * pairs * text.num_hidden_layers * text.num_attention_heads * text.head_dim
        total += 2 * sum(p.numel() for p in model.model.visual.parameters()) * images * shape.grid[0] * shape.grid[1]
    return total * shape.questions


def machine(device: str) -> str:
    libraries = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {libraries}"
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {name}, load {os.getloadavg()[0]:.1f}, {libraries}"


def table(rows: dict[str, list[dict[str, Any]]], shape: Shape, device: str) -> str:
    middle = {name: {key: statistics.median(v for run in runs for v in run[key]) for key in ("seconds", "processor")} for name, runs in rows.items()}
    memory = {name: {key: max(run[key] for run in runs) for key in ("peak", "above")} for name, runs in rows.items()}
    peak = next((value for key, value in PEAKS.items() if key in torch.cuda.get_device_name()), None) if device == "cuda" else None
    columns = ["", "questions/s", "tokens/s", "x", "processor s", "x", "step's memory MiB", "x", "held MiB", "peak MiB", "x", "MFU"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in rows.items():
        m, s, first = memory[name], middle[name], next(iter(rows))
        mine, least = memory[first], middle[first]
        speed = shape.questions / s["seconds"]
        used = f"{runs[0]['flops'] / s['seconds'] / peak / 1e12:.0%}" if peak else "-"
        lines.append(
            f"| {name} | {speed:.3g} | {speed * shape.answer * (8 + G):.3g} | {s['seconds'] / least['seconds']:.2f} "
            f"| {s['processor']:.2f} | {s['processor'] / least['processor']:.2f} | {m['above']:,.0f} | {m['above'] / mine['above']:.2f} "
            f"| {m['peak'] - m['above']:,.0f} | {m['peak']:,.0f} | {m['peak'] / mine['peak']:.2f} | {used} |"
        )
    return "\n".join(lines)


def check_losses(rows: dict[str, list[dict[str, Any]]], device: str) -> None:
    """Contenders that compute different things are not compared."""
    wanted, tolerance = next(iter(rows.values()))[0], 1e-4 if device == "cpu" else 2e-2
    for name, runs in rows.items():
        for key in ("loss", "norm"):
            apart = abs(runs[0][key] - wanted[key]) / abs(wanted[key])
            if not apart < (tolerance if key == "loss" else 10 * tolerance):
                sys.exit(f"the {key} of {name} is {runs[0][key]}, not {wanted[key]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default=None, help="the device's own unless given")
    parser.add_argument("--objective", choices=("paper", "jsd"), default=None, help="both unless given")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contender")
    parser.add_argument("--steps", type=int, default=None, help="timed steps a process: 1 on a CPU, 5 on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answer", type=int, default=None, help="tokens of an answer; a prompt has 8 times as many")
    parser.add_argument("--questions", type=int, default=None, help="a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    changed = {key: value for key in ("answer", "questions") if (value := getattr(options, key)) is not None}
    shape = replace(SHAPES[options.shape or options.device], **changed)
    if options.one:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(options.threads)
        setup = set_up(shape, options.objective, torch.device(options.device), options.checkpointing)
        print(json.dumps(measure(options.one, setup, options.steps or (1 if options.device == "cpu" else 5))))
        return
    print(f"{machine(options.device)}; {shape.questions} question(s) a step, prompt {8 * shape.answer}, {G} answers of {shape.answer}", flush=True)
    for objective in [options.objective] if options.objective else ["paper", "jsd"]:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only.split(",") if objective == "jsd" or name != "trl"}
        for _ in range(options.rounds):
            for name, runs in rows.items():
                runs.append(child([*sys.argv[1:], "--objective", objective, "--one", name]))
        check_losses(rows, options.device)
        title = f"{objective}{', layers checkpointed' if options.checkpointing else ''}: loss {next(iter(rows.values()))[0]['loss']:.5f} of all"
        print(f"\n{title}\n\n{table(rows, shape, options.device)}", flush=True)


def child(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
