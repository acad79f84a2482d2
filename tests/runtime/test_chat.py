"""Prompts against transformers' own rendering and tokenisation; templates that try to break out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from masters.errors import BundleError, DataError
from masters.runtime.chat import read_chat_format, sandbox, text_message, user_message

CHATS = {
    "one question": [user_message("what is in the image?", 1)],
    "two images": [user_message("which is larger?", 2)],
    "no image": [user_message("how are you?")],
    "system": [text_message("system", "Be brief."), user_message("what colour?", 1)],
    "turns": [user_message("what colour?", 1), text_message("assistant", "red"), user_message("and its shape?")],
    "other scripts": [user_message("naïve 漢字 🙂 \t tabs\n\nlines", 1)],
}


@pytest.mark.parametrize("chat", CHATS)
def test_prompt_and_ids_equal_transformers(chat: str, random_vlm: Path) -> None:
    processor = AutoProcessor.from_pretrained(random_vlm)
    theirs = processor.apply_chat_template(CHATS[chat], add_generation_prompt=True)
    form = read_chat_format(random_vlm)
    assert form.render(CHATS[chat]) == theirs
    assert form.encode(theirs).tolist() == processor.tokenizer(theirs)["input_ids"]


@pytest.mark.parametrize(
    "source",
    [
        "{%- for m in messages %}\n    {%- if loop.index > 1 %}\n        {%- break %}\n    {%- endif %}\n{{ m.role }}\n{%- endfor %}",
        "{% for m in messages %}\n  {% if m['role'] == 'user' %}\n{{ m | tojson }}\n  {% endif %}\n{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% set ns = namespace(found=false, n=1) %}{% for m in messages %}{% set ns.found = true %}{% endfor %}{{ ns.found }}{{ ns.n }}",
        "{{ strftime_now('%Y') }}{{ bos_token }}{{ eos_token }}{{ dict(a=1)['a'] }}",
        "{% for m in messages %}{% generation %}{{ m.role }} & <b>{% endgeneration %}{% endfor %}",
        "{% if tools %}tools{% endif %}{% if tools is none %}none{% endif %}{{ add_generation_prompt }}{{ missing }}|",
        "   {% if true %}\n   x\n   {% endif %}\n  y",
    ],
)
def test_template_features_equal_transformers(source: str) -> None:
    messages = CHATS["system"]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **special)[0][0]
    ours = sandbox().from_string(source).render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **special)
    assert ours == theirs
    assert ours


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append({}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ raise_exception('no such role') }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_can_not_break_out(attack: str, random_vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_vlm, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(attack)
    with pytest.raises(DataError, match="the chat template refuses these messages"):
        read_chat_format(folder).render(CHATS["one question"])


def test_template_inside_the_tokenizer_config(random_vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_vlm, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for form in (template, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": form}))
        assert read_chat_format(folder).render(CHATS["turns"]) == read_chat_format(random_vlm).render(CHATS["turns"])


def test_a_start_token_is_not_doubled(tmp_path: Path, random_vlm: Path) -> None:
    """A tokenizer that adds its start token, under a template that writes it too."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = shutil.copytree(random_vlm, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = AutoProcessor.from_pretrained(folder)
    theirs = processor.apply_chat_template([CHATS["no image"]], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"][0]
    plain = processor.tokenizer("plain")["input_ids"]
    # What a tokenizer file may carry along from its training changes nothing.
    tokenizer.enable_padding(length=300)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    form = read_chat_format(folder)
    assert form.encode(form.render(CHATS["no image"])).tolist() == list(theirs)
    assert form.encode("plain").tolist() == plain
    assert form.encode("plain")[0] == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer at"),
        ("tokenizer.json", "{", "is no tokenizer"),
        ("tokenizer_config.json", None, "no file at"),
        ("chat_template.jinja", None, "no chat template in"),
        ("chat_template.jinja", "{% if %}", "does not parse"),
    ],
)
def test_missing_and_damaged_files_are_named(file: str, content: str | None, message: str, random_vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_vlm, tmp_path / "model")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(BundleError, match=message) as caught:
        read_chat_format(folder)
    assert "\n" not in str(caught.value)
