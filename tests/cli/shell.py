"""Helpers for tests of the command."""

from pathlib import Path

from autolora.cli import main


def pictures(folder: Path) -> list[str]:
    """Names of the pictures below a folder."""
    return sorted(file.name for file in folder.rglob("*.png"))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its status, stdout and stderr."""
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
