"""Write the golden spikes: python compat_matrix/make_golden.py

Inputs are drawn until every charged potential keeps clear of the threshold, so that no rounding, of float32
or of another order of summation, decides over a spike: where spikes differ, the meaning differs.
"""

from __future__ import annotations

import numpy as np
import torch
from golden_cases import CASES, FOLDER, NEURONS, STEPS, Case, Golden, reference

#: At least this far from the threshold; float32 is off by less than a hundredth of it.
MARGIN = 2e-3
#: Golden spikes that hardly ever or nearly always come would hide what changes.
RATES = (0.05, 0.8)
_DRAWS = 1000


def draw(case: Case) -> Golden:
    """The first input that makes the neuron fire and rest, well away from the threshold.

    Raises:
        ValueError: if there is none.
    """
    for seed in range(_DRAWS):
        steps = np.random.default_rng(seed).integers(-24, 64, size=(STEPS, NEURONS))
        golden = reference(case, torch.from_numpy(steps / 32.0))
        rate = float(golden.spikes.double().mean())
        if golden.margin >= MARGIN and RATES[0] <= rate <= RATES[1]:
            return golden
    raise ValueError(f"no input of {_DRAWS} keeps {case.name} clear of its threshold")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.npz"):
        old.unlink()
    for case in CASES:
        golden = draw(case)
        golden.write(case.file)
        print(f"{case.name}: {int(golden.spikes.sum())} spikes, margin {golden.margin:.4f}")


if __name__ == "__main__":
    main()
