"""Forks of the stages: the list in data/prompts.py is replaced, and nothing else.

Each is a copy of the project whose list is another; every command then runs with it, on a model
that has never seen such prompts: how it answers does not matter here.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TWO = """STAGES = [
    Stage("reason", "\\nReason:", recall_target),
    Stage("answer", "\\nAnswer:", answer_target, quoted=False),
]
"""
FOUR = """STAGES = [
    Stage("recall", "\\nRecall:", recall_target),
    Stage("analyze", "\\nAnalyze:", analyze_targets, each_option),
    Stage("doubt", "\\nDoubt:", recall_target),
    Stage("summarize", "\\nSummarize:", answer_target, quoted=False),
]
"""
RUN = """
import importlib, sys
import search, tools.clock
from tools.command import run
tools.clock.KNOTS, search.ROUNDS = 2, 1  # how fast a step is does not matter here
for line in sys.argv[1].splitlines():
    name, *sys.argv[1:] = line.split()
    sys.argv[0] = name
    print(f"== {line}")
    run(importlib.import_module(name).main)
"""


def forked(folder: Path, stages: str) -> Path:
    """A copy of the project in which the list of stages is another."""
    for part in (".", "data", "data/demo", "tools"):
        (folder / part).mkdir(exist_ok=True)
        for file in (ROOT / part).iterdir():
            if file.suffix in (".py", ".json", ".jsonl"):
                shutil.copy(file, folder / part / file.name)
            if file.suffix == ".jsonl":  # four questions are enough
                few = file.read_text().splitlines(keepends=True)[:4]
                (folder / part / file.name).write_text("".join(few))
    (folder / "data/demo/model").symlink_to(ROOT / "data/demo/model")
    prompts = folder / "data/prompts.py"
    source = prompts.read_text()
    changed = re.sub(r"^STAGES = \[\n.*?^\]\n", lambda _: stages, source, flags=re.M | re.S)
    assert changed != source
    prompts.write_text(changed)
    return folder


def run(folder: Path, *commands: str) -> str:
    """Commands, one after another in one process: what they print."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, "\n".join(commands)],
        cwd=folder,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small(make_checkpoint) -> Path:
    """A model of six sub-layers, with room for the demo's questions."""
    return make_checkpoint(max_position_embeddings=2048)


@pytest.mark.parametrize("stages", [TWO, FOUR], ids=["two", "four"])
def test_every_command_runs_with_other_stages(tmp_path, small, stages):
    folder = forked(tmp_path, stages)
    names = re.findall(r'Stage\("(\w+)"', stages)
    ones = ",".join("1" for _ in names)
    few = f"--model {small} --data data/demo --max-new-tokens 8 --limit 2"
    commands = [
        "eval --max-new-tokens 4 --limit 1 --json default.json",  # the demo with its plan
        f"eval {few} --stage-budgets {ones} --compare --method random --json compare.json",
        f"search {few} --step 3 --out plan.json --epsilon 1",
        f"eval {few} --plan plan.json --json planned.json --texts texts.jsonl",
        f"tools.sweep {few} --step 3 --json sweep.json",
    ]
    if importlib.util.find_spec("matplotlib"):
        commands.append("tools.figures compare.json plan.json sweep.json --out pictures")
    printed = run(folder, *commands)

    first = printed.split("== ")[1]
    note = f"note: plan.json of the demo is for 3 stages, not {len(names)}: left aside"
    assert first.splitlines().count(note) == 1
    report = json.loads((folder / "default.json").read_text())
    assert [entry["budgets"] for entry in report["runs"]] == [[0] * len(names)] * 2
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["stages"] == names and len(plan["budgets"]) == len(plan["rankings"]) == len(names)
    assert {trial["stage"] for trial in plan["trials"]} == {*names, "exit"}
    planned = json.loads((folder / "planned.json").read_text())
    assert planned["runs"][1]["budgets"] == plan["budgets"]
    for entry in planned["runs"]:
        assert [stage["name"] for stage in entry["stages"]] == names
    for line in (folder / "texts.jsonl").read_text().splitlines():
        assert [stage["name"] for stage in json.loads(line)["stages"]] == names
    sweep = json.loads((folder / "sweep.json").read_text())
    assert sweep["kind"] == "sweep" and len(sweep["runs"]) == 1 + len(names)
    if importlib.util.find_spec("matplotlib"):
        drawn = {file.stem for file in (folder / "pictures").iterdir()}
        assert {"compare", "plan-plan", "sweep-accuracy", "sweep-tokens"} <= drawn


def test_a_wording_that_is_changed_in_one_file_is_everybodys(tmp_path, small):
    """It evaluates, searches and trains; a plan that was found with the old one is told of."""
    stages = re.search(
        r"^STAGES = \[\n.*?^\]\n", (ROOT / "data/prompts.py").read_text(), re.M | re.S
    )
    folder = forked(tmp_path, stages[0].replace("Recall:", "Remember:"))
    few = f"--model {small} --data data/demo --max-new-tokens 4 --limit 1"
    run(
        folder,
        f"search {few} --step 6 --out plan.json --epsilon 1",
        f"eval {few} --plan plan.json --texts texts.jsonl",
    )
    for line in (folder / "texts.jsonl").read_text().splitlines():
        for stage in json.loads(line)["stages"]:
            for prompt in stage["prompts"]:
                assert "\nRemember:" in prompt and "\nRecall:" not in prompt
    printed = run(ROOT, f"eval {few} --plan {folder / 'plan.json'} --stage-budgets 1,1,1")
    assert "note: plan.json was found with other prompts" in printed
    code = (
        "from data.prompts import pieces, worked; from data.questions import *;"
        "q = read_questions(locate('demo', 'train'))[0]; print(worked(q), pieces(q))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout.count("Remember:") == 2 and "Recall:" not in done.stdout
