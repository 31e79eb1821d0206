"""Packaging. Versions stand in megatron_sstoken/__init__.py and supported.py, read here without importing the package."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# Not imported: the package needs what is about to be installed.
SUPPORTED = runpy.run_path(str(HERE / "megatron_sstoken" / "supported.py"))
LINES = SUPPORTED["LINES"]


def read_version() -> str:
    """The `__version__` that the package states."""
    text = (HERE / "megatron_sstoken" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_sstoken/__init__.py has no line __version__ = "…"')
    return match[1]


setup(
    name="megatron-sstoken",
    version=read_version(),
    description="Token-selective supervised fine-tuning (ssToken, arXiv 2510.18250) on megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_sstoken", "megatron_sstoken.*"]),
    package_data={"megatron_sstoken.data.text.templates": ["*.jinja"], "megatron_sstoken.report": ["templates/*"]},
    install_requires=[
        f"torch>={SUPPORTED['OLDEST_TORCH']}",
        *(line.megatron_core_requirement for line in LINES),
        "transformers>=5",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",
        "pyarrow>=15",
        "jsonargparse[signatures]>=4.35",
        "docstring-parser>=0.15",
        "tqdm>=4.60",
        "tensorboard>=2.14",
        "numpy>=1.26",
        "psutil>=5.9",  # megatron-core's dist_checkpointing imports it without requiring it
        "pyyaml>=6",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "xxhash>=3.4",
    ],
    entry_points={"console_scripts": ["megatron-sstoken = megatron_sstoken.__main__:main"]},
    extras_require={
        "evidence": ["gguf>=0.10"],  # benchmarks/evidence reads its model from a GGUF file
        "te": [f"{line.transformer_engine}; {line.python}" for line in LINES],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.10",
            "peft>=0.17",
            "playwright>=1.50",
            "accelerate>=1.0",
            "gguf>=0.10",
        ],
    },
)
