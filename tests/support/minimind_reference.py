"""MiniMind's three generations, written out by hand: state dicts, and what they compute.

Nothing of transformers is used: these are what loaded models are compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Reference:
    """One MiniMind model: sizes, and what its file does not tell."""

    generation: int = 2
    hidden: int = 64
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    width: int = 192
    vocabulary: int = 97
    theta: float = 1e6
    eps: float = 1e-5
    experts: int = 0
    chosen: int = 2
    shared: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def state(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return a random state dict, as the training scripts write it."""
        generator = torch.Generator().manual_seed(seed)
        first = self.generation == 1

        def made(*shape: int) -> torch.Tensor:
            scale = 1.0 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
            offset = 1.0 if len(shape) == 1 else 0.0
            return offset + torch.randn(shape, generator=generator) * scale * 0.5

        table = made(self.vocabulary, self.hidden)
        names = ("tok_embeddings", "output") if first else ("model.embed_tokens", "lm_head")
        state = {f"{name}.weight": table.clone() for name in names}
        for number in range(self.layers):
            prefix = f"layers.{number}." if first else f"model.layers.{number}."
            state |= {prefix + name: t for name, t in self._layer(made).items()}
            if first:  # the causal mask was a buffer of its own
                state[f"{prefix}attention.mask"] = torch.ones(1, 1, 8, 8)
        state["norm.weight" if first else "model.norm.weight"] = made(self.hidden)
        return {name: tensor.to(dtype) for name, tensor in state.items()}

    def _layer(self, made: object) -> dict[str, torch.Tensor]:
        hidden, width, head = self.hidden, self.width, self.head_dim
        first = self.generation == 1
        attention = "attention." if first else "self_attn."
        q, k, v, o = ("wq", "wk", "wv", "wo") if first else ("q_proj", "k_proj", "v_proj", "o_proj")
        gate, up, down = ("w1", "w3", "w2") if first else ("gate_proj", "up_proj", "down_proj")
        mlp = "feed_forward." if first else "mlp."
        layer = {
            f"{attention}{q}.weight": made(self.heads * head, hidden),
            f"{attention}{k}.weight": made(self.kv_heads * head, hidden),
            f"{attention}{v}.weight": made(self.kv_heads * head, hidden),
            f"{attention}{o}.weight": made(hidden, self.heads * head),
            ("attention_norm" if first else "input_layernorm") + ".weight": made(hidden),
            ("ffn_norm" if first else "post_attention_layernorm") + ".weight": made(hidden),
        }
        if self.generation == 3:
            layer |= {f"self_attn.{n}_norm.weight": made(head) for n in "qk"}
        paths = [mlp]
        if self.experts:
            paths = [f"{mlp}experts.{n}." for n in range(self.experts)]
            if self.generation < 3:
                many = self.generation == 2
                paths += [f"{mlp}shared_experts." + f"{n}." * many for n in range(self.shared)]
            layer[f"{mlp}gate.weight"] = made(self.experts, hidden)
        for path in paths:
            layer[f"{path}{gate}.weight"] = made(width, hidden)
            layer[f"{path}{up}.weight"] = made(width, hidden)
            layer[f"{path}{down}.weight"] = made(hidden, width)
        return layer

    def logits(self, state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, length, vocabulary] of `ids` [batch, length]."""
        first = self.generation == 1
        hidden = state["tok_embeddings.weight" if first else "model.embed_tokens.weight"][ids]
        for number in range(self.layers):
            prefix = f"layers.{number}." if first else f"model.layers.{number}."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            norms = ("attention_norm", "ffn_norm")
            if not first:
                norms = ("input_layernorm", "post_attention_layernorm")
            normed = self._norm(hidden, own[f"{norms[0]}.weight"])
            hidden = hidden + self._attention(normed, own)
            hidden = hidden + self._mlp(self._norm(hidden, own[f"{norms[1]}.weight"]), own)
        hidden = self._norm(hidden, state["norm.weight" if first else "model.norm.weight"])
        return hidden @ state["output.weight" if first else "lm_head.weight"].T

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)

    def _attention(self, x: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        names = ("wq", "wk", "wv", "wo")
        if self.generation > 1:
            names = ("q_proj", "k_proj", "v_proj", "o_proj")
        prefix = "attention." if self.generation == 1 else "self_attn."
        wq, wk, wv, wo = (own[f"{prefix}{name}.weight"] for name in names)
        q, k, v = ((x @ w.T).unflatten(-1, (-1, self.head_dim)) for w in (wq, wk, wv))
        if self.generation == 3:
            q = self._norm(q, own["self_attn.q_norm.weight"])
            k = self._norm(k, own["self_attn.k_norm.weight"])
        q, k = self._rope(q), self._rope(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.head_dim)
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) @ wo.T

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        """Turn pairs by their position: neighbours in generation 1, halves later."""
        half = self.head_dim // 2
        speeds = self.theta ** -(torch.arange(half).float() / half)
        angles = torch.outer(torch.arange(x.shape[1]).float(), speeds)[None, :, None]
        if self.generation == 1:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x[..., :half], x[..., half:]
        turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
        if self.generation == 1:
            return torch.stack(turned, dim=-1).flatten(-2)
        return torch.cat(turned, dim=-1)

    def _mlp(self, x: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        mlp = "feed_forward." if self.generation == 1 else "mlp."
        if not self.experts:
            return self._linear(x, own, mlp)
        scores = (x @ own[f"{mlp}gate.weight"].T).softmax(-1)
        best, which = scores.topk(self.chosen, dim=-1)
        if self.chosen > 1 or self.generation == 3:
            best = best / best.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        for number in range(self.experts):
            share = (best * (which == number)).sum(-1, keepdim=True)
            result = result + share * self._linear(x, own, f"{mlp}experts.{number}.")
        if self.generation < 3:
            many = self.generation == 2
            for number in range(self.shared):
                path = f"{mlp}shared_experts." + f"{number}." * many
                result = result + self._linear(x, own, path)
        return result

    def _linear(self, x: torch.Tensor, own: dict[str, torch.Tensor], path: str) -> torch.Tensor:
        names = ("w1", "w3", "w2")
        if self.generation > 1:
            names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (own[f"{path}{name}.weight"] for name in names)
        return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
