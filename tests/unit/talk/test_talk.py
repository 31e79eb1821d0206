"""megatron_sstoken.chat and megatron_sstoken.evaluate with a tiny model: what they ask, what they print, what they refuse."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sstoken import chat, evaluate
from megatron_sstoken.data.text.end_of_turn import end_of_turn
from megatron_sstoken.talk.generation import Decoding, Request, Talker, load_talker
from megatron_sstoken.talk.loading import ModelFolder
from megatron_sstoken.talk.questions import question_of, read_questions
from tests.helpers.toy import CHAT_TEMPLATES, exchange, write_rows
from tools.make_toy import make_toy

SHORT = "--max_new_tokens=12"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A toy with random weights: every question has another answer."""
    folder = tmp_path_factory.mktemp("talk")
    make_toy(folder, rows=40, vocabulary=300, hidden=64, layers=1, start="random")
    return folder


@pytest.fixture(scope="module")
def talker(toy) -> Talker:
    return load_talker(ModelFolder(toy / "model"), Decoding(max_new_tokens=12), device="cpu")


@pytest.fixture(autouse=True)
def with_gradients():
    """Programs turn gradients off for good; tests share the process."""
    yield
    torch.set_grad_enabled(True)


def run(program, capsys, *arguments) -> tuple[int, str, str]:
    code = program.main([str(one) for one in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_answers_in_a_batch_are_those_one_by_one_and_transformers_own(toy, talker):
    questions = [question.request for question in read_questions(toy / "validation.jsonl")]
    lengths = {len(talker.render(request)) for request in questions}
    together = talker.answers(questions)
    assert len(questions) == 4 and len(lengths) == 4
    assert together == [talker.answer(request) for request in questions]
    assert len({answer.text for answer in together}) > 1
    for request, answer in zip(questions, together, strict=True):
        tokenizer, model = talker.tokenizer, talker.model
        inputs = tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.is_cut == (ids[-1] != tokenizer.eos_token_id)


def test_an_answer_has_the_room_that_it_has_alone(talker):
    talker = Talker(talker.model, talker.tokenizer, Decoding(max_new_tokens=600))
    short, long = (Request([{"role": "user", "content": "2 " * times}]) for times in (1, 240))
    assert talker.answers([short, long]) == [talker.answer(short), talker.answer(long)]
    with pytest.raises(ValueError, match="tokens and the model 512 positions"):
        talker.answer(Request([{"role": "user", "content": "2 " * 600}]))


def test_the_end_of_a_turn_stops_whatever_the_folder_says(talker):
    tokenizer = AutoTokenizer.from_pretrained(talker.tokenizer.name_or_path)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    for template in (tokenizer.chat_template, CHAT_TEMPLATES["plain"], CHAT_TEMPLATES["generation"]):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) == ends
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Talker(talker.model, tokenizer, Decoding())


def test_questions_of_a_line_are_answered_as_they_come(toy, talker, capsys):
    code, out, err = run(chat, capsys, "--model", toy / "model", "--prompt", "Ada has 3 apples?", SHORT)
    expected = talker.answer(Request([{"role": "user", "content": "Ada has 3 apples?"}]))
    assert (code, out) == (0, expected.text + "\n")
    assert ("cut after 12 tokens" in err) == expected.is_cut
    _, out, _ = run(chat, capsys, "--model", toy / "model", "--prompt", "Ada has 3 apples?", "Why?", SHORT)
    assert out.startswith(f"> Ada has 3 apples?\n{expected.text}\n\n> Why?\n")


def test_a_conversation_goes_on_until_a_new_one_begins(toy, talker, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("2+2?\n\nWhy?\n/new\nWhy?\n/quit\nnever\n"))
    code, out, _ = run(chat, capsys, "--model", toy / "model", "--system", "Be short.", SHORT)
    system = {"role": "system", "content": "Be short."}
    first = [system, {"role": "user", "content": "2+2?"}]
    said = talker.answer(Request(first)).text
    second = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "Why?"}]
    wanted = [said, talker.answer(Request(second)).text]
    wanted.append(talker.answer(Request([system, {"role": "user", "content": "Why?"}])).text)
    assert (code, out) == (0, "".join(f"{text}\n" for text in wanted))


def test_sampling_repeats_with_its_seed(toy, capsys):
    asking = ("--model", toy / "model", "--prompt", "Ada?", "--temperature=2", "--top_p=0.9", SHORT)
    said = [run(chat, capsys, *asking, f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_file_is_answered_and_a_stopped_run_goes_on(toy, talker, tmp_path, capsys, monkeypatch):
    asking = ("--model", toy / "model", "--file", toy / "validation.jsonl", "--batch_size=3", SHORT)
    output = tmp_path / "new" / "answers.jsonl"
    assert run(chat, capsys, *asking, "--output", output)[0] == 0
    whole = output.read_bytes()
    questions = read_questions(toy / "validation.jsonl")
    found = lines(output)
    assert [line["output"] for line in found] == [talker.answer(one.request).text for one in questions]
    assert [line["question"] for line in found] == [one.text for one in questions]

    output.write_bytes(whole[: whole.index(b"\n") + 20])  # killed within the second line
    assert run(chat, capsys, *asking, "--output", output)[0] == 0
    assert output.read_bytes() == whole
    monkeypatch.setattr("megatron_sstoken.talk.options.load", lambda *_: pytest.fail("nothing is missing"))
    assert run(chat, capsys, *asking, "--output", output)[0] == 0
    code, _, err = run(chat, capsys, *asking, "--output", output, "--system=Be short.")
    assert code == 2 and "holds answers of another model, or with other settings" in err and err.count("\n") == 1


def test_adapters_are_added_to_their_base(toy, talker, tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(toy / "model"),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapters")
    merged, tokenizer = tmp_path / "merged", AutoTokenizer.from_pretrained(toy / "model")
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    question = ("--prompt", "Ada has 3 apples?", SHORT)
    said = [
        run(chat, capsys, "--model", folder, *more, *question)[1]
        for folder, more in (
            (merged, ()),
            (tmp_path / "adapters", ()),
            (toy / "model", ("--adapter", tmp_path / "adapters")),
            (toy / "model", ()),
        )
    ]
    assert said[0] == said[1] == said[2] != said[3]


def test_right_answers_are_counted_and_models_compared(toy, talker, tmp_path, capsys):
    prompts = ["Ada has 3 apples?", "Ben has 12 keys and loses 2.", "Why?", "Now Leo?"]
    said = [talker.answer(Request([{"role": "user", "content": text}])).text for text in prompts]
    rows = [{"question": prompt, "answer": text} for prompt, text in zip(prompts, said, strict=True)]
    rows[0]["answer"] += " not so"
    data = write_rows(tmp_path / "data.jsonl", rows)
    asking = ("--model", toy / "model", "--data", data, "--match=text", SHORT)
    code, out, _ = run(evaluate, capsys, *asking, "--output", tmp_path / "a.jsonl", "--compare", toy / "model")
    assert code == 0
    assert out.count(f"{toy / 'model'}: 3 of 4 right, 75.0 % (95 %: 30.1 to 95.4)\n") == 2
    assert "both right 3, only" in out and "neither 1: +0.0 points, p = 1 (McNemar, exact)" in out
    for name in ("a.jsonl", "a.compare.jsonl"):
        assert [line["is_right"] for line in lines(tmp_path / name)] == [False, True, True, True]
    _, out, _ = run(evaluate, capsys, *asking, "--limit=1")
    assert out.startswith(f"{toy / 'model'}: 0 of 1 right")


@pytest.mark.parametrize(
    ("row", "asked", "reference"),
    [
        ({"question": "2+2?", "answer": "4"}, ["2+2?"], "4"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, ["Add.\n\n2, 2"], "4"),
        ({"prompt": "2+2?"}, ["2+2?"], None),
        ({"messages": [{"role": "user", "content": "2+2?"}]}, ["2+2?"], None),
        ({"messages": exchange("a", "b") + exchange("c", "d")}, ["a", "b", "c"], "d"),
    ],
)  # fmt: skip
def test_a_row_is_asked_up_to_its_last_answer(row, asked, reference):
    question = question_of(row)
    assert [message["content"] for message in question.request.messages] == asked
    assert question.reference == reference


def test_mistakes_are_told_in_one_line(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "megatron_sstoken.talk.loading.ModelFolder.load_model", lambda *_, **__: pytest.fail("too late")
    )
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "2?", "answer": "two"}])
    alone = write_rows(tmp_path / "alone.jsonl", [{"question": "2?"}])
    (tmp_path / "run" / "step_0000001").mkdir(parents=True)
    (tmp_path / "run" / "step_0000001" / "sstoken.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    bare = shutil.copytree(toy / "model", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    model, hub = ("--model", toy / "model"), "Qwen/Qwen2.5-0.5B-Instruct"
    cases = [
        (chat, ("--model", tmp_path / "run"), f"to-hf --checkpoint {tmp_path / 'run'} --output {tmp_path / 'run'}-hf"),
        (chat, ("--model", hub), f"hf download {hub} --local-dir Qwen2.5-0.5B-Instruct"),
        (chat, ("--model", tmp_path / "empty"), "holds no config.json"),
        (chat, ("--model", toy / "model" / "config.json"), "is no folder: name the folder that the file is in"),
        (chat, (*model, "--adapter", tmp_path / "empty"), "holds no adapter_config.json"),
        (chat, (*model, "--prompt=a", "--file", rows), "--prompt and --file cannot both be given"),
        (chat, (*model, "--output=x"), "--output belongs to --file"),
        (chat, (*model, "--file", tmp_path / "none.jsonl"), "none.jsonl"),
        (chat, (*model, "--file", rows, "--output", tmp_path / "empty"), "is a folder: name a file"),
        (chat, (*model, "--file", rows, "--batch_size=0"), "--batch_size 0 must be at least 1"),
        (chat, (*model, "--top_p=0.5"), "does nothing without --temperature"),
        (chat, (*model, "--temperature=-1"), "--temperature -1.0 must be at least 0"),
        (chat, (*model, "--max_new_tokens=0"), "--max_new_tokens 0 must be at least 1"),
        (chat, (*model, "--prompt=a", "--chat_template=qwen33"), "did you mean qwen3"),
        (evaluate, (*model, "--data", rows), "row 0 holds no number: use --match text"),
        (evaluate, (*model, "--data", alone), "has a question and no answer to compare with"),
        (evaluate, (*model, "--data", rows, "--limit=0"), "--limit 0 must be at least 1"),
        (evaluate, (*model, "--data", rows, "--match=text", "--output", alone), "holds answers of another model"),
    ]
    for program, arguments, wanted in cases:
        code, out, err = run(program, capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and wanted in err and err.count("\n") == 1, (arguments, err)
    monkeypatch.undo()
    code, _, err = run(chat, capsys, "--model", bare, "--prompt=a")
    assert code == 2 and "has no chat template" in err and err.count("\n") == 1, err


def test_a_row_that_cannot_be_asked_names_its_place(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "2?", "answer": "2"}, {"id": 3}])
    with pytest.raises(ValueError, match=r"rows\.jsonl.*2.*: "):
        read_questions(path)
