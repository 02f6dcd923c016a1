"""The study: resumed and in other batches it ends with the same numbers; its statistics are what they are called."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from small_networks import command, tiny_study

from attacks import robustness_experiment
from attacks.robustness_report import Report
from attacks.robustness_study import few_of
from attacks.scores import SCORES
from attacks.settings import RobustnessSettings
from attacks.statistics import (
    against,
    area,
    breaking_budget,
    cumulative,
    explanation_rate,
    paired_bootstrap,
)
from attacks.thresholds import TAU
from srd_lab.metrics.summary import holm

ATTACK = ["attack", "--method", "gradient", "--method", "sobel", "--attack", "standard", "--pairs", "2"]


def rows(folder: Path, method: str) -> list[dict[str, str]]:
    (file,) = folder.rglob(f"{method}/images.csv")
    return list(csv.DictReader(file.read_text().splitlines()))


def stored(uri: str, run: str, method: str) -> list[dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    ids = [e.experiment_id for e in client.search_experiments()]
    children = client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{run}'")
    (child,) = [c for c in children if c.info.run_name == method]
    return list(
        csv.DictReader(
            Path(client.download_artifacts(child.info.run_id, "images.csv")).read_text().splitlines()
        )
    )


@pytest.mark.slow
def test_what_a_smaller_budget_reaches_is_within_a_larger_one() -> None:
    curve = {1.0: np.array([0.5, 0.7]), 2.0: np.array([0.6, 0.3]), 0.5: np.array([0.9, 0.8])}
    found = Report(RobustnessSettings(), "", [])._lowest(curve)
    assert list(found) == [0.5, 1.0, 2.0]
    assert [mean for mean, *_ in found.values()] == pytest.approx([0.85, 0.6, 0.4])
    assert found[1.0][1:] == (0.5, 0.7)


def test_a_resumed_run_and_other_batches_end_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of one, interrupted in the second method, and resumed: equal; in one batch of two: to rounding."""
    tiny_study(monkeypatch, steps=1, queries=4)
    for size in ("1", "2"):
        options = ["--batch-size", size, "--device", "cpu", "--no-track", "--out", str(tmp_path / size)]
        whole = command(*ATTACK, *options)
        assert whole.exit_code == 0, whole.output

    uri, calls = f"sqlite:///{tmp_path / 'mlflow.db'}", list[int]()
    run = robustness_experiment.Experiment.run

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(robustness_experiment.Experiment, "run", interrupted)
    stopped = command(*ATTACK, "--batch-size", "1", "--device", "cpu", "--tracking-uri", uri)
    assert stopped.exit_code == 1
    name = re.search(r"srd-lab attack --resume (\w+)", stopped.output)
    assert name, stopped.output
    resumed = command("attack", "--resume", name[1], "--tracking-uri", uri, "--device", "cpu")
    assert resumed.exit_code == 0, resumed.output
    assert len(calls) == 5  # three were stored, the fourth was interrupted and is done again

    for method in ("gradient", "sobel"):
        alone, together = (rows(tmp_path / size, method) for size in ("1", "2"))
        assert {f"worst/{score}" for score in SCORES} <= set(alone[0])
        assert stored(uri, name[1], method) == alone
        for a, b in zip(alone, together, strict=True):
            assert (a["original"], a["target"], a["kept"]) == (b["original"], b["target"], "True")
            assert float(a["violation"]) <= 1 + 1e-4
            for column in a:  # steps along a gradient that jumps make more of the last digit
                if column.startswith(("worst/", "member/", "control/")):
                    assert float(a[column]) == pytest.approx(float(b[column]), abs=0.03), column


@pytest.mark.parametrize("attack", ["combined", "eq10"])
def test_methods_that_refuse_the_network_are_left_out_and_named(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_study(monkeypatch, steps=1, queries=4)
    common = ["--attack", attack, "--steps", "1", "--pairs", "2", "--device", "cpu", "--no-track"]
    if attack != "eq10":
        del common[2:4]
    both = ["attack", "--method", "attention_rollout", "--method", "gradient", *common]
    done = command(*both, "--out", str(tmp_path / "both"))
    assert done.exit_code == 0, done.output
    assert "attention_rollout does not go with this network: the network has no attention" in done.output
    assert rows_of_parts(tmp_path / "both") == ["gradient"]
    none = command("attack", "--method", "attention_rollout", *common, "--out", str(tmp_path / "none"))
    assert none.exit_code == 1
    assert none.output.startswith("Error: no method goes with vgg16: the network has no attention"), (
        none.output
    )
    assert not (tmp_path / "none").exists()


def rows_of_parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


# --- statistics -----------------------------------------------------------------------------------


def test_the_paired_bootstrap_is_its_literal_loop() -> None:
    chance = np.random.default_rng(5)
    difference = chance.normal(0.1, 0.3, 11)
    low, high, p = paired_bootstrap(difference, seed=3, resamples=400)
    drawn = np.random.default_rng(3).integers(11, size=(400, 11))
    means = [sum(difference[i] for i in row) / 11 for row in drawn.tolist()]
    below, above = sum(m <= 0 for m in means), sum(m >= 0 for m in means)
    assert p == pytest.approx(min(1, 2 * (1 + min(below, above)) / 401))
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    assert 0 < p < 1


def test_the_bootstrap_at_its_ends() -> None:
    low, high, p = paired_bootstrap(np.full(6, 0.2), 0)
    assert (low, high) == pytest.approx((0.2, 0.2))
    assert p == pytest.approx(2 / 10_001)
    assert paired_bootstrap(np.zeros(6), 0) == (0, 0, 1)
    assert np.isnan(paired_bootstrap(np.array([0.3]), 0)).all()
    mirrored = paired_bootstrap(-np.full(6, 0.2), 0)
    assert mirrored == pytest.approx((-0.2, -0.2, p))
    assert paired_bootstrap(np.array([-1.0, 1.0] * 20), 0)[2] > 0.5


def test_the_bootstrap_keeps_its_level() -> None:
    """Of 200 samples without a difference about 5 % are called one."""
    chance = np.random.default_rng(0)
    found = [paired_bootstrap(chance.normal(0, 1, 40), seed, 500)[2] < 0.05 for seed in range(200)]
    assert 2 <= sum(found) <= 24


def test_holm_by_hand() -> None:
    p = np.array([0.04, 0.01, np.nan, 0.03, 0.9])
    np.testing.assert_allclose(holm(p), [0.09, 0.04, np.nan, 0.09, 0.9])
    np.testing.assert_allclose(holm(np.array([0.5, 0.6])), [1, 1])
    assert len(holm(np.array([]))) == 0


def test_methods_against_the_reference() -> None:
    chance = np.random.default_rng(0)
    base = chance.uniform(0.3, 0.6, 30)
    worst = {
        "better": base + 0.1 + chance.normal(0, 0.02, 30),
        "srd": base,
        "same": base + chance.normal(0, 0.02, 30),
        "worse": base - 0.05 + chance.normal(0, 0.02, 30),
    }
    found = {d.method: d for d in against(worst, "pcc", 0)}
    assert list(found) == ["better", "same", "worse"]
    verdicts = {"better": "more robust", "same": "open", "worse": "less robust"}
    raw = np.array([d.p for d in found.values()])
    for d, corrected in zip(found.values(), holm(raw), strict=True):
        assert (d.reference, d.score, d.n) == ("srd", "pcc", 30)
        assert d.verdict == verdicts[d.method]
        assert d.difference == pytest.approx((worst[d.method] - base).mean())
        assert d.low <= d.difference <= d.high
        assert d.p_corrected == pytest.approx(corrected)
    assert found["better"].p_corrected > found["better"].p
    assert {d.reference for d in against({"a": base, "b": base}, "pcc", 0)} == {"a"}
    assert against({"a": base}, "pcc", 0) == []


def test_checks_cost_no_more_than_a_quarter_of_the_images_once_there_are_16() -> None:
    assert [few_of(n) for n in (1, 3, 4, 8, 19, 20, 32, 64, 100, 1000)] == [1, 3, 4, 4, 4, 5, 8, 16, 16, 16]


def test_the_rate_counts_what_is_at_least_the_threshold() -> None:
    for score in SCORES:
        tau = TAU[score]
        held = explanation_rate(np.array([tau - 1e-6, tau, 1.0, -1.0, np.nan]), score)
        assert held.tolist() == [False, True, True, False, False]


def test_area_by_hand() -> None:
    """Means 1, .5, .5 at 1, 2, 8: over the logarithm, 1 part at .75 and 2 parts at .5."""
    curve = {8.0: np.array([0.5, 0.5]), 1.0: np.array([1.0, 1.0]), 2.0: np.array([0.4, 0.6])}
    assert cumulative(curve)[8.0].tolist() == [0.4, 0.5]
    means = [1.0, 0.5, 0.45]
    expected = ((means[0] + means[1]) / 2 * 1 + (means[1] + means[2]) / 2 * 2) / 3
    assert area(curve) == pytest.approx(expected)
    assert np.isnan(area({1.0: np.ones(2)}))
    assert area({1.0: np.full(3, 0.7), 100.0: np.full(3, 0.7)}) == pytest.approx(0.7)


def test_the_breaking_budget_by_hand() -> None:
    """Image by image: broken at 1, at 2 and back above it at 4, at 4, never, never."""
    tau = TAU["pcc"]
    low, high = tau - 0.1, tau + 0.1
    curve = {
        2.0: np.array([low, low, high, high, high]),
        4.0: np.array([low, high, low, high, high]),
        1.0: np.array([low, high, high, high, tau]),
    }
    assert breaking_budget(curve) == 4
    assert breaking_budget({size: values[1:] for size, values in curve.items()}) == np.inf
    assert breaking_budget({size: values[:2] for size, values in curve.items()}) == 2
    assert breaking_budget({1.0: np.array([tau])}) == np.inf
    between = {1.0: np.array([(TAU["pcc"] + TAU["ssim"]) / 2])}
    assert breaking_budget(between, "pcc") != breaking_budget(between, "ssim")


@pytest.mark.parametrize(("images", "settled"), [(4, False), (20, True)])
def test_few_images_settle_nothing_however_sure_the_bootstrap_is(images: int, settled: bool) -> None:
    """Four differences of one sign have a bootstrap p of 2e-4; the exact test of their signs cannot fall below 1/8."""
    scores = np.linspace(0.1, 0.9, images)
    worst = {"srd": scores, "other": scores / 2, "third": scores / 3}
    differences = against(worst, "pcc", 0)
    assert paired_bootstrap(scores / 2, 0)[2] < 0.001
    exact = scipy.stats.wilcoxon(worst["other"] - scores, method="exact").pvalue
    assert all(d.p == pytest.approx(max(exact, 2 / 10_001), rel=1e-6) for d in differences)
    assert [d.verdict for d in differences] == 2 * ["less robust" if settled else "open"]
    *_, note = Report(RobustnessSettings(), "some", [])._compared(differences)
    assert isinstance(note, str)
    assert ("No test can settle any of 2 comparisons with 4 images" in note) != settled
