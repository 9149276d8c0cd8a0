"""Small checkpoints for the tests, built on the spot as ordinary Hugging Face folders.

load                a checkpoint's Llama: each test runs with the plain one and with the packed one
folder, llama       a tiny random Llama with grouped-query attention
make_checkpoint     writes one of any configuration
make_chain          a Llama whose next token, and how sure it is, one can choose
"""

import json
import math
import os
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for other threads

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real checkpoints and tokenizers, where present

from model import Llama  # noqa: E402
from tools import fast  # noqa: E402

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TEXT = """Which of these can fly?\n(A) a robin, a bird (B) trout (C) oak\nRecall: Birds can fly.
Analyze: For option A, a robin is a bird. For option B, a trout is a fish.\nSummarize: So the
answer is option A."""


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this configuration holds."""
    dim, hidden, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = config.get("head_dim") or dim // config["num_attention_heads"]
    q, kv = (config[f"num_{k}_heads"] * head_dim for k in ("attention", "key_value"))
    layer = {"input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,)}
    for name, rows, columns, bias in (
        ("self_attn.q_proj", q, dim, "attention_bias"),
        ("self_attn.k_proj", kv, dim, "attention_bias"),
        ("self_attn.v_proj", kv, dim, "attention_bias"),
        ("self_attn.o_proj", dim, q, "attention_bias"),
        ("mlp.gate_proj", hidden, dim, "mlp_bias"),
        ("mlp.up_proj", hidden, dim, "mlp_bias"),
        ("mlp.down_proj", dim, hidden, "mlp_bias"),
    ):
        layer[name + ".weight"] = (rows, columns)
        if config.get(bias):
            layer[name + ".bias"] = (rows,)
    found = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, dim)
    return found


def random_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep the stream's size in order, so that every sub-layer is felt."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        tensor = torch.randn(shape, generator=rng)
        if name.endswith("norm.weight"):
            tensor = 1 + 0.3 * tensor
        elif name.endswith(".bias"):
            tensor = 0.5 * tensor
        elif "embed" in name:
            tensor = 0.3 * tensor  # less than the sub-layers add, or a tied model repeats itself
        else:
            tensor = tensor / math.sqrt(shape[1])
            if name == "lm_head.weight":
                tensor = 3 * tensor  # confidences of all sizes
        tensors[name] = tensor
    return tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """config.json and the weights, in one file or in shards with their index."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE of 300 tokens; 0 begins and 1 ends a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tokenizer_json):
    """make_checkpoint(seed=0, dtype=float32, shards=1, edit=None, **config) -> its folder.

    config: keys to change in BASE. edit: a function that changes the dict of tensors in place.
    """

    def make(seed=0, dtype=torch.float32, shards=1, edit=None, **config) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        config = BASE | config
        tensors = {k: v.to(dtype) for k, v in random_tensors(config, seed).items()}
        if edit is not None:
            edit(tensors)
        (folder / "tokenizer.json").write_text(tokenizer_json)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kind | {"eos_token": "</s>"}))
        return write_checkpoint(folder, config, tensors, shards)

    return make


def load_packed(folder: Path, *args, **options) -> Llama:
    """As the commands do, but here a matrix of 2,000 elements is large enough for oneDNN, so that
    every model has products of both kinds."""
    with mock.patch.object(fast, "PACK_FROM", 2000):
        return fast.pack(Llama.from_pretrained(folder, *args, **options))


@pytest.fixture(scope="session", params=["plain", "packed"])
def load(request):
    """load(folder, device="cpu", dtype=None) -> its Llama, the plain one or the fast one."""
    return load_packed if request.param == "packed" else Llama.from_pretrained


@pytest.fixture(scope="session")
def make_chain(make_checkpoint, load):
    """make_chain({token: (next token, confidence)}, **config) -> a Llama that follows the table.

    Its sub-layers add nothing, so that the embedding alone, one component for each of 32 tokens,
    reaches the head. A token that is not in the table is followed by any token, all equally likely.
    """

    def make(table: dict[int, tuple[int, float]], **config) -> Llama:
        n = 32

        def edit(tensors):
            for name, tensor in tensors.items():
                if "o_proj" in name or "down_proj" in name:
                    tensor.zero_()
                elif "norm" in name:
                    tensor.fill_(1)
            tensors["model.embed_tokens.weight"] = torch.eye(n)
            head = tensors["lm_head.weight"].zero_()  # times sqrt(n), the embedding's size normed
            for token, (following, confidence) in table.items():
                odds = confidence / (1 - confidence) * (n - 1)
                head[following, token] = math.log(odds) / math.sqrt(n)

        config = {"vocab_size": n, "hidden_size": n, "rms_norm_eps": 1e-12} | config
        return load(make_checkpoint(edit=edit, **config))

    return make


@pytest.fixture(scope="session")
def folder(make_checkpoint) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="session")
def llama(folder, load) -> Llama:
    return load(folder)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no folder of real checkpoints beside the repository")
    return SHARED
