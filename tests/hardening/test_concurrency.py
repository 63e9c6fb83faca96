"""Threads, forks and worker processes: each gets what it would get alone."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
import warnings

import pytest
import scale
import torch
from small_nets import BATCH, FRAMEWORKS, INPUTS, each_framework, frames
from torch.utils.data import DataLoader, Dataset

from spikede_plugins import (
    LIFNeuron,
    ODELIFDynamics,
    PerChannel,
    SNNWrapper,
    SpikingODELayer,
    conversion_report,
    convert_to_fractional,
    fdeint,
    restore_native,
)

THREADS = 8
INSTALLED = [parameter.values[0] for parameter in FRAMEWORKS if not parameter.marks[0].args[0]]

#: Ways to convert, no two threads the same.
CONVERSIONS = [
    {"alpha": 0.3, "memory": "full"},
    {"alpha": 0.5, "memory": "soe", "learn_alpha": True},
    {"alpha": 0.7, "memory": 5, "learn_alpha": True},
    {"alpha": {"lif": PerChannel([0.4] * 8 + [0.8] * 8), "*": 0.9}, "memory": "auto", "learn_alpha": True},
    {"alpha": 0.6, "memory": "full", "memory_reset": "spike"},
    {"alpha": 0.8, "method": "abm", "memory": "full"},
    {"alpha": 0.9, "method": "l1", "memory": "soe"},
    {"alpha": [0.2, 1.0], "method": "pred"},
]


def reset(framework, net):
    """Of this net alone: snnTorch's ``utils.reset`` resets all neurons of a class, in every thread, and none
    that came out of a pickle."""
    if framework.name == "spikingjelly":
        framework.reset(net)
    else:
        for neuron in (net.lif, net.block[1]):
            neuron.reset_mem()


def work(number, rounds):
    """Convert, train in single steps and, in SpikingJelly, in multi-step mode, evaluate, restore."""
    framework = INSTALLED[number % len(INSTALLED)]
    options = CONVERSIONS[number % len(CONVERSIONS)]
    results = []
    for turn in range(rounds):
        generator = torch.Generator().manual_seed(100 * number + turn)
        net = seeded_net(framework, generator)
        net = convert_to_fractional(net, inplace=turn % 2 == 0, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            reset(framework, net)
            optimizer.zero_grad()
            x = 8 * torch.randn(10, BATCH, INPUTS, generator=generator)
            torch.stack([net(step) for step in x]).mean().backward()
            optimizer.step()
        reset(framework, net)
        with torch.no_grad():
            results.append(torch.stack([net(step) for step in x]))
        if framework.name == "spikingjelly":
            from spikingjelly.activation_based import functional

            reset(framework, net)
            functional.set_step_mode(net, "m")
            results.append(net(x))
        results += [p.detach().clone() for p in net.parameters()]
        results.append(torch.tensor(len(conversion_report(restore_native(net)).converted)))
    return [result.detach() for result in results]


def seeded_net(framework, generator):
    """The small net with weights from a generator of one's own: torch's global one belongs to all threads."""
    from small_nets import Net

    net = Net(framework)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def in_threads(jobs):
    """The results of all jobs, begun together, each in a thread; the first error is raised."""
    start, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(place, job):
        start.wait()
        try:
            results[place] = job()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place, job)) for place, job in enumerate(jobs)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places a hundred times as often as usual
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_eight_threads_at_once():
    rounds = scale.scale(1, 25)
    alone = [work(number, rounds) for number in range(THREADS)]
    together = in_threads([lambda number=number: work(number, rounds) for number in range(THREADS)])
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)
    assert sum(len(results) for results in alone) > 40 * rounds
    scale.record("models trained in 8 threads at once", THREADS * rounds, "models")


def test_eight_threads_in_the_wrapper_the_event_layer_and_fdeint():
    def solve(number):
        generator = torch.Generator().manual_seed(number)
        alpha = 0.3 + number / 12
        x, t = 3 * torch.randn(12, 2, 4, generator=generator), torch.linspace(0, 1, 12)
        base = torch.nn.Sequential(torch.nn.Linear(4, 6), LIFNeuron(tau=2.0))
        net = SNNWrapper(base, alpha=alpha, learn_alpha=True, method="gl")
        layer = SpikingODELayer(4, 3, ODELIFDynamics(tau_mem=20.0))
        with torch.no_grad():
            for parameter in (*base.parameters(), layer.weight):
                if parameter.dim():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        out = net(x, t)
        out.mean().backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        with torch.no_grad():
            counts = layer(x.abs(), interval=3.0)
        y = fdeint(lambda t, y: -y, x[0], torch.linspace(0, 1, 200), alpha=alpha, memory="soe")
        return [out.detach(), *grads, counts, y]

    alone = [solve(number) for number in range(THREADS)]
    for one, other in zip(
        in_threads([lambda number=number: solve(number) for number in range(THREADS)]), alone, strict=True
    ):
        assert_same(one, other)


def test_threads_that_make_and_convert_neurons_lose_none_of_snntorchs_list():
    snntorch = pytest.importorskip("snntorch")
    count = scale.scale(40, 400)

    def make():
        neurons = []
        for _ in range(count):
            net = torch.nn.Sequential(snntorch.Leaky(beta=0.5, init_hidden=True))
            neurons.append(convert_to_fractional(net, alpha=0.5, inplace=True)[0])
        return neurons

    made = [neuron for neurons in in_threads([make] * THREADS) for neuron in neurons]
    listed = [id(neuron) for neuron in snntorch.SpikingNeuron.instances]
    assert len(made) == THREADS * count
    assert all(listed.count(id(neuron)) == 1 for neuron in made)


# -- processes -------------------------------------------------------------------------------------

#: How processes are made; fresh interpreters take seconds each, so the default run only forks.
METHODS = [method for method in multiprocessing.get_all_start_methods() if method == "fork" or scale.FULL]
each_method = pytest.mark.parametrize("method", METHODS)


def large_run(framework):
    """Forward and backward through the fused kernels, on two threads where torch may have them."""
    torch.manual_seed(0)
    net = convert_to_fractional(framework.neuron(), alpha=0.6, learn_alpha=True)
    x = torch.rand(8, 8, 500, generator=torch.Generator().manual_seed(0), requires_grad=True)
    spikes = framework.run(net, x)
    spikes.mean().backward()
    return [spikes.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def send_large_run(framework, threads, connection):
    torch.set_num_threads(threads)
    connection.send([t.numpy() for t in large_run(framework)])


@each_framework
@each_method
def test_a_process_that_was_made_after_the_kernels_ran(framework, method):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # OpenMP's threads are there, and do not survive a fork
    try:
        here = large_run(framework)
        context = multiprocessing.get_context(method)
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=send_large_run, args=(framework, 1 if method == "fork" else 2, theirs))
        child.start()
        theirs.close()
        there = [torch.from_numpy(values) for values in mine.recv()]
        child.join()
        assert child.exitcode == 0
        again = large_run(framework)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(there[0], here[0]) and torch.equal(there[1], here[1])
    for a, b in zip(there[2:], here[2:], strict=True):  # summed in another order by another count of threads
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert torch.equal(again[0], here[0]) and torch.equal(again[1], here[1])
    scale.record("forked and spawned processes", 1, "processes")


class Encoded(Dataset):
    """Samples that a converted model has encoded into spikes, in the workers of a loader."""

    def __init__(self, framework, net):
        self.framework, self.net = framework, net

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x = 8 * torch.randn(10, 1, INPUTS, generator=torch.Generator().manual_seed(index))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reset(self.framework, self.net)
            return index, torch.stack([self.net(step) for step in x])


def loaded(data, **options):
    return {int(i): spikes for index, batch in DataLoader(data, batch_size=2, **options) for i, spikes in zip(
        index, batch, strict=True)}  # fmt: skip


@each_framework
@each_method
def test_a_dataset_that_runs_a_converted_model_in_its_workers(framework, method):
    """Forked with the model, or sent to fresh interpreters as a pickle."""
    net = convert_to_fractional(framework.net(), alpha=0.6, learn_alpha=True)
    framework.run(net, frames())  # it holds a state with a graph
    data = Encoded(framework, net)
    alone = loaded(data)
    framework.run(net, frames())
    workers = loaded(data, num_workers=2, multiprocessing_context=method)
    assert sorted(workers) == sorted(alone) == list(range(12))
    for index, spikes in workers.items():
        assert torch.equal(spikes, alone[index])
    assert sum(spikes.sum() for spikes in alone.values()) > 10
    scale.record("samples encoded in the workers of a DataLoader", len(workers), "samples")


@each_framework
def test_a_pickle_of_a_running_model_goes_on_where_it_was(framework):
    """What a worker gets: state and history are in it, graphs are not."""
    net = convert_to_fractional(framework.net(), alpha=0.6, learn_alpha=True)
    framework.run(net, frames())
    again = pickle.loads(pickle.dumps(net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in frames():
            assert torch.equal(again(x), net(x))
