"""What stands in front of every request: who may ask, from where, how much, how often.

A console on somebody's machine can be reached by every web page that person looks at, so a request
must name this server as its host (against DNS rebinding) and, where it changes something, come
from our own page or from no page at all (against cross-site requests). With a password, nothing at
all is answered without it. The content policy keeps browsers from fetching anything elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

VISIT_COOKIE = "autolora_visit"
MAX_BODY = 1 << 20
MAX_FAILURES = 10
FAILURE_SECONDS = 60.0
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; media-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)


class BodyTooLarge(Exception):
    """A request's body went over its limit while it was read."""


@dataclass(frozen=True)
class Access:
    """Who may use the console.

    Attributes:
        user: User name; empty lets any name pass with the password.
        password: Password; empty asks for none.
        hosts: Names that requests may be addressed to; empty for any.
    """

    user: str = ""
    password: str = ""
    hosts: Sequence[str] = ()

    def allows(self, authorization: str) -> bool:
        """Tell whether an ``Authorization`` header has the right name and password."""
        if not self.password:
            return True
        kind, _, encoded = authorization.partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            decoded = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            return False
        user, colon, password = decoded.partition(":")
        right_user = not self.user or hmac.compare_digest(user.encode(), self.user.encode())
        right_password = hmac.compare_digest(password.encode(), self.password.encode())
        return bool(colon) and right_user and right_password


@dataclass
class Failures:
    """Counts wrong passwords by address, so that guessing is slow."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def too_many(self, address: str) -> bool:
        """Tell whether an address has to wait."""
        now = time.monotonic()
        recent = [when for when in self.seen.get(address, ()) if now - when < FAILURE_SECONDS]
        if recent:
            self.seen[address] = recent
        else:
            self.seen.pop(address, None)
        return len(recent) >= MAX_FAILURES

    def add(self, address: str) -> None:
        """Count a wrong password."""
        if len(self.seen) > 10_000:
            self.seen.clear()
        self.seen.setdefault(address, []).append(time.monotonic())


class Guard:
    """ASGI middleware that lets only proper requests through."""

    def __init__(self, app: ASGIApp, access: Access, max_upload: int) -> None:
        """Guard an application.

        Args:
            app: What is guarded.
            access: Who may use it.
            max_upload: Largest upload of a file in bytes.
        """
        self.app = app
        self.access = access
        self.max_upload = max_upload
        self.failures = Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        limit = self._limit(scope["path"])
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            await _refuse(send, 413, _too_large(limit))
            return
        await self._pass(scope, receive, send, headers, limit)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, limit: int
    ) -> None:
        visit = _visit(headers)
        fresh = visit is None
        scope.setdefault("state", {})["visit"] = visit = visit or secrets.token_urlsafe(18)
        body = _Counted(receive, limit)
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            if body.over and not started:
                return  # what the application makes of half a body
            if message["type"] == "http.response.start":
                started = True
                _finish(MutableHeaders(scope=message), visit if fresh else None)
            await send(message)

        with contextlib.suppress(BodyTooLarge):
            await self.app(scope, body.read, tell)
        if body.over and not started:
            await _refuse(send, 413, _too_large(limit))

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence where a request is not let through."""
        host = _host_name(headers.get("host", ""))
        if self.access.hosts and host not in self.access.hosts:
            return 421, "This server does not answer to that host name."
        address = (scope.get("client") or ("", 0))[0]
        if self.access.password:
            if self.failures.too_many(address):
                return 429, "Too many wrong passwords; wait a minute."
            given = headers.get("authorization", "")
            if not self.access.allows(given):
                if given:
                    self.failures.add(address)
                return 401, "A user name and password are needed."
        origin = headers.get("origin")
        foreign = origin is not None and _place(origin) != headers.get("host", "").lower()
        if scope["method"] not in _SAFE and foreign:
            return 403, "Requests from other web sites are not taken."
        return None

    def _limit(self, path: str) -> int:
        uploads = path.rstrip("/").endswith("/api/pool")
        pictures = path.rstrip("/").endswith(("/api/settings", "/api/generate", "/upload"))
        return self.max_upload if uploads else 64 * MAX_BODY if pictures else MAX_BODY


def loopback_hosts(host: str) -> tuple[str, ...]:
    """Names for a server that only this machine can reach; empty where others can."""
    if not is_loopback(host):
        return ()
    return ("localhost", "127.0.0.1", "::1", host.lower())


def is_loopback(host: str) -> bool:
    """Tell whether an address can only be reached from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _place(origin: str) -> str:
    """Host and port of an origin; empty where it is none, such as ``http://[``."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _visit(headers: Headers) -> str | None:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(VISIT_COOKIE)
    except CookieError:
        return None
    return cookie.value if cookie is not None and 16 <= len(cookie.value) <= 64 else None


def _finish(headers: MutableHeaders, visit: str | None) -> None:
    headers.setdefault("Content-Security-Policy", _POLICY)
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    if visit is not None:
        cookie = f"{VISIT_COOKIE}={visit}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
        headers.append("Set-Cookie", cookie)


class _Counted:
    """A body that is counted while it is read, as not every request says its length."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self.over = False

    async def read(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.over = True
            raise BodyTooLarge
        return message


def _too_large(limit: int) -> str:
    size = f"{limit / (1 << 30):.1f} GB" if limit >= 1 << 30 else f"{limit >> 10} kB"
    return f"The request is too large; at most {size} are taken."


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="AutoLoRA", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
