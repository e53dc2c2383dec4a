"""nGPT, the normalized transformer (arXiv 2410.01131), and its GPT baseline, for Hugging Face's transformers.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` runs this file, which imports torch and
transformers alone. `config.settings` has the settings of the model by the names that they had in its training.

In nGPT the residual stream and the weight vectors lie on the unit sphere, and learned scales s_qk, s_uv and s_z replace
the norm layers. A residual rule moves the stream x by alpha towards the output of a sublayer, the branch f. With the
rule `add` it is a pre-norm GPT.

Shapes: B batch, T tokens, D width, H heads, G key/value heads, K head width (D / H), F hidden width of the MLP, V
vocabulary. The computation is in float32 where it is not a matrix product, so bfloat16 weights work as well.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

R_MIN = 0.25  # lower bound of the divisor of a residual step
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class NGPTConfig(PreTrainedConfig):
    """Settings of a model. `settings` decides; the names that other programs expect are derived from it.

    Args:
        settings: all settings of the model by name, such as `n_layer`.
        step, steps: the steps trained, of how many; alpha may depend on them.
    """

    model_type = "ngpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(self, settings: dict[str, Any] | None = None, step: int = 0, steps: int = 1, **kwargs: Any) -> None:
        self.settings = dict(settings or {})
        self.step, self.steps = step, steps
        self.vocab_size = self.settings.get("vocab_size")
        self.hidden_size = self.settings.get("n_embd")
        self.num_hidden_layers = self.settings.get("n_layer")
        self.num_attention_heads = self.settings.get("n_head")
        self.num_key_value_heads = self.settings.get("n_kv_head") or self.num_attention_heads
        self.max_position_embeddings = self.settings.get("block_size")
        self.use_cache = kwargs.pop("use_cache", True)
        derived = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in (*derived, "max_position_embeddings", "tie_word_embeddings"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.tie_word_embeddings = bool(self.settings.get("tied"))


def l2_normalize(x: Tensor) -> Tensor:
    """Scales `x` to unit Euclidean length along the last dimension, in float32."""
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def rms_norm(x: Tensor, eps: float | None, weight: Tensor | None = None) -> Tensor:
    """Scales `x` to root mean square 1 along the last dimension, in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), None if weight is None else weight.float(), eps)


Norm = Callable[[Tensor], Tensor]


def lerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm) -> Tensor:
    """Moves x by alpha along the chord to the normalized branch (equations 10 and 11 of the paper)."""
    x, f = norm(x), l2_normalize(f)
    return norm(x + alpha * (f - x))


def slerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm) -> Tensor:
    """Rotates x by a fraction alpha of its angle to the normalized branch (equation 6 of the paper)."""
    x, f = norm(x), l2_normalize(f)
    cosine = (x * f).sum(-1, keepdim=True)
    tangent = f - cosine * x
    sine = (tangent.square().sum(-1, keepdim=True) + 1e-14).sqrt()
    angle = torch.atan2(sine, cosine)
    return norm(torch.cos(alpha * angle) * x + torch.sin(alpha * angle) / sine * tangent)


def add_normalize(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm) -> Tensor:
    """Adds alpha times the raw branch, then normalizes."""
    return norm(x + alpha * f)


RESIDUAL_RULES = {"lerp": lerp, "slerp": slerp, "add_normalize": add_normalize}
# How the divisor r changes at each sublayer, given the dot product of stream and branch, and a decay.
NORM_MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "baseline": lambda r, dot, decay: r,
    "dotprod": lambda r, dot, decay: r + dot,
    "ema": lambda r, dot, decay: decay * r + (1 - decay) * (1 + dot),
}


def rotary_frequencies(settings: dict[str, Any]) -> Tensor:
    """Returns the frequencies of the channel pairs (K / 2,), in float64, scaled to a longer context if asked for."""
    head_dim = settings["n_embd"] // settings["n_head"]
    frequencies = settings["rope_base"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind, factor = settings["rope_scaling"], settings["rope_factor"]
    if kind == "none":
        return frequencies
    if kind == "linear":
        return frequencies / factor
    if kind == "ntk":
        pairs = len(frequencies)
        return frequencies * factor ** -(torch.arange(pairs, dtype=torch.float64) / max(1, pairs - 1))
    trained = settings.get("rope_trained") or settings["block_size"] / factor
    rotations = trained * frequencies / (2 * math.pi)  # within the context length of the original training
    fast = {"yarn": 32.0, "llama3": 4.0}[kind]
    ramp = ((rotations - 1) / (fast - 1)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs of `x` (B, H, T, K) by the angles of `cos` and `sin` (B, 1, T, K / 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def nvidia_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes what the official repository does instead (its issue 10); it is no rotation."""
    first, second = torch.stack((sin, cos), dim=-1).flatten(-2).chunk(2, dim=-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd * second, even * first), dim=-1).flatten(-2)


def interpolated(values: float | list[float], layer: int, layers: int) -> float:
    """Returns the value of a layer; several `values` are placed evenly over the depth."""
    if not isinstance(values, list | tuple):
        return float(values)
    place = layer / max(1, layers - 1) * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (values[right] - values[left]) * (place - left)


class Linear(nn.Linear):
    """A matrix product in the dtype of the weights."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class Scale(nn.Module):
    """A scaling vector. Its effective value is `stored * init / scale` (section 2.5 of the paper), times `factor`."""

    def __init__(self, size: int, *, init: float, scale: float, factor: float = 1.0) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.full((size,), scale))
        self.scale, self.ratio = scale, init / scale * factor

    def forward(self) -> Tensor:
        return self.stored.float() * self.ratio


class Residual(nn.Module):
    """Residual connection of a sublayer, with its alphas: one per channel, one, or one per head (`per_head`)."""

    def __init__(self, config: NGPTConfig, sublayer: int) -> None:
        super().__init__()
        settings, layers = config.settings, config.settings["n_layer"]
        alpha = interpolated(settings["alpha"], sublayer // 2, layers)
        is_attention, kind = sublayer % 2 == 0, settings["alpha_kind"]
        self.per_head = kind == "head" and is_attention
        size = settings["n_embd"] if kind == "vector" else settings["n_head"] if self.per_head else 1
        factor = 1.0
        if settings["alpha_final"] is not None:  # a schedule, of which the last step of training holds
            progress = max(0, config.step - 1) / max(1, config.steps - 1)
            factor = 1 + (settings["alpha_final"] / settings["alpha"] - 1) * progress
        scale = settings["n_embd"] ** -0.5 if settings["scale_trick"] else alpha
        self.alpha = Scale(size, init=alpha, scale=scale, factor=factor)
        self.is_free = settings["alpha_sign"] == "free"
        self.rule, self.is_raw = RESIDUAL_RULES[settings["residual"]], settings["residual"] == "add_normalize"
        renormalizes = (sublayer + 1) % settings["norm_every"] == 0 or sublayer == 2 * layers - 1
        self.norm: Norm = l2_normalize if renormalizes else lambda x: x

    def forward(self, x: Tensor, f: Tensor, r: Tensor | None) -> Tensor:
        """Returns the stream (B, T, D) after a step to the branch f (B, T, D), divided by r (B, T) if given."""
        alpha = self._signed()
        if self.per_head:
            alpha = alpha.abs().mean(0, keepdim=True)
        if r is not None:
            alpha = alpha / r.clamp(min=R_MIN).unsqueeze(-1)
        return self.rule(x, f, alpha, self.norm)

    def branch(self, f: Tensor) -> Tensor:
        """Returns the branch as the rule uses it."""
        return f.float() if self.is_raw else l2_normalize(f)

    def head_weights(self) -> Tensor | None:
        """Returns the weights (H,) of the heads' outputs; None without an alpha for each head."""
        if not self.per_head:
            return None
        alpha = self._signed()
        return alpha / alpha.abs().mean().clamp(min=1e-12)

    def _signed(self) -> Tensor:
        return self.alpha() if self.is_free else self.alpha().abs()


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: NGPTConfig, layer: int) -> None:
        super().__init__()
        settings, width = config.settings, config.settings["n_embd"]
        self.layer, self.n_head, self.head_dim = layer, settings["n_head"], width // settings["n_head"]
        self.n_kv_head = settings["n_kv_head"] or self.n_head
        self.rotate = {"rotary": rotate, "nvidia": nvidia_rotate}[settings["rope"]]
        self.qk_norm, self.eps = settings["qk_norm"], settings.get("norm_eps")
        self.value_residual = settings.get("value_residual", 0.0)
        on_sphere, bias = settings["residual"] != "add", settings.get("qkv_bias", False)
        self.query = Linear(width, width, bias=bias)
        self.key = Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.value = Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.out = Linear(width, width, bias=False)
        scaled, scale = on_sphere and self.qk_norm, width**-0.5 if settings["scale_trick"] else 1.0
        self.s_qk = Scale(width, init=1.0, scale=scale) if scaled else None
        default = self.head_dim**0.5 if scaled else self.head_dim**-0.5 * (width if on_sphere else 1)
        is_yarn = settings["rope_scaling"] == "yarn"
        temperature = (0.1 * math.log(settings["rope_factor"]) + 1) ** 2 if is_yarn else 1.0
        self.softmax_scale = (settings["softmax_scale"] or default) * temperature

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        mask: Tensor | None,
        total: int,
        cache: Any,
        first_values: list[Tensor],
        head_weights: Tensor | None,
    ) -> Tensor:
        """Attends over `total` tokens, those of the `cache` and x; `first_values` has the values of layer 0."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self._projections())
        if self.value_residual and self.layer:
            v = torch.lerp(v, first_values[0], self.value_residual)
        elif self.value_residual:
            first_values.append(v)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if self.s_qk is not None:
            q, k = self.s_qk().square().view(self.n_head, 1, -1) * l2_normalize(q), l2_normalize(k)
        elif self.qk_norm:
            q, k = rms_norm(q, self.eps), rms_norm(k, self.eps)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
            if k.shape[2] > total and (mask is None or mask.shape[-1] == total):  # of a cache with room for more
                k, v = k[:, :, :total], v[:, :, :total]
        how = {"scale": self.softmax_scale, "enable_gqa": self.n_kv_head != self.n_head}
        is_causal = mask is None and q.shape[2] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, **how)
        if head_weights is not None:
            mixed = mixed * head_weights.view(-1, 1, 1).to(mixed.dtype)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _projections(self) -> tuple[Linear, Linear, Linear]:
        return self.query, self.key, self.value


class MLP(nn.Module):
    """MLP with SwiGLU, `u * silu(gate)`, or `relu(u)^2`, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        settings, width = config.settings, config.settings["n_embd"]
        hidden, self.gated = round(settings["mlp_ratio"] * width), settings["mlp"] == "swiglu"
        rows = 2 * hidden if self.gated else hidden
        self.up, self.down = Linear(width, rows, bias=False), Linear(hidden, width, bias=False)
        self.s_uv = Scale(rows, init=1.0, scale=1.0) if settings["residual"] != "add" and settings["s_uv"] else None
        self.gain = width**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, T, D) for a stream of the same shape."""
        weight = self.up.weight
        if self.s_uv is not None:
            weight = (weight * (self.s_uv() * self.gain)[:, None]).to(weight.dtype)
        hidden = F.linear(x.to(weight.dtype), weight)
        if not self.gated:
            return self.down(F.relu(hidden).square())
        u, gate = hidden.chunk(2, dim=-1)
        return self.down(u * F.silu(gate))


class SphereBlock(nn.Module):
    """nGPT block: attention and MLP read the stream without a norm, and each moves it along the sphere."""

    def __init__(self, config: NGPTConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.attention_residual, self.mlp_residual = Residual(config, 2 * layer), Residual(config, 2 * layer + 1)
        self.mode, self.decay = config.settings["norm_mode"], config.settings["norm_decay"]

    def forward(self, x: Tensor, r: Tensor | None, **attention: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the stream (B, T, D) and the divisor r (B, T) after the block."""
        f = self.attention(x, head_weights=self.attention_residual.head_weights(), **attention)
        r = self._divide(r, x, self.attention_residual.branch(f))
        x = self.attention_residual(x, f, r)
        f = self.mlp(x)
        r = self._divide(r, x, self.mlp_residual.branch(f))
        return self.mlp_residual(x, f, r), r

    def _divide(self, r: Tensor | None, x: Tensor, f: Tensor) -> Tensor | None:
        if r is None:
            return None
        return torch.nan_to_num(NORM_MODES[self.mode](r, (x.float() * f).sum(-1), self.decay), nan=1.0)


class RMSNorm(nn.Module):
    """RMSNorm with or without a learned gain."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        has_gain, eps = config.settings["norm_gain"], config.settings.get("norm_eps")
        self.weight = nn.Parameter(torch.ones(config.settings["n_embd"])) if has_gain else None
        self.eps = 1e-6 if eps is None and has_gain else eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)


class PreNormBlock(nn.Module):
    """GPT block: attention and MLP read the normalized stream and add to it."""

    def __init__(self, config: NGPTConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.attention_norm, self.mlp_norm = RMSNorm(config), RMSNorm(config)

    def forward(self, x: Tensor, r: None, **attention: Any) -> tuple[Tensor, None]:
        """Returns the stream (B, T, D), and no divisor."""
        x = x + self.attention(self.attention_norm(x), head_weights=None, **attention)
        return x + self.mlp(self.mlp_norm(x)), None


class NGPTPreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config_class = NGPTConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["SphereBlock", "PreNormBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes a model without weights; nGPT is meant to be trained with its matrices on the sphere."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Scale):
            nn.init.constant_(module.stored, module.scale)
        elif isinstance(module, RMSNorm) and module.weight is not None:
            nn.init.ones_(module.weight)


class NGPTModel(NGPTPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        settings = config.settings
        self.wte = nn.Embedding(settings["vocab_size"], settings["n_embd"])
        self.on_sphere = settings["residual"] != "add"
        block = SphereBlock if self.on_sphere else PreNormBlock
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(settings["n_layer"]))
        self.final_norm = None if self.on_sphere else RMSNorm(config)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # cosines and sines of all positions
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the input of the head, (B, T, D), for `input_ids` (B, T), which continue the cached tokens.

        `attention_mask` (B, cached + T) has 0 for padding, on either side.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + x.shape[1]
        mask, positions = self._mask(attention_mask, past, total, x), self._positions(attention_mask, past, total, x)
        cos, sin = self._rotation(positions if position_ids is None else position_ids, total)
        has_divisor = self.on_sphere and self.config.settings["norm_mode"] != "baseline"
        r = torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device) if has_divisor else None
        if self.config.settings["embedding_norm"] and not self.on_sphere:
            x = rms_norm(x, self.config.settings.get("norm_eps"))
        attention = {"cos": cos, "sin": sin, "mask": mask, "total": total, "cache": cache, "first_values": []}
        streams = [x]
        for block in self.blocks:
            x, r = block(x, r, **attention)
            streams.append(x)
        x = x if self.final_norm is None else self.final_norm(x)
        hidden = (*streams[:-1], x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{CACHE: cache})

    def _rotation(self, positions: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, (B, 1, T, K / 2), for positions (B, T)."""
        size = self.config.settings["block_size"]
        if total > size:
            raise ValueError(f"{total} tokens do not fit the model's context of {size}")
        if positions.device not in self._tables:  # computed as in training: in float64, on the CPU
            angles = torch.outer(torch.arange(size, dtype=torch.float64), rotary_frequencies(self.config.settings))
            cos, sin = (table.float().to(positions.device) for table in (angles.cos(), angles.sin()))
            self._tables[positions.device] = cos, sin
        cos, sin = self._tables[positions.device]
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    @staticmethod
    def _positions(attention_mask: Tensor | None, past: int, total: int, x: Tensor) -> Tensor:
        """Returns the positions (B or 1, T) of the new tokens; padding does not count."""
        if attention_mask is None or attention_mask.dim() != 2:
            return torch.arange(past, total, device=x.device)[None]
        return (attention_mask[:, :total].long().cumsum(-1) - 1).clamp(min=0)[:, past:]

    @staticmethod
    def _mask(attention_mask: Tensor | None, past: int, total: int, x: Tensor) -> Tensor | None:
        """Returns which keys each new token attends to, (B or 1, 1, T, total); None: all before it."""
        if attention_mask is not None and attention_mask.dim() == 4:  # as `generate` makes it for a static cache
            return attention_mask
        is_padded = attention_mask is not None and not bool(attention_mask.bool().all())
        new = total - past
        if not is_padded and (past == 0 or new == 1):
            return None
        causal = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(diagonal=past)[None, None]
        if attention_mask is None or not is_padded:
            return causal
        itself = causal.triu(past)  # so that padding, too, has something to attend to, and no NaN comes of it
        return causal & attention_mask[:, None, None, :total].bool() | itself


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.wte.weight"}

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        settings = config.settings
        self.model = NGPTModel(config)
        self.lm_head = nn.Linear(settings["n_embd"], settings["vocab_size"], bias=False)
        size = settings["vocab_size"] if settings["logit_scale_kind"] == "vector" else 1
        scale = settings["n_embd"] ** -0.5 if settings["scale_trick"] else settings["logit_scale"]
        on_sphere = settings["residual"] != "add"
        self.s_z = Scale(size, init=settings["logit_scale"], scale=scale) if on_sphere else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.model.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns float32 logits (B, T, V), or of the last `logits_to_keep` tokens, and with `labels` the loss."""
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            cache,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x, weight = outputs.last_hidden_state[:, kept], self.lm_head.weight
        if self.s_z is not None:
            weight = (weight * self.s_z()[:, None]).to(weight.dtype)
        logits = F.linear(x.to(weight.dtype), weight).float()
        if (softcap := self.config.settings["softcap"]) is not None:
            logits = softcap * torch.tanh(logits / softcap)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        memory = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **memory)
