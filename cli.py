"""The `masters` command: each subcommand parses, builds one frozen dataclass, and calls the one function of its name.

Results go to stdout, progress and news to stderr. Exit codes: 0 done or passed, 1 a gate failed, 2 could not run.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from .errors import MastersError, RecipeError, missing_extra

PROVIDER = "One for all graphs, or by graph: vision=openvino-bf16,decoder=cpu"
PATH = click.Path(path_type=Path)


class _OneLine(click.ClickException):
    """A refusal: one line on stderr and exit code 2."""

    exit_code = 2


def _refusing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the errors that Masters raises on purpose into one line; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except MastersError as error:
            raise _OneLine(" ".join(str(error).split())) from error

    return run


def _needs(module: str, extra: str) -> Any:
    """A module of this package whose dependencies come with an extra."""
    try:
        return importlib.import_module(module, __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("masters"):
            raise
        raise missing_extra(error.name or extra, extra) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="masters")
def main() -> None:
    """Distil a compact vision-language model from a large teacher, export it, and run and check it on a device."""


@main.command()
@click.option("--out", type=PATH, default=Path("masters-demo"), show_default=True, help="Folder for everything the demo writes; begun, it continues.")
@click.option("--fast", is_flag=True, help="Fewer questions: under two minutes.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@_refusing
def demo(out: Path, fast: bool, threads: int) -> None:
    """Distil, export, run and check two tiny models on built-in data: the whole way in minutes."""
    module = _needs(".demo.demo", "demo")
    click.echo(module.demo(module.DemoConfig(out, fast, threads)))


@main.command()
@click.argument("recipe", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--until", default="student", show_default=True, help="Last stage to run: check, mask, answers, signal, train or student.")
@click.option("--dry-run", is_flag=True, help="Check the inputs, print what the run needs and stop.")
@_refusing
def distill(recipe: Path, overrides: tuple[str, ...], until: str, dry_run: bool) -> None:
    """Distil the student that RECIPE (a YAML file) names; run again, it continues where it stopped.

    With --until mask: score the masked teachers on validation questions and propose the largest ratio that they bear.
    """
    stages, module = _needs(".distill.stages", "distill"), _needs(".distill.plan", "distill")
    read_recipe = _needs(".distill.recipe", "distill").read_recipe
    wanted = read_recipe(recipe, overrides)
    shown = module.plan_text(module.plan(wanted)) if dry_run else str(stages.distill(wanted, until))
    if not _needs(".distill.ranks", "distill").is_main():
        return  # one of several processes says it
    if until == "mask" and not dry_run:
        _print_trials(_needs(".distill.mask_trial", "distill"), wanted.out)
    click.echo(shown)


def _print_trials(mask_trial: Any, out: Path) -> None:
    from .runtime.report import table

    for number, trial in enumerate(mask_trial.read_trials(out)):
        shown = mask_trial.trial_table(trial)
        proposed = f"Proposed: teachers.{number}.r_max={trial.r_max:g}"
        click.echo("\n".join([shown.title, "", table(shown.columns, shown.rows), "", shown.note, proposed, ""]))


@main.command()
@click.argument("recipe", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--vary", multiple=True, metavar="KEY=A,B", required=True, help="Values to compare; given several times: all combinations, the first one the reference."
)
@click.option("--alone", is_flag=True, help="Each value by itself against the recipe, in place of all combinations.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trainings of each.")
@click.option("--data", type=PATH, help="Questions to score on.  [default: the recipe's validation]")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
@_refusing
def ablate(as_json: bool, **options: Any) -> None:
    """Train variants of RECIPE on the same responses and the same teacher's signal, and compare their scores; begun, it continues."""
    module = _needs(".distill.ablate", "distill")
    from .runtime.report import table

    result = module.ablate(module.AblateConfig(**options))
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
        return
    shown = module.result_table(result)
    click.echo("\n".join([table(shown.columns, shown.rows), "", *module.sentences(result), "", shown.note]))


@main.command()
@click.argument("recipe", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--ratio", type=float, required=True, help="Share of each weight matrix to set to zero, such as 0.2.")
@click.option("--out", type=PATH, required=True, help="Folder for the masked checkpoint.")
@click.option("--teacher", type=int, default=0, show_default=True, help="Which of the recipe's teachers, counted from 0.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@_refusing
def materialize(recipe: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Write a teacher of RECIPE with its mask in the weights, for engines such as vLLM."""
    module = _needs(".distill.materialize", "distill")
    read_recipe = _needs(".distill.recipe", "distill").read_recipe
    click.echo(module.materialize(module.MaterializeConfig(read_recipe(recipe, overrides), **options)))


@main.command()
@click.argument("student", type=PATH)
@click.option("--target", type=click.Choice(["onnx", "coreml"]), required=True)
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16, int8, int4, auto, or per part: vision=int8,decoder=int4,embed=int8.")
@click.option("--out", type=PATH, required=True, help="The bundle's folder.")
@click.option("--data", type=PATH, help="Questions on which bundle and PyTorch are compared.")
@click.option("--max-drop", type=float, help="Largest loss of score, such as 0.02, that the interval's lower end may show.")
@click.option("--answers", type=PATH, help="Keep PyTorch's answers to --data in this file (JSONL), for masters check --reference.")
@click.option("--block-size", type=int, help="Weights that share an int4 scale: 16, 32, 64 or 128.  [default: 64 for ONNX, 32 for Core ML]")
@click.option("--int4-method", help="rtn, k-quant (zero points; ONNX), gptq (fitted to --calibrate; ONNX).  [default: gptq with --calibrate, else rtn]")
@click.option("--calibrate", type=PATH, help="Questions that gptq and auto measure on; answers are not needed.")
@click.option("--max-bytes", type=int, help="auto: bytes of the whole bundle.")
@click.option("--max-kl", type=float, help="auto: mean divergence of the answers from the student's, nats a token.")
@click.option("--accuracy-level", type=int, default=4, show_default=True, help="int4 products (MatMulNBits) sum in 1 float32, 4 int8.")
@click.option("--chunk-mb", type=float, default=1920, show_default=True, help="Most MiB of one data file; browsers can't hold 2048.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--mobile", is_flag=True, help="Ask ONNX Runtime's mobile tools about the graphs too; the manifest says what they find.")
@click.option("--allow-mismatch", is_flag=True, help="Keep a bundle that fails parity, marked as such.")
@_refusing
def export(**options: Any) -> None:
    """Convert and quantise the model in the folder STUDENT, prove it against PyTorch, and write a bundle."""
    from .manifest import stored_bytes

    module = _needs(".export", "export")
    manifest = module.export(module.ExportConfig(**options))
    size = stored_bytes(manifest.files)
    verdicts = [row["verdict"] for row in manifest.parity]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))
    click.echo(f"{options['out']}: {len(manifest.files)} files, {size / 1e6:.2f} MB, parity {counts}")
    for entry in manifest.checks:
        if entry["kind"] == "precision":
            click.echo(_needs(".export.auto", "export").summary(entry))


@main.command()
@click.argument("bundle", type=PATH)
@click.argument("question", required=False)
@click.option("--image", "images", type=PATH, multiple=True, help="An image the question is about; may be given several times.")
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--choice", "choices", multiple=True, help="The answer is one of these; given several times.")
@click.option("--pattern", help="The answer matches this regular expression.")
@click.option("--json-schema", type=click.File(encoding="utf-8"), help="The answer is JSON of the schema in this file.")
@click.option("--threads", type=int, help="Default: one a core.")
@click.option("--provider", default="cpu", show_default=True, help=PROVIDER)
@_refusing
def run(bundle: Path, question: str | None, images: tuple[Path, ...], threads: int | None, provider: str, **options: Any) -> None:
    """Answer QUESTION about images with BUNDLE, streaming; without a question: a chat, one question a line."""
    vlm = _open(bundle, provider, threads)
    options |= {"choices": options["choices"] or None, "json_schema": options["json_schema"] and options["json_schema"].read()}
    if question is not None:
        _print_stream(vlm.stream(question, images, **options))
        return
    chat, shown = vlm.chat(), images
    while line := click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True):
        _print_stream(chat.stream(line, shown, **options))
        shown = ()  # the first turn has shown them


def _open(bundle: Path, provider: str, threads: int | None) -> Any:
    """The bundle as a model: on ONNX Runtime, or, for Core ML, on what the export proves its packages with."""
    from .manifest import read_manifest
    from .runtime import load

    if read_manifest(bundle).target == "onnx":
        return load(bundle, provider, threads)
    return _needs(".export.bundle", "export").open_bundle(bundle)


def _print_stream(stream: Any) -> None:
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()
    times = stream.answer.timings
    per_token = "" if times.decode_per_token is None else f", then {times.decode_per_token:.1f} ms a token"
    click.echo(f"first token after {times.first_token:.0f} ms (image {times.image_preprocess + times.image_encode:.0f} ms){per_token}", err=True)


@main.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--data", type=PATH, help="Questions with answers.")
@click.option("--budget", type=PATH, help="YAML of limits, such as min_accuracy: 0.8 or first_token_p90_ms: 400.")
@click.option("--reference", type=PATH, help="The PyTorch model's answers, from masters export --answers (JSONL rows of id and text), for a paired comparison.")
@click.option("--limit", type=int, help="Only the first questions.")
@click.option("--max-tokens", type=int, default=32, show_default=True)
@click.option("--threads", type=int, help="Default: one a core.")
@click.option("--provider", default="cpu", show_default=True, help=PROVIDER)
@click.option("--sustained", "sustained_seconds", type=float, default=60, show_default=True, help="Seconds of one question over and over; 0 for none.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
@click.option("--html", type=PATH, help="Write the report as a page, with plots and the questions answered wrong.")
@click.option("--compare", "reports", type=PATH, nargs=2, help="Instead of a check: what changed between two reports in JSON.")
@_refusing
def check(as_json: bool, html: Path | None, reports: tuple[Path, Path] | None, **options: Any) -> None:
    """Measure BUNDLE's accuracy and latency on this device, against a budget; exit code 1 if a limit is not kept."""
    from .manifest import read_manifest
    from .runtime.check import CheckConfig
    from .runtime.check import check as run_check
    from .runtime.compare import compare, comparison_text
    from .runtime.report import report_text

    if reports:
        found = compare(*reports)
        return click.echo(json.dumps(found.to_json(), indent=2) if as_json else comparison_text(found))
    if options["bundle"] is None or options["data"] is None:
        raise RecipeError("a check needs a bundle and --data with questions; or give --compare with two reports")
    config = CheckConfig(**options)
    # An ONNX bundle is opened by the check itself, after the cheaper inputs have been read.
    report = run_check(config, None if read_manifest(config.bundle).target == "onnx" else _open(config.bundle, config.provider, config.threads))
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report_text(report))
    if html:
        from .runtime.check_page import write_page
        from .samples import read_samples

        write_page(html, report, read_samples(config.data, config.limit))
    sys.exit(0 if report.passed else 1)


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="An address that other machines reach needs an API key.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key", envvar="MASTERS_API_KEY", help="What clients must show; better set as the variable MASTERS_API_KEY, which no list of processes shows."
)
@click.option("--name", help="The model's name for clients.  [default: the folder's]")
@click.option("--parallel", type=int, default=1, show_default=True, help="Answers made at once.")
@click.option("--queue", type=int, default=16, show_default=True, help="Requests that may wait; the next one gets a 429.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Length of an answer whose request names none.")
@click.option("--max-images", type=int, default=16, show_default=True, help="Of one request.")
@click.option("--max-megapixels", type=float, default=100, show_default=True, help="Of one request's images together.")
@click.option("--max-body-mb", type=float, default=32, show_default=True)
@click.option("--image-cache-mb", type=float, default=256, show_default=True, help="Images that were sent before are not encoded again; 0 for none.")
@click.option("--grace", type=float, default=30, show_default=True, help="Seconds to finish what runs when told to stop.")
@click.option("--threads", type=int, help="Default: one a core.")
@click.option("--provider", default="cpu", show_default=True, help=PROVIDER)
@_refusing
def serve(**options: Any) -> None:
    """Serve BUNDLE as OpenAI's chat completions, with a page to try it, until SIGTERM or Ctrl-C."""
    from .manifest import read_manifest

    module = _needs(".runtime.serve", "serve")
    config = module.ServeConfig(**options)
    # An ONNX bundle is opened by the server itself, after its port.
    module.serve(config, None if read_manifest(config.bundle).target == "onnx" else _open(config.bundle, config.provider, config.threads))


if __name__ == "__main__":
    main()
