"""Write the config.json of a published model, without its weights: enough to plan a run (`--dry_run`) on any machine.

With `--data` also a stand-in for prepared data: random tokens in conversations of chat-like lengths. It gives the plan
rows and steps to count; nothing can be learnt from it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_sstoken.data.store import StoreWriter
from megatron_sstoken.model.presets import MODELS, model_config


def make_config(name: str, folder: Path) -> None:
    """Write `folder`/config.json of the model `name`. Raises ValueError where the folder already has another one."""
    text = json.dumps(model_config(name), indent=2) + "\n"
    path = folder / "config.json"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} is there already and differs: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_stand_in_data(folder: Path, num_samples: int = 1000, vocabulary_size: int = 32000) -> None:
    """Write prepared data of `num_samples` random conversations, the same every time."""
    generator = np.random.default_rng(0)
    writer = StoreWriter(folder)
    for number in range(num_samples):
        # Lengths of chat data have a long tail; a log-normal one around 400 tokens looks much like it.
        length = int(np.clip(generator.lognormal(6.0, 0.8), 32, 4096))
        roles = np.ones(length, dtype=np.uint8)
        roles[: int(length * generator.uniform(0.2, 0.7))] = 0
        writer.add(generator.integers(0, vocabulary_size, length, dtype=np.int32), roles, number)
    writer.finalize(
        vocabulary_size=vocabulary_size,
        eos_token_id=0,
        tokenizer_fingerprint="stand-in",
        tokenizer_path="none: made by tools/make_config.py",
        template=None,
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, help="model of the presets")
    parser.add_argument("--output", type=Path, required=True, help="folder for config.json")
    parser.add_argument("--data", type=Path, help="also make stand-in data in this folder, unless it is there")
    options = parser.parse_args(arguments)
    try:
        make_config(options.model, options.output)
        if options.data is not None and not options.data.exists():
            make_stand_in_data(options.data)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output / 'config.json'}: {options.model}, no weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
