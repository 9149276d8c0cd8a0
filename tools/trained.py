"""What is trained beside a checkpoint's weights: its file, and the policies that it makes.

routers.safetensors in the checkpoint's folder holds the gates of GateSkip or the routers of DLO;
which of them, and the digest of the weights that were trained with them, stand in its metadata.
Their thresholds are calibrated on validation questions, for each stage and budget, so that a budget
means what it means in every method: the sub-layers that a token skips on average.

    python eval.py --model gated --method gateskip --stage-budgets 4,4,4
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data.prompts import STAGES
from data.questions import Question
from generate import Pipeline, StageResult
from model import Llama, ModelArgs, expect, read_header, read_tensor, weight_files
from skip import Setting
from tools.checkpoint import ROUTERS, save_tensors
from tools.files import digest_of
from tools.gates import Gates
from tools.progress import progress
from tools.ranks import gather
from tools.routers import Routers
from tools.tokenwise import TokenSkip

KINDS = {"gateskip": Gates, "dlo": Routers}
PUBLISHED = "dlo-published"  # DLO with the threshold that it was trained for, whatever the budget
METHODS = (*KINDS, PUBLISHED)
SIDE_BY_SIDE = 16  # questions, while thresholds are calibrated

# ---------------------------------------------------------------- the file


def file_of(folder: Path | None) -> Path | None:
    """The file of what is trained beside a folder's weights, None if it has none."""
    if folder is None or not (folder / ROUTERS).exists():
        return None
    return folder / ROUTERS


def method_of(folder: Path | None) -> str | None:
    """The method that a checkpoint was trained for, None if for none. Raises InputError for a
    damaged file."""
    file = file_of(folder)
    if file is None:
        return None
    return read_metadata(file)["method"]


def read_metadata(file: Path) -> dict[str, str]:
    read_header(file)  # it says what is wrong with a file that is not whole
    with safe_open(file, "pt") as f:
        metadata = f.metadata() or {}
    method = metadata.get("method")
    expect(method in KINDS, f"{file}: 'method' must be one of {list(KINDS)}, found {method!r:.40}")
    return metadata


def write_beside(module: Gates | Routers, folder: Path) -> None:
    """Writes gates or routers beside the weights that were trained with them, which stand in the
    folder already."""
    tensors = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tensors[name] = parameter.detach().to("cpu", torch.float32).contiguous()
    metadata = {"method": module.method, "weights": digest_of(sorted(weight_files(folder)))}
    save_tensors(folder / ROUTERS, tensors, metadata)


def read_beside(model: Llama, pack: bool) -> Gates | Routers:
    """The gates or routers of a checkpoint that has some, for inference, on the model's device.

    pack: compute products as tools/fast.py does. Raises InputError if the file does not hold
    exactly what this model needs, or was trained with other weights.
    """
    file = model.folder / ROUTERS
    metadata = read_metadata(file)
    same = metadata.get("weights") == digest_of(sorted(weight_files(model.folder)))
    expect(same, f"{file}: trained with other weights than this folder's")
    module = KINDS[metadata["method"]](model.args.n_layers, model.args.dim)
    found = {name: shape for name, (_, shape) in read_header(file).items()}
    wanted = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            wanted[name] = tuple(parameter.shape)
    shape = f"{len(module.layers)} layers of dim {model.args.dim}"
    expect(found == wanted, f"{file}: expected the tensors of {shape}, no more and no less")
    module.requires_grad_(False)
    for name in wanted:
        module.get_parameter(name).copy_(read_tensor(file, name))
    module.to(model.device, model.dtype)
    if pack:
        module.pack()
    return module


# ---------------------------------------------------------------- the policies


class Trained:
    """Policies of a checkpoint's gates or routers, calibrated on validation questions.

    Scores are those of decoded tokens: first of decoding that skips nothing, then once more under
    the thresholds that these gave, since skipping changes what later sub-layers read.
    """

    def __init__(self, pipeline: Pipeline, module: Gates | Routers, questions: list[Question]):
        self.pipeline = pipeline
        self.module = module
        self.n_layers = pipeline.model.args.n_layers
        self.questions = questions
        self.answered: list[list[StageResult]] = []  # all stages of each question, none skipping
        self.seen: list = []  # for each stage its scores, see `TokenHook`
        self.found: dict[tuple[int, int], Tensor] = {}  # thresholds by (stage, budget)

    def policies(self) -> dict:
        """By name, as `skip.POLICIES`."""
        found = {self.module.method: self.skip}
        if isinstance(self.module, Routers):
            found[PUBLISHED] = self.published
        return found

    def skip(self, setting: Setting, budget: int) -> TokenSkip:
        """Skips `budget` sub-layers a token, on average; at 0 gates and routers only multiply."""
        return self.steps(self.module.hook(self.thresholds(setting.stage, budget)))

    def published(self, setting: Setting, budget: int) -> TokenSkip:
        """What DLO's routers were trained to skip, whatever the budget."""
        return self.steps(self.module.published())

    def steps(self, hook) -> TokenSkip:
        return TokenSkip(self.n_layers, hook, self.module.hook(None))

    @torch.inference_mode()
    def thresholds(self, stage: int, budget: int) -> Tensor:
        """For a stage's tokens: (n_layers, 2); the first rank's for all."""
        nothing = torch.full((self.n_layers, 2), -torch.inf)
        if budget == 0:
            return nothing
        if (stage, budget) not in self.found:
            if not self.seen:
                self.answer(nothing)
            first = self.module.thresholds(self.seen[stage], budget)
            again = self.module.thresholds(self.watch(stage, first), budget)
            self.found[stage, budget] = gather(again)[0]
        return self.found[stage, budget]

    def answer(self, nothing: Tensor) -> None:
        """All stages of all questions, nothing skipped: their texts and scores."""
        hooks = []
        for _ in STAGES:
            hooks.append(self.module.hook(nothing))
            hooks[-1].keep_scores(self.n_layers)
        skips = [self.steps(hook) for hook in hooks]
        for start in progress(range(0, len(self.questions), SIDE_BY_SIDE), "thresholds"):
            chosen = self.questions[start : start + SIDE_BY_SIDE]
            for _, stages in self.pipeline.answer(chosen, skips):
                self.answered.append(stages)
        self.seen = [hook.seen for hook in hooks]

    def watch(self, stage: int, thresholds: Tensor) -> list:
        """The scores of one stage of all questions, decoded under thresholds."""
        hook = self.module.hook(thresholds)
        hook.keep_scores(self.n_layers)
        for start in range(0, len(self.questions), SIDE_BY_SIDE):
            chosen = self.questions[start : start + SIDE_BY_SIDE]
            said = []
            for stages in self.answered[start : start + SIDE_BY_SIDE]:
                said.append([result.texts for result in stages[:stage]])
            caches = self.pipeline.new_caches(len(chosen))
            self.pipeline.run_stage(stage, chosen, said, caches, self.steps(hook))
        return hook.seen


def budgets_of(method: str, grid: list[list[int]]) -> list[list[int]]:
    """At which budgets a method is compared: all of the grid; trained ones skipping nothing, too,
    which costs them their gates, and only so where budgets do not count."""
    nothing = [0] * len(STAGES)
    if method == PUBLISHED:
        return [nothing]
    if method in METHODS:
        return [nothing, *grid]
    return grid


# ---------------------------------------------------------------- multiply-adds


def multiply_adds(args: ModelArgs, method: str, skipped: float, skipped_ffn: float) -> float:
    """Of a decoded token on average: one for every weight of the matrices that it is multiplied by,
    the head's and those of gates and routers among them. What attention does with earlier tokens
    is left out: it depends on how many there are.

    skipped, skipped_ffn: sub-layers that a token skips on average, and those that are FFNs.
    """
    kv_dim = args.n_kv_heads * args.head_dim
    q_dim = args.n_heads * args.head_dim
    attention = args.dim * (2 * q_dim + 2 * kv_dim)
    ffn = 3 * args.dim * args.hidden_dim
    total = args.dim * args.vocab_size
    total += attention * (args.n_layers - (skipped - skipped_ffn))
    total += ffn * (args.n_layers - skipped_ffn)
    if method == "gateskip":
        total += 2 * args.n_layers * args.dim * args.dim  # a gate is computed to be asked
    elif method in ("dlo", PUBLISHED):
        total += args.n_layers * args.dim
    return total
