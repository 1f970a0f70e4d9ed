"""The HTTP interface, as programs use it."""

import asyncio
import base64
import io
import json
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from autolora.console.api import check_upload_name
from autolora.console.jobs import Task
from autolora.errors import PoolError
from autolora.generate.report import read_report
from autolora.lora import save_lora
from tests.conftest import random_factors


def post(client, **body):
    return client.post("/api/generate", json={"steps": 2, **body})


def test_a_picture_as_json_and_as_png(client, tmp_path: Path) -> None:
    answer = post(client, prompt="a neon elephant", seed=5, count=2)
    assert answer.status_code == 200
    first, second = answer.json()["pictures"]
    assert (first["seed"], second["seed"]) == (5, 6)
    assert {used["name"] for used in first["report"]["adapters"]} == {"neon", "elephant"}
    png = base64.b64decode(first["png"])
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (64, 64)
    served = client.get("/" + first["url"])
    assert served.content == png and served.headers["content-type"] == "image/png"
    small = client.get(f"/api/pictures/{first['id']}/small")
    assert small.headers["content-type"] == "image/webp"
    raw = client.post(
        "/api/generate",
        json={"prompt": "a neon elephant", "seed": 5, "steps": 2},
        headers={"Accept": "image/png"},
    )
    assert raw.headers["x-autolora-seed"] == "5"
    (tmp_path / "raw.png").write_bytes(raw.content)
    assert read_report(tmp_path / "raw.png")["seed"] == 5
    assert (
        "png" in first
        and post(client, prompt="x", image=False).json()["pictures"][0]["png"] is None
    )


def events_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_progress_comes_as_lines_or_server_sent_events(client) -> None:
    answer = post(client, prompt="a neon thing", seed=1, count=2, stream=True)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    events = events_of(answer.text)
    names = [event["event"] for event in events]
    assert names[-1] == "done" and names.count("picture") == 2 and "progress" in names
    assert [e["seed"] for e in events if e["event"] == "picture"] == [1, 2]
    sse = client.post(
        "/api/generate",
        json={"prompt": "a neon thing", "steps": 2},
        headers={"Accept": "text/event-stream"},
    )
    assert sse.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in sse.text.strip().split("\n\n")]
    assert blocks[-1][0] == "event: done"
    assert all(json.loads(data.removeprefix("data: ")) for _, data in blocks)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 400, "The prompt is empty"),
        ({"prompt": "x" * 100_000}, 400, "at most"),
        ({"prompt": "a cat", "steps": 500}, 400, "between 1 and 50"),
        ({"prompt": "a cat", "width": 10**9, "height": 64}, 400, "is not possible"),
        ({"prompt": "a cat", "count": 1000}, 400, "between 1 and 20"),
        ({"prompt": "a cat", "strategy": "<b>magic</b>"}, 400, "strategy"),
        ({"prompt": "a <lora:nobody:1>"}, 400, "No LoRA named 'nobody'"),
        ({"prompt": "a cat", "style": "nothing"}, 400, "no style"),
        ({"prompt": "a cat", "adapters": [{"name": "neon", "strength": 99}]}, 400, "out of range"),
        ({"prompt": 7}, 422, "prompt"),
        ({}, 422, "prompt"),
        ({"prompt": "a cat", "promt": 1}, 422, "promt"),
        ({"prompt": "a cat", "loras": ["/etc/x.safetensors"]}, 400, "no files"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_input_is_one_sentence(client, body, status, message, stream) -> None:
    answer = client.post("/api/generate", json={**body, "stream": stream})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error and "\n" not in error and len(error) < 700


def test_search_says_what_would_be_taken(client) -> None:
    answer = client.get("/api/search", params={"q": "a neon elephant", "k": 3}).json()
    assert {hit["name"] for hit in answer["hits"] if hit["chosen"]} == {"neon", "elephant"}
    assert answer["hits"][0]["why"] and answer["notes"] == []
    assert client.get("/api/search", params={"q": " "}).status_code == 400
    assert client.get("/api/search").status_code == 422


def test_cards_follow_the_typing(client) -> None:
    ask = {"prompt": "a neon elephant", "selection": {"dropped": ["neon"]}}
    names = [card["name"] for card in client.post("/api/cards", json=ask).json()["cards"]]
    assert names == ["elephant"]
    assert client.post("/api/cards", json={"prompt": " "}).json()["cards"] == []
    broken = client.post("/api/cards", json={"prompt": "a <lora:", "selection": {"pinned": [1]}})
    assert broken.status_code == 400


def test_the_pool_can_be_browsed(client) -> None:
    page = client.get("/api/pool", params={"q": "elph"}).json()
    assert [item["name"] for item in page["items"]] == ["elephant"] and page["pool"] == 3
    lora = client.get("/api/pool/neon").json()
    assert lora["triggers"] == ["neon"] and lora["strength"] == 0.7
    assert "covers" in lora and not any(str(value).startswith("/") for value in lora.values())
    assert client.get("/api/pool/nobody").status_code == 404
    assert client.get("/api/pool", params={"start": -1}).status_code == 422


def test_covers_are_served_and_nothing_else(client) -> None:
    cover = client.get("/api/cover/elephant", params={"size": 96})
    with Image.open(io.BytesIO(cover.content)) as image:
        assert image.format == "WEBP" and image.size == (96, 72)
    for path in (
        "/api/cover/neon",
        "/api/cover/rocket",
        "/api/cover/elephant?n=5",
        "/api/cover/..%2f..%2frandom",
        "/api/cover//etc/passwd",
        "/api/pictures/..%2f..%2fsecret.png",
        "/api/pictures/unknown.png",
        "/api/pictures/unknown/gates",
        "/console/static/..%2fserver.py",
        "/console/static/server.py",
    ):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert str(Path.cwd()) not in answer.text


def test_settings_are_read_from_a_png(client) -> None:
    made = post(client, prompt="a neon <b>elephant</b>", seed=8).json()["pictures"][0]
    png = base64.b64decode(made["png"])
    order = client.post("/api/settings", content=png).json()["order"]
    assert order["seed"] == 8 and {unit["name"] for unit in order["loras"]} == {"neon", "elephant"}
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    for data in (plain.getvalue(), b"", b"\x89PNG", png[: len(png) // 3]):
        answer = client.post("/api/settings", content=data)
        assert answer.status_code == 400
        assert "tmp" not in answer.json()["error"]


FOREIGN = """a (neon:1.2) cat <lora:neon:0.7> <lora:nobody:1>
Negative prompt: dogs
Steps: 3, Sampler: Euler, CFG scale: 2.5, Seed: 77, Size: 96x64, Version: v1.9.4"""


def foreign_picture(kind: str) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (8, 8))
    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_text("parameters", FOREIGN)
        image.save(file, kind, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + FOREIGN.encode("utf-16-be")
        exif[0x0131] = "a program"
        image.save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "text"])
def test_settings_of_other_programs_are_taken_over(client, kind: str) -> None:
    data = FOREIGN.encode() if kind == "text" else foreign_picture(kind)
    answer = client.post("/api/settings", content=data)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["program"] == "A1111" and found["missing"] == ["nobody"]
    assert any("Not in the pool: nobody" in note for note in found["notes"])
    order = found["order"]
    assert (order["prompt"], order["negative_prompt"]) == ("a neon cat", "dogs")
    assert (order["seed"], order["steps"], order["guidance"]) == (77, 3, 2.5)
    assert (order["width"], order["height"]) == (96, 64)
    assert order["loras"] == [{"name": "neon", "strength": 0.7}]
    assert order["retrieve"] is False


def test_a_dropped_text_gets_a_sentence_about_itself(client) -> None:
    for data in (b"just a few words", "\ufeffein Märchen".encode("utf-16"), b"\0\1\2", b"{}"):
        answer = client.post("/api/settings", content=data)
        assert answer.status_code == 400
        assert "holds no generation parameters" in answer.json()["error"]


def test_pasted_settings_are_offered(client) -> None:
    cards = client.post(
        "/api/cards", json={"prompt": FOREIGN.replace("<lora:nobody:1>", "")}
    ).json()
    assert cards["pasted"] is True and cards["cards"][0]["name"] == "neon"
    assert client.post("/api/cards", json={"prompt": "a cat"}).json()["pasted"] is False


def test_own_pictures_name_what_is_gone(client, studio, tmp_path) -> None:
    made = post(client, prompt="a neon cat", seed=8).json()["pictures"][0]
    report = read_report(io_path(tmp_path, made["png"]))
    report["adapters"][0] |= {"name": "gone", "sha256": "0" * 64}
    chunks = PngInfo()
    chunks.add_text("autolora", json.dumps(report))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    found = client.post("/api/settings", content=file.getvalue()).json()
    assert found["missing"] == ["gone"]
    assert "gone" not in [lora["name"] for lora in found["order"]["loras"]]


def io_path(folder: Path, encoded: str) -> Path:
    path = folder / "made.png"
    path.write_bytes(base64.b64decode(encoded))
    return path


def test_styles_are_listed_and_saved(client) -> None:
    by_name = {style["name"]: style for style in client.get("/api/styles").json()}
    assert by_name["base"]["missing"] == []
    assert by_name["watercolor"]["missing"] == ["watercolor"]
    saved = client.post("/api/styles?name=mine", json={"prompt": "a neon thing"})
    assert saved.status_code == 200
    assert "mine" in {style["name"] for style in client.get("/api/styles").json()}
    again = client.post("/api/styles?name=mine", json={"prompt": "a neon thing"})
    assert again.status_code == 400 and "already" in again.json()["error"]


def test_the_queue_shows_positions(client, studio) -> None:
    go = threading.Event()
    first = studio.queue.submit("z", [Task("wait", lambda job: go.wait(10))])
    second = studio.queue.submit("y", [Task("wait", lambda job: None)])
    jobs = client.get("/api/queue").json()["jobs"]
    assert [job["id"] for job in jobs] == [first.id, second.id]
    assert jobs[1]["position"] == 1 and jobs[1]["state"] == "waiting"
    go.set()
    studio.queue.wait(second, 10)
    assert client.get("/api/queue").json()["jobs"] == []


def test_every_route_is_documented(client) -> None:
    schema = client.get("/api/openapi.json").json()
    assert {"/api/generate", "/api/search", "/api/pool", "/api/styles", "/api/queue"} <= set(
        schema["paths"]
    )
    for path, methods in schema["paths"].items():
        assert all(operation.get("description") for operation in methods.values()), path
    page = client.get("/api").text
    assert "negative_prompt" in page and "POST" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.fixture
def own_pool_client(tmp_path: Path, shared_pipe, make_pool):
    """A client of a console whose pool may be changed."""
    from fastapi.testclient import TestClient

    from autolora.console.server import make_app
    from autolora.console.studio import Studio
    from autolora.pipeline import AutoLoRAPipeline

    make_pool(tmp_path / "pool")
    pipe = AutoLoRAPipeline(shared_pipe.config.with_pool(tmp_path / "pool"))
    pipe.__dict__["base"] = shared_pipe.base
    studio = Studio(pipe, tmp_path / "outputs")
    with TestClient(make_app(studio, page=False)) as client:
        yield client, tmp_path / "pool"
    studio.queue.close()


def upload(client, name: str, data: bytes):
    return client.post("/api/pool", files={"file": (name, data)})


def test_an_uploaded_lora_is_found_afterwards(own_pool_client, tiny_shapes, tmp_path) -> None:
    client, pool = own_pool_client
    header = {"modelspec.title": "Violin", "modelspec.trigger_phrase": "violin"}
    file = tmp_path / "sent.safetensors"
    save_lora(file, random_factors(tiny_shapes, 9), metadata=header)
    answer = upload(client, "violin.safetensors", file.read_bytes())
    assert answer.status_code == 200 and answer.json()["name"] == "violin"
    rows = events_of(client.post("/api/index").text)
    assert rows[-1]["state"] == "done" and rows[-1]["result"]["loras"] == 4
    chosen = client.post("/api/cards", json={"prompt": "a violin"}).json()["cards"]
    assert [card["name"] for card in chosen] == ["violin"]
    twice = upload(client, "violin.safetensors", file.read_bytes())
    other = upload(client, "other.safetensors", file.read_bytes())
    for answer in (twice, other):
        error = answer.json()["error"]
        assert answer.status_code == 400 and "violin" in error
        assert "--" not in error and str(tmp_path) not in error
    assert len(list(pool.glob("*.safetensors"))) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.safetensors", "without folders"),
        ("..\\evil.safetensors", "without folders"),
        ("/etc/evil.safetensors", "without folders"),
        (".hidden.safetensors", "without folders"),
        ("model.ckpt", r"not a .safetensors file"),
        ("x" * 300 + ".safetensors", "at most 150"),
        ("bad.safetensors", "bad.safetensors"),
    ],
)
def test_bad_uploads_leave_nothing_behind(own_pool_client, name, message, tmp_path) -> None:
    client, pool = own_pool_client
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    answer = upload(client, name, b"\x00" * 40)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error and str(tmp_path) not in error and "autolora-upload" not in error
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == before
    assert not [file for file in pool.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["", "new\nline.safetensors", "a\x00.safetensors", "a\u202eb.safetensors"]
)
def test_names_that_cannot_be_shown_are_refused(name) -> None:
    with pytest.raises(PoolError, match="cannot be added under the name"):
        check_upload_name(name)


def test_the_pool_is_checked_file_by_file(own_pool_client, tmp_path) -> None:
    client, pool = own_pool_client
    (pool / "broken.safetensors").write_bytes(b"\x00" * 30)
    (pool / "old.ckpt").write_bytes(b"x")
    rows = events_of(client.get("/api/check").text)
    problems = {row["name"]: row["problem"] for row in rows if row["problem"]}
    assert set(problems) == {"broken", "old.ckpt"}
    assert not any(str(tmp_path) in json.dumps(row) for row in rows)
    fine = next(row for row in rows if row["name"] == "neon")
    assert fine["report"]["format"] == "diffusers" and fine["total"] == 4
    assert "matched" not in fine["report"], "thousands of keys are nothing to read"


def test_a_closed_connection_ends_the_job_and_the_queue_moves_on(studio) -> None:
    """Runs a real server, as the test client knows no closed connections."""
    import uvicorn

    from autolora.console.server import make_app, open_socket

    listener = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(studio, page=False), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/generate"

    async def leave(stream: bool) -> None:
        body = {"prompt": "a neon thing", "steps": 50, "count": 20, "stream": stream}
        async with httpx.AsyncClient(timeout=60) as client:
            if stream:
                async with client.stream("POST", url, json=body) as answer:
                    await anext(answer.aiter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(url, json=body, timeout=httpx.Timeout(60, read=0.4))

    try:
        for stream in (True, False):
            asyncio.run(leave(stream))
            answer = httpx.post(url, json={"prompt": "a rocket", "steps": 1}, timeout=60)
            assert answer.status_code == 200
            assert studio.queue.active() == []
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def test_names_with_marks_of_sentences_are_kept_whole(client, studio, tmp_path) -> None:
    name = "neon; night -- a,b.safetensors"
    data = (studio.pipe.config.pool / "neon.safetensors").read_bytes()
    answer = client.post("/api/pool", files={"file": (name, data)})
    assert answer.status_code == 400
    assert answer.json()["error"] == f"{name} is in the pool already, as 'neon'."
    answer = client.post("/api/pool", files={"file": ("neon.safetensors", data[:-4])})
    assert answer.status_code == 400 and answer.json()["error"].startswith("neon.safetensors ")
    assert "--" not in answer.json()["error"]


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_without_end_are_a_sentence(client, digits: int) -> None:
    number = "9" * digits
    json_type = {"content-type": "application/json"}
    for field in ("seed", "steps", "guidance", "count", "top_k", "width"):
        body = f'{{"prompt": "a", "{field}": {number}}}'
        answer = client.post("/api/generate", content=body, headers=json_type)
        assert answer.status_code in (400, 422), (field, answer.text)
    body = f'{{"prompt": "a", "selection": {{"pinned": {{"neon": {number}}}}}}}'
    assert client.post("/api/cards", content=body, headers=json_type).status_code in (400, 422)
    assert client.get("/api/search", params={"q": "a", "k": number}).status_code in (400, 422)
