"""Loading, overrides, layers, fingerprints, shipped configs, documentation, and a consumer for every key."""

from __future__ import annotations

import ast
import dataclasses
import json
import runpy
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmoe
from nmoe import schema
from nmoe.config import TRAJECTORY_FREE, Config, differences, fingerprint, layers, load
from nmoe.toml import Key, hints, keys, kind_at, positions

ROOT = Path(__file__).parents[1]
BASE = ROOT / "tests" / "bad_input" / "base.toml"
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))


# ---- reading ----------------------------------------------------------------------------------------


def test_overrides_are_typed_by_the_schema() -> None:
    config = load(
        BASE,
        {
            "NMOE_TRAIN__STEPS": "1_000",
            "NMOE_OPTIM__LR": "1e-4",
            "NMOE_OPTIM__LR_ROUTER": "2",
            "NMOE_OPTIM__BETAS": "[0.8, 0.9]",
            "NMOE_MOE__NORMALIZE_TOPK": "false",
            "NMOE_MODEL__MTP_DEPTH": "1",
            "NMOE_MODEL__ATTENTION__HEADS": "4",
            "NMOE_MODEL__ATTENTION__YARN__FACTOR": "2",
            "NMOE_MODEL__LAYERS": '[{ffn = "moe", repeat = 3}]',
            "NMOE_SCHEDULE__PRECISION": "fp32",
            "NMOE_RUN__NAME": "2",
            "NMOE_DATA__DIR": "a b",
        },
    )
    assert config.train.steps == 1000
    assert (config.optim.lr, config.optim.lr_router, config.optim.betas) == (1e-4, 2.0, (0.8, 0.9))
    assert isinstance(config.optim.lr_router, float)
    assert config.moe is not None
    assert config.moe.normalize_topk is False
    assert config.model.mtp_depth == 1
    assert (config.model.attention.heads, config.model.attention.yarn.factor) == (4, 2.0)
    assert [layer.ffn for layer in layers(config)] == ["moe"] * 3
    assert (config.schedule.precision, config.run.name, config.data.dir) == ("fp32", "2", "a b")


def test_variables() -> None:
    def data_dir(text: str, **env: str) -> str:
        return load(BASE, {"NMOE_DATA__DIR": text, **env}).data.dir

    assert data_dir("${NMOE_HOME}/x", NMOE_HOME="/h") == "/h/x"
    assert data_dir("${NMOE_HOME:-runs}/x") == data_dir("${NMOE_HOME:-runs}/x", NMOE_HOME="") == "runs/x"
    assert data_dir("${NMOE_A}${NMOE_B_2:-}-$5", NMOE_A="${NMOE_C}") == "${NMOE_C}-$5"  # expanded once
    assert data_dir("${NMOE_STDLIB}") == sysconfig.get_path("stdlib")
    assert data_dir("${NMOE_STDLIB}", NMOE_STDLIB="/other") == "/other"


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    text = BASE.read_text().replace('files = ["*.txt"]', 'files = "*.txt"')
    (tmp_path / "c.toml").write_text(text.replace("repeat = 2", 'repeat = 2\nattention = "global"'))
    config = load(tmp_path / "c.toml", {})
    assert config == load(BASE, {})
    assert load(BASE, {"NMOE_DATA__SOURCES": '[{name = "text", files = ["*.txt"]}]'}) == config


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + BASE.read_bytes().replace(b"\n", b"\r\n"))
    assert load(tmp_path / "c.toml", {}) == load(BASE, {})


def _toml(tables: dict[str, Any], name: str = "") -> Iterator[str]:
    """TOML text of `to_dict()`; absent keys, None there, are left out."""
    nested = {key: value for key, value in tables.items() if isinstance(value, dict)}
    arrays = {
        key: value
        for key, value in tables.items()
        if isinstance(value, list) and value[:1] and isinstance(value[0], dict)
    }
    for key, value in tables.items():
        if key not in nested and key not in arrays and value is not None:
            yield f"{key} = {json.dumps(value)}"
    for key, value in nested.items():
        yield f"[{name}{key}]"
        yield from _toml(value, f"{name}{key}.")
    for key, rows in arrays.items():
        for row in rows:
            yield f"[[{name}{key}]]"
            yield from _toml(row)


@pytest.mark.parametrize("path", [BASE, *SHIPPED], ids=lambda path: path.stem)
def test_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path, {})
    (tmp_path / "c.toml").write_text("\n".join(_toml(config.to_dict())))
    again = load(tmp_path / "c.toml", {})
    assert again == config
    assert fingerprint(again) == fingerprint(config)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


FILLERS = [
    "", "# [moe] a = 1", 'b{n} = """\n[x]\na = 1 # no\n"""', "c{n} = '''\n\"\"\"'''",
    "d{n} = [ # [\n 1,\n 2]",
    'e{n} = "a \\" # ["', "f{n} = {{ a = [1, 2], b = '}}' }}",
    'g{n} = """a\\"""" # "', '"h # = {n}" = 1', "i{n}.j = 2",
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(["key", "[table]", "[[array]]", "[array.sub]"]), st.sampled_from(FILLERS))
    )
)
def test_positions(items: list[tuple[str, str]]) -> None:
    """Keys are found between comments, strings and lists that span lines and look like TOML."""
    text, rows = "", 0
    expected: dict[Key, int] = {}
    table: Key = ()
    for n, (item, filler) in enumerate(items):
        text += filler.format(n=n) + "\n"
        line = text.count("\n") + 1
        if item == "[[array]]" or (item == "[array.sub]" and rows == 0):
            rows, table, head = rows + 1, ("array", rows), "[[array]]"
        elif item == "[array.sub]":
            table, head = ("array", rows - 1, f"sub{n}"), f"[array.sub{n}]"
        elif item == "[table]":
            table, head = (f"table{n}",), f"[table{n}]"
        else:
            head = ""
        if head:
            expected[table] = line
            text += head + "\n"
            line += 1
        expected[(*table, f"key{n}")] = line
        text += f"key{n} = {n}\n"
    found = positions(text)
    assert {key: found.get(key) for key in expected} == expected


# ---- layers -----------------------------------------------------------------------------------------


def test_layers() -> None:
    groups = (
        '[{ffn = "dense", intermediate_size = 64},'
        ' {ffn = "moe", repeat = 5, attention = ["local", "local", "global"]},'
        ' {ffn = "dense", intermediate_size = 96, precision = "bf16"},'
        ' {ffn = "moe"}]'
    )
    flat = layers(
        load(
            BASE,
            {
                "NMOE_MODEL__LAYERS": groups,
                "NMOE_MODEL__ATTENTION__WINDOW": "8",
                "NMOE_SCHEDULE__PRECISION": "nvfp4",
                "NMOE_SCHEDULE__WGRAD": "mxfp8",
                "NMOE_SCHEDULE__BF16_FIRST_LAYERS": "2",
                "NMOE_MODEL__ATTENTION__V_HEAD_DIM": "32",
                "NMOE_MODEL__ATTENTION__QK_NOPE_HEAD_DIM": "32",
            },
        )
    )
    assert [layer.index for layer in flat] == list(range(8))
    assert [layer.window for layer in flat] == [0, 8, 8, 0, 8, 8, 0, 0]
    assert [layer.attention for layer in flat] == ["local" if layer.window else "global" for layer in flat]
    assert [layer.ffn for layer in flat] == ["dense", *["moe"] * 5, "dense", "moe"]
    assert [layer.intermediate_size for layer in flat] == [64, *[32] * 5, 96, 32]
    bf16, low = ("bf16",) * 3, ("nvfp4", "nvfp4", "mxfp8")
    assert [tuple(layer.precision) for layer in flat] == [bf16, bf16, low, low, low, low, bf16, low]


# ---- identity ---------------------------------------------------------------------------------------


def _changed(config: Any, key: Key) -> Any:
    """`config` with another, not necessarily sensible, value at `key`."""
    if not key:
        if isinstance(config, bool):
            return not config
        if isinstance(config, int | float):
            return config + 1
        return (*config, "x") if isinstance(config, tuple) else f"{config}x"
    if isinstance(key[0], int):
        return (*config[: key[0]], _changed(config[key[0]], key[1:]), *config[key[0] + 1 :])
    return dataclasses.replace(config, **{key[0]: _changed(getattr(config, key[0]), key[1:])})


def _leaves() -> list[Key]:
    """Every key of the base config, those of the first row of an array of tables."""
    found = []
    for key in keys(Config):
        at = tuple(part for name in key for part in ((name, 0) if name in ("layers", "sources") else (name,)))
        kind = kind_at(Config, at)
        if not isinstance(at[-1], int) and not dataclasses.is_dataclass(kind) and key != ("moe",):
            found.append(at)
    return found


LEAVES = _leaves()


@pytest.mark.parametrize("key", LEAVES, ids=lambda key: ".".join(map(str, key)))
def test_fingerprint_covers_exactly_the_trajectory(key: Key) -> None:
    config = load(BASE, {})
    other = _changed(config, key)
    name = ".".join(map(str, key)).replace(".0", "[0]")
    free = name in TRAJECTORY_FREE or name == "train.steps"  # the base config has no decay
    assert (fingerprint(other) == fingerprint(config)) == free
    changes = differences(config.to_dict(), other)
    assert [change.split(":")[0] for change in changes] == ([] if free else [name])


def test_trajectory_free_keys_exist() -> None:
    assert set(TRAJECTORY_FREE) <= {".".join(map(str, key)) for key in LEAVES}


@pytest.mark.parametrize("key", ["NMOE_OPTIM__DECAY_TOKENS", "NMOE_SCHEDULE__BF16_LAST_TOKENS"])
def test_steps_matter_when_something_counts_from_the_end(key: str) -> None:
    short, long = load(BASE, {key: "128"}), load(BASE, {key: "128", "NMOE_TRAIN__STEPS": "20"})
    assert fingerprint(short) != fingerprint(long)
    assert differences(short.to_dict(), long) == ["train.steps: was 10, is 20"]
    without = load(BASE, {})
    name = key.removeprefix("NMOE_").replace("__", ".").lower()
    assert differences(without.to_dict(), long) == [f"{name}: was 0, is 128", "train.steps: was 10, is 20"]


def test_differences_of_shape_and_of_older_versions() -> None:
    config = load(BASE, {})
    grown = load(
        BASE, {"NMOE_MODEL__LAYERS": '[{ffn = "dense", intermediate_size = 128}, {ffn = "moe", repeat = 2}]'}
    )
    assert differences(config.to_dict(), grown) == []
    more = dataclasses.replace(config.model, layers=config.model.layers[:1])
    fewer = differences(config.to_dict(), dataclasses.replace(config, model=more))
    assert 'model.layers[1].ffn: was "moe", is absent' in fewer
    old = config.to_dict()
    old["optim"]["nesterov"] = True
    del old["optim"]["eps"]
    assert differences(old, config) == [
        "optim.eps: was absent, is 1e-08",
        "optim.nesterov: was true, is absent",
    ]


def test_fingerprint_is_stable() -> None:
    """A change here makes every existing checkpoint refuse to resume: make it on purpose only."""
    assert fingerprint(load(BASE, {})) == "ffd408c4f34cced6ee7c5e472bcc8ddb4044ff1f063ae0aeb06d2cd79390e677"


# ---- shipped configs --------------------------------------------------------------------------------


def _parameters(config: Config) -> tuple[float, float]:
    """Billions of parameters, and of those that serve one token, without norms and prediction modules."""
    model, attention, moe = config.model, config.model.attention, config.moe
    assert moe is not None
    hidden, heads = model.hidden_size, attention.heads
    query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank = attention.q_lora_rank
    mla = (
        ((hidden + query) * rank if rank else hidden * query)
        + hidden * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        + attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        + heads * attention.v_head_dim * hidden
    )
    total = active = 2 * model.vocab_size * hidden
    for layer in layers(config):
        ffn = 3 * hidden * layer.intermediate_size
        router = hidden * moe.experts
        total += mla + (ffn if layer.ffn == "dense" else router + ffn * (moe.experts + moe.shared_experts))
        active += mla + (ffn if layer.ffn == "dense" else router + ffn * (moe.topk + moe.shared_experts))
    return total / 1e9, active / 1e9


@pytest.mark.parametrize(
    ("name", "depth", "total", "active"),
    [("moonlet", 12, 7, 2), ("moonlight", 27, 16, 3), ("dsv2", 60, 236, 21), ("dsv3", 61, 671, 37)],
)
def test_shipped_shapes_have_the_published_size(name: str, depth: int, total: int, active: int) -> None:
    config = load(ROOT / "configs" / f"{name}.toml", {})
    assert config.target.device == "sm_100a"
    assert len(layers(config)) == depth
    assert _parameters(config) == pytest.approx((total, active), abs=0.6)


def test_quickstart_runs_anywhere(tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "quickstart.toml", {"NMOE_HOME": str(tmp_path)})
    assert config.target.device == "cpu"
    for path in (config.data.dir, config.checkpoint.dir, config.metrics.dir, config.metrics.experiments):
        assert Path(path).is_relative_to(tmp_path)
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert all(stdlib in Path(pattern).parents for source in config.data.sources for pattern in source.files)


# ---- documentation and consumers --------------------------------------------------------------------


def test_reference_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text() == page, "run `python docs/generate.py`"
    for key in TRAJECTORY_FREE:
        assert f"`{key}`" in page.partition("<!--")[0]


SECTIONS = {
    name: kind
    for name, kind in vars(schema).items()
    if isinstance(kind, type) and kind.__module__ == schema.__name__ and hasattr(kind, "__dataclass_fields__")
}
# Names under which a section is reached: `config.optim`, `model.attention`, `for source in data.sources`.
REACHED = {"layers": "LayerGroup", "sources": "Source"} | {
    field: str(getattr(kind, "__name__", "Moe"))
    for owner in ("Config", "Model", "Attention")
    for field, kind in hints(SECTIONS[owner]).items()
    if field not in ("layers", "sources")
}


class _Consumers(ast.NodeVisitor):
    """Collects `Section.key` where a module reads the key of something known to be that section."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.known: dict[str, str] = {}

    def section(self, node: ast.AST | None) -> str | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            return REACHED.get(node.attr) if REACHED.get(node.attr) in SECTIONS else None
        if isinstance(node, ast.Constant | ast.BinOp):  # annotations: "Data", Data | None
            return next((name for name in SECTIONS if name in ast.unparse(node).split()), None)
        return None

    def bind(self, target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for pair in zip(target.elts, value.elts, strict=False):
                self.bind(*pair)
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                self.bind(element, value)
        elif isinstance(target, ast.Name) and (section := self.section(value)):
            self.known[target.id] = section

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        name = node.annotation.id if isinstance(node.annotation, ast.Name) else self.section(node.annotation)
        if name in SECTIONS:
            self.known[node.arg] = name

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        inner = [node.iter, *(node.iter.args if isinstance(node.iter, ast.Call) else [])]
        for iterable in inner:  # also through zip, enumerate, sorted …
            self.bind(node.target, iterable)
        self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).split(".")[-1] in ("asdict", "vars"):
            section = self.section(node.args[0])
            self.found |= {f"{section}.{key}" for key in hints(SECTIONS[section])} if section else set()
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if section := self.section(node.value):
            self.found.add(f"{section}.{node.attr}")
        self.generic_visit(node)


def _consumed(text: str) -> set[str]:
    consumers, tree = _Consumers(), ast.parse(text)
    consumers.visit(tree)
    consumers.visit(tree)  # a comprehension reads its names before it binds them: look twice
    return consumers.found


def test_consumers_are_told_apart() -> None:
    assert _consumed("def f(a: Optim, b): a.lr, b.eps, b.optim.betas") == {"Optim.lr", "Optim.betas"}
    assert _consumed("x, y = c.model, 3\nx.norm_eps + y.init_std") == {"Model.norm_eps"}
    assert _consumed("[s.weight for s, d in zip(data.sources, dirs)]") >= {"Source.weight"}
    assert _consumed("asdict(a.yarn)") == {f"Yarn.{key}" for key in hints(schema.Yarn)}
    assert _consumed("optim.lr = 3; dir(path.keep)") == set()


def test_every_key_has_a_consumer() -> None:
    modules = [
        path for path in Path(nmoe.__file__).parent.rglob("*.py") if path.name not in ("rules.py", "toml.py")
    ]
    found = set().union(*(_consumed(path.read_text()) for path in modules))
    keys_of = {name: hints(kind) for name, kind in SECTIONS.items() if name not in ("Config", "Layer")}
    assert [
        f"{name}.{key}" for name, names in keys_of.items() for key in names if f"{name}.{key}" not in found
    ] == []
