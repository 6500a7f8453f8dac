"""Tables and pictures of rows."""

import builtins

import pytest

from cognexis.eval_harness.cortex_report import draw_plot, markdown_table, text_table, write_reports

ROWS = [
    {
        "task": "dyck",
        "stack": "slstm",
        "status": "done",
        "num_parameters": 12345,
        "test_accuracy": 0.9375,
        "majority_class": 0.52,
        "history": [{"val_accuracy": 0.5}, {"val_accuracy": 0.9}],
        "seconds": 61.4,
        "tokens_per_second": 20100.4,
    },
    {"task": "dyck", "stack": "smollm", "status": "left out", "reason": "no weights"},
]


def test_tables_show_figures_and_what_is_missing():
    assert markdown_table(ROWS).splitlines() == [
        "| task | stack | parameters | test accuracy | guessing | epochs | seconds | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dyck | slstm | 12,345 | 0.938 | 0.520 | 2 | 61 | 20,100 |",
        "| dyck | smollm |  | left out |  |  |  |  |",
    ]
    lines = text_table(ROWS).splitlines()
    assert lines[2] == "dyck  slstm   12,345      0.938          0.520     2       61       20,100"
    assert lines[3] == "dyck  smollm              left out"


def test_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    paths = write_reports(tmp_path, ROWS)
    assert [path.name for path in paths] == ["summary.json", "summary.md", "accuracy.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written_and_the_user_told(tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert [path.name for path in write_reports(tmp_path, ROWS)] == ["summary.json", "summary.md"]
    assert "matplotlib is not installed" in caplog.text
    assert not draw_plot(tmp_path / "a.png", ROWS)
