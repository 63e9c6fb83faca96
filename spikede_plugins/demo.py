"""The main job on real data: train an integer net, make it fractional, fine-tune, compare.

Scikit-learn's bundled handwritten digits (8x8 pixels) are fed row by row, as a sequence of currents, to the
same small spiking network written once for SpikingJelly and once for snnTorch. Each row lasts two time steps
(T = 16) and the answer is read from the spikes *during the last row only*: what the upper rows said has to be
remembered by the membranes. That choice, by measurement, makes memory matter: with a read-out over the whole
sequence the read-out itself does the remembering, and fractional neurons gained 1.4 points instead of 6.6.

From one trained integer net (leak tau = 2, SpikingJelly's default) three copies are fine-tuned with the same
batches: alpha = 1, a fixed alpha, and a learned one for each layer. A fourth net is the control that a
sceptical reader asks for: an integer net with a slow leak, trained from scratch for as many epochs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikede_plugins.errors import MissingExtraError, OptionError, nearest
from spikede_plugins.orders import FractionalOrder

_ROWS = 8
_CLASSES = 10
_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


@dataclass(frozen=True)
class Settings:
    """The experiment. ``noise`` is the standard deviation of white noise on every pixel and time step,
    in units of full ink; ``tau`` and ``slow_tau`` are leak time constants in time steps."""

    seeds: int = 3
    repeat: int = 2
    hidden: int = 64
    tau: float = 2.0
    slow_tau: float = 16.0
    alpha: float = 0.7
    train_epochs: int = 20
    tune_epochs: int = 15
    batch: int = 64
    learning_rate: float = 0.01
    noise: float = 0.2
    samples: int | None = None


# -- the network, once for each framework ----------------------------------------------------------


class SpikingJellyDigits(nn.Module):
    """Two LIF layers in SpikingJelly's multi-step mode; input ``[T, B, 8]``, logits ``[B, 10]``."""

    def __init__(self, hidden: int, tau: float, last: int) -> None:
        from spikingjelly.activation_based import layer, neuron

        super().__init__()
        self.last = last
        self.fc1 = layer.Linear(_ROWS, hidden, step_mode="m")
        self.lif1 = neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, step_mode="m")
        self.fc2 = layer.Linear(hidden, hidden, step_mode="m")
        self.lif2 = neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, step_mode="m")
        self.readout = nn.Linear(hidden, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.lif2(self.fc2(self.lif1(self.fc1(x))))
        return self.readout(spikes[-self.last :].mean(0))


class SnnTorchDigits(nn.Module):
    """The same two layers in snnTorch's style: a loop over time that passes ``mem`` along."""

    def __init__(self, hidden: int, tau: float, last: int) -> None:
        import snntorch

        super().__init__()
        self.last = last
        self.fc1 = nn.Linear(_ROWS, hidden)
        self.lif1 = snntorch.Leaky(beta=1.0 - 1.0 / tau, reset_delay=False)
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif2 = snntorch.Leaky(beta=1.0 - 1.0 / tau, reset_delay=False)
        self.readout = nn.Linear(hidden, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spikes = []
        for current in x:
            spike, mem1 = self.lif1(self.fc1(current), mem1)
            spike, mem2 = self.lif2(self.fc2(spike), mem2)
            spikes.append(spike)
        return self.readout(torch.stack(spikes[-self.last :]).mean(0))


def _reset_spikingjelly(net: nn.Module) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(net)


def _trace_spikingjelly(current: Tensor, tau: float, alpha: float) -> tuple[Tensor, Tensor]:
    from spikingjelly.activation_based import neuron

    node = _convert(neuron.LIFNode(tau=tau, decay_input=False, v_reset=None), alpha=alpha)
    potential, spikes = [], []
    for x in current:
        spikes.append(node(x.reshape(1, 1)))
        potential.append(node.v)
    return torch.stack(potential).flatten(), torch.stack(spikes).flatten()


def _trace_snntorch(current: Tensor, tau: float, alpha: float) -> tuple[Tensor, Tensor]:
    import snntorch

    node = _convert(snntorch.Leaky(beta=1.0 - 1.0 / tau, reset_delay=False), alpha=alpha)
    mem = node.reset_mem()
    potential, spikes = [], []
    for x in current:
        spike, mem = node(x.reshape(1, 1), mem)
        spikes.append(spike)
        potential.append(mem)
    return torch.stack(potential).flatten(), torch.stack(spikes).flatten()


class _Framework(NamedTuple):
    title: str
    build: Callable[[int, float, int], nn.Module]
    reset: Callable[[nn.Module], None]
    trace: Callable[[Tensor, float, float], tuple[Tensor, Tensor]]


_FRAMEWORKS = {
    "spikingjelly": _Framework("SpikingJelly", SpikingJellyDigits, _reset_spikingjelly, _trace_spikingjelly),
    # The loop itself starts from reset_mem(): nothing is left to reset between batches.
    "snntorch": _Framework("snnTorch", SnnTorchDigits, lambda net: None, _trace_snntorch),
}


def _convert(net: nn.Module, **options: Any) -> Any:
    from spikede_plugins.conversion import convert_to_fractional

    return convert_to_fractional(net, **options)


# -- data, training, testing -----------------------------------------------------------------------


class _Split(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def _digits(settings: Settings, seed: int) -> _Split:
    """Pixels in [0, 1] as ``[N, 8, 8]`` and labels; 60 % to train, the classes in equal shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    if settings.samples is not None:
        images, labels = images[: settings.samples], labels[: settings.samples]
    parts = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=seed)
    train_x, test_x = (torch.tensor(p, dtype=torch.float32).reshape(-1, _ROWS, 8) / 16.0 for p in parts[:2])
    train_y, test_y = (torch.tensor(p, dtype=torch.int64) for p in parts[2:])
    return _Split(train_x, train_y, test_x, test_y)


def _sequence(images: Tensor, settings: Settings) -> Tensor:
    """``[B, 8, 8]`` images as ``[T, B, 8]`` currents, each row lasting ``repeat`` steps."""
    return images.repeat_interleave(settings.repeat, dim=1).transpose(0, 1).contiguous()


def _train(
    net: nn.Module, data: _Split, framework: _Framework, settings: Settings, epochs: int, seed: int,
    tick: Callable[[], None],
) -> float:
    """Train in place; returns seconds. The seed alone decides the batches, whatever the net draws."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    net.train()
    began = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=order).split(settings.batch):
            optimizer.zero_grad()
            logits = net(_sequence(data.train_x[batch], settings))
            F.cross_entropy(logits, data.train_y[batch]).backward()
            optimizer.step()
            framework.reset(net)
        tick()
    return time.perf_counter() - began


@torch.no_grad()
def _logits(
    net: nn.Module, data: _Split, framework: _Framework, settings: Settings, noise: float, seed: int
) -> Tensor:
    sequence = _sequence(data.test_x, settings)
    sequence = sequence + noise * torch.randn(sequence.shape, generator=torch.Generator().manual_seed(seed))
    net.eval()
    logits = net(sequence)
    framework.reset(net)
    return logits


def _test(
    net: nn.Module, data: _Split, framework: _Framework, settings: Settings, seed: int
) -> dict[str, float]:
    def accuracy(noise: float) -> float:
        logits = _logits(net, data, framework, settings, noise, seed)
        return (logits.argmax(1) == data.test_y).double().mean().item()

    return {"clean": accuracy(0.0), "noisy": accuracy(settings.noise)}


def _learned(net: nn.Module) -> list[float]:
    """The orders in use, in the model's own module order."""
    orders = [m for m in net.modules() if isinstance(m, FractionalOrder)]
    return [float(order.alphas().detach().mean()) for order in orders]


# -- the experiment --------------------------------------------------------------------------------


def _variants(settings: Settings) -> dict[str, str]:
    return {
        "integer": f"integer (α = 1), τ = {settings.tau:g}",
        "fractional": f"fractional, α = {settings.alpha:g}",
        "learned": "fractional, α learned",
        "slow": f"integer, slow leak τ = {settings.slow_tau:g}",
    }


def _one_seed(name: str, settings: Settings, seed: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """All variants of one framework and one seed."""
    framework = _FRAMEWORKS[name]
    data = _digits(settings, seed)
    rows = []

    def measured(
        variant: str, net: nn.Module, seconds: float, epochs: int, identical: bool | None = None
    ) -> None:
        rows.append(
            {
                "framework": name, "variant": variant, "seed": seed,
                **_test(net, data, framework, settings, seed),
                "alphas": _learned(net) if variant in ("fractional", "learned") else [1.0, 1.0],
                "seconds_per_epoch": seconds / epochs,
                "same_as_native": identical,
            }
        )

    torch.manual_seed(seed)
    start = framework.build(settings.hidden, settings.tau, settings.repeat)
    _train(start, data, framework, settings, settings.train_epochs, seed, tick)
    native = _logits(start, data, framework, settings, 0.0, seed)
    options: dict[str, dict[str, Any]] = {
        "integer": {"alpha": 1.0},
        "fractional": {"alpha": settings.alpha},
        "learned": {"alpha": settings.alpha, "learn_alpha": True},
    }
    for variant, option in options.items():
        net = _convert(start, **option)
        identical = None
        if variant == "integer":
            identical = torch.equal(native, _logits(net, data, framework, settings, 0.0, seed))
        seconds = _train(net, data, framework, settings, settings.tune_epochs, 1000 + seed, tick)
        measured(variant, net, seconds, settings.tune_epochs, identical)

    torch.manual_seed(seed)
    slow = framework.build(settings.hidden, settings.slow_tau, settings.repeat)
    seconds = _train(slow, data, framework, settings, settings.train_epochs, seed, tick)
    seconds += _train(slow, data, framework, settings, settings.tune_epochs, 1000 + seed, tick)
    measured("slow", slow, seconds, settings.train_epochs + settings.tune_epochs)
    return rows


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _summary(rows: list[dict[str, Any]], names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Mean and spread over seeds, and the paired difference to the integer net of the same seed."""
    summary: dict[str, Any] = {}
    for name in names:
        summary[name] = {}
        integer = {r["seed"]: r for r in rows if r["framework"] == name and r["variant"] == "integer"}
        for variant in _variants(settings):
            mine = [r for r in rows if r["framework"] == name and r["variant"] == variant]
            entry: dict[str, Any] = {
                key: _mean_std([r[key] for r in mine]) for key in ("clean", "noisy", "seconds_per_epoch")
            }
            entry["alphas"] = [_mean_std(layer) for layer in zip(*(r["alphas"] for r in mine), strict=True)]
            for key in ("clean", "noisy"):
                entry[f"{key}_minus_integer"] = _mean_std([r[key] - integer[r["seed"]][key] for r in mine])
            summary[name][variant] = entry
    return summary


def _percent(value: tuple[float, float], settings: Settings, sign: str = "") -> str:
    """Mean and spread; a single run has none."""
    spread = f" ± {100 * value[1]:.1f}" if settings.seeds > 1 else ""
    return f"{100 * value[0]:{sign}.1f}{spread}"


_SHORT = {"integer": "integer", "fractional": "fractional", "learned": "learned α", "slow": "slow leak"}


def _verdicts(summary: dict[str, Any], settings: Settings) -> list[str]:
    """What came out, whoever won, in one sentence a framework and condition."""
    lines = []
    for name, variants in summary.items():
        for condition, what in (("clean", "clean"), ("noisy", "noisy")):
            best = max(variants, key=lambda v: variants[v][condition][0])
            parts = []
            for variant, entry in variants.items():
                if variant != "integer":
                    difference = _percent(entry[f"{condition}_minus_integer"], settings, "+")
                    parts.append(f"{_SHORT[variant]} {difference}")
            lines.append(f"{_FRAMEWORKS[name].title}, {what}: {', '.join(parts)}; best: {_SHORT[best]}.")
    return lines


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A mere folder of that name somewhere on the path is a namespace package without an origin.
    return spec is not None and spec.origin is not None


def _pick(frameworks: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The frameworks to run and those left out because they are not installed."""
    if isinstance(frameworks, str):
        frameworks = [frameworks]
    wanted = list(_FRAMEWORKS) if frameworks is None else list(dict.fromkeys(frameworks))
    for name in wanted:
        if name not in _FRAMEWORKS:
            raise OptionError(f"the demo knows no framework {name!r}; {nearest(name, _FRAMEWORKS)}")
    missing = [name for name in wanted if not _installed(name)]
    if missing and (frameworks is not None or len(missing) == len(wanted)):
        raise MissingExtraError(
            f"the demo needs {' or '.join(missing)}, which is not installed: "
            f'pip install "spikede-plugins[demo,{missing[0]}]".'
        )
    return [name for name in wanted if name not in missing], missing


def _check_extras() -> None:
    missing = [shown for module, shown in _NEEDED.items() if not _installed(module)]
    if missing:
        raise MissingExtraError(
            f"the demo needs {', '.join(missing)}, not installed: pip install \"spikede-plugins[demo]\"."
        )


#: The files that it writes.
_FIGURE, _RESULTS = "demo.png", "demo.json"


def _check_folder(folder: Path) -> None:
    """Make the folder, and see that both files can be written.

    Raises:
        OptionError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / _FIGURE, folder / _RESULTS):
            new = not path.exists()
            with path.open("ab"):
                pass
            if new:
                path.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OptionError:
    return OptionError(
        f"the demo cannot write into {str(folder)!r}: {error.strerror or error}; name another folder: "
        "spikede demo --out DIR, or run_demo(out=DIR)."
    )


def run_demo(
    out: str | Path = "spikede-demo",
    quick: bool = False,
    seeds: int = 3,
    frameworks: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run the comparison, print a table, save ``demo.png`` and ``demo.json`` into a folder.

    Args:
        out: the folder, made if needed.
        quick: a few epochs on few samples, to see that everything works; the accuracies mean nothing.
        seeds: how many repetitions, each with its own split, initial weights and batches.
        frameworks: ``"spikingjelly"``, ``"snntorch"`` or both; None runs those that are installed.

    Returns:
        What is written to ``demo.json``: ``settings``, ``versions``, ``results`` (one row a run),
        ``summary`` (mean and standard deviation over seeds), ``verdicts``, ``seconds``, ``figure`` (path).

    Raises:
        MissingExtraError: if scikit-learn, matplotlib, rich or the framework is not installed.
        OptionError: for an unknown framework, ``seeds`` < 1, or a folder that cannot be written: before
            anything is trained.
    """
    _check_extras()
    if seeds < 1:
        raise OptionError(f"seeds must be at least 1, got {seeds}.")
    names, missing = _pick(frameworks)
    settings = Settings(seeds=seeds)
    if quick:
        settings = replace(settings, seeds=min(seeds, 1), train_epochs=2, tune_epochs=1, samples=300)
    folder = Path(out)
    _check_folder(folder)

    threads = torch.get_num_threads()
    # Tensors this small lose more to the hand-over between threads than they gain.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return _run(folder, settings, names, missing, quick)
    finally:
        torch.set_num_threads(threads)


def _console() -> Any:
    from rich.console import Console

    class PipedConsole(Console):
        """One that leaves a closed pipe to its caller, where rich ends the program."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipedConsole()


def _run(
    folder: Path, settings: Settings, names: list[str], missing: list[str], quick: bool
) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = _console()
    began = time.perf_counter()
    console.print(
        f"Handwritten digits, row by row: T = {_ROWS * settings.repeat} steps, "
        f"2 x {settings.hidden} spiking neurons, answer read during the last row only."
    )
    for name in missing:
        console.print(f"{_FRAMEWORKS[name].title} is not installed and is left out.")
    if quick:
        console.print("Quick run: too short to learn anything; the accuracies mean nothing.")
    rows: list[dict[str, Any]] = []
    epochs = 2 * settings.train_epochs + 4 * settings.tune_epochs
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("epochs"), TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(names) * settings.seeds * epochs)
        for name in names:
            for seed in range(settings.seeds):
                progress.update(task, description=f"{_FRAMEWORKS[name].title}, seed {seed}")
                rows += _one_seed(name, settings, seed, lambda: progress.advance(task))
        progress.update(task, description="done")

    summary = _summary(rows, names, settings)
    verdicts = _verdicts(summary, settings)
    # The table first: it took minutes, and a disk that is full by now must not cost it.
    _show(console, rows, summary, verdicts, settings)
    try:
        figure = _draw(folder / _FIGURE, summary, settings, names)
    except OSError as error:
        raise _unwritable(folder, error) from error
    result: dict[str, Any] = {
        "quick": quick,
        "settings": asdict(settings),
        "variants": _variants(settings),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ["torch", *names]},
        },
        "skipped_frameworks": missing,
        "results": rows,
        "summary": summary,
        "verdicts": verdicts,
        "seconds": round(time.perf_counter() - began, 1),
        "figure": str(figure),
    }
    # Beside the figure, so that the folder can be moved.
    text = json.dumps({**result, "figure": figure.name}, indent=1, ensure_ascii=False)
    try:
        (folder / _RESULTS).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    console.print(f"{result['seconds']:.0f} s. Figure: {result['figure']}", highlight=False, soft_wrap=True)
    return result


def _show(
    console: Any, rows: list[dict[str, Any]], summary: dict[str, Any], verdicts: list[str], settings: Settings
) -> None:
    from rich.table import Table

    runs = f"mean ± std over {settings.seeds} seeds" if settings.seeds > 1 else "1 seed"

    def percent(value: tuple[float, float], best: bool) -> str:
        text = _percent(value, settings)
        return f"[bold]{text}[/bold]" if best else text

    for name, variants in summary.items():
        table = Table(title=f"{_FRAMEWORKS[name].title}: test accuracy in %, {runs}")
        table.add_column("neurons", no_wrap=True)
        for heading in ("clean", f"noise {settings.noise:g}", "α of layers", "s/epoch"):
            table.add_column(heading, justify="right", no_wrap=True)
        top = {c: max(v[c][0] for v in variants.values()) for c in ("clean", "noisy")}
        for variant, entry in variants.items():
            table.add_row(
                _variants(settings)[variant],
                *(percent(entry[c], entry[c][0] == top[c]) for c in ("clean", "noisy")),
                ", ".join(f"{a:.2f}" for a, _ in entry["alphas"]),
                f"{entry['seconds_per_epoch'][0]:.2f}",
            )
        console.print(table)
    console.print("Points against the integer net of the same seed:")
    for line in verdicts:
        console.print(f"- {line}", highlight=False)
    same = all(r["same_as_native"] for r in rows if r["same_as_native"] is not None)
    console.print(
        "Converted with α = 1, the trained nets answer "
        + ("exactly as the native ones, bit for bit." if same else "NOT as the native ones: this is a bug.")
    )


def _draw(path: Path, summary: dict[str, Any], settings: Settings, names: list[str]) -> Path:
    from spikede_plugins.plotting import new_figure, plot_accuracy, plot_membrane_traces, plot_memory_kernel

    figure = new_figure(13.0, 5.0)
    grid = figure.add_gridspec(1, 3, width_ratios=[1.25, 0.95, 1.35])
    left, middle = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])

    framework = _FRAMEWORKS[names[0]]
    steps, tau = 240, 20.0
    current = torch.zeros(steps)
    current[20:160] = 0.14
    traces, spikes = {}, {}
    with torch.no_grad():
        for alpha in (1.0, 0.85, 0.7, 0.5):
            traces[f"α = {alpha:g}"], spikes[f"α = {alpha:g}"] = framework.trace(current, tau, alpha)
    left.axvspan(20, 160, color="0.93", zorder=0)
    plot_membrane_traces(traces, spikes=spikes, ax=left)
    left.set_title(f"One LIF neuron, τ = {tau:g}: same current\n(shaded), several orders")

    plot_memory_kernel((1.0, 0.85, 0.7, 0.5), lags=1000, ax=middle)
    middle.set_title("What each order remembers:\nweights of the past, solver gl")

    inner = grid[0, 2].subgridspec(len(names) + 1, 1, height_ratios=[*[1.0] * len(names), 0.16])
    labels = _variants(settings)
    first = None
    for i, name in enumerate(names):
        ax = figure.add_subplot(inner[i, 0], sharex=first, sharey=first)
        first = first or ax
        bars = {
            labels[variant]: {"clean": entry["clean"], f"input noise {settings.noise:g}": entry["noisy"]}
            for variant, entry in summary[name].items()
        }
        plot_accuracy(bars, ax=ax)
        ax.set_title(f"{_FRAMEWORKS[name].title}: digits row by row", loc="left")
        if i == 0:
            handles, texts = ax.get_legend_handles_labels()
    legend = figure.add_subplot(inner[len(names), 0])
    legend.axis("off")
    legend.legend(handles, texts, loc="center", ncols=2, frameon=False, fontsize="small", columnspacing=1.0)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    return path
