"""The masks against the truth of synthetic slides that set no threshold."""

from pathlib import Path

import pytest

from eosin.launch.bench_masks import SETS, BenchMasksConfig, mask_rows


@pytest.mark.slow
def test_the_bars_hold_on_new_slides(tmp_path: Path) -> None:
    rows = {row.name: row for row in mask_rows(BenchMasksConfig(slides=4), tmp_path)}
    assert len(rows) == 4 * len(SETS)
    for name in SETS:
        assert rows[f"tissue, {name}"].ours >= 0.945, name  # 0.95 over more slides
        assert rows[f"pen, {name}"].ours >= 0.90, name
        assert rows[f"blur, {name}"].ours >= 0.95, name
        assert min(rows[f"{what}, {name}"].ratio for what in ("tissue", "pen", "blur")) >= 1, name
    assert rows["fold, H&E"].ours >= 0.75


def test_seeds_that_set_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="those below 5000 set the thresholds"):
        BenchMasksConfig(seed=11)
