"""How fast a decoding step is on a GPU: recorded steps, eager steps, transformers, a compiled loop.

Random weights in the shapes of SmolLM2-135M and TinyLlama-1.1B, bfloat16. A GPU is not needed by
anything else here; tests/bench.md has what this printed.

    python -m tests.bench_gpu --json bench-gpu.json
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from generate import Stepper, Until, generate_batch
from model import KVCache, Llama, ModelArgs
from skip import mask_of
from tools.fast import RecordedStepper, pack

SHAPES = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
COMMON = {"model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
PROMPT = 128
TOKENS = 64
ROUNDS = 5
SKIPPED = (0, 8, 16, 24)


def random_llama(shape: dict) -> Llama:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Llama(ModelArgs.from_config(COMMON | shape)).to(torch.bfloat16)
    return model.requires_grad_(False).eval()


def weight_bytes(model: Llama) -> int:
    """What a decoding step reads of the weights: the head, not the embedding's rows."""
    total = 0
    for name, tensor in model.tensors():
        if "embed_tokens" not in name or model.args.tied:
            total += tensor.numel() * tensor.element_size()
    return total


def decode(stepper, rows: int, skip=None) -> float:
    """Seconds of a decoding step, the median of a generation."""
    ids = torch.randint(5, 1000, (rows, PROMPT)).tolist()
    groups = [(KVCache(stepper.model, 1, 0), [row]) for row in ids]
    made = generate_batch(stepper, groups, Until(TOKENS), skip)
    return median(made[0].timings.step_s)


@torch.inference_mode()
def decode_transformers(model, rows: int) -> float:
    """Seconds of a step of transformers with its own cache, greedy, as `generate` takes them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    tokens = torch.randint(5, 1000, (rows, PROMPT), device="cuda")
    times = []
    for _ in range(TOKENS):
        began = time.perf_counter()
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        tokens.tolist()
        times.append(time.perf_counter() - began)
    return median(times[1:])


@torch.inference_mode()
def decode_compiled(model: Llama, rows: int) -> float:
    """Seconds of a step of the plain model under torch.compile, CUDA graphs included."""
    cache = KVCache(model, rows, 256)
    pos = torch.full((rows,), PROMPT, device="cuda")
    tokens = torch.randint(5, 1000, (rows, 1), device="cuda")

    def step(tokens, pos):
        return model(tokens, cache, pos)[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(step, mode="reduce-overhead")
    times = []
    for _ in range(TOKENS):
        began = time.perf_counter()
        tokens = compiled(tokens, pos).clone()
        pos = pos + 1
        tokens.tolist()
        times.append(time.perf_counter() - began)
    return median(times[8:])


def transformers_llama(shape: dict):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(COMMON | shape))
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too (minutes)")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rows_of_table = []
    for name, shape in SHAPES.items():
        model = random_llama(shape)
        size = weight_bytes(model)
        others = {"transformers": (decode_transformers, transformers_llama(shape))}
        if args.compile:
            others["torch.compile"] = (decode_compiled, random_llama(shape))
        model = pack(model)
        recorded = RecordedStepper(model)
        eager = Stepper(model)
        sublayers = [(i // 2, i % 2) for i in range(2 * model.args.n_layers)]
        for rows in (1, 5):
            runs = {"eager": partial(decode, eager, rows)}
            for n in SKIPPED:
                mask = mask_of(sublayers[4 : 4 + n], model.args.n_layers)
                label = f"recorded, {n} skipped"
                runs[label] = partial(decode, recorded, rows, mask)
            for label, (function, other) in others.items():
                runs[label] = partial(function, other, rows)
            times = {label: [] for label in runs}
            for _ in range(ROUNDS):
                for label, measure in runs.items():
                    try:
                        times[label].append(measure())
                    except Exception as e:  # of another library: the rest is measured all the same
                        print(f"{label}: {type(e).__name__}: {str(e)[:200]}", flush=True)
                        times[label].append(float("nan"))
            for label, taken in times.items():
                step = median(taken[1:])
                row = {"shape": name, "rows": rows, "what": label, "step_ms": 1e3 * step}
                row |= {"tokens_s": rows / step, "gb_s": size / step / 1e9}
                rows_of_table.append(row)
                print(
                    f"{name:<15}{rows:>2} rows  {label:<22}{1e3 * step:8.3f} ms"
                    f"{rows / step:9.0f} tokens/s{size / step / 1e9:8.0f} GB/s of all weights",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows_of_table, indent=1) + "\n")


if __name__ == "__main__":
    main()
