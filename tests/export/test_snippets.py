"""The code of every card, run as a reader runs it: in a process of its own, on a CPU, in the files' own dtype."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from finetune.assemble.loading import load_base
from finetune.export.exporting import export_adapter
from finetune.export.snippets import LABELS, QUESTION
from finetune.serving.asking import question_row
from finetune.serving.batching import answer_rows
from finetune.serving.loading import load
from tests.serving.adapters import make_adapter
from tests.tiny import FAMILIES

QUESTIONS = (QUESTION, "Why?", "How many are there?")
SPECS = {
    "plain": {},
    "own": {
        "question_template": 'Look at "this":\n{question}',
        "system_prompt": "Be `brief`, as\nin ```this```.",
    },
    "image last": {"image_position": "last"},
}


def code_of(folder, language="python"):
    """Return the one block of code of a card."""
    (found,) = re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", (folder / "README.md").read_text(), re.DOTALL | re.M)
    return found[1]


def make_image(folder):
    """Return the image that the code opens."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((90, 70)).save(folder / "image.jpg")
    return folder / "image.jpg"


@pytest.fixture(scope="module")
def run_alone():
    """Run code in a process of its own and return what it prints.

    Each process is forked from one that has imported what the code of cards imports, and has done nothing else.
    """
    reader = Path(__file__).with_name("reader.py")
    with subprocess.Popen([sys.executable, reader], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:

        def run(code, folder, path=""):
            (folder / "code.py").write_text(code)
            print(json.dumps({"folder": str(folder), "path": path}), file=parent.stdin, flush=True)
            assert parent.stdout.readline() == "0\n", (folder / "stderr").read_text()
            return (folder / "stdout").read_bytes().decode().removesuffix("\n")

        yield run
        parent.stdin.close()


def with_spec(adapter, folder, **changes):
    """Return a copy of an adapter that was asked otherwise in training."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("run"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["task"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# Whose random weights may answer with white space alone, whatever their strength: that is compared too.
SILENT = (("paligemma", "plain"), ("gemma3", "plain"), ("gemma3", "own"))
CELLS = [
    ("merged", "idefics3", "plain"),
    ("merged", "paligemma", "own"),
    ("peft", "llava", "own"),
    ("peft", "clip", "plain"),
    ("merged", "clip", "plain"),
    ("merged", "fast_vlm", "image last"),
    pytest.param("peft", "llava", "image last", marks=pytest.mark.slow),
    *(
        pytest.param(target, family, prompt_spec, marks=pytest.mark.slow)
        for target in ("merged", "peft")
        for family in sorted(FAMILIES)
        for prompt_spec in ("plain", "own")
        if (family, prompt_spec) != ("clip", "own")
    ),
]


@pytest.mark.parametrize(("target", "family", "prompt_spec"), CELLS)
def test_the_code_prints_what_the_adapter_answers(run_alone, saved, tmp_path, target, family, prompt_spec):
    image, answers = make_image(tmp_path), []
    for strength in (1.0, 0.5, 2.0, 0.25):  # random weights may say nothing
        base, adapter = saved(family, "lora", strength)
        adapter = with_spec(adapter, tmp_path / f"adapter {strength}", **SPECS[prompt_spec])
        vlm = load(adapter, base=base, device="cpu")
        if family == "clip" or any(answers := [vlm.ask(image, question) for question in QUESTIONS]):
            break
    export_adapter(adapter, to=target, output=tmp_path / "out", base=base)
    code = code_of(tmp_path / "out").replace('"FOLDER"', '"out"').replace('"BASE"', repr(base))
    assert "dtype=" not in code, "as the files have it"
    if family == "clip":
        label, _, scores = run_alone(code, tmp_path).partition(" ")
        assert label == vlm.classify(image, LABELS) and list(ast.literal_eval(scores)) == list(LABELS)
        return
    found = ((question, answer) for question, answer in zip(QUESTIONS, answers, strict=True) if answer)
    question, answer = next(found, (QUESTION, ""))
    assert answer or (family, prompt_spec) in SILENT
    assert repr(QUESTION) in code and run_alone(code.replace(repr(QUESTION), repr(question)), tmp_path) == answer


# Stands in for vLLM, which needs a GPU: notes what it is asked, and answers the same always.
_VLLM = {
    "vllm/__init__.py": """
import json
from types import SimpleNamespace

def SamplingParams(**given):
    return given

class LLM:
    def __init__(self, base, **options):
        self.options = {"base": base, **options}

    def chat(self, messages, sampling, *, lora_request):
        asked = {"messages": messages, "sampling": sampling, "lora": lora_request, "options": self.options}
        return [SimpleNamespace(outputs=[SimpleNamespace(text=json.dumps(asked))])]
""",
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": "def LoRARequest(name, number, path):\n    return [name, number, path]\n",
}


@pytest.mark.parametrize("prompt_spec", SPECS)
def test_the_code_for_vllm_asks_as_the_adapter_was_trained(run_alone, saved, tmp_path, prompt_spec):
    base, adapter = saved("llava", "lora")
    adapter = with_spec(adapter, tmp_path / "adapter", **SPECS[prompt_spec])
    export_adapter(adapter, to="vllm", output=tmp_path / "out", base=base)
    for name, text in _VLLM.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    image = make_image(tmp_path)
    asked = json.loads(run_alone(code_of(tmp_path / "out").replace('"FOLDER"', '"out"'), tmp_path, path="."))
    assert asked["options"] == {"base": "BASE", "enable_lora": True, "max_lora_rank": 16}
    assert asked["lora"] == ["testing/cell", 1, "out"]
    limit = json.loads((adapter / "manifest.json").read_text())["task"]["max_new_tokens"]
    assert asked["sampling"] == {"temperature": 0, "max_tokens": limit}
    section = load(adapter, base=base, device="cpu").adapter.manifest.task
    wanted = section.ask(QUESTION)
    url = f"data:image/jpeg;base64,{b64encode(image.read_bytes()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    wanted[-1]["content"] = [shown if part["type"] == "image" else part for part in wanted[-1]["content"]]
    assert asked["messages"] == wanted


def test_the_words_for_llama_cpp_are_a_command_on_files_that_are_there(saved, tmp_path):
    base, adapter = saved("llava", "lora")
    export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
    code = code_of(tmp_path / "out", "bash")
    assert subprocess.run(["bash", "-n", "-c", code]).returncode == 0
    words = shlex.split(code, comments=True)
    assert words[0] == "llama-server" and (tmp_path / "out" / words[words.index("--lora") + 1]).is_file()


def test_a_reader_gets_half_precision_where_the_base_is_in_it(run_alone, saved, tmp_path):
    base, _ = saved("idefics3")
    shutil.copytree(base, tmp_path / "half")
    AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    adapter = make_adapter(load_base(str(tmp_path / "half"), device="cpu"), "lora", tmp_path / "adapter")
    limit = json.loads((adapter / "manifest.json").read_text())["task"]["max_new_tokens"]
    image = make_image(tmp_path)
    for target in ("merged", "peft"):
        export_adapter(adapter, to=target, output=tmp_path / target, base=str(tmp_path / "half"))
        code = code_of(tmp_path / target).replace('"FOLDER"', repr(target)).replace('"BASE"', '"half"')
        got = run_alone(f"{code}\nassert model.dtype == __import__('torch').bfloat16", tmp_path)
        held = tmp_path / "merged" if target == "merged" else tmp_path / "half"
        wanted = load("base" if target == "merged" else adapter, base=str(held), device="cpu", dtype="auto")
        example = question_row(wanted.task.options, str(image), QUESTION, urls=None)
        (answer,) = answer_rows(wanted.switcher, [example], [wanted.adapter], max_new_tokens=[limit])
        assert got == answer.text != ""


def test_the_pocket_model_in_a_readers_hands(run_alone, tmp_path):
    adapter = make_adapter(load_base("pocket", device="cpu"), "lora", tmp_path / "adapter", strength=0.05)
    export_adapter(adapter, to="merged", output=tmp_path / "out", base="pocket")
    image = make_image(tmp_path)
    got = run_alone(code_of(tmp_path / "out").replace('"FOLDER"', '"out"'), tmp_path)
    assert got == load(adapter, base="pocket", device="cpu").ask(image, QUESTION) != ""
