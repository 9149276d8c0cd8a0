"""Generation: tokenizers, decoding under a skip set, the confidence exit, the three stages.

Prefill runs all layers, decoding skips. A question is answered in three stages (TinyThinker, Piao
and Park 2024): recall general knowledge, analyze each option, summarize into an answer; the prompt
of each stage holds everything that was generated before.

    python generate.py "Which of these can fly?" robin trout oak shovel --stage-budgets 2,4,1
"""

import argparse
import json
import os
import re
import string
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import sentencepiece
import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from data.questions import Question, locate, read_questions
from model import DTYPES, InputError, KVCache, Llama, checkpoint_digests, read_json
from skip import POLICIES, Importance, Setting, measure_importance, rank

ROOT = Path(__file__).resolve().parent
STAGES = ("recall", "analyze", "summarize")

# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text to ids and back, with the ids `transformers` gives for the same folder.

    `tokenizer.json` is read by `tokenizers`, else `tokenizer.model` by `sentencepiece`.
    eos_ids: the tokens that end a generation.
    """

    def __init__(self, encode: Callable, decode: Callable, vocab_size: int, eos_ids: set[int]):
        self._encode, self._decode = encode, decode
        self.vocab_size, self.eos_ids = vocab_size, eos_ids

    @classmethod
    def from_pretrained(cls, path) -> "Tokenizer":
        """Raises InputError if the folder has no tokenizer, a damaged one, or no end token."""
        folder = Path(path)
        file = next((folder / n for n in ("tokenizer.json", "tokenizer.model")), None)
        file = file if file.exists() else folder / "tokenizer.model"
        if not file.exists():
            raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model found")
        try:
            if file.suffix == ".json":
                fast = tokenizers.Tokenizer.from_file(str(file))
                fast.no_padding(), fast.no_truncation()
                vocab_size = fast.get_vocab_size()

                def encode(text, bos):
                    return fast.encode(text, add_special_tokens=bos).ids

                decode, default_eos = fast.decode, None
            else:
                piece = sentencepiece.SentencePieceProcessor(model_file=str(file))
                vocab_size, default_eos = piece.vocab_size(), piece.eos_id()

                def encode(text, bos):
                    return piece.encode(text, add_bos=bos)

                decode = piece.decode
        except Exception as e:  # both libraries raise bare Exceptions for damaged files
            raise InputError(f"{file}: not a readable tokenizer ({str(e)[:200]})") from None
        return cls(encode, decode, vocab_size, find_eos(folder, default_eos, vocab_size))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return self._encode(text, bos)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out: `decode(encode(text)) == text`."""
        return self._decode(ids)


def find_eos(folder: Path, default: int | None, vocab_size: int) -> set[int]:
    """The end tokens: of generation_config.json, else config.json, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = read_json(folder / name).get("eos_token_id")
            if eos is not None:
                break
    else:
        eos = default
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise InputError(
            f"{folder}: no end token; expected 'eos_token_id' in generation_config.json or "
            f"config.json to name ids below {vocab_size}, found {eos!r}"
        )
    return set(ids)


# ---------------------------------------------------------------- generation


class Exit(NamedTuple):
    """Confidence exit (LiteStage): stop when the mean of the last `window` confidences, each a
    token's largest softmax probability, is at or below `threshold`."""

    window: int = 5
    threshold: float = 0.5


class Timings(NamedTuple):
    """What a batch cost: seconds of the prefill up to the first token, and of each step after."""

    prefill_s: float
    step_s: list[float]
    skipped: float = 0.0  # sub-layers, mean over the steps

    @property
    def decode_s(self) -> float:
        """Steps x median step time: one step that the system preempted does not count."""
        return len(self.step_s) * median(self.step_s) if self.step_s else 0.0


class Generation(NamedTuple):
    """What one row generated; why it stopped: eos, confidence, length or context; the time of the
    whole batch it was generated in."""

    ids: list[int]
    stop: str
    timings: Timings


def common_prefix(rows: list[list[int]]) -> int:
    """The number of leading tokens that all rows share."""
    n = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        n += 1
    return n


def prefill(model: Llama, prompts: list[list[int]], room: int) -> tuple[KVCache, Tensor]:
    """Runs all layers on the prompts: their cache, with `room` more slots, and the logits
    (bsz, vocab) that follow each."""
    longest = max(map(len, prompts))
    pad = [longest - len(p) for p in prompts]
    cache = KVCache(model, len(prompts), longest + room, pad)
    tokens = torch.tensor([[0] * n + p for n, p in zip(pad, prompts)], device=model.device)
    return cache, model(tokens, cache, 0, last=True)[:, -1]


def pick(logits: Tensor, temperature: float) -> tuple[Tensor, list[int], list[float]]:
    """The next token of each row (bsz,), the same as a list, and its confidences."""
    logits = logits.float()
    top, tokens = logits.max(-1)
    confidences = (top - logits.logsumexp(-1)).exp()
    if temperature:
        tokens = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
    return tokens, tokens.tolist(), confidences.tolist()


@torch.inference_mode()
def generate_batch(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    skip=None,
    exit: Exit | None = None,
    temperature: float = 0.0,
) -> list[Generation]:
    """Generates a continuation of every prompt, decoding them together; see `generate`."""
    context = model.args.max_seq_len
    results: list[Generation | None] = [None] * len(prompts)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context:
            results[row] = Generation([], "context", Timings(0.0, []))
    active = [row for row in range(len(prompts)) if results[row] is None]
    if not active:
        return results
    ids = {row: [] for row in active}
    recent = {row: deque(maxlen=exit.window if exit else 1) for row in active}
    begin = time.perf_counter()
    longest = max(len(prompts[row]) for row in active)
    cache, logits = prefill(model, [prompts[row] for row in active], max_new_tokens)
    step_s: list[float] = []
    stops, skipped = {}, 0
    while True:
        tokens, chosen, confidences = pick(logits, temperature)
        now = time.perf_counter()
        if ids[active[0]] == [] and not step_s:
            prefill_s = now - begin
        else:
            step_s.append(now - begin)
        begin = now
        keep = []
        for j, row in enumerate(active):
            recent[row].append(confidences[j])
            if chosen[j] in eos_ids:
                stops[row] = "eos"
                continue
            ids[row].append(chosen[j])
            window = recent[row]
            if exit and len(window) == exit.window and sum(window) <= exit.threshold * len(window):
                stops[row] = "confidence"
            elif len(ids[row]) >= max_new_tokens:
                stops[row] = "length"
            elif len(prompts[row]) + len(ids[row]) > context:
                stops[row] = "context"
            else:
                keep.append(j)
        if not keep:
            break
        if len(keep) < len(active):  # a finished row costs nothing more
            active = [active[j] for j in keep]
            tokens = tokens[keep]
            cache.keep(keep)
        step = len(step_s)
        mask = skip(step) if callable(skip) else skip
        skipped += 0 if mask is None else int(mask.count_nonzero())
        probe = getattr(skip, "probe", None)
        logits = model(tokens[:, None], cache, longest + step, mask, probe)[:, -1]
    timings = Timings(prefill_s, step_s, skipped / max(len(step_s), 1))
    for row, stop in stops.items():
        results[row] = Generation(ids[row], stop, timings)
    return results


def generate(
    model: Llama,
    prompt_ids: list[int],
    max_new_tokens: int,
    eos_id: int | Collection[int] | None = None,
    skip=None,
    exit: Exit | None = None,
    temperature: float = 0.0,
) -> Generation:
    """Continues one prompt: prefill with all layers, decode under `skip`; (ids, stop, timings).

    eos_id: the token, or tokens, that end the text (not part of ids). skip: (n_layers, 2) mask of
    `model.Llama.forward`, or a function of the decoding step that gives one. exit: (window,
    threshold) of the confidence exit (LiteStage, generation early exit); None never exits.
    temperature: 0 is greedy. The stop is "eos", "confidence", "length" (max_new_tokens reached) or
    "context" (the model's context is full, or the prompt alone does not fit: ids is then empty).
    """
    eos_ids = () if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
    exit = Exit(*exit) if exit is not None else None
    return generate_batch(model, [prompt_ids], max_new_tokens, eos_ids, skip, exit, temperature)[0]


# ---------------------------------------------------------------- the three stages


def base_prompt(question: Question) -> str:
    choices = zip(question.labels, question.options)
    return question.stem + "\n" + " ".join(f"({label}) {text}" for label, text in choices)


def recall_prompt(question: Question) -> str:
    return f"{base_prompt(question)}\nRecall:"


def analyze_prompt(question: Question, recall: str, label: str) -> str:
    return f"{recall_prompt(question)} {recall}\nAnalyze: For option {label},"


def summarize_prompt(question: Question, recall: str, analyses: list[str]) -> str:
    said = zip(question.labels, analyses)
    options = " ".join(f"For option {label}, {text}" for label, text in said)
    return f"{recall_prompt(question)} {recall}\nAnalyze: {options}\nSummarize:"


def finish(text: str) -> str:
    """What a stage generated, as the next stage's prompt quotes it."""
    text = text.strip()
    return text if text.endswith((".", '"', "'")) else text + "."


def find_answer(summary: str) -> str | None:
    """The label a summary names, None if it names none."""
    match = re.search(r"the answer is option ([A-Z])\.", summary)
    return match and match[1]


@dataclass
class Stage:
    """One stage of one question: the texts (one, or one per option), what they cost, why they
    stopped."""

    name: str
    texts: list[str]
    stops: list[str]
    tokens: int  # generated, all texts together
    timings: Timings

    @property
    def latency_s(self) -> float:
        return self.timings.prefill_s + self.timings.decode_s


def stage_prompts(index: int, question: Question, said: list[list[str]]) -> list[str]:
    """The prompts of stage `index`; `said` holds what the stages before it generated."""
    if index == 0:
        return [recall_prompt(question)]
    recall = said[0][0]
    if index == 1:
        return [analyze_prompt(question, recall, label) for label in question.labels]
    return [summarize_prompt(question, recall, said[1])]


def run_stage(
    model: Llama,
    tokenizer: Tokenizer,
    index: int,
    question: Question,
    said: list[list[str]],
    skip=None,
    exit: Exit | None = None,
    max_new_tokens: int = 64,
) -> Stage:
    """Generates stage `index` (0 recall, 1 analyze, 2 summarize) of a question; the options of the
    analyze stage are decoded as one batch."""
    prompts = [tokenizer.encode(p) for p in stage_prompts(index, question, said)]
    rows = generate_batch(model, prompts, max_new_tokens, tokenizer.eos_ids, skip, exit)
    texts = [tokenizer.decode(row.ids) for row in rows]
    if index < 2:
        texts = [finish(text) for text in texts]
    timings = max((row.timings for row in rows), key=lambda t: t.prefill_s)
    return Stage(
        STAGES[index], texts, [r.stop for r in rows], sum(len(r.ids) for r in rows), timings
    )


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    question: Question,
    skips=(None, None, None),
    exit: Exit | None = None,
    max_new_tokens: int = 64,
) -> tuple[str | None, list[Stage]]:
    """Answers a question in three stages, each under its own skip set: (label or None, stages)."""
    stages: list[Stage] = []
    for index, skip in enumerate(skips):
        said = [stage.texts for stage in stages]
        stages.append(
            run_stage(model, tokenizer, index, question, said, skip, exit, max_new_tokens)
        )
    return find_answer(stages[-1].texts[0]), stages


# ---------------------------------------------------------------- what every command shares


def positive(text: str) -> int:
    """A flag's whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return value


FLAGS = {
    "--model": dict(default="demo", help="checkpoint folder, hub id ORG/NAME, or demo"),
    "--data": dict(default="demo", help="questions file, folder, or name of a data set"),
    "--split": dict(default="test", choices=("train", "valid", "test"), help="which questions"),
    "--limit": dict(type=positive, metavar="N", help="only the first N questions (default: all)"),
    "--seed": dict(type=int, default=0, help="of everything random"),
    "--device": dict(default="cpu", help="cpu, cuda, cuda:1, ..."),
    "--dtype": dict(choices=tuple(DTYPES), help="to compute in (default: as stored)"),
    "--plan": dict(metavar="FILE", help="budgets and exit that search.py found"),
    "--stage-budgets": dict(metavar="R,A,S", help="sub-layers each stage skips, e.g. 2,4,1"),
    "--method": dict(default="litestage", choices=tuple(POLICIES), help="how they are chosen"),
    "--granularity": dict(choices=("sublayer", "layer"), help="what is ranked (default: sublayer)"),
    "--exit-threshold": dict(
        type=float,
        metavar="T",
        help="mean confidence that ends a stage, 0 for never (default: the plan's, else 0.5)",
    ),
    "--exit-window": dict(
        type=positive, metavar="N", help="confidences in that mean (default: the plan's, else 5)"
    ),
    "--max-new-tokens": dict(type=positive, default=64, metavar="N", help="most per generation"),
    "--json": dict(metavar="FILE", help="write the report there"),
}
SMALL = 30_000_000  # parameters; below, products are too short to be shared among threads
IMPORTANCE_QUESTIONS = 32  # enough: the ranking of the demo's sub-layers no longer changes


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, too."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def make_parser(doc: str, *flags: str) -> Parser:
    """A parser with the named shared flags, which mean the same in every command."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in flags:
        options = dict(FLAGS[flag])
        if options.get("default") is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument(flag, **options)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake or Ctrl-C is one line on stderr, a closed pipe none."""
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path: Path, value: dict) -> None:
    """Writes a file whole or not at all: to a temporary one first, which then takes its name."""
    part = Path(f"{path}.tmp")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None


def load(args: argparse.Namespace) -> tuple[Path, Llama, Tokenizer]:
    """The checkpoint that --model, --device and --dtype name: its folder, model and tokenizer."""
    folder = find_checkpoint(args.model)
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {args.device}: expected cpu or a cuda ({reason})") from None
    torch.manual_seed(args.seed)
    model = Llama.from_pretrained(folder, device, DTYPES.get(args.dtype))
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > model.args.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
            f"{model.args.vocab_size}"
        )
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    return folder, model, tokenizer


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: the demo's or a local one."""
    folder = ROOT / "data" / "demo" / "model" if name == "demo" else Path(name)
    if folder.is_dir():
        return folder
    raise InputError(f"--model {name}: no such checkpoint folder")


def parse_budgets(text: str, n_layers: int) -> list[int]:
    """Three budgets from "2,4,1". Raises InputError unless all lie in 0 .. 2 x n_layers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(
            f"--stage-budgets {text}: expected three counts, for recall, analyze and summarize, "
            "such as 2,4,1"
        )
    if max(map(int, parts)) > 2 * n_layers:
        raise InputError(
            f"--stage-budgets {text}: expected at most {2 * n_layers}, the model's sub-layers"
        )
    return [int(part) for part in parts]


def read_plan(path: Path, folder: Path) -> dict:
    """The plan that search.py wrote for this checkpoint. Raises InputError for any other."""
    plan = read_json(path)
    if plan.get("format") != 1:
        raise InputError(f"{path}: 'format' must be 1, found {plan.get('format')!r}")
    for key, digest in checkpoint_digests(folder).items():
        found = plan.get("model", {}).get(key)
        if found != digest:
            raise InputError(
                f"{path}: a plan of another model: its {key} digest is {str(found)[:12]}, that of "
                f"{folder} is {digest[:12]}"
            )
    return plan


def importance_of(model: Llama, tokenizer: Tokenizer, questions: list[Question]) -> Importance:
    """Layer importance over the questions' three prefills; the full model writes the texts."""

    def prompts():
        for question in tqdm(questions, "importance", leave=False, disable=None):
            stages = answer(model, tokenizer, question)[1]
            said = [stage.texts for stage in stages]
            rows = [tokenizer.encode(stage_prompts(i, question, said)[0]) for i in range(3)]
            yield [row for row in rows if len(row) <= model.args.max_seq_len]

    return measure_importance(model, prompts())


def configure(args, folder: Path, model: Llama, tokenizer: Tokenizer):
    """(setting, budgets, exit) that the flags ask for: those of a plan, or --stage-budgets with an
    importance measured now on validation questions. The demo comes with a plan."""
    path = args.plan
    if path is None and args.stage_budgets is None and args.model == "demo":
        path = ROOT / "data" / "demo" / "plan.json"
    plan = read_plan(path, folder) if path else {}
    if plan:
        importance = Importance(**{k: torch.tensor(v) for k, v in plan["importance"].items()})
    else:
        questions = read_questions(locate(args.data, "valid"))[:IMPORTANCE_QUESTIONS]
        importance = importance_of(model, tokenizer, questions)
    granularity = args.granularity or plan.get("granularity", "sublayer")
    budgets = plan.get("budgets", [0, 0, 0])
    if args.stage_budgets:
        budgets = parse_budgets(args.stage_budgets, model.args.n_layers)
    found = plan.get("exit") or Exit()._asdict()
    exit = Exit(args.exit_window or found["window"], found["threshold"])
    if args.exit_threshold is not None:
        exit = exit._replace(threshold=args.exit_threshold)
    if not 0 <= exit.threshold <= 1:
        raise InputError(f"--exit-threshold {exit.threshold}: expected a number from 0 to 1")
    setting = Setting(importance, rank(importance.similarity, granularity), granularity, args.seed)
    return setting, budgets, exit if exit.threshold > 0 else None


# ---------------------------------------------------------------- command


def print_stage(stage: Stage, question: Question, n_sublayers: int) -> None:
    print(stage.name)
    for label, text, stop in zip(question.labels, stage.texts, stage.stops):
        option = f"({label}) " if stage.name == "analyze" else ""
        line = f"{option}{text.strip()} [{stop}]"
        print(textwrap.fill(line, 78, initial_indent="    ", subsequent_indent="    "))
    per_token = 1e3 * stage.timings.decode_s / max(stage.tokens, 1)
    print(
        f"  {stage.tokens} tokens, {per_token:.2f} ms/token, "
        f"{stage.timings.skipped:g} of {n_sublayers} sub-layers skipped\n"
    )


def main() -> None:
    flags = [flag for flag in FLAGS if flag not in ("--split", "--limit", "--json")]
    parser = make_parser(__doc__, *flags)
    parser.add_argument("text", help="the question, or a text to continue if no choices follow")
    parser.add_argument("choices", nargs="*", help="the options: they get the labels A, B, ...")
    args = parser.parse_args()
    if len(args.choices) == 1 or len(args.choices) > 26:
        raise InputError(f"choices: expected none or 2 to 26, found {len(args.choices)}")
    folder, model, tokenizer = load(args)
    setting, budgets, exit = configure(args, folder, model, tokenizer)
    skips = [POLICIES[args.method](setting, budget) for budget in budgets]
    if not args.choices:
        ids = tokenizer.encode(args.text)
        new = generate(model, ids, args.max_new_tokens, tokenizer.eos_ids, skips[0], exit)
        print(f"{tokenizer.decode(ids + new.ids)} [{new.stop}]")
        return
    labels = tuple(string.ascii_uppercase[: len(args.choices)])
    question = Question("", args.text, labels, tuple(args.choices), labels[0])
    label, stages = answer(model, tokenizer, question, skips, exit, args.max_new_tokens)
    for stage in stages:
        print_stage(stage, question, 2 * model.args.n_layers)
    option = dict(zip(labels, args.choices)).get(label, "no such option")
    print(f"answer: {label} ({option})" if label else "answer: none given")


if __name__ == "__main__":
    run(main)
