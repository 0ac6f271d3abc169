"""HuggingFace checkpoints: transformers computes what nmoe computes, gradients included; both ways, or a clear no."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peer import (
    BATCH,
    HIDDEN,
    VOCAB,
    compare,
    load_peer,
    make_config,
    nmoe_logits,
    published,
    random_config,
    random_tokens,
    random_weights,
    relative_error,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nmoe import hf
from nmoe.config import Config, LayerGroup, Moe, Yarn
from nmoe.config import load as load_config
from nmoe.data.tokenizer import EOS, train_bpe
from nmoe.data.tokenizer import load as load_tokenizer
from nmoe.errors import CheckpointError, DataError, UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors is a no-op"
)  # no shared experts

CONFIGS = Path(__file__).parents[1] / "configs"
SIGMOID = Moe(experts=4, topk=2, intermediate_size=12, shared_experts=1)
SOFTMAX = replace(SIGMOID, score="softmax", normalize_topk=False, bias_rate=0.0)


# ---- parity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "bound"), [("f32", 1e-5), ("f64", 1e-10)])
@pytest.mark.parametrize("seed", range(16))
def test_logits_loss_and_every_gradient_equal_transformers(
    seed: int, activation: str, bound: float, tmp_path: Path
) -> None:
    parity = compare(random_config(seed), tmp_path / "model", activation, seed)
    assert parity.logits < bound
    assert parity.loss < bound
    assert parity.gradient < bound, parity.worst


def test_the_random_configs_cover_what_a_model_can_be() -> None:
    configs = [random_config(seed) for seed in range(16)]
    seen = {
        (label, value)
        for config in configs
        for label, value in {
            "q_lora": config.model.attention.q_lora_rank > 0,
            "dense": sum(group.repeat for group in config.model.layers if group.ffn == "dense"),
            "score": config.moe.score,
            "shared": config.moe.shared_experts,
            "grouped": config.moe.groups > 1,
            "normalized": config.moe.normalize_topk,
            "scaled": config.moe.route_scale != 1,
            "yarn": config.model.attention.yarn.factor > 1,
            "tied": config.model.tie_embeddings,
            "mtp": config.model.mtp_depth,
            "eps": config.model.norm_eps,
        }.items()
    }
    either = ("q_lora", "grouped", "normalized", "scaled", "yarn", "tied", "mtp")
    assert seen == {
        *((label, value) for label in either for value in (False, True)),
        *(("dense", n) for n in range(3)),
        *(("shared", n) for n in range(3)),
        *(("score", score) for score in ("sigmoid", "softmax")),
        *(("eps", eps) for eps in (1e-6, 1e-5)),
    }


# ---- both ways --------------------------------------------------------------------------------------


def exported(config: Config, folder: Path, seed: int = 0) -> Path:
    hf.export(config, *random_weights(config, seed), folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        make_config(moe=SIGMOID, q_lora_rank=16, mtp_depth=1),
        make_config(
            moe=replace(SIGMOID, shared_experts=0, bias_rate=0.0), dense=0, tie_embeddings=True, mtp_depth=1
        ),
        make_config(moe=SOFTMAX, yarn=Yarn(factor=4.0, original_seq_len=16, mscale=0.7)),
        make_config(moe=None, sparse=0, dense=2),
    ],
    ids=["sigmoid", "bare", "softmax", "dense"],
)
def test_round_trip_is_bit_exact(config: Config, dtype: torch.dtype, tmp_path: Path) -> None:
    params, biases = random_weights(config)
    params = {name: value.to(dtype) for name, value in params.items()}
    hf.export(config, params, biases, tmp_path / "model")
    loaded = hf.load(config, tmp_path / "model")
    for given, back in zip((params, biases), loaded, strict=True):
        assert given.keys() == back.keys()
        for name, value in given.items():
            assert back[name].dtype == torch.float32
            assert torch.equal(back[name], value.float()), name
    assert load_peer(tmp_path / "model", "auto").dtype == dtype


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(moe=SIGMOID, mtp_depth=1)
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    folder = exported(config, tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    sizes = {}
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == path.name for name in tensors)
        sizes |= {name: tensor.nbytes for name, tensor in tensors.items()}
    assert sizes.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    params, _ = random_weights(config)
    loaded, _ = hf.load(config, folder)
    assert all(torch.equal(loaded[name], value) for name, value in params.items())
    load_peer(folder)


def test_loads_as_a_user_loads_it(tmp_path: Path) -> None:
    """No argument but the folder: transformers' own choice of attention and expert kernels, its tokenizer, generate."""
    config = make_config(moe=SIGMOID, vocab_size=300)
    params, biases = random_weights(config)
    text = "\n".join(Path(module.__file__).read_text() for module in (json, pytest))
    train_bpe([text], 300, tmp_path / "tokenizer.json")
    hf.export(config, params, biases, tmp_path / "model", tokenizer=tmp_path / "tokenizer.json")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = random_tokens(config)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, : config.train.seq_len]).logits
    assert relative_error(nmoe_logits(config, params, biases, tokens), logits) < 1e-5

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = load_tokenizer("hf:" + str(tmp_path / "tokenizer.json"), "")
    assert tokenizer("def main():").input_ids == ours.encode_batch(["def main():"])[0].tolist()
    assert tokenizer.eos_token_id == model.config.eos_token_id == ours.eos
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 7


def test_a_tokenizers_own_config_goes_with_it(tmp_path: Path) -> None:
    config = make_config(moe=SIGMOID, vocab_size=300)
    text = Path(json.__file__).read_text()
    train_bpe([text], 300, tmp_path / "tokenizer.json")
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "e"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    hf.export(config, *random_weights(config), tmp_path / "model", tokenizer=tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "model/tokenizer_config.json").read_text()) == own
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    found = json.loads((tmp_path / "model/config.json").read_text())
    assert (
        found["eos_token_id"] == tokenizer.convert_tokens_to_ids("e") != tokenizer.convert_tokens_to_ids(EOS)
    )


def peer_config(**changes: object) -> transformers.DeepseekV3Config:
    """What transformers calls the shape of `make_config(moe=SIGMOID, mtp_depth=0)`; written by hand."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 56, "moe_intermediate_size": 12,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    }  # fmt: skip
    return transformers.DeepseekV3Config(**(sizes | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_transformers_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    config = make_config(moe=SIGMOID)
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(peer_config(initializer_range=0.15)).to(dtype)
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path / "model")
    params, biases = hf.load(config, tmp_path / "model")
    tokens = random_tokens(config)
    with torch.no_grad():
        # loaded again, for `model` has rounded its rotary frequencies to `dtype` too
        logits = load_peer(tmp_path / "model")(input_ids=tokens[:, : config.train.seq_len]).logits
    assert logits.shape[0] == BATCH
    assert relative_error(nmoe_logits(config, params, biases, tokens), logits) < 1e-5


def test_the_spelling_of_deepseeks_own_config_json(tmp_path: Path) -> None:
    """rope_theta and rope_scaling at the top, no attention factor, keys that only DeepSeek's code reads."""
    yarn = Yarn(factor=40.0, original_seq_len=16, mscale=1.0, mscale_all_dim=1.0)
    config = make_config(moe=SIGMOID, yarn=yarn)
    folder = exported(config, tmp_path / "model")
    found = json.loads((folder / "config.json").read_text())
    rope = found.pop("rope_parameters")
    for key in ("rope_interleave", "mlp_bias", "tie_word_embeddings"):
        del found[key]
    found |= {
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
        },
        "ep_size": 1,
        "torch_dtype": found.pop("dtype"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(found))
    hf.load(config, folder)
    theirs = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert {key: rope[key] for key in theirs.keys() & rope.keys()} == {
        key: theirs[key] for key in theirs.keys() & rope.keys()
    }


def test_published_names_of_the_multi_token_prediction_module(tmp_path: Path) -> None:
    config = make_config(moe=SIGMOID, mtp_depth=1)
    params, biases = random_weights(config)
    hf.export(config, params, biases, tmp_path / "model")
    found = load_file(tmp_path / "model/model.safetensors")
    module = {
        name.removeprefix("model.layers.2."): t
        for name, t in found.items()
        if name.startswith("model.layers.2.")
    }
    assert torch.equal(module["eh_proj.weight"], params["mtp.0.project"])
    assert torch.equal(module["enorm.weight"], params["mtp.0.embed_norm"])
    assert torch.equal(module["hnorm.weight"], params["mtp.0.hidden_norm"])
    assert torch.equal(module["shared_head.norm.weight"], params["mtp.0.final_norm"])
    assert torch.equal(module["shared_head.head.weight"], params["head"])
    assert torch.equal(module["embed_tokens.weight"], params["embed"])
    assert torch.equal(module["mlp.gate.e_score_correction_bias"], biases["mtp.0.moe.router_bias"])
    assert torch.equal(module["mlp.experts.3.up_proj.weight"], params["mtp.0.moe.experts.gate_up"][3, 12:])


@pytest.mark.parametrize("name", ["dsv2", "dsv3", "moonlet", "moonlight"])
def test_shipped_shapes_are_those_of_the_model_that_transformers_makes(name: str, tmp_path: Path) -> None:
    """Names and shapes of every tensor, at full size, without a byte of weights."""
    config = load_config(CONFIGS / f"{name}.toml")
    (tmp_path / "config.json").write_text(json.dumps(hf._config_json(config, torch.bfloat16, None)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
        theirs = {
            n: tuple(t.shape)
            for key, value in model.state_dict().items()
            for n, t in published(key, value).items()
        }
        params, biases = hf._shapes(config)
        depth = model.config.num_hidden_layers
        ours = dict(
            piece
            for key, shape in (params | biases).items()
            for piece in hf.pieces(key, torch.empty(shape), depth)
        )
    module = f"model.layers.{depth}."
    assert {n: tuple(t.shape) for n, t in ours.items() if not n.startswith(module)} == theirs
    assert any(n.startswith(module) for n in ours) == (config.model.mtp_depth > 0)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(moe=SIGMOID)
    calls = []

    def fails_later(*args: object) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        save_file(*args)

    monkeypatch.setattr(hf, "save_file", fails_later)
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    with pytest.raises(UserError) as error:
        exported(config, tmp_path / "model")
    assert str(error.value) == f"{tmp_path}/model cannot be written: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    exported(make_config(moe=SIGMOID), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


# ---- bad input --------------------------------------------------------------------------------------

NO = "transformers' DeepSeek models cannot compute this model: "


def with_layers(*groups: LayerGroup, window: int = 0, **keys: object) -> Config:
    config = make_config(moe=SIGMOID, **keys)  # type: ignore[arg-type]
    attention = replace(config.model.attention, window=window)
    return replace(config, model=replace(config.model, layers=groups, attention=attention))


DENSE, SPARSE = LayerGroup("dense", intermediate_size=56), LayerGroup("moe")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            with_layers(DENSE, replace(SPARSE, attention=("local",)), window=4),
            '[[model.layers]] attention = "local": no attention window there; only "global" can be exchanged',
        ),
        (
            with_layers(SPARSE, DENSE),
            '[[model.layers]] ffn = "dense" after "moe": dense layers come first there',
        ),
        (
            with_layers(DENSE, replace(DENSE, intermediate_size=48), SPARSE),
            "[[model.layers]] intermediate_size = [48, 56]: dense layers have one width there",
        ),
        (
            make_config(moe=None, sparse=0, mtp_depth=1),
            "[model] mtp_depth = 1 without [moe]: the module is a MoE layer there",
        ),
        (
            make_config(moe=SOFTMAX, mtp_depth=1),
            '[model] mtp_depth = 1 with [moe] score = "softmax": DeepSeek-V2 has no such module',
        ),
        (
            make_config(moe=replace(SOFTMAX, bias_rate=0.001, normalize_topk=True)),
            '[moe] bias_rate with [moe] score = "softmax": DeepSeek-V2 has no router bias; train with 0; '
            '[moe] normalize_topk = true with [moe] score = "softmax": DeepSeek-V2 has false only',
        ),
        (
            make_config(moe=SOFTMAX, heads=3),
            '[model.attention] heads = 3 with [moe] score = "softmax": DeepSeek-V2 needs a divisor of '
            "[model] hidden_size = 40",
        ),
    ],
    ids=["window", "order", "widths", "mtp-dense", "mtp-softmax", "bias-softmax", "heads-softmax"],
)
def test_what_transformers_cannot_compute_is_refused(config: Config, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        hf.export(config, {}, {}, tmp_path / "model")
    assert str(error.value) == NO + message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError) as error:
        hf.load(config, tmp_path / "model")
    assert str(error.value) == NO + message


def test_a_folder_with_anything_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        exported(make_config(moe=SIGMOID), tmp_path)
    assert str(error.value) == f"{tmp_path} exists and is not empty; name a new folder"


def test_tensors_that_do_not_fit_the_config_are_not_written(tmp_path: Path) -> None:
    config = make_config(moe=SIGMOID)
    params, biases = random_weights(config)
    del params["head"]
    params["extra"] = torch.zeros(1)
    params["embed"] = params["embed"].double()
    params["layers.1.moe.experts.down"] = params["layers.1.moe.experts.down"][:2]
    with pytest.raises(CheckpointError) as error:
        hf.export(config, params, biases, tmp_path / "model")
    assert str(error.value) == (
        "the tensors do not fit the config: unexpected extra; embed is float64, expected float32, bfloat16, float16; "
        "layers.1.moe.experts.down is [2, 40, 12], expected [4, 40, 12]; missing head"
    )


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    config = make_config(moe=SIGMOID)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError) as error:
        hf.export(config, *random_weights(config), tmp_path / "model", tokenizer=path)
    assert str(error.value) == (
        f'[data] tokenizer = "hf:{path}": {path} is missing, expected a HuggingFace tokenizer.json'
    )
    assert list(tmp_path.iterdir()) == []


def edit_config(folder: Path, **changes: object) -> None:
    found = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        (found[table] if table else found)[name] = value
    (folder / "config.json").write_text(json.dumps(found))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.experts.2.gate_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
OTHER = "{path}/config.json is another model than the config's: "
UNFIT = "{path} does not fit the config: "
PLAIN = make_config(moe=SIGMOID)
YARN = make_config(moe=SIGMOID, yarn=Yarn(factor=4.0, original_seq_len=16, mscale_all_dim=0.5))
MTP = make_config(moe=SIGMOID, mtp_depth=1)
UNBIASED = make_config(moe=replace(SIGMOID, bias_rate=0.0))


@pytest.mark.parametrize(
    ("config", "damage", "message"),
    [
        (
            PLAIN,
            lambda folder: (folder / "config.json").unlink(),
            "{path}/config.json is missing, expected a HuggingFace checkpoint's folder",
        ),
        (
            PLAIN,
            lambda folder: (folder / "config.json").write_text("{"),
            "{path}/config.json cannot be read: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        (
            PLAIN,
            lambda folder: (folder / "config.json").write_text("[]"),
            "{path}/config.json cannot be read: 'list' object has no attribute 'get'",
        ),
        (
            PLAIN,
            lambda folder: edit_config(folder, hidden_size=64, q_lora_rank=16, n_routed_experts=None),
            OTHER + "hidden_size = 64, [model] hidden_size gives 40; "
            "q_lora_rank = 16, [model.attention] q_lora_rank gives null; "
            "n_routed_experts = null, [moe] experts gives 4",
        ),
        (
            PLAIN,
            lambda folder: edit_config(folder, model_type="deepseek_v2", scoring_func="softmax", topk_method=None),
            OTHER + 'model_type = "deepseek_v2", [moe] score gives "deepseek_v3"; '
            'scoring_func = "softmax", [moe] score gives "sigmoid"; '
            'topk_method = "greedy", [moe] groups gives "noaux_tc"',
        ),
        (
            PLAIN,
            lambda folder: edit_config(folder, rope_interleave=False, hidden_act="gelu"),
            OTHER + 'hidden_act = "gelu", nmoe has "silu" only; rope_interleave = false, nmoe has true only',
        ),
        (
            PLAIN,
            lambda folder: edit_config(folder, rope_parameters={"rope_type": "linear", "factor": 2.0}),
            OTHER + 'rope_parameters.rope_type = "linear", [model.attention.yarn] factor gives "default"',
        ),
        (
            YARN,
            lambda folder: edit_config(
                folder, rope_parameters__attention_factor=None, rope_parameters__factor=8.0, rms_norm_eps=1e-5
            ),
            OTHER + "rms_norm_eps = 1e-05, [model] norm_eps gives 1e-06; "
            "rope_parameters.factor = 8.0, [model.attention.yarn] factor gives 4.0; "
            "rope_parameters.attention_factor = 1.094179988101349, [model.attention.yarn] mscale gives "
            "1.0648216253695715",
        ),
        (
            PLAIN,
            lambda folder: edit_config(folder, quantization_config={"quant_method": "fp8"}),
            "{path}/config.json: found quantization_config, expected plain weights; convert the checkpoint to "
            "bf16 first",
        ),
        (
            PLAIN,
            lambda folder: (folder / "model.safetensors").unlink(),
            "{path} holds neither model.safetensors nor model.safetensors.index.json",
        ),
        (
            PLAIN,
            lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
            "{path}/model.safetensors.index.json cannot be read: UnicodeDecodeError: ",
        ),
        (
            PLAIN,
            lambda folder: truncate(folder / "model.safetensors"),
            "{path}/model.safetensors cannot be read: Error while deserializing header: incomplete metadata, "
            "file not fully covered",
        ),
        (
            PLAIN,
            lambda folder: edit_weights(
                folder,
                {
                    NORM: None,
                    "model.layers.7.foo": torch.zeros(1),
                    GATE: torch.zeros(12, 41),
                    BIAS: torch.zeros(4, dtype=torch.float64),
                },
            ),
            UNFIT + f"unexpected model.layers.7.foo; {GATE} is [12, 41], expected [12, 40]; missing {NORM}; "
            f"{BIAS} is F64, expected F32, BF16, F16",
        ),
        (
            PLAIN,
            lambda folder: edit_weights(folder, {f"x{i}": torch.zeros(1) for i in range(22)}),
            UNFIT + "".join(f"unexpected {name}; " for name in sorted(f"x{i}" for i in range(22))[:20]) + "and 2 more",
        ),
        (
            UNBIASED,
            lambda folder: edit_weights(folder, {BIAS: torch.tensor([0.0, 0.0, 1.0, 0.0])}),
            UNFIT + f"{BIAS} has values of its own, which the config has no place for",
        ),
        (
            MTP,
            lambda folder: edit_weights(folder, {"model.layers.2.shared_head.head.weight": torch.ones(VOCAB, HIDDEN)}),
            UNFIT + "model.layers.2.shared_head.head.weight has values of its own, which the config has no place for",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(
    config: Config, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = exported(config, tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        hf.load(config, folder)
    expected = message.replace("{path}", str(folder))
    if expected.endswith(": "):  # what follows is Python's
        assert str(error.value).startswith(expected)
    else:
        assert str(error.value) == expected


def test_a_module_that_the_config_lacks_is_named_once(tmp_path: Path) -> None:
    folder = exported(MTP, tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        hf.load(PLAIN, folder)
    assert str(error.value) == (
        f"{folder} has a multi-token prediction module, model.layers.2.*: set [model] mtp_depth = 1"
    )


def test_a_missing_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    folder = exported(PLAIN, tmp_path / "model")
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError) as error:
        hf.load(PLAIN, folder)
    assert str(error.value) == f"{path} cannot be read: No such file or directory: {path}"


def test_tensors_that_nmoe_does_not_need_may_be_absent(tmp_path: Path) -> None:
    """The module's copies of the embedding and head, and a bias that is zero anyway."""
    config = replace(MTP, moe=UNBIASED.moe)
    folder = exported(config, tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert not file.get_tensor(BIAS).any()
    implied = {
        BIAS,
        BIAS.replace("1", "2"),
        *(f"model.layers.2.{n}.weight" for n in ("embed_tokens", "shared_head.head")),
    }
    assert implied <= names
    edit_weights(folder, dict.fromkeys(implied))
    params, biases = hf.load(config, folder)
    assert biases == {}
    assert torch.equal(params["head"], random_weights(config)[0]["head"])
