"""The configuration surface: every section and key, its type, bound, default and meaning.

docs/config.md is generated from these dataclasses and their comments. A field without a default is
required; `0` or `""` in an optional field means "off" where its comment says so. Tokens are counted
globally.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from nmoe.toml import Bound

Precision = Literal["fp32", "bf16", "mxfp8", "nvfp4"]

Count = Annotated[int, Bound("an integer ≥ 1", lambda v: v >= 1)]
Amount = Annotated[int, Bound("an integer ≥ 0", lambda v: v >= 0)]
Seed = Annotated[int, Bound("an integer from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63)]
Positive = Annotated[float, Bound("a number > 0", lambda v: v > 0)]
NonNegative = Annotated[float, Bound("a number ≥ 0", lambda v: v >= 0)]
Fraction = Annotated[float, Bound("a number from 0 to 1", lambda v: 0 <= v <= 1)]
Decay = Annotated[float, Bound("a number ≥ 0 and < 1", lambda v: 0 <= v < 1)]
Factor = Annotated[float, Bound("a number ≥ 1", lambda v: v >= 1)]
Name = Annotated[
    str,
    Bound(
        "a name of letters, digits, '.', '_' and '-' that starts with a letter or digit",
        lambda v: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", v) is not None,
    ),
]
Text = Annotated[str, Bound("a non-empty string", lambda v: v.strip() != "")]
Pattern = Annotated[
    tuple[Literal["global", "local"], ...], Bound('"global", "local" or a list of them', lambda v: len(v) > 0)
]
Tables = Bound("one table or more", lambda v: len(v) > 0)
FilePath = Annotated[
    str, Bound("a path (~ is not expanded; use ${NMOE_…})", lambda v: v.strip() != "" and v[0] != "~")
]
Tokenizer = Annotated[
    str,
    Bound(
        '"bpe:N" with N ≥ 257 (256 bytes and the end-of-document token), "tiktoken:NAME" or "hf:PATH"',
        lambda v: re.fullmatch(r"(tiktoken|hf):\S.*|bpe:(\d{4,}|[3-9]\d\d|2[6-9]\d|25[7-9])", v) is not None,
    ),
]


@dataclass(frozen=True)
class Run:
    name: Name  # names the run's checkpoints; a run id is this name plus its start time
    seed: Seed = 0  # initialisation, data order and stochastic rounding all derive from it


@dataclass(frozen=True)
class Target:
    device: Literal["sm_100a", "sm_90a", "cpu"] = "sm_100a"  # what the step is compiled for and runs on


@dataclass(frozen=True)
class Yarn:
    """RoPE extension (arXiv 2309.00071). `factor = 1` turns it off."""

    factor: Factor = 1.0  # context extension: original_seq_len × factor tokens
    original_seq_len: Count = 4096  # tokens of context before the extension
    beta_fast: Positive = 32.0  # dimensions that turn more often than this over the context stay as they are
    beta_slow: Positive = 1.0  # dimensions that turn less often than this are interpolated fully
    mscale: NonNegative = 1.0  # attention temperature of the rotary part
    mscale_all_dim: NonNegative = 0.0  # attention temperature of all dimensions; 0: off


@dataclass(frozen=True)
class Attention:
    """Multi-head latent attention (arXiv 2405.04434 §2.1)."""

    heads: Count  # attention heads
    kv_lora_rank: Count  # width of the latent that keys and values are projected from
    qk_nope_head_dim: Count  # dimensions of a head's query and key without position
    qk_rope_head_dim: Count  # dimensions of a head's query and key with rotary position
    v_head_dim: Count  # dimensions of a head's value
    q_lora_rank: Amount = 0  # width of the queries' latent; 0: projected from the hidden state directly
    window: Amount = 0  # tokens seen by layers whose attention is "local", the token itself included
    rope_theta: Positive = 10000.0  # base of the rotary frequencies
    yarn: Yarn = Yarn()


@dataclass(frozen=True)
class LayerGroup:
    """`repeat` consecutive layers of one shape; the groups in order are the model."""

    ffn: Literal["dense", "moe"]  # one SwiGLU, or the router and experts of [moe]
    repeat: Count = 1  # layers in the group
    attention: Pattern = ("global",)  # a pattern cycled over the repeats; "local" sees a window
    intermediate_size: Amount = 0  # width of a dense ffn
    precision: Precision | None = None  # of all three passes of these layers; absent: as [schedule] says


@dataclass(frozen=True)
class Model:
    vocab_size: Count  # rows of the embedding
    hidden_size: Count  # width of the residual stream
    attention: Attention
    layers: Annotated[tuple[LayerGroup, ...], Tables]
    norm_eps: Positive = 1e-6  # of every RMSNorm
    init_std: Positive = 0.02  # standard deviation of initial weights
    tie_embeddings: bool = False  # the head uses the embedding's weights
    mtp_depth: Literal[0, 1] = 0  # multi-token prediction modules (arXiv 2412.19437 §2.2)
    mtp_loss_weight: Positive = 0.3  # of the multi-token prediction loss


@dataclass(frozen=True)
class Moe:
    """Router and experts of every layer whose ffn is "moe"; absent when there is none."""

    experts: Count  # routed experts of a layer
    topk: Count  # routed experts of a token
    intermediate_size: Count  # width of an expert
    shared_experts: Amount = 0  # one shared ffn of shared_experts × intermediate_size; 0: none
    groups: Count = 1  # group-limited routing: the experts form so many groups,
    topk_groups: Count = 1  # of which a token's best so many hold all its experts
    score: Literal["sigmoid", "softmax"] = "sigmoid"  # from router logits to weights
    normalize_topk: bool = True  # the weights of a token's experts sum to 1 before route_scale
    route_scale: Positive = 1.0  # factor on the weights
    bias_rate: NonNegative = 0.001  # auxiliary-loss-free balancing (arXiv 2408.15664); 0: off
    balance_loss: NonNegative = 0.0  # sequence-wise balance loss (arXiv 2412.19437 eq. 17); 0: off
    z_loss: NonNegative = 0.0  # router z-loss (arXiv 2202.08906 eq. 5); 0: off


@dataclass(frozen=True)
class Rdep:
    """Expert parallelism."""

    ranks: Count = 1  # ranks that share one set of experts
    capacity: Amount = 0  # expert rows a rank can take in a micro-batch; 0: the worst case, never exceeded
    timeout: Positive = 300.0  # seconds that a rank waits for another, which may be busy writing a checkpoint


@dataclass(frozen=True)
class Optim:
    """AdamW with FP32 master weights; the learning rate warms up, stays, then decays linearly (WSD)."""

    lr: Positive  # peak learning rate
    lr_router: Positive | None = None  # of the router; absent: lr
    lr_expert: Positive | None = None  # of routed experts; absent: lr
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # decay of the first and second moment
    eps: Positive = 1e-8  # added to the root of the second moment
    weight_decay: NonNegative = 0.1  # matrices only
    clip_norm: NonNegative = 1.0  # global norm; 0: off
    state_precision: Literal["fp32", "bf16"] = "fp32"  # of the two moments
    warmup_tokens: Amount = 0  # linear from 0 to the peak
    decay_tokens: Amount = 0  # the last tokens of the run
    final_lr: Fraction = 0.1  # fraction of the peak at the end of the decay


@dataclass(frozen=True)
class Schedule:
    """How the step is executed: numerics and recomputation."""

    precision: Precision = "bf16"  # of the GEMMs of every layer
    fprop: Precision | None = None  # the forward pass alone; absent: `precision`
    dgrad: Precision | None = None  # input gradients alone; absent: `precision`
    wgrad: Precision | None = None  # weight gradients alone; absent: `precision`
    bf16_first_layers: Amount = 0  # first layers kept in bf16 whatever else is said
    bf16_last_layers: Amount = 0  # last layers kept in bf16 whatever else is said
    bf16_last_tokens: Amount = 0  # the last tokens of the run train in bf16
    recompute: Literal["none", "selective", "full"] = "selective"  # activations rebuilt in the backward pass


@dataclass(frozen=True)
class Train:
    steps: Count  # optimizer steps of the run
    batch_size: Count  # sequences a step, over all ranks
    seq_len: Count  # tokens a sequence
    micro_batch_size: Amount = 0  # sequences a rank runs at once; 0: all of its share
    log_every: Count = 10  # steps


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture."""

    name: Name  # names its shards
    weight: Positive = 1.0  # relative share of tokens, before the temperature
    dataset: Text = "text"  # a HuggingFace hub name, or "parquet", "json", "text" with `files`
    files: tuple[FilePath, ...] = ()  # globs, for local data
    subset: str = ""  # configuration of a hub dataset
    split: Text = "train"  # split of a hub dataset
    text_field: Text = "text"  # column that holds the documents
    max_tokens: Amount = 0  # stop after so many; 0: all


@dataclass(frozen=True)
class Data:
    """Token shards, as `nmoe prep-mixture` makes them."""

    dir: FilePath  # token shards live here
    tokenizer: Tokenizer  # trained on the data with N entries, a tiktoken encoding, or a tokenizer.json
    sources: Annotated[tuple[Source, ...], Tables]
    temperature: Positive = 1.0  # share ∝ weight^(1/temperature)
    document_mask: bool = True  # attention and targets stay within a document
    shard_tokens: Count = 100_000_000  # tokens a shard file


@dataclass(frozen=True)
class Checkpoint:
    dir: FilePath  # one folder a run, by its name
    every: Count = 1000  # steps
    keep: Count = 3  # newest checkpoints kept
    init_from: str = ""  # a HuggingFace safetensors folder to start from


@dataclass(frozen=True)
class Metrics:
    dir: FilePath  # {dir}/{run_id}/rank_{rank}.duckdb
    experiments: FilePath  # SQLite file with the table `runs`


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run
    target: Target = Target()
    model: Model
    moe: Moe | None = None
    rdep: Rdep = Rdep()
    optim: Optim
    schedule: Schedule = Schedule()
    train: Train
    data: Data
    checkpoint: Checkpoint
    metrics: Metrics

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train.steps * self.train.batch_size * self.train.seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars: what checkpoints and run records keep as JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


# ---- layers -----------------------------------------------------------------------------------------


class Precisions(NamedTuple):
    """What the three GEMMs of a linear layer compute in."""

    fprop: Precision
    dgrad: Precision
    wgrad: Precision


@dataclass(frozen=True)
class Layer:
    """One layer of the model, group by group flattened."""

    index: int
    attention: Literal["global", "local"]
    window: int  # tokens seen; 0: all before it
    ffn: Literal["dense", "moe"]
    intermediate_size: int  # of the dense ffn, or of one expert
    precision: Precisions


def layers(config: Config) -> tuple[Layer, ...]:
    """The model's layers in order, without the multi-token prediction module.

    Precision, strongest first: bf16_first_layers and bf16_last_layers; the group's; [schedule] fprop,
    dgrad and wgrad; [schedule] precision.
    """
    schedule, total = config.schedule, sum(group.repeat for group in config.model.layers)
    base = schedule.precision
    scheduled = Precisions(schedule.fprop or base, schedule.dgrad or base, schedule.wgrad or base)
    result: list[Layer] = []
    for group in config.model.layers:
        for repeat in range(group.repeat):
            index = len(result)
            attention = group.attention[repeat % len(group.attention)]
            kept = index < schedule.bf16_first_layers or index >= total - schedule.bf16_last_layers
            own: Precision | None = "bf16" if kept else group.precision
            moe = config.moe.intermediate_size if config.moe else 0
            result.append(
                Layer(
                    index=index,
                    attention=attention,
                    window=config.model.attention.window if attention == "local" else 0,
                    ffn=group.ffn,
                    intermediate_size=moe if group.ffn == "moe" else group.intermediate_size,
                    precision=Precisions(own, own, own) if own else scheduled,
                )
            )
    return tuple(result)
