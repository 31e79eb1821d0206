"""Generation marks of a chat template: `{% generation %} … {% endgeneration %}` around what the assistant says."""

from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension

from megatron_sstoken.data.text.limits import BadTemplate


def parse_template(template: str) -> nodes.Template:
    """The syntax tree of a Jinja chat template, in which a generation mark is a `Scope`, which nothing else is.

    Raises `ValueError` if it does not parse.
    """
    environment = jinja2.Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template: line {error.lineno}: {error}: correct the template") from error
    except RecursionError as error:
        raise BadTemplate("chat template: it is nested too deeply: use another template") from error


def has_generation_marks(template: str) -> bool:
    """Whether a Jinja chat template marks what the assistant says with `{% generation %}`.

    Raises `ValueError` if it does not parse, or if a mark is where transformers reports wrong positions: it
    counts the characters yielded so far, and a macro, call, filter, set block or recursive loop yields
    nothing until its end.
    """
    tree = parse_template(template)
    blocks = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Scope)
    buffered = [*tree.find_all(blocks), *(loop for loop in tree.find_all(nodes.For) if loop.recursive)]
    for block in buffered:
        for mark in block.find_all(nodes.Scope):
            raise ValueError(
                f"chat template: line {mark.lineno}: a generation mark inside a macro, call, filter, set "
                "block, recursive loop or another mark cannot be located: move the mark out of it"
            )
    return tree.find(nodes.Scope) is not None


class _GenerationTag(Extension):
    """Parses `{% generation %} … {% endgeneration %}` into a `Scope` node, which nothing else produces."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)
