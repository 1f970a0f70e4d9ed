"""What stands in front of every request."""

import base64

import pytest

pytest.importorskip("gradio", reason="the console extra is not installed")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from autolora.console.guard import (
    MAX_FAILURES,
    VISIT_COOKIE,
    Access,
    Guard,
    is_loopback,
    loopback_hosts,
)
from autolora.console.server import make_access, open_socket
from autolora.errors import ConfigError


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())} {request.state.visit}")


async def welcome(socket: WebSocket) -> None:
    await socket.accept()
    await socket.close()


def guarded(access: Access, max_upload: int = 4000) -> TestClient:
    routes: list = [Route(path, echo, methods=["GET", "POST"]) for path in ("/api/x", "/api/pool")]
    routes += [WebSocketRoute("/api/socket", welcome)]
    return TestClient(Guard(Starlette(routes=routes), access, max_upload), "http://localhost")


def basic(user: str, password: str) -> dict[str, str]:
    encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {encoded}"}


def test_a_password_is_asked_for_everywhere() -> None:
    client = guarded(Access("ann", "secret pässword"))
    answer = client.get("/api/x")
    assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
    for wrong in (
        basic("ann", "secret"),
        basic("bob", "secret pässword"),
        {"Authorization": "Basic %%%"},
        {"Authorization": "Bearer secret"},
    ):
        assert client.get("/api/x", headers=wrong).status_code == 401
    assert client.get("/api/x", headers=basic("ann", "secret pässword")).status_code == 200
    assert guarded(Access("", "s")).get("/api/x", headers=basic("anyone", "s")).status_code == 200


def test_guessing_is_slow() -> None:
    client = guarded(Access("", "secret"))
    for _ in range(2 * MAX_FAILURES):
        assert client.get("/api/x").status_code == 401, "no guess: a browser before it asks"
    assert client.get("/api/x", headers=basic("a", "secret")).status_code == 200
    for _ in range(MAX_FAILURES):
        assert client.get("/api/x", headers=basic("a", "guess")).status_code == 401
    answer = client.get("/api/x", headers=basic("a", "secret"))
    assert answer.status_code == 429 and "wait" in answer.json()["error"]


def test_requests_from_other_sites_and_under_other_names_are_refused() -> None:
    client = guarded(Access(hosts=loopback_hosts("127.0.0.1")))
    assert client.get("/api/x").status_code == 200
    assert client.get("/api/x", headers={"Host": "evil.example"}).status_code == 421
    assert client.get("/api/x", headers={"Host": "[::1]:6006"}).status_code == 200
    assert client.get("/api/x", headers={"Host": "[broken"}).status_code == 421
    own = {"Origin": "http://localhost"}
    assert client.post("/api/x", headers=own).status_code == 200
    for origin in ("https://evil.example", "null", "http://localhost:81"):
        assert client.post("/api/x", headers={"Origin": origin}).status_code == 403
    assert client.post("/api/x").status_code == 200


def test_bodies_have_a_limit_also_without_a_length() -> None:
    client = guarded(Access())
    assert client.post("/api/x", content=b"x" * (1 << 20)).status_code == 200
    for content in (b"x" * ((1 << 20) + 1), iter([b"x" * (1 << 19)] * 3)):
        answer = client.post("/api/x", content=content)
        assert answer.status_code == 413 and "at most 1024 kB" in answer.json()["error"]
    assert client.post("/api/pool", content=b"x" * 4000).status_code == 200
    assert client.post("/api/pool", content=b"x" * 4001).status_code == 413


def test_web_sockets_are_closed_at_once() -> None:
    client = guarded(Access("", "secret"))
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/api/socket"):
        pass


@pytest.mark.parametrize("cookie", ["short", "x" * 65, "", 'a"b', "[]=;;"])
def test_a_cookie_of_another_kind_is_replaced(cookie) -> None:
    answer = guarded(Access()).get("/api/x", headers={"Cookie": f"{VISIT_COOKIE}={cookie}"})
    assert VISIT_COOKIE in answer.headers["set-cookie"]
    assert cookie == "" or cookie not in answer.text


def test_visitors_get_a_cookie_once_and_browsers_a_policy() -> None:
    client = guarded(Access())
    first = client.get("/api/x")
    assert (
        "HttpOnly" in first.headers["set-cookie"]
        and "SameSite=Strict" in first.headers["set-cookie"]
    )
    assert "default-src 'self'" in first.headers["content-security-policy"]
    second = client.get("/api/x")
    assert "set-cookie" not in second.headers and second.text == first.text


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("192.168.1.5", False),
        ("example.com", False),
        ("::", False),
    ],
)
def test_loopback_addresses(host, expected) -> None:
    assert is_loopback(host) is expected
    assert bool(loopback_hosts(host)) is expected


def test_a_public_console_needs_a_password_or_a_confession() -> None:
    with pytest.raises(ConfigError, match="--password"):
        make_access("0.0.0.0", "", "", False)
    assert make_access("0.0.0.0", "", "", True) == Access()
    assert make_access("0.0.0.0", "ann:a:b", "", False) == Access("ann", "a:b")
    assert make_access("127.0.0.1", "", "", False).hosts
    assert not make_access("127.0.0.1", "", "secret", False).hosts, "a proxy has another name"
    for auth in ("ann", ":secret", "ann:"):
        with pytest.raises(ConfigError, match="USER:PASSWORD"):
            make_access("127.0.0.1", auth, "", False)
    with pytest.raises(ConfigError, match="either"):
        make_access("127.0.0.1", "a:b", "c", False)


def test_a_port_in_use_is_said_in_one_sentence() -> None:
    first = open_socket("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 cannot be used") as caught:
        open_socket("127.0.0.1", port)
    assert "--port" in str(caught.value) and "\n" not in str(caught.value)
    first.close()
    open_socket("127.0.0.1", port).close()
    with pytest.raises(ConfigError, match="no address"):
        open_socket("no such host", 0)


@pytest.mark.parametrize(
    "origin", ["http://[", "http://[::1", "http://a:b:c", "null", "http://" + "a" * 5000]
)
def test_origins_that_are_none_are_another_site(client, origin: str) -> None:
    for headers in ({"Origin": origin}, {"Origin": origin, "Host": "localhost"}):
        answer = client.post("/api/cards", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 403
