"""Chat templates that write what messages say and never look at it: what else they write depends on the roles alone."""

from collections.abc import Iterable
from typing import Literal

from jinja2 import nodes

from megatron_sstoken.data.text.marks import parse_template

Kind = Literal["clean", "content", "messages"]
"""What an expression holds: nothing of what messages say; a text that holds contents as they are, or trimmed; a message or
a list of messages."""

_METHODS = frozenset((*dir(dict), *dir(list)))
_TYPE_TESTS = frozenset(
    ("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true", "false")
)
"""Have one answer for all contents, which are texts."""
_FUNCTIONS = ("namespace", "raise_exception", "range")


def is_verbatim(template: str) -> bool:
    """Whether all conversations with the same roles give the same text around their contents.

    True only if that can be read off the template's syntax, for messages of a role and a content, without tools. Contents
    may lose the whitespace at their ends. Raises as `parse_template`.
    """
    reader = _Reader()
    tree = parse_template(template)
    while reader.learns_names(tree):
        pass
    return reader.allows(tree.body)


class _Reader:
    def __init__(self) -> None:
        self._names: dict[str, Kind] = {"messages": "messages"}

    def learns_names(self, tree: nodes.Template) -> bool:
        """Whether an assignment or loop gives contents or messages to a name that was not known to hold them."""
        before = dict(self._names)
        given: list[tuple[nodes.Node, nodes.Node]] = [
            (found.target, found.node) for found in tree.find_all(nodes.Assign)
        ]
        given += [(found.target, found.iter) for found in tree.find_all(nodes.For)]
        for target, value in given:
            kind = self._kind(value)
            if isinstance(target, nodes.Name) and kind is not None and kind != "clean":
                mixed = self._names.get(target.name, kind) != kind
                self._names[target.name] = "messages" if mixed else kind  # of messages nothing may be written
        return self._names != before

    def allows(self, statements: Iterable[nodes.Node]) -> bool:
        return all(map(self._allows, statements))

    def _allows(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Output():
                return all(self._kind(one) in ("clean", "content") for one in node.nodes)
            case nodes.Scope():
                return self.allows(node.body)
            case nodes.If():
                answer = self._answer(node.test)
                taken = node.body if answer is not False else []
                others = (*node.elif_, *node.else_) if answer is not True else ()
                return (answer is not None or self._is_clean(node.test)) and self.allows((*taken, *others))
            case nodes.For() if self._answer(node.iter) is False:
                return self.allows(node.else_)
            case nodes.For():
                known = isinstance(node.target, nodes.Name) or self._kind(node.iter) == "clean"
                test = node.test is None or self._kind(node.test) == "clean"
                iterable = self._kind(node.iter) in ("clean", "messages")
                return known and test and iterable and not node.recursive and self.allows((*node.body, *node.else_))
            case nodes.Assign():
                kind = self._kind(node.node)
                return kind == "clean" or (isinstance(node.target, nodes.Name) and kind is not None)
            case nodes.Continue() | nodes.Break():
                return True
        return False

    def _kind(self, node: nodes.Node) -> Kind | None:
        """None: the expression may depend on what contents say."""
        match node:
            case nodes.Name():
                return self._names.get(node.name, "clean")
            case nodes.Getattr():
                return self._part(node.node, node.attr)
            case nodes.Getitem(arg=nodes.Const(value=key)):
                return self._part(node.node, key)
            case nodes.Getitem():
                number = isinstance(node.arg, nodes.Slice | nodes.Add | nodes.Sub | nodes.Neg)
                whole = self._kind(node.node)
                allowed = whole == "clean" or (whole == "messages" and number)
                return whole if allowed and self._is_clean(node.arg) else None
            case nodes.Add() | nodes.Concat():
                return self._joined(node.iter_child_nodes())
            case nodes.Or(right=nodes.Const(value="")) if self._kind(node.left) == "content":
                return "content"
            case nodes.CondExpr():
                return self._either(node) if self._is_clean(node.test) else None
            case nodes.Compare(ops=[nodes.Operand(op="in" | "notin", expr=owner)]) if self._kind(owner) == "messages":
                return "clean" if isinstance(node.expr, nodes.Const) else None
            case nodes.Filter():
                return self._filtered(node)
            case nodes.Test() if node.name in _TYPE_TESTS:
                return "clean" if self._kind(node.node) else None
            case nodes.Call():
                called = node.node
                if isinstance(called, nodes.Getattr) and called.attr == "strip" and not (node.args or node.kwargs):
                    return self._joined([called.node])
                method = isinstance(called, nodes.Getattr) and self._is_clean(called.node)
                known = method or (isinstance(called, nodes.Name) and called.name in _FUNCTIONS)
                arguments = (*node.args, *node.kwargs)
                plain = node.dyn_args is None and node.dyn_kwargs is None and all(map(self._is_clean, arguments))
                return "clean" if known and plain else None
        return "clean" if all(map(self._is_clean, node.iter_child_nodes())) else None

    def _answer(self, test: nodes.Node) -> bool | None:
        """Of a test about what these conversations do not have, tools and further keys of messages; None: of another."""
        match test:
            case nodes.Not():
                answer = self._answer(test.node)
                return None if answer is None else not answer
            case nodes.And() | nodes.Or():
                ends = isinstance(test, nodes.Or)
                left, right = self._answer(test.left), self._answer(test.right)
                if ends in (left, right) and (left == ends or self._is_clean(test.left)):
                    return ends
                return right if left == (not ends) else None
            case nodes.Test(name="defined"):
                return False if self._is_absent(test.node) else None
            case nodes.List(items=[]):
                return False
            case nodes.Compare(expr=nodes.Const(value=key), ops=[nodes.Operand(op="in" | "notin" as op, expr=owner)]):
                lacks = self._kind(owner) == "messages" and key not in ("role", "content")
                return op == "notin" if lacks else None
        return False if self._is_absent(test) or (isinstance(test, nodes.Name) and test.name == "tools") else None

    def _is_absent(self, node: nodes.Node) -> bool:
        """Whether it is a key that messages of a role and a content lack."""
        if isinstance(node, nodes.Getattr):
            key: object = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            key = node.arg.value
        else:
            return False
        owner = self._kind(node.node) == "messages"
        return owner and isinstance(key, str) and key not in {"role", "content", *_METHODS}

    def _is_clean(self, node: nodes.Node) -> bool:
        return self._kind(node) == "clean"

    def _part(self, node: nodes.Expr, key: object) -> Kind | None:
        whole = self._kind(node)
        if whole == "clean":
            neighbour = isinstance(node, nodes.Name) and node.name == "loop" and key in ("previtem", "nextitem")
            return "messages" if neighbour else "clean"
        if whole != "messages" or key in _METHODS:
            return None
        if key == "content":
            return "content"
        return "clean" if isinstance(key, str) else "messages"

    def _joined(self, parts: Iterable[nodes.Node]) -> Kind | None:
        kinds = {self._kind(part) for part in parts}
        if not kinds <= {"clean", "content"}:
            return None
        return "content" if "content" in kinds else "clean"

    def _either(self, node: nodes.CondExpr) -> Kind | None:
        kinds = {self._kind(part) for part in (node.expr1, node.expr2) if part is not None}
        return (
            "messages" if kinds == {"messages"} else self._joined([part for part in (node.expr1, node.expr2) if part])
        )

    def _filtered(self, node: nodes.Filter) -> Kind | None:
        kind = None if node.node is None else self._kind(node.node)
        arguments = (*node.args, *node.kwargs)
        if kind == "content" and node.name in ("trim", "string") and not arguments:
            return "content"
        if kind == "messages" and node.name in ("length", "count"):
            return "clean"
        return "clean" if kind == "clean" and node.name != "random" and all(map(self._is_clean, arguments)) else None
