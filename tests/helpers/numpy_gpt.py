"""Reference implementation of both model families in NumPy and float64, one head at a time.

Written from the papers' formulas (nGPT arXiv 2410.01131, RoFormer 2104.09864, YaRN 2309.00071, grouped queries
2305.13245, value residual 2410.17897) and source report 000, where possible in a different form than in ngpt/model.
"""

from collections.abc import Mapping

import numpy as np

from ngpt.model.config import ModelConfig

Array = np.ndarray


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rms(x: Array, eps: float = 2**-23) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def lerp(x: Array, f: Array, alpha: Array | float) -> Array:
    return unit((1 - alpha) * unit(x) + alpha * unit(f))


def slerp(x: Array, f: Array, alpha: Array | float) -> Array:
    """Shoemake's formula; the angle from the chords, which arccos would lose near 0 and pi."""
    x, f = unit(x), unit(f)
    angle = 2 * np.arctan2(np.linalg.norm(x - f, axis=-1), np.linalg.norm(x + f, axis=-1))[..., None]
    return unit((np.sin((1 - alpha) * angle) * x + np.sin(alpha * angle) * f) / np.sin(angle))


def add_normalize(x: Array, f: Array, alpha: Array | float) -> Array:
    return unit(x + alpha * f)


RULES = {"lerp": lerp, "slerp": slerp, "add_normalize": add_normalize}


def rope_frequencies(width: int, *, base: float, scaling: str, factor: float, trained: float) -> Array:
    """theta of each channel pair as arXiv 2309.00071 writes it: 2.3 (linear), 3.1 (NTK-aware), 3.2 (YaRN, llama3)."""
    if scaling == "ntk" and width > 2:
        base = base * factor ** (width / (width - 2))
    thetas = []
    for d in range(width // 2):
        theta = base ** (-2 * d / width)
        if scaling == "linear":
            theta = theta / factor
        if scaling in ("yarn", "llama3"):
            full = 32 if scaling == "yarn" else 4  # turns, above which a pair is left as it is
            wavelength = 2 * np.pi * base ** (2 * d / width)
            ratio = trained / wavelength
            ramp = 0.0 if ratio < 1 else 1.0 if ratio > full else (ratio - 1) / (full - 1)
            theta = (1 - ramp) * theta / factor + ramp * theta
        thetas.append(theta)
    return np.array(thetas)


def logits(cfg: ModelConfig, weights: Mapping[str, Array], idx: Array) -> Array:
    """(B, T, V) of the model with these weights (a state dict) in evaluation, for token ids `idx` (B, T)."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    head = w["wte.weight"] if cfg.tied else w["lm_head.weight"]
    z = np.stack([_window(cfg, w, window) for window in idx]) @ head.T
    if cfg.on_sphere:
        z = z * _acts(cfg, w["s_z.stored"], cfg.logit_scale)
    return z if cfg.softcap is None else cfg.softcap * np.tanh(z / cfg.softcap)


def _window(cfg: ModelConfig, w: dict[str, Array], window: Array) -> Array:
    x, r = w["wte.weight"][window], np.ones(len(window))
    first: dict[int, Array] = {}
    if not cfg.on_sphere:
        x = rms(x, cfg.norm_eps or 2**-23) if cfg.embedding_norm else x
        eps = cfg.norm_eps or (1e-6 if cfg.norm_gain else 2**-23)  # NVIDIA's and nanochat's
        for layer in range(cfg.n_layer):
            block = _under(w, f"blocks.{layer}.")
            x = x + np.sum(
                _head_answers(cfg, block, rms(x, eps) * block.get("attention_norm.weight", 1.0), first), axis=0
            )
            x = x + _mlp(cfg, block, rms(x, eps) * block.get("mlp_norm.weight", 1.0))
        return rms(x, eps) * w.get("final_norm.weight", 1.0)
    last = 2 * cfg.n_layer - 1
    for sublayer in range(2 * cfg.n_layer):
        block = _under(w, f"blocks.{sublayer // 2}.")
        name = ("attention", "mlp")[sublayer % 2]
        init = cfg.alpha[sublayer // 2] if isinstance(cfg.alpha, tuple) else cfg.alpha  # one per layer, or one for all
        alpha = _acts(cfg, block[f"{name}_residual.alpha.stored"], init)
        alpha = np.abs(alpha) if cfg.alpha_sign == "abs" else alpha
        if name == "mlp":
            answer, step = _mlp(cfg, block, x), alpha
        elif cfg.alpha_kind == "head":
            answer = np.einsum("h,htd->td", alpha, _head_answers(cfg, block, x, first))
            step = np.abs(alpha).mean()
            answer = answer / step
        else:
            answer, step = np.sum(_head_answers(cfg, block, x, first), axis=0), alpha
        agreement = (x * (answer if cfg.residual == "add_normalize" else unit(answer))).sum(-1)
        if cfg.norm_mode == "dotprod":
            r = r + agreement
        elif cfg.norm_mode == "ema":
            r = cfg.norm_decay * r + (1 - cfg.norm_decay) * (1 + agreement)
        step = step / np.maximum(r, 0.25)[:, None]
        if (sublayer + 1) % cfg.norm_every == 0 or sublayer == last:
            x = RULES[cfg.residual](x, answer, step)
        elif cfg.residual == "lerp":
            x = (1 - step) * x + step * unit(answer)
        else:
            assert cfg.residual == "add_normalize"
            x = x + step * answer
    return x


def _head_answers(cfg: ModelConfig, block: dict[str, Array], x: Array, first: dict[int, Array]) -> list[Array]:
    """What each head adds to the answer of attention to `x` (T, D). `first` has the values of layer 0 by head."""
    width, time = cfg.n_embd // cfg.n_head, len(x)
    theta = rope_frequencies(
        width,
        base=cfg.rope_base,
        scaling=cfg.rope_scaling,
        factor=cfg.rope_factor,
        trained=cfg.rope_trained or cfg.block_size / cfg.rope_factor,
    )
    rotation = np.exp(1j * np.outer(np.arange(time), theta))
    answers = []
    for head in range(cfg.n_head):
        rows = slice(head * width, (head + 1) * width)
        shared = head // (cfg.n_head // cfg.kv_heads)
        kv_rows = slice(shared * width, (shared + 1) * width)
        q = _turned(_projected(x, block, "query", rows), rotation)
        k = _turned(_projected(x, block, "key", kv_rows), rotation)
        v = _projected(x, block, "value", kv_rows)
        v = (1 - cfg.value_residual) * v + cfg.value_residual * first.setdefault(head, v)
        scale = 1 / np.sqrt(width)
        if cfg.on_sphere and cfg.qk_norm:
            s_qk = _acts(cfg, block["attention.s_qk.stored"][rows], 1.0)
            q, k, scale = s_qk * unit(q), s_qk * unit(k), np.sqrt(width)
        elif cfg.on_sphere:
            scale = cfg.n_embd / np.sqrt(width)
        elif cfg.qk_norm:
            q, k = rms(q, cfg.norm_eps or 2**-23), rms(k, cfg.norm_eps or 2**-23)
        if cfg.rope_scaling == "yarn":  # section 3.4: q and k grow by sqrt(1/t) each
            q, k = q * (0.1 * np.log(cfg.rope_factor) + 1), k * (0.1 * np.log(cfg.rope_factor) + 1)
        scores = q @ k.T * (cfg.softmax_scale or scale)
        scores[np.triu_indices(time, 1)] = -np.inf
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = odds / odds.sum(-1, keepdims=True) @ v
        answers.append(mixed @ block["attention.out.weight"][:, rows].T)
    return answers


def _projected(x: Array, block: dict[str, Array], name: str, rows: slice) -> Array:
    bias = block[f"attention.{name}.bias"][rows] if f"attention.{name}.bias" in block else 0.0
    return x @ block[f"attention.{name}.weight"][rows].T + bias


def _mlp(cfg: ModelConfig, block: dict[str, Array], x: Array) -> Array:
    hidden = x @ block["mlp.up.weight"].T
    if cfg.on_sphere and cfg.s_uv:
        hidden = hidden * block["mlp.s_uv.stored"] * np.sqrt(cfg.n_embd)
    if cfg.mlp == "swiglu":
        u, gate = np.split(hidden, 2, axis=-1)
        hidden = u * gate / (1 + np.exp(-gate))
    else:
        hidden = np.maximum(hidden, 0) ** 2
    return hidden @ block["mlp.down.weight"].T


def _turned(x: Array, rotation: Array) -> Array:
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * rotation
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def _acts(cfg: ModelConfig, stored: Array, init: float) -> Array:
    return stored * init * np.sqrt(cfg.n_embd) if cfg.scale_trick else stored


def _under(w: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
