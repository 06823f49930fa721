"""The README's third block runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flux_sd.cli import main
from flux_sd.image import open_picture

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_third_block_paints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, code = BLOCKS[2]
    assert kind == "python"
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 5 and lines[0] == "import flux_sd" and ".save(" in lines[-1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    (picture,) = tmp_path.glob("*.png")
    assert open_picture(picture).size == (128, 128)


def test_the_first_two_blocks_install_paint_and_test() -> None:
    assert [kind for kind, _ in BLOCKS[:2]] == ["sh", "sh"]
    assert 'flux-sd generate "a slice of pizza on a blue background" -o pizza.png' in BLOCKS[0][1]
    assert BLOCKS[1][1].rstrip().endswith("/pytest -n 2 --dist loadfile")


def test_no_placeholder_is_left_and_every_picture_exists() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parent.parent / picture).is_file(), picture


def test_every_command_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"flux-sd (\w+)", README)) - {"generate"}
    for command in sorted(named):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0, command
        capsys.readouterr()
