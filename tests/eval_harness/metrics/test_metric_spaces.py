"""The modules for the library `evaluate`: loaded by path, with the numbers of the functions they are made of."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.depth_results import DEPTH_METRICS, DepthOptions
from cognexis.eval_harness.metrics.metric_spaces import metric_path, space_files, write_metric_space

evaluate = pytest.importorskip("evaluate")

SPACES = Path(__file__).parents[3] / "hub_assets" / "metrics"
POINTS = {"depths": [8, 1, 2, 4], "scores": [0.69, 0.50, 0.70, 0.72], "compute": [80, 10, 20, 40]}
every_metric = pytest.mark.parametrize("name", DEPTH_METRICS)


@pytest.fixture(scope="module")
def metrics():
    return {name: evaluate.load(str(SPACES / name)) for name in DEPTH_METRICS}


def examples():
    """Scores of 20 examples at 4 depths, shuffled by depth."""
    generator = np.random.default_rng(0)
    depths = np.repeat([4, 1, 8, 2], 20)
    scores = generator.random(80) + 0.05 * depths
    return {"depths": depths.tolist(), "scores": scores.tolist(), "compute": (10.0 * depths).tolist()}


@every_metric
def test_published_files_are_what_the_package_writes(name):
    for file, text in space_files(name).items():
        assert (SPACES / name / file).read_text("utf-8") == text


@every_metric
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"direction": "lower_is_better", "tolerance": 0.01, "threshold": 0.005, "compute_unit": "GFLOPs"},
        {"definition": "threshold", "form": "baseline", "threshold": 0.005},
    ],
)
def test_numbers_equal_those_of_the_functions(metrics, name, settings):
    expected = DEPTH_METRICS[name](*POINTS.values(), DepthOptions(**settings))
    assert metrics[name].compute(**POINTS, **settings) == expected


@every_metric
def test_intervals_equal_those_of_the_functions(metrics, name):
    settings = {"confidence_level": 0.9, "num_resamples": 50, "seed": 3}
    expected = DEPTH_METRICS[name](*examples().values(), DepthOptions(**settings))
    assert expected[f"{name}_confidence_interval"] is not None
    assert metrics[name].compute(**examples(), **settings) == expected


def test_golden_values(metrics):
    def result(name, **settings):
        return metrics[name].compute(**POINTS, **settings)

    assert result("depth_efficiency_index")["depth_efficiency_index"] == pytest.approx([0.02, 0.001, -0.00075])
    points = result("loop_saturation_point", threshold=0.005)
    assert points["loop_saturation_point"] == 2
    assert points["loop_saturation_point_by_definition"] == {"max_dei": 2, "threshold": 2, "baseline_argmax": 2}
    overthinking = result("overthinking_threshold", tolerance=0.01)
    assert (overthinking["overthinking_threshold"], overthinking["first_harmful_depth"]) == (4, 8)
    assert result("depth_gain_ratio")["depth_gain_ratio"] == pytest.approx(0.38)


def test_four_metrics_combine_and_ignore_keywords_of_others(metrics):
    combined = evaluate.combine([str(SPACES / name) for name in DEPTH_METRICS])
    options = {"tolerance": 0.01, "threshold": 0.005}
    expected = {}
    for function in DEPTH_METRICS.values():
        expected |= function(*POINTS.values(), DepthOptions(**options))
    assert combined.compute(**POINTS, **options, use_stemmer=True) == expected


@every_metric
def test_a_misspelt_keyword_is_not_ignored(metrics, name):
    with pytest.raises(ValueError, match="did you mean direction"):
        metrics[name].compute(**POINTS, directon="lower_is_better")


def test_missing_compute_is_an_error_where_it_is_needed(metrics):
    points = {"depths": [1, 2], "scores": [0.4, 0.5]}
    for name in ("depth_efficiency_index", "loop_saturation_point"):
        with pytest.raises(ValueError, match=f"compute: missing; {name} needs"):
            metrics[name].compute(**points)
    assert metrics["depth_gain_ratio"].compute(**points)["depth_gain_ratio"] == pytest.approx(0.25)
    assert metrics["overthinking_threshold"].compute(**points)["overthinking_threshold"] is None
    with pytest.raises(ValueError, match="scores: missing"):
        metrics["depth_gain_ratio"].compute(depths=[1])


@every_metric
def test_undefined_results_are_strict_json(metrics, name):
    result = metrics[name].compute(depths=[3], scores=[0.5], compute=[1.0])
    assert result[name] in (None, [])
    json.dumps(result, allow_nan=False)


def test_entries_can_be_added_one_by_one(metrics):
    metric = metrics["depth_gain_ratio"]
    for depth, score in ((1, 2.0), (4, 3.0)):
        metric.add_batch(depths=[depth], scores=[score])
    assert metric.compute()["depth_gain_ratio"] == 0.5


@every_metric
def test_module_needs_no_cognexis(name, tmp_path):
    place = write_metric_space(name, tmp_path)
    source = (place / f"{name}.py").read_text("utf-8")
    assert not re.search(r"^\s*(from|import) .*cognexis", source, re.MULTILINE)
    code = (
        "import sys, types; sys.modules['cognexis'] = None\n"
        "for name in ('evaluate', 'datasets'): sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['evaluate'].Metric = object\n"
        f"import runpy; module = runpy.run_path({str(place / f'{name}.py')!r})\n"
        f"print(module['{DEPTH_METRICS[name].__name__}']([1, 2], [1.0, 3.0], [1, 2], "
        f"module['DepthOptions']())['{name}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == {"depth_gain_ratio": "2.0", "depth_efficiency_index": "[2.0]"}.get(
        name, "2" if name == "loop_saturation_point" else "None"
    )


@every_metric
def test_card_has_the_fields_of_a_space(name):
    card = (SPACES / name / "README.md").read_text("utf-8")
    fields = yaml.safe_load(card.split("---")[1])
    assert fields["sdk"] == "gradio" and fields["app_file"] == "app.py"
    assert {"evaluate", "metric"} <= set(fields["tags"]) and fields["description"]


def test_path_helper_writes_once_and_works_anywhere(monkeypatch, tmp_path):
    monkeypatch.setattr("cognexis.eval_harness.metrics.metric_spaces.HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = metric_path("depth_gain_ratio")
    written = (place / "depth_gain_ratio.py").stat().st_ino
    assert metric_path("depth_gain_ratio") == place and (place / "depth_gain_ratio.py").stat().st_ino == written
    (place / "app.py").unlink()
    assert metric_path("depth_gain_ratio") == place and (place / "app.py").exists()


def test_unknown_metric_is_refused():
    with pytest.raises(InvalidConfigError, match="depth_efficiency_index, loop_saturation_point"):
        metric_path("depth_gain")
