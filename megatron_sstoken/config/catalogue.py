"""All settings with type, default and documentation, read from the dataclasses."""

from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from megatron_sstoken.config import Settings


@dataclass(frozen=True)
class Entry:
    """One setting."""

    section: str
    key: str
    type: Any
    default: Any
    doc: str
    """Its documentation, one paragraph a line."""

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def summary(self) -> str:
        """The first sentence of the documentation."""
        text = self.doc.splitlines()[0] if self.doc else ""
        return text.split(". ")[0].removesuffix(".")

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that a value may have: those of a union, else the one."""
        return get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The words that a value may be, where they are counted."""
        return tuple(word for one in self.alternatives if get_origin(one) is Literal for word in get_args(one))

    @property
    def may_be_null(self) -> bool:
        return NoneType in self.alternatives


@cache
def sections() -> dict[str, str]:
    """Section → what it is about."""
    return {field.name: (field.type.__doc__ or "").strip() for field in fields(Settings)}


@cache
def entries() -> dict[str, Entry]:
    """`section.key` → setting, in the order in which the sections name them."""
    found = {}
    for section in fields(Settings):
        group: Any = section.type
        types, docs = get_type_hints(group), documentation(group)
        for one in fields(group):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            entry = Entry(section.name, one.name, types[one.name], default, docs[one.name])
            found[entry.name] = entry
    return found


def documentation(group: type) -> dict[str, str]:
    """Field → its documentation, one paragraph a line."""
    parameters = docstring_parser.parse_from_object(group).params
    return {
        one.arg_name: "\n".join(" ".join(part.split()) for part in (one.description or "").split("\n\n"))
        for one in parameters
    }
