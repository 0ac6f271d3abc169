"""The `nmoe` command: argument parsing and printing only.

Exit codes: 0 done; 1 a bug in nmoe (with a traceback); 2 a mistake in the command, config, data or checkpoint; 3 the
run diverged (NaN or Inf) and stopped; 4 a rank is missing; 130 interrupted, after a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import nmoe
from nmoe.errors import UserError

EXIT_CODES = (
    "exit codes: 0 done, 1 a bug in nmoe, 2 your input, 3 the run diverged, 4 a rank is missing, "
    "130 interrupted"
)


def _train(args: argparse.Namespace) -> int:
    from nmoe.train import train

    outcome = train(args.load(), resume=args.resume, out=_line)
    return 0 if outcome.status == "finished" else 130


def _prep_mixture(args: argparse.Namespace) -> int:
    from nmoe.data.prep import prepare

    prepare(args.load().data, workers=args.workers, progress=sys.stderr)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from nmoe.plan import format_plan, plan

    _line(format_plan(plan(args.load(), world=args.world)))
    return 0


def _explain(args: argparse.Namespace) -> int:
    from nmoe.binding import lowered
    from nmoe.schedule.explain import explain

    _line(explain(lowered(args.load())))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from nmoe.bench import bench, format_bench

    _line(format_bench(bench(args.load(), steps=args.steps, baseline=args.baseline, save=args.save)))
    return 0


def _compile(args: argparse.Namespace) -> int:
    from nmoe.binding import by_torch, lowered, needed
    from nmoe.codegen.cache import default_root
    from nmoe.codegen.spec import format_specs
    from nmoe.hosts import ranks_of_host

    config, root = args.load(), args.cache or default_root()
    schedule = lowered(config, root=root)
    uses = needed(config, [schedule])
    if args.list or not uses:
        _line(format_specs(config, uses))
        return 0
    from nmoe.codegen.build import build, build_transfers, emit, format_build
    from nmoe.codegen.transfers import transfers_of

    if args.tune:
        from nmoe.autotune.measure import tune_all

        tune_all(list(uses), root, _line)
    result = build(list(uses), root, workers=args.workers or 0, progress=sys.stderr)
    _line(format_build(config.run.name, result))
    if transfers := transfers_of(schedule, ranks_of_host(config.rdep.ranks)):
        _line(build_transfers(transfers, config.target.device, root, args.workers or 0))
    _line(by_torch(schedule))
    if args.emit:
        _line(emit(result, args.emit))
    if args.verify:
        from nmoe.codegen.verify import verify

        ready = [*result.warm, *result.built]
        if wrong := verify(ready, _line, root):
            raise UserError(
                f"nmoe compile: {wrong} of {len(ready)} kernels of {config.run.name} failed on the emulator (listed "
                "above); do not train with them, and report the lines above"
            )
    if result.failed:
        raise UserError(
            f"nmoe compile: {len(result.failed)} kernels of {config.run.name} were not built (listed above); "
            f"{config.target.device} cannot train without them"
        )
    return 0


def _export(args: argparse.Namespace) -> int:
    from nmoe.export import export

    _line(export(args.load(), Path(args.folder)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from nmoe.doctor import format_findings, report

    _line(format_findings(report()))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def _line(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="nmoe",
        description="Mixture-of-Experts training for NVIDIA B200. The TOML file is the source of truth; "
        "NMOE_SECTION__KEY=value in the environment overrides one key.",
        epilog=EXIT_CODES,
    )
    main.add_argument("--version", action="version", version=f"nmoe {nmoe.__version__}")
    commands = main.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: object, summary: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, epilog=EXIT_CODES)
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("config", metavar="config.toml")
        return sub

    sub = command("train", _train, "train the model from the cache of kernels")
    sub.add_argument(
        "--resume", action="store_true", help="go on from the newest intact checkpoint, if there is one"
    )
    sub = command(
        "prep-mixture", _prep_mixture, "turn the config's datasets into token shards; resumes when killed"
    )
    sub.add_argument(
        "--workers", type=_positive, metavar="N", help="tokenizing processes (default: one a core)"
    )
    sub = command("plan", _plan, "predict memory, FLOPs, bytes and step time; refuse what does not fit")
    sub.add_argument("--world", type=_positive, default=1, metavar="N", help="ranks, one a GPU (default 1)")
    command("explain", _explain, "print the schedule: every kernel, its cost, stream and memory")
    sub = command("bench", _bench, "time training steps by range and compare with a baseline")
    sub.add_argument("--steps", type=_positive, default=200, metavar="N", help="steps to time (default 200)")
    sub.add_argument("--baseline", type=Path, metavar="FILE", help="compare with a result saved by --save")
    sub.add_argument("--save", type=Path, metavar="FILE", help="store the result as a baseline")
    sub = command("compile", _compile, "build the kernels that the config needs, into a cache; no GPU needed")
    sub.add_argument(
        "--workers", type=_positive, metavar="N", help="compiling processes (default: one a core)"
    )
    sub.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where kernels are kept (default $NMOE_HOME/kernels or ~/.cache/nmoe/kernels)",
    )
    sub.add_argument(
        "--list", action="store_true", help="only print the kernels with their keys; build nothing"
    )
    sub.add_argument(
        "--emit", type=Path, metavar="DIR", help="also write each kernel's PTX, SASS and report to DIR"
    )
    sub.add_argument(
        "--tune",
        action="store_true",
        help="first time each kernel's likely configs on this machine's GPU; later builds use the fastest",
    )
    sub.add_argument(
        "--verify",
        action="store_true",
        help="then run a small kernel of each one's family on the PTX emulator",
    )
    sub = command("export", _export, "write the newest checkpoint as HuggingFace safetensors and config.json")
    sub.add_argument("folder", help="folder to create")
    command("doctor", _doctor, "what is installed, which targets can run or compile here", config=False)
    return main


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if hasattr(args, "config"):
            from nmoe.config import load

            args.load = lambda: load(args.config)
        return args.run(args)
    except UserError as error:
        print(f"nmoe: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nmoe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what is printed (head, less) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
