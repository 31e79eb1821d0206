"""GGUF files: what is told where they cannot be read, and the folder that is made where they can."""

import importlib.util
import json

import pytest

from megatron_sstoken.commands.convert_checkpoint import main


def said(capsys, *arguments) -> str:
    assert main(["from-gguf", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_read(tmp_path, capsys, monkeypatch):
    file, output = tmp_path / "model.gguf", tmp_path / "out"
    options = (f"--gguf={file}", f"--output={output}")
    assert "model.gguf is not a file: name one that ends in .gguf" in said(capsys, *options)
    file.write_bytes(b"not one")
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        assert "the package gguf is not installed: pip install gguf" in said(capsys, *options)
        (tmp_path / "there").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert "there exists: name another --output" in said(capsys, options[0], f"--output={tmp_path / 'there'}")
    assert "model.gguf cannot be read by transformers (" in said(capsys, *options)
    assert not output.exists()


def test_a_folder_is_made_of_one(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np
    import torch

    from megatron_sstoken.model.weight_files import HuggingFaceWeights

    words = [chr(letter) for letter in range(97, 123)] + ["ab"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 48,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (27, 32), "output": (27, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32)}
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["blk.0.ffn_down"] = draw.normal(size=(32, 48)).astype(np.float32)
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["from-gguf", f"--gguf={tmp_path / 'tiny.gguf'}", f"--output={tmp_path / 'hf'}"]) == 0
    weights = HuggingFaceWeights(str(tmp_path / "hf"))
    found = weights.slice("model.layers.0.mlp.down_proj.weight")[:]
    assert torch.equal(found, torch.from_numpy(tensors["blk.0.ffn_down"]))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == 2
    assert main(["verify", f"--hf={tmp_path / 'hf'}"]) == 0
