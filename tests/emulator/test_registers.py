"""setmaxnreg: warps take what others of their block gave back, and wait for it."""

import pytest
from snippets import HEAD, Device, Options

from nmoe.codegen.emulator import EmulationError, ptx

# Twelve warps start with 65536 / 384 / 8 * 8 = 168 registers a thread: four give some back, eight ask for more.
BODY = """
.visible .entry k()
.reqntid 384, 1, 1
{{
    .reg .pred %p<3>;
    .reg .b32 %r<3>;
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 128;
    @!%p0 bra MORE;
    setmaxnreg.dec.sync.aligned.u32 {less};
    ret;
    MORE: setmaxnreg.inc.sync.aligned.u32 {more};
    ret;
}}
"""


def ask(less, more, seed=0, text=BODY):
    device = Device(Options(seed=seed))
    module = ptx.parse(HEAD.format(target="sm_90a") + text.format(less=less, more=more))
    device.launch(device.program(module, "k"), (1, 1, 1), (384, 1, 1), b"")


@pytest.mark.parametrize("seed", range(4))
def test_registers_that_others_gave_back_are_enough(seed):
    ask(24, 240, seed)  # 2 * 240 + 24 = 3 * 168


@pytest.mark.parametrize("seed", range(4))
def test_more_than_the_block_has_is_a_deadlock(seed):
    with pytest.raises(
        EmulationError, match=r"deadlock.*\n.*waits for registers: it has 168 a thread and asks for 240"
    ):
        ask(32, 240, seed)


def test_the_count_comes_from_maxnreg_where_it_is_given():
    text = BODY.replace(".reqntid 384, 1, 1", ".maxnreg 96\n.reqntid 384, 1, 1")
    ask(24, 128, text=text)
    with pytest.raises(EmulationError, match="waits for registers: it has 96 a thread and asks for 136"):
        ask(24, 136, text=text)


@pytest.mark.parametrize(
    ("less", "more", "said"), [(176, 240, "setmaxnreg.dec to 176"), (24, 160, "setmaxnreg.inc to 160")]
)
def test_directions_must_fit(less, more, said):
    with pytest.raises(EmulationError, match=f"{said}: this warp has 168 registers a thread"):
        ask(less, more)


@pytest.mark.parametrize("count", [20, 28, 264])
def test_counts_are_multiples_of_eight(count):
    with pytest.raises(ptx.PtxError, match="a multiple of 8 from 24 to 256"):
        ask(24, count)


def test_a_block_of_unknown_size_is_refused():
    with pytest.raises(ptx.PtxError, match=r"without .maxnreg, .reqntid or .maxntid.*setmaxnreg"):
        ask(24, 240, text=BODY.replace(".reqntid 384, 1, 1", ""))
