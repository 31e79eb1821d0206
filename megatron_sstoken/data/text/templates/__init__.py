"""Chat templates that come with the package, found by name, and the tokens that a template needs.

Each file `NAME.jinja` begins with a comment: models, system messages, tools, thinking, and a line `Tokens: …` that names
the tokens without which the template is of no use; `require_tokens` reads it. Generation marks hold what the model has
to write after the generation prompt, the end of the turn included.
"""

import difflib
import functools
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_sstoken.data.text.template_style import names_read
from megatron_sstoken.data.tokenizer import RESERVED, TextTokenizer

FOLDER = Path(__file__).parent
ALIASES = {
    "llama3.2": "llama3.1",
    "llama3.3": "llama3.1",
    "mixtral": "mistral",
    "qwen3-moe": "qwen3",
    "qwen3-2507": "qwen3-instruct-2507",
}
"""Other names of the same template."""
_TOKENS = re.compile(r"\A\s*\{#(?:(?!#\}).)*^\s*Tokens: ([^\n]+?)\.(?:\s|$)", re.MULTILINE | re.DOTALL)
_FUNCTIONS = frozenset(("raise_exception", "strftime_now"))  # that transformers gives to templates
_QUOTED = r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
_PIECES = re.compile(
    r"\{%(?P<left>[-+]?)\s*(?:end)?generation\s*(?P<right>[-+]?)%\}"
    r"|\{#.*?#\}"
    r"|\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}"
    rf"|\{{\{{(?:{_QUOTED}|[^\"'])*?\}}\}}"
    rf"|\{{%(?:{_QUOTED}|[^\"'])*?%\}}",
    re.DOTALL,
)


@functools.cache
def template_names() -> tuple[str, ...]:
    """Names of the templates that come with the package, without their other names (`ALIASES`)."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def find_template(name: str | Path) -> str:
    """Text of a chat template: of the file `name` where there is one, else of the one that is called so.

    Files are UTF-8; a byte order mark is no part of them. Raises ValueError for anything else, with the names.
    """
    path = Path(name)
    if not path.is_file():
        found = ALIASES.get(str(name), str(name))
        if found not in template_names():
            raise ValueError(
                f"--chat_template: {name} is neither a file nor the name of a template{_similar(str(name))}"
            )
        return _text_of(found)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat_template: {name} cannot be read ({error}): give a Jinja file in UTF-8") from error


def require_tokens(tokenizer: TextTokenizer) -> None:
    """Raise ValueError where tokens that a tokenizer's template names as its own are not in its vocabulary.

    They would be encoded as text: the model would learn to spell its end of turn, and nothing stops at that.
    """
    if missing := _missing_tokens(tokenizer.template or "", tokenizer):
        fitting = [name for name in template_names() if not _missing_tokens(_text_of(name), tokenizer)]
        raise ValueError(
            f"--chat_template: its tokens {', '.join(missing)} are not in the vocabulary of {tokenizer.path}, so that a "
            "model would learn to spell them: choose a template whose tokens it has "
            f"({', '.join(fitting) or 'none that is shipped'}), or, to spell them nevertheless, give a copy of the "
            "template without its line `Tokens:`"
        )


def require_arguments(template: str | None, arguments: Iterable[str]) -> None:
    """Raise ValueError for a template argument that the template does not read: a misspelt one would do nothing."""
    if unread := [name for name in arguments if template is None or name not in names_read(template)]:
        known = sorted(names_read(template) - RESERVED - _FUNCTIONS) if template else []
        raise ValueError(
            f"--template_arguments: the chat template does not read {', '.join(unread)}: correct the name, or leave it out "
            f"(names that it reads: {', '.join(known) or 'none'})"
        )


def without_marks(template: str) -> str:
    """The template without generation marks; it renders the same text.

    A comment takes the place of each mark, because white space around it and line breaks count alike. Only transformers
    knows marks; others refuse the whole template for them (https://github.com/abetlen/llama-cpp-python/issues/2225).
    """
    return _PIECES.sub(
        lambda piece: piece[0] if piece["left"] is None else f"{{#{piece['left']} {piece['right']}#}}", template
    )


def _similar(name: str) -> str:
    names = template_names()
    close = difflib.get_close_matches(name.lower(), [*names, *ALIASES], n=3)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{hint}: give a Jinja file, or one of {', '.join(names)}"


def _text_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _missing_tokens(template: str, tokenizer: TextTokenizer) -> list[str]:
    match = _TOKENS.match(template)
    return [token for token in match[1].split() if not _has_token(tokenizer, token)] if match else []


def _has_token(tokenizer: TextTokenizer, token: str) -> bool:
    if token == "eos_token":
        return tokenizer.eos_id is not None
    (encoding,) = tokenizer.encode_batch([token])
    return len(encoding.ids) == 1
