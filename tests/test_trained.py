"""What is trained beside the weights: its training, its file, and the commands that use it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import generate as generation
from data.questions import read_questions
from generate import Timings, generate
from model import InputError, Llama, ModelArgs
from tools import ask, checkpoint, train
from tools.command import run as run_command
from tools.gates import Gates
from tools.plan import check_model, checkpoint_digests
from tools.routers import Routers
from tools.setup import load as load_pipeline
from tools.tokenwise import TokenHook, TokenSkip
from tools.trained import ROUTERS, Trained, method_of, multiply_adds, read_beside, write_beside

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"
KINDS = {"gateskip": Gates, "dlo": Routers}
FLAGS = {"gateskip": ["--gates", "--gate-share", "0.3"], "dlo": ["--routers", "--capacity", "0.7"]}


def call(monkeypatch, main, *argv) -> int:
    """Runs a command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    try:
        run_command(main)
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "some.jsonl"
    lines = (DEMO / "train.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:40]))
    return file


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The demo's tokenizer, and a random model that is smaller than the demo's."""
    folder = tmp_path_factory.mktemp("start")
    shape = json.loads((DEMO / "config.json").read_text())
    shape |= {"hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(shape))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, folder / name)
    llama = train.initialize(ModelArgs.from_config(shape), 0.05, 0)
    checkpoint.save_model(llama, folder, torch.float32)
    return folder


def training(start, data, out, *more) -> list:
    flags = ["--model", start, "--data", data, "--out", out, "--steps", 8, "--batch-size", 8]
    return [*flags, "--save-every", 2, "--warmup", 2, "--lr", 0.01, *more]


@pytest.fixture(scope="module", params=KINDS)
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def out(start, data, method, tmp_path_factory):
    """The folder of a short training with gates or routers."""
    folder = tmp_path_factory.mktemp("out") / method
    with pytest.MonkeyPatch.context() as patch:
        flags = training(start, data, folder, *FLAGS[method])
        assert call(patch, train.main, *flags, "--valid", data) == 0
    return folder


# ---------------------------------------------------------------- training


def test_training_lowers_the_loss(start, data, method, tmp_path, monkeypatch, capsys):
    flags = training(start, data, tmp_path / "new", *FLAGS[method], "--valid", data)
    assert call(monkeypatch, train.main, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if "validation loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_in_two_parts_ends_with_the_same_weights(
    start, data, method, out, tmp_path, monkeypatch
):
    flags = training(start, data, tmp_path / "new", *FLAGS[method], "--valid", data)
    save = train.save_state

    def killed(*args):
        save(*args)
        if args[3] == 4:  # the step
            raise InputError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", killed)
        assert call(monkeypatch, train.main, *flags) == 2
    assert not (tmp_path / "new" / ROUTERS).exists()
    assert call(monkeypatch, train.main, *flags) == 0
    assert not (tmp_path / "new" / checkpoint.RESUME).exists()
    for name in (checkpoint.WEIGHTS, ROUTERS):
        whole = load_file(out / name)
        parts = load_file(tmp_path / "new" / name)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_gates_and_routers_move(out, method):
    llama = Llama.from_pretrained(out)
    module = read_beside(llama, pack=False)
    new = KINDS[method](3, 32)
    new.initialize(0)
    for name, parameter in new.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, module.get_parameter(name)), name


@pytest.mark.parametrize(
    "more",
    [
        ["--gates", "--routers"],
        ["--gates", "--stochastic-depth", "0.1"],
        ["--routers", "--freeze-below", "1"],
        ["--gates", "--gate-share", "2"],
        ["--routers", "--capacity", "-1"],
    ],
)
def test_what_does_not_go_together_is_refused(start, data, tmp_path, monkeypatch, capsys, more):
    flags = ["--model", start, "--data", data, "--out", tmp_path / "new", *more]
    assert call(monkeypatch, train.main, *flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (more[0] in err or more[-2] in err)


def test_ordinary_training_says_and_drops_what_was_beside(
    out, data, method, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(out, tmp_path / "copy")
    flags = ["--model", folder, "--data", data, "--out", folder, "--steps", 1, "--batch-size", 4]
    assert call(monkeypatch, train.main, *flags) == 0
    err = capsys.readouterr().err
    assert f"{folder / ROUTERS} is not used" in err
    assert f"{folder / ROUTERS}: of the former weights, deleted" in err
    assert not (folder / ROUTERS).exists()


# ---------------------------------------------------------------- the file


def test_what_was_written_is_read(folder, tmp_path, method):
    copy = shutil.copytree(folder, tmp_path / "copy")
    module = KINDS[method](3, 32)
    for parameter in module.parameters():
        parameter.data.normal_()
    write_beside(module, copy)
    assert method_of(copy) == method
    again = read_beside(Llama.from_pretrained(copy), pack=False)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, again.get_parameter(name))
    wide = read_beside(Llama.from_pretrained(copy, dtype=torch.bfloat16), pack=True)
    assert next(wide.parameters()).dtype == torch.bfloat16


def test_digests_have_the_routers_only_where_they_are(folder, out):
    usual = {"config", "weights", "tokenizer", "tokenizer_settings"}
    assert set(checkpoint_digests(folder)) == usual
    assert set(checkpoint_digests(out)) == usual | {"routers"}


def changed(out: Path, folder: Path, edit) -> Path:
    """A copy of a folder whose routers' (tensors, metadata) were edited."""
    copy = shutil.copytree(out, folder / "copy")
    tensors = load_file(out / ROUTERS)
    metadata = {"method": method_of(out), "weights": checkpoint_digests(out)["weights"]}
    edit(tensors, metadata)
    save_file(tensors, copy / ROUTERS, metadata)
    return copy


def no_method(tensors, metadata):
    del metadata["method"]


def unknown_method(tensors, metadata):
    metadata["method"] = "magic"


def other_weights(tensors, metadata):
    metadata["weights"] = "0" * 64


def one_missing(tensors, metadata):
    del tensors[min(tensors)]


def one_more(tensors, metadata):
    tensors["more"] = torch.zeros(1)


def other_shape(tensors, metadata):
    tensors[min(tensors)] = torch.zeros(2, 2)


def not_finite(tensors, metadata):
    tensors[min(tensors)][0] = float("nan")


EDITS = [no_method, unknown_method, other_weights, one_missing, one_more, other_shape, not_finite]


@pytest.mark.parametrize("edit", EDITS)
def test_a_wrong_file_is_one_line(out, method, tmp_path, edit):
    copy = changed(out, tmp_path, edit)
    with pytest.raises(InputError) as e:
        method_of(copy)
        read_beside(Llama.from_pretrained(copy), pack=False)
    assert str(copy / ROUTERS) in str(e.value) and "\n" not in str(e.value)


def test_half_a_file_is_one_line(out, tmp_path):
    copy = shutil.copytree(out, tmp_path / "copy")
    whole = (out / ROUTERS).read_bytes()
    (copy / ROUTERS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=ROUTERS):
        method_of(copy)


def test_a_plan_belongs_to_its_routers(out, folder, tmp_path):
    """A plan without a routers digest is of a folder without routers: old plans stay valid."""
    stored = {"model": {"name": "x", **checkpoint_digests(folder)}}
    check_model(Path("plan.json"), stored, folder)
    stored = {"model": {"name": "x", **checkpoint_digests(out)}}
    check_model(Path("plan.json"), stored, out)
    del stored["model"]["routers"]
    with pytest.raises(InputError, match="routers digest is none"):
        check_model(Path("plan.json"), stored, out)


# ---------------------------------------------------------------- calibration


def test_one_token_at_a_time_skips_as_often_as_the_budget_says(out, method, monkeypatch):
    """Each question alone, on the questions of the calibration: near the budget in every stage."""
    pipeline = load_pipeline(str(out), max_new_tokens=20)
    questions = read_questions(DEMO / "valid.jsonl")[:12]
    trained = Trained(pipeline, read_beside(pipeline.model, pack=True), questions)
    budget = 2
    for stage in (0, 1):
        table = trained.thresholds(stage, budget)
        skip = trained.steps(trained.module.hook(table))
        counts = []
        for question, stages in zip(questions, trained.answered):
            said = [result.texts for result in stages[:stage]]
            results = pipeline.run_stage(stage, [question], [said], pipeline.new_caches(1), skip)
            counts += [sum(skips) for skips in results[0].timings.skips]
        assert sum(counts) / len(counts) == pytest.approx(budget, abs=0.7)
    assert trained.thresholds(0, 0).isinf().all()


# ---------------------------------------------------------------- commands


@pytest.fixture
def reported(tmp_path, monkeypatch, capsys):
    """reported(*flags) -> (report, what was printed) of eval.py on two questions of the demo."""

    def run(*flags):
        file = tmp_path / "report.json"
        more = ["--limit", 2, "--max-new-tokens", 6, "--json", file]
        assert call(monkeypatch, evaluation.main, *flags, *more) == 0
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_eval_runs_it_and_counts_its_multiply_adds(out, method, reported):
    report, printed = reported("--model", out, "--method", method, "--stage-budgets", "0,2,2")
    full, run = report["runs"]
    assert run["method"] == method and "is not used" not in printed
    shape = Llama.from_pretrained(out).args
    assert full["macs"] == multiply_adds(shape, "full", 0, 0)
    assert run["stages"][0]["macs"] == multiply_adds(shape, method, 0, 0) > full["macs"]
    assert run["stages"][0]["skipped_sublayers"] == 0
    if method == "dlo":
        for stage in run["stages"]:
            assert stage["skipped_ffn"] == stage["skipped_sublayers"]


def test_compare_has_it_skipping_nothing_too(out, method, reported):
    report, printed = reported("--model", out, "--compare", "--method", method)
    names = [(run["method"], run["budgets"]) for run in report["runs"]]
    assert names[:2] == [("full", [0, 0, 0]), (method, [0, 0, 0])]
    assert (method, [3, 3, 3]) in names
    assert (("dlo-published", [0, 0, 0]) in names) == (method == "dlo")


def test_where_it_is_not_used_it_says_so(out, reported):
    _, printed = reported("--model", out, "--stage-budgets", "1,1,1")
    assert printed.count(f"note: {out / ROUTERS} is not used\n") == 1


def test_without_the_file_compare_leaves_it_out(start, reported):
    report, printed = reported("--model", start, "--compare")
    assert not {run["method"] for run in report["runs"]} & {"gateskip", "dlo", "dlo-published"}
    assert printed.count("left out: gateskip, dlo, dlo-published") == 1


@pytest.mark.parametrize("name", ["gateskip", "dlo", "dlo-published"])
@pytest.mark.parametrize("main", [evaluation.main, ask.main])
def test_without_the_file_the_method_is_refused(start, monkeypatch, capsys, name, main):
    more = ["why?", "one", "two"] if main is ask.main else []
    assert call(monkeypatch, main, *more, "--model", start, "--method", name) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--method {name}" in err


def test_worked_examples_are_refused(out, method, monkeypatch, capsys, tmp_path):
    examples = tmp_path / "shots.jsonl"
    examples.write_text((DEMO / "train.jsonl").read_text().splitlines()[0] + "\n")
    flags = ["--model", out, "--method", method, "--limit", 1, "--shots", 1]
    assert call(monkeypatch, evaluation.main, *flags, "--shots-file", examples) == 2
    assert "--shots" in capsys.readouterr().err


def test_a_question_is_answered_with_it(out, method, monkeypatch, capsys):
    flags = ["why?", "one", "two", "--model", out, "--max-new-tokens", 5]
    status = call(monkeypatch, ask.main, *flags, "--method", method, "--stage-budgets", "2,2,2")
    assert status == 0 and "answer" in capsys.readouterr().out


# ---------------------------------------------------------------- cost


def test_multiply_adds_by_hand():
    shape = ModelArgs(
        dim=4, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=2, hidden_dim=5, vocab_size=10,
        max_seq_len=8, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True,
        attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    attention = 4 * 4 + 2 * 4 * 2 + 4 * 4  # q, k and v, o
    ffn = 3 * 4 * 5
    head = 4 * 10
    assert multiply_adds(shape, "full", 0, 0) == head + 2 * attention + 2 * ffn
    assert multiply_adds(shape, "litestage", 1.5, 1) == head + 1.5 * attention + ffn
    assert multiply_adds(shape, "gateskip", 0, 0) == head + 2 * (attention + ffn) + 4 * 16
    assert multiply_adds(shape, "dlo", 1, 1) == head + 2 * attention + ffn + 2 * 4


def test_steps_of_each_kind_count_by_their_median():
    skips = [[2, 2], [1, 1], [2, 2], [2, 2], [1, 1], [0, 2]]
    timings = Timings(1.0, [0.1, 0.2, 9.0, 0.1, 0.2, 0.2], skips, [""] * 6)
    assert timings.decode_s == pytest.approx(3 * 0.1 + 3 * 0.2)
    assert timings.share(2).decode_s == pytest.approx(timings.decode_s / 2)


class EveryOther(TokenHook):
    """Skips both sub-layers of every layer in every other step; a sub-layer takes a second."""

    def __init__(self, clock):
        super().__init__(None)
        self.clock = clock
        self.steps = 0

    def __call__(self, i, layer, x, places, kv, skip_attention, skip_ffn):
        if i == 0:
            self.steps += 1
            self.skipped = [0.0, 0.0]
        if self.steps % 2:
            self.skipped = [self.skipped[0] + 1, self.skipped[1] + 1]
            kv[:, :, places.slots] = 0
            return x
        self.clock[0] += 2
        return layer(x, places, kv)


def test_the_time_of_steps_that_differ_is_the_time_that_passed(llama, monkeypatch):
    """On a clock that only sub-layers move: six steps of 6 s and five of 0 s; 11 medians are not
    that."""
    clock = [0.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: clock[0])
    hook = EveryOther(clock)
    skip = TokenSkip(3, hook, TokenHook(None))
    skip.prefill = None
    timings = generate(llama, [5, 6, 7], 12, skip=skip).timings
    assert timings.prefill_s == 0
    assert clock[0] == timings.decode_s == sum(timings.step_s) == 30
    assert timings.skipped == pytest.approx(6 * 6 / 11)
