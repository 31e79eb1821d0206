"""Prepared samples on disk, memory-mapped.

A prepared folder holds megatron's `IndexedDataset` pairs `tokens.bin/.idx` (int32) and `roles.bin/.idx`
(uint8), each sample one document; `rows.npy` (int64 [num_samples], row of the input); `response_counts.npy`
(int32 [num_samples]); `labels.npy` (int32 [num_samples], which of the manifest's labels); where weights differ from the
roles, `weights.bin` (fp32 [num_tokens]); `manifest.json`; and `checksums.json` over all files, written last.
"""

import hashlib
import io
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_sstoken import __version__
from megatron_sstoken.files import read_json, require_size, write_json
from megatron_sstoken.folders import data_folder_problem
from megatron_sstoken.integrity import checksum_of, write_checksums


def _indexed_dataset() -> Any:
    """megatron's module, imported where it is used: that takes seconds, which processes that tokenise need not spend."""
    from megatron.core.datasets import indexed_dataset

    # What 0.19 says in a process outside a job whenever it has something to say, and asks whether this one should.
    warnings.filterwarnings("ignore", "Could not determine rank", UserWarning)
    return indexed_dataset


MANIFEST = "manifest.json"
STORE_FORMAT, STORE_VERSION = "megatron_sstoken.samples", 2
FIRST_VERSION = 1
"""Has neither weights nor labels nor notes; is still read."""
NO_TEMPLATE = "none (plain text)"


@dataclass(frozen=True)
class StoreManifest:
    """What a prepared folder holds and where it comes from. Fingerprints are hex sha256."""

    data_fingerprint: str
    """Over token bytes, role bytes and sample lengths, in order."""
    tokenizer_fingerprint: str
    template_fingerprint: str
    num_samples: int
    num_tokens: int
    num_response_tokens: int
    """Response tokens at position >= 1 of their sample: those that have a loss."""
    num_skipped: int
    """Bad rows that were left out."""
    longest_sample: int
    """Tokens."""
    vocabulary_size: int
    eos_token_id: int | None
    template: str
    """Text of the chat template, or `NO_TEMPLATE`."""
    template_source: str
    """Where the template is from and how roles were found, in words."""
    tokenizer_path: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Input files in order: path, size (bytes), sha256."""
    weighted: bool = False
    """Whether weights differ from the roles: then the folder has `weights.bin`."""
    labels: list[str] = field(default_factory=list)
    """Names of the sources of samples, which `labels.npy` counts from 0."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was noticed while preparing, in words, and of how many rows."""
    tool_version: str = __version__
    format: str = STORE_FORMAT
    format_version: int = STORE_VERSION

    @property
    def chat_template(self) -> str | None:
        """Text of the chat template; None: the data was prepared without one."""
        return None if self.template == NO_TEMPLATE else self.template

    @classmethod
    def load(cls, path: str | Path) -> "StoreManifest":
        """Read the manifest of a prepared folder. ValueError if there is none or it has another format."""
        file = Path(path) / MANIFEST
        if problem := data_folder_problem(str(path)):
            raise ValueError(f"prepared data: {problem}")
        content = read_json(file)
        found = (content.get("format"), content.get("format_version"))
        names = {entry.name for entry in fields(cls)}
        if found == (STORE_FORMAT, FIRST_VERSION):
            names -= {"weighted", "labels", "notes"}
        if found[0] != STORE_FORMAT or found[1] not in (FIRST_VERSION, STORE_VERSION) or content.keys() != names:
            raise ValueError(
                f"prepared data: {file} has format {found[0]} version {found[1]}, this version reads "
                f"{STORE_FORMAT} version {STORE_VERSION}: prepare the data again with tools/prepare_data.py"
            )
        return cls(**content)

    def save(self, path: str | Path) -> None:
        """Write the manifest into the folder `path`, atomically."""
        write_json(Path(path) / MANIFEST, asdict(self))


class SampleStore:
    """Read access to a prepared folder: tokens and roles of every sample.

    `lengths` int32 [num_samples], `response_counts` int32 [num_samples] (response tokens at position >= 1),
    `rows` int64 [num_samples] (0-based among the non-blank rows of all input files), `offsets` int64
    [num_samples + 1] (start of each sample in the flat token stream), `labels` int32 [num_samples] (which of
    `manifest.labels`; all 0 where there are none). Raises `ValueError` for a folder that
    is missing, incomplete, truncated or of another format version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = StoreManifest.load(self.path)
        num_samples, num_tokens = self.manifest.num_samples, self.manifest.num_tokens
        # 34 bytes of header; length, pointer and document border of each sample and one more document border
        index_size = 34 + num_samples * (4 + 8 + 8) + 8
        sizes = {
            "tokens.bin": 4 * num_tokens,
            "roles.bin": num_tokens,
            "tokens.idx": index_size,
            "roles.idx": index_size,
        }
        if self.manifest.weighted:
            sizes["weights.bin"] = 4 * num_tokens
        for name, size in sizes.items():
            require_size(self.path / name, size, "prepare the data again with tools/prepare_data.py --overwrite")
        made = _indexed_dataset()
        self._tokens = made.IndexedDataset(str(self.path / "tokens"))
        self._roles = made.IndexedDataset(str(self.path / "roles"))
        # copies, as megatron unmaps the index when the data set dies, whoever still holds a view of it
        self.lengths: np.ndarray = self._tokens.sequence_lengths.copy()
        self.offsets: np.ndarray = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.response_counts = self._load_array("response_counts.npy")
        self.rows = self._load_array("rows.npy")
        versioned = self.manifest.format_version > FIRST_VERSION
        self.labels = self._load_array("labels.npy") if versioned else np.zeros(num_samples, dtype=np.int32)
        self._weights = np.memmap(self.path / "weights.bin", np.float32, "r") if self.manifest.weighted else None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def tokens(self, index: int, length: int | None = None) -> np.ndarray:
        """Token ids int32 [n] of a sample, or its first `length`; a copy. IndexError outside [0, len)."""
        return self._read(self._tokens, index, length)

    def roles(self, index: int, length: int | None = None) -> np.ndarray:
        """Roles uint8 [n] (0 context, 1 response) of a sample, or of its first `length` tokens; a copy."""
        return self._read(self._roles, index, length)

    def weights(self, index: int, length: int | None = None) -> np.ndarray:
        """Weights fp32 [n] of a sample's tokens, or of its first `length`; a copy. 0 where the role is context, above 0
        elsewhere, 1 where nobody said anything else."""
        roles = self.roles(index, length)
        if self._weights is None:
            return roles.astype(np.float32)
        start = int(self.offsets[index])
        return np.array(self._weights[start : start + roles.size])

    @property
    def token_stream(self) -> np.ndarray:
        """int32 [num_tokens]: the tokens of all samples one after another, memory-mapped."""
        return np.memmap(self.path / "tokens.bin", np.int32, "r")

    @property
    def role_stream(self) -> np.ndarray:
        """uint8 [num_tokens]: their roles, memory-mapped."""
        return np.memmap(self.path / "roles.bin", np.uint8, "r")

    def _read(self, data: Any, index: int, length: int | None) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)} samples: {self.path}")
        whole = int(self.lengths[index])
        return data.get(int(index), 0, whole if length is None else min(length, whole)).copy()

    def _load_array(self, name: str) -> np.ndarray:
        try:
            array = np.load(self.path / name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"prepared data: {self.path / name} cannot be read ({error}): prepare the data again"
            ) from error
        if array.shape != (len(self),):
            raise ValueError(
                f"prepared data: {self.path / name} has shape {array.shape} for {len(self)} samples: "
                "prepare the data again"
            )
        return array


@dataclass(frozen=True)
class Samples:
    """Samples end to end: tokens int32 [n], roles uint8 [n] (1 response), lengths int64 [num_samples], each 1 or more."""

    tokens: np.ndarray
    roles: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None
    """fp32 [n], above 0 where the role is response and 0 elsewhere; None: the roles."""

    def each(self) -> Iterator["Samples"]:
        """One by one."""
        stops = np.cumsum(self.lengths).tolist()
        for number, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            weights = None if self.weights is None else self.weights[start:stop]
            here = self.lengths[number : number + 1]
            yield Samples(self.tokens[start:stop], self.roles[start:stop], here, weights)


class StoreWriter:
    """Writes a prepared folder sample by sample; nothing can open it before `finalize`. A context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        builder = _indexed_dataset().IndexedDatasetBuilder
        self._tokens = builder(str(self.path / "tokens.bin"), np.int32)
        self._roles = builder(str(self.path / "roles.bin"), np.uint8)
        self._token_hash, self._role_hash = hashlib.sha256(), hashlib.sha256()
        self._rows, self._response_counts = array("q"), array("i")
        self._largest_token = -1
        self._weights: BinaryIO | None = None
        self._weight_hash = hashlib.sha256()
        self._label_numbers: dict[str, int] = {}
        self._labels = array("i")

    def add(
        self, tokens: np.ndarray, roles: np.ndarray, row: int, *, weights: np.ndarray | None = None, label: str = ""
    ) -> None:
        """Append a sample of `row` of the input: tokens int32 [n], roles uint8 [n] (1 response), n >= 1.

        `weights` fp32 [n], above 0 where the role is response and 0 elsewhere; None: the roles. `label`: its source.
        """
        self.extend(Samples(tokens, roles, np.array([tokens.size]), weights), [row], [label])

    def extend(self, samples: Samples, rows: Sequence[int], labels: Sequence[str]) -> None:
        """As `add`, for many samples; `rows` and `labels` have an entry for each."""
        tokens, roles, lengths, weights = samples.tokens, samples.roles, samples.lengths, samples.weights
        assert tokens.dtype == np.int32 and roles.dtype == np.uint8, (tokens.dtype, roles.dtype)
        assert tokens.shape == roles.shape == (lengths.sum(),) and (lengths > 0).all(), (tokens.shape, lengths)
        if not lengths.size:
            return
        for builder, values, digest in (
            (self._tokens, tokens, self._token_hash),
            (self._roles, roles, self._role_hash),
        ):
            content = values.tobytes()
            digest.update(content)
            # `add_document` for each sample, at once.
            builder.data_file.write(content)
            first = len(builder.sequence_lengths) + 1
            builder.sequence_lengths.extend(lengths.tolist())
            builder.document_indices.extend(range(first, first + lengths.size))
        if weights is not None and self._weights is None and not np.array_equal(weights, roles):
            self._weights = self._start_weights(sum(self._tokens.sequence_lengths) - tokens.size)
        if self._weights is not None:
            values = roles.astype(np.float32) if weights is None else weights
            assert values.dtype == np.float32 and np.array_equal(values > 0, roles == 1), (values.dtype, values, roles)
            self._weights.write(values.tobytes())
            self._weight_hash.update(values.tobytes())
        for label in dict.fromkeys(labels):
            self._label_numbers.setdefault(label, len(self._label_numbers))
        self._labels.extend(map(self._label_numbers.__getitem__, labels))
        self._rows.extend(rows)
        starts = np.concatenate([[0], np.cumsum(lengths[:-1])])
        responses = np.add.reduceat(roles, starts, dtype=np.int32) - roles[starts]
        self._response_counts.extend(responses.tolist())
        self._largest_token = max(self._largest_token, int(tokens.max()))

    def _start_weights(self, num_tokens: int) -> BinaryIO:
        """Begin `weights.bin` with the `num_tokens` tokens of the samples so far, whose weights are their roles."""
        self._roles.data_file.flush()
        file = open(self.path / "weights.bin", "wb")  # noqa: SIM115 – `close` closes it
        with open(self.path / "roles.bin", "rb") as roles:
            while num_tokens and (part := roles.read(min(num_tokens, 1 << 20))):
                values = np.frombuffer(part, dtype=np.uint8).astype(np.float32).tobytes()
                file.write(values)
                self._weight_hash.update(values)
                num_tokens -= len(part)
        return file

    def finalize(
        self,
        *,
        vocabulary_size: int,
        eos_token_id: int | None,
        tokenizer_fingerprint: str,
        tokenizer_path: str,
        template: str | None,
        template_source: str = NO_TEMPLATE,
        num_skipped: int = 0,
        sources: Sequence[dict[str, Any]] = (),
        notes: Mapping[str, int] | None = None,
    ) -> StoreManifest:
        """Complete the folder. ValueError if it holds no sample, or a token outside the vocabulary."""
        if not self._rows:
            raise ValueError(
                f"prepared data: {self.path} has no sample: no row of the input is usable: check the input"
            )
        if self._largest_token >= vocabulary_size:
            raise ValueError(
                f"prepared data: token {self._largest_token} is outside the vocabulary of {vocabulary_size} "
                "entries; the tokenizer's files contradict each other: repair them"
            )
        lengths = np.array(self._tokens.sequence_lengths, dtype=np.int32)
        for name, builder in (("tokens", self._tokens), ("roles", self._roles)):
            builder.finalize(str(self.path / f"{name}.idx"))
        _save(self.path / "rows.npy", np.array(self._rows, dtype=np.int64))
        _save(self.path / "response_counts.npy", np.array(self._response_counts, dtype=np.int32))
        _save(self.path / "labels.npy", np.array(self._labels, dtype=np.int32))
        digests = self._token_hash.digest() + self._role_hash.digest()
        if self._weights is not None:
            self._weights.flush()
            digests += self._weight_hash.digest()
        manifest = StoreManifest(
            data_fingerprint=hashlib.sha256(digests + lengths.tobytes()).hexdigest(),
            tokenizer_fingerprint=tokenizer_fingerprint,
            template_fingerprint=hashlib.sha256((template or NO_TEMPLATE).encode()).hexdigest(),
            num_samples=len(lengths),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_response_tokens=sum(self._response_counts),
            num_skipped=num_skipped,
            longest_sample=int(lengths.max()),
            vocabulary_size=vocabulary_size,
            eos_token_id=eos_token_id,
            template=template or NO_TEMPLATE,
            template_source=template_source,
            tokenizer_path=tokenizer_path,
            sources=list(sources),
            weighted=self._weights is not None,
            labels=list(self._label_numbers),
            notes=dict(notes or {}),
        )
        manifest.save(self.path)
        files = [path for path in self.path.iterdir() if path.is_file()]
        write_checksums(self.path, {path.name: checksum_of(path) for path in files})
        return manifest

    def close(self) -> None:
        """Release the files; the folder stays incomplete unless `finalize` was called."""
        with ExitStack() as stack:  # closes all of them, also where one has no room for its last bytes
            stack.callback(self._tokens.data_file.close)
            stack.callback(self._roles.data_file.close)
            if self._weights is not None:
                stack.callback(self._weights.close)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _save(path: Path, values: np.ndarray) -> None:
    """As `np.save`, whose own error for a full disk has neither the system's number nor its words."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    path.write_bytes(buffer.getbuffer())
