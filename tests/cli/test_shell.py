"""The command as a citizen of the shell: help, completion, interrupts, pipes, exit statuses."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from autolora.cli import app, main
from autolora.cli.output import STRATEGIES
from tests.cli.shell import run

ROOT = Path(__file__).resolve().parents[2]


def command_paths() -> list[tuple[str, ...]]:
    """All commands and groups of the command line, as words."""
    found: list[tuple[str, ...]] = []

    def walk(command, words: tuple[str, ...]) -> None:
        found.append(words)
        for name, child in sorted(getattr(command, "commands", {}).items()):
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


@pytest.mark.parametrize("words", command_paths(), ids=lambda words: " ".join(words) or "autolora")
def test_every_help_has_examples(capsys, words: tuple[str, ...]) -> None:
    status, out, err = run(capsys, *words, "--help")
    assert status == 0 and err == ""
    head, _, examples = out.partition("Examples:")
    assert "Usage: autolora" in head
    assert " ".join(("autolora", *words)) in examples, "help ends with examples of this command"


@pytest.mark.parametrize("words", command_paths(), ids=lambda words: " ".join(words) or "autolora")
def test_every_help_fits_a_terminal(
    capsys, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(capsys, *words, "--help")[1].splitlines()
    assert max(map(len, lines)) <= 80
    commands = lines[lines.index("Commands:") :] if "Commands:" in lines else []
    if not words:
        assert commands and not any(line.endswith("...") for line in commands)


@pytest.mark.parametrize("words", [(), ("pool",)])
def test_without_a_command_there_is_help(capsys, words: tuple[str, ...]) -> None:
    status, out, err = run(capsys, *words)
    assert status in (0, 2)  # as typer's versions have it
    assert (out + err).startswith("Usage: autolora")


def test_wrong_options_name_the_help_to_read(capsys) -> None:
    status, out, err = run(capsys, "pool", "list", "--bogus")
    assert (status, out) == (2, "") and err.rstrip().endswith("see autolora pool list --help.")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_said(home: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m autolora pool list > /dev/full'],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "autolora: no space is left where the output goes.\n",
    )


def test_the_strategies_that_complete_are_those_that_there_are() -> None:
    from autolora.fusion import strategy_names

    assert sorted(STRATEGIES) == sorted(strategy_names())


def completion_request(line: str) -> dict[str, str]:
    """The environment by which bash asks to complete a line."""
    words = line.split(" ")
    return {
        "_AUTOLORA_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("autolora gen", ["generate"]),
        ("autolora generate --lora ne", ["neon"]),
        ("autolora generate --pool elsewhere --lora ", ["glow"]),
        ("autolora generate --pool nowhere --lora ne", []),
        ("autolora search --model ti", ["tiny"]),
        ("autolora search --model ran", ["random.yaml"]),
        ("autolora generate --strategy g", ["gated"]),
        ("autolora pool show ro", ["rocket"]),
    ],
)
def test_names_complete(home: Path, capsys, monkeypatch, line: str, expected: list[str]) -> None:
    (home / "elsewhere").mkdir()
    shutil.copy(home / "pool" / "neon.safetensors", home / "elsewhere" / "glow.safetensors")
    for name, value in completion_request(line).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == expected


def test_completion_needs_no_torch(home: Path) -> None:
    code = (
        "import sys\n"
        "from autolora.cli import main\n"
        "try:\n    main([])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffsynth', 'transformers', 'faiss'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    request = completion_request("autolora generate --lora ne")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **request},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["neon"]), done.stderr


def test_bash_completes_names(home: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    script = """
    autolora() { "$PYTHON" -m autolora "$@"; }
    eval "$(_AUTOLORA_COMPLETE=source_bash "$PYTHON" -m autolora)"
    declare -f _autolora_completion >/dev/null || exit 3
    ln -s "$LAUNCHER" autolora; PATH="$PWD:$PATH"
    COMP_WORDS=(autolora pool show el); COMP_CWORD=3
    _autolora_completion autolora
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    launcher = home / "launch"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m autolora "$@"\n')
    launcher.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "LAUNCHER": str(launcher),
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "elephant\n"), done.stderr


ODD_NAMES = ("Neon Style v2", "a$b;c&d", "it's", 'a"b', "a\\b")


@pytest.mark.parametrize(
    ("shell", "script", "expected"),
    [
        (
            "bash",
            """
            COMP_WORDS=(autolora pool show ''); COMP_CWORD=3
            _autolora_completion autolora
            printf '%s\n' "${COMPREPLY[@]}"
            """,
            [r"Neon\ Style\ v2", r"a\$b\;c\&d"],
        ),
        (
            "zsh",
            """
            _arguments() { eval "ws=( ${1[7,-3]} )"; print -rl -- "${ws[@]%:}" }
            words=(autolora pool show ''); CURRENT=4
            _autolora_completion
            """,
            ["Neon Style v2", "a$b;c&d"],
        ),
        (
            "fish",
            "complete -C 'autolora pool show '",
            # As it is to stand on the line.
            ["Neon Style v2", "a$b;c&d"],
        ),
    ],
)
def test_shells_complete_names(
    home: Path, tmp_path: Path, shell: str, script: str, expected: list[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for file in (home / "pool").iterdir():
        file.unlink()
    for name in ODD_NAMES:
        (home / "pool" / f"{name}.safetensors").write_bytes(b"x")
    launcher = home / "autolora"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m autolora "$@"\n')
    launcher.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{home}:{os.environ['PATH']}",
        "HOME": str(home),
    }
    source = subprocess.run(
        ["autolora"],
        env={**environment, "_AUTOLORA_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
    ).stdout
    (home / "completion").write_text(("compdef() { :; }\n" if shell == "zsh" else "") + source)
    done = subprocess.run(
        [shell, "-c", f"source {home}/completion\n{script}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert sorted(done.stdout.splitlines()) == expected, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(capsys, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("_AUTOLORA_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert "autolora" in script and f"complete_{shell}" in script


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_file(home: Path) -> None:
    arguments = ["generate", "cat", "--no-retrieval", "--steps", "200", "--size", "256"]
    process = subprocess.Popen(
        [sys.executable, "-m", "autolora", *arguments, "--out", "pics/"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        first = process.stderr.readline()  # said after the base model is loaded, before step one
        assert "No LoRA takes part" in first
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT, "a shell's loop around it ends as well"
    assert out == "" and err.splitlines()[-1] == "autolora: interrupted." and "Traceback" not in err
    assert not (home / "pics").exists() or os.listdir(home / "pics") == []


def test_a_reader_that_goes_away_is_no_error(home: Path) -> None:
    command = f'"{sys.executable}" -m autolora pool list --json | head -c 1 >/dev/null'
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
