"""`alula plot-plan`: plans as text and as pictures."""

import sys
from pathlib import Path

import pytest
from alula import BlockPlan
from alula.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["plot-plan", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--tokens", "128", "--block-size", "16")
    assert (code, err) == (0, "")
    plan = BlockPlan.evaluation(128, 16, 3)
    assert out == f"{plan.describe()}\n{plan.draw()}\n"
    assert "8 blocks of 16, all heads alike" in out


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--pattern", "training", "--tokens", "1024", "--layer", "2", "--heads", "3", "--head", "1")
    plan = BlockPlan.training(1024, 64, 3, num_heads=3, layer_idx=2)
    assert run(capsys, *options)[:2] == (0, f"{plan.describe()}\n{plan.draw(1)}\n")


def test_own(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--pattern", "own", "--tokens", "200", "--block-size", "16", "--window", "5", "--causal", "--seed", "4")
    more = ("--random-blocks", "1", "--global-blocks", "0,3", "--global-tokens", "77,-1")
    plan = BlockPlan.pattern(
        200, 16, window=5, global_blocks=(0, 3), global_tokens=(77, -1), num_random_blocks=1, seed=4, is_causal=True
    )
    assert run(capsys, *options, *more)[:2] == (0, f"{plan.describe()}\n{plan.draw()}\n")


def test_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    code, out, _ = run(capsys, "--tokens", "640", "--out", str(path))
    assert code == 0
    assert str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--tokens", "100"), "4 blocks or more; 2 of 64"),
        (("--block-size", "20"), "block_size is 20"),
        (("--window", "5"), "--window belongs to --pattern own"),
        (("--layer", "5"), "--layer belongs to --pattern training"),
        (("--pattern", "own", "--window", "4"), "window is 4 blocks"),
        (("--pattern", "own", "--global-blocks", "1,x"), "'1,x' is no list of whole numbers"),
        (("--head", "3"), "head 3 of a plan for 1"),
        (("--out", "/nowhere/plan.png"), "nowhere"),
    ],
)
def test_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str) -> None:
    if "--out" in argv:
        pytest.importorskip("matplotlib")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_picture_without_matplotlib(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "--out", "plan.png")
    assert code == 2
    assert "pip install matplotlib" in err
