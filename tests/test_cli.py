"""Every command through `main`, as a user calls it: what it prints, what it exits with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nmoe.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"

TINY = """
[run]
name = "tiny"
[target]
device = "cpu"
[model]
vocab_size = 288
hidden_size = 32
[model.attention]
heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 16
[[model.layers]]
ffn = "moe"
repeat = 2
[moe]
experts = 4
topk = 2
intermediate_size = 16
[optim]
lr = 1e-2
[schedule]
precision = "fp32"
[train]
steps = 3
batch_size = 2
seq_len = 32
[data]
dir = "{folder}/data"
tokenizer = "bpe:288"
[[data.sources]]
name = "words"
files = ["{folder}/*.txt"]
[checkpoint]
dir = "{folder}/checkpoints"
[metrics]
dir = "{folder}/metrics"
experiments = "{folder}/experiments.db"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli")
    words = "one token goes to two experts and comes back as one row of the next layer"
    for number in range(20):
        (folder / f"{number}.txt").write_text((words[number % 7 :] + " ") * 12)
    path = folder / "tiny.toml"
    path.write_text(TINY.replace("{folder}", str(folder)))
    return str(path)


def test_prepare_train_export(config, capfd, tmp_path):
    assert main(["train", config]) == 2
    assert "prep-mixture" in capfd.readouterr().err, "the remedy for missing shards"
    assert main(["prep-mixture", config, "--workers", "1"]) == 0
    assert "words" in capfd.readouterr().err
    assert main(["train", config]) == 0
    assert "step 3/3 (100%)" in capfd.readouterr().out
    assert main(["train", config]) == 2
    assert "--resume" in capfd.readouterr().err
    assert main(["train", config, "--resume"]) == 0
    assert "has done its 3 steps" in capfd.readouterr().out
    assert main(["export", config, str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_bench_compares_with_its_own_baseline(config, capfd, tmp_path):
    baseline = str(tmp_path / "baseline.json")
    assert main(["bench", config, "--steps", "2", "--save", baseline]) == 0
    assert "forward_backward" in capfd.readouterr().out
    assert main(["bench", config, "--steps", "2", "--baseline", baseline]) == 0
    assert "optimizer" in capfd.readouterr().out
    assert main(["bench", str(CONFIGS / "quickstart.toml"), "--steps", "1", "--baseline", baseline]) == 2
    assert "baseline.json" in capfd.readouterr().err


def test_a_config_without_a_gpu(capfd):
    moonlet = str(CONFIGS / "moonlet.toml")
    assert main(["plan", moonlet]) == 0
    assert "memory of a rank" in capfd.readouterr().out
    assert main(["compile", moonlet, "--list"]) == 0
    assert "grouped_gemm" in capfd.readouterr().out
    assert main(["plan", str(CONFIGS / "dsv3.toml"), "--world", "8"]) == 2
    assert "[rdep] ranks" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["compile", "--list"], ["explain"]])
def test_what_only_describes_a_step_needs_no_torch(command):
    """Its import takes longer than all that these commands do; a warm `nmoe compile` is one of them."""
    code = (
        "import sys; from nmoe.cli import main; assert main(sys.argv[1:]) == 0; print('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, *command, str(CONFIGS / "moonlet.toml")]
    done = subprocess.run(arguments, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_off_target_is_an_error_that_says_what_to_do(config, capfd, monkeypatch):
    monkeypatch.setenv("NMOE_TARGET__DEVICE", "sm_90a")
    monkeypatch.setenv("NMOE_SCHEDULE__PRECISION", "bf16")
    monkeypatch.setenv("NMOE_RUN__NAME", "other")
    assert main(["train", config]) == 2
    error = capfd.readouterr().err
    assert "sm_90a" in error and "cpu" in error


def test_explain_and_doctor(config, capfd):
    assert main(["explain", config]) == 0
    assert "layers.1.moe.gemm1" in capfd.readouterr().out
    assert main(["doctor"]) == 0
    assert "target cpu" in capfd.readouterr().out


def test_interrupt_before_training(config, capfd, monkeypatch):
    import nmoe.plan

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nmoe.plan, "plan", interrupted)
    assert main(["plan", config]) == 130
    assert capfd.readouterr().err == "nmoe: interrupted\n"


def test_usage(capfd):
    for wrong in (
        [],
        ["trian"],
        ["train"],
        ["plan", "x.toml", "--world", "many"],
        ["compile", "x.toml", "--workers", "0"],
    ):
        with pytest.raises(SystemExit) as error:
            main(wrong)
        assert error.value.code == 2
    assert "invalid choice" in capfd.readouterr().err
    assert main(["train", "absent.toml"]) == 2
    assert "absent.toml" in capfd.readouterr().err
