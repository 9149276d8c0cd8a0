"""How fast the decoder is against the memory's limit, and against transformers where installed.

Random weights of a given shape, made in memory. Everything that is compared takes turns in this one
process, run after run; medians, with the quartiles' spread. Not part of the tests.

    python -m tests.bench --shape tinyllama --layers 4 --dtype float32
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import cli  # noqa: E402
from model import DTYPES, KVCache, Linear, Llama, ModelArgs, read_json  # noqa: E402
from skip import mask_of  # noqa: E402

TINYLLAMA = ModelArgs(
    dim=2048,
    n_layers=22,
    n_heads=32,
    n_kv_heads=4,
    head_dim=64,
    hidden_dim=5632,
    vocab_size=32000,
    norm_eps=1e-5,
)


def shape_of(name: str) -> ModelArgs:
    """tinyllama, demo, or the configuration in a file."""
    if name == "tinyllama":
        return TINYLLAMA
    path = ROOT / "data" / "demo" / "model" / "config.json" if name == "demo" else Path(name)
    return ModelArgs.from_config(read_json(path), path)


def random_llama(args: ModelArgs, dtype: torch.dtype) -> tuple[Llama, dict]:
    """A packed model of random weights, and the same weights by their Hugging Face names."""
    with torch.device("meta"):
        model = Llama(args)
    model = model.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()
    state = {}
    for module, named in model.parts():
        for name, tensor in named.items():
            tensor.normal_(0, 0.02) if tensor.ndim == 2 else tensor.fill_(1)
            state[name] = tensor.clone()
        if isinstance(module, Linear):
            module.pack()
    return model, state


def alternate(rounds: int, **functions) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, relative spread of the quartiles)}, the functions taking turns."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if i > 0:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    return {
        name: (median(ts), (quantiles(ts)[2] - quantiles(ts)[0]) / median(ts))
        for name, ts in times.items()
    }


def weights_per_token(args: ModelArgs, dtype: torch.dtype, attention=None, ffn=None) -> int:
    """Bytes of weights that a decoding step reads, with that many sub-layers of each kind."""
    attention = args.n_layers if attention is None else attention
    ffn = args.n_layers if ffn is None else ffn
    kv = args.n_kv_heads * args.head_dim
    per_attention = args.dim * (2 * args.n_heads * args.head_dim + 2 * kv)
    per_ffn = 3 * args.dim * args.hidden_dim
    head = args.vocab_size * args.dim
    return dtype.itemsize * (attention * per_attention + ffn * per_ffn + head)


def row(name: str, seconds: float, spread: float, note: str = "") -> None:
    print(f"{name:<40}{1e3 * seconds:>10.2f} ms  +-{spread / 2:>4.0%}  {note}")


@torch.inference_mode()
def main() -> None:
    parser = cli.make_parser(__doc__, "--dtype", "--limit")
    parser.add_argument("--shape", default="tinyllama", help="tinyllama, demo or a config.json")
    parser.add_argument("--layers", type=cli.positive, help="fewer layers of the same width")
    parser.add_argument("--rounds", type=cli.positive, default=9, help="(default: %(default)s)")
    options = parser.parse_args()
    args = shape_of(options.shape)
    args = replace(args, n_layers=options.layers or args.n_layers)
    dtype = DTYPES[options.dtype or "bfloat16"]
    model, state = random_llama(args, dtype)
    bytes_read = weights_per_token(args, dtype)
    packed = any(isinstance(m, Linear) and m.packed is not None for m in model.modules())
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{options.shape}, {args.n_layers} layers, {dtype}, {bytes_read / 1e9:.3f} GB a token, "
        f"{torch.get_num_threads()} threads, {capability}, packed: {packed}\n"
    )

    buffer = torch.zeros(bytes_read // 4)  # a plain read of as many bytes, by PyTorch's own sum
    caches = {n: KVCache(model, 1, n + 1) for n in (64, 512, 2048) if n < args.max_seq_len}
    token = torch.tensor([[1]])

    def step(n, skip=None, rows=1):
        return lambda: model(token.expand(rows, 1), caches[n], n, skip)[:, -1].argmax(-1).tolist()

    functions = {"plain read of the same bytes": lambda: buffer.sum().item()}
    functions |= {f"decode, context {n}": step(n) for n in caches}
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: not measured")
    else:
        config = transformers.LlamaConfig(
            hidden_size=args.dim,
            intermediate_size=args.hidden_dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads,
            head_dim=args.head_dim,
            vocab_size=args.vocab_size,
            max_position_embeddings=args.max_seq_len,
            tie_word_embeddings=args.tied,
            dtype=dtype,
        )
        theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
        theirs.load_state_dict(state, strict=not args.tied)
        prompt = torch.ones(1, 64, dtype=torch.long)
        flags = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

        def generate(n):
            return lambda: theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, **flags)

        # decoding is the difference of a long and a short generation
        functions |= {"transformers, 1 token": generate(1), "transformers, 17": generate(17)}
    state.clear()
    times = alternate(options.rounds, **functions)
    read = times["plain read of the same bytes"][0]
    for name, (seconds, spread) in times.items():
        share = f"{bytes_read / seconds / 1e9:6.1f} GB/s, {read / seconds:4.0%} of a plain read"
        row(name, seconds, spread, "" if "transformers" in name else share)
    if "transformers, 17" in times:
        per_token = (times["transformers, 17"][0] - times["transformers, 1 token"][0]) / 16
        ours = times["decode, context 64"][0]
        print(
            f"transformers generate: {1e3 * per_token:.2f} ms a token, {per_token / ours:.2f}x ours"
        )

    print("\nskipping k sub-layers, the last first, against the ideal by bytes")
    budgets = [k for k in (4, 8, 16, 24, 30) if k < 2 * args.n_layers]
    order = [(layer, sub) for layer in reversed(range(args.n_layers)) for sub in (1, 0)]
    masks = {k: mask_of(order[:k], args.n_layers) for k in (0, *budgets)}
    times = alternate(options.rounds, **{str(k): step(64, mask) for k, mask in masks.items()})
    for k in budgets:
        kept = args.n_layers - masks[k].sum(0)
        ideal = bytes_read / weights_per_token(args, dtype, int(kept[0]), int(kept[1]))
        gained = times["0"][0] / times[str(k)][0]
        note = f"{gained:.2f}x, ideal {ideal:.2f}x, {gained / ideal:.0%} of it"
        row(f"skip {k}", *times[str(k)], note)

    prompts = {n: torch.ones(1, n, dtype=torch.long) for n in caches}
    functions = {
        str(n): lambda n=n: model(prompts[n], KVCache(model, 1, n), 0, last=True) for n in prompts
    }
    print("\nprefill")
    for name, (seconds, spread) in alternate(3, **functions).items():
        row(f"{name} tokens", seconds, spread, f"{int(name) / seconds:.0f} tokens/s")


if __name__ == "__main__":
    os.chdir(ROOT)
    cli.run(main)
