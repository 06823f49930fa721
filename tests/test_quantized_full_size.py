"""Packed stays packed at full size: FLUX dev in Q4_K and Q8_0, T5-XXL in Q8_0. Slow: gigabytes and minutes.

The peak of a whole process that loads one stage and runs it twice, file pages included, is at most 1.10 x the
file plus 1.2 GB: a second copy of the weights, or one decoded as a whole, cannot hide in that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import measure_quantized as measuring
import pytest

from flux_sd.versions import SDVersion

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]


@pytest.mark.parametrize("case", measuring.CASES, ids=str)
def test_peak_memory_of_a_stage(case: measuring.Case, tmp_path: Path) -> None:
    info = SDVersion.parse("flux-dev").info
    reason = measuring.lacking(case, info, tmp_path)
    if reason is not None:
        pytest.skip(reason)
    found = measuring.measure(case, info, tmp_path)
    print(measuring.table([found]))
    assert found.finite
    assert found.file > {"transformer": 6.7e9, "t5": 5.0e9}[case.role]
    assert found.peak <= 1.10 * found.file + 1.2e9
