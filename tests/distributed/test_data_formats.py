"""Every form of input row: prepared with a real template, trained for two steps, and found again in the token records."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sstoken.data.conversation import Conversation, MessageWeight
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.rows.formats import parse_row
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.training.records import read_records
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.documented import rows_of
from tests.helpers.toy import make_tokenizer
from tests.helpers.workbench import make_model, make_settings, make_trainer

ALL = rows_of("docs/data.md")
SOME = {name: row for name, row in ALL.items() if name.endswith((": tools", "thinking", "spans"))}
COPIES = 2
LENGTH = 2048


@pytest.fixture(scope="module", params=[SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def case(request, tmp_path_factory):
    """A folder with prepared data of each row, and the rows, after two steps with each."""
    folder = tmp_path_factory.mktemp("formats")
    make_tokenizer(folder / "tokenizer", chat_template=None)
    vocabulary = load_tokenizer(folder / "tokenizer").vocabulary_size
    make_model(folder / "model", vocab_size=vocabulary, num_hidden_layers=1, max_position_embeddings=LENGTH)
    for number, row in enumerate(request.param.values()):
        path = folder / f"{number}.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * COPIES)
        prepare([path], folder / "tokenizer", folder / str(number), chat_template="qwen3", workers=1, progress=False)
    run_distributed(train_two_steps, 1, str(folder), len(request.param), timeout=300)
    return folder, request.param


def train_two_steps(rank: int, folder: str, num_folders: int) -> None:
    """With each folder of data, with token records of both steps."""
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import train

    for number in range(num_folders):
        settings = make_settings(
            f"{folder}/model", f"{folder}/{number}", data__sequence_length=LENGTH, data__shuffle=False,
            training__global_batch_size=1,
            training__steps=2, logging__directory=f"{folder}/logs/{number}", logging__records_every=1,
            selection__rho=0.9,
        )  # fmt: skip
        train(make_trainer(settings))
        reset_layout()


@pytest.mark.timeout(300)
def test_what_is_prepared_is_trained(case):
    """Records of both steps hold every response token; the texts of the response are what the assistant says."""
    folder, rows = case
    tokenizer = load_tokenizer(folder / "tokenizer")
    for number, (name, row) in enumerate(rows.items()):
        store = SampleStore(folder / str(number))
        assert len(store) == COPIES, name
        for step in (1, 2):
            records = read_records(Path(folder) / "logs" / str(number) / "records" / f"step_{step:07d}.parquet")
            assert (records["sample"] == step - 1).all(), "an epoch is two steps"
            response = records["role"] == 1
            assert np.flatnonzero(store.roles(0)).tolist() == records["position"][response].tolist(), name
            assert np.isfinite(records["loss"][response]).all() and records["selected"].any(), name
        check_texts(name, parse_row(row), tokenizer.decode(store.tokens(0)[store.roles(0) == 1].tolist()))


def check_texts(name: str, conversation: Conversation, trained: str) -> None:
    """What is trained on is what the assistant says, and nothing that others say."""
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and conversation.weight_of(index) == MessageWeight():
            assert message["content"].strip() in trained, name
            assert all(call["function"]["name"] in trained for call in message.get("tool_calls", [])), name
        elif message["role"] != "assistant" and len(message["content"]) > 4:
            assert message["content"] not in trained, name
