"""Leaky and plain integrate-and-fire neurons from spike to spike, all intervals of a run in one pass.

What ``spikede_plugins.event_intervals`` defines for closed forms, one neuron after the other: a logarithm a
spike, and one exponential an interval length. Everything is reckoned in float64. Each neuron is reckoned
alone, by the same instructions wherever it stands, so its spikes are the same to the last bit whatever stands
beside it.
"""

from __future__ import annotations

import math

import numpy as np

from spikede_plugins.engine.compiled import kernel
from spikede_plugins.engine.cpu_sums import widest
from spikede_plugins.engine.outlined import share

#: Newton steps to a crossing under a ramp, as in ``spiking_dynamics``.
_NEWTON_STEPS = 100


@kernel()
def _under_ramp(c, b, tau, span, missing):
    """The first root of c + b t + e exp(-t / tau) up to ``span``, or inf; see ``ODELIFDynamics``."""
    e = -missing - c
    convex = e > 0.0
    last = span
    if not convex and b < 0.0 and tau * b > e:
        last = min(span, -tau * math.log(tau * b / e))
    if b * last + e * math.expm1(-last / tau) - missing < 0.0:
        return math.inf
    t = last if convex else 0.0
    for _ in range(_NEWTON_STEPS):
        fall = math.expm1(-t / tau)
        rate = b - (e / tau) * (1.0 + fall)
        if not rate > 0.0:
            break
        moved = min(max(t - (b * t + e * fall - missing) / rate, 0.0), last)
        moved = min(moved, t) if convex else max(moved, t)
        if moved == t:
            break
        t = moved
    return t


@kernel()
def _wait(leaky, v, current, slope, ramp, span, rest, threshold, tau, capacity):
    """How long it takes to the first spike; inf if it is not within ``span``."""
    missing = threshold - v
    if missing <= 0.0:
        return 0.0
    if leaky:
        factor = tau / capacity
        above = rest + current * factor - threshold
        if ramp:
            tilt = slope * factor
            return _under_ramp(above - tilt * tau, tilt, tau, span, missing)
        found = tau * math.log1p(missing / above) if above > 0.0 else math.inf
    else:
        charge = missing * capacity
        found = math.inf
        if not ramp:
            if current > 0.0:
                found = charge / current
        else:
            square = current * current + 2.0 * slope * charge
            if square >= 0.0:
                root = math.sqrt(square)
                if current < 0.0:
                    if slope > 0.0:
                        found = (root - current) / slope
                elif current + root > 0.0:
                    found = 2.0 * charge / (current + root)
    return found if found <= span else math.inf


@kernel()
def _flow(leaky, v, current, slope, span, gone, rest, tau, capacity):
    """The potential after ``span``; ``gone`` is 1 - exp(-span / tau)."""
    if leaky:
        factor = tau / capacity
        change = (rest + current * factor - v) * gone
        return v + (change + slope * factor * (span - tau * gone))
    return v + (current + 0.5 * slope * span) * span / capacity


@kernel()
def events(
    leaky, currents, before, ramp, begun, duration, refractory, values, limit, v, held, counts, times, number,
    tiles, first_tile, last_tile,
):  # fmt: skip
    """Run the neurons of some tiles through all intervals.

    Args:
        leaky: whether the potential leaks; else plain integrate-and-fire.
        currents: ``[T, n]``.
        before: the current a ramp comes from in the first interval ``[n]``.
        ramp: whether the current is a ramp: 0 never, 1 always, 2 from the second interval on.
        begun: when the first interval begins.
        values: rest, threshold, reset, tau, capacity: ``[5, width]``, repeated along the neurons.
        limit: spikes of a neuron in an interval; beyond it the neuron stops.
        v, held: state ``[n]``, changed in place.
        counts: ``[T, n]``, written.
        times: ``[n, K]``: written as far as there are spikes, and room.
        number: spikes ``[n]``, written; -1 beyond the limit.
    """
    room = times.shape[1]
    width = values.shape[1]
    steps, most = currents.shape[0], widest(tiles, first_tile, last_tile)
    # A tile's own copies, each neuron's intervals in one piece: a column of the whole touches a page a row.
    inputs, spikes = np.empty((most, steps)), np.empty((most, steps))
    for tile in range(first_tile, last_tile):
        column, count = tiles[tile, 0], tiles[tile, 1]
        for k in range(steps):
            for j in range(count):
                inputs[j, k] = currents[k, column + j]
        for j in range(count):
            i = column + j
            rest, threshold, reset = values[0, i % width], values[1, i % width], values[2, i % width]
            tau, capacity = values[3, i % width], values[4, i % width]
            potential, clock, total = float(v[i]), float(held[i]), 0
            whole = -math.expm1(-duration / tau)
            near = 1e-6 * (threshold - reset)
            # While the current stays, the spike to come is known, and the potential is that of the latest
            # reset, at ``clock`` (behind us where negative): nothing is worked out until something changes.
            known, period, upcoming = math.nan, math.nan, math.inf
            for k in range(steps):
                now = inputs[j, k]
                ramped = ramp == 1 or (ramp == 2 and k > 0)
                here, begin = 0, begun + k * duration
                if ramped or now != known:
                    if clock < 0.0:
                        gone = -math.expm1(clock / tau)
                        potential = _flow(leaky, potential, known, 0.0, -clock, gone, rest, tau, capacity)
                        clock = 0.0
                    known = math.nan
                if not ramped:
                    if now != known:
                        if leaky and clock == 0.0 and potential < threshold:
                            # It goes one way: what ends well below the threshold has not crossed it.
                            end = _flow(leaky, potential, now, 0.0, duration, whole, rest, tau, capacity)
                            if end < threshold - near:
                                potential, spikes[j, k] = end, 0.0
                                continue
                        known, period = now, math.nan
                        upcoming = clock + _wait(
                            leaky, potential, now, 0.0, False, math.inf, rest, threshold, tau, capacity
                        )
                    if upcoming <= duration:
                        if math.isnan(period):
                            period = refractory + _wait(
                                leaky, reset, now, 0.0, False, math.inf, rest, threshold, tau, capacity
                            )
                        first, latest = upcoming, upcoming
                        while upcoming <= duration:
                            if total < room:
                                times[i, total] = begin + upcoming
                            total += 1
                            here += 1
                            if here > limit:
                                break
                            latest = upcoming
                            upcoming = first + here * period
                        potential = reset
                        clock = latest + refractory
                    clock -= duration
                    upcoming -= duration
                else:
                    start = float(before[i]) if k == 0 else inputs[j, k - 1]
                    slope = (now - start) / duration
                    while clock <= duration and here <= limit:
                        wait = _wait(
                            leaky, potential, start + slope * clock, slope, True, duration - clock, rest,
                            threshold, tau, capacity,
                        )  # fmt: skip
                        t = clock + wait
                        if not t <= duration:
                            break
                        if total < room:
                            times[i, total] = begin + t
                        total += 1
                        here += 1
                        potential = reset
                        clock = t + refractory
                    if clock < duration:
                        left = duration - clock
                        gone = whole if clock == 0.0 else -math.expm1(-left / tau)
                        potential = _flow(
                            leaky, potential, start + slope * clock, slope, left, gone, rest, tau, capacity
                        )
                        clock = 0.0
                    else:
                        clock -= duration
                if here > limit:
                    total = -1
                    break
                spikes[j, k] = here
            if clock < 0.0:
                gone = -math.expm1(clock / tau)
                potential = _flow(leaky, potential, known, 0.0, -clock, gone, rest, tau, capacity)
                clock = 0.0
            v[i], held[i], number[i] = potential, clock, total
        for k in range(steps):
            for j in range(count):
                counts[k, column + j] = spikes[j, k]


@kernel()
def share_events(arguments, tiles, pieces, threads, parallel):
    return share(events, arguments, tiles, pieces, threads, parallel)
