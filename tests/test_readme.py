"""The README tells the truth: line counts, links into the code, files, and the fork example."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MODULES = ("model.py", "skip.py", "generate.py", "search.py", "eval.py")
RUNTIME = {"torch", "safetensors", "sentencepiece", "tokenizers", "numpy", "tqdm"}
HUB = "huggingface_hub"  # tokenizers brings it along


def lines(path: str) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_the_five_modules_stay_within_1500_lines():
    total = sum(map(lines, MODULES))
    assert total <= 1500
    assert f"{total:,} lines" in README


def test_the_table_of_files_gives_their_measured_lines():
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert {file for file, _ in rows} >= set(MODULES)
    for file, count in rows:
        assert lines(file) == int(count), file


def test_links_into_the_code_point_at_what_they_name():
    links = re.findall(r"\[`([\w.]*?)(\w+)`\]\(([\w/.]+\.py)#L(\d+)\)", README)
    assert len(links) >= 6
    for owner, name, file, number in links:
        text = (ROOT / file).read_text().splitlines()[: int(number)]
        assert re.match(rf"\s*(def|class) {name}\b", text[-1]), (name, text[-1])
        above = [line for line in text if line.startswith("class ")]
        owner = owner.rstrip(".").split(".")[-1]
        if text[-1].startswith(" "):
            assert re.match(rf"class {owner}\b", above[-1]), (owner, name, above[-1])


def test_everything_linked_or_shown_is_there():
    for target in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_modules_import_nothing_but_the_runtime_packages():
    ours = {"data", *(name.removesuffix(".py") for name in MODULES)}
    files = [ROOT / name for name in MODULES] + list((ROOT / "data").glob("*.py"))
    for file in files:
        allowed = RUNTIME | ours | {HUB} | ({"matplotlib"} if file.name == "figures.py" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, (file.name, name)


def test_model_py_imports_nothing_of_ours():
    imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / "model.py").read_text(), re.MULTILINE)
    assert not {"data", "skip", "generate", "search", "eval"} & set(imported)


def test_the_fork_example_is_short_and_runs(folder, tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(example.splitlines()) < 20
    end = 'if __name__ == "__main__":'
    fork = (ROOT / "skip.py").read_text().replace(end, f"{example}\n\n{end}")
    (tmp_path / "skip.py").write_text(fork)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import torch; from skip import *;"
        "setting = Setting(Importance(torch.zeros(6, 2), torch.ones(6, 2)), [(2, 1), (3, 1)]);"
        "print([POLICIES['warm-up'](setting, 1)(step).nonzero().tolist() for step in (0, 1, 2)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[[], [], [[2, 1]]]", done.stderr


COMMANDS = ["eval", "search", "generate", "skip", "tests.bench"]
COMMANDS += [f"data.{name}" for name in ("train", "sweep", "uniform", "figures", "prepare")]
COMMANDS += [f"data.demo.{name}" for name in ("make", "tokenizer", "world")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_shows_a_command(name, monkeypatch, capsys):
    path = ROOT / f"{name.replace('.', '/')}.py"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [str(path), "-h"])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, said.splitlines())) <= 80
    assert re.search(r"^ +python |^python ", said, re.MULTILINE)


def test_every_command_of_the_readme_is_one_that_exists():
    commands = re.findall(r"^(?:python|torchrun \S+ \S+) ([\w/]+\.py)(.*)$", README, re.MULTILINE)
    assert len(commands) >= 6
    for script, rest in commands:
        source = (ROOT / script).read_text() + (ROOT / "data/cli.py").read_text()
        for flag in re.findall(r"--[\w-]+", rest.split("#")[0]):
            assert f'"{flag}"' in source, (script, flag)
