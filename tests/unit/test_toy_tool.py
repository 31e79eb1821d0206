"""tools/make_toy.py: reproducible, correct sums, and made of what the main job reads."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.model.families import read_architecture
from tools.make_toy import main, make_conversations, make_toy

SMALL = {"rows": 40, "vocabulary": 300, "hidden": 64, "layers": 1}
SUM = re.compile(r"We calculate (\d+) ([-+*]) (\d+) = (\d+)\. So \w+ has (\d+) \w+\.")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy."""
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder, **SMALL)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def test_equal_seeds_give_equal_files_and_others_do_not(toy: Path, tmp_path: Path):
    make_toy(tmp_path / "again", **SMALL)
    make_toy(tmp_path / "other", **SMALL, seed=1)
    first, again, other = contents(toy), contents(tmp_path / "again"), contents(tmp_path / "other")
    assert first == again
    for name in ("chat.jsonl", "validation.jsonl", "model/tokenizer.json", "model/model.safetensors"):
        assert first[name] != other[name], name


def test_a_second_call_replaces_the_files_of_the_first(toy: Path, tmp_path: Path):
    make_toy(tmp_path, **SMALL, seed=1)
    make_toy(tmp_path, **SMALL)
    assert contents(tmp_path) == contents(toy)


def test_validation_holds_a_tenth_as_many_rows_and_none_of_training(toy: Path):
    train, validation = read_chats(toy / "chat.jsonl"), read_chats(toy / "validation.jsonl")
    assert (len(train), len(validation)) == (40, 4)
    assert len({json.dumps(chat) for chat in train + validation}) == 44


def test_chats_are_of_every_form():
    roles = [[message["role"] for message in chat] for chat in make_conversations(300, seed=0)]
    forms = {("system" in chat, chat.count("assistant")) for chat in roles}
    assert forms == {(system, turns) for system in (False, True) for turns in (1, 2, 3)}
    for chat in roles:
        dialogue = chat[1:] if chat[0] == "system" else chat
        assert dialogue == ["user", "assistant"] * (len(dialogue) // 2)


def test_sums_are_right_and_follow_ups_go_on_from_the_last_result():
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for chat in make_conversations(300, seed=3):
        count = None
        for question, answer in zip(chat, chat[1:], strict=False):
            if answer["role"] != "assistant":
                continue
            match = SUM.fullmatch(answer["content"])
            assert match is not None, answer
            left, right, result, stated = (int(match[group]) for group in (1, 3, 4, 5))
            assert operations[match[2]](left, right) == result == stated > 0, answer
            assert str(right) in question["content"] and count in (None, left), (question, answer)
            count = result


def test_response_tokens_are_what_the_assistant_says_and_its_end_of_turn(toy: Path, tmp_path: Path):
    manifest = prepare([toy / "chat.jsonl"], toy / "model", tmp_path / "store", workers=1, progress=False)
    store, tokenizer = SampleStore(tmp_path / "store"), AutoTokenizer.from_pretrained(toy / "model")
    assert manifest.num_samples == 40 and manifest.num_skipped == 0
    for index, chat in enumerate(read_chats(toy / "chat.jsonl")):
        said = "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")
        assert tokenizer.decode(store.tokens(index)[store.roles(index) == 1]) == said


def test_digits_are_single_tokens(toy: Path):
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    assert [tokenizer.decode([token]).strip() for token in tokenizer.encode("47+5")] == ["4", "7", "+", "5"]


def test_the_model_is_a_llama_of_the_asked_size_that_the_package_reads(toy: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy / "model"), AutoTokenizer.from_pretrained(toy / "model")
    architecture = read_architecture(str(toy / "model"))
    assert architecture.vocabulary_size == len(tokenizer) == 300
    assert (architecture.hidden_size, architecture.num_layers) == (64, 1)
    assert architecture.num_attention_heads == 2 * architecture.num_query_groups
    assert architecture.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [("rows", 9, "10 or more"), ("layers", 0, "1 or more"), ("vocabulary", 258, "259 or more"), ("hidden", 96, "64")],
)
def test_numbers_that_cannot_work_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: int, rule: str
):
    assert main(["--output", str(tmp_path / "toy"), f"--{option}", str(value)]) == 2
    error = capsys.readouterr().err
    assert f"--{option} {value}" in error and rule in error
    assert not (tmp_path / "toy").exists()


def test_the_model_has_read_other_conversations_unless_random_weights_are_asked_for(toy: Path, tmp_path: Path):
    make_toy(tmp_path, **SMALL, start="random")
    found, drawn = contents(toy), contents(tmp_path)
    assert {name for name in found if found[name] != drawn[name]} == {"model/model.safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    chats = read_chats(toy / "chat.jsonl")[:4]
    rendered = tokenizer.apply_chat_template(chats, return_dict=True, return_tensors="pt", padding=True)
    labels = rendered["input_ids"].masked_fill(rendered["attention_mask"] == 0, -100)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / "model")(**rendered, labels=labels).loss.item()
        for folder in (tmp_path, toy)
    )
    assert after < before - 0.1
