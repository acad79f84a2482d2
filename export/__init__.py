"""`masters export`: a Hugging Face folder becomes a bundle for a device, proven against PyTorch from the image file on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import MastersError, missing_extra
from ..manifest import TARGETS, Manifest

__all__ = ["ExportConfig", "export"]


@dataclass(frozen=True)
class ExportConfig:
    """What `masters export` does. `precision` is one of fp32, fp16, int8, int4, or per part: 'vision=int8,decoder=int4,embed=int8'; or auto, which chooses
    for every weight what keeps a budget (`max_bytes` or `max_kl`), from how the answers to the questions in `calibrate` (else `data`) change.

    With `data`, bundle and PyTorch answer the same questions; `max_drop` is then the largest loss of score (0.02 is two points)
    that the lower end of the difference's interval may show; `answers` is a file that keeps
    PyTorch's, for `masters check --reference`. `allow_mismatch` keeps a bundle that fails parity, marked in its notes.
    """

    student: Path
    target: str
    out: Path
    precision: str = "fp32"
    data: Path | None = None
    max_drop: float | None = None
    answers: Path | None = None
    force: bool = False
    allow_mismatch: bool = False
    mobile: bool = False  # run ONNX Runtime's tools for mobile builds on the graphs too (ONNX)
    block_size: int | None = None  # weights that share an int4 scale; 16, 32, 64 or 128; None: 64 in ONNX bundles, 32 in Core ML's
    chunk_mb: float = 1920  # MiB of one of a graph's data files (ONNX); browsers can't hold 2 GiB in one piece
    int4_method: str | None = (
        None  # rtn (with a search for the scale), k-quant (with zero points), gptq (fitted to `calibrate`); None: gptq if that is given, else rtn
    )
    calibrate: Path | None = None  # questions, answers not needed
    max_bytes: int | None = None  # auto: of the whole bundle
    max_kl: float | None = None  # auto: mean divergence of the answers from the student's, in nats a token
    accuracy_level: int = 4  # MatMulNBits: 0 to 3 compute in fp32, 4 in int8


def export(config: ExportConfig) -> Manifest:
    """Write the bundle of `config.student` to `config.out` and return its manifest.

    Raises ModelError for a folder that can't be exported, ParityError where a graph disagrees with PyTorch, MastersError for a setting
    out of range or an output folder that exists. On any error nothing stands at `config.out` that did not stand there before.
    """
    if config.target not in TARGETS:
        raise MastersError(f"unknown target '{config.target}'; expected one of {', '.join(TARGETS)}")
    if not 0 < config.chunk_mb < 2048:
        raise MastersError(f"data files of {config.chunk_mb:g} MiB are not possible; expected more than 0 and less than 2048, which no browser can hold")
    if config.max_drop is not None and config.data is None:
        raise MastersError("a largest drop was given without questions to measure it on; pass --data FILE too")
    if config.answers is not None and config.data is None:
        raise MastersError("a file for PyTorch's answers was given without questions to ask; pass --data FILE too")
    _check_precision(config)
    try:
        from .bundle import write_bundle
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("masters"):
            raise
        raise missing_extra(error.name or "torch", "export") from None
    return write_bundle(config)


def _check_precision(config: ExportConfig) -> None:
    """Settings that only go together. Raises MastersError."""
    limits = [limit for limit in (config.max_bytes, config.max_kl) if limit is not None]
    automatic = config.precision == "auto"
    if automatic and (len(limits) != 1 or limits[0] < 0):
        raise MastersError("precision auto needs one budget; expected either --max-bytes N or --max-kl X, at least 0")
    if limits and not automatic:
        raise MastersError(f"a budget was given with precision {config.precision}, which leaves nothing to choose; pass --precision auto")
    if (automatic or config.int4_method not in (None, "rtn")) and config.target != "onnx":
        raise MastersError("only ONNX bundles are made with precision auto or another int4 method than rtn; pass --target onnx")
    if automatic and config.calibrate is None and config.data is None:
        raise MastersError("precision auto measures on questions; pass --calibrate FILE, or --data FILE")
    if config.int4_method == "gptq" and not automatic and config.calibrate is None:
        raise MastersError("gptq fits int4 to questions; pass --calibrate FILE")
