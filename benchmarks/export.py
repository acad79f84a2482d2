"""What an export costs: seconds, peak memory and bytes per parameter, each export in a process of its own.

    python benchmarks/export.py --shape tiny|256m|500m [--precision fp32,int8,int4] [--target onnx|coreml]

The real shapes are SmolVLM's with random weights, images split into tiles as there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)
TEXT: dict[str, dict[str, int]] = {
    "256m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
    "500m": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5),
}
MIB = 2**20


def build(shape: str, folder: Path) -> None:
    """Write a random model of `shape` as a Hugging Face folder."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    from masters.demo.models import TEMPLATE, build_model, build_processor, build_tokenizer, save_model

    tokenizer = build_tokenizer()
    if shape == "tiny":
        save_model(folder, build_model("student", tokenizer), build_processor(tokenizer))
        return
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    text: dict[str, Any] = dict(model_type="llama", vocab_size=49280, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = Idefics3Config(
        text_config=text | TEXT[shape] | ids | {"tie_word_embeddings": True},
        vision_config=VISION,
        scale_factor=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **ids,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    save_model(folder, Idefics3ForConditionalGeneration(config), Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=TEMPLATE))


def measure(model: Path, target: str, precision: str, out: Path) -> dict[str, Any]:
    """Export in this process, which should be a fresh one: its peak memory is reported."""
    import torch

    from masters.export import ExportConfig, export

    torch.set_num_threads(2)
    start = time.perf_counter()
    # Random weights have no answers to protect: what quantisation does to them is printed, not judged.
    manifest = export(ExportConfig(model, target, out, precision, allow_mismatch=True))
    return {
        "precision": precision,
        "seconds": time.perf_counter() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": manifest.parameters,
        "bytes": {name: entry.bytes for name, entry in manifest.files.items()},
        "errors": {row["stage"]: row["difference"] for row in manifest.parity if row["measure"].startswith("relative")},
        "notes": manifest.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", *TEXT), default="tiny")
    parser.add_argument("--precision", default="fp32,fp16,int8,int4")
    parser.add_argument("--target", choices=("onnx", "coreml"), default="onnx")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "PRECISION", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, precision, out = options.one
        print(json.dumps(measure(Path(model), options.target, precision, Path(out))))
        return
    print("| shape | precision | parameters | seconds | peak MiB | MiB | bytes a parameter | error of features / logits |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        build(options.shape, model)
        for precision in options.precision.split(","):
            command = [sys.executable, __file__, "--target", options.target, "--one", str(model), precision, f"{folder}/{precision}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(row(options.shape, json.loads(done.stdout.splitlines()[-1])), flush=True)


def row(shape: str, found: dict[str, Any]) -> str:
    size = sum(found["bytes"].values())
    errors = " / ".join(f"{found['errors'][stage]:.1e}" for stage in ("features", "prefill"))
    return (
        f"| {shape} | {found['precision']} | {found['parameters']:,} | {found['seconds']:.1f} | {found['peak_mib']:,.0f} | {size / MIB:,.1f} "
        f"| {size / found['parameters']:.2f} | {errors} |"
    )


if __name__ == "__main__":
    main()
