"""The command line: ``spikede doctor``, ``spikede plan MODULE:FACTORY``, ``spikede demo``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
from collections.abc import Sequence

from torch import nn

from spikede_plugins.conversion import plan_conversion
from spikede_plugins.engine.choice import engines
from spikede_plugins.errors import OptionError, SpikedeError
from spikede_plugins.registry import ADAPTERS, PluginStatus, available_adapters, available_solvers, discover
from spikede_plugins.registry import get_solver as solver_named

_PACKAGES = (
    "torch", "numpy", "spikingjelly", "snntorch", "numba", "triton", "torchdiffeq", "matplotlib",
    "scikit-learn", "rich",
)  # fmt: skip


#: Exit codes: of a mistake that the user can mend; of Ctrl-C and of a pipe that nobody reads, as shells give
#: them to programs that a signal ended.
_MISTAKE, _STOPPED, _NO_READER = 2, 128 + 2, 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    An error that a user can mend is one line on stderr and code 2, Ctrl-C is one line and 130. A reader that
    wants no more (``spikede doctor | head -1``) is nothing to tell of: code 141, as other programs have it.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without Greek letters shows "?" for them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(argv)
    except SpikedeError as error:
        return _ended(_MISTAKE, str(error))
    except KeyboardInterrupt:
        return _ended(_STOPPED, "stopped.")
    except BrokenPipeError:
        _leave_stdout()
        return _NO_READER
    except OSError as error:  # a full disk behind the output
        _leave_stdout()
        return _ended(1, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        return code
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where its errors are caught, and not when Python ends


def _ended(code: int, line: str) -> int:
    with contextlib.suppress(OSError):
        print(f"spikede: {line}", file=sys.stderr)
    return code


def _leave_stdout() -> None:
    """What is still buffered goes nowhere: Python would fail once more when it flushes it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikede", description="Fractional spiking neurons for SpikingJelly and snnTorch models."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("spikede-plugins"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="versions, adapters, solvers and engines")
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser(
        "plan",
        help="show what a conversion would do to your model",
        # The generated line puts the target last, where --alpha, which takes several values, takes it too.
        usage="spikede plan MODULE:FACTORY [--alpha A ...] [--method M] [--memory N] [--include P ...] "
        "[--exclude P ...] [--learn-alpha]",
        description=(
            "Print the conversion table of a model. This imports MODULE and calls FACTORY: it runs your "
            "code, with the current directory on the import path. The model itself is not changed."
        ),
    )
    plan.add_argument(
        "target", metavar="MODULE:FACTORY", help="a callable without arguments that returns a model"
    )
    plan.add_argument(
        "--alpha",
        nargs="+",
        default=["0.7"],
        metavar="A",
        help="the order in (0, 1]; several for one a spiking layer; or PATTERN=A ... (default: 0.7)",
    )
    plan.add_argument("--method", default="gl", help="the solver, see 'spikede doctor' (default: gl)")
    plan.add_argument(
        "--memory", default="auto", help="'auto', 'full', 'soe' or the length of a window (default: auto)"
    )
    plan.add_argument("--include", nargs="+", metavar="PATTERN", help="convert these only")
    plan.add_argument("--exclude", nargs="+", metavar="PATTERN", help="leave these as they are")
    plan.add_argument("--learn-alpha", action="store_true", help="make the order trainable")
    plan.set_defaults(run=_plan)

    demo = commands.add_parser(
        "demo",
        help="train an integer and a fractional network on handwritten digits",
        description="Train, convert and compare on real data; prints a table and writes a figure.",
    )
    demo.add_argument("--out", default="spikede-demo", metavar="DIR", help="where the figure goes")
    demo.add_argument("--quick", action="store_true", help="a smaller run, to see that it works")
    demo.add_argument("--seeds", type=int, default=3, metavar="N", help="how many repetitions (default: 3)")
    demo.set_defaults(run=_demo)
    return parser


# -- doctor ---------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _import_frameworks() -> None:
    """An adapter is loaded once its framework is in use; a doctor wants to see them all."""
    for name in discover(ADAPTERS):
        package = name.partition(".")[0]
        try:
            if importlib.util.find_spec(package) is not None:
                importlib.import_module(package)
        except (Exception, SystemExit) as error:
            print(f"  {package} cannot be imported: {type(error).__name__}: {error}")


def _doctor(arguments: argparse.Namespace) -> int:
    print("versions")
    print(f"  python           {platform.python_version()}")
    print(f"  spikede-plugins  {_version('spikede-plugins')}")
    for package in _PACKAGES:
        print(f"  {package:15}  {_version(package)}")
    print("adapters")
    _import_frameworks()
    adapters = available_adapters()
    for name, status in adapters.items():
        print(f"  {name:15}  {_line(status)}")
    print("solvers")
    solvers = available_solvers()
    sound = True
    for name, status in solvers.items():
        try:
            told = _accuracy(name, status)
        except Exception as error:
            told, sound = f"accuracy unknown ({type(error).__name__}: {error}): ", False
        print(f"  {name:15}  {told}{_line(status)}")
    print("engines")
    for name, active, reason in engines():
        print(f"  {name:22} {'active' if active else 'off'}: {reason}")
    broken = any(s.state == "broken" for s in (*adapters.values(), *solvers.values()))
    return 1 if broken or not sound else 0


def _line(status: PluginStatus) -> str:
    return " ".join(str(status).split())


def _accuracy(name: str, status: PluginStatus) -> str:
    if status.state != "ready":
        return ""
    solver = solver_named(name)
    low, high = solver.accuracy(0.5), solver.accuracy_rough(0.5)
    rough = "" if low == high else f", {high:.2g} from a t^alpha start"
    return f"accuracy {low:.2g} at alpha = 0.5{rough}: "


# -- plan -----------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    report = plan_conversion(
        _load_model(arguments.target),
        alpha=_alpha(arguments.alpha),
        method=arguments.method,
        memory=int(arguments.memory) if _is_int(arguments.memory) else arguments.memory,
        include=arguments.include,
        exclude=arguments.exclude,
        learn_alpha=arguments.learn_alpha,
    )
    print(report)
    return 1 if report.unsupported else 0


def _is_int(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _alpha(values: list[str]) -> float | list[float] | dict[str, float]:
    """``0.7``, ``0.7 0.5`` or ``conv.*=0.7 *=0.5`` as the option alpha."""
    try:
        if any("=" in value for value in values):
            pairs = [value.rpartition("=")[::2] for value in values]
            if not all(pattern for pattern, _ in pairs):
                raise ValueError("mixed")
            return {pattern: float(number) for pattern, number in pairs}
        numbers = [float(value) for value in values]
    except ValueError as error:
        raise OptionError(
            f"--alpha takes a number, one for each layer, or PATTERN=NUMBER pairs, got {' '.join(values)!r}."
        ) from error
    return numbers[0] if len(numbers) == 1 else numbers


def _load_model(target: str) -> nn.Module:
    """Import the module, call the factory.

    Raises:
        OptionError: if that does not lead to a model; the user's own exception is chained.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise OptionError(f"expected MODULE:FACTORY, e.g. mypackage.models:make_net, got {target!r}.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
        for name in attribute.split("."):
            if not hasattr(found, name):
                raise OptionError(f"{target}: {module_name} has no attribute {name!r}{_hint(name, found)}.")
            found = getattr(found, name)
        model = found if isinstance(found, nn.Module) else found()  # type: ignore[operator]
    except OptionError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise OptionError(f"{target} gave no model: {type(error).__name__}: {text}") from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"{target} must give a torch.nn.Module, got {type(model).__name__}.")
    return model


def _hint(name: str, owner: object) -> str:
    close = difflib.get_close_matches(name, [n for n in dir(owner) if not n.startswith("_")], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# -- demo -----------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from spikede_plugins.demo import run_demo

    run_demo(out=arguments.out, quick=arguments.quick, seeds=arguments.seeds)
    return 0
