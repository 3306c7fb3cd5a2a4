"""The progress meter writes lines away from a terminal, and nothing when silenced."""

from jaxgen.core import progress


def test_lines_count_rate_and_metrics(capsys):
    with progress.meter(4, description="fit", unit="step", every=0.0) as meter:
        for _ in range(4):
            meter.update(loss=0.123456)
        meter.write("note")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:4]] == [f"fit: {i}/4 steps" for i in range(1, 5)]
    assert lines[3].endswith("0 s left, loss 0.1235") and lines[4] == "note"


def test_quiet_until_due_but_the_last_line_always(capsys):
    with progress.meter(3, initial=1, every=1e9) as meter:
        meter.update()
        assert capsys.readouterr().err == ""
        meter.update()
    assert capsys.readouterr().err.startswith("3/3 steps")


def test_disabled_is_silent(capsys):
    with progress.meter(2, enabled=False) as meter:
        meter.update(2, loss=1.0)
        meter.write("note")
    assert capsys.readouterr().err == ""


def test_bar_where_asked(capsys):
    with progress.meter(2, enabled="bar") as meter:
        meter.update(2, loss=1.0)
        meter.write("note")
    err = capsys.readouterr().err
    assert "2/2" in err and "loss=1" in err and "note" in err
