"""A checkpoint folder that is being trained: what it may hold before, and what is saved in it.

resume.safetensors holds weights, optimizer and step of a run that is not finished, and what the
run was started with: the same command on the same content goes on from there, any other is refused
before anything is written.

    python -c "from tools.checkpoint import *; print(contents_of(Path('data/demo/model')))"
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import INDEX, InputError, Llama, expect, read_json, weight_files
from tools.files import digest_of, write_json

RESUME = "resume.safetensors"
WEIGHTS = "model.safetensors"
ROUTERS = "routers.safetensors"  # what is trained beside the weights, see tools/trained.py
CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json")
TOKENIZER += ("special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")
GENERATION = "generation_config.json"
# what holds or lists weights: never copied
WEIGHT_ENDS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5")
WEIGHT_ENDS += (".msgpack", ".onnx", ".tmp")
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 and 4; where both are read, dtype wins


# ---------------------------------------------------------------- content


def contents_of(source: Path, weights: bool = True) -> dict[str, str]:
    """Digests of what a run starts from, by the names that messages use.

    weights: whether there are any; a run from scratch has none.
    """
    shape = json.dumps(read_shape(source), sort_keys=True)
    tokenizer = [source / name for name in TOKENIZER if (source / name).exists()]
    found = {
        "the model's config.json": hashlib.sha256(shape.encode()).hexdigest(),
        "the tokenizer": digest_of(tokenizer),
    }
    if weights:
        found["the base weights"] = digest_of(sorted(weight_files(source)))
    return found


def read_shape(folder: Path) -> dict:
    """A configuration without the dtype, which is that of the weights that lie beside it."""
    config = read_json(folder / CONFIG)
    return {key: value for key, value in config.items() if key not in DTYPE_KEYS}


# ---------------------------------------------------------------- the folder


def check_out(source: Path, out: Path) -> None:
    """Raises InputError if `out` holds another model's configuration or tokenizer: the new weights
    would be read with them."""
    if not out.exists() or source.resolve() == out.resolve():
        return
    expect(out.is_dir(), f"--out {out}: expected a folder")
    wanted = f"expected a new folder, or one that holds {source}'s own"
    if (out / CONFIG).exists():
        same = read_shape(out) == read_shape(source)
        expect(same, f"--out {out}: its {CONFIG} is another model's; {wanted}")
    for name in (*TOKENIZER, GENERATION):
        if (out / name).exists():
            same = (source / name).exists() and same_content(source / name, out / name)
            expect(same, f"--out {out}: its {name} is another model's; {wanted}")


def same_content(a: Path, b: Path) -> bool:
    return digest_of([a]) == digest_of([b])


def copy_folder(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Everything of a checkpoint folder but its weights; config.json says the new weights' dtype.
    A file of another kind that `out` has already, such as a README.md, stays."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if source.resolve() != out.resolve():
            for path in files_to_copy(source):
                if not (out / path.name).exists():
                    copy_file(path, out / path.name)
    except OSError as e:
        raise InputError(f"--out {out}: expected a folder to write to ({e.strerror})") from None
    name = str(dtype).removeprefix("torch.")
    write_json(out / CONFIG, read_json(source / CONFIG) | dict.fromkeys(DTYPE_KEYS, name))


def files_to_copy(source: Path) -> Iterator[Path]:
    """The files of a folder that are no weights; hidden ones and folders stay where they are."""
    for path in sorted(source.iterdir()):
        weights = path.name.endswith(WEIGHT_ENDS)
        if path.is_file() and not weights and not path.name.startswith(".") and path.name != CONFIG:
            yield path


def copy_file(source: Path, target: Path) -> None:
    """Whole or not at all: half a tokenizer would be taken for another model's."""
    part = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, part)
    os.replace(part, target)


def drop_shards(out: Path) -> None:
    """Deletes the shards of the model that stood in a folder before: `model.safetensors` wins over
    them, here and in transformers, but not everywhere."""
    index = out / INDEX
    if not index.exists():
        return
    try:
        names = set(read_json(index).get("weight_map", {}).values())
        index.unlink()
        for name in names:
            if Path(name).name == name and name.endswith(".safetensors") and name != WEIGHTS:
                (out / name).unlink(missing_ok=True)
    except (InputError, AttributeError, TypeError):  # a damaged index names nothing
        index.unlink(missing_ok=True)
    print(f"{out}: the shards of its former weights are deleted", file=sys.stderr)


# ---------------------------------------------------------------- saving and resuming


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
    """The finished weights, in one file. What was trained beside the former ones goes."""
    tensors = {}
    for name, tensor in model.tensors():
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    save_tensors(out / WEIGHTS, tensors, {"format": "pt"})
    drop_shards(out)
    if (out / ROUTERS).exists():
        (out / ROUTERS).unlink()
        print(f"{out / ROUTERS}: of the former weights, deleted", file=sys.stderr)


def save_state(model: nn.Module, optimizer, out: Path, step: int, start: dict) -> None:
    """start: what the run was started with, by the names that messages use; see `check_state`."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = p.detach().cpu()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu()
    save_tensors(out / RESUME, tensors, {"step": str(step), "start": json.dumps(start)})


def check_state(out: Path, start: dict) -> bool:
    """Whether a folder has a killed run to resume. Raises InputError if that run was started with
    anything else, naming it."""
    path = out / RESUME
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as f:
            before = json.loads(f.metadata()["start"])
        changed = [key for key in before | start if before.get(key) != start.get(key)]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise damaged(path, e) from None
    wanted = "expected the same again, or another --out, or that this file is deleted"
    expect(not changed, f"{path}: a run that differs in {', '.join(changed)}; {wanted}")
    return True


def load_state(model: nn.Module, optimizer, out: Path) -> int:
    """Puts weights and optimizer back where a killed run last saved them; returns its step."""
    path = out / RESUME
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(f.get_tensor(name))
                if p.requires_grad:
                    optimizer.state[p] = read_moments(f, name, p, optimizer)
            return int(f.metadata()["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise damaged(path, e) from None


def read_moments(f, name: str, p: Tensor, optimizer) -> dict[str, Tensor]:
    """AdamW's state of one parameter. It counts steps on the CPU, unless it is the fused one."""
    counter = p.device if optimizer.defaults["fused"] else torch.device("cpu")
    return {
        "step": f.get_tensor(f"step/{name}").to(counter),
        "exp_avg": f.get_tensor(f"exp_avg/{name}").to(p.device),
        "exp_avg_sq": f.get_tensor(f"exp_avg_sq/{name}").to(p.device),
    }


def damaged(path: Path, e: Exception) -> InputError:
    return InputError(f"{path}: damaged ({e!s:.200}); delete it to start again")
