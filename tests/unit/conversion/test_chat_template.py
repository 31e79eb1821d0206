"""The template of an exported folder."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megatron_sstoken.conversion.chat_template import export_stop, export_template, own_template
from megatron_sstoken.data.text.templates import find_template, without_marks
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_tokenizer

CHAT = exchange("the quick fox", "the lazy dog", system="you are helpful")
RUN, OWN = find_template("llama3"), CHAT_TEMPLATES["plain"]


def in_file(folder):
    (folder / "chat_template.jinja").write_text(OWN)


def in_configuration(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OWN}))


def named_in_configuration(folder):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": OWN}]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))


def in_json(folder):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))


def with_another_for_tools(folder):
    in_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


PLACES = [in_file, in_configuration, named_in_configuration, in_json, with_another_for_tools]


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(tmp_path, chat_template=None)
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", PLACES)
def test_the_runs_template_takes_the_place_of_the_tokenizers_own(folder, place):
    place(folder)
    assert own_template(folder) == OWN
    told = export_template(folder, RUN)
    assert "prepared with, in place of the tokenizer's own" in told and "--chat_template own" in told
    assert own_template(folder) == without_marks(RUN)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == without_marks(RUN)
    marked = tokenizer.apply_chat_template(CHAT, chat_template=RUN, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == marked
    # converters to GGUF read this key before the file, and so do transformers that are older than the file
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config.get("chat_template", without_marks(RUN)) == without_marks(RUN)
    assert not {b"tools", OWN.encode()} & set(contents(folder).values())


def test_a_tokenizer_without_one_gets_it(folder):
    assert own_template(folder) is None
    assert export_template(folder, RUN) == "chat template: the one that the data was prepared with"
    assert AutoTokenizer.from_pretrained(folder).chat_template == without_marks(RUN)


@pytest.mark.parametrize("place", PLACES)
def test_its_own_stays_where_it_is_the_same_or_the_data_had_none(folder, place):
    place(folder)
    before = contents(folder)
    assert "own, which the data was prepared with" in export_template(folder, OWN)
    assert export_template(folder, None) == "chat template: the tokenizer's own"
    assert contents(folder) == before


def test_marks_alone_are_no_difference(folder):
    (folder / "chat_template.jinja").write_text(without_marks(RUN))
    assert "own, which the data was prepared with" in export_template(folder, RUN)


def test_none_at_all(folder):
    assert export_template(folder, None) == "chat template: none"


@pytest.mark.parametrize("named", [None, 1, [1]], ids=["not there", "a number", "a list"])
def test_generation_stops_at_the_end_of_a_turn(folder, named):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    generation = folder / "generation_config.json"
    if named is not None:
        generation.write_text(json.dumps({"eos_token_id": named, "temperature": 0.6}))
    assert export_stop(folder) is None  # without a template nothing says where a turn ends
    export_template(folder, find_template("chatml"))
    assert "stops at <|im_end|>, too" in export_stop(folder)
    kept = {"bos_token_id": 0, "eos_token_id": [1, end]} | ({} if named is None else {"temperature": 0.6})
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, end]
    assert json.loads(generation.read_text()) == kept
    before = contents(folder)
    assert export_stop(folder) is None and contents(folder) == before
