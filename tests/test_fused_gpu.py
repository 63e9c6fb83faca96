"""The fused GPU engine against the torch engine: the same spikes and gradients.

With a CUDA device the cases run on it. Without one they run on the CPU, in Triton's interpreter. That has to
be switched on before Triton is imported and then holds for the whole process, torch.compile's own use of
Triton included, so ``test_the_cases_in_the_interpreter`` runs this file once more in a process of its own;
here the cases are skipped. The interpreter takes more than the compiler does, so the kernels are compiled as
well, which needs no device.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fused_cpu import CHARGES, TWO_TERMS, assert_same

from spikede_plugins import SumOfExponentials
from spikede_plugins.engine import FRESH, AffineCode, FractionalOperator, HistoryLog, affine_neuron, cpu, gpu
from spikede_plugins.engine import scan as run_scan
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder, PerChannel
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.surrogate import available_surrogates

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if NATIVE else "cpu")
case = pytest.mark.skipif(
    not NATIVE and not INTERPRETED, reason="run by test_the_cases_in_the_interpreter: there is no CUDA device"
)
F32, F64 = torch.float32, torch.float64
#: Folds from 32 rows on.
COMPRESSED = SumOfExponentials(tolerance=1e-7, horizon=200)


@pytest.mark.skipif(NATIVE or INTERPRETED, reason="the cases run here")
def test_the_cases_in_the_interpreter(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())],
        cwd=tmp_path, env={**clean, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# -- the choice of the engine ---------------------------------------------------------------------


def test_nothing_imports_triton_before_it_is_needed():
    program = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import spikede_plugins.engine\n"
        "sys.exit(not before and 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_tensors_of_the_cpu_never_go_to_the_gpu_engine(monkeypatch):
    monkeypatch.setattr(gpu, "march", None)
    monkeypatch.setattr(cpu, "serves", lambda *_: False)
    operator, neuron = make_case("leak", F32, device=torch.device("cpu"))
    x = torch.ones(3, 4, requires_grad=True)
    run_scan(operator, neuron, x, torch.zeros(4), FRESH, HistoryLog())[0].sum().backward()
    assert x.grad is not None


def test_what_is_missing_is_said(monkeypatch):
    if NATIVE or INTERPRETED:
        assert gpu.missing() == ""
    else:
        assert gpu.missing() == "there is no CUDA device"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2.0")
    assert "3.3 or newer" in gpu.missing.__wrapped__()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "spikede-plugins[gpu]"' in gpu.missing.__wrapped__()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("on", "dtype"), [(False, F32), (True, F64)], ids=["least, fp32", "all, fp64"])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_compile(monkeypatch, tmp_path, name, on, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spikede_plugins.engine import gpu_kernels

    kernel = getattr(gpu_kernels, name)
    sizes = ("blocks", "steps", "entering", "count_traces", "n", "inner", "channels")
    types = {"plan": "*i64", "marks": "*u8", **dict.fromkeys(sizes, "i32")}
    chosen = {"FORM": "input", "KIND": "sigmoid", "SIZE": 16, "WIDTH": gpu._WIDTH[dtype]}
    signature, constants = {}, {}
    for argument in inspect.signature(kernel.fn).parameters:
        signature[argument] = types.get(argument, "*fp32" if dtype == F32 else "*fp64")
        if argument.isupper():
            signature[argument] = "constexpr"
            constants[argument] = chosen.get(argument, on)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32), options=dict(gpu._LAUNCH)
    )
    assert "fma.rn" in compiled.asm["ptx"]


# -- the cases ------------------------------------------------------------------------------------


@pytest.fixture
def both(monkeypatch):
    """Runs something with the fused engine, and with torch alone."""
    monkeypatch.setattr(cpu, "serves", lambda *_: False)
    launches = []
    for name in ("march", "adjoint"):
        inner = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, inner=inner, name=name: launches.append(name) or inner(*a))

    def compare(run, backward=True):
        monkeypatch.setattr(gpu, "_device_fits", lambda device: device.type == DEVICE.type)
        fused = run()
        assert {"march", "adjoint"} <= set(launches) if backward else "march" in launches
        monkeypatch.setattr(gpu, "_device_fits", lambda _: False)
        return fused, run()

    return compare


def make_case(
    charge, dtype, *, alpha=0.6, learn=True, memory="full", solver=None, device=DEVICE, step_size=1.0, **code
):
    factor = torch.tensor(0.3, dtype=dtype, device=device, requires_grad=True)
    defaults = {"threshold": 0.8, "surrogate": "atan", "surrogate_alpha": 2.0}
    settings = AffineCode(**{**defaults, **CHARGES[charge], **code})
    operator = FractionalOperator(
        FractionalOrder(alpha, learn), solver or GrunwaldLetnikov(), as_memory(memory), step_size
    ).to(device, dtype)
    return operator, affine_neuron(settings, (factor,) if settings.leak == "multiply" else ())


def make_input(dtype, steps=19, shape=(2, 3, 5)):
    """None of the sizes is one that fits blocks and programs."""
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(steps, *shape, generator=generator, dtype=dtype)).to(DEVICE)
    v = torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)
    return x.requires_grad_(), v


def in_chunks(operator, neuron, x, v, cuts=(6,)):
    """Outputs and gradients of a run in chunks, whose history carries gradients across and out of it."""
    log, past, spikes, potentials = HistoryLog(), FRESH, [], []
    for begin, end in itertools.pairwise((0, *cuts, len(x))):
        s, v, past, seq = run_scan(operator, neuron, x[begin:end], v, past, log, keep_v=True)
        spikes.append(s)
        potentials.append(seq)
    s, potentials = torch.cat(spikes), torch.cat(potentials)
    scale = torch.linspace(-1, 1, len(x), dtype=x.dtype, device=DEVICE)
    loss = (s.flatten(1).sum(1) * scale).sum() + v.sum() + past.rows.square().sum()
    if past.traces is not None:
        loss = loss + past.traces.square().sum()
    found = torch.autograd.grad(loss, [x, *operator.parameters(), *neuron.params])
    return s, potentials, found


@case
@pytest.mark.parametrize(("reset", "detach"), list(itertools.product([None, 0.1], [False, True])))
@pytest.mark.parametrize("charge", CHARGES)
def test_every_charge_and_reset(both, charge, reset, detach):
    operator, neuron = make_case(charge, F64, reset=reset, detach_reset=detach, strict=detach)
    x, v = make_input(F64)
    assert_same(*both(lambda: in_chunks(operator, neuron, x, v)), F64)


@case
@pytest.mark.parametrize("reset", [None, 0.1])
@pytest.mark.parametrize("charge", CHARGES)
def test_float32(both, charge, reset):
    operator, neuron = make_case(charge, F32, reset=reset)
    x, v = make_input(F32, shape=(2, 3, 11))  # more neurons than one program has
    assert_same(*both(lambda: in_chunks(operator, neuron, x, v)), F32)


@case
@pytest.mark.parametrize("surrogate", available_surrogates())
def test_every_surrogate(both, surrogate):
    operator, neuron = make_case("leak", F64, surrogate=surrogate, surrogate_alpha=1.75)
    x, v = make_input(F64)
    assert_same(*both(lambda: in_chunks(operator, neuron, x, v)), F64)


ORDERS = {
    "one": {},
    "fixed": {"learn": False},
    "a channel each": {"alpha": PerChannel([0.3, 0.5, 0.9])},
    "two terms": TWO_TERMS,
}


@case
@pytest.mark.parametrize("reset", [None, 0.1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory", ["full", 5, 20, COMPRESSED], ids=["full", "short", "window", "compressed"])
def test_every_memory_and_order(both, memory, order, reset):
    """Chunks that end within blocks, long enough for several folds."""
    operator, neuron = make_case("factor", F64, memory=memory, reset=reset, **ORDERS[order])
    x, v = make_input(F64, 85 if memory is COMPRESSED else 50, (2, 3, 2))
    cuts = (53, 54) if memory is COMPRESSED else (21, 22)
    assert_same(*both(lambda: in_chunks(operator, neuron, x, v, cuts)), F64)


@case
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 1), (1, 3, 30)])
def test_channels_of_any_width(both, shape):
    operator, neuron = make_case("leak", F64, alpha=PerChannel([0.3, 0.5, 0.9]), memory=COMPRESSED)
    x, v = make_input(F64, 53, shape)
    assert_same(*both(lambda: in_chunks(operator, neuron, x, v, (35,))), F64)


@case
@pytest.mark.parametrize("memory", ["full", COMPRESSED], ids=["full", "compressed"])
def test_one_chunk_that_hands_nothing_back(both, memory):
    """Gradients through the spikes alone: nothing comes in for what is handed on."""
    operator, neuron = make_case("leak", F64, memory=memory, step_size=0.5)
    x, v = make_input(F64, 70, (5,))

    def run():
        spikes, last, *_ = run_scan(operator, neuron, x, v, FRESH, HistoryLog())
        return spikes, last, torch.autograd.grad(spikes.sum(), [x, *operator.parameters()])

    assert_same(*both(run), F64)


@case
def test_charged_potentials_kept_or_rebuilt(both, monkeypatch):
    operator, neuron = make_case("leak", F64, reset=None)
    x, v = make_input(F64)
    rebuilt, plain = both(lambda: in_chunks(operator, neuron, x, v))
    monkeypatch.setattr(sys.modules["spikede_plugins.engine.scan"], "rebuilds", lambda *_: None)
    kept, _ = both(lambda: in_chunks(operator, neuron, x, v))
    assert_same(rebuilt, kept, F64)
    assert_same(kept, plain, F64)


@case
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reset", [None, 0.0])
def test_at_the_threshold(both, strict, reset):
    operator, neuron = make_case("integrate", F32, strict=strict, threshold=1.0, reset=reset, alpha=1.0)
    x = torch.ones(2, 3, device=DEVICE, requires_grad=True)

    def run():
        spikes, last, *_ = run_scan(operator, neuron, x, torch.zeros(3, device=DEVICE), FRESH, HistoryLog())
        return spikes, last, torch.autograd.grad(spikes.sum() + last.sum(), x)

    fused, plain = both(run)
    assert_same(fused, plain, F32)
    assert fused[0][0].sum() == (0 if strict else 3)


@case
@pytest.mark.parametrize("memory", ["full", COMPRESSED], ids=["full", "compressed"])
def test_a_run_in_chunks_gives_the_same_bits(both, memory):
    operator, neuron = make_case("leak", F32, memory=memory)
    x, v = make_input(F32, 70, (5,))

    def run():
        with torch.no_grad():
            whole, found = (
                torch.cat([seq for *_, seq in pieces(operator, neuron, x, v, cuts)])
                for cuts in [(), (1, 31, 32, 33, 47, 48, 65)]
            )
        return whole, found

    whole, found = both(run, backward=False)[0]
    assert torch.equal(whole, found)


def pieces(operator, neuron, x, v, cuts):
    log, past = HistoryLog(), FRESH
    for begin, end in itertools.pairwise((0, *cuts, len(x))):
        s, v, past, seq = run_scan(operator, neuron, x[begin:end], v, past, log, keep_v=True)
        yield s, v, past, seq


@case
@pytest.mark.parametrize("charge", CHARGES)
def test_native_spikes_at_a_learnable_alpha_of_one(both, charge):
    operator, neuron = make_case(charge, F32, alpha=1.0)
    x, v = make_input(F32)

    def run():
        return run_scan(operator, neuron, x, v, FRESH, HistoryLog())[:2]

    found, _ = both(run, backward=False)
    for k in range(len(x)):
        s, v = neuron.fire(neuron.charge(v, x[k], *neuron.params), *neuron.params)
        assert torch.equal(s, found[0][k])
    if NATIVE or CHARGES[charge].get("leak") != "divide":  # a CPU divides, a GPU multiplies
        assert torch.equal(v, found[1])


@case
def test_views_and_non_contiguous_inputs(both):
    operator, neuron = make_case("leak", F64)
    x, v = make_input(F64, 9, (4, 6))

    def run():
        turned, start = x.transpose(1, 2), v.t()
        spikes, last, *_ = run_scan(operator, neuron, turned, start, FRESH, HistoryLog())
        return spikes, last, torch.autograd.grad(spikes.sum() + last.sum(), x)

    assert_same(*both(run), F64)


@case
def test_nan_goes_through(both):
    operator, neuron = make_case("leak", F32)
    x, v = make_input(F32, 13)
    x = x.detach().clone()
    x[2, 0, 0] = float("nan")

    def run():
        return run_scan(operator, neuron, x, v, FRESH, HistoryLog(), keep_v=True)[3]

    seq = both(run, backward=False)[0]
    assert seq[2:, 0, 0].isnan().all()
    assert seq.isnan().sum() == 11 * seq.shape[-1]
