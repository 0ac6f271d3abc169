"""The training loss of a config in plain PyTorch, for autograd: loops and whole matrices instead of plans and chunks.

It shares with nmoe the config and the names of the parameters, nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from nmoe.config import Config, Layer, layers


class OracleModel:
    """`loss` of one micro-batch. `params` and `biases` (of routers) by their names in the layer graph."""

    def __init__(self, config: Config, params: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
        self.config, self.params, self.biases = config, params, biases

    def loss(
        self, tokens: Tensor, positions: Tensor, targets: Tensor, mtp_targets: Tensor, scale: float
    ) -> dict:
        """The losses by name, each already weighted as it counts in the sum; all int tensors are [T]."""
        model, p = self.config.model, self.params
        self.positions = positions.view(-1, self.config.train.seq_len).long()
        self.losses = {"loss.balance": torch.zeros(()), "loss.z": torch.zeros(())}
        x = p["embed"][tokens.long()]
        for layer in layers(self.config):
            x = self.layer(x, f"layers.{layer.index}", layer)
        h = self.norm(x, "final_norm")
        head = p["embed"] if model.tie_embeddings else p["head"]
        self.losses["loss.main"] = self.cross_entropy(h, head, targets) * scale
        if model.mtp_depth:
            e = embedding(targets.clamp(min=0).long(), p["embed"])
            pair = torch.cat([self.norm(e, "mtp.0.embed_norm"), self.norm(h, "mtp.0.hidden_norm")], -1)
            y = self.layer(pair @ p["mtp.0.project"].T, "mtp.0", layers(self.config)[-1])
            mtp = self.cross_entropy(self.norm(y, "mtp.0.final_norm"), head, mtp_targets)
            self.losses["loss.mtp"] = mtp * scale * model.mtp_loss_weight
        return self.losses

    def cross_entropy(self, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        kept = targets >= 0
        return -(h @ head.T)[kept].log_softmax(-1).gather(1, targets[kept].long()[:, None]).sum()

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = 1e-6 if name.endswith(("q_norm", "kv_norm")) else self.config.model.norm_eps
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.params[name]

    def layer(self, x: Tensor, path: str, layer: Layer) -> Tensor:
        x = x + self.attention(self.norm(x, f"{path}.attn_norm"), f"{path}.attn", layer.window)
        h = self.norm(x, f"{path}.ffn_norm")
        return x + (self.ffn(h, f"{path}.ffn") if layer.ffn == "dense" else self.moe(h, f"{path}.moe"))

    def ffn(self, h: Tensor, path: str) -> Tensor:
        gate, up = (h @ self.params[f"{path}.gate_up"].T).chunk(2, -1)
        return (silu(gate) * up) @ self.params[f"{path}.down"].T

    def rotate(self, x: Tensor) -> Tensor:
        """x [b, S, heads, dim] by each token's position, without YaRN."""
        dim = x.shape[-1]
        rates = self.config.model.attention.rope_theta ** (
            -torch.arange(0, dim, 2, dtype=torch.float64) / dim
        )
        angles = self.positions[..., None, None] * rates
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], dim // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def attention(self, h: Tensor, path: str, window: int) -> Tensor:
        a, p = self.config.model.attention, self.params
        nope, rope, batch, seq = a.qk_nope_head_dim, a.qk_rope_head_dim, *self.positions.shape
        if a.q_lora_rank:
            q = self.norm(h @ p[f"{path}.q_a"].T, f"{path}.q_norm") @ p[f"{path}.q_b"].T
        else:
            q = h @ p[f"{path}.q"].T
        q = q.view(batch, seq, a.heads, nope + rope)
        latent, k_rope = (h @ p[f"{path}.kv_a"].T).tensor_split([a.kv_lora_rank], -1)
        kv = self.norm(latent, f"{path}.kv_norm") @ p[f"{path}.kv_b"].T
        k_nope, v = kv.view(batch, seq, a.heads, -1).tensor_split([nope], -1)
        q = torch.cat([q[..., :nope], self.rotate(q[..., nope:])], -1)
        k_rope = self.rotate(k_rope.view(batch, seq, 1, rope)).expand(-1, -1, a.heads, -1)
        scores = torch.einsum("bihd,bjhd->bhij", q, torch.cat([k_nope, k_rope], -1)) / math.sqrt(nope + rope)
        at = torch.arange(seq)
        document = (at - self.positions)[:, None, :]  # a document is named by where it starts
        seen = (document == document.mT) & (at <= at[:, None])
        if window:
            seen &= at > at[:, None] - window
        probability = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", probability, v).reshape(len(h), -1) @ p[f"{path}.o"].T

    def moe(self, h: Tensor, path: str) -> Tensor:
        moe, p = self.config.moe, self.params
        logits = h @ p[f"{path}.router"].T
        scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(-1)
        choice = scores.detach() + self.biases.get(f"{path}.router_bias", 0.0)
        per_group = choice.view(len(h), moe.groups, -1)
        best = 2 if moe.score == "sigmoid" else 1
        value = per_group.topk(min(best, per_group.shape[-1]), -1).values.sum(-1)
        shut = torch.ones_like(value, dtype=torch.bool).scatter(
            1, value.topk(moe.topk_groups, -1).indices, False
        )
        choice = per_group.masked_fill(shut[..., None], -math.inf).view_as(choice)
        chosen = torch.zeros_like(scores).scatter(1, choice.topk(moe.topk, -1).indices, 1.0)
        weights = scores * chosen
        if moe.normalize_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(h)
        for e in range(moe.experts):
            gate, up = (h @ p[f"{path}.experts.gate_up"][e].T).chunk(2, -1)
            expert = (silu(gate) * up) @ p[f"{path}.experts.down"][e].T
            y = y + moe.route_scale * weights[:, e, None] * expert
        self.auxiliary(logits, scores, chosen)
        return y + self.ffn(h, f"{path}.shared") if moe.shared_experts else y

    def auxiliary(self, logits: Tensor, scores: Tensor, chosen: Tensor) -> None:
        """Means over all sequences of the step, of which these are some."""
        moe, seq, sequences = self.config.moe, self.config.train.seq_len, self.config.train.batch_size
        share = (scores / scores.sum(-1, keepdim=True)).view(-1, seq, moe.experts).mean(1)
        often = chosen.view(-1, seq, moe.experts).sum(1) * moe.experts / (moe.topk * seq)
        self.losses["loss.balance"] = (
            self.losses["loss.balance"] + moe.balance_loss * (share * often).sum() / sequences
        )
        z = logits.logsumexp(-1).square().view(-1, seq).mean(1).sum() / sequences
        self.losses["loss.z"] = self.losses["loss.z"] + moe.z_loss * z
