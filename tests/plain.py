"""A Llama in its textbook form, the oracle of the tests: no cache, nothing fused, in float64.

It reads the tensors by their Hugging Face names and shares no line with model.py.
"""

import math

import torch


def frequencies(config: dict) -> torch.Tensor:
    """The rotary frequencies, (head_dim / 2,), scaled as the configuration says."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    freqs = []
    for i in range(0, head_dim, 2):
        freq = config["rope_theta"] ** (-i / head_dim)
        if kind == "linear":
            freq = freq / scaling["factor"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] / (2 * math.pi / freq)
            if turns < low:
                freq = freq / scaling["factor"]
            elif turns <= high:
                share = (turns - low) / (high - low)
                freq = (1 - share) * freq / scaling["factor"] + share * freq
        freqs.append(freq)
    return torch.tensor(freqs, dtype=torch.float64)


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def softmax(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def forward(tensors: dict, config: dict, tokens, skip=None):
    """(logits (bsz, seqlen, vocab), [(before, after) of every sub-layer: residual streams]).

    skip: (n_layers, 2), or (seqlen, n_layers, 2) for one of each token. 0 adds the sub-layer, any
    other number multiplies the stream instead.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    tokens = torch.as_tensor(tokens)
    bsz, seqlen = tokens.shape
    n_layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads, eps = config["num_key_value_heads"], config["rms_norm_eps"]
    skip = torch.zeros(n_layers, 2) if skip is None else torch.as_tensor(skip)
    skip = skip.double().expand(seqlen, n_layers, 2)
    angles = torch.arange(seqlen, dtype=torch.float64)[:, None] * frequencies(config)
    angles = torch.cat((angles, angles), -1)  # (seqlen, head_dim)
    causal = torch.ones(seqlen, seqlen).tril() == 1

    def linear(x, name):
        out = x @ t[name + ".weight"].T
        return out + t[name + ".bias"] if name + ".bias" in t else out

    def split(x, n):
        return x.view(bsz, seqlen, n, -1).transpose(1, 2)  # (bsz, n, seqlen, head_dim)

    def attention(x, name):
        q = split(linear(x, name + "q_proj"), heads)
        k, v = (split(linear(x, f"{name}{part}_proj"), kv_heads) for part in "kv")
        q, k = (y * angles.cos() + rotate_half(y) * angles.sin() for y in (q, k))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        out = softmax(scores.masked_fill(~causal, -math.inf)) @ v
        return linear(out.transpose(1, 2).reshape(bsz, seqlen, -1), name + "o_proj")

    def feed_forward(x, name):
        gate = linear(x, name + "gate_proj")
        return linear(gate * gate.sigmoid() * linear(x, name + "up_proj"), name + "down_proj")

    x, streams = t["model.embed_tokens.weight"][tokens], []
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        for sub, (function, part, norm) in enumerate(
            ((attention, "self_attn.", "input"), (feed_forward, "mlp.", "post_attention"))
        ):
            normed = rms_norm(x, t[f"{layer}{norm}_layernorm.weight"], eps)
            number = skip[:, i, sub, None]  # (seqlen, 1)
            after = torch.where(number == 0, x + function(normed, layer + part), x * number)
            streams.append((x, after))
            x = after
    x = rms_norm(x, t["model.norm.weight"], eps)
    return x @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T, streams


def follows(tensors: dict, config: dict, prompt: list[int], ids: list[int], skip=None) -> bool:
    """Whether ids is the greedy continuation of a prompt, which runs through all layers; skip: of
    the tokens decoded, a mask or a function of the step that gives one."""
    masks = torch.zeros(len(prompt) + len(ids), config["num_hidden_layers"], 2).double()
    if skip is not None:
        for step in range(len(ids)):
            masks[len(prompt) + step] = skip(step) if callable(skip) else skip
    logits, _ = forward(tensors, config, [prompt + ids], masks)
    return logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == ids
