"""Writes tests/reference/ablation.json: statistics over seeds and power spectra.

    python3 -m pip install numpy scipy
    python3 scripts/reference/ablation.py

Quantiles are scipy's, intervals its `t.interval`, spectra numpy's FFT with a ring for each wave number
found by a loop over all frequencies.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

OUT = Path(__file__).resolve().parents[2] / "tests" / "reference" / "ablation.json"
random = np.random.default_rng(11)

quantiles = [float(stats.t.ppf(0.975, degrees)) for degrees in range(1, 21)]

samples = []
for count in (2, 3, 5, 11):
    values = np.round(random.normal(0.3, 0.5, count), 4)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    samples.append({"values": values.tolist(), "low": float(low), "high": float(high)})

images = np.round(random.normal(size=(2, 3, 8, 8)), 3)
side = images.shape[-1]
power = np.abs(np.fft.fft2(images, norm="forward")) ** 2
frequencies = np.fft.fftfreq(side, 1 / side)
rings = [0.0] * (side // 2 + 1)
for row, v in enumerate(frequencies):
    for column, u in enumerate(frequencies):
        radius = round(math.hypot(u, v))
        if radius < len(rings):
            rings[radius] += float(power[:, :, row, column].mean())

OUT.write_text(
    json.dumps(
        {
            "quantiles": quantiles,
            "samples": samples,
            "images": images.flatten().tolist(),
            "shape": list(images.shape),
            "spectrum": rings,
        }
    )
    + "\n"
)
print(f"{OUT.name}: {len(quantiles)} quantiles, {len(samples)} samples, {len(rings)} rings")
