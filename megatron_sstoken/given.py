"""Settings as they were given, on the command line and in YAML files: each with its place, and what is wrong with it."""

import json
import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import jsonargparse
import yaml

from megatron_sstoken.config import RENAMED
from megatron_sstoken.config.catalogue import Entry, entries, sections
from megatron_sstoken.config.model import ALL_LINEAR, LINEARS
from megatron_sstoken.words import ALIKE, SURE, alike, did_you_mean, listed

OTHER_NAMES = {
    "optimizer.learning_rate": "lr",
    "optimizer.warmup_fraction": "warmup_ratio",
    "optimizer.schedule": "lr_scheduler_type lr_decay_style",
    "optimizer.clip_grad": "max_grad_norm",
    "checkpoint.directory": "output_dir output save",
    "checkpoint.save_every": "save_steps save_interval",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint",
    "model.checkpoint": "load",
    "model.hf_path": "model_name_or_path model_path",
    "data.train": "train_file train_data dataset",
    "data.sequence_length": "max_seq_length max_seq_len max_length seq_length cutoff_len",
    "training.micro_batch_size": "per_device_train_batch_size batch_size",
    "training.global_batch_size": "gradient_accumulation_steps",
    "training.epochs": "num_train_epochs num_epochs",
    "training.steps": "max_steps train_iters",
    "training.precision": "bf16 fp16 dtype",
    "training.validate_every": "eval_steps eval_interval",
    "logging.every": "logging_steps log_interval",
    "parallel.tensor": "tensor_model_parallel_size tp",
    "parallel.pipeline": "pipeline_model_parallel_size pp",
    "parallel.context": "context_parallel_size cp",
    "parallel.expert": "expert_model_parallel_size ep",
    "lora.rank": "lora_r r",
    "lora.targets": "target_modules lora_target_modules",
    "lora.dora": "use_dora",
    "lora.train_whole": "modules_to_save",
    "selection.rho": "ratio topk top_k",
}
"""Setting → what it is called in transformers, TRL, PEFT, LLaMA-Factory and Megatron-LM, for those who come from there."""
_BY_OTHER_NAME = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}
OF_PARSER = ("-h", "help", "print_config", "print_schema")
"""Options after which nothing is run."""


@dataclass(frozen=True, eq=False)
class Given:
    """One setting or option as it was given."""

    arguments: tuple[str, ...]
    """What the parser takes for it."""
    entry: Entry | None = None
    """The setting, if it is one."""
    value: Any = None
    place: str = ""
    """What messages begin with: file and line, or nothing on the command line."""


@dataclass
class AllGiven:
    """Everything that was given, in order; what cannot be read is a problem."""

    options: Collection[str]
    """Options of the program that are not settings."""
    given: list[Given] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_whole: bool = True
    """Whether every file could be read: else rules would be broken by what stands in the others."""

    def read(self, arguments: list[str]) -> "AllGiven":
        """Take the words of a command line, and the files that they name."""
        left = list(arguments)
        while left:
            word = left.pop(0)
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("-"):
                self._stray(word)
            elif name == "config" and (equals or left):
                self._read_file(value if equals else left.pop(0))
            elif (renamed := self._new_name(name)) in entries():
                if not equals and left and not left[0].startswith("--"):
                    value = left.pop(0)
                elif not equals:
                    self.problems.append(f"{word} has no value: give it one, as {word}={_example(entries()[renamed])}")
                    continue
                self._take(entries()[renamed], value)
            elif name in (*self.options, *OF_PARSER, "config") or name.rstrip("+") in (*sections(), *entries()):
                takes = [word] if equals or not left or left[0].startswith("-") else [word, left.pop(0)]
                self.given.append(Given(tuple(takes)))
            else:
                if not equals and left and not left[0].startswith("-"):
                    value = left.pop(0)
                self._unknown(word.partition("=")[0], name, value)
        return self

    def _take(self, entry: Entry, value: Any, place: str = "") -> None:
        value = _understood(entry, value)
        self.given.append(Given((f"--{entry.name}={_as_argument(value)}",), entry, value, place))

    def _new_name(self, name: str) -> str:
        """A setting by its name of today."""
        section, _, key = name.partition(".")
        new = RENAMED.get((section, key))
        if new is None:
            return name
        self.notes.append(f"note: {name} is now {section}.{new}: the old name will be removed in the next version")
        return f"{section}.{new}"

    def _stray(self, word: str) -> None:
        """A word that belongs to no option."""
        name = word.partition("=")[0]
        if "=" in word and suggestions(name, self.options):
            self._unknown(name, name, word.partition("=")[2])
        elif word.endswith((".yaml", ".yml")) or os.path.isfile(word):
            self.problems.append(f"{word} belongs to no option: did you mean --config {word}?")
            if os.path.isfile(word):
                self._read_file(word)
        else:
            self.problems.append(f"{word} belongs to no option: settings are given as --section.name=value")

    def _unknown(self, typed: str, name: str, value: Any, place: str = "") -> None:
        """A name that nothing has. Where it can mean one setting alone, that one is read on, so that its value is looked at."""
        found, dashes = suggestions(name, self.options), "" if place else "--"
        remedy = f"did you mean {listed([dashes + one for one in found])}?" if found else "--help lists what there is"
        what = "is not a setting" if "." in name or found and "." in found[0] else "is not an option"
        self.problems.append(f"{place}{typed} {what}: {remedy}")
        if len(found) == 1 and found[0] in entries() and value not in ("", None):
            self._take(entries()[found[0]], value, place)

    def _read_file(self, path: str) -> None:
        """The settings of a YAML file."""
        problem = self._problem_of_file(path)
        if problem is not None:
            self.problems.append(problem)
            self.is_whole = False

    def _problem_of_file(self, path: str) -> str | None:
        """Read a file, or say why it cannot be."""
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            beside = os.path.dirname(path) or "."
            near = did_you_mean(os.path.basename(path), os.listdir(beside)) if os.path.isdir(beside) else ""
            return f"--config {path} cannot be read ({error.strerror}): {near}name a YAML file"
        except UnicodeDecodeError:
            return f"--config {path} is not text in UTF-8: name a YAML file"
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            content = jsonargparse.get_loader("yaml")(text)
        except yaml.YAMLError as error:
            return _describe_yaml_error(path, error)
        if content is not None and not isinstance(content, dict):
            return f"--config {path} holds no settings: write `section:`, and below it `  name: value`"
        if content is not None:
            self._read_mapping(path, root, content)
        return None

    def _read_mapping(self, path: str, root: yaml.MappingNode, content: dict) -> None:
        for name, values, node, place in self._parts(path, root, content):
            if name in sections():
                self._read_section(path, name, values, node, place)
            elif name in self.options:
                self.given.append(Given(_as_option(name, values), place=place))
            elif name in entries():  # as on the command line
                self._take(entries()[name], values, place)
            elif isinstance(values, dict):
                near = alike(name, sections(), 1)
                remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sections())}"
                self.problems.append(f"{place}{name} is not a section: {remedy}")
                if near:
                    self._read_section(path, near[0], values, node, place)
            elif name != "config":
                self._unknown(name, name, values, place)

    def _read_section(self, path: str, section: str, values: Any, node: yaml.Node, place: str) -> None:
        if values is None:  # nothing stands below it
            return
        if not isinstance(values, dict):
            self.problems.append(f"{place}{section} is a section: write its settings below it, indented")
            return
        for key, value, _, place in self._parts(path, node, values):
            typed, new = f"{section}.{key}", RENAMED.get((section, key))
            if new in values:
                self.problems.append(
                    f"{place}{typed} is the old name of {section}.{new}, which is there too: leave it out"
                )
                continue
            name = self._new_name(typed)
            if name not in entries():
                self._unknown(typed, name, value, place)
            elif value is None and not entries()[name].may_be_null:
                self.problems.append(f"{place}{name} is empty: give it a value, or leave the line out")
            else:
                self._take(entries()[name], value, place)

    def _parts(self, path: str, node: yaml.Node, content: dict) -> Iterator[tuple[str, Any, yaml.Node, str]]:
        """Name, value, node and place of each entry of a mapping. Names that are there twice are told: YAML forgets the first.

        What comes from elsewhere (`<<: *anchor`) has the place of the whole mapping.
        """
        last = {key.value: (value, key.start_mark.line + 1) for key, value in node.value}
        for key, _ in node.value:
            first, line = key.start_mark.line + 1, last[key.value][1]
            if first != line:
                self.problems.append(
                    f"{path}, line {line}: {key.value} is there twice (line {first}): make one of them"
                )
        for name, value in content.items():
            part, line = last.get(str(name), (node, node.start_mark.line + 1))
            yield str(name), value, part, f"{path}, line {line}: "


def suggestions(name: str, options: Collection[str] = ()) -> list[str]:
    """Settings, as section.name, and `options` that a name may have meant; the likeliest first, none if there is none."""
    plain = name.lower().replace("-", "_")
    section, _, key = plain.rpartition(".")
    if plain in entries() or plain in options:
        return [plain]
    if key in _BY_OTHER_NAME:
        return [_BY_OTHER_NAME[key]]
    if not section and (found := alike(plain, options, 1)):
        return found
    if same := [one.name for one in entries().values() if one.key == key]:
        return same
    if section in sections() and (
        near := alike(key, [one.key for one in entries().values() if one.section == section], 1)
    ):
        return [f"{section}.{near[0]}"]
    keys = alike(key, dict.fromkeys(one.key for one in entries().values()), 1, SURE if section else ALIKE)
    of_section = alike(section, sections(), 1)
    found = [one.name for one in entries().values() if one.key in keys]
    return [one for one in found if one.partition(".")[0] in of_section] or found[:3]


def problem_of_value(one: Given, refusal: str | None) -> str | None:
    """What is wrong with a value of which the parser says `refusal`, with what it may be; None if that says nothing."""
    if refusal is None:
        return None
    if one.entry is None:
        return f"{one.place}{' '.join(one.arguments)}: {_in_words(refusal)}"
    entry, value = one.entry, _shown(one.value)
    what = f"{one.place}{entry.name}={value}"
    if wrong := _wrong_elements(entry, one.value):
        near = did_you_mean(wrong[0], _elements(entry))
        return f"{what}: {wrong[0]} is unknown: {near}use {listed(_elements(entry))}"
    if not _kinds(entry):
        return f"{what} is unknown: {did_you_mean(value, entry.choices)}use {listed(entry.choices)}"
    if value.endswith("%") and _is_number(value[:-1]):
        meant = f"{float(value[:-1]) / 100:g}"
        return f"{what} is not {listed(_kinds(entry))}: did you mean {meant}? ({entry.summary})"
    return f"{what} is not {listed(_kinds(entry))}: use one, as {_example(entry)} ({entry.summary})"


def _in_words(refusal: str) -> str:
    """What the parser says of an option of the program."""
    text = re.sub(r'^Parser key "[^"]*": ', "", refusal)
    return re.sub(r"Expected a <class '(\w+)'>\..*", lambda found: f"give {_KINDS_BY_NAME[found[1]]}", text)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_KINDS_BY_NAME = {kind.__name__: words for kind, words in _KINDS.items()}


def _kinds(entry: Entry) -> list[str]:
    """In words, what a value may be; nothing where it is one of some words alone."""
    kinds = [_KINDS[one] for one in entry.alternatives if one in _KINDS]
    kinds += [f"a list as [{', '.join(map(str, _elements(entry)[:2])) or '0, 1'}]"] * any(
        get_origin(one) is list for one in entry.alternatives
    )
    return kinds + list(map(str, entry.choices)) * bool(kinds)


def _elements(entry: Entry) -> tuple[str, ...]:
    """The words that a list may hold."""
    inner = [get_args(one)[0] for one in entry.alternatives if get_origin(one) is list]
    return tuple(word for one in inner if get_origin(one) is Literal for word in get_args(one))


def _wrong_elements(entry: Entry, value: Any) -> list[str]:
    known = _elements(entry)
    values = value if isinstance(value, list) else _parse(value)
    return [str(one) for one in values if one not in known] if known and isinstance(values, list) else []


def _understood(entry: Entry, value: Any) -> Any:
    """A list of words may be written as in PEFT: `all-linear`, or words with commas between them."""
    words = _elements(entry)
    if not words or not isinstance(value, str) or value.strip().startswith("["):
        return value
    if value.strip() == ALL_LINEAR and {*LINEARS} <= {*words}:
        return list(LINEARS)
    return [one.strip() for one in value.split(",")]


def _describe_yaml_error(path: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path} is not YAML: {error}"
    what = getattr(error, "problem", None) or "is not YAML"
    is_tab = "'\\t'" in what
    remedy = "indent with spaces" if is_tab else "indent the settings of a section alike, and write `name: value`"
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: {'a tab' if is_tab else what}: {remedy}"


def _as_argument(value: Any) -> str:
    """A value of YAML as a word of the command line."""
    if isinstance(value, float) and not math.isfinite(value):  # as YAML writes them, not JSON
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _as_option(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (f"--{name}",) if value else ()
    return () if value is None else (f"--{name}={value}",)


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else _as_argument(value)


def _parse(text: Any) -> Any:
    try:
        return yaml.safe_load(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _example(entry: Entry) -> str:
    """A value that would be taken."""
    if entry.default is not None:
        return _shown(entry.default)
    return {int: "1", float: "0.5", bool: "true"}.get(entry.alternatives[0], "PATH")
