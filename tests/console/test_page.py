"""The page: its form, its labels, and that it asks nobody else for anything."""

import asyncio
import re
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from autolora.console.guard import VISIT_COOKIE
from autolora.console.i18n import LABELS, LANGUAGES, label, language_of
from autolora.console.page import VALUES, Forms, part_labels
from autolora.console.server import STATIC, make_app
from autolora.errors import GenerationError
from autolora.unit import LoRAUnit


@pytest.fixture
def forms(studio) -> Forms:
    return Forms(studio)


def request(visit: str = "visitor-visitor-x", session: str = "tab"):
    return SimpleNamespace(session_hash=session, cookies={VISIT_COOKIE: visit}, headers={})


def values(**changes) -> list:
    form = dict(
        prompt="a neon elephant",
        negative="",
        seed=3,
        steps=2,
        size="64x64",
        guidance=3,
        count=1,
        strategy="",
        compare=False,
        desk=None,
    )
    assert tuple(form) == VALUES
    return list({**form, **changes}.values())


def run(forms: Forms, *form, **who) -> list:
    async def collect() -> list:
        return [shown async for shown in forms.generate(request(**who), *form)]

    return asyncio.run(asyncio.wait_for(collect(), 60))


def test_a_picture_comes_with_progress_and_the_buttons_change(forms: Forms) -> None:
    shown = run(forms, *values(steps=12))  # long enough to be seen between two looks
    stages = [stage for stage, *_ in shown]
    assert stages[-1]["state"] == "done" and stages[-1]["pictures"][0]["seed"] == 3
    assert any(stage["preview"].startswith("data:image/jpeg;base64,") for stage in stages)
    assert {stage["total"] for stage in stages} >= {12}
    first, last = shown[0][1:], shown[-1][1:]
    assert [button["interactive"] for button in first] == [False, True]
    assert [button["interactive"] for button in last] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "x" * 100_000}, "at most"),
        ({"seed": None}, "The seed must be a whole number"),
        ({"seed": 1.5}, "The seed must be a whole number"),
        ({"size": "large"}, "Size 'large' is not understood"),
        ({"size": None}, "not understood"),
        ({"guidance": None}, "guidance must be a number"),
        ({"desk": "nonsense"}, "reload the page"),
    ],
)
def test_a_wrong_form_is_one_sentence_and_the_buttons_rest(forms, changes, message) -> None:
    ((stage, generate, stop),) = run(forms, *values(**changes))
    assert stage["state"] == "failed" and message in stage["error"]
    assert generate["interactive"] and not stop["interactive"]


def test_stopping_ends_the_jobs_of_this_tab(forms: Forms, studio) -> None:
    async def stop_in_the_middle() -> list:
        seen = []
        async for stage, *_ in forms.generate(request(session="a"), *values(count=20, steps=50)):
            seen.append(stage)
            forms.stop(request(session="b"))
            if stage["done"] >= 2:
                forms.stop(request(session="a"))
        return seen

    stages = asyncio.run(asyncio.wait_for(stop_in_the_middle(), 60))
    assert stages[-1]["state"] == "cancelled" and len(stages[-1]["pictures"]) == 0
    assert studio.queue.active() == []


def test_a_tab_that_stops_listening_ends_its_job(forms: Forms, studio) -> None:
    async def leave() -> None:
        shown = forms.generate(request(), *values(count=20, steps=50))
        async for stage, *_ in shown:
            if stage["done"]:
                break
        await shown.aclose()

    asyncio.run(asyncio.wait_for(leave(), 60))
    for job in studio.queue.active():
        studio.queue.wait(job, 10)
    assert studio.queue.active() == []


def test_settings_come_back_into_the_form(forms: Forms) -> None:
    desk = {"pinned": {"rocket": 0.5}, "dropped": ["neon"], "strengths": {"elephant": 0.25}}
    run(forms, *values(desk=desk, negative="grey", size="64x80", count=2, seed=9))
    entries = forms.studio.visits.entries("visitor-visitor-x")
    event = SimpleNamespace(_data={"picture": entries[0].picture.id})
    *form, stage = forms.restore(event, request())
    assert stage["state"] == "notice" and not stage["error"]
    assert stage["picture"]["id"] == entries[0].picture.id, "the picture is shown again, too"
    restored = dict(zip(VALUES, form, strict=True))
    assert restored["seed"] == 10 and restored["count"] == 1 and restored["size"] == "64x80"
    assert restored["negative"] == "grey"
    assert {key: restored["desk"][key] for key in desk} == desk
    again = run(forms, *form)[-1][0]["pictures"][0]
    assert again["seed"] == 10


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"picture": "unknown"},
        {"order": 7},
        {"order": {"prompt": "x", "seed": -9}},
        {"order": {"prompt": "x", "evil": 1}},
        {"order": {"prompt": "x", "count": 10**9}},
    ],
)
def test_settings_that_are_none_change_nothing_and_say_so(forms: Forms, data) -> None:
    *form, stage = forms.restore(SimpleNamespace(_data=data), request())
    assert all(update.get("__type__") == "update" and len(update) == 1 for update in form)
    assert stage["state"] == "notice" and stage["error"]


def test_another_visitors_history_cannot_be_restored(forms: Forms) -> None:
    run(forms, *values())
    picture = forms.studio.visits.entries("visitor-visitor-x")[0].picture.id
    event = SimpleNamespace(_data={"picture": picture})
    stage = forms.restore(event, request(visit="somebody-else-xxx"))[-1]
    assert "not in the history of this visit" in stage["error"]


def test_a_style_is_saved_under_a_name_made_from_its_title(forms: Forms) -> None:
    desk = {"pinned": {"rocket": 0.5}, "automatic": False, "save_as": "Ink & Über 墨!"}
    value = forms.save_style("", "sum", desk)
    assert value["style"] == "ink-über-墨" and value["pinned"] == {}
    assert value["saved"] == "Ink & Über 墨!"
    style = forms.studio.styles.get("ink-über-墨")
    assert style.loras == (LoRAUnit("rocket", 0.5),) and style.strategy == "sum"
    assert style.title["zh"] == "Ink & Über 墨!"
    for name in ("", "../..", "Ink & Über 墨!"):
        refused = forms.save_style("", "", {**desk, "save_as": name})
        assert refused["problem"] and refused["pinned"] == {"rocket": 0.5}


def test_sizes_keep_the_number_of_pixels(forms: Forms) -> None:
    sizes = [tuple(map(int, size.split("x"))) for size in forms.sizes()]
    assert sizes[0] == (64, 64)
    assert all(side % 16 == 0 and side >= 64 for size in sizes for side in size)


def test_all_languages_say_everything() -> None:
    assert set(LABELS) == set(LANGUAGES)
    places = re.compile(r"\{\w+\}")
    for key, english in LABELS["en"].items():
        for language in LANGUAGES:
            assert sorted(places.findall(label(language, key))) == sorted(places.findall(english))
    assert language_of("zh-CN,zh;q=0.9") == "zh" and language_of("fr") == "en" == language_of("")


def test_scripts_only_use_labels_that_exist() -> None:
    used = set()
    for file in STATIC.glob("*.js"):
        text = file.read_text(encoding="utf-8")
        used |= set(re.findall(r"\bt\(\"(\w+)\"", text))
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text, file.name
    assert used and used <= set(LABELS["en"])


def test_no_label_is_left_over() -> None:
    files = [*STATIC.glob("*.js"), STATIC.parent / "page.py"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    built = {f"{kind}_{name}" for kind, name in re.findall(r"`(from|channel)_\$\{(\w+)", text)}
    assert built == {"from_card", "channel_name"}, "labels whose names are put together"
    for key in LABELS["en"]:
        put_together = key.startswith(("from_", "channel_"))
        assert put_together or re.search(rf"[\"'`]{key}[\"'`]", text), key


def test_the_page_asks_nobody_else_for_anything(studio) -> None:
    with TestClient(make_app(studio)) as client:
        page = client.get("/")
        assert page.status_code == 200
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"([^\"]+)\"", page.text)
        assert loaded and not [
            url for url in loaded if re.match(r"(https?:)?//(?!testserver)", url)
        ]
        assert "script-src 'self'" in page.headers["content-security-policy"]
        for path in ("/console/static/main.js", "/console/static/style.css", "/favicon.ico"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert not re.findall(r"(?:url\(|from \"|import\(\")https?://", answer.text)
        for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml"):
            assert client.get(path).status_code in (403, 404)


@pytest.mark.parametrize("language", list(LANGUAGES))
def test_labels_come_in_every_language(forms: Forms, language) -> None:
    event = SimpleNamespace(language=language)
    *updates, strategies = forms.relabel(event)
    said = dict(zip(part_labels(language), updates, strict=True))
    assert said["generate"]["value"] == label(language, "generate")
    assert said["prompt"]["placeholder"] == label(language, "prompt_hint")
    assert strategies["choices"][0] == (label(language, "by_style"), "")
    assert {("gated", "gated"), ("sum", "sum")} <= set(strategies["choices"])


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [("", "zh-CN,zh", "zh"), ("en", "zh", "en"), ("zh", "en", "zh"), ("<x>", "fr", "en")],
)
def test_the_chosen_language_comes_before_the_browsers(forms, cookie, accepted, language) -> None:
    asked = SimpleNamespace(
        cookies={"autolora_language": cookie}, headers={"accept-language": accepted}
    )
    said = dict(zip(part_labels(language), forms.first_labels(asked), strict=True))
    assert said["stop"]["value"] == label(language, "stop")
    assert forms.first_strategies(asked)["choices"][0] == (label(language, "by_style"), "")


def test_orders_that_cannot_be_are_not_orders(forms: Forms) -> None:
    with pytest.raises(GenerationError):
        forms.order(*values(count=21))
