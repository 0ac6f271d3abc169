"""What the keys of a config must satisfy together.

Each rule names the keys involved with their values and the smallest change that mends the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from nmoe.schema import Config, Moe, Precision, Precisions, layers
from nmoe.toml import describe

# Broken?, the keys involved (the mistake is shown at the first), the message. A rule is dropped when one
# of its keys is wrong by itself, so no message speaks of a stand-in.
Rule = tuple[Any, str, str]

LOCAL_DATASETS = ("parquet", "json", "text")


def rules(config: Config) -> Iterator[Rule]:
    yield from _model_rules(config)
    yield from _moe_rules(config)
    yield from _precision_rules(config)
    yield from _block_rules(config)
    yield from _length_rules(config)
    yield from _data_rules(config)


def _model_rules(config: Config) -> Iterator[Rule]:
    attention, yarn, seq_len = config.model.attention, config.model.attention.yarn, config.train.seq_len
    for i, group in enumerate(config.model.layers):
        at, size = f"model.layers.{i}", group.intermediate_size
        yield (
            group.ffn == "dense" and size == 0,
            f"{at}.intermediate_size {at}.ffn",
            'found 0 with ffn = "dense", expected the width of the dense ffn',
        )
        yield (
            group.ffn == "moe" and size,
            f"{at}.intermediate_size {at}.ffn",
            f'found {size} with ffn = "moe", expected no such key; experts are [moe] intermediate_size wide',
        )
        yield (
            len(group.attention) > group.repeat,
            f"{at}.attention {at}.repeat",
            f"found {len(group.attention)} kinds for repeat = {group.repeat}, "
            f"expected at most one kind a layer; use repeat = {len(group.attention)}",
        )
        yield (
            "local" in group.attention and attention.window == 0,
            f"{at}.attention model.attention.window",
            'found "local" with [model.attention] window = 0, expected a window ≥ 1',
        )
    yield (
        attention.window and not any("local" in group.attention for group in config.model.layers),
        "model.attention.window model.layers",
        f'found {attention.window}, expected 0, for no layer group has attention = "local"',
    )
    yield (
        attention.qk_rope_head_dim % 2,
        "model.attention.qk_rope_head_dim",
        f"found {attention.qk_rope_head_dim}, expected an even number, for RoPE turns pairs; "
        f"use {attention.qk_rope_head_dim + 1}",
    )
    yield (
        yarn.factor > 1 and yarn.beta_fast <= yarn.beta_slow,
        "model.attention.yarn.beta_fast model.attention.yarn.beta_slow model.attention.yarn.factor",
        f"found {yarn.beta_fast}, expected more than beta_slow = {yarn.beta_slow}; the paper has 32 and 1",
    )
    yield (
        yarn.factor > 1 and seq_len > yarn.factor * yarn.original_seq_len,
        "train.seq_len model.attention.yarn.factor model.attention.yarn.original_seq_len",
        f"found {seq_len}, expected at most [model.attention.yarn] factor × original_seq_len = "
        f"{yarn.factor:g} × {yarn.original_seq_len}; "
        f"use factor = {math.ceil(seq_len / yarn.original_seq_len)}",
    )
    yield (
        config.model.mtp_depth >= seq_len,
        "train.seq_len model.mtp_depth",
        f"found {seq_len}, expected more than [model] mtp_depth = {config.model.mtp_depth} tokens",
    )


def _moe_rules(config: Config) -> Iterator[Rule]:
    moe, ranks, train = config.moe, config.rdep.ranks, config.train
    first = next((i for i, group in enumerate(config.model.layers) if group.ffn == "moe"), None)
    if moe is None:
        yield (
            first is not None,
            "moe model.layers",
            f'missing, expected {describe(Moe)}, for [[model.layers]] #{(first or 0) + 1} has ffn = "moe"',
        )
        for key, value, off in (
            ("rdep.ranks", ranks, ranks == 1),
            ("rdep.capacity", config.rdep.capacity, config.rdep.capacity == 0),
            ("optim.lr_router", config.optim.lr_router, config.optim.lr_router is None),
            ("optim.lr_expert", config.optim.lr_expert, config.optim.lr_expert is None),
        ):
            yield (
                first is None and not off,
                f"{key} model.layers",
                f"found {value}, expected no such key in a model without [moe]",
            )
        return
    yield (
        first is None,
        "moe model.layers",
        'found a section, expected none, for no layer group has ffn = "moe"',
    )
    yield (
        moe.experts % ranks,
        "moe.experts rdep.ranks",
        f"found {moe.experts}, expected a multiple of [rdep] ranks = {ranks}; "
        f"use experts = {_up(moe.experts, ranks)} or ranks = {_divisor(moe.experts, ranks)}",
    )
    yield (
        moe.topk > moe.experts,
        "moe.topk moe.experts",
        f"found {moe.topk}, expected at most experts = {moe.experts}; use topk = {moe.experts}",
    )
    yield (
        moe.topk == 1 and moe.normalize_topk,
        "moe.normalize_topk moe.topk",
        "found true with topk = 1: the only weight is always 1 and the router gets no gradient; use false",
    )
    yield (
        moe.experts % moe.groups,
        "moe.groups moe.experts",
        f"found {moe.groups}, expected a divisor of experts = {moe.experts}; "
        f"use groups = {_divisor(moe.experts, moe.groups)} or experts = {_up(moe.experts, moe.groups)}",
    )
    yield (
        moe.topk_groups > moe.groups,
        "moe.topk_groups moe.groups",
        f"found {moe.topk_groups}, expected at most groups = {moe.groups}; use topk_groups = {moe.groups}",
    )
    per_group, pairs = moe.experts // moe.groups, _divisor(moe.experts, max(moe.experts // 2, 1))
    reach = moe.topk_groups * per_group
    yield (
        moe.experts % moe.groups == 0 and moe.topk_groups <= moe.groups and reach < moe.topk <= moe.experts,
        "moe.topk moe.topk_groups moe.groups moe.experts",
        f"found {moe.topk}, expected at most topk_groups × experts / groups = "
        f"{moe.topk_groups} × {moe.experts} / {moe.groups} = {reach}; "
        f"use topk_groups = {math.ceil(moe.topk / max(per_group, 1))} or topk = {reach}",
    )
    yield (
        moe.groups > 1 and moe.experts % moe.groups == 0 and moe.score == "sigmoid" and per_group < 2,
        "moe.groups moe.experts moe.score",
        f"found {moe.groups}, expected at least 2 of the experts = {moe.experts} in a group, "
        f'for score = "sigmoid" ranks groups by their best two; use groups = {pairs}',
    )
    sure = train.micro_batch_size * train.seq_len * moe.topk
    yield (
        0 < config.rdep.capacity < sure,
        "rdep.capacity train.micro_batch_size train.seq_len moe.topk",
        f"found {config.rdep.capacity}, expected at least [train] micro_batch_size × seq_len × [moe] topk = "
        f"{train.micro_batch_size} × {train.seq_len} × {moe.topk} = {sure}, "
        "the load under perfect balance; use 0 for the worst case",
    )


def _precision_rules(config: Config) -> Iterator[Rule]:
    schedule, base, depth = config.schedule, config.schedule.precision, len(layers(config))
    chosen: dict[str, Precision | None] = {
        f"schedule.{name}": getattr(schedule, name) for name in Precisions._fields
    }
    chosen |= {f"model.layers.{i}.precision": group.precision for i, group in enumerate(config.model.layers)}
    for key, precision in {"schedule.precision": base, **chosen}.items():
        yield (
            precision == "fp32" and config.target.device != "cpu",
            f"{key} target.device",
            f'found "fp32" with [target] device = "{config.target.device}", expected "bf16", "mxfp8" or '
            '"nvfp4"; fp32 is for device = "cpu"',
        )
        yield (
            precision and (precision == "fp32") != (base == "fp32"),
            f"{key} schedule.precision",
            f'found "{precision}" with [schedule] precision = "{base}", expected fp32 everywhere or nowhere',
        )
    for name in ("bf16_first_layers", "bf16_last_layers", "bf16_last_tokens"):
        yield (
            getattr(schedule, name) and base == "fp32",
            f"schedule.{name} schedule.precision",
            f'found {getattr(schedule, name)} with precision = "fp32", expected 0; bf16 is less precise',
        )
    first, last = schedule.bf16_first_layers, schedule.bf16_last_layers
    yield (
        first + last > depth,
        "schedule.bf16_last_layers schedule.bf16_first_layers model.layers",
        f"found {last} with bf16_first_layers = {first}, expected a sum of at most the model's {depth} "
        'layers; use precision = "bf16" for all of them',
    )


def _block_rules(config: Config) -> Iterator[Rule]:
    """GEMM dimensions and token counts against the blocks of the formats in force.

    Blocks run along the contracted dimension: an input in fprop, an output in dgrad, the tokens in wgrad.
    Kernels load operands by TMA, whose strides are multiples of 16 bytes.
    """
    blocks = {"mxfp8": 32, "nvfp4": 16}
    if config.target.device != "cpu":
        blocks = {"bf16": 8, "mxfp8": 32, "nvfp4": 32}
    model, attention, train = config.model, config.model.attention, config.train
    every = layers(config)

    def need(sizes: set[Precision]) -> tuple[int, str]:
        return max(((blocks.get(p, 1), p) for p in sizes), default=(1, ""))

    heads, rope = attention.heads, attention.qk_rope_head_dim
    at = "model.attention."
    dimensions = [
        (every, "model.hidden_size", "", model.hidden_size),
        (every, at + "q_lora_rank", "", attention.q_lora_rank),
        (every, at + "kv_lora_rank", "", attention.kv_lora_rank),
        (
            every,
            f"{at}qk_rope_head_dim {at}kv_lora_rank",
            "kv_lora_rank + qk_rope_head_dim = ",
            attention.kv_lora_rank + rope,
        ),
        (
            every,
            f"{at}qk_nope_head_dim {at}qk_rope_head_dim {at}heads",
            "heads × (qk_nope_head_dim + qk_rope_head_dim) = ",
            heads * (attention.qk_nope_head_dim + rope),
        ),
        (
            every,
            f"{at}v_head_dim {at}qk_nope_head_dim {at}heads",
            "heads × (qk_nope_head_dim + v_head_dim) = ",
            heads * (attention.qk_nope_head_dim + attention.v_head_dim),
        ),
        (every, f"{at}v_head_dim {at}heads", "heads × v_head_dim = ", heads * attention.v_head_dim),
    ]
    start = 0
    for i, group in enumerate(model.layers):
        inside, start = every[start : start + group.repeat], start + group.repeat
        if group.ffn == "dense":
            dimensions.append((inside, f"model.layers.{i}.intermediate_size", "", group.intermediate_size))
    if config.moe:
        experts = tuple(layer for layer in every if layer.ffn == "moe")
        dimensions.append((experts, "moe.intermediate_size", "", config.moe.intermediate_size))
    for where, keys, formula, size in dimensions:
        block, name = need({p for layer in where for p in (layer.precision.fprop, layer.precision.dgrad)})
        yield (
            size % block,
            f"{keys} model.layers schedule target",
            f"found {formula}{size}, expected a multiple of {block} for {name} on {config.target.device}; "
            f"the next is {_up(size, block)}",
        )
    rows = train.micro_batch_size or train.batch_size
    block, name = need({layer.precision.wgrad for layer in every} - {"bf16"})
    yield (
        rows * train.seq_len % block,
        "train.seq_len train.batch_size train.micro_batch_size model.layers schedule target",
        f"found {rows} × {train.seq_len} tokens at once, expected a multiple of {block} for {name} weight "
        f"gradients on {config.target.device}; use seq_len = {_up(train.seq_len, block)}",
    )


def _length_rules(config: Config) -> Iterator[Rule]:
    optim, train, total = config.optim, config.train, config.total_tokens
    run = f"the run's [train] steps × batch_size × seq_len = {total} tokens"
    sizes = "train.steps train.batch_size train.seq_len"
    yield (
        train.micro_batch_size and train.batch_size % train.micro_batch_size,
        "train.batch_size train.micro_batch_size",
        f"found {train.batch_size}, expected a multiple of micro_batch_size = {train.micro_batch_size}; "
        f"use {_up(train.batch_size, max(train.micro_batch_size, 1))}",
    )
    ramps = optim.warmup_tokens + optim.decay_tokens
    yield (
        ramps > total,
        f"optim.decay_tokens optim.warmup_tokens {sizes}",
        f"found {optim.decay_tokens} with warmup_tokens = {optim.warmup_tokens}, expected a sum of at most "
        f"{run}; shorten them or use steps = {math.ceil(ramps / (train.batch_size * train.seq_len))}",
    )
    yield (
        config.schedule.bf16_last_tokens > total,
        f"schedule.bf16_last_tokens {sizes}",
        f"found {config.schedule.bf16_last_tokens}, expected at most {run}; "
        'use precision = "bf16" for all of it',
    )


def _data_rules(config: Config) -> Iterator[Rule]:
    data, vocab_size = config.data, config.model.vocab_size
    kind, _, trained = data.tokenizer.partition(":")
    yield (
        kind == "bpe" and trained != str(vocab_size),
        "data.tokenizer model.vocab_size",
        f'found "{data.tokenizer}", expected as many entries as [model] vocab_size = {vocab_size}; '
        f'use "bpe:{vocab_size}" or vocab_size = {trained}',
    )
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        at, twin, local = f"data.sources.{i}", names.index(source.name), source.dataset in LOCAL_DATASETS
        yield (
            twin < i,
            f"{at}.name data.sources.{twin}.name",
            f'found "{source.name}" again, expected another name than that of [[data.sources]] #{twin + 1}',
        )
        yield (
            local and not source.files,
            f"{at}.files {at}.dataset",
            f'missing, expected globs of local files, for dataset = "{source.dataset}"',
        )
        yield (
            source.files and not local,
            f"{at}.files {at}.dataset",
            f'found files with dataset = "{source.dataset}", expected none for a hub dataset; '
            'local files need dataset = "parquet", "json" or "text"',
        )
        yield (
            source.subset and local,
            f"{at}.subset {at}.dataset",
            f'found "{source.subset}" with dataset = "{source.dataset}", expected none for local files',
        )
        yield (
            source.dataset == "text" and source.text_field != "text",
            f"{at}.text_field {at}.dataset",
            f'found "{source.text_field}" with dataset = "text", expected "text", the column of text files',
        )


def _divisor(value: int, most: int) -> int:
    """The largest divisor of `value` that is at most `most`."""
    return next(d for d in range(min(value, most), 0, -1) if value % d == 0)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
