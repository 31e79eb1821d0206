"""Every program with files that somebody made to do harm: no code of theirs runs, and each is refused in one line.

A payload makes a folder, `proof`, when it runs. Checksums, where a folder has them, are deleted: whoever makes such files can
make those, too.
"""

import importlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import Metadata

from megatron_sstoken.checkpoint.harmless import read_metadata
from tests.helpers import programs
from tests.helpers.cli import settings_arguments
from tests.helpers.lines import SAVED, line_folder, run_settings
from tests.helpers.toy import exchange, make_tokenizer, write_rows

# `main` reads the settings with what jsonargparse 4.49 renamed; the old name goes with its version 5.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEP = f"step_{SAVED:07d}"
TRAIN, SCORE = "megatron_sstoken.train", "megatron_sstoken.score"
CONVERT, PREPARE, PLAN = "tools.convert_checkpoint", "tools.prepare_data", "tools.plan"


class Code:
    """Unpickling it makes the folder `proof`."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


class Place:
    """A folder with a model, prepared data and a checkpoint that are all in order, and nothing else."""

    def __init__(self, folder: Path):
        self.folder, self.proof = folder, folder / "proof"
        for name in ("model", "data", "run"):
            shutil.copytree(line_folder() / name, folder / name)
        self.step = folder / "run" / STEP
        for checksums in folder.rglob("checksums.json"):
            checksums.unlink()

    def settings(self, **changes: object) -> list[str]:
        """Arguments of `train` and `score`: from the model, without a checkpoint directory."""
        return settings_arguments(run_settings(self.folder, self.folder / "new", **changes))

    def call(self, module: str, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a program that needs process groups, from a process of its own."""
        ((code, output),) = programs.start(module, list(arguments), 1, self.folder / "output").wait()
        return code, output

    def tool(self, module: str, *arguments: str) -> tuple[int, str]:
        """The same of one that needs none, from this process."""
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", told)
            patch.setattr("signal.signal", lambda *_: None)
            try:
                code = importlib.import_module(module).main(list(arguments))
            except SystemExit as stop:
                code = stop.code
        return code, told.getvalue()

    def assert_not_run(self, output: str) -> None:
        """Fails with another exception than the other checks, so that no expected failure of those can hide it."""
        if self.proof.exists():
            pytest.fail(f"code ran:\n{output}")

    def assert_refused(self, result: tuple[int, str], *words: str, alone: bool = True) -> None:
        """Nothing ran, and one line says what is wrong; the first of several, where it is not the only mistake."""
        code, output = result
        errors = [line for line in output.splitlines() if "error:" in line]
        self.assert_not_run(output)
        assert "Traceback" not in output and code in (1, 2), (code, output)
        assert errors and all(line.startswith("error: ") for line in errors), output
        assert len(errors) == 1 or not alone, output
        assert all(word in errors[0] for word in words), output

    def assert_harmless(self, result: tuple[int, str]) -> None:
        """Nothing ran; the file was not read, or read without what it would have done."""
        code, output = result
        self.assert_not_run(output)
        assert "Traceback" not in output and code == 0, (code, output)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- checkpoints ---


def metadata_is_code(place: Place) -> None:
    (place.step / ".metadata").write_bytes(pickle.dumps(Code(place.proof)))


def metadata_holds_code(place: Place) -> None:
    (place.step / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": Code(place.proof)})))


def object_is_code(place: Place) -> None:
    """One of the objects among the tensors, at the end of the file that held it."""
    metadata = read_metadata(place.step)
    stored = next(info for index, info in metadata.storage_data.items() if "random" in index.fqn)
    content = io.BytesIO()
    torch.save([Code(place.proof)], content)
    path = place.step / stored.relative_path
    stored.offset, stored.length = path.stat().st_size, len(content.getvalue())
    path.write_bytes(path.read_bytes() + content.getvalue())
    (place.step / ".metadata").write_bytes(pickle.dumps(metadata))


def metadata_leads_out(place: Place) -> None:
    metadata = read_metadata(place.step)
    info = next(iter(metadata.storage_data.values()))
    shutil.copy(place.step / info.relative_path, place.folder / "outside.distcp")
    info.relative_path = "../../outside.distcp"
    (place.step / ".metadata").write_bytes(pickle.dumps(metadata))


def common_is_pickled_code(place: Place) -> None:
    (place.step / "common.pt").write_bytes(pickle.dumps(Code(place.proof), protocol=2))


def common_is_saved_code(place: Place) -> None:
    torch.save(Code(place.proof), place.step / "common.pt")


def common_holds_code(place: Place) -> None:
    content = torch.load(place.step / "common.pt", weights_only=True) if (place.step / "common.pt").exists() else {}
    torch.save(content | {"more": Code(place.proof)}, place.step / "common.pt")


def use_checkpoint(place: Place, use: str) -> tuple[int, str]:
    """A program that reads the checkpoint."""
    run, model, out = str(place.folder / "run"), str(place.folder / "model"), str(place.folder / "out")
    if use == "train, resuming":
        return place.call(TRAIN, *place.settings(checkpoint__directory=run))
    if use == "train, dry":
        return place.tool(TRAIN, *place.settings(checkpoint__directory=run), "--dry_run")
    if use == "train, model.checkpoint":
        return place.call(TRAIN, *place.settings(model__checkpoint=run))
    if use == "score":
        return place.call(SCORE, *place.settings(model__checkpoint=run), f"--output={out}")
    if use == "verify":
        return place.call(CONVERT, use, "--checkpoint", run, "--hf", model)
    if use == "inspect":
        return place.tool(CONVERT, use, "--checkpoint", run)
    return place.call(CONVERT, use, "--checkpoint", run, "--output", out, "--hf", model)


TOOLS = ("inspect", "to-hf", "reshard")
LOADERS = ("train, resuming", "train, model.checkpoint", "score", "verify")
CHECKPOINTS = {  # payload → the programs that meet it, and what they say
    metadata_is_code: (("train, dry", *TOOLS, *LOADERS), "names posix.mkdir"),
    metadata_holds_code: (("train, dry", *TOOLS, "train, resuming"), "names posix.mkdir"),
    metadata_leads_out: (("train, dry", *TOOLS, "train, resuming"), "outside.distcp, which is not in that folder"),
    object_is_code: (LOADERS, "not to be trusted"),
    common_is_pickled_code: (LOADERS, "common.pt"),
    common_is_saved_code: (LOADERS[:1], "common.pt"),
    common_holds_code: (LOADERS, "common.pt"),
}


def checkpoint_cases() -> list[Any]:
    """Each payload with each program that meets it."""
    return [
        pytest.param(payload, use, words, id=f"{payload.__name__}-{use}")
        for payload, (uses, words) in CHECKPOINTS.items()
        for use in uses
    ]


@pytest.mark.parametrize(("payload", "use", "words"), checkpoint_cases())
def test_checkpoints(place: Place, payload: Callable[[Place], None], use: str, words: str) -> None:
    payload(place)
    place.assert_refused(use_checkpoint(place, use), words)
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize("payload", [object_is_code, common_is_pickled_code, common_is_saved_code])
@pytest.mark.parametrize("use", TOOLS)
def test_tools_read_weights_alone(place: Place, payload: Callable[[Place], None], use: str) -> None:
    """What lies beside the weights is not even read."""
    payload(place)
    place.assert_harmless(use_checkpoint(place, use))


# --- prepared data ---


@pytest.mark.parametrize("name", ["rows.npy", "response_counts.npy"])
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("setting", ["data.train", "data.validation"])
def test_prepared_data(place: Place, name: str, as_array: bool, setting: str) -> None:
    data = shutil.copytree(place.folder / "data", place.folder / "hostile")
    if as_array:
        number = len(np.load(data / name))
        np.save(data / name, np.array([Code(place.proof)] * number, dtype=object), allow_pickle=True)
    else:
        (data / name).write_bytes(pickle.dumps(Code(place.proof)))
    arguments = [*place.settings(), f"--{setting}={data}"]
    place.assert_refused(place.tool(TRAIN, *arguments, "--dry_run"), name)
    if setting == "data.train" and as_array:
        place.assert_refused(place.call(TRAIN, *arguments), name)
        place.assert_refused(place.call(SCORE, *arguments, f"--output={place.folder / 'out'}"), name)


# --- folders of models ---


def write_module(folder: Path, proof: Path) -> None:
    """A module that says, when imported, that it was."""
    classes = "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Tokenizer"))
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n{classes}")


def change_json(path: Path, **changes: object) -> None:
    """Change or add fields of a JSON file."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def model_with_classes_of_its_own(place: Place, model: Path) -> None:
    write_module(model, place.proof)
    names = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    change_json(model / "config.json", auto_map=names)


def model_of_pickled_weights(place: Place, model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Code(place.proof)}, model / "pytorch_model.bin")


def model_whose_index_leads(place: Place, model: Path, target: str) -> None:
    """One tensor lies where the index says, outside the folder."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    first, *rest = tensors
    save_file({first: tensors[first]}, place.folder / "outside.safetensors")
    save_file({name: tensors[name] for name in rest}, model / "inside.safetensors")
    files = {first: target.format(folder=place.folder)} | dict.fromkeys(rest, "inside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def index_leads_up(place: Place, model: Path) -> None:
    model_whose_index_leads(place, model, "../outside.safetensors")


def index_leads_to_the_root(place: Place, model: Path) -> None:
    model_whose_index_leads(place, model, "{folder}/outside.safetensors")


def use_model(place: Place, use: str, model: str) -> tuple[int, str]:
    """A program that reads a model's folder."""
    out = f"--output={place.folder / 'out'}"
    arguments = place.settings()
    if use in ("model.hf_path", "history.hf_path"):
        return place.call(TRAIN, *arguments, f"--{use}={model}")
    if use == "score":
        return place.call(SCORE, *arguments, f"--model.hf_path={model}", out)
    if use == "plan":
        return place.tool(PLAN, "--model", model, "--world_size", "8")
    if use == "to-hf":
        return place.tool(CONVERT, use, "--checkpoint", str(place.step), "--hf", model, out)
    return place.tool(CONVERT, use, "--hf", model, *([] if use == "verify" else [out]))


WEIGHTS = ("model.hf_path", "history.hf_path", "score", "from-hf", "verify")
MODELS = {  # payload → the programs that meet it, and what they say
    model_with_classes_of_its_own: ((*WEIGHTS, "to-hf", "plan"), "the field auto_map="),
    model_of_pickled_weights: (
        WEIGHTS,
        "pytorch_model.bin is not read: it is damaged, older than torch 1.6, or holds more than tensors",
    ),
    index_leads_up: (WEIGHTS, "the index names ../outside.safetensors, which is not in that folder"),
    index_leads_to_the_root: (WEIGHTS, "/outside.safetensors, which is not in that folder"),
}


@pytest.mark.parametrize(
    ("payload", "use", "words"),
    [
        pytest.param(payload, use, words, id=f"{payload.__name__}-{use}")
        for payload, (uses, words) in MODELS.items()
        for use in uses
    ],
)
def test_models(place: Place, payload: Callable[[Place, Path], None], use: str, words: str) -> None:
    model = shutil.copytree(place.folder / "model", place.folder / "hostile")
    payload(place, model)
    place.assert_refused(use_model(place, use, str(model)), words)
    assert not (place.folder / "out").exists()


def test_pickled_weights_beside_safetensors_are_not_read(place: Place) -> None:
    model = place.folder / "model"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        torch.save({"weight": Code(place.proof)}, model / name)
    place.assert_harmless(place.call(CONVERT, "from-hf", "--hf", str(model), "--output", str(place.folder / "out")))
    place.assert_harmless(place.call(CONVERT, "verify", "--hf", str(model)))


def test_code_beside_a_model_is_not_run_by_what_reads_its_tokenizer(place: Place) -> None:
    model = place.folder / "model"
    make_tokenizer(model, vocab_size=99)
    hostile_tokenizer(model, place.proof)
    code, output = place.tool(TRAIN, *place.settings(), "--dry_run")
    place.assert_not_run(output)
    assert "Traceback" not in output and code in (0, 2), output
    place.assert_harmless(place.call(CONVERT, "verify", "--hf", str(model)))


# --- tokenizers and templates ---


def hostile_tokenizer(folder: Path, proof: Path) -> None:
    """A tokenizer folder that asks for a class of its own."""
    write_module(folder, proof)
    names = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}
    change_json(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="Tokenizer")


def prepare(place: Place, tokenizer: Path, *more: str) -> tuple[int, str]:
    """Prepare one conversation."""
    rows = write_rows(place.folder / "rows.jsonl", [{"messages": exchange("how many", "three")}])
    where = ["--input", str(rows), "--tokenizer", str(tokenizer), "--output", str(place.folder / "out")]
    return place.tool(PREPARE, *where, "--workers", "1", *more)


@pytest.mark.parametrize("with_config", [False, True])
def test_a_tokenizer_with_a_class_of_its_own(place: Place, with_config: bool) -> None:
    folder = place.folder / "tokenizer"
    make_tokenizer(folder)
    hostile_tokenizer(folder, place.proof)
    if with_config:
        names = {"AutoConfig": "hostile.Config", "AutoTokenizer": "hostile.Tokenizer"}
        change_json(folder / "config.json", model_type="hostile", auto_map=names)
    place.assert_refused(prepare(place, folder), "contains custom code")
    assert not (place.folder / "out").exists()


def test_a_tokenizer_with_a_class_of_its_own_beside_a_known_one(place: Place) -> None:
    folder = place.folder / "tokenizer"
    make_tokenizer(folder)
    hostile_tokenizer(folder, place.proof)
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    place.assert_harmless(prepare(place, folder))


def test_a_tokenizer_that_is_a_pickle(place: Place) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer.pkl"):
        folder = place.folder / f"of-{name}"
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps(Code(place.proof)))
        place.assert_refused(prepare(place, folder))
    place.assert_refused(prepare(place, place.folder / "of-tokenizer.model" / "tokenizer.model"))


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('PROOF') }}",
    "joiner": "{{ joiner.__init__.__globals__['__builtins__']['__import__']('os').mkdir('PROOF') }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
    "{{ c.__init__.__globals__['os'].mkdir('PROOF') }}{% endfor %}",
    "attr": "{{ (cycler|attr('__init__')|attr('__globals__'))['os'].mkdir('PROOF') }}",
    "import": "{% import 'os' as os %}{{ os.mkdir('PROOF') }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("at", ["--chat_template", "tokenizer"])
def test_templates(place: Place, template: str, at: str) -> None:
    text, tokenizer = TEMPLATES[template].replace("PROOF", str(place.proof)), place.folder / "tokenizer"
    make_tokenizer(tokenizer, chat_template=text if at == "tokenizer" else "plain")
    (place.folder / "template.jinja").write_text(text)
    more = ["--chat_template", str(place.folder / "template.jinja")] if at == "--chat_template" else []
    result = prepare(place, tokenizer, *more)
    place.assert_refused(result, "none of 1 rows can be prepared")
    assert "the chat template refuses the conversation" in result[1]
    assert not (place.folder / "out").exists()


# --- settings ---

YAML = {
    "apply": "model: !!python/object/apply:os.mkdir ['PROOF']",
    "new": "model: !!python/object/new:os.mkdir ['PROOF']",
    "inside": "model: {hf_path: !!python/object/apply:os.mkdir ['PROOF']}",
    "name": "model: {hf_path: !!python/name:os.mkdir }",
    "module": "selection: {method: !!python/module:hostile }",
    "class_path": "model: {class_path: os.mkdir, init_args: {path: 'PROOF'}}",
    "class of a section": "training: {class_path: subprocess.Popen, init_args: {args: [mkdir, 'PROOF']}}",
    "whole": "!!python/object/apply:os.mkdir ['PROOF']",
}


@pytest.mark.parametrize("content", YAML)
@pytest.mark.parametrize("module", [TRAIN, SCORE])
def test_settings(place: Place, content: str, module: str) -> None:
    path = place.folder / "run.yaml"
    path.write_text(YAML[content].replace("PROOF", str(place.proof)) + "\n")
    more = ["--output=out.parquet"] if module.endswith("score") else ["--dry_run"]
    told = "class_path is not a setting" if "class_path" in YAML[content] else "the tag"
    place.assert_refused(place.tool(module, "--config", str(path), *more), told, alone=False)


def test_a_value_on_the_command_line(place: Place) -> None:
    value = f"!!python/object/apply:os.mkdir ['{place.proof}']"
    for setting in ("model", "training.steps", "selection.layer", "lora.targets"):
        place.assert_refused(place.tool(TRAIN, f"--{setting}={value}", "--dry_run"), setting, alone=False)
