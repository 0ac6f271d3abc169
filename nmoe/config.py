"""TOML + NMOE_* overrides → frozen dataclasses, validated as a whole, with a fingerprint.

The dataclasses below are the whole configuration surface. A field without a default is required;
`0` or `""` in an optional field means "off" where its comment says so. Tokens are counted globally.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Run:
    name: str  # names the run's checkpoints; a run id is this name plus its start time
    seed: int = 0  # initialisation, data order and stochastic rounding all derive from it


@dataclass(frozen=True)
class Target:
    device: Literal["sm_100a", "sm_90a", "cpu"] = "sm_100a"


@dataclass(frozen=True)
class Yarn:
    """RoPE extension (arXiv 2309.00071). `factor = 1` turns it off."""

    factor: float = 1.0
    original_seq_len: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Multi-head latent attention (arXiv 2405.04434 §2.1)."""

    heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0  # 0: queries are projected from the hidden state directly
    window: int = 0  # tokens seen by layers whose attention is "local"
    rope_theta: float = 10000.0
    yarn: Yarn = Yarn()


@dataclass(frozen=True)
class LayerGroup:
    """`repeat` consecutive layers of one shape."""

    ffn: Literal["dense", "moe"]
    repeat: int = 1
    attention: tuple[Literal["global", "local"], ...] = ("global",)  # cycled over the repeats
    intermediate_size: int = 0  # width of a dense ffn
    precision: Precision | None = None  # None: [schedule] precision


@dataclass(frozen=True)
class Model:
    vocab_size: int
    hidden_size: int
    attention: Attention
    layers: tuple[LayerGroup, ...]
    norm_eps: float = 1e-6
    init_std: float = 0.02
    tie_embeddings: bool = False
    mtp_depth: Literal[0, 1] = 0  # multi-token prediction modules (arXiv 2412.19437 §2.2)
    mtp_loss_weight: float = 0.3


@dataclass(frozen=True)
class Moe:
    experts: int
    topk: int
    intermediate_size: int
    shared_experts: int = 0  # one shared ffn of shared_experts × intermediate_size
    groups: int = 1  # group-limited routing: experts in `groups` groups,
    topk_groups: int = 1  # a token picks its experts from the best `topk_groups`
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_topk: bool = True
    route_scale: float = 1.0
    bias_rate: float = 0.001  # auxiliary-loss-free balancing (arXiv 2408.15664); 0: off
    balance_loss: float = 0.0  # sequence-wise balance loss (arXiv 2412.19437 eq. 17); 0: off
    z_loss: float = 0.0  # router z-loss (arXiv 2202.08906 eq. 5); 0: off


@dataclass(frozen=True)
class Rdep:
    ranks: int = 1  # ranks that share one set of experts
    capacity: int = 0  # expert rows a rank can receive a micro-batch; 0: the worst case, nothing can overflow


@dataclass(frozen=True)
class Optim:
    """AdamW with FP32 master weights; the learning rate warms up, stays, then decays linearly (WSD)."""

    lr: float
    lr_router: float | None = None  # None: lr
    lr_expert: float | None = None  # None: lr
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    clip_norm: float = 1.0  # global norm; 0: off
    state_precision: Literal["fp32", "bf16"] = "fp32"  # of the two moments
    warmup_tokens: int = 0
    decay_tokens: int = 0  # the last tokens of the run
    final_lr: float = 0.1  # fraction of the peak at the end of the decay


@dataclass(frozen=True)
class Schedule:
    """How the step is executed: numerics and recomputation."""

    precision: Precision = "bf16"
    fprop: Precision | None = None  # a single pass in another precision; None: `precision`
    dgrad: Precision | None = None
    wgrad: Precision | None = None
    bf16_first_layers: int = 0  # layers kept in bf16 whatever `precision` says
    bf16_last_layers: int = 0
    bf16_last_tokens: int = 0  # the last tokens of the run train in bf16
    recompute: Literal["none", "selective", "full"] = "selective"


@dataclass(frozen=True)
class Train:
    steps: int
    batch_size: int  # sequences a step, over all ranks
    seq_len: int
    micro_batch_size: int = 0  # sequences a rank runs at once; 0: all of its share
    log_every: int = 10  # steps


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture."""

    name: str
    weight: float = 1.0  # relative share of tokens, before the temperature
    dataset: str = "text"  # a HuggingFace hub name, or "parquet", "json", "text" with `files`
    files: tuple[str, ...] = ()  # globs, for local data
    subset: str = ""
    split: str = "train"
    text_field: str = "text"
    max_tokens: int = 0  # stop after so many; 0: all


@dataclass(frozen=True)
class Data:
    dir: str  # token shards live here
    tokenizer: str  # "bpe:4096" (trained on the data), "tiktoken:o200k_base" or "hf:path/to/tokenizer.json"
    sources: tuple[Source, ...]
    temperature: float = 1.0  # share ∝ weight^(1/temperature)
    document_mask: bool = True  # attention and targets stay within a document
    shard_tokens: int = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    dir: str
    every: int = 1000  # steps
    keep: int = 3
    init_from: str = ""  # a HuggingFace safetensors folder to start from


@dataclass(frozen=True)
class Metrics:
    dir: str  # {dir}/{run_id}/rank_{rank}.duckdb
    experiments: str  # SQLite file with the table `runs`


@dataclass(frozen=True)
class Config:
    run: Run
    model: Model
    optim: Optim
    train: Train
    data: Data
    checkpoint: Checkpoint
    metrics: Metrics
    moe: Moe | None = None  # required when a layer group has ffn = "moe"
    target: Target = field(default_factory=Target)
    rdep: Rdep = field(default_factory=Rdep)
    schedule: Schedule = field(default_factory=Schedule)
