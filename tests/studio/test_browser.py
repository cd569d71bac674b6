"""The studio in a real headless Chromium; skipped by name without gradio, selenium or a browser."""

import base64
import json
import shutil
import threading
import time

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no Chromium: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402 (where there is one)
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from tests.studio.serving import served  # noqa: E402


@pytest.fixture(scope="module")
def server():
    with served() as (url, studio):
        yield url, studio


@pytest.fixture(scope="module")
def browser(server):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1500"):
        options.add_argument(option)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.get(server[0])
    yield driver
    driver.quit()


def until(browser, condition, seconds=180):
    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda _: condition())


def found(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def click(browser, selector):
    element = until(browser, lambda: next(iter(found(browser, selector)), None))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)


def tab(browser, name):
    button = next(b for b in found(browser, "button[role=tab]") if b.text.strip() == name)
    browser.execute_script("arguments[0].click()", button)


def write(browser, selector, text):
    box = until(browser, lambda: next((e for e in found(browser, selector) if e.is_displayed()), None))
    box.clear()
    box.send_keys(text)


def status(browser):
    return found(browser, "#status")[0].text


def finished(browser, button):
    """Clicks a button and waits until the pictures are there; the ids of the new ones."""
    before = {card.get_attribute("data-id") for card in found(browser, "#history .card")}
    old = [each.text for each in found(browser, "#status .bad")]

    def refused():
        return [each.text for each in found(browser, "#status .bad") if each.text not in old]

    click(browser, button)
    until(browser, lambda: refused() or len(found(browser, "#history .card")) > len(before))
    assert not refused(), status(browser)
    until(browser, lambda: status(browser).startswith("done in"))
    return [card.get_attribute("data-id") for card in found(browser, "#shown .card")]


def choose(browser, id):
    click(browser, f"#history .card[data-id='{id}'] img")
    until(browser, lambda: found(browser, f"#chosen .brush[data-id='{id}']"))


def pixels(browser, id):
    import io

    import numpy as np
    from PIL import Image

    source = found(browser, f"#history .card[data-id='{id}'] img")[0].get_attribute("src")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.asarray(image).astype(int), image.text


def drawn(browser):
    """Draws; the pixels and texts of the pictures that are shown."""
    return [pixels(browser, id) for id in finished(browser, "#draw")]


def open_all(browser):
    """Opens every accordion, then every tab in turn, whatever they are called; how many of each."""
    closed, opened, tabs = "button.label-wrap:not(.open)", 0, found(browser, "button[role=tab]")
    while found(browser, closed):  # one may hold others
        assert opened < 50, "accordions that do not open"
        click(browser, closed)
        opened += 1
    for button in tabs:
        browser.execute_script("arguments[0].click()", button)
        until(browser, lambda button=button: button.get_attribute("aria-selected") == "true", 10)
    return opened, len(tabs)


def value(browser, selector):
    """What a field of the page holds."""
    return found(browser, selector)[0].get_attribute("value")


def two_pictures(browser):
    """Ids of two pictures of the visit, drawn if they are not there."""
    if len(found(browser, "#history .card")) < 2:
        until(browser, lambda: found(browser, "#caption textarea"))  # the page is there
        finished(browser, "#draw")
    ids = sorted(int(card.get_attribute("data-id")) for card in found(browser, "#history .card"))
    return [str(id) for id in ids[:2]]


def test_create_shows_sketches_and_then_pictures_with_their_settings(browser, server):
    until(browser, lambda: found(browser, "#caption textarea"))
    examples = found(browser, "#examples button")
    browser.execute_script("arguments[0].click()", examples[-1])
    until(browser, lambda: value(browser, "#caption textarea") == examples[-1].text)
    write(browser, "#caption textarea", "a blue ring" + Keys.ENTER)
    until(browser, lambda: found(browser, "#shown .sketch img"))
    until(browser, lambda: status(browser).startswith("done in"))
    cards = found(browser, "#shown .card")
    assert len(cards) == 4 and not server[1].turns._queue, "Enter began more than the drawing"
    image, texts = pixels(browser, cards[0].get_attribute("data-id"))
    assert image.shape == (256, 256, 3)
    assert texts["caption"] == "a blue ring"
    assert json.loads(texts["dalle2_jax"])["seed"] == int(value(browser, "#seed input")) != 0
    assert found(browser, f"#chosen .brush[data-id='{cards[0].get_attribute('data-id')}']")
    download = cards[0].find_element(By.CSS_SELECTOR, "a[download]")
    assert download.get_attribute("href").startswith("data:image/png")


def test_brushing_changes_what_was_painted_and_keeps_the_rest(browser):
    id = two_pictures(browser)[0]
    choose(browser, id)
    tab(browser, "Brush")
    caption = pixels(browser, id)[1]["caption"]
    until(browser, lambda: value(browser, "#inpaint_caption textarea") == caption)
    write(browser, "#inpaint_caption textarea", "a red star")
    click(browser, "#inpaint")
    until(browser, lambda: "first paint over" in status(browser), 20)
    canvas = found(browser, "#brush")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    drag = ActionChains(browser).move_to_element_with_offset(canvas, -90, -90).click_and_hold()
    drag.move_by_offset(40, 0).release().perform()
    pixels_of = "document.querySelector('#brush').getContext('2d').getImageData(0, 0, 256, 256).data"
    painted = f"return {pixels_of}.some(x => x)"
    assert browser.execute_script(painted)
    new = finished(browser, "#inpaint")
    until(browser, lambda: found(browser, f"#chosen .brush[data-id='{new[0]}']"))
    until(browser, lambda: browser.execute_script(painted), 10)  # the strokes follow, to try again
    click(browser, "#eraser")
    browser.execute_script("document.querySelector('#brush_size').value = 50")  # also the strokes' soft edges
    canvas = found(browser, "#brush")[0]
    drag = ActionChains(browser).move_to_element_with_offset(canvas, -90, -90).click_and_hold()
    for offset in (40, -40):
        drag.move_by_offset(offset, 0)
    drag.release().perform()
    assert not browser.execute_script(painted), "the eraser left strokes"
    click(browser, "#eraser")
    (before, _), (after, _) = pixels(browser, id), pixels(browser, new[0])
    half = before.shape[0] // 2
    assert (before[half:] == after[half:]).all(), "the half that was not painted changed"
    assert (before != after).any(), "nothing was drawn anew"
    choose(browser, new[0])
    assert not browser.execute_script(painted), "the brush's strokes stayed on the next picture"


def test_variations_and_mixing(browser):
    first, second = two_pictures(browser)
    choose(browser, first)
    tab(browser, "More like it")
    assert len(finished(browser, "#vary")) == 4
    choose(browser, first)
    tab(browser, "Mix")
    click(browser, "#keep")
    until(browser, lambda: found(browser, "#kept img"))
    choose(browser, second)
    assert len(finished(browser, "#mix")) == 5
    shown = [image.is_displayed() for image in found(browser, "#shown .way img")]
    assert shown == [True] + [False] * 4
    slider = found(browser, "#shown .way input")[0]
    browser.execute_script(
        "arguments[0].value = 4; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", slider
    )
    assert found(browser, "#shown .way img")[4].is_displayed()


def test_explain_shows_every_part(browser):
    write(browser, "#caption textarea", "a blue ring")
    click(browser, "#explain")
    shown = until(browser, lambda: next(iter(found(browser, "#shown .explained")), None))
    assert [token.text for token in found(browser, "#shown .token")] == ["a", "blue", "ring"]
    assert len(found(browser, "#shown .strip")) == 3 and "kept" in shown.text
    assert len(found(browser, "#shown .path img")) > 5 and len(found(browser, "#shown .card")) == 3


def test_opening_every_accordion_and_tab_changes_nothing(browser, server):
    """Parts of a page are put together when they are first shown, and their values may change by that."""
    browser.get(server[0])
    until(browser, lambda: found(browser, "#caption textarea"))
    click(browser, "#fixed input")
    before = drawn(browser)
    opened, tabs = open_all(browser)
    assert opened >= 1 and tabs >= 2, "the page has none that were found: how does gradio write them now?"
    after = drawn(browser)
    assert len(before) == len(after) == 4
    for (image, texts), (again, said) in zip(before, after, strict=True):
        assert (image == again).all() and texts == said
    click(browser, "#explain")
    until(browser, lambda: status(browser).startswith("explained") or found(browser, "#status .bad"))
    assert found(browser, "#shown .explained"), status(browser)
    assert not [toast.text for toast in found(browser, ".toast-body")]


def test_the_archive_holds_every_picture(browser):
    import io
    import zipfile

    two_pictures(browser)
    count = len(found(browser, "#history .card"))
    click(browser, "#zip")
    link = until(browser, lambda: next(iter(found(browser, "#zip_link")), None)).get_attribute("href")
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as archive:
        names = archive.namelist()
    assert len([name for name in names if name.endswith(".png")]) == count and "commands.txt" in names


def test_an_upload_that_is_no_picture_is_refused_and_one_that_is_is_chosen(browser, tmp_path):
    from PIL import Image

    until(browser, lambda: found(browser, "#file"))
    (tmp_path / "bad.png").write_bytes(b"GIF89a no picture")
    found(browser, "#file")[0].send_keys(str(tmp_path / "bad.png"))
    until(browser, lambda: "the file is GIF; save it as PNG" in status(browser))
    (tmp_path / "large.png").write_bytes(bytes(8 * 2**20 + 1))
    found(browser, "#file")[0].send_keys(str(tmp_path / "large.png"))
    until(browser, lambda: "file of 8.1 MiB: at most 8 MiB" in status(browser))
    Image.new("1", (300, 10)).save(tmp_path / "long.png")
    found(browser, "#file")[0].send_keys(str(tmp_path / "long.png"))
    until(browser, lambda: "too long and narrow (300 x 10)" in status(browser))
    Image.new("RGB", (40, 30), "green").save(tmp_path / "good.png")
    found(browser, "#file")[0].send_keys(str(tmp_path / "good.png"))
    until(browser, lambda: status(browser).startswith("uploaded"))
    assert found(browser, "#chosen .brush")


def test_a_full_queue_is_said(browser, server):
    studio = server[1]
    until(browser, lambda: found(browser, "#draw"))
    release, entered = threading.Event(), threading.Semaphore(0)

    def wait():
        with studio.turns.turn(lambda before: entered.release()):
            entered.release()
            release.wait(60)

    threads = [threading.Thread(target=wait) for _ in range(studio.turns.most)]
    try:
        for thread in threads:
            thread.start()
            assert entered.acquire(timeout=10)
        time.sleep(0.1)
        click(browser, "#draw")
        until(browser, lambda: "the studio is busy" in status(browser), 20)
        studio.turns.most += 1
        click(browser, "#draw")
        until(browser, lambda: f"{len(threads)} before you" in status(browser), 20)
        click(browser, "#status .note button")
        until(browser, lambda: status(browser) == "stopped", 20)
    finally:
        studio.turns.most = len(threads)
        release.set()
        for thread in threads:
            thread.join()
    with studio.turns.turn():  # after the one that was stopped
        assert status(browser) == "stopped"
