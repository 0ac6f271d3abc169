"""The IR and its rules: whatever a pass could break is caught, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from harness import POISONS, close, poisoned_executor, poisoned_run, randn, run_op
from tiny import tiny_config

from nmoe import model
from nmoe.differentiate import differentiate
from nmoe.executor import allocate
from nmoe.graph import Graph, GraphError, Spec, check
from nmoe.ops import OPS
from nmoe.schedule import passes, place

CONFIG = tiny_config(schedule={"precision": "nvfp4"}, model={"mtp_depth": 1, "tie_embeddings": True})


def training_graph() -> Graph:
    return passes.quantize_operands(passes.merge_loss(differentiate(model.build(CONFIG))))


@pytest.fixture(scope="module")
def whole() -> Graph:
    graph = training_graph()
    check(graph)
    return graph


def change(graph: Graph, name: str, **fields) -> None:
    (at,) = [i for i, op in enumerate(graph.ops) if op.name == name]
    graph.ops[at] = replace(graph.ops[at], **fields)


def find(graph: Graph, name: str):
    return next(op for op in graph.ops if op.name == name)


def retype(graph: Graph, name: str, **fields) -> None:
    tensor = graph.tensors[name]
    graph.tensors[name] = replace(tensor, spec=replace(tensor.spec, **fields))


def rekind(graph: Graph, name: str, kind) -> None:
    graph.tensors[name] = replace(graph.tensors[name], kind=kind)


def late(g: Graph) -> None:
    at = g.ops.index(find(g, "layers.1.ffn_norm.apply"))
    g.ops.append(g.ops.pop(at))


def swap_operands(g: Graph) -> None:
    op = find(g, "layers.0.attn_norm.apply")
    change(g, op.name, inputs=op.inputs[::-1])


def wrong_axis(g: Graph) -> None:
    op = find(g, "layers.0.attn.o.gemm.wgrad")
    rows = next(n for n in g.tensors if n.startswith("layers.0.attn.core.o.nvfp4.row"))
    change(g, op.name, inputs=(op.inputs[0], rows))


def phase(g: Graph) -> None:
    change(g, "layers.0.attn.core", phase="step")


def stage(g: Graph) -> None:
    op = find(g, "layers.0.ffn_norm.apply.bwd")
    change(g, op.name, stage="forward")


def unquantize(g: Graph) -> None:
    name = next(o.outputs[0] for o in g.ops if o.kind == "quantize" and o.name.startswith("layers.0.attn.o."))
    g.tensors[name] = replace(g.tensors[name], spec=Spec(g.tensors[name].shape, "bf16"))


CORRUPTIONS: dict[str, tuple[Callable[[Graph], object], str]] = {
    "two ops of one name": (
        lambda g: g.ops.append(find(g, "layers.0.attn.core")), r"two ops are named layers\.0\.attn\.core"),
    "unknown kind": (
        lambda g: change(g, "layers.0.attn.core", kind="flash"), r"op layers\.0\.attn\.core: unknown kind flash"),
    "read before written": (
        late, r"op layers\.1\.\S+ reads layers\.1\.ffn_norm\.apply\.\S+ before any op writes it"),
    "reads what no op writes": (
        lambda g: change(g, "layers.0.residual.0", inputs=("nothing", "layers.0.ffn.down.gemm.y")),
        r"op layers\.0\.residual\.0 reads nothing before any op writes it"),
    "writes what is not declared": (
        lambda g: change(g, "layers.0.residual.0", outputs=("nowhere",)),
        r"op layers\.0\.residual\.0 writes y to nowhere, which is not declared"),
    "wrong shape": (
        lambda g: retype(g, "layers.0.residual.0.y", shape=("T", 65)),
        r"op layers\.0\.residual\.0: layers\.0\.residual\.0\.y is .*65.*, its rule gives .*64"),
    "wrong format": (
        lambda g: retype(g, "layers.0.residual.0.y", format="f32"),
        r"op layers\.0\.residual\.0: layers\.0\.residual\.0\.y is .*f32.*, its rule gives .*bf16"),
    "gradient in a lower format": (
        lambda g: retype(g, "final_norm.grad", format="bf16"),
        r"op final_norm\.apply\.bwd: final_norm\.grad is .*bf16.*, its rule gives .*f32"),
    "written twice": (
        lambda g: change(g, "layers.1.residual.0", outputs=("layers.0.residual.0.y",)),
        r"layers\.0\.residual\.0\.y is written by layers\.0\.residual\.0 and by layers\.1\.residual\.0"),
    "writes a parameter": (
        lambda g: rekind(g, "layers.0.residual.0.y", "param"),
        r"op layers\.0\.residual\.0 writes layers\.0\.residual\.0\.y, whose kind is param"),
    "accumulates into an activation": (
        lambda g: rekind(g, "final_norm.grad", "activation"),
        r"op final_norm\.apply\.bwd accumulates into final_norm\.grad, whose kind is activation"),
    "an output less": (
        lambda g: change(g, "layers.0.attn.core", outputs=("layers.0.attn.core.o",)),
        r"op layers\.0\.attn\.core writes \('layers\.0\.attn\.core\.o',\) where attention gives o, lse"),
    "an output that is absent": (
        lambda g: change(g, "layers.0.attn.core", outputs=("layers.0.attn.core.o", None)),
        r"op layers\.0\.attn\.core writes .*None.* where attention gives o, lse"),
    "an operand less": (
        lambda g: change(g, "layers.0.residual.0", inputs=("embed.apply.x",)),
        r"op layers\.0\.residual\.0: add cannot take embed\.apply\.x:"),
    "an operand of another shape": (
        lambda g: change(g, "layers.0.residual.0", inputs=("embed.apply.x", "layers.0.attn.kv_b.gemm.y")),
        r"op layers\.0\.residual\.0: add cannot take embed\.apply\.x, layers\.0\.attn\.kv_b\.gemm\.y: add needs two"),
    "operands in the wrong order": (
        swap_operands, r"op layers\.0\.attn_norm\.apply: layers\.0\.attn_norm\.apply\.y is "),
    "quantized along the other axis": (
        wrong_axis, r"op layers\.0\.attn\.o\.gemm\.wgrad: gemm cannot take .*: wgrad contracts axis 0, but an operand"),
    "not quantized": (unquantize, r"op layers\.0\.attn\.o\.\S+: layers\.0\.attn\.o\.\S+ is .*bf16.*, its rule gives"),
    "phases out of order": (
        phase, r"op layers\.0\.attn\.core reads \S+, which layers\.0\.\S+ writes in a later phase or stage"),
    "stages out of order": (
        stage, r"op layers\.0\.ffn_norm\.apply\.bwd reads \S+, which \S+ writes in a later phase or stage"),
    "an output that no op writes": (
        lambda g: g.add("logits", ("T", 96), "bf16", "output"), r"no op writes the output logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corrupted_graph(case, whole):
    corrupt, message = CORRUPTIONS[case]
    graph = whole.copy()
    corrupt(graph)
    with pytest.raises(GraphError, match=message):
        check(graph)


def test_names_are_unique_from_the_start():
    graph = Graph()
    graph.add("x", (2, 2), "f32", "input")
    with pytest.raises(GraphError, match="tensor x is declared twice"):
        graph.add("x", (3,), "f32", "input")
    graph.emit("add", "sum", ["x", "x"])
    with pytest.raises(GraphError, match=r"op sum writes sum\.y, which exists"):
        graph.emit("add", "sum", ["x", "x"])


def test_passes_leave_their_argument_alone():
    graph = differentiate(model.build(CONFIG))
    before = list(graph.ops), dict(graph.tensors)
    merged = passes.merge_loss(graph)
    passes.recompute(passes.quantize_operands(merged), "full")
    passes.drop_unused(graph)
    assert (graph.ops, graph.tensors) == before


def test_every_parameter_gets_a_gradient_and_every_op_has_rules(whole):
    grads = {t.name for t in whole.of_kind("grad")}
    assert grads == {f"{t.name}.grad" for t in whole.of_kind("param")}
    written = {out for op in whole.ops for out in op.outputs}
    assert grads <= written
    assert {op.kind for op in whole.ops} <= set(OPS)


def test_a_tensor_read_twice_gets_the_sum_of_its_gradients():
    # residual x + x: both operands of one add are one tensor
    x, dy = randn(0, 3, 2), randn(1, 3, 2)
    close(run_op("add", [x, x], cotangents={"y": dy}).grads[0], dy)
    graph = Graph()
    graph.add("p", (3, 2), "f64", "param")
    (x_name,) = graph.emit("test.source", "x", ["p"])
    (y,) = graph.emit("add", "double", [x_name, x_name])
    (z,) = graph.emit("add", "triple", [y, x_name])
    graph.add("c", (3, 2), "f64", "input")
    graph.add("loss.z", (3, 2), "f64", "output")
    graph.emit("test.probe", "probe", [z, "c"], into={"seen": "loss.z"})
    graph = passes.drop_unused(differentiate(graph))
    check(graph)
    schedule = place(graph, "cpu", {})
    for poison in POISONS:
        tensors = allocate(schedule)
        tensors["p"].copy_(x)
        tensors["c"].copy_(dy)
        executor = poisoned_executor(schedule, tensors, poison)
        poisoned_run(executor, "micro", poison)
        close(executor.operand("loss.z"), 3 * x)
        close(tensors["p.grad"], 3 * dy)
