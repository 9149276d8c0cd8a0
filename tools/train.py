r"""Train a Llama on the stages: from scratch (the demo) or from any checkpoint.

Every question with its "recall" and "analyze" texts becomes the stage prompts of data/prompts.py,
exactly as inference makes them; only what a stage says is learned, and where it ends (see
tools/sequences.py). In half of the sequences the options are analyzed in a random order, because in
use each is analyzed with no other before it. The last stage's few tokens weigh more, since one of
them is the answer.

Two flags make skipping cost less later: --skip-plan trains under the skip sets that a plan's
rankings give, where decoding would skip (ours); --stochastic-depth skips random sub-layers, deeper
ones more often (Huang et al. 2016). Two make training itself cheaper (Skip Tuning, 2412.11509):
--freeze-below keeps no graph of the first layers, --options-per-step teaches some of the options.
Two train what skips token by token, beside the weights: --gates (GateSkip, see tools/gates.py) and
--routers (DLO, see tools/routers.py).

Whatever is random in a step depends on the seed and the step's number alone. A run that was killed
goes on where it last saved when the same command is given again, and ends with the same weights;
if the data, the base weights, the tokenizer or a setting has changed since, it is refused.

    python tools/train.py --model data/demo/model --data data/demo/train.jsonl \
        --out tuned --steps 20
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.questions import Question, read_questions
from data.tokenizer import Tokenizer
from model import EMBED, Llama, ModelArgs, Skip, expect, read_json, read_number
from tools.checkpoint import (
    RESUME,
    check_out,
    check_state,
    contents_of,
    copy_folder,
    load_state,
    save_model,
    save_state,
)
from tools.command import run
from tools.files import digest_of
from tools.flags import fraction, make_parser, natural, number, positive
from tools.gates import Gates, GateTraining
from tools.plan import prompts_digest
from tools.progress import progress
from tools.routers import Routers, RouterTraining
from tools.sequences import PROMPT, Batch, Sequence, draw_sequences, longest, make_batch
from tools.setup import find_checkpoint, find_device
from tools.skip_training import LayerHook, NestedSkips, draw_depth, read_skip_plan, skipped_tokens
from tools.trained import file_of, write_beside

try:
    import resource
except ImportError:  # Windows
    resource = None

VALID_QUESTIONS = 128  # of --valid that the loss is measured on
LOOK_EVERY = 10  # steps between looks at the loss, for which a GPU has to be waited for
SCRATCH_LR = 1e-3
TUNING_LR = 1e-4  # a pretrained model forgets at more than 2e-4
# flags that change no weight, or whose content counts instead
UNCHANGING = ("model", "data", "valid", "out", "skip_plan", "save_every", "stop")
UNCHANGING += ("device", "workers", "bf16")

# ---------------------------------------------------------------- what a step trains on


class Job(NamedTuple):
    """A micro-batch, and what is skipped in it: a mask (n_layers, 2) of all its tokens, and masks
    (n_stages, n_layers, 2) of the tokens that a stage says; None for nothing."""

    batch: Batch
    depth: Tensor | None
    nested: Tensor | None
    skipped: Tensor | None  # (n_layers, 2, bsz, seqlen), of `nested`
    progress: float  # from 0 to 1, of the whole training


@dataclass
class Feed:
    """Makes the micro-batches of any step, from its number alone.

    options: how many options' texts are taught; None: all. accumulate: micro-batches in a step.
    """

    questions: list[Question]
    tokenizer: Tokenizer
    n_layers: int
    steps: int
    size: int
    accumulate: int
    seed: int
    options: int | None
    stochastic_depth: float
    nested: NestedSkips | None
    pin: bool  # memory, for a GPU

    def questions_of(self, step: int) -> list[Question]:
        """Those of one step: the next ones of an epoch's random order."""
        chosen = []
        orders = {}
        for n in range(step * self.size, (step + 1) * self.size):
            epoch, place = divmod(n, len(self.questions))
            if epoch not in orders:
                orders[epoch] = list(range(len(self.questions)))
                random.Random(f"{self.seed} epoch {epoch}").shuffle(orders[epoch])
            chosen.append(self.questions[orders[epoch][place]])
        return chosen

    def jobs(self, step: int) -> tuple[list[Job], float]:
        """The micro-batches of a step, and the weight of all that is taught in it."""
        rng = random.Random(f"{self.seed} {step}")
        rows = draw_sequences(self.questions_of(step), self.tokenizer, rng, self.options)
        size = math.ceil(len(rows) / self.accumulate)
        rising = min(1, 5 * (step + 1) / self.steps)  # stochastic depth, in the first fifth
        jobs = []
        for i in range(0, len(rows), size):
            depth = draw_depth(self.n_layers, self.stochastic_depth * rising, rng)
            masks = None if self.nested is None else self.nested.draw(rng)
            jobs.append(self.job(rows[i : i + size], depth, masks, (step + 1) / self.steps))
        return jobs, sum(sum(row.weights) for row in rows)

    def job(
        self, rows: list[Sequence], depth: Tensor | None, masks: Tensor | None, progress: float
    ) -> Job:
        batch = make_batch(rows)
        skipped = None if masks is None else skipped_tokens(masks, batch.stages)
        if self.pin:
            batch = batch.pinned()
            skipped = None if skipped is None else skipped.pin_memory()
        return Job(batch, depth, masks, skipped, progress)

    def ahead(self, first: int, last: int) -> Iterator[tuple[list[Job], float]]:
        """The jobs of steps first .. last - 1; the next step's are made during the present one."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.jobs, first)
            for step in range(first, last):
                jobs = coming.result()
                if step + 1 < last:
                    coming = pool.submit(self.jobs, step + 1)
                yield jobs


# ---------------------------------------------------------------- training


def loss_sum(model: Llama, batch: Batch, skip: Tensor | Skip | None = None) -> Tensor:
    """The weighted cross-entropy, summed over what is taught; skip: as in Llama.forward."""
    logits = model(batch.tokens, skip=skip).flatten(0, 1)  # (bsz * seqlen, vocab)
    taught = logits.index_select(0, batch.where).float()  # (n, vocab)
    loss = F.cross_entropy(taught, batch.labels, reduction="none")
    return (loss * batch.weights).sum()


def initialize(args: ModelArgs, std: float, seed: int) -> Llama:
    """A model with random weights: normal, outputs into the residual stream smaller (GPT-2)."""
    model = Llama(args)
    torch.manual_seed(seed)
    for name, tensor in model.tensors():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(tensor, 0.0, std / math.sqrt(2 * args.n_layers))
        elif tensor.dim() == 2:
            torch.nn.init.normal_(tensor, 0.0, std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(tensor)
    return model


def freeze(model: Llama, below: int) -> None:
    """No gradient for the layers below one, nor for the embedding, unless it is the head, too."""
    frozen = [f"model.layers.{i}." for i in range(below)]
    if below and not model.args.tied:
        frozen.append(EMBED)
    for name, parameter in model.tensors():
        if name.startswith(tuple(frozen)):
            parameter.requires_grad_(False)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(modules: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    trained = [p for p in modules.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    fused = trained[0].device.type == "cuda"  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)


def modules_of(model: Llama, beside: GateTraining | RouterTraining | None) -> nn.Module:
    """All that is trained, and saved while it is: the model, and gates or routers if there are
    any."""
    if beside is None:
        return model
    return nn.ModuleList([model, beside.module])


@dataclass
class Trainer:
    """Optimizer steps of a model.

    lr, warmup, steps: the schedule. clip: the largest gradient norm. beside: how gates or routers
    are trained, if any are. pool: computes micro-batches side by side; None: one after the other.
    """

    model: Llama
    optimizer: torch.optim.Optimizer
    bf16: bool
    freeze_below: int
    lr: float
    warmup: int
    steps: int
    clip: float
    beside: GateTraining | RouterTraining | None = None
    pool: Executor | None = None

    def __post_init__(self):
        self.modules = modules_of(self.model, self.beside)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]

    def cast(self):
        if self.bf16:
            return torch.autocast(self.model.device.type, torch.bfloat16)
        return nullcontext()

    def skip_of(self, job: Job) -> Skip:
        """What the model leaves out in a micro-batch."""
        mask = job.depth
        if mask is None:
            mask = torch.zeros(self.model.args.n_layers, 2, dtype=torch.bool)
        if self.beside is not None:
            return Skip(mask, self.beside.hook(job.batch.stages != PROMPT, job.progress))
        if job.nested is None and not self.freeze_below:
            return Skip(mask)
        skipped = some = None
        if job.nested is not None:
            skipped = job.skipped.to(self.model.device, non_blocking=True)
            some = job.nested.any(0)
        return Skip(mask, LayerHook(skipped, some, self.freeze_below))

    def gradients(self, job: Job, skip: Skip, labelled: float):
        """A micro-batch's share of the mean loss, and of every parameter's gradient, if it has
        one."""
        batch = job.batch.to(self.model.device)
        weight = job.batch.weights.sum().item()  # on the CPU
        with self.cast():
            loss = loss_sum(self.model, batch, skip)
            if self.beside is not None:
                loss = loss + weight * skip.hook.loss()
        # not loss.backward(): the threads of a pool would add to the same gradients
        loss = loss / labelled
        return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def step(self, step: int, jobs: list[Job], labelled: float) -> Tensor:
        """One step of the optimizer; returns the mean loss, which may still be computed."""
        total = torch.zeros((), device=self.model.device)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)  # not None, where all micro-batches skip a sub-layer
        work = map if self.pool is None else self.pool.map
        skips = [self.skip_of(job) for job in jobs]
        shares = work(partial(self.gradients, labelled=labelled), jobs, skips)
        for loss, gradients in shares:
            total += loss
            add_gradients(self.parameters, gradients)
        if self.beside is not None:
            self.beside.settle([skip.hook for skip in skips])
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.lr, self.warmup)
        self.optimizer.step()
        return total

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> float:
        """The mean weighted loss per token that is taught, all layers running, gates on."""
        skip = None
        if self.beside is not None:
            nothing = torch.zeros(self.model.args.n_layers, 2, dtype=torch.bool)
            skip = Skip(nothing, self.beside.open())
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        weight = 0.0
        for batch in batches:
            with self.cast():
                total += loss_sum(self.model, batch.to(self.model.device), skip).double()
            weight += batch.weights.sum().item()  # on the CPU
        return total.item() / weight


def add_gradients(parameters: list[Tensor], gradients: tuple[Tensor | None, ...]) -> None:
    """Adds what there is to the parameters' own, all in few kernels."""
    sums = []
    new = []
    for p, gradient in zip(parameters, gradients):
        if gradient is not None:
            sums.append(p.grad)
            new.append(gradient)
    torch._foreach_add_(sums, new)


# ---------------------------------------------------------------- command


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder to start from, hub id ORG/NAME, or demo")
    add("--scratch", action="store_true", help="random weights; --model needs no weights then")
    add("--data", required=True, help="questions with recall and analyze texts (JSON lines)")
    add("--valid", help="such a file, for the validation loss")
    add("--out", required=True, help="checkpoint folder to write; a killed run resumes there")
    add("--steps", type=positive, help="optimizer steps (default: what --epochs makes)")
    add("--stop", type=positive, help="end after this step, before the schedule does")
    add("--epochs", type=number, default=1.0, help="passes over --data (default: 1)")
    add("--batch-size", type=positive, default=32, help="questions per step (default: 32)")
    add("--accumulate", type=positive, default=2, help="micro-batches per step (default: 2)")
    add("--workers", type=positive, default=1, help="micro-batches at a time (default: 1)")
    lr = "peak learning rate (default: 1e-4, which suits a pretrained model; --scratch: 1e-3)"
    add("--lr", type=number, help=lr)
    add("--warmup", type=natural, default=50, help="warm-up steps (default: 50)")
    add("--weight-decay", type=number, default=0.05, help="of matrices (default: 0.05)")
    add("--clip", type=number, default=1.0, help="largest gradient norm (default: 1)")
    depth = "how often the last sub-layer is skipped while training (default: 0)"
    add("--stochastic-depth", type=fraction, default=0.0, metavar="P", help=depth)
    plan = "train under the skip sets of this plan's rankings, in 70%% of the micro-batches"
    add("--skip-plan", type=Path, metavar="FILE", help=plan)
    most = "share of the sub-layers in the largest of them (default: 0.5)"
    add("--skip-most", type=fraction, default=0.5, metavar="P", help=most)
    below = "no gradient for the layers before this one (default: 0)"
    add("--freeze-below", type=natural, default=0, metavar="N", help=below)
    options = "teach this many options' texts of a question, the answer's among them, drawn anew "
    options += "in each step; what comes after them then follows fewer than in use (default: all)"
    add("--options-per-step", type=positive, metavar="K", help=options)
    gates = "train GateSkip's gates with the weights"
    add("--gates", action="store_true", help=gates)
    weight = "--gates: of the mean squared gate in the loss (default: 0.01)"
    add("--gate-weight", type=number, default=0.01, metavar="W", help=weight)
    share = "--gates: share of the tokens that skip a sub-layer at the end (default: 0.2)"
    add("--gate-share", type=fraction, default=0.2, metavar="P", help=share)
    add("--routers", action="store_true", help="train DLO's routers with the weights")
    capacity = "--routers: share of the tokens and layers whose FFN runs, from the middle of the "
    capacity += "training on; it falls from 1 (default: 0.9)"
    add("--capacity", type=fraction, default=0.9, metavar="P", help=capacity)
    add("--save-every", type=positive, default=100, help="steps between saves (default: 100)")
    add("--seed", type=natural, default=0, help="seed of weights, order and skips (default: 0)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    bf16 = "autocast to bfloat16; auto: on a GPU only (default: auto)"
    add("--bf16", choices=["auto", "on", "off"], default="auto", help=bf16)
    args = parser.parse_args()
    for name in ("epochs", "lr", "clip"):
        if getattr(args, name) == 0:
            parser.error(f"--{name} must be above 0")
    skipping = []
    for name in ("skip_plan", "stochastic_depth", "gates", "routers"):
        if getattr(args, name):
            skipping.append("--" + name.replace("_", "-"))
    if len(skipping) > 1:
        parser.error(f"{' and '.join(skipping)}: expected one of them")
    if args.freeze_below and (args.gates or args.routers):
        parser.error("--freeze-below: expected neither --gates nor --routers")
    if args.lr is None:
        args.lr = SCRATCH_LR if args.scratch else TUNING_LR
    return args


def load_start(args, source: Path, device: torch.device) -> tuple[Llama, torch.dtype]:
    """The model to train, its weights in float32, and the dtype to store it in."""
    if args.scratch:
        file = source / "config.json"
        config = read_json(file)
        shape = ModelArgs.from_config(config, str(file))
        std = read_number(config, str(file), "initializer_range", float, 1.0, 0.02)
        return initialize(shape, std, args.seed).to(device), torch.float32
    model = Llama.from_pretrained(source, device)
    dtype = model.dtype
    return model.float().requires_grad_(True), dtype


def read_targets(path: str, tokenizer: Tokenizer, limit: int) -> list[Question]:
    """A file's questions, less those whose sequences do not fit the model's context; says how many
    these are. Raises InputError if a question has no texts to learn, or none fits."""
    fit = []
    questions = read_questions(path)
    for question in questions:
        taught = question.recall is not None and question.analyses is not None
        missing = f"{path}: question {question.id[:40]!r} has no 'recall' or no 'analyze' to learn"
        make = "a benchmark has them after: python data/prepare.py NAME --targets"
        expect(taught, f"{missing}; {make}")
        if longest(question, tokenizer) <= limit:
            fit.append(question)
    context = f"the model's context of {limit} tokens"
    expect(len(fit) > 0, f"{path}: no question fits {context}")
    if len(fit) < len(questions):
        left_out = len(questions) - len(fit)
        print(f"{path}: {left_out} questions left out, longer than {context}", file=sys.stderr)
    return fit


def valid_batches(questions: list[Question], tokenizer: Tokenizer, size: int) -> list[Batch]:
    """The same sequences of some questions, whatever the seed."""
    rows = draw_sequences(questions[:VALID_QUESTIONS], tokenizer, random.Random(0))
    return [make_batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def start_of(args, source: Path, steps: int, bf16: bool, nested: NestedSkips | None) -> dict:
    """All that decides a run's weights, by the names that messages use."""
    start = {
        "the data": digest_of([Path(args.data)]),
        "the prompts": prompts_digest(),
        **contents_of(source, weights=not args.scratch),
        "--bf16": bf16,
        "--skip-plan": None if nested is None else str(nested.rankings),
    }
    for name, value in vars(args).items():
        if name not in UNCHANGING:
            start["--" + name.replace("_", "-")] = value
    return start | {"--steps": steps}


def check_fit(args, source: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Raises InputError if tokenizer or flags are not for this model."""
    tokenizer.limit = model.args.vocab_size  # a text with a token beyond it is refused
    eos = min(tokenizer.eos_ids)
    tokens = f"its end token is {eos}, and the model has {model.args.vocab_size} tokens"
    expect(eos < model.args.vocab_size, f"{source}: {tokens}")
    n_layers = model.args.n_layers
    layers = f"--freeze-below {args.freeze_below}: the model has {n_layers} layers"
    expect(args.freeze_below <= n_layers, layers)


def train(
    trainer: Trainer, feed: Feed, valid: list[Batch], args, out: Path, first: int, start: dict
) -> None:
    """Steps first .. last - 1, with a line and a saved state every now and then."""
    last = min(feed.steps, args.stop or feed.steps)
    if valid:
        print(f"step {first}: validation loss {trainer.validate(valid):.4f}", flush=True)
    if first >= last:
        return
    begin = time.perf_counter()
    aside = 0.0  # seconds of validating and saving
    bar = progress(feed.ahead(first, last), "training", last, initial=first, unit="step")
    for step, (jobs, labelled) in enumerate(bar, first):
        loss = trainer.step(step, jobs, labelled)
        done = step + 1
        saving = done % args.save_every == 0 or done == last
        if not (saving or done % LOOK_EVERY == 0):
            continue
        loss = loss.item()
        expect(math.isfinite(loss), f"step {done}: the loss is {loss}; try a smaller --lr")
        bar.set_postfix(loss=f"{loss:.3f}")
        if saving:
            paused = time.perf_counter()
            text = f"step {done}: training loss {loss:.4f}"
            if valid:
                text += f", validation loss {trainer.validate(valid):.4f}"
            bar.clear()
            print(text, flush=True)
            save_state(trainer.modules, trainer.optimizer, out, done, start)
            aside += time.perf_counter() - paused
    each = (time.perf_counter() - begin - aside) / (last - first)
    peak = peak_memory(trainer.model.device) / 1e9
    print(f"{last - first} steps of {each:.3f} s, at most {peak:.2f} GB of memory")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at a time, of the GPU or of this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def make_feed(args, questions, tokenizer, model: Llama, steps: int, nested) -> Feed:
    return Feed(
        questions=questions,
        tokenizer=tokenizer,
        n_layers=model.args.n_layers,
        steps=steps,
        size=args.batch_size,
        accumulate=args.accumulate,
        seed=args.seed,
        options=args.options_per_step,
        stochastic_depth=args.stochastic_depth,
        nested=nested,
        pin=model.device.type == "cuda",
    )


def make_beside(args, model: Llama) -> GateTraining | RouterTraining | None:
    """New gates or routers, as the flags ask, on the model's device."""
    shape = (model.args.n_layers, model.args.dim)
    training = None
    if args.gates:
        training = GateTraining(Gates(*shape), args.gate_weight, args.gate_share)
    elif args.routers:
        training = RouterTraining(Routers(*shape), args.capacity)
    if training is not None:
        training.module.initialize(args.seed)
        training.module.to(model.device)
    return training


def make_trainer(args, model: Llama, steps: int, bf16: bool) -> Trainer:
    beside = make_beside(args, model)
    modules = modules_of(model, beside)
    pool = None
    if args.workers > 1:
        pool = ThreadPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,))
    return Trainer(
        model=model,
        optimizer=make_optimizer(modules, args.lr, args.weight_decay),
        bf16=bf16,
        freeze_below=args.freeze_below,
        lr=args.lr,
        warmup=args.warmup,
        steps=steps,
        clip=args.clip,
        beside=beside,
        pool=pool,
    )


def main() -> None:
    args = parse_args()
    source = find_checkpoint(args.model)
    out = Path(args.out)
    device = find_device(args.device)
    bf16 = args.bf16 == "on" or (args.bf16 == "auto" and device.type == "cuda")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length of a batch
    model, dtype = load_start(args, source, device)
    freeze(model, args.freeze_below)
    tokenizer = Tokenizer.from_pretrained(source)
    if file_of(source) is not None:
        print(f"{file_of(source)} is not used, nor trained further", file=sys.stderr)
    check_fit(args, source, model, tokenizer)

    questions = read_targets(args.data, tokenizer, model.args.max_seq_len)
    valid = []
    if args.valid:
        held_out = read_targets(args.valid, tokenizer, model.args.max_seq_len)
        valid = valid_batches(held_out, tokenizer, args.batch_size)
    nested = None
    if args.skip_plan is not None:
        rankings = read_skip_plan(args.skip_plan, model.args.n_layers)
        nested = NestedSkips(rankings, model.args.n_layers, args.skip_most)
    steps = args.steps or max(1, math.ceil(args.epochs * len(questions) / args.batch_size))

    # whatever is refused is refused before anything is written
    start = start_of(args, source, steps, bf16, nested)
    resumes = check_state(out, start)
    check_out(source, out)
    copy_folder(source, out, dtype)
    trainer = make_trainer(args, model, steps, bf16)
    first = 0
    if resumes:
        first = load_state(trainer.modules, trainer.optimizer, out)
    feed = make_feed(args, questions, tokenizer, model, steps, nested)
    train(trainer, feed, valid, args, out, first, start)
    save_model(model, out, dtype)
    if trainer.beside is not None:
        write_beside(trainer.beside.module, out)
    (out / RESUME).unlink(missing_ok=True)  # nothing of the run is left to resume


if __name__ == "__main__":
    run(main)
