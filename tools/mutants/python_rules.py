"""Wrong edits of Python sources, found on the syntax tree. Constructors of configs (classmethods) are left
out: their numbers are those of released models and are held against the files themselves."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

from mutants.mutant import Mutant

EPSILON = 1e-3  # floats up to this one are taken for epsilons
# name of a function -> the one to call in its place
EXCHANGED = {
    "silu": "gelu", "SiLU": "GELU", "sigmoid": "tanh", "cos": "sin", "sin": "cos", "exp": "exp2",
    "ceil": "floor",
}  # fmt: skip
WORDS = {'"tanh"': '"none"', '"none"': '"tanh"', '"nearest-exact"': '"bilinear"'}
FLAGS = {"causal", "is_causal", "elementwise_affine", "bias", "has_bias", "upsample", "downsample"}
SIGNS: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+"}
FACTORS: dict[type[ast.operator], str] = {ast.Mult: "/", ast.Div: "*"}
COMPARED: dict[type[ast.cmpop], str] = {ast.Lt: "<=", ast.Gt: ">=", ast.LtE: "<", ast.GtE: ">"}


def python_mutants(root: Path, file: str) -> list[Mutant]:
    """Every mutant of one source file, in the order of its lines."""
    text = (root / file).read_text(encoding="utf-8")
    finder = _Finder(file, text)
    finder.visit(ast.parse(text))
    return sorted(finder.found, key=lambda mutant: (mutant.start, mutant.end, mutant.rule))


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.found: list[Mutant] = []
        self.path: list[str] = []
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.bytes = text.encode()

    # where ------------------------------------------------------------------------------------------------

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        names = {name.id for name in node.decorator_list if isinstance(name, ast.Name)}
        if "classmethod" not in names:
            self._inside(node)

    def _inside(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self.path.append(node.name)
        for child in node.body:
            self.visit(child)
        if isinstance(node, ast.FunctionDef):
            for default in node.args.defaults:
                self.visit(default)
        self.path.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages are not arithmetic."""

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    @property
    def _computes(self) -> bool:
        """Not in a constructor: there a wrong sum or order is a wrong shape, and nothing is computed."""
        return bool(self.path) and self.path[-1] != "__init__"

    # rules ------------------------------------------------------------------------------------------------

    def visit_Constant(self, node: ast.Constant) -> None:
        value, written = node.value, self._text(node)
        if type(value) is float and 0 < value <= EPSILON:
            self._add("epsilon x 10", node, repr(value * 10))
        elif type(value) is float:
            self._add("number", node, repr(value * 1.25 if value else 1.0))
        elif written in WORDS:
            self._add("activation", node, WORDS[written])

    def visit_BinOp(self, node: ast.BinOp) -> None:
        for rule, table in (("sign", SIGNS), ("product", FACTORS)):
            if type(node.op) in table and self._computes:
                self._operator(rule, node, node.left, node.right, table[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant) and self._computes:
            self._add("sign", node, self._text(node.operand))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            self._operator("comparison", node, node.left, node.comparators[0], COMPARED[type(node.ops[0])])
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and not isinstance(node.value, ast.Tuple):
            self._neighbours("order of parts", target.elts)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("cat", "stack") and node.args and isinstance(node.args[0], ast.List):
            self._neighbours(f"order of {name}", node.args[0].elts)
        elif name in EXCHANGED:
            function = self._text(node.func)
            self._add("activation", node.func, function[: -len(name)] + EXCHANGED[name])
        elif self._computes:
            plain = [arg for arg in node.args if isinstance(arg, ast.Name | ast.Attribute)]
            if len(plain) == len(node.args):
                self._neighbours("order of arguments", node.args)
        for keyword in node.keywords:
            if keyword.arg in FLAGS and isinstance(keyword.value, ast.Constant):
                self._add("flag", keyword.value, str(not keyword.value.value))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """norm1 for norm2 and the like; not where it is defined."""
        is_dtype = isinstance(node.value, ast.Name) and node.value.id == "torch"
        if node.attr[-1:] in "12" and isinstance(node.ctx, ast.Load) and not is_dtype:
            written = self._text(node)
            self._add("first for second", node, written[:-1] + "21"[int(written[-1]) - 1])
        self.generic_visit(node)

    # edits ------------------------------------------------------------------------------------------------

    def _neighbours(self, rule: str, nodes: list[ast.expr]) -> None:
        for first, second in pairwise(nodes):
            begin, end = self._span(first)[0], self._span(second)[1]
            between = self.text[self._span(first)[1] : self._span(second)[0]]
            swapped = self._text(second) + between + self._text(first)
            self._edit(rule, first.lineno, begin, end, swapped)

    def _operator(self, rule: str, whole: ast.expr, left: ast.expr, right: ast.expr, after: str) -> None:
        """Replaces what stands between two operands, brackets and line ends kept."""
        first, last = self._span(whole)
        begin, end = self._span(left)[1], self._span(right)[0]
        operator = self.text[begin:end].strip("() \n")
        at = self.text.index(operator, begin)
        mutated = self.text[first:at] + after + self.text[at + len(operator) : last]
        self._edit(rule, whole.lineno, first, last, mutated)

    def _add(self, rule: str, node: ast.expr, after: str) -> None:
        begin, end = self._span(node)
        self._edit(rule, node.lineno, begin, end, after)

    def _edit(self, rule: str, line: int, start: int, end: int, after: str) -> None:
        before = self.text[start:end]
        if before != after:
            where = ".".join(self.path) or "module"
            self.found.append(Mutant(self.file, line, where, rule, start, end, before, after))

    def _span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int, column: int) -> int:
        """The syntax tree counts bytes; edits count characters."""
        return len(self.bytes[: self.starts[line - 1] + column].decode())

    def _text(self, node: ast.expr) -> str:
        begin, end = self._span(node)
        return self.text[begin:end]
