"""Recipes: three layers, strict keys, and one line for everything that is wrong."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from masters.distill.recipe import PRESETS, Answers, Mask, Objective, Recipe, Teacher, Train, build_recipe, read_recipe, recipe_values
from masters.errors import RecipeError

RAW: dict[str, Any] = {
    "student": "models/small",
    "teachers": [{"model": "models/big"}],
    "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
    "out": "run",
}


def changed(**changes: Any) -> dict[str, Any]:
    """The plain values with changes such as train__epochs=2."""
    values = copy.deepcopy(RAW)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return values


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


# What a recipe means


def test_the_dataclasses_default_to_the_paper():
    assert build_recipe(changed(preset="paper")) == Recipe(
        Path("models/small"), (Teacher(Path("models/big")),), build_recipe(RAW).data, Path("run"), preset="paper"
    )
    assert Teacher(Path()).r_max == 0.2
    assert (Mask().step, Mask().scope) == (0.05, "per_tensor")
    assert Answers() == Answers(teacher=4, student=4, truth=0, temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.05)
    assert Objective() == Objective("jsd", 1.0, 1.0, 0.1, 0.0, "k3", True, "jsd_minmax", 0.0, True, "all", "all")
    assert (Train().learning_rate, Train().schedule, Train().dtype, Train().freeze_vision) == (1e-6, "constant", "bfloat16", True)


def test_presets_are_what_they_are_named_for():
    built = {name: build_recipe(changed(preset=name)) for name in PRESETS}
    sft, kd, grpo, opd = (built[name] for name in ("sft", "kd", "grpo", "opd"))
    assert (sft.answers.teacher, sft.answers.student, sft.answers.truth) == (0, 0, 1)
    assert (sft.objective.distill, sft.objective.policy, sft.objective.beta, sft.objective.nll) == (0, 0, 0, 1)
    assert (kd.answers.teacher, kd.answers.student, kd.objective.distill, kd.objective.policy, kd.objective.beta) == (4, 0, 1, 0, 0)
    assert (grpo.answers.teacher, grpo.answers.student, grpo.objective.distill, grpo.objective.policy) == (0, 8, 0, 1)
    assert grpo.objective.accuracy_reward
    assert grpo.objective.distillation_reward == "none"
    assert (opd.answers.teacher, opd.answers.student, opd.objective.divergence) == (0, 4, "reverse_kl")
    assert not any(recipe.mask.enabled for recipe in (sft, kd, grpo, opd))
    assert built["paper"].mask.enabled
    assert built["default"].mask.enabled
    assert build_recipe(RAW) == built["default"], "the default is the default"
    assert dataclasses.replace(built["masters"], preset="default") == built["default"], "which tables of baselines call masters"


def test_layers_preset_file_override(tmp_path: Path):
    path = written(tmp_path, yaml.safe_dump(changed(preset="kd", objective={"divergence": "forward_kl"}, train={"epochs": 3})))
    recipe = read_recipe(path, ["train.epochs=5", "objective.beta=0.25", "mask.enabled=true"])
    assert recipe.objective.divergence == "forward_kl", "the file over the preset"
    assert recipe.objective.policy == 0.0, "what the file leaves is the preset's"
    assert (recipe.train.epochs, recipe.objective.beta, recipe.mask.enabled) == (5, 0.25, True), "an override over both"
    assert PRESETS["kd"]["mask"] == {"enabled": False}, "presets are not changed by use"


def test_paths_are_relative_to_the_file(tmp_path: Path):
    recipe = read_recipe(written(tmp_path, yaml.safe_dump(changed(student="/abs/small"))))
    assert recipe.student == Path("/abs/small")
    assert recipe.teachers[0].model == tmp_path / "models" / "big"
    assert recipe.data.train == tmp_path / "train.jsonl"
    assert recipe.out == tmp_path / "run"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str):
    plain = yaml.safe_dump(RAW)
    assert read_recipe(written(tmp_path, f"{plain}train:\n  learning_rate: {text}\n")).train.learning_rate == 1e-5
    assert read_recipe(written(tmp_path, plain), [f"train.learning_rate={text}"]).train.learning_rate == 1e-5


def test_overrides_reach_into_lists_and_make_what_is_missing(tmp_path: Path):
    path = written(tmp_path, yaml.safe_dump(RAW))
    recipe = read_recipe(path, ["teachers.0.r_max=0.4", "teachers.0.model=other", "mask.exclude=[lm_head, 'down_proj$']", "data.limit=7", "preset=paper"])
    assert recipe.teachers == (Teacher(tmp_path / "other", 0.4),)
    assert recipe.mask.exclude == ("lm_head", "down_proj$")
    assert recipe.data.limit == 7
    assert recipe.preset == "paper"
    assert read_recipe(path, ["data.limit=null"]).data.limit is None


def test_whole_numbers_serve_as_numbers_and_several_teachers_stand_in_order():
    recipe = build_recipe(changed(objective={"beta": 1}, teachers=[{"model": "a", "r_max": 0}, {"model": "b", "r_max": 0.4}]))
    assert isinstance(recipe.objective.beta, float)
    assert [teacher.r_max for teacher in recipe.teachers] == [0.0, 0.4]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_resolved_recipe_read_again_is_the_same(tmp_path: Path, preset: str):
    recipe = build_recipe(changed(preset=preset, train={"learning_rate": "3e-7"}, mask={"exclude": ["a", "b"]}), tmp_path)
    values = recipe_values(recipe)
    path = written(tmp_path, yaml.safe_dump(values, sort_keys=False))
    assert read_recipe(path) == recipe
    assert recipe_values(read_recipe(path)) == yaml.safe_load(path.read_text()) == values


def test_a_recipe_can_not_be_changed_in_passing():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build_recipe(RAW).train.epochs = 2  # type: ignore[misc]


def test_sampling_follows_the_answers():
    sampling = build_recipe(changed(answers={"temperature": 0.7, "top_p": 0.8, "top_k": 9, "repetition_penalty": 1.2, "max_tokens": 33})).answers.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty, sampling.max_tokens) == (0.7, 0.8, 9, 1.2, 33)


# What a recipe must not say


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"preset": "fast"}, r"unknown preset 'fast'; expected one of paper, default, sft"),
    ({"preset": ["paper"]}, r"unknown preset '\['paper'\]'"),
    ({"preset": None}, r"unknown preset"),
    ({"studnet": "x"}, r"unknown key 'studnet'.*did you mean 'student'\?"),
    ({"train__learning_rat": 1}, r"unknown key 'train\.learning_rat'.*did you mean 'learning_rate'\?"),
    ({"train__zzz": 1}, r"unknown key 'train\.zzz'.*expected one of learning_rate, schedule"),
    ({"teachers": [{"model": "a", "rmax": 0.1}]}, r"unknown key 'teachers\.0\.rmax'.*'r_max'"),
    ({"teachers": [{"r_max": 0.1}]}, r"no 'teachers\.0\.model'"),
    ({"teachers": []}, r"no teacher; expected at least one"),
    ({"teachers": "big"}, r"'teachers' is 'big'; expected a list"),
    ({"teachers": ["big"]}, r"teachers\.0 is str; expected keys such as model, r_max"),
    ({"train": None}, r"^train is NoneType; expected keys such as learning_rate"),
    ({"data": "train.jsonl"}, r"^data is str; expected keys such as train, validation"),
    ({"data": {"train": "x"}}, r"no 'data\.validation'"),
    ({"student": None}, r"'student' is None; expected a path"),
    ({"student": 3}, r"'student' is 3; expected a path"),
    ({"seed": "one"}, r"'seed' is 'one'; expected a whole number"),
    ({"seed": True}, r"'seed' is True; expected a whole number"),
    ({"train__epochs": 1.5}, r"'train\.epochs' is 1\.5; expected a whole number"),
    ({"train__learning_rate": "fast"}, r"'train\.learning_rate' is 'fast'; expected a number"),
    ({"train__learning_rate": True}, r"'train\.learning_rate' is True; expected a number"),
    ({"train__learning_rate": 0}, r"'train\.learning_rate' is 0\.0; expected more than 0"),
    ({"train__learning_rate": float("nan")}, r"'train\.learning_rate' is nan; expected a finite number"),
    ({"objective__beta": ".inf"}, r"expected a number|expected a finite number"),
    ({"objective__beta": -0.1}, r"'objective\.beta' is -0\.1; expected at least 0"),
    ({"mask__enabled": "yes please"}, r"'mask\.enabled' is 'yes please'; expected true or false"),
    ({"mask__scope": "layer"}, r"'mask\.scope' is 'layer'; expected one of per_tensor, per_block, global"),
    ({"mask__step": 0}, r"'mask\.step' is 0\.0; expected more than 0"),
    ({"mask__exclude": "lm_head"}, r"'mask\.exclude' is 'lm_head'; expected a list"),
    ({"mask__exclude": [3]}, r"'mask\.exclude\.0' is 3; expected a text"),
    ({"mask__exclude": ["layers.("]}, r"'mask\.exclude' holds 'layers\.\(', which is no regular expression"),
    ({"objective__divergence": "kl"}, r"'objective\.divergence' is 'kl'; expected one of jsd, forward_kl, reverse_kl"),
    ({"objective__kl": "k1"}, r"expected one of k3, full"),
    ({"objective__distillation_reward": True}, r"expected one of jsd_minmax, jsd, teacher_logprob, none"),
    ({"teacher_signal": "kept"}, r"'teacher_signal' is 'kept'; expected one of live, cached"),
    ({"answers__refresh": "step"}, r"'answers\.refresh' is 'step'; expected one of teacher, stage"),
    ({"train__seed": 1.5}, r"'train\.seed' is 1\.5; expected a whole number"),
    ({"buffer": "./run"}, r"'buffer' and 'out' are both run; expected a folder of its own"),
    ({"objective__advantages": "negative"}, r"expected one of all, positive"),
    ({"objective__distill_on": ["all"]}, r"expected one of all, teacher, right"),
    ({"train__schedule": "step"}, r"expected one of constant, linear, cosine"),
    ({"train__dtype": "float16"}, r"expected one of float32, bfloat16"),
    ({"train__keep": "first"}, r"expected one of last, best"),
    ({"answers": {"teacher": 0, "student": 0}}, r"a group has no responses"),
    ({"answers__teacher": -1}, r"'answers\.teacher' is -1; expected at least 0"),
    ({"answers__batch": 0}, r"'answers\.batch' is 0; expected at least 1"),
    ({"answers__top_p": 0}, r"'answers\.top_p' is 0\.0; expected more than 0"),
    ({"answers__top_p": 1.1}, r"'answers\.top_p' is 1\.1; expected at most 1"),
    ({"answers__temperature": -1}, r"'answers\.temperature' is -1\.0; expected at least 0"),
    ({"answers__repetition_penalty": 0}, r"'answers\.repetition_penalty'"),
    ({"answers__max_tokens": 0}, r"'answers\.max_tokens' is 0"),
    ({"data__limit": 0}, r"'data\.limit' is 0; expected at least 1"),
    ({"longest": 0}, r"'longest' is 0"),
    *(({f"train__{key}": 0}, rf"'train\.{key}' is 0; expected at least 1") for key in ("questions_per_step", "epochs", "checkpoint_steps", "evaluate_batch")),
    ({"train__warm_up": -1}, r"'train\.warm_up' is -1"),
    ({"train__clip": 0}, r"'train\.clip' is 0\.0"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_one_line_says_what_is_wrong(changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        build_recipe(changed(**changes))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named():
    for key in RAW:
        with pytest.raises(RecipeError, match=f"the recipe has no '{key}'; expected one"):
            build_recipe({name: value for name, value in RAW.items() if name != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds NoneType"),
        ("- student", "holds list; expected keys such as student"),
        ("student: [", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("student: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_file_that_is_missing_or_no_text(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"no recipe at .*absent\.yaml; expected a YAML file"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"student: \xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "has no value; expected key=value"),
        ("=3", "has no value"),
        ("teachers.1.r_max=0.4", "names no place"),
        ("teachers.first.r_max=0.4", "names no place"),
        ("student.model=x", "names no place"),
        ("train.epochs=[", "names no place"),
        ("train.epocs=3", r"did you mean 'epochs'\?"),
        ("train.epochs=", r"'train\.epochs' is None; expected a whole number"),
        ("train=3", "train is int"),
    ],
)
def test_overrides_that_say_nothing(tmp_path: Path, override: str, message: str):
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, yaml.safe_dump(RAW)), [override])
