"""What the flags mean: checkpoint, device, threads, questions, worked examples, plans.

A notebook begins here, too:

    python -c "from tools.setup import load; print(load('demo').model.args)"
"""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import huggingface_hub
import torch

from data.prompts import STAGES, worked
from data.questions import Question, locate, read_questions
from data.tokenizer import Tokenizer
from generate import Exit, Pipeline, StageResult, importance_of
from model import DTYPES, InputError, KVCache, Llama, expect, weight_files
from skip import Importance
from tools.fast import DenseProduct, FastLayer, RecordedStepper, pack, why_not_compiled
from tools.journal import Journal
from tools.plan import (
    ROOT,
    SHIPPED,
    Choice,
    Plan,
    check_budgets,
    conditions,
    differences,
    read_plan,
    shipped_importance,
    shipped_stages,
)
from tools.progress import progress
from tools.ranks import gather
from tools.trained import METHODS, Trained, file_of, method_of, read_beside

TRIED_STEPS = 6  # decoding steps with one thread and with all, to see which is faster
GAIN = 1.1  # all threads must be faster by this factor: they are not ours alone
IMPORTANCE_QUESTIONS = 32  # enough: with more of the demo's the first half does not change
ABOUT_150 = 150  # characters of another library's message


def note(text: str) -> None:
    """One line for the reader of a result, among the results; of the first rank."""
    try:
        print(f"note: {text}")
    except OSError:
        pass  # nobody reads: no reason to stop before a file is written


def say_if_chance(interval: list[float], questions: list[Question]) -> None:
    """A note if the full model may as well have guessed, by the interval of its accuracy."""
    chance = mean(1 / len(question.labels) for question in questions)
    low, high = interval
    if low <= chance:
        note(f"chance, {chance:.1%}, is in the full model's interval, {low:.1%} to {high:.1%}")


# ---------------------------------------------------------------- the model


def load(
    model: str = "demo",
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
    shots: str = "",
    compile: bool = False,
    plain: bool = False,
) -> Pipeline:
    """A checkpoint, ready to answer.

    model: "demo", a folder, or a hub id. dtype: "float32", "bfloat16", "float16"; None: as stored.
    threads: of the CPU; None: one or all, whichever decodes faster now, unless OMP_NUM_THREADS is
    set. shots: worked examples before each prompt. compile: decoding steps as CUDA graphs or C++.
    plain: the model as model.py has it, not packed for speed. Raises InputError.
    """
    folder = find_checkpoint(model)
    place = find_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # where graphs are recorded
    torch.manual_seed(seed)
    check_memory(folder, place)
    tokenizer = Tokenizer.from_pretrained(folder)
    llama = Llama.from_pretrained(folder, place, DTYPES.get(dtype))
    tokenizer.limit = llama.args.vocab_size  # a prompt with a token beyond it is refused
    if not plain:
        llama = pack(llama)
    set_threads(llama, threads)
    pipeline = Pipeline(llama, tokenizer, max_new_tokens, shots)
    if compile and place.type == "cuda":
        pipeline.stepper = RecordedStepper(llama)
    elif compile:
        compile_steps(pipeline, folder, plain)
    return pipeline


def compile_steps(pipeline: Pipeline, folder: Path, plain: bool) -> None:
    """Has a pipeline's decoding steps compiled, or says why not. (On a CPU.)"""
    why = why_not_compiled()
    if why is not None:
        note(f"--compile: no working C++ compiler ({why}); decoding as usual")
        return
    note("--compile: takes a minute for each new skip set and number of rows")
    dense = pipeline.model  # the plain one, whose weights a compiler can read
    if not plain:
        check_memory(folder, dense.device)
        dense = pack(Llama.from_pretrained(folder, dtype=dense.dtype), DenseProduct)
    pipeline.stepper = RecordedStepper(pipeline.model, dense)


def load_asked(args, asked: "Asked", few: bool = True) -> Pipeline:
    """`load` with a command's flags, MODEL_FLAGS, to ask these questions. few: whether so few skip
    sets will come that a CPU may compile a step for each."""
    if args.compile and args.device == "cpu" and not few:
        note("--compile: too many skip sets to compile a step for each; decoding as usual")
    pipeline = load(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        shots=asked.shots,
        compile=args.compile and (few or args.device != "cpu"),
        plain=args.plain,
    )
    check_lengths(pipeline, asked)
    method = getattr(args, "method", None)
    every = method is None and getattr(args, "compare", None) is not None
    if method_of(pipeline.model.folder) and not every and method not in METHODS:
        note(f"{file_of(pipeline.model.folder)} is not used")
    return pipeline


def keep_threads(journal: Journal) -> None:
    """What is measured again goes on with the number of threads with which its journal began."""
    count = journal.once("threads", torch.get_num_threads)
    if count != torch.get_num_threads():
        note(f"threads: {count}, as the journal began")
        torch.set_num_threads(count)


def set_threads(model: Llama, asked: int | None) -> None:
    """Sets the number of threads, the first rank's for all: the one asked for, or the faster."""
    count = asked
    if asked is None:
        count = torch.get_num_threads()
        on_cpu = model.device.type == "cpu"
        if on_cpu and count > 1 and "OMP_NUM_THREADS" not in os.environ:
            count = faster_threads(model, count)
    torch.set_num_threads(gather(count)[0])


@torch.inference_mode()
def faster_threads(model: Llama, most: int) -> int:
    """One thread, or all, if they take a decoding step clearly faster, in turns. On a busy machine
    threads that wait for one another take ten times as long as one."""
    cache = KVCache(model, 1, 2 * TRIED_STEPS + 2)
    token = torch.zeros(1, 1, dtype=torch.long)
    seconds = {1: [], most: []}
    pos = 0
    for _ in range(TRIED_STEPS + 1):
        for count, taken in seconds.items():
            torch.set_num_threads(count)
            began = time.perf_counter()
            model(token, cache, pos)
            taken.append(time.perf_counter() - began)
            pos += 1
    if median(seconds[1][1:]) > GAIN * median(seconds[most][1:]):  # the first of each warms up
        return most
    return 1


def find_device(name: str) -> torch.device:
    """The device that --device names, with its index; under torchrun each rank has its own GPU."""
    if name == "cuda":
        rank_here = int(os.environ.get("LOCAL_RANK", 0))
        name = f"cuda:{rank_here % max(torch.cuda.device_count(), 1)}"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0].partition(". ")[0]
        wanted = f"--device {name}: expected cpu or a cuda"
        raise InputError(f"{wanted} ({reason:.{ABOUT_150}})") from None
    expect(device.type != "meta", "--device meta: expected one that holds numbers")
    return device


def check_memory(folder: Path, device: torch.device) -> None:
    """Raises InputError if the device has less memory free than the weights take."""
    needed = 0
    for file in filter(os.path.isfile, weight_files(folder)):  # a missing one is named later
        needed += os.path.getsize(file)
    free = free_memory(device)
    if free is not None:
        figures = f"{needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of memory free"
        expect(needed <= free, f"{folder}: too large for {device}: {figures}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    return None


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: the demo's, a local one, or one fetched from the hub."""
    folder = Path(name)
    if name == "demo":
        folder = ROOT / "data" / "demo" / "model"
    if name and folder.is_dir():
        return folder
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    expect(hub_id is not None, f"--model {name}: expected a checkpoint folder or a hub id ORG/NAME")
    try:
        files = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(
            f"--model {name}: neither a folder nor available from the hub "
            f"({reason:.{ABOUT_150}}); where there is a network, run "
            f"`hf download {name} --local-dir DIR`, then use --model DIR"
        ) from None


# ---------------------------------------------------------------- the questions


@dataclass
class Asked:
    """What a command asks, and the worked examples before each question."""

    data: str  # as --data names it
    file: Path | None  # where the questions stand; None: on the command line
    questions: list[Question]
    n_shots: int = 0
    shots: str = ""


def read_asked(
    data: str, split: str, limit: int | None, n_shots: int = 0, shots_file: Path | None = None
) -> Asked:
    """The first `limit` questions of a data set's split, or of a file, with worked examples."""
    file = locate(data, split)
    questions = read_questions(file)[:limit]
    shots = read_shots(data, n_shots, shots_file, questions)
    return Asked(data, file, questions, n_shots, shots)


def read_shots(data: str, count: int, file: Path | None, tested: list[Question]) -> str:
    """The first `count` worked examples, as one text: of `file`, or else of the shots.jsonl of the
    data set or beside the questions' file. Raises InputError if there are fewer, or if one of them
    is a question under test."""
    if not count:
        expect(file is None, f"--shots-file {file}: expected --shots, how many of them")
        return ""
    expect(data != "demo" or file is not None, "--shots: the demo has none, its model was trained")
    if file is None:
        file = locate(data, "shots")
        if file.name != "shots.jsonl":  # of a file of questions every split is that file
            file = file.with_name("shots.jsonl")
            wanted = f"--shots: expected examples in {file}, or --shots-file"
            expect(file.is_file(), f"{wanted}; {data} holds the questions under test")
    examples = read_questions(file, targets=True)
    expect(len(examples) >= count, f"--shots {count}: {file} has {len(examples)}")
    text = ""
    for example in examples[:count]:
        for question in tested:
            same = example.id == question.id or content(example) == content(question)
            where = f"{file}: example {example.id!r:.40} is a question under test"
            expect(not same, f"{where}, {question.id!r:.40}; its answer would stand in the prompt")
        text += worked(example)
    return text


def content(question: Question) -> tuple[str, frozenset[str]]:
    """What a question asks, whatever its spacing, its capitals and the order of its options."""
    options = frozenset(" ".join(option.lower().split()) for option in question.options)
    return " ".join(question.stem.lower().split()), options


def check_lengths(pipeline: Pipeline, asked: Asked) -> None:
    """Raises InputError unless the first prompt of a file's question fits the model's context."""
    if asked.file is None:  # a question of the command line, which is named otherwise
        return
    context = pipeline.model.args.max_seq_len
    for question in asked.questions:
        if len(pipeline.prompt_ids(0, question, [])[0]) <= context:
            return
    wanted = f"every prompt is longer than the model's context of {context} tokens"
    raise InputError(f"{asked.file}: {wanted}")


# ---------------------------------------------------------------- plans, budgets, exit


@dataclass
class Wanted:
    """What the flags ask for; None, or no plan, is what they leave open."""

    plans: list[Path] = field(default_factory=list)
    budgets: list[int] | None = None
    method: str | None = None
    granularity: str | None = None
    exit_threshold: float | None = None  # 0: never
    exit_window: int | None = None
    draft: list[int] | None = None  # None: the plan's
    compare: bool = False  # every method, so that the importance is needed

    @classmethod
    def of(cls, args) -> "Wanted":
        """What a command's flags say, METHOD_FLAGS and SEARCH_FLAGS."""
        return cls(
            plans=args.plan or [],
            budgets=args.stage_budgets,
            method=args.method,
            granularity=args.granularity,
            exit_threshold=args.exit_threshold,
            exit_window=args.exit_window,
            draft=getattr(args, "draft", None),
            compare=getattr(args, "compare", None) is not None,
        )


def configure(pipeline: Pipeline, name: str, wanted: Wanted, asked: Asked) -> list[Plan]:
    """The plans to run, as the flags change them; one at least.

    name: of the model; the demo's own plan is used where neither a plan nor budgets are asked for.
    Without a plan the importance is measured, where it is needed. Raises InputError.
    """
    folder = pipeline.model.folder
    n_layers = pipeline.model.args.n_layers
    trained = trained_policies(pipeline, wanted, asked)
    plans = []
    for path in wanted.plans:
        plans.append(read_plan(path, folder, n_layers))
    if wanted.budgets is not None:
        check_budgets("--stage-budgets", wanted.budgets, n_layers)
    shipped = not plans and name == "demo" and wanted.budgets is None and wanted.method != "full"
    if shipped and shipped_stages() != len(STAGES):
        found = f"is for {shipped_stages()} stages, not {len(STAGES)}"
        note(f"{SHIPPED.name} of the demo {found}: left aside")
    elif shipped:
        plans.append(read_plan(SHIPPED, folder, n_layers))
    for plan in plans:
        apply_flags(plan, wanted)
    planned = any(any(plan.budgets) for plan in plans)
    nothing = not planned and not any(wanted.budgets or [])
    expect(wanted.method != "full" or nothing, "--method full skips nothing: expected no budgets")
    now = conditions_of(pipeline, asked)
    for plan in plans:
        for line in differences(plan, now, asked.file):
            note(line)
    if not plans:
        plans.append(plan_of_flags(pipeline, name, wanted, asked))
    for plan in plans:
        plan.trained = trained
        set_draft(plan, wanted)
    if not wanted.compare and wanted.method is None and not any(map(skips_or_exits, plans)):
        note("nothing is skipped: expected --plan or --stage-budgets")
    has_exit = any(choice.exit for plan in plans for choice in plan.frontier)
    if wanted.exit_window is not None and not has_exit:
        note("--exit-window: there is no exit; --exit-threshold asks for one")
    return plans


def skips_or_exits(plan: Plan) -> bool:
    return any(plan.budgets) or plan.exit is not None


def trained_policies(pipeline: Pipeline, wanted: Wanted, asked: Asked) -> dict:
    """The policies of the gates or routers beside the weights, by name; none where the flags do not
    ask for them. Raises InputError where these ask for one that this checkpoint does not have."""
    model = pipeline.model
    if wanted.method not in METHODS and (not wanted.compare or wanted.method is not None):
        return {}
    needed = f"{model.folder}: expected one that tools/train.py trained for it"
    reason = "not trained"
    policies = {}
    found = method_of(model.folder)
    if found is not None and pipeline.shots:
        needed = "--shots: expected none, since examples are prefilled without its gains"
        reason = "they go without --shots"
    elif found is not None:
        questions = read_questions(validation_file(asked.data))[:IMPORTANCE_QUESTIONS]
        fast = isinstance(model.layers[0], FastLayer)
        policies = Trained(pipeline, read_beside(model, fast), questions).policies()
    missing = [method for method in METHODS if method not in policies]
    if wanted.method is not None:
        expect(wanted.method in policies, f"--method {wanted.method}: {needed}")
    elif missing:
        note(f"left out: {', '.join(missing)}; {reason}")
    return policies


def apply_flags(plan: Plan, wanted: Wanted) -> None:
    """Changes a plan as the flags ask."""
    if wanted.granularity not in (None, plan.granularity):
        by_loss = (
            f"--granularity: {plan.name} ranks by loss, {plan.granularity} by {plan.granularity}"
        )
        expect(plan.ranking_by == "similarity", by_loss)
        plan.rank_by_similarity(wanted.granularity)
    plan.exit = exit_of(plan.exit, wanted)
    frontier = []
    for choice in plan.frontier:
        frontier.append(Choice(choice.budgets, exit_of(choice.exit, wanted)))
    plan.frontier = frontier
    if wanted.budgets is not None:
        plan.budgets = wanted.budgets
        plan.frontier = [Choice(plan.budgets, plan.exit)]


def set_draft(plan: Plan, wanted: Wanted) -> None:
    """Changes what a plan drafts, as --draft asks."""
    if wanted.draft is None:
        return
    alone = f"--draft 0: {plan.name} drafts, and its budgets alone would change the texts"
    expect(any(wanted.draft) or not plan.only_drafts, alone)
    if any(wanted.draft):
        only = "--draft: only litestage drafts"
        expect(wanted.method in (None, "litestage"), f"{only}, found --method {wanted.method}")
        expect(any(plan.budgets), "--draft: expected budgets, of a plan or --stage-budgets")
        plan.draft = wanted.draft


def exit_of(planned: Exit | None, wanted: Wanted) -> Exit | None:
    """A plan's exit, as the flags change it; none unless the one or the others ask for it. The exit
    is LiteStage's: another method has it only where the flag asks."""
    exit = planned or Exit(threshold=0.0)
    threshold = exit.threshold
    if wanted.method not in (None, "litestage"):
        threshold = 0.0
    if wanted.exit_threshold is not None:
        threshold = wanted.exit_threshold
    if threshold == 0:
        return None
    return Exit(wanted.exit_window or exit.window, threshold)


def plan_of_flags(pipeline: Pipeline, name: str, wanted: Wanted, asked: Asked) -> Plan:
    """The plan of --stage-budgets; without it nothing is skipped."""
    budgets = wanted.budgets or [0] * len(STAGES)
    exit = exit_of(None, wanted)
    n_layers = pipeline.model.args.n_layers
    importance = Importance(torch.zeros(n_layers, 2), torch.ones(n_layers, 2))  # if not needed
    if wanted.compare or (any(budgets) and wanted.method not in METHODS):
        importance = importance_for(pipeline, name, asked)
    choices = []
    if wanted.budgets is not None:
        choices.append(Choice(budgets, exit))
    plan = Plan("", importance, [], "similarity", "", budgets, exit, choices, {})
    plan.rank_by_similarity(wanted.granularity or "sublayer")
    return plan


def importance_for(pipeline: Pipeline, name: str, asked: Asked) -> Importance:
    """The demo's, as its plan has it, or measured now on validation questions."""
    if name == "demo" and asked.data == "demo":
        stored = shipped_importance(pipeline.model.folder, pipeline.model.args.n_layers)
        if stored is not None:
            return stored
    file = validation_file(asked.data)
    if name != "demo" and asked.data == "demo":
        note("importance is measured on the demo's questions; --data names others")
    elif asked.file is not None and os.path.samefile(file, asked.file):
        note("importance is measured on the questions under test themselves")
    return measure(pipeline, read_questions(file)[:IMPORTANCE_QUESTIONS])


def measure(pipeline: Pipeline, questions: list[Question]) -> Importance:
    """The importance over questions, which the full model answers first, some side by side."""
    return importance_of(pipeline, questions, answer_all(pipeline, questions, 16))


def answer_all(
    pipeline: Pipeline, questions: list[Question], batch: int = 1
) -> list[list[StageResult]]:
    """The results of all stages of each question, by the full model, `batch` side by side."""
    answered = []
    caches = pipeline.new_caches(batch)
    for start in progress(range(0, len(questions), batch), "importance"):
        chosen = questions[start : start + batch]
        for _, stages in pipeline.answer(chosen, caches=caches[: len(chosen)]):
            answered.append(stages)
    return answered


def validation_file(data: str) -> Path:
    """A data set's validation questions, or else its test questions: importance, which is all that
    is measured on them, does not look at the answers."""
    try:
        return locate(data, "valid")
    except InputError:
        return locate(data, "test")


def conditions_of(pipeline: Pipeline, asked: Asked) -> dict:
    """The `plan.conditions` of a command: its data set's validation questions count, if any."""
    file = None
    try:
        file = locate(asked.data, "valid")
    except InputError:
        pass
    now = conditions(asked.data, file, asked.n_shots, asked.shots, pipeline.max_new_tokens)
    return now | {"dtype": str(pipeline.model.dtype).removeprefix("torch.")}
