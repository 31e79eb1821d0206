"""The text model of a folder that reads images, too: taken out of it for training, and put back into it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sstoken.conversion.chat_template import export_template, own_template, take_from_processor
from megatron_sstoken.conversion.folder import ThreadWeights, copy_companions, folders_identity
from megatron_sstoken.conversion.output import check_costs, source_of, write_safetensors
from megatron_sstoken.conversion.work import ConversionOptions, Workplace, refuse_existing
from megatron_sstoken.files import write_json
from megatron_sstoken.model.families import Architecture, parse_architecture, read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import check_weights

_PLACES = ({"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
           {"model.": "model.language_model.", "lm_head.": "lm_head."})  # fmt: skip
"""How names of a text model's tensors begin → how they do in a larger one: of transformers before 4.52 and since."""
_OF_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class TextPart(HuggingFaceWeights):
    """The tensors of the text model in a folder, by the names that they have in a model of text alone.

    Raises ValueError as `HuggingFaceWeights`, and where there is no text model in it.
    """

    def __init__(self, hf_path: str):
        super().__init__(hf_path)
        self.places: dict[str, str] = {}
        """Name → name in the folder."""
        whole = super().names()
        for places in _PLACES:
            if any(name.startswith(places["model."]) for name in whole):
                self.places = {
                    text + name.removeprefix(place): name
                    for text, place in places.items()
                    for name in whole
                    if name.startswith(place)
                }
                return
        raise ValueError(f"--hf={hf_path} holds no model of text beside others: it can be used as it is, if at all")

    def names(self) -> list[str]:
        return sorted(self.places)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def slice(self, name: str) -> Any:
        return super().slice(self.places.get(name, name))

    def place(self, name: str) -> tuple[str, int, int]:
        return super().place(self.places.get(name, name))

    def others(self) -> list[str]:
        """Names of the folder's tensors that are not the text model's, sorted."""
        return sorted({*super().names()} - {*self.places.values()})


def take_text(
    hf_path: str,
    output: str,
    *,
    options: ConversionOptions | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the text model of a folder that reads images, too, as a folder of its own, its tensors bit for bit.

    `tell` hears what is left out. The output appears complete or not at all. Raises ValueError for a folder without a text
    model, or with one that is not supported, and for an output in the way.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [hf_path])
    config = _text_config(hf_path)
    reader, part = ThreadWeights(hf_path), TextPart(hf_path)
    architecture = parse_architecture(config, f"{hf_path}/config.json, text_config")
    check_weights(part, architecture)
    types = {name: part.dtype(name) for name in architecture.tensor_names()}
    sources = [source_of(reader, part.places[name], name, dtype) for name, dtype in types.items()]
    check_costs(options, sources)
    left_out = Counter(_owner(name) for name in part.others())
    dtype = types["model.embed_tokens.weight"]
    with Workplace(output, folders_identity("take-text", options, [hf_path]), options.checked(hf_path)) as place:
        write_safetensors(place, sources, options)
        copy_companions(Path(hf_path), place.folder, dtype=dtype)
        write_json(place.folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        for name in _OF_PROCESSORS:
            (place.folder / name).unlink(missing_ok=True)
        take_from_processor(place.folder)
        tell("left out: " + ", ".join(f"{owner} ({count} tensors)" for owner, count in sorted(left_out.items())))
        return place.publish()


def put_text(
    hf_path: str,
    text_path: str,
    output: str,
    *,
    options: ConversionOptions | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the folder `hf_path` anew with the text model of `text_path`, tuned since `take_text`, in place of its own.

    All other tensors stay bit for bit; those of the text have the types that they had there. `tell` hears which chat template
    it has. The output appears complete or not at all. Raises ValueError where the two do not fit, and for an output in the
    way.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [hf_path, text_path])
    whole, tuned = ThreadWeights(hf_path), ThreadWeights(text_path)
    part = TextPart(hf_path)
    whole.weights.check_files()
    architecture = parse_architecture(_text_config(hf_path), f"{hf_path}/config.json, text_config")
    _require_equal(architecture, read_architecture(text_path), f"--text={text_path} is another model than {hf_path}")
    check_weights(tuned.weights, architecture)
    sources = [source_of(whole, name, name, whole.weights.dtype(name)) for name in part.others()]
    for name in architecture.tensor_names():  # a tied head's copy, if there is one, is not written again
        sources.append(source_of(tuned, name, part.places[name], part.dtype(name)))
    check_costs(options, sources)
    read = [hf_path, text_path]
    with Workplace(output, folders_identity("put-text", options, read), options.checked(*read)) as place:
        write_safetensors(place, sources, options)
        copy_companions(Path(hf_path), place.folder, dtype=part.dtype("model.embed_tokens.weight"))
        tell(export_template(place.folder, own_template(Path(text_path))))
        return place.publish()


def _text_config(hf_path: str) -> dict[str, Any]:
    """config.json of the text model alone, with what transformers adds where text_config says nothing."""
    from transformers import AutoConfig  # takes a second, which no other conversion need wait
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = Path(hf_path, "config.json")
    try:
        whole = AutoConfig.from_pretrained(hf_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: transformers cannot read it ({str(error).partition(chr(10))[0]})") from error
    text = whole.get_text_config()
    if text is whole:
        raise ValueError(f"{path} has no text_config: it describes a model of text alone, which can be used as it is")
    config = text.to_dict() | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
    return config | ({"architectures": [name]} if name else {})


def _require_equal(first: Architecture, second: Architecture, problem: str) -> None:
    """Raise ValueError, which begins with `problem`, where two architectures differ."""
    a, b = asdict(first), asdict(second)
    if different := [f"{name} ({a[name]!r}, {b[name]!r})" for name in a if a[name] != b[name]]:
        raise ValueError(f"{problem}: they differ in {', '.join(different)}")


def _owner(name: str) -> str:
    """The part of a model that a tensor belongs to."""
    return name.removeprefix("model.").partition(".")[0]
