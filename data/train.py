r"""Train a Llama on the three stages: from scratch (the demo) or from any checkpoint.

Every question with its "recall" and "analyze" texts becomes one sequence, exactly the stage prompts
of data/prompts.py; only what a stage generates is learned, and the last token of each such segment
is taught to end the text, although the sequence goes on. In half of the sequences the options are
analyzed in a random order, because in use each is analyzed with no other before it. The summary's
few tokens weigh more, since one of them is the answer.

Stochastic depth (Huang et al. 2016) skips random sub-layers while training, deeper ones more often,
so that skipping them later costs less. Whatever is random in a step depends on the seed and the
step's number alone; a run that was killed continues where it last saved when the same command
is given again, and ends with the same weights.

    python data/train.py --model data/demo/model --data data/demo/train.jsonl \
        --out tuned --steps 20
"""

import json
import math
import os
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import cli  # isort: skip  (first, for Ctrl-C: torch takes a second to load)

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.prompts import base_prompt
from data.questions import Question, read_questions
from data.setup import find_checkpoint, find_device
from generate import Tokenizer
from model import InputError, Llama, ModelArgs, expect, read_json, read_number

SUMMARY_WEIGHT = 8.0  # of a token of the summary in the loss, where others weigh 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
VALID_QUESTIONS = 128  # of --valid that the loss is measured on
UNCHANGING = ("out", "save_every", "device", "workers", "stop")  # flags that change no weight
RESUME = "resume.safetensors"  # weights, optimizer and step of a run that is not finished

# ---------------------------------------------------------------- sequences


def pieces(question: Question, order: list[int]) -> list[tuple[str, float]]:
    """The text of a question's stages in pieces, and what a token of each weighs in the loss.

    order: the options' indices in the order of their analyses.
    """
    parts = [(base_prompt(question) + "\nRecall:", 0.0), (f" {question.recall}", 1.0)]
    parts.append(("\nAnalyze:", 0.0))
    for i in order:
        parts.append((f" For option {question.labels[i]},", 0.0))
        parts.append((f" {question.analyses[i]}", 1.0))
    parts.append(("\nSummarize:", 0.0))
    parts.append((f" So the answer is option {question.answer}.", SUMMARY_WEIGHT))
    return parts


def sequence(question: Question, order: list[int] | None, tokenizer: Tokenizer):
    """(ids, labels, weights): labels[i] is what the model shall say after ids[i], and counts
    weights[i] in the loss. order: as for `pieces`; None is the question's own."""
    parts = pieces(question, order or list(range(len(question.labels))))
    ids = tokenizer.encode("".join(text for text, _ in parts))
    labels, weights = [0] * len(ids), [0.0] * len(ids)
    eos, text, start = min(tokenizer.eos_ids), "", 0
    for piece, weight in parts:
        text += piece
        end = start  # of the tokens that the text so far has in common with the whole
        for end, (a, b) in enumerate(zip(tokenizer.encode(text), ids), 1):  # noqa: B007
            if a != b:
                end -= 1
                break
        if weight:
            labels[start - 1 : end] = [*ids[start:end], eos]
            weights[start - 1 : end] = [weight] * (end - start + 1)
        start = end
    return ids, labels, weights


def batch(rows: list[tuple[list, list, list]], device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and weights (bsz, seqlen), padded on the right, where causality hides it."""
    seqlen = max(len(row[0]) for row in rows)
    padded = ([part + [0] * (seqlen - len(part)) for part in parts] for parts in zip(*rows))
    return tuple(torch.tensor(part, device=device) for part in padded)


def draw_rows(questions, tokenizer, rng):
    """Sequences of some questions, shorter ones first, so that micro-batches pad little."""
    rows = []
    for question in questions:
        order = list(range(len(question.labels)))
        rng.shuffle(order)
        rows.append(sequence(question, order if rng.random() < 0.5 else None, tokenizer))
    return sorted(rows, key=lambda row: len(row[0]))


def draw_skip(n_layers: int, most: float, rng) -> Tensor | None:
    """A skip mask (n_layers, 2) for one micro-batch, None for no stochastic depth.

    The rate is drawn anew each time, uniform between 0 and twice `most`; a sub-layer is skipped
    with probability rate x its depth (0 at the first, 1 at the last), at most 1. So the last
    sub-layers are skipped `most` of the time on average, and some micro-batches skip nearly
    nothing, others all of the upper half.
    """
    if not most:
        return None
    rate, last = rng.random() * 2 * most, 2 * n_layers - 1
    flat = [rng.random() < rate * i / last for i in range(2 * n_layers)]
    return torch.tensor(flat).view(n_layers, 2)


# ---------------------------------------------------------------- training


def loss_sum(model: Llama, tokens: Tensor, labels: Tensor, weights: Tensor, skip=None) -> Tensor:
    """The weighted cross-entropy, summed over the labelled tokens; skip: as in Llama.forward."""
    where = weights > 0
    logits = model(tokens, skip=skip)[where]  # (labelled tokens, vocab)
    loss = F.cross_entropy(logits.float(), labels[where], reduction="none")
    return (loss * weights[where]).sum()


@torch.no_grad()
def validate(model: Llama, rows, device, size: int, cast) -> float:
    """The mean weighted loss per labelled token, all layers running."""
    total = count = 0.0
    for i in range(0, len(rows), size):
        tokens, labels, weights = batch(rows[i : i + size], device)
        with cast():
            total += loss_sum(model, tokens, labels, weights).item()
        count += weights.sum().item()
    return total / count


def initialize(args: ModelArgs, std: float, seed: int) -> Llama:
    """A model with random weights: normal, outputs into the residual stream smaller (GPT-2)."""
    torch.manual_seed(seed)
    model = Llama(args)
    for name, tensor in dict(model.tensors()).items():
        if tensor.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * args.n_layers) if into_residual else std
            torch.nn.init.normal_(tensor.data, 0.0, scale)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(tensor.data)
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: Llama, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)


# ---------------------------------------------------------------- files


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({e})") from None


def save_model(model: Llama, out: Path, dtype: torch.dtype) -> None:
    tensors = {
        name: t.detach().to("cpu", dtype).contiguous() for name, t in dict(model.tensors()).items()
    }
    save_tensors(out / "model.safetensors", tensors, {"format": "pt"})


def save_state(model: Llama, optimizer, out: Path, step: int, settings: str) -> None:
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = p.detach().cpu()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}/{name}"] = value.detach().cpu()
    save_tensors(out / RESUME, tensors, {"step": str(step), "settings": settings})


def load_state(model: Llama, optimizer, out: Path, settings: str) -> int:
    """Puts weights and optimizer back where a killed run last saved them; 0 without such a run."""
    path = out / RESUME
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as f:
            if f.metadata()["settings"] != settings:
                raise InputError(
                    f"{path}: from a run with other settings; expected the same command again, "
                    "or another --out, or that this file is deleted"
                )
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(f.get_tensor(name))
                    optimizer.state[p] = {
                        key: f.get_tensor(f"{key}/{name}").to(p.device if key != "step" else "cpu")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            return int(f.metadata()["step"])
    except (OSError, SafetensorError, KeyError, TypeError) as e:
        raise InputError(f"{path}: damaged ({e}); delete it to start again") from None


def copy_folder(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Everything of a checkpoint folder but its weights."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: expected a folder ({e.strerror})") from None
    config = read_json(source / "config.json")
    cli.write_json(out / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
    if source.resolve() != out.resolve():
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)


# ---------------------------------------------------------------- command


def parse_args():
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder to start from, hub id ORG/NAME, or demo")
    add("--scratch", action="store_true", help="random weights; --model needs no weights then")
    add("--data", required=True, help="questions with recall and analyze texts (JSON lines)")
    add("--valid", help="such a file, for the validation loss")
    add("--out", required=True, help="checkpoint folder to write; a killed run resumes there")
    add("--steps", type=cli.positive, help="optimizer steps (default: what --epochs makes)")
    add("--stop", type=cli.positive, help="end after this step, before the schedule does")
    add("--epochs", type=cli.number, default=1.0, help="passes over --data (default: 1)")
    add("--batch-size", type=cli.positive, default=32, help="questions per step (default: 32)")
    add("--accumulate", type=cli.positive, default=2, help="micro-batches per step (default: 2)")
    add("--workers", type=cli.positive, default=1, help="micro-batches at a time (default: 1)")
    add("--lr", type=cli.number, default=1e-3, help="peak learning rate (default: 1e-3)")
    add("--warmup", type=cli.natural, default=50, help="warm-up steps (default: 50)")
    add("--weight-decay", type=cli.number, default=0.05, help="of matrices (default: 0.05)")
    add("--clip", type=cli.number, default=1.0, help="largest gradient norm (default: 1)")
    add(
        "--stochastic-depth",
        type=cli.fraction,
        default=0.0,
        metavar="P",
        help="how often the last sub-layer is skipped while training (default: 0)",
    )
    add("--save-every", type=cli.positive, default=100, help="steps between saves (default: 100)")
    add("--seed", type=cli.natural, default=0, help="seed of weights, order and skips (default: 0)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add(
        "--bf16",
        choices=["auto", "on", "off"],
        default="auto",
        help="autocast to bfloat16; auto: on a GPU only (default: auto)",
    )
    args = parser.parse_args()
    for name in ("epochs", "lr", "clip"):
        if getattr(args, name) == 0:
            parser.error(f"--{name} must be above 0")
    return args


def load_start(args, source: Path, device) -> tuple[Llama, torch.dtype]:
    """The model to train, its weights in float32, and the dtype to store it in."""
    if args.scratch:
        config = read_json(source / "config.json")
        shape = ModelArgs.from_config(config, str(source / "config.json"))
        std = read_number(config, source / "config.json", "initializer_range", float, 1.0, 0.02)
        return initialize(shape, std, args.seed).to(device), torch.float32
    model = Llama.from_pretrained(source, device, pack=False)
    dtype = model.embed.weight.dtype
    return model.float().requires_grad_(True), dtype


def fitting(questions: list[Question], tokenizer: Tokenizer, limit: int, path) -> list[Question]:
    """The questions whose sequences fit the model's context; says how many do not."""
    orders = (range(len(q.labels)) for q in questions)
    texts = ("".join(text for text, _ in pieces(q, i)) for q, i in zip(questions, orders))
    fit = [q for q, text in zip(questions, texts) if len(tokenizer.encode(text)) <= limit]
    if not fit:
        raise InputError(f"{path}: no question fits the model's context of {limit} tokens")
    if len(fit) < len(questions):
        print(
            f"{path}: {len(questions) - len(fit)} questions left out, longer than the model's "
            f"context of {limit} tokens",
            file=sys.stderr,
        )
    return fit


def main():
    args = parse_args()
    source, out, device = find_checkpoint(args.model), Path(args.out), find_device(args.device)
    model, dtype = load_start(args, source, device)
    tokenizer = Tokenizer.from_pretrained(source)
    if tokenizer.vocab_size > model.args.vocab_size:
        raise InputError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, more than "
            f"the model's {model.args.vocab_size}"
        )
    limit = model.args.max_seq_len
    questions = fitting(read_questions(args.data, targets=True), tokenizer, limit, args.data)
    valid = []
    if args.valid:
        valid = fitting(read_questions(args.valid, targets=True), tokenizer, limit, args.valid)
        valid = draw_rows(valid[:VALID_QUESTIONS], tokenizer, random.Random(0))
    size = args.batch_size
    steps = args.steps or max(1, math.ceil(args.epochs * len(questions) / size))
    use_bf16 = args.bf16 == "on" or (args.bf16 == "auto" and device.type == "cuda")

    def cast():
        return torch.autocast(device.type, torch.bfloat16) if use_bf16 else nullcontext()

    copy_folder(source, out, dtype)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    ours = {k: v for k, v in vars(args).items() if k not in UNCHANGING}
    settings = json.dumps(ours | {"questions": len(questions), "steps": steps})
    first = load_state(model, optimizer, out, settings)
    last = min(steps, args.stop or steps)

    parameters = list(model.parameters())
    pool = (
        ThreadPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,))
        if args.workers > 1
        else SimpleNamespace(map=map)
    )

    def gradients(rows, skip, labelled):
        with cast():
            loss = loss_sum(model, *batch(rows, device), skip) / labelled
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    if valid:
        print(f"step {first}: validation loss {validate(model, valid, device, size, cast):.4f}")
    order, epoch = [], -1
    bar = cli.progress(range(first, last), initial=first, total=last, file=sys.stderr, unit="step")
    for step in bar:
        rng = random.Random(f"{args.seed} {step}")
        chosen = []
        for n in range(step * size, (step + 1) * size):
            if n // len(questions) != epoch:
                epoch, order = n // len(questions), list(range(len(questions)))
                random.Random(f"{args.seed} epoch {epoch}").shuffle(order)
            chosen.append(questions[order[n % len(questions)]])
        rows = draw_rows(chosen, tokenizer, rng)
        labelled = sum(sum(weights) for _, _, weights in rows)
        micro = math.ceil(size / args.accumulate)
        depth = args.stochastic_depth * min(1, 5 * (step + 1) / steps)  # rises in the first fifth
        jobs = [
            (rows[i : i + micro], draw_skip(model.args.n_layers, depth, rng))
            for i in range(0, size, micro)
        ]
        total = 0.0
        for p in parameters:  # a sub-layer that every micro-batch skipped stands still
            p.grad = torch.zeros_like(p)
        for loss, grads in pool.map(lambda job: gradients(*job, labelled), jobs):  # noqa: B023
            total += loss
            for p, grad in zip(parameters, grads):
                if grad is not None:
                    p.grad += grad
        expect(math.isfinite(total), f"step {step + 1}: the loss is {total}; try a smaller --lr")
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step()
        bar.set_postfix(loss=f"{total:.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == last:
            text = f"step {step + 1}: training loss {total:.4f}"
            if valid:
                text += f", validation loss {validate(model, valid, device, size, cast):.4f}"
            tqdm.write(text)
            save_state(model, optimizer, out, step + 1, settings)
    bar.close()
    save_model(model, out, dtype)
    (out / RESUME).unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
