"""What an artist does on the page, done by a browser."""

import io
import json
import re
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STEPS = 4


def type_prompt(page, text: str, *names: str) -> None:
    """Type a prompt and wait for the cards that fit it."""
    box = page.locator("#al-prompt textarea")
    box.fill("")
    box.press_sequentially(text)
    wanted = json.dumps(text)
    page.wait_for_function(f"document.querySelector('.al-desk').dataset.prompt === {wanted}")
    for name in names:
        page.wait_for_selector(f".al-card[data-name='{name}']")


def cards(page) -> set[str]:
    return set(page.locator(".al-card").evaluate_all("nodes => nodes.map(n => n.dataset.name)"))


def set_number(page, part: str, value: float) -> None:
    field = page.locator(f"#{part} input[type=number]").first
    field.fill(str(value))
    field.press("Tab")


def settings(page, **values: float) -> None:
    if not page.locator("#al-seed").is_visible():
        page.locator("#al-settings > button").click()
        page.wait_for_selector("#al-seed input", state="visible")
    for name, value in values.items():
        set_number(page, f"al-{name}", value)


def draw(page) -> str:
    """Press Generate, wait for the picture, and return its address."""
    before = page.locator(".al-facts").get_attribute("data-id")
    page.click("#al-generate")
    page.wait_for_function(
        f"() => {{ const id = document.querySelector('.al-facts').dataset.id;"
        f" return id && id !== {json.dumps(before)}; }}"
    )
    page.wait_for_selector("#al-generate:not([disabled])")
    return page.locator(".al-frame img").get_attribute("src")


def png(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def pixels(url: str) -> bytes:
    with Image.open(io.BytesIO(png(url))) as image:
        return image.tobytes()


def test_from_a_prompt_to_a_picture(page, shoot) -> None:
    shoot(page, "wide-empty")
    type_prompt(page, "a neon elephant on a blue background", "neon", "elephant")
    assert cards(page) == {"neon", "elephant"}
    card = page.locator(".al-card[data-name='elephant']")
    assert "elephant" in card.inner_text().lower() and "%" in card.inner_text()
    assert card.locator("img").evaluate("image => image.naturalWidth") > 0
    page.click("#al-generate")
    page.wait_for_selector(".al-frame[data-kind='preview']")
    assert re.search(r"step \d+ of 20", page.locator(".al-stage .al-doing").inner_text())
    shoot(page, "wide-preview")
    page.wait_for_selector(".al-facts [data-seed]")
    whole = page.evaluate(
        "() => { const [frame, img] = ['.al-frame', '.al-frame img']"
        ".map((part) => document.querySelector(part).getBoundingClientRect());"
        " return img.height <= frame.height && img.width <= frame.width; }"
    )
    assert whole, "nothing of the picture is cut off"
    seed = page.locator(".al-facts [data-seed]").get_attribute("data-seed")
    assert int(seed) >= 0, "the random seed is shown"
    page.click(".al-gates summary")
    page.wait_for_selector(".al-maps canvas")
    assert page.locator(".al-maps canvas").count() == 2
    page.locator(".al-maps canvas").first.hover()
    assert "step" in page.locator(".al-readout").inner_text()
    shoot(page, "wide-picture", full_page=True)
    page.click(".al-facts [data-seed]")
    settings(page)
    page.wait_for_function(f"document.querySelector('#al-seed input').value === {json.dumps(seed)}")


def test_strength_style_and_history(page, shoot) -> None:
    settings(page, seed=5, steps=STEPS)
    type_prompt(page, "an elephant on a red background", "elephant")
    plain = pixels(draw(page))
    slider = page.locator(".al-card[data-name='elephant'] input[type=range]")
    slider.focus()
    slider.press("Home")
    assert "silent" in page.locator(".al-card[data-name='elephant']").get_attribute("class")
    silent = pixels(draw(page))
    assert silent != plain
    page.click(".al-chip[data-style='neon']")
    page.wait_for_selector(".al-card[data-name='neon']")
    neon = pixels(draw(page))
    assert neon not in (plain, silent)
    shoot(page, "wide-style")
    page.wait_for_function("document.querySelectorAll('.al-past').length >= 3")
    page.locator(".al-past").nth(2).click()
    page.wait_for_selector(".al-card[data-name='neon']", state="detached")
    assert page.locator(".al-chip[data-style='base']").get_attribute("aria-pressed") == "true"
    value = "document.querySelector('.al-card[data-name=elephant] input[type=range]').value"
    page.wait_for_function(f"{value} === '1'")
    shown = page.locator(".al-frame img").get_attribute("src")
    assert pixels(shown) == plain, "the picture itself is back, too"
    assert pixels(draw(page)) == plain, "the restored settings draw the same picture"


def test_pin_drop_and_add_from_the_gallery(page, shoot) -> None:
    type_prompt(page, "a neon elephant", "neon", "elephant")
    page.click(".al-card[data-name='neon'] .al-drop")
    page.wait_for_selector(".al-card[data-name='neon']", state="detached")
    page.click(".al-card[data-name='elephant'] .al-pin")
    page.click("#al-add")
    page.locator("#al-gallery input[type=search]").fill("dragon")
    tile = "#al-gallery .al-tile[data-name='dragon']"
    page.wait_for_selector(tile)
    page.wait_for_function("document.querySelectorAll('#al-gallery .al-tile').length === 1")
    page.click(tile)
    page.wait_for_selector(f"{tile}[aria-pressed='true']")
    page.locator("#al-gallery input[type=search]").fill("")
    page.wait_for_function("document.querySelectorAll('#al-gallery .al-tile').length > 3")
    shoot(page, "wide-gallery")
    page.keyboard.press("Escape")
    type_prompt(page, "a small rose", "rose", "elephant", "dragon")
    assert cards(page) >= {"rose", "elephant", "dragon"} and "neon" not in cards(page)
    page.click(".al-gone")
    type_prompt(page, "a neon sign", "neon")


def test_a_png_dropped_on_the_page_brings_its_settings_back(page, open_page) -> None:
    settings(page, seed=12, steps=STEPS)
    type_prompt(page, "a watercolor rose", "watercolor", "rose")
    first = draw(page)
    data = list(png(first))
    other = open_page()
    other.evaluate(
        """bytes => {
            const file = new File([new Uint8Array(bytes)], 'x.png', { type: 'image/png' });
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(file);
            document.body.dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true }));
        }""",
        data,
    )
    other.wait_for_selector(".al-card[data-name='rose']")
    other.wait_for_selector(".al-toast.info")
    assert pixels(draw(other)) == pixels(first)


def test_compare_and_stop(page, shoot) -> None:
    settings(page, seed=3, steps=STEPS)
    page.locator("#al-compare input").check()
    type_prompt(page, "a neon elephant", "neon", "elephant")
    page.click("#al-generate")
    page.wait_for_function("document.querySelectorAll('.al-shot').length === 4")
    page.wait_for_selector("#al-generate:not([disabled])")
    assert len({pixels(url) for url in shot_urls(page)}) == 4
    shoot(page, "wide-compare", full_page=True)
    page.locator("#al-compare input").uncheck()
    settings(page, steps=50, count=20)
    page.click("#al-generate")
    page.wait_for_selector("#al-stop:not([disabled])")
    page.wait_for_function("document.querySelector('.al-doing').textContent.includes('step')")
    page.click("#al-stop")
    page.wait_for_selector(".al-stage[data-state='cancelled']")
    page.wait_for_selector("#al-generate:not([disabled])")


def shot_urls(page) -> list[str]:
    return page.locator(".al-shot img").evaluate_all("images => images.map(image => image.src)")


def test_the_pool_page(page, console, shoot, tmp_path: Path) -> None:
    page.get_by_role("tab").nth(1).click()
    page.wait_for_selector(".al-pool .al-tile[data-name='rose']")
    bad = tmp_path / "<img src=x onerror=alert(1)>.safetensors"
    fine = tmp_path / "broken.safetensors"
    fine.write_bytes(b"\x00" * 40)
    page.set_input_files("#al-upload", [fine])
    page.wait_for_selector(".al-status .al-problem")
    message = page.locator(".al-status .al-problem").inner_text()
    assert "broken.safetensors" in message and str(tmp_path) not in message
    bad.write_bytes(b"x")
    page.set_input_files("#al-upload", [bad])
    page.wait_for_function(
        "document.querySelector('.al-status .al-problem')?.textContent.includes('onerror')"
    )
    assert page.locator(".al-status img").count() == 0, "names are shown as text"
    page.click("#al-check")
    page.wait_for_function("document.querySelectorAll('.al-rows tr').length === 7")
    page.click(".al-pool .al-tile[data-name='rose']")
    page.wait_for_selector(".al-about h3")
    shoot(page, "wide-pool", full_page=True)
    sent = tmp_path / "glow.safetensors"
    sent.write_bytes((console.pool / "neon.safetensors").read_bytes())
    page.set_input_files("#al-upload", [sent])
    page.wait_for_function(
        "document.querySelector('.al-status .al-problem')?.textContent.includes('already')"
    )


def test_what_was_typed_outlives_a_reload(page) -> None:
    settings(page, seed=77, steps=9)
    page.click(".al-starters .al-tile")
    word = page.locator("#al-prompt textarea").input_value()
    assert word, "a picture of the pool puts its word into the prompt"
    type_prompt(page, "a neon elephant", "neon", "elephant")
    page.click(".al-card[data-name='neon'] .al-drop")
    page.wait_for_selector(".al-gone")
    # What was typed is kept a moment later; a busy machine takes longer than a click.
    kept = "() => (sessionStorage.getItem('autolora-draft') || '').includes('77')"
    page.wait_for_function(kept)
    page.reload()
    page.wait_for_selector(".al-card[data-name='elephant']")
    page.wait_for_selector(".al-gone")
    assert cards(page) == {"elephant"}
    assert page.locator("#al-prompt textarea").input_value() == "a neon elephant"
    settings(page)
    assert page.locator("#al-seed input").input_value() == "77"
    assert page.locator("#al-steps input[type=number]").input_value() == "9"
    assert page.locator(".al-toast").count() == 0


def test_the_keyboard_is_enough(page) -> None:
    settings(page, seed=1, steps=2)
    type_prompt(page, "a small rose", "rose")
    page.locator("#al-prompt textarea").press("Control+Enter")
    page.wait_for_selector(".al-facts [data-seed]")
    page.locator("#al-add").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#al-gallery .al-tile[data-name='dragon']")
    page.locator("#al-gallery .al-tile[data-name='dragon']").press("Enter")
    page.wait_for_selector("#al-gallery .al-tile[aria-pressed='true'][data-name='dragon']")
    page.keyboard.press("Escape")
    page.wait_for_selector("#al-gallery", state="detached")
    assert page.evaluate("document.activeElement.id") == "al-add", "back where it was opened"
    for part in page.locator("button:visible, input:visible, select:visible").all():
        name = part.evaluate(
            "node => node.ariaLabel || node.innerText || node.labels?.[0]?.innerText"
            " || node.closest('label')?.innerText || node.placeholder || node.title"
        )
        assert name, part.evaluate("node => node.outerHTML")


def test_html_in_a_prompt_is_text(page) -> None:
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    settings(page, seed=1, steps=1)
    type_prompt(page, "<img src=x onerror=alert(1)> <b>rose</b>", "rose")
    draw(page)
    assert "<b>rose</b>" in page.locator(".al-reads").inner_text()
    assert page.locator(".al-reads img, .al-history b").count() == 0
    page.locator("#al-prompt textarea").fill("x" * 100_000)
    page.click("#al-generate")
    page.wait_for_selector(".al-doing.al-problem")
    assert "at most" in page.locator(".al-doing.al-problem").inner_text()


def test_a_style_is_saved_and_a_changed_file_seen(page, console) -> None:
    type_prompt(page, "a neon rose", "neon", "rose")
    page.click("#al-save-style")
    page.locator(".al-chip.naming input").fill("My look")
    page.locator(".al-chip.naming input").press("Enter")
    page.wait_for_selector(".al-chip[data-style='my-look'][aria-pressed='true']")
    assert (console.styles / "my-look.yaml").is_file()
    text = "title: Changed\nadapters: [{name: dragon, strength: 0.5}]\nautomatic: false\n"
    (console.styles / "my-look.yaml").write_text(text)
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    page.wait_for_function(
        "document.querySelector('[data-style=my-look]').textContent === 'Changed'"
    )
    type_prompt(page, "a blue rose", "dragon")
    assert cards(page) == {"dragon"}


def test_narrow_dark_and_chinese(open_page, shoot) -> None:
    page = open_page(400, 860, color_scheme="dark", locale="zh-CN")
    page.wait_for_function("document.querySelector('#al-generate').textContent.trim() === '生成'")
    settings(page, seed=5, steps=STEPS)
    type_prompt(page, "a neon elephant", "neon", "elephant")
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    why = page.locator(".al-card[data-name='elephant'] .al-why").inner_text()
    assert re.search("[\u4e00-\u9fff]", why), "reasons are said in Chinese, too"
    assert page.evaluate("document.body.classList.contains('dark')")
    shoot(page, "narrow-dark-zh", full_page=True)
    page.click("#al-language")
    page.wait_for_function(
        "document.querySelector('#al-generate').textContent.trim() === 'Generate'"
    )
    page.click("#al-theme")
    assert not page.evaluate("document.body.classList.contains('dark')")
    shoot(page, "narrow-light", full_page=True)
    wide = open_page(1440, 1000, color_scheme="dark")
    settings(wide, seed=5, steps=STEPS)
    type_prompt(wide, "a neon elephant", "neon", "elephant")
    draw(wide)
    shoot(wide, "wide-dark")


def test_two_people_at_once_and_one_who_leaves(open_page, console) -> None:
    ann, bob, eve = open_page(), open_page(), open_page()
    for number, page in enumerate((eve, ann, bob)):
        settings(page, seed=100 * (number + 1), steps=3, count=3)
        type_prompt(page, "a rose" if number else "an elephant")
        page.click("#al-generate")
    eve.wait_for_selector(".al-stage[data-state='running'], .al-stage[data-state='done']")
    eve.context.close()
    for page, seed in ((ann, 200), (bob, 300)):
        page.wait_for_function("document.querySelectorAll('.al-shot').length === 3")
        page.wait_for_selector(".al-stage[data-state='done']")
        seeds = page.locator(".al-shot span").all_inner_texts()
        assert seeds == [str(seed + n) for n in range(3)]
    with urllib.request.urlopen(f"{console.url}/api/queue") as answer:
        assert json.load(answer)["jobs"] == []
