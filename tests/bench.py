"""How fast the decoder is: against the memory's limit, the plain model, transformers and llama.cpp.

Random weights of a given shape, made in memory, or a checkpoint's. Ours is the packed model of
tools/fast.py; plain is model.py's. transformers and llama-cpp-python are measured on the same
weights where they are installed (llama.cpp also needs `gguf`, and reads a temporary file). Whatever
is compared takes turns in this one process, run after run, after a run that warms up. Printed are
medians and half the distance of the quartiles. Not part of the tests.

    python -m tests.bench decoding skipping --layers 16 --dtype float32
    python -m tests.bench profile decoding --model demo --dtype float32 --compile
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generate import Stepper, Until, generate_batch  # noqa: E402
from model import DTYPES, KVCache, Llama, ModelArgs, Skip, expect, read_json  # noqa: E402
from skip import mask_of  # noqa: E402
from tools import fast  # noqa: E402
from tools.command import run  # noqa: E402
from tools.flags import make_parser, positive  # noqa: E402
from tools.progress import progress  # noqa: E402
from tools.setup import find_checkpoint  # noqa: E402

TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
CONTEXTS, STEPS, BUDGETS = (64, 512, 2048), 16, (4, 8, 12, 16, 20, 24, 30)
SLOW = 5  # the most rounds of what takes long: prefill and the stages
MOST_OPERATORS = 14  # lines of the profile
RECALL, ANALYZE, SUMMARIZE = STEPS, STEPS, 8  # tokens that each stage generates
# Continues a prompt by n tokens: (their ids, seconds of the prefill, seconds of a decoding step).
Decoder = Callable[[list[int], int], tuple[list[int], float, float]]


# ---------------------------------------------------------------- weights


def shape_of(name: str, n_layers: int | None) -> dict:
    """The configuration of tinyllama or demo, or in a file; with room for the longest context."""
    path = ROOT / "data" / "demo" / "model" / "config.json" if name == "demo" else Path(name)
    config = dict(TINYLLAMA) if name == "tinyllama" else read_json(path)
    args = ModelArgs.from_config(config, str(path))
    config["max_position_embeddings"] = max(args.max_seq_len, CONTEXTS[-1] + 2 * STEPS)
    config["num_hidden_layers"] = n_layers or args.n_layers
    return config


def random_llama(args: ModelArgs, dtype, device) -> Llama:
    """A plain model of random weights."""
    with torch.device("meta"):
        model = Llama(args)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    model.tie()
    for _, tensor in model.tensors():
        tensor.normal_(0, 0.02) if tensor.ndim == 2 else tensor.fill_(1)
    return model


def packed_like(plain: Llama, best: type | None = None) -> Llama:
    """The packed model of the same weights. What is not packed is one and the same memory. best: as
    in `fast.pack`."""
    return fast.pack(fast.with_same_weights(plain), best)


def weights_per_token(args: ModelArgs, dtype, attention: int, ffn: int) -> int:
    """Bytes of weights that a decoding step reads, with that many sub-layers of each kind."""
    per_attention = 2 * args.dim * (args.n_heads + args.n_kv_heads) * args.head_dim
    per_ffn = 3 * args.dim * args.hidden_dim
    head = args.vocab_size * args.dim
    return dtype.itemsize * (attention * per_attention + ffn * per_ffn + head)


# ---------------------------------------------------------------- what is compared


def ours(stepper: Stepper) -> Decoder:
    def decode(prompt, n, cache=None, skip=None):
        cache = cache or KVCache(stepper.model, 1, 0)
        done = generate_batch(stepper, [(cache, [prompt])], Until(n), skip)[0]
        return done.ids, done.timings.prefill_s, sum(done.timings.step_s) / max(n - 1, 1)

    decode.stepper = stepper
    return decode


class Clock(list):
    """A streamer for transformers: the times at which it got the prompt, and each token after."""

    def put(self, ids):
        self.append(time.perf_counter())

    def end(self):
        pass


def transformers_decoder(config: dict, state: dict[str, Tensor], device) -> Decoder:
    """LlamaForCausalLM.generate, greedy, on the very tensors of `state`."""
    import transformers

    tied = config.get("tie_word_embeddings", False)
    others = {key: value for key, value in config.items() if key != "model_type"}
    config = transformers.LlamaConfig(**others)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with device:  # its rotary table is not a weight, so it would stay on the meta device
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    model.eval()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def decode(prompt, n):
        ids, clock, begin = torch.tensor([prompt], device=device), Clock(), time.perf_counter()
        mask = torch.ones_like(ids)
        done = model.generate(ids, attention_mask=mask, max_new_tokens=n, streamer=clock, **greedy)
        first, last = clock[1], clock[-1]
        return done[0, len(prompt) :].tolist(), first - begin, (last - first) / max(n - 1, 1)

    return decode


def write_gguf(path: Path, args: ModelArgs, state: dict[str, Tensor], dtype) -> None:
    """The weights in llama.cpp's format, without a vocabulary: only ids go in and out."""
    import gguf

    stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    file = gguf.GGUFWriter(path, "llama")
    heads = {"head_count": args.n_heads, "head_count_kv": args.n_kv_heads}
    heads |= {"key_length": args.head_dim, "value_length": args.head_dim}
    numbers = {f"attention.{name}": value for name, value in heads.items()}
    numbers |= {"rope.dimension_count": args.head_dim, "context_length": args.max_seq_len}
    numbers |= {"embedding_length": args.dim, "feed_forward_length": args.hidden_dim}
    numbers |= {"block_count": args.n_layers, "vocab_size": args.vocab_size}
    for name, value in numbers.items():
        file.add_uint32(f"llama.{name}", value)
    file.add_rope_freq_base(args.rope_theta)
    file.add_layer_norm_rms_eps(args.norm_eps)
    file.add_tokenizer_model("no_vocab")
    for name, tensor in state.items():
        kind = stored if tensor.ndim == 2 else "F32"
        tensor = tensor if tensor.ndim == 2 else tensor.float()
        if "q_proj" in name or "k_proj" in name:  # its rotary pairs are neighbours: (2 i, 2 i + 1)
            halves = tensor.view(-1, 2, args.head_dim // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        raw = tensor.contiguous().view(torch.uint8).numpy()
        file.add_tensor(new_name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama_cpp_decoder(path: Path, args: ModelArgs) -> Decoder:
    """llama.cpp with as many threads as PyTorch."""
    import llama_cpp
    import numpy

    n, longest = torch.get_num_threads(), CONTEXTS[-1]
    sizes = {"n_ctx": longest, "n_batch": longest, "n_threads": n, "n_threads_batch": n}
    llama = llama_cpp.Llama(str(path), verbose=False, **sizes)

    def greedy(ids):
        llama.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (args.vocab_size,)).argmax())

    def decode(prompt, n):
        begin = time.perf_counter()
        llama.reset()
        ids = [greedy(prompt)]
        first = time.perf_counter()
        while len(ids) < n:
            ids.append(greedy(ids[-1:]))
        return ids, first - begin, (time.perf_counter() - first) / max(n - 1, 1)

    return decode


def others(config: dict, state: dict[str, Tensor], dtype, device, folder) -> dict[str, Decoder]:
    """What is installed and can run these weights; a line on what cannot."""
    found, args = {}, ModelArgs.from_config(config)
    if find_spec("transformers"):
        found["transformers"] = transformers_decoder(config, state, device)
    else:
        print("transformers: not installed, not measured")
    plain = not (args.rope_scaling or args.attention_bias or args.mlp_bias)
    if not (find_spec("llama_cpp") and find_spec("gguf")):
        print("llama.cpp: llama-cpp-python and gguf are not both installed, not measured")
    elif device.type != "cpu" or not plain:
        print("llama.cpp: measured only on the CPU and without RoPE scaling or biases")
    else:
        path = Path(folder) / "weights.gguf"
        write_gguf(path, args, state, dtype)
        found["llama.cpp"] = llama_cpp_decoder(path, args)
        path.unlink()  # it stays mapped, and goes with this process however that ends
    return found


# ---------------------------------------------------------------- measuring and printing


def alternate(title: str, rounds: int, functions: dict[str, Callable], item: int | None = None):
    """Calls the functions in turns. {name: (median, half the quartiles' distance)} of the seconds
    that a call takes, or that it says it took, if it returns a tuple with them as that item."""
    times = {name: [] for name in functions}
    with progress(desc=title, total=(rounds + 1) * len(functions), delay=2) as bar:
        for i in range(rounds + 1):
            for name, function in functions.items():
                begin = time.perf_counter()
                result = function()
                seconds = time.perf_counter() - begin
                bar.update()
                if i > 0:  # the first round warms up
                    times[name].append(result[item] if isinstance(result, tuple) else seconds)
    print(f"\n{title}")
    quartiles = {name: quantiles(ts, method="inclusive") for name, ts in times.items()}
    return {name: (median(times[name]), (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def show(name: str, seconds: float, spread: float, note: str = "") -> None:
    print(f"{name:<26}{1e3 * seconds:>10.2f} ms +-{spread / seconds:>4.0%}  {note}")


def products(model: Llama) -> list[str]:
    """The kinds of a packed model's products; a tied head that is not packed is plain."""
    found = []
    for layer in model.layers:
        found += [layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj]
    if isinstance(model.lm_head, fast.FastHead):
        found.append(model.lm_head.product)
    return [type(product).__name__ for product in found]


def describe(name: str, model: Llama, bytes_read: int) -> None:
    """What is measured, on what, and which products are packed."""
    dtype, cpu, layers = model.dtype, model.device.type == "cpu", model.args.n_layers
    kinds = products(model)
    n_packed = len(kinds) - kinds.count("Product")
    why = f"smaller than {fast.PACK_FROM} weights are not" if cpu else "only on the CPU"
    kind = torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name()
    print(f"{name}, {layers} layers, {dtype}, {bytes_read / 1e9:.3f} GB a token")
    print(f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    count = f"{n_packed} of {4 * layers + 1} products"
    names = ", ".join(sorted(set(kinds)))
    print(f"packed: {count} ({names}" + (")" if n_packed > 4 * layers else f"; {why})"))


# ---------------------------------------------------------------- the measurements


def prompt_of(n: int, args: ModelArgs, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(args.vocab_size, (n,), generator=draw).tolist()


def attention_alone(model: Llama, cache: KVCache, n: int) -> tuple[None, None, float]:
    """Only the attention operators of a decoding step; no weights are read between them."""
    args = model.args
    shape = (1, args.n_kv_heads, args.n_heads // args.n_kv_heads, args.head_dim)
    q = torch.ones(shape, dtype=model.dtype, device=model.device)
    begin = time.perf_counter()
    for kv in cache.layers:
        out = F.scaled_dot_product_attention(q, *kv[:, :, :n].chunk(2, 1))
    out.sum().item()  # waits for a GPU
    return None, None, time.perf_counter() - begin


def measure_decoding(model: Llama, decoders: dict[str, Decoder], bytes_read: int, rounds: int):
    """Milliseconds per token at several contexts, as bandwidth and against the others."""
    args, first, n_new = model.args, CONTEXTS[0], STEPS + 1
    buffer = torch.zeros(bytes_read // 4, device=model.device)
    functions = {"plain read of the bytes": lambda: buffer.sum().item()}
    for n in CONTEXTS:  # a cache that holds the prompt already: of zeros, which cost the same
        cache, prompt = KVCache(model, 1, n + n_new), prompt_of(n, args)
        cache.tokens = prompt
        functions[f"ours, context {n}"] = partial(decoders["ours"], prompt, n_new, cache)
        functions[f"attention alone, {n}"] = partial(attention_alone, model, cache, n)
    prompt = prompt_of(first, args)
    ids = {name: decode(prompt, n_new)[0] for name, decode in decoders.items()}
    for name in list(decoders)[1:]:
        functions[f"{name}, context {first}"] = partial(decoders[name], prompt, n_new)
    times = alternate(f"decoding, per token ({STEPS} steps a run)", rounds, functions, 2)
    read, base = times["plain read of the bytes"][0], times[f"ours, context {first}"][0]
    for name, (seconds, spread) in times.items():
        rate = f"{bytes_read / seconds / 1e9:5.1f} GB/s, {read / seconds:4.0%} of plain"
        show(name, seconds, spread, "" if name.startswith("attention") else rate)
    for name in list(decoders)[1:]:
        ratio = times[f"{name}, context {first}"][0] / base
        same = [a == b for a, b in zip(ids[name], ids["ours"])] + [False]
        print(f"{name}: {ratio:.2f}x our time; {same.index(False)} of {n_new} tokens as ours")
    slot = args.n_layers * 2 * args.n_kv_heads * args.head_dim * model.dtype.itemsize
    for n in CONTEXTS[1:]:
        more, ideal = times[f"ours, context {n}"][0] / base - 1, slot * (n - first) / bytes_read
        own = times[f"attention alone, {n}"][0] - times[f"attention alone, {first}"][0]
        why = f"attention alone {own / base:+.1%}, the cache {ideal:+.1%} bytes"
        print(f"context {first} to {n}: {more:+.1%} time; {why}")


def measure_profile(model: Llama, decoders: dict[str, Decoder], bytes_read: int, rounds: int):
    """Where a decoding step's time goes: milliseconds in each operator, less those that it calls,
    of the packed model; for one row and for five."""
    for n_rows in (1, 5):
        prompt = prompt_of(CONTEXTS[0], model.args)
        rows = list(range(n_rows))
        stepper = Stepper(model)
        groups = [(KVCache(model, 1, 0), [[*prompt, row] for row in rows])]
        stepper.start(groups, 3 * STEPS, None)
        for _ in range(STEPS):
            stepper.step(None, rows)
        step_s = median(stepper.step_s)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(STEPS):
                stepper.step(None, rows)
        operators = sorted(profile.key_averages(), key=lambda op: -op.self_cpu_time_total)
        total_ms = sum(op.self_cpu_time_total for op in operators) / STEPS / 1e3
        print(
            f"\na step of {n_rows}: {1e3 * step_s:.2f} ms; operators, profiled: {total_ms:.2f} ms"
        )
        for op in operators[:MOST_OPERATORS]:
            ms = op.self_cpu_time_total / STEPS / 1e3
            calls = op.count / STEPS
            print(f"{op.key:<40.39}{calls:>7.0f} calls{ms:>9.3f} ms{ms / total_ms:>6.0%}")


def sublayer_seconds(decode: Decoder, prompt: list[int], cache: KVCache, args: ModelArgs) -> Tensor:
    """Seconds of each sub-layer within a decoding step, each timed by itself: (n_layers, 2)."""
    seconds = torch.zeros(args.n_layers, 2)

    def hook(i, layer, x, places, kv, skip_attention, skip_ffn):
        for sub in range(2):
            began = time.perf_counter()
            x = layer(x, places, kv, skip_attention=sub == 1, skip_ffn=sub == 0)
            seconds[i, sub] += time.perf_counter() - began
        return x

    decode(prompt, STEPS + 1, cache, Skip(mask_of([], args.n_layers), hook))
    return seconds / STEPS


def measure_skipping(model: Llama, decoders: dict[str, Decoder], bytes_read: int, rounds: int):
    """The speed-up of skipping k sub-layers, the last first, against the ideal by bytes, and by the
    time that they take."""
    args, decode = model.args, decoders["ours"]
    prompt = prompt_of(CONTEXTS[0], args)
    cache = KVCache(model, 1, len(prompt) + STEPS + 1)
    order = [(layer, sub) for layer in reversed(range(args.n_layers)) for sub in (1, 0)]
    budgets = [0, *(k for k in BUDGETS if k < len(order))]
    masks = {k: mask_of(order[:k], args.n_layers) for k in budgets}
    functions = {
        f"skip {k}": partial(decode, prompt, STEPS + 1, cache, mask) for k, mask in masks.items()
    }
    alone = [sublayer_seconds(decode, prompt, cache, args) for _ in range(rounds)]
    seconds = torch.stack(alone).median(0).values
    times = alternate("skipping k sub-layers, per token", rounds, functions, 2)
    kept = {k: (args.n_layers - mask.sum(0)).tolist() for k, mask in masks.items()}
    bytes_kept = {k: weights_per_token(args, model.dtype, *kept[k]) for k in budgets}
    whole = times["skip 0"][0]
    for k in budgets:
        gained = whole / times[f"skip {k}"][0]
        by_bytes = bytes_read / bytes_kept[k]
        by_time = whole / (whole - float(seconds[masks[k]].sum()))
        note = f"{gained:.2f}x; by bytes {by_bytes:.2f}x, {gained / by_bytes:.0%}"
        note += f"; by time {by_time:.2f}x, {gained / by_time:.0%}"
        show(f"skip {k}", *times[f"skip {k}"], note if k else "")


def measure_prefill(model: Llama, decoders: dict[str, Decoder], bytes_read: int, rounds: int):
    """Tokens per second of a prompt, logits of the last token only."""
    functions = {
        f"{name}, {n} tokens": partial(decode, prompt_of(n, model.args), 1)
        for n in CONTEXTS[:2]
        for name, decode in decoders.items()
    }
    times = alternate("prefill", min(rounds, SLOW), functions, 1)
    for name, (seconds, spread) in times.items():
        show(name, seconds, spread, f"{int(name.split()[-2]) / seconds:.0f} tokens/s")


def three_stages(extend: Callable[[list[list[int]], int], list[list[int]]], ids: list[int]) -> None:
    """The prompts of one question with four options, as ids: extend(prompts, n) continues each."""
    question, cues, labels = ids[:50], ids[50:60], ids[60:64]
    recall = question + cues[:4]
    analyze = recall + extend([recall], RECALL)[0] + cues[4:8]
    said = extend([[*analyze, label] for label in labels], ANALYZE)
    thoughts = [i for label, new in zip(labels, said) for i in (label, *new)]
    extend([analyze + thoughts + cues[8:]], SUMMARIZE)


def measure_stages(model: Llama, decoders: dict[str, Decoder], bytes_read: int, rounds: int):
    """One question in three stages: ours reuses prefixes and decodes the four options as a batch;
    the straightforward pipeline calls generate six times, each time prefilling anew."""
    ids = prompt_of(64, model.args)

    def together(stepper):
        cache = KVCache(model, 1, 0)

        def extend(prompts, n):
            return [row.ids for row in generate_batch(stepper, [(cache, prompts)], Until(n))]

        three_stages(extend, ids)

    def alone(decode):
        return lambda prompts, n: [decode(prompt, n)[0] for prompt in prompts]

    functions = {}
    for name in ("ours", "ours, compiled"):
        if name in decoders:
            functions[name] = partial(together, decoders[name].stepper)
    for name, decode in decoders.items():
        functions[f"{name}, six calls"] = partial(three_stages, alone(decode), ids)
    title = f"one question of three stages: {RECALL} + 4 x {ANALYZE} + {SUMMARIZE} tokens"
    times = alternate(title, min(rounds, SLOW), functions)
    for name, (seconds, spread) in times.items():
        show(name, seconds, spread, f"{seconds / times['ours'][0]:.2f}x")


MEASURES = {
    "profile": measure_profile,
    "decoding": measure_decoding,
    "skipping": measure_skipping,
    "prefill": measure_prefill,
    "stages": measure_stages,
}


@torch.inference_mode()
def main() -> None:
    parser = make_parser(__doc__, "--device", "--seed")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--shape", default="tinyllama", help="tinyllama (default), demo or a config.json"
    )
    parser.add_argument(
        "--model", help="a checkpoint folder, hub id or demo: its weights (default: random ones)"
    )
    parser.add_argument(
        "--layers", type=positive, help="fewer layers of the same width (default: all)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compiled steps, too: --compile of the commands"
    )
    parser.add_argument("--rounds", type=positive, default=9, help="(default: %(default)s)")
    usual = [part for part in MEASURES if part != "profile"]
    parser.add_argument(
        "parts", nargs="*", help=f"what to measure, or profile (default: {' '.join(usual)})"
    )
    options = parser.parse_args()
    parts = options.parts or usual
    expect(set(parts) <= set(MEASURES), f"parts: expected some of {', '.join(MEASURES)}")
    cuda = torch.cuda.is_available()
    known = options.device == "cpu" or (cuda and options.device.startswith("cuda"))
    expect(known, f"--device: no such device here, found {options.device!r}")
    folder = options.model and find_checkpoint(options.model)
    if folder:
        whole = options.layers is None
        expect(whole, "--layers: of random weights only; a checkpoint keeps all its layers")
    shape = str(folder / "config.json") if folder else options.shape
    config = shape_of(shape, options.layers)
    args = ModelArgs.from_config(config)
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    torch.manual_seed(options.seed)
    bytes_read = weights_per_token(args, dtype, args.n_layers, args.n_layers)
    with tempfile.TemporaryDirectory() as scratch:
        if folder:
            plain = Llama.from_pretrained(folder, device, dtype)
            plain.args = args  # with room for the longest context
        else:
            plain = random_llama(args, dtype, device)
        model = packed_like(plain)
        describe(options.model or options.shape, model, bytes_read)
        decoders = {"ours": ours(Stepper(model)), "plain": ours(Stepper(plain))}
        if options.compile:
            dense = packed_like(plain, fast.DenseProduct)
            decoders["ours, compiled"] = ours(fast.RecordedStepper(model, dense))
        if parts != ["profile"]:
            decoders |= others(config, dict(plain.tensors()), dtype, device, scratch)
        for part in parts:
            MEASURES[part](model, decoders, bytes_read, max(options.rounds, 2))


if __name__ == "__main__":
    os.chdir(ROOT)
    run(main)
