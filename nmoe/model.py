"""Config → layer graph: the DeepSeek-shaped transformer, forward only.

Parameters are named by their path (`layers.3.moe.experts.gate_up`); the last part of a path never repeats the layer.
A parameter's group, initialisation and weight decay follow from its name and rank: see `group_of` and `is_norm`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from nmoe.config import Config, Layer, layers
from nmoe.graph import Graph, Name
from nmoe.ops.attention import yarn_mscale
from nmoe.ops.base import wide
from nmoe.rdep.sizes import worst_case

Mode = Literal["train", "logits"]
GROUPS = ("dense", "router", "expert")

# inputs
TOKENS, POSITIONS, TARGETS, MTP_TARGETS, SCALE = "tokens", "positions", "targets", "mtp_targets", "scale"
# state that a step accumulates
LOSS, MTP_LOSS, BALANCE_LOSS, Z_LOSS = "loss.main", "loss.mtp", "loss.balance", "loss.z"
LOGITS = "logits"  # the output of the "logits" graph
LATENT_EPS = 1e-6  # of the norms of MLA's latents, whatever norm_eps is: so do DeepSeek's published models
COUNTER = "counter"  # counts micro-batches; seeds stochastic rounding


def group_of(param: str) -> str:
    """Which learning rate a parameter follows: "dense", "router" or "expert"."""
    if ".experts." in param:
        return "expert"
    return "router" if param.endswith(".router") else "dense"


def is_norm(param: str) -> bool:
    """Normalisation scales start at one and are not decayed."""
    return param.endswith("norm")


def row_align(config: Config) -> int:
    """Rows to which an expert's segment is padded: the GEMM's row tile, on the CPU the scale-factor block."""
    if config.target.device != "cpu":
        return 128
    used = {p for layer in layers(config) for p in layer.precision}
    return 32 if "mxfp8" in used else 16 if "nvfp4" in used else 1


def bind_dims(config: Config, sequences: int) -> dict[str, int]:
    """The two symbols of the graph for a micro-batch of so many sequences: T tokens and R expert rows.

    R is the stated capacity, rounded up to whole row tiles, or the worst case, which no routing exceeds.
    """
    tokens = sequences * config.train.seq_len
    moe, rdep = config.moe, config.rdep
    if moe is None:
        return {"T": tokens, "R": 0}
    align = row_align(config)
    stated = -(-rdep.capacity // align) * align
    return {"T": tokens, "R": stated or worst_case(rdep.ranks, tokens, moe.topk, moe.experts, align)}


class Builder:
    def __init__(self, config: Config, mode: Mode, activation: str | None) -> None:
        self.config, self.mode = config, mode
        self.g = Graph()
        self.act = activation or ("f32" if config.schedule.precision == "fp32" else "bf16")
        self.wide = wide(self.act)

    def param(self, name: str, *shape: int) -> str:
        if name in self.g.tensors:
            return name
        narrow = len(shape) > 1 and group_of(name) != "router"
        return self.g.add(name, shape, self.act if narrow else self.wide, "param")

    def state(self, name: str, *shape: int, format: str | None = None) -> str:
        if name not in self.g.tensors:
            self.g.add(name, shape, format or self.wide, "state")
        return name

    def norm(self, x: Name, name: str, eps: float = 0.0) -> Name:
        width = self.g.shape(x)[1]
        weight = self.param(name, width)
        return self.g.emit(
            "rms_norm", f"{name}.apply", [x, weight], {"eps": eps or self.config.model.norm_eps}
        )[0]

    def linear(self, x: Name, name: str, out: int, layer: Layer) -> Name:
        weight = self.param(name, out, self.g.shape(x)[1])
        return self.g.emit("gemm", f"{name}.gemm", [x, weight], self.gemm_attrs(layer))[0]

    def gemm_attrs(self, layer: Layer | None) -> dict:
        """The GEMMs of a layer quantize as its recipe says. The head (layer None) never does, nor do the embedding,
        the router and attention's products: arXiv 2509.25149 §4.1, arXiv 2412.19437 §3.3.1."""
        precision = layer.precision._asdict() if layer else {}
        return {"role": "fprop", "format": self.act, "precision": precision}

    def build(self) -> Graph:
        config, model, g = self.config, self.config.model, self.g
        for name in (TOKENS, POSITIONS):
            g.add(name, ("T",), "i32", "input")
        self.state(COUNTER, 1, format="i64")
        attention = model.attention
        rope = {"seq_len": config.train.seq_len, "dim": attention.qk_rope_head_dim, "theta": attention.rope_theta,
                "yarn": asdict(attention.yarn), "format": self.wide}  # fmt: skip
        self.table = g.emit("rope_table", "rope", [], rope, phase="init")
        embedding = self.param("embed", model.vocab_size, model.hidden_size)
        (x,) = g.emit("embedding", "embed.apply", [TOKENS, embedding])
        all_layers = layers(config)
        for layer in all_layers:
            x = self.layer(x, f"layers.{layer.index}", layer)
        h = self.norm(x, "final_norm")
        head = embedding if model.tie_embeddings else self.param("head", model.vocab_size, model.hidden_size)
        if self.mode == "logits":
            g.add(LOGITS, ("T", model.vocab_size), self.act, "output")
            g.emit("gemm", "logits.gemm", [h, head], self.gemm_attrs(None), into={"y": LOGITS})
            return g
        g.add(TARGETS, ("T",), "i32", "input")
        g.add(SCALE, (1,), self.wide, "input")
        self.loss(h, head, TARGETS, LOSS, 1.0)
        if model.mtp_depth:
            self.multi_token_prediction(h, embedding, head, all_layers[-1])
        return g

    def loss(self, h: Name, head: str, targets: str, into: str, weight: float) -> None:
        self.g.emit("linear_cross_entropy", f"{into}.apply", [h, head, targets, SCALE], {"weight": weight},
                    into={"loss": self.state(into, 1)})  # fmt: skip

    def multi_token_prediction(self, h: Name, embedding: str, head: str, layer: Layer) -> None:
        """One more layer that predicts the token after next from the trunk's output `h`, after the final norm as in
        transformers, and the next token's embedding (arXiv 2412.19437 eq. 21–23). The targets are the next tokens;
        beyond a document they are negative."""
        g = self.g
        g.add(MTP_TARGETS, ("T",), "i32", "input")
        (e,) = g.emit("embedding", "mtp.0.embed.apply", [TARGETS, embedding])
        pair = g.emit(
            "concat", "mtp.0.concat", [self.norm(e, "mtp.0.embed_norm"), self.norm(h, "mtp.0.hidden_norm")]
        )[0]
        x = self.linear(pair, "mtp.0.project", self.config.model.hidden_size, layer)
        x = self.layer(x, "mtp.0", layer)
        h = self.norm(x, "mtp.0.final_norm")
        self.loss(h, head, MTP_TARGETS, MTP_LOSS, self.config.model.mtp_loss_weight)

    def layer(self, x: Name, path: str, layer: Layer) -> Name:
        g = self.g
        h = self.norm(x, f"{path}.attn_norm")
        (x,) = g.emit("add", f"{path}.attn.residual", [x, self.attention(h, f"{path}.attn", layer)])
        h = self.norm(x, f"{path}.ffn_norm")
        if layer.ffn == "dense":
            branches = [self.ffn(h, f"{path}.ffn", layer.intermediate_size, layer)]
        else:
            branches = self.moe(h, f"{path}.moe", layer)
        for i, branch in enumerate(branches):
            (x,) = g.emit("add", f"{path}.residual.{i}", [x, branch])
        return x

    def attention(self, h: Name, path: str, layer: Layer) -> Name:
        g, a = self.g, self.config.model.attention
        query = a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank:
            latent = self.norm(
                self.linear(h, f"{path}.q_a", a.q_lora_rank, layer), f"{path}.q_norm", LATENT_EPS
            )
            q = self.linear(latent, f"{path}.q_b", query, layer)
        else:
            q = self.linear(h, f"{path}.q", query, layer)
        joint = self.linear(h, f"{path}.kv_a", a.kv_lora_rank + a.qk_rope_head_dim, layer)
        latent, k_rope = g.emit("split", f"{path}.kv_split", [joint], {"at": a.kv_lora_rank})
        kv = self.linear(
            self.norm(latent, f"{path}.kv_norm", LATENT_EPS),
            f"{path}.kv_b",
            a.heads * (a.qk_nope_head_dim + a.v_head_dim),
            layer,
        )
        rope = {"dim": a.qk_rope_head_dim, "inverse": False}
        (q,) = g.emit("rope", f"{path}.q_rope", [q, POSITIONS, *self.table], {**rope, "heads": a.heads})
        (k_rope,) = g.emit("rope", f"{path}.k_rope", [k_rope, POSITIONS, *self.table], {**rope, "heads": 1})
        yarn = a.yarn
        temperature = yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn.mscale_all_dim else 1.0
        attrs = {"heads": a.heads, "nope": a.qk_nope_head_dim, "rope": a.qk_rope_head_dim, "v": a.v_head_dim,
                 "window": layer.window, "seq_len": self.config.train.seq_len,
                 "scale": (a.qk_nope_head_dim + a.qk_rope_head_dim) ** -0.5 * temperature**2}  # fmt: skip
        o, _ = g.emit("attention", f"{path}.core", [q, kv, k_rope, POSITIONS], attrs)
        return self.linear(o, f"{path}.o", self.config.model.hidden_size, layer)

    def ffn(self, h: Name, path: str, width: int, layer: Layer) -> Name:
        gate_up = self.linear(h, f"{path}.gate_up", 2 * width, layer)
        (a,) = self.g.emit("swiglu", f"{path}.swiglu", [gate_up, None])
        return self.linear(a, f"{path}.down", self.config.model.hidden_size, layer)

    def moe(self, h: Name, path: str, layer: Layer) -> list[Name]:
        g, moe, d = self.g, self.config.moe, self.config.model.hidden_size
        assert moe is not None
        local, n = moe.experts // self.config.rdep.ranks, moe.intermediate_size
        router = self.param(f"{path}.router", moe.experts, d)
        bias = self.state(f"{path}.router_bias", moe.experts) if moe.bias_rate else None
        attrs: dict[str, Any] = {
                 "topk": moe.topk, "groups": moe.groups, "topk_groups": moe.topk_groups, "score": moe.score,
                 "normalize": moe.normalize_topk, "route_scale": moe.route_scale, "balance": moe.balance_loss,
                 "z": moe.z_loss, "seq_len": self.config.train.seq_len,
                 "inverse_sequences": 1.0 / self.config.train.batch_size}  # fmt: skip
        into = {label: self.state(name, 1) for label, name, on in
                (("balance", BALANCE_LOSS, moe.balance_loss), ("z", Z_LOSS, moe.z_loss)) if on}  # fmt: skip
        indices, weights, *_ = g.emit("router", f"{path}.route", [h, router, bias], attrs, into=into)
        attrs = {"experts": moe.experts, "ranks": self.config.rdep.ranks, "align": row_align(self.config),
                 "format": self.wide}  # fmt: skip
        if self.config.rdep.ranks > 1 and attrs["align"] == 1:  # the CPU's BF16 and FP32
            attrs["runs"] = True
        *plan, _, runs = g.emit("moe_plan", f"{path}.plan", [indices], attrs,
                                into={"load": self.state(f"{path}.load", moe.experts)})  # fmt: skip
        ranks = {"ranks": self.config.rdep.ranks} if self.config.rdep.ranks > 1 else {}
        rows, row_weight = g.emit("dispatch", f"{path}.dispatch", [h, weights, *plan], ranks)
        w1 = self.param(f"{path}.experts.gate_up", local, 2 * n, d)
        w2 = self.param(f"{path}.experts.down", local, d, n)
        segments = runs or plan[2]
        gate_up, _ = g.emit("grouped_gemm", f"{path}.gemm1", [rows, w1, segments], self.gemm_attrs(layer))
        (a,) = g.emit("swiglu", f"{path}.swiglu", [gate_up, row_weight])
        y, _ = g.emit("grouped_gemm", f"{path}.gemm2", [a, w2, segments], self.gemm_attrs(layer))
        combined, _ = g.emit("combine", f"{path}.combine", [y, None, *plan], ranks)
        if not moe.shared_experts:
            return [combined]
        return [self.ffn(h, f"{path}.shared", moe.shared_experts * n, layer), combined]


def build(config: Config, mode: Mode = "train", *, activation: str | None = None) -> Graph:
    """The forward graph. "train" ends in the losses, "logits" in `logits` [T, vocab].

    `activation` replaces the format of the residual stream ("f64" runs everything in float64, for tests).
    """
    return Builder(config, mode, activation).build()
