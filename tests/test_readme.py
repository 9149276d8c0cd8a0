"""The README tells the truth: files, commands, and the fork example."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from data.questions import parse_question

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "figures/README.md", "data/demo/README.md"])
def test_everything_linked_or_shown_is_there(page):
    links = re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / page).read_text())
    assert links
    for target in links:
        assert ((ROOT / page).parent / target).exists(), target


def example_with(text: str) -> str:
    """The one Python example of the README that holds a text."""
    (found,) = (e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in e)
    return found


def test_the_notebook_example_says_what_each_stage_said_and_how_sure_it_was():
    code = example_with("pipeline.answer")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    stages = [line.split(" ", 1)[0] for line in lines]
    assert stages == ["recall", *["analyze"] * 4, "summarize"], done.stderr
    assert "the answer is option" in lines[-1]
    assert all(re.search(r" eos \[(0\.\d+|1\.0)(, (0\.\d+|1\.0))*\]$", line) for line in lines)


def test_a_question_of_the_readme_is_one():
    line = re.search(r"```json\n(.*?)```", README, re.DOTALL)[1]
    question = parse_question(json.loads(line))
    assert question.recall and question.analyses and question.answer == "A"


def test_the_fork_example_is_short_and_runs(folder, tmp_path):
    example = example_with("def warm_up")
    assert len(example.splitlines()) < 20
    end = 'if __name__ == "__main__":'
    fork = (ROOT / "skip.py").read_text().replace(end, f"{example}\n\n{end}")
    (tmp_path / "skip.py").write_text(fork)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import torch; from skip import *;"
        "rankings = [[(2, 1), (3, 1)]] * 3;"
        "setting = Setting(Importance(torch.zeros(6, 2), torch.ones(6, 2)), rankings);"
        "print([POLICIES['warm-up'](setting, 1)(step).nonzero().tolist() for step in (0, 1, 2)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[[], [], [[2, 1]]]", done.stderr


COMMANDS = ["eval", "search", "generate", "skip", "tests.bench"]
COMMANDS += [f"tools.{name}" for name in ("train", "sweep", "uniform", "figures")]
COMMANDS += ["data.prepare"]
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
        source = (ROOT / script).read_text() + (ROOT / "tools/flags.py").read_text()
        for flag in re.findall(r"--[\w-]+", rest.split("#")[0]):
            assert f'"{flag}"' in source, (script, flag)
