from functools import partial

import pytest

from codetr_d2_programs import report
from tests.report.tiny_report import copy_with_other_scores, write_tiny_report_run


@pytest.mark.slow
def test_one_run_and_two(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "write_run_page", partial(report.write_run_page, with_cost=False))  # takes longest
    first = write_tiny_report_run(tmp_path)
    report.main([str(first)])
    assert f"{first / 'report.html'}: open it in a browser" in capsys.readouterr().out
    assert "<title>run: report</title>" in (first / "report.html").read_text()

    second = copy_with_other_scores(first, tmp_path / "a & <b>", seed=1)
    report.main([str(first), str(second), "--output", str(tmp_path / "new" / "page.html")])
    assert "<title>run and a &amp; &lt;b>: report</title>" in (tmp_path / "new" / "page.html").read_text()
    assert not (second / "comparison.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [(["{}"], "error: {}: there is no config.yaml; name the OUTPUT_DIR"), (["a", "b", "c"], "3 runs are too many")],
)
def test_what_is_wrong_is_said(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        report.main([x.format(tmp_path) for x in arguments])
    assert stop.value.code == 2 and message.format(tmp_path) in capsys.readouterr().err
