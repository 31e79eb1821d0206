"""The chat template of an exported folder: the one that the data was prepared with, or the one that is there; and where an
answer stops."""

import json
from pathlib import Path
from typing import Any

from megatron_sstoken.data.text.end_of_turn import end_of_turn
from megatron_sstoken.files import read_json

FILE = "chat_template.jinja"
_LEGACY = "chat_template.json"
_CONFIG = "tokenizer_config.json"
_NAMED = "additional_chat_templates"
_GENERATION = "generation_config.json"


def own_template(folder: Path) -> str | None:
    """The (default) chat template of a Hugging Face folder, found where transformers looks for it; None: it has none."""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    for name in (_LEGACY, _CONFIG):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, list):  # several, by name
            template = next((one["template"] for one in template if one.get("name") == "default"), None)
        if template is not None:
            return template
    return None


def export_template(folder: Path, template: str | None) -> str:
    """Give a folder the template that a run's data was prepared with, without its marks; returns what was done, in words.

    `folder` has the tokenizer's files as they were copied. It keeps its own where that is the same, and where the data
    had none. Else `chat_template.jinja` and the configuration of the tokenizer get the run's, because older transformers
    and converters to GGUF read the latter first, and templates for special cases, which the data did not have, go.
    """
    own = own_template(folder)
    if template is None:
        return "chat template: the tokenizer's own" if own is not None else "chat template: none"
    from megatron_sstoken.data.text.templates import without_marks  # imports transformers, which takes a second

    if own is not None and without_marks(own) == without_marks(template):
        return "chat template: the tokenizer's own, which the data was prepared with"
    text = without_marks(template)
    (folder / FILE).write_text(text, encoding="utf-8", newline="")
    (folder / _LEGACY).unlink(missing_ok=True)
    for path in (folder / _NAMED).glob("*.jinja"):
        path.unlink()
    config = folder / _CONFIG
    if config.is_file() and "chat_template" in (content := read_json(config)):
        _write(config, content | {"chat_template": text})
    instead = (
        ", in place of the tokenizer's own, another one (--chat_template own keeps that)" if own is not None else ""
    )
    return f"chat template: the one that the data was prepared with{instead}"


def take_from_processor(folder: Path) -> None:
    """Make a template that stands where processors alone look for it (`chat_template.json`) the tokenizer's."""
    if (folder / _LEGACY).is_file():
        template = own_template(folder)
        (folder / _LEGACY).unlink()
        if template is not None:
            (folder / FILE).write_text(template, encoding="utf-8", newline="")


def export_stop(folder: Path) -> str | None:
    """Have answers of a folder's model stop where its chat template ends a turn; returns what was done, in words.

    Of a base model that was tuned with a template, generation_config.json names the end of a text alone: programs that
    go by it (transformers, vLLM) would let the model talk on, in the user's place too. None where nothing was to be done.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # no tokenizer, or one whose code is not run
        return None
    stop = end_of_turn(tokenizer) if own_template(folder) is not None else None
    if stop is None:
        return None
    config = read_json(folder / "config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation: dict[str, Any] = {name: config[name] for name in names if name in config}
    generation |= read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    named = generation.get("eos_token_id")
    stops = named if isinstance(named, list) else [] if named is None else [named]
    if stop in stops:
        return None
    _write(folder / _GENERATION, generation | {"eos_token_id": [*stops, stop]})
    return f"generation: stops at {tokenizer.convert_ids_to_tokens(stop)}, too, which ends a turn in the chat template"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
