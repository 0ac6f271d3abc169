"""What a user sees for every kind of mistake in a config: tests/bad_input/config.txt, to the letter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.config import Config, load
from nmoe.errors import ConfigError
from nmoe.toml import keys

FOLDER = Path(__file__).parent / "bad_input"
BASE = (FOLDER / "base.toml").read_text()


class Row(NamedTuple):
    name: str
    toml: str
    env: dict[str, str]
    message: str


def _rows() -> list[Row]:
    rows = []
    for block in (FOLDER / "config.txt").read_text().split("\n\n")[1:]:
        marked: dict[str, list[str]] = {mark: [] for mark in "#-+$"}
        message: list[str] = []
        for line in block.splitlines():
            (marked[line[0]] if line[1:2] == " " and line[0] in marked else message).append(line)
        name, *_ = marked["#"]
        old, new = ("".join(f"{line[2:]}\n" for line in marked[mark]) for mark in "-+")
        assert f"\n{old}" in f"\n{BASE}", f"{name}: base.toml has no such lines"
        env = dict(line[2:].replace("\\n", "\n").split("=", 1) for line in marked["$"])
        toml = f"\n{BASE}".replace(f"\n{old}", f"\n{new}", 1)[1:]
        rows.append(Row(name[2:].replace(" ", "-"), toml, env, "\n".join(message)))
    return rows


ROWS = _rows()


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message_of(path: str, env: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, env)
    return str(error.value)


def test_base_is_sound() -> None:
    load(FOLDER / "base.toml", {})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_message(row: Row) -> None:
    Path("c.toml").write_text(row.toml)
    assert message_of("c.toml", row.env) == row.message


EDGES = {
    "every expert chosen": {"MOE__TOPK": "8"},
    "the best of all groups": {"MOE__TOPK": "8", "MOE__GROUPS": "4", "MOE__TOPK_GROUPS": "4"},
    "one expert": {"MOE__EXPERTS": "1", "MOE__TOPK": "1", "MOE__NORMALIZE_TOPK": "false"},
    "groups of one by softmax": {"MOE__GROUPS": "8", "MOE__TOPK_GROUPS": "2", "MOE__SCORE": "softmax"},
    "one expert a rank": {"RDEP__RANKS": "8"},
    "capacity of the balanced load": {"RDEP__CAPACITY": "128", "TRAIN__MICRO_BATCH_SIZE": "2"},
    "every layer in bf16": {"SCHEDULE__BF16_FIRST_LAYERS": "1", "SCHEDULE__BF16_LAST_LAYERS": "2"},
    "all tokens in bf16": {"SCHEDULE__BF16_LAST_TOKENS": "1280"},
    "warm-up, then decay": {"OPTIM__WARMUP_TOKENS": "640", "OPTIM__DECAY_TOKENS": "640"},
    "as long as yarn allows": {
        "MODEL__ATTENTION__YARN__FACTOR": "2",
        "MODEL__ATTENTION__YARN__ORIGINAL_SEQ_LEN": "16",
    },
    "yarn turned off": {
        "MODEL__ATTENTION__YARN__ORIGINAL_SEQ_LEN": "16",
        "MODEL__ATTENTION__YARN__BETA_FAST": "1",
        "MODEL__ATTENTION__YARN__BETA_SLOW": "32",
    },
}


@pytest.mark.parametrize("overrides", EDGES.values(), ids=EDGES)
def test_edge_is_accepted(overrides: dict[str, str]) -> None:
    load(FOLDER / "base.toml", {f"NMOE_{key}": value for key, value in overrides.items()})


def test_rows_differ() -> None:
    assert len(ROWS) >= 100
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({(row.toml, str(row.env)) for row in ROWS}) == len(ROWS)


def test_files_that_cannot_be_read() -> None:
    Path("latin.toml").write_bytes("[run]\nname = 'é'\n".encode("latin-1"))
    Path("folder.toml").mkdir()
    assert message_of("absent.toml", {}) == (
        "absent.toml: cannot be read: No such file or directory; name a TOML file"
    )
    assert message_of("folder.toml", {}) == "folder.toml: cannot be read: Is a directory; name a TOML file"
    assert message_of("latin.toml", {}) == "latin.toml: not UTF-8 at byte 14; save it as UTF-8 text"


def test_empty_file_asks_for_every_section() -> None:
    Path("c.toml").write_text("")
    sections = [line.split(": ")[1] for line in message_of("c.toml", {}).splitlines()]
    assert sections == ["[run]", "[model]", "[optim]", "[train]", "[data]", "[checkpoint]", "[metrics]"]


LINES = BASE.splitlines()
VALUES = [
    "0",
    "1",
    "-1",
    "3",
    "7.5",
    "1e400",
    "true",
    '""',
    '"x"',
    '"~"',
    "[]",
    "[1]",
    "{}",
    "[{}]",
    "2026-01-01",
]
VARIABLES = ["NMOE_" + "__".join(map(str, key)).upper() for key in keys(Config)]


@given(
    st.dictionaries(
        st.sampled_from(range(len(LINES))), st.sampled_from(["drop", "twice", *VALUES]), max_size=5
    ),
    st.dictionaries(st.sampled_from(VARIABLES), st.sampled_from(VALUES), max_size=3),
)
def test_no_mistake_raises_anything_else(edits: dict[int, str], env: dict[str, str]) -> None:
    """Lines dropped, doubled or given other values, and any overrides: a Config or a ConfigError."""
    lines = list(LINES)
    for index, change in edits.items():
        name, equals, _ = lines[index].partition(" = ")
        given_value = f"{name} = {change}" if equals else lines[index]
        lines[index] = {"drop": "", "twice": f"{lines[index]}\n{lines[index]}"}.get(change, given_value)
    Path("fuzz.toml").write_text("\n".join(lines))
    with contextlib.suppress(ConfigError):
        load("fuzz.toml", env)
