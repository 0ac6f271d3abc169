"""HuggingFace checkpoints in the layout that DeepSeek publishes: config.json and safetensors, both ways.

Sigmoid routing is written for `DeepseekV3ForCausalLM`, softmax routing for `DeepseekV2ForCausalLM`; both compute the
same logits from it as nmoe. What these models cannot compute is refused, never approximated.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmoe.config import Config, Rdep, layers
from nmoe.data.tokenizer import EOS
from nmoe.data.tokenizer import load as load_tokenizer
from nmoe.errors import CheckpointError, UserError
from nmoe.files import sync
from nmoe.model import build
from nmoe.ops.attention import rope_frequencies, yarn_mscale

SHARD_BYTES = 5 * 10**9  # a file holds at most so many, unless one tensor is larger
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LISTED = 20  # mistakes that an error spells out

# ---- names ------------------------------------------------------------------------------------------

# nmoe's name → the published tensors that it holds, stacked along their rows; "{e}": a tensor for each expert, along
# nmoe's first dimension. `final_norm` stands in the model's table and in the multi-token prediction module's.
_MODEL = {
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
_LAYER = {
    "attn_norm": ("input_layernorm.weight",),
    "attn.q": ("self_attn.q_proj.weight",),
    "attn.q_a": ("self_attn.q_a_proj.weight",),
    "attn.q_norm": ("self_attn.q_a_layernorm.weight",),
    "attn.q_b": ("self_attn.q_b_proj.weight",),
    "attn.kv_a": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attn.kv_norm": ("self_attn.kv_a_layernorm.weight",),
    "attn.kv_b": ("self_attn.kv_b_proj.weight",),
    "attn.o": ("self_attn.o_proj.weight",),
    "ffn_norm": ("post_attention_layernorm.weight",),
    "ffn.gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down": ("mlp.down_proj.weight",),
    "moe.router": ("mlp.gate.weight",),
    "moe.router_bias": ("mlp.gate.e_score_correction_bias",),
    "moe.shared.gate_up": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "moe.shared.down": ("mlp.shared_experts.down_proj.weight",),
    "moe.experts.gate_up": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "moe.experts.down": ("mlp.experts.{e}.down_proj.weight",),
    # of the multi-token prediction module, which counts as the layer after the last
    "embed_norm": ("enorm.weight",),
    "hidden_norm": ("hnorm.weight",),
    "project": ("eh_proj.weight",),
    "final_norm": ("shared_head.norm.weight",),
}


def _published(name: str, depth: int) -> tuple[str, ...]:
    """The published names of the parameter or router bias `name` in a model of `depth` layers."""
    if name in _MODEL:
        return _MODEL[name]
    part, index, rest = name.split(".", 2)
    number = int(index) + (depth if part == "mtp" else 0)
    return tuple(f"model.layers.{number}.{tail}" for tail in _LAYER[rest])


def pieces(name: str, tensor: Tensor, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Each published tensor in nmoe's `tensor`: its name and the view that it is."""
    names = _published(name, depth)
    stacked = enumerate(tensor) if "{e}" in names[0] else [(0, tensor)]
    for e, weight in stacked:
        for part, view in zip(names, weight.chunk(len(names)), strict=True):
            yield part.format(e=e), view


# ---- config.json ------------------------------------------------------------------------------------


class _Fact(NamedTuple):
    """A value of config.json (dots step into a table) and the TOML key that it comes from."""

    key: str
    value: Any
    toml: str


def _facts(config: Config) -> list[_Fact]:
    """Everything that config.json and the TOML must agree on."""
    model, a, moe, every = config.model, config.model.attention, config.moe, layers(config)
    dense = [layer for layer in every if layer.ffn == "dense"]
    at = "[model.attention] "
    facts = [
        _Fact("model_type", f"deepseek_{_version(config)}", "[moe] score"),
        _Fact("vocab_size", model.vocab_size, "[model] vocab_size"),
        _Fact("hidden_size", model.hidden_size, "[model] hidden_size"),
        _Fact("rms_norm_eps", model.norm_eps, "[model] norm_eps"),
        _Fact("tie_word_embeddings", model.tie_embeddings, "[model] tie_embeddings"),
        _Fact("num_hidden_layers", len(every), "[[model.layers]] repeat"),
        _Fact("first_k_dense_replace", len(dense), "[[model.layers]] ffn"),
        _Fact("num_attention_heads", a.heads, at + "heads"),
        _Fact("num_key_value_heads", a.heads, at + "heads"),
        _Fact("q_lora_rank", a.q_lora_rank or None, at + "q_lora_rank"),
        _Fact("kv_lora_rank", a.kv_lora_rank, at + "kv_lora_rank"),
        _Fact("qk_nope_head_dim", a.qk_nope_head_dim, at + "qk_nope_head_dim"),
        _Fact("qk_rope_head_dim", a.qk_rope_head_dim, at + "qk_rope_head_dim"),
        _Fact("v_head_dim", a.v_head_dim, at + "v_head_dim"),
        _Fact("rope_parameters.rope_theta", a.rope_theta, at + "rope_theta"),
    ]
    if dense:
        width = dense[0].intermediate_size
        facts.append(_Fact("intermediate_size", width, "[[model.layers]] intermediate_size"))
    if moe:
        facts += [
            _Fact("n_routed_experts", moe.experts, "[moe] experts"),
            _Fact("num_experts_per_tok", moe.topk, "[moe] topk"),
            _Fact("moe_intermediate_size", moe.intermediate_size, "[moe] intermediate_size"),
            _Fact("n_shared_experts", moe.shared_experts, "[moe] shared_experts"),
            _Fact("n_group", moe.groups, "[moe] groups"),
            _Fact("topk_group", moe.topk_groups, "[moe] topk_groups"),
            _Fact("norm_topk_prob", moe.normalize_topk, "[moe] normalize_topk"),
            _Fact("routed_scaling_factor", moe.route_scale, "[moe] route_scale"),
            _Fact("scoring_func", moe.score, "[moe] score"),
            _Fact("topk_method", _topk_method(config), "[moe] groups"),
        ]
    return facts + _rope_facts(config)


def _rope_facts(config: Config) -> list[_Fact]:
    a = config.model.attention
    yarn, at = a.yarn, "[model.attention.yarn] "
    if yarn.factor <= 1:
        return [_Fact("rope_parameters.rope_type", "default", at + "factor")]
    _, attention_factor = rope_frequencies(a.qk_rope_head_dim, a.rope_theta, asdict(yarn))
    return [
        _Fact("rope_parameters.rope_type", "yarn", at + "factor"),
        _Fact("rope_parameters.factor", yarn.factor, at + "factor"),
        _Fact(
            "rope_parameters.original_max_position_embeddings", yarn.original_seq_len, at + "original_seq_len"
        ),
        _Fact("rope_parameters.beta_fast", yarn.beta_fast, at + "beta_fast"),
        _Fact("rope_parameters.beta_slow", yarn.beta_slow, at + "beta_slow"),
        _Fact("rope_parameters.mscale_all_dim", yarn.mscale_all_dim, at + "mscale_all_dim"),
        _Fact("rope_parameters.attention_factor", attention_factor, at + "mscale"),
    ]


def _version(config: Config) -> str:
    return "v2" if config.moe and config.moe.score == "softmax" else "v3"


def _topk_method(config: Config) -> str:
    assert config.moe is not None
    if _version(config) == "v3":
        return "noaux_tc"
    return "group_limited_greedy" if config.moe.groups > 1 else "greedy"


# What is not a choice in nmoe.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleave": True,
    "moe_layer_freq": 1,
}


def _config_json(config: Config, dtype: torch.dtype, eos: int | None) -> dict[str, Any]:
    yarn = config.model.attention.yarn
    context = int(yarn.factor * yarn.original_seq_len) if yarn.factor > 1 else config.train.seq_len
    result: dict[str, Any] = {
        "architectures": [f"Deepseek{_version(config).upper()}ForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": context,
        "num_nextn_predict_layers": config.model.mtp_depth,
        "initializer_range": config.model.init_std,
        "bos_token_id": None,
        "eos_token_id": eos,
        **_FIXED,
        "rope_parameters": {"mscale": yarn.mscale} if yarn.factor > 1 else {},
    }
    for fact in _facts(config):
        table, _, key = fact.key.rpartition(".")
        (result[table] if table else result)[key] = fact.value
    return result


def _found_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json under the keys of `_facts`: tables dotted, older spellings and what absence means resolved."""
    rope = dict(found.get("rope_parameters") or found.get("rope_scaling") or {})
    rope.setdefault("rope_theta", found.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 0.0, "factor": 1.0} | rope
        if rope.get("attention_factor") is None:
            factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope["mscale_all_dim"]
            both = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else None
            rope["attention_factor"] = both or yarn_mscale(factor, 1.0)
    v3 = found.get("model_type") == "deepseek_v3"
    absent = {
        "tie_word_embeddings": False,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid" if v3 else "softmax",
        "topk_method": "noaux_tc" if v3 else "greedy",
    }
    stated = {key: value for key, value in found.items() if value is not None}
    return {**_FIXED, **absent, **stated, **{f"rope_parameters.{key}": value for key, value in rope.items()}}


def _require_same_model(config: Config, path: Path) -> None:
    """Raises CheckpointError naming every key in which config.json differs from the TOML."""
    try:
        found = _found_values(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, expected a HuggingFace checkpoint's folder") from None
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    if found.get("quantization_config"):
        raise CheckpointError(
            f"{path}: found quantization_config, expected plain weights; convert the checkpoint to bf16 first"
        )
    problems = [
        f"{fact.key} = {json.dumps(found.get(fact.key))}, {fact.toml} gives {json.dumps(fact.value)}"
        for fact in _facts(config)
        if not _same(found.get(fact.key), fact.value)
    ]
    problems += [
        f"{key} = {json.dumps(found[key])}, nmoe has {json.dumps(value)} only"
        for key, value in _FIXED.items()
        if found[key] != value
    ]
    if problems:
        raise CheckpointError(f"{path} is another model than the config's: {'; '.join(problems)}")


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-9)
    return found == expected


def _require_expressible(config: Config) -> None:
    """Raises UserError naming every key whose value transformers' DeepSeek models do not compute."""
    model, moe, every = config.model, config.moe, layers(config)
    kinds = [layer.ffn for layer in every]
    widths = sorted({layer.intermediate_size for layer in every if layer.ffn == "dense"})
    v2 = _version(config) == "v2"
    softmax = 'with [moe] score = "softmax"'
    rules: list[tuple[Any, str]] = [
        (
            any(layer.window for layer in every),
            '[[model.layers]] attention = "local": no attention window there; only "global" can be exchanged',
        ),
        (
            kinds != sorted(kinds),  # "dense" < "moe"
            '[[model.layers]] ffn = "dense" after "moe": dense layers come first there',
        ),
        (
            len(widths) > 1,
            f"[[model.layers]] intermediate_size = {widths}: dense layers have one width there",
        ),
        (
            model.mtp_depth and kinds[-1] == "dense",
            "[model] mtp_depth = 1 without [moe]: the module is a MoE layer there",
        ),
        (v2 and model.mtp_depth, f"[model] mtp_depth = 1 {softmax}: DeepSeek-V2 has no such module"),
        (
            v2 and moe and moe.bias_rate,
            f"[moe] bias_rate {softmax}: DeepSeek-V2 has no router bias; train with 0",
        ),
        (
            v2 and moe and moe.normalize_topk,
            f"[moe] normalize_topk = true {softmax}: DeepSeek-V2 has false only",
        ),
        (
            v2 and model.hidden_size % model.attention.heads,
            f"[model.attention] heads = {model.attention.heads} {softmax}: DeepSeek-V2 needs a divisor of "
            f"[model] hidden_size = {model.hidden_size}",
        ),
    ]
    if broken := [text for found, text in rules if found]:
        raise UserError(f"transformers' DeepSeek models cannot compute this model: {'; '.join(broken)}")


# ---- tensors ----------------------------------------------------------------------------------------


def _shapes(config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of the whole model's parameters and router biases, by nmoe's names."""
    graph = build(replace(config, rdep=Rdep()))
    params = {t.name: tuple(int(d) for d in t.shape) for t in graph.of_kind("param")}
    biases = {
        t.name: tuple(int(d) for d in t.shape)
        for t in graph.of_kind("state")
        if t.name.endswith(".router_bias")
    }
    return params, biases


def _implied(config: Config, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors that nmoe does not hold, with the only value that they can have: the multi-token prediction
    module's own copies of the embedding and the head, the bias of a router without one, absent shared experts."""
    model, moe, depth = config.model, config.moe, len(layers(config))
    result: dict[str, Tensor] = {}
    sparse = [layer.index for layer in layers(config) if layer.ffn == "moe"]
    if model.mtp_depth:
        result[f"model.layers.{depth}.embed_tokens.weight"] = params["embed"]
        result[f"model.layers.{depth}.shared_head.head.weight"] = params[
            "embed" if model.tie_embeddings else "head"
        ]
        sparse.append(depth)
    for index in sparse:
        assert moe is not None
        path = f"layers.{index}.moe"
        absent = {}
        if not moe.bias_rate and _version(config) == "v3":
            absent[f"{path}.router_bias"] = torch.zeros(moe.experts)
        if not moe.shared_experts:
            absent[f"{path}.shared.gate_up"] = params["embed"].new_empty(0, model.hidden_size)
            absent[f"{path}.shared.down"] = params["embed"].new_empty(model.hidden_size, 0)
        result |= {hf: view for name, tensor in absent.items() for hf, view in pieces(name, tensor, depth)}
    return result


def export(
    config: Config,
    params: Mapping[str, Tensor],
    router_bias: Mapping[str, Tensor],
    folder: Path,
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the model to `folder` as `transformers` loads it, atomically.

    `params` and `router_bias` are the whole model's (all experts), by nmoe's names and in its shapes; tensors are
    written in the dtype that they have, one of FP32, BF16 and FP16, and that of the embedding is what `transformers`
    computes in. `tokenizer`: a tokenizer.json to go with them. Raises UserError when `transformers` cannot compute
    the model or when `folder` holds anything, CheckpointError when tensors do not fit the config, DataError when the
    tokenizer cannot be used.
    """
    _require_expressible(config)
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name a new folder")
    eos = load_tokenizer(f"hf:{tokenizer}", "").eos if tokenizer else None
    given = {**params, **router_bias}
    wanted, biases = _shapes(config)
    wanted |= biases
    found = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in given.items()}
    if problems := _differences(wanted, found, ("float32", "bfloat16", "float16")):
        raise CheckpointError(f"the tensors do not fit the config: {_list(problems)}")
    depth = len(layers(config))
    tensors = dict(piece for name in wanted for piece in pieces(name, given[name].detach(), depth))
    tensors |= {name: tensor.detach().clone() for name, tensor in _implied(config, params).items()}
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write_weights(temporary, tensors)
        _write_json(temporary / "config.json", _config_json(config, params["embed"].dtype, eos))
        if tokenizer:
            _write_tokenizer(temporary, tokenizer)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(folder)  # replaces an empty folder, fails on any other
        sync(folder.parent)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder} cannot be written: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(config: Config, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole model's parameters and router biases from a HuggingFace checkpoint, in FP32.

    Raises UserError when the config is not one that `transformers` computes, CheckpointError naming every key of
    config.json and every tensor that does not fit it.
    """
    _require_expressible(config)
    folder, depth = Path(folder), len(layers(config))
    _require_same_model(config, folder / "config.json")
    params, biases = ({n: torch.empty(shape) for n, shape in shapes.items()} for shapes in _shapes(config))
    targets = dict(p for name, tensor in {**params, **biases}.items() for p in pieces(name, tensor, depth))
    with ExitStack() as stack:
        source: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"{path} cannot be read: {e}") from e
            source |= dict.fromkeys(file.keys(), file)
        found = {name: _header(file, name) for name, file in source.items()}
        module = f"model.layers.{depth}."
        if not config.model.mtp_depth and any(name.startswith(module) for name in found):
            raise CheckpointError(
                f"{folder} has a multi-token prediction module, {module}*: set [model] mtp_depth = 1"
            )
        implied = _implied(config, params)
        wanted = {n: tuple(t.shape) for n, t in (implied | targets).items() if n in targets or n in found}
        problems = _differences(wanted, found, ("F32", "BF16", "F16"))
        if not problems:
            for name, view in targets.items():
                view.copy_(source[name].get_tensor(name))
            problems = [
                f"{name} has values of its own, which the config has no place for"
                for name, value in implied.items()
                if name in found and not torch.equal(source[name].get_tensor(name).float(), value)
            ]
    if problems:
        raise CheckpointError(f"{folder} does not fit the config: {_list(problems)}")
    return params, biases


def _header(file: Any, name: str) -> tuple[tuple[int, ...], str]:
    entry = file.get_slice(name)
    return tuple(entry.get_shape()), entry.get_dtype()


def _differences(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[tuple[int, ...], str]],
    dtypes: Iterable[str],
) -> list[str]:
    problems = [f"unexpected {name}" for name in found if name not in wanted]
    for name, expected in wanted.items():
        if name not in found:
            problems.append(f"missing {name}")
            continue
        shape, dtype = found[name]
        if shape != expected:
            problems.append(f"{name} is {list(shape)}, expected {list(expected)}")
        if dtype not in dtypes:
            problems.append(f"{name} is {dtype}, expected {', '.join(dtypes)}")
    return problems


def _list(problems: list[str]) -> str:
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "; ".join(problems[:_LISTED] + more)


# ---- files ------------------------------------------------------------------------------------------


def _write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _files(folder: Path) -> Iterable[Path]:
    """The safetensors files of a checkpoint."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index} cannot be read: {type(e).__name__}: {e}") from e


def _write_tokenizer(folder: Path, source: Path) -> None:
    """tokenizer.json with the tokenizer_config.json beside it, or one that names what nmoe ends documents with."""
    shutil.copyfile(source, folder / "tokenizer.json")
    beside = source.with_name("tokenizer_config.json")
    if beside.is_file():
        shutil.copyfile(beside, folder / beside.name)
    else:
        _write_json(folder / beside.name, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
