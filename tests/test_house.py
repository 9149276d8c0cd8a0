"""The house: which file may import which, and how easy the lines of the five modules are.

Everything is read from the source; nothing is run.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FIVE = ("model.py", "skip.py", "generate.py", "search.py", "eval.py")
MOST_LINES = 1600  # of the five together
MOST_PER_100 = {"comprehensions": 6, "tuple assignments": 2, "conditional expressions": 3}

LEVELS = (
    "model",
    "data",
    "skip",
    "generate",
    "tools",
    "search",
    "eval",
)  # arrows point to the left
SCRIPTS = ("train", "sweep", "uniform", "figures")  # in tools/, may import search and eval


def project_files() -> list[str]:
    """Every Python file but the tests, as paths below the root."""
    folders = (ROOT, ROOT / "data", ROOT / "data" / "demo", ROOT / "tools")
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in folder.glob("*.py"))


def read_tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


# ---------------------------------------------------------------- imports


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether a function makes it) of every import outside the main block."""
    for node in ast.iter_child_nodes(tree):
        if is_main_block(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that does not say from where"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, inside or is_function)


def file_of(name: str) -> str | None:
    """Our file that a dotted name stands in or is; None if it is somebody else's."""
    parts = name.split(".")
    while parts:
        path = "/".join(parts)
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / file).is_file():
                return file
        parts.pop()
    return None


def arrows(file: str) -> set[str]:
    """Our files that a file imports."""
    found = {file_of(name) for name, _ in imports(read_tree(file))}
    return found - {None, file}


def level(file: str) -> int:
    return LEVELS.index(Path(file).parts[0].removesuffix(".py"))


def is_allowed(file: str, other: str) -> bool:
    """Whether one of our files may import another."""
    script = file in [f"tools/{name}.py" for name in SCRIPTS]
    if other in [f"tools/{name}.py" for name in SCRIPTS]:
        return False  # nothing imports a script
    if (file, other) == ("search.py", "eval.py") or (script and other in ("search.py", "eval.py")):
        return True
    if (file, other) == ("eval.py", "search.py"):
        return False
    same_folder = level(file) == level(other)
    return same_folder or level(other) < level(file)


@pytest.mark.parametrize("file", project_files())
def test_arrows_run_one_way(file):
    assert [other for other in sorted(arrows(file)) if not is_allowed(file, other)] == []


def test_no_circle_of_imports():
    left = {file: arrows(file) for file in project_files()}
    free = {file for file in left if not left[file]}
    while free:
        left = {file: others - free for file, others in left.items() if file not in free}
        free = {file for file in left if not left[file]}
    assert left == {}, "these import one another in a circle"


def requirements() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.split(r"[^\w-]", line)[0] for line in lines}


@pytest.mark.parametrize("file", project_files())
def test_only_optional_packages_are_imported_inside_functions(file):
    always = requirements() | set(sys.stdlib_module_names)
    for name, inside in imports(read_tree(file)):
        top = name.split(".")[0]
        assert not inside or (top not in always and file_of(name) is None), name


def test_the_checks_see_what_they_should():
    source = (
        "import data\ndef f():\n    import model\nif __name__ == '__main__':\n    import eval\n"
    )
    assert list(imports(ast.parse(source))) == [("data", False), ("model", True)]
    assert file_of("data.prompts.STAGES") == "data/prompts.py"
    assert file_of("data.stop") == "data/__init__.py"
    assert file_of("model.InputError") == "model.py"
    assert file_of("torch.nn") is None
    assert is_allowed("search.py", "eval.py") and not is_allowed("eval.py", "search.py")
    assert is_allowed("tools/sweep.py", "eval.py") and not is_allowed("tools/plan.py", "eval.py")
    assert not is_allowed("data/prompts.py", "skip.py") and not is_allowed("model.py", "data/a.py")
    assert not is_allowed("tools/setup.py", "tools/sweep.py")


# ---------------------------------------------------------------- easy lines


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def code_lines(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*empty, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def count_dense(tree: ast.AST) -> dict[str, int]:
    """How often the constructs of MOST_PER_100 stand there."""
    found = dict.fromkeys(MOST_PER_100, 0)
    for node in ast.walk(tree):
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            found["comprehensions"] += 1
        if isinstance(node, ast.IfExp):
            found["conditional expressions"] += 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            found["tuple assignments"] += sum(isinstance(t, ast.Tuple) for t in node.targets)
    return found


def test_counts_of_lines_and_constructs():
    source = (
        '"""Doc\n\nstring."""\n\na, b = 1, 2  # one\n# a comment\nc = [x if x else b for x in a]\n'
    )
    source += "def f():\n    'doc'\n    return (\n        a\n    )\n"
    assert code_lines(source) == 6
    assert list(count_dense(ast.parse(source)).values()) == [1, 1, 1]


def test_the_five_modules_are_short():
    assert sum(len((ROOT / file).read_text().splitlines()) for file in FIVE) <= MOST_LINES


def test_the_five_modules_have_easy_lines():
    code = sum(code_lines((ROOT / file).read_text()) for file in FIVE)
    for what, most in MOST_PER_100.items():
        found = sum(count_dense(read_tree(file))[what] for file in FIVE)
        assert 100 * found / code <= most, f"{found} {what} in {code} lines of code"


@pytest.mark.parametrize("file", project_files())
def test_lines_have_at_most_100_columns(file):
    lines = (ROOT / file).read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
