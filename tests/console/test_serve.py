"""The command ``autolora serve``, up to where it would begin to answer."""

import pytest

pytest.importorskip("gradio", reason="the console extra is not installed")

from autolora.cli import main
from autolora.console import server
from autolora.console.guard import Access
from autolora.console.server import open_socket


def test_a_console_for_everybody_needs_a_password(capsys) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--password" in error and "--i-know" in error


def test_a_port_in_use_ends_with_one_sentence(capsys) -> None:
    listener = open_socket("127.0.0.1", 0)
    port = str(listener.getsockname()[1])
    assert main(["serve", "--port", port]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"Port {port}" in error
    listener.close()


@pytest.mark.parametrize(
    "arguments", [["--model", "nothing"], ["--auth", "ann"], ["--port", "70000"], ["--port", "x"]]
)
def test_wrong_options_end_with_one_sentence(capsys, arguments) -> None:
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_options_reach_the_server(monkeypatch, tmp_path, capsys) -> None:
    seen = {}

    def answer(studio, listener, access) -> None:
        seen.update(studio=studio, port=listener.getsockname()[1], access=access)

    monkeypatch.setattr(server, "serve", answer)
    options = ["--port", "0", "--auth", "ann:secret", "--outputs", str(tmp_path / "o")]
    assert main(["serve", *options, "--pool", str(tmp_path), "--host", "0.0.0.0"]) == 0
    assert seen["access"] == Access("ann", "secret")
    assert seen["studio"].pipe.config.pool == tmp_path
    assert seen["studio"].pictures.folder == tmp_path / "o"
    assert f":{seen['port']}" in capsys.readouterr().err
