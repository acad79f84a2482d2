"""lmms-eval, an evaluation suite that we did not write, asks our server through its own API model class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from server_process import encoded, served

from masters.runtime import Vlm
from masters.runtime.session import Options

QUESTIONS = ("what colour is the shape?", "is it red?", "read the digits.")
EVALUATE = """
import json, sys
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models.simple.openai import OpenAICompatible
from PIL import Image

url, images, questions = sys.argv[1], sys.argv[2].split(","), json.loads(sys.argv[3])
model = OpenAICompatible(model_version="student", base_url=url, api_key="any", num_concurrent=2, max_retries=1, timeout=30)
model.task_dict = {"task": {"test": list(zip(images, questions))}}
see = lambda document: [Image.open(document[0]).convert("RGB")]
requests = [
    Instance("generate_until", (question, {"max_new_tokens": 8, "temperature": 0}, see, i, "task", "test"), i, {"task": "task", "doc_id": i, "repeats": 1})
    for i, question in enumerate(questions)
]
print(json.dumps([unwrap_generation_output(result)[0] for result in model.generate_until(requests)]))
"""


def test_lmms_eval_gets_the_models_answers(lmms_eval: Path, bundle: Path, vlm: Vlm, tmp_path: Path) -> None:
    images = [tmp_path / f"{seed}.png" for seed in range(len(QUESTIONS))]
    for seed, image in enumerate(images):
        image.write_bytes(encoded(seed, 120, 120))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(lmms_eval)])), "OMP_NUM_THREADS": "1"}
    with served(bundle, "--name", "student") as server:
        arguments = [f"{server.url}/v1", ",".join(map(str, images)), json.dumps(QUESTIONS)]
        done = subprocess.run([sys.executable, "-c", EVALUATE, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # The suite sends the text before the image.
    turns = [[{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}] for question in QUESTIONS]
    expected = [vlm.reply(turn, [image.read_bytes()], Options(max_tokens=8)).answer.text for turn, image in zip(turns, images, strict=True)]
    assert len(set(expected)) > 1
    assert found == [text.strip() for text in expected]
