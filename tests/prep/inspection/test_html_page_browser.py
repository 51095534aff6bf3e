"""The page in a real browser: colours, light and dark, the filter, the keyboard, and what its
policy stops."""

import base64
import hashlib
import html
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from text_sets import EOS, write_text_pack

from prep.inspection.html_page import page_of

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed: apt-get install chromium"
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--window-size=1200,900",
]  # fmt: skip
QUESTION, ANSWER = "What is it? " * 20, "It is what it is.\n" * 20
CHAT = [
    ("<user>\n", "t", "0"),
    (QUESTION, "u", "0"),
    ("\n", "t", "0"),
    (ANSWER, "a", "1"),
    (EOS, "T", "1"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(
        write_text_pack(tmp_path_factory.mktemp("page") / "set", [CHAT, CHAT], max_seq_len=2000)
    )


def browse(page: str, folder: Path, *flags: str) -> str:
    """Open the page and return what the browser says of it."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [
        str(BROWSER),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        *flags,
        f"file://{folder / 'page.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(
    page: str, folder: Path, *flags: str
) -> "np.ndarray[tuple[int, int, int], np.dtype[np.int16]]":
    from PIL import Image

    browse(page, folder, f"--screenshot={folder / 'page.png'}", *flags)
    image = Image.open(io.BytesIO((folder / "page.png").read_bytes())).convert("RGB")
    return np.asarray(image).astype(np.int16)


def share(pixels: np.ndarray, stronger: int, *, by: int) -> float:
    """Return the share of pixels in which one of red, green and blue leads both others."""
    others = np.delete(pixels, stronger, axis=2).max(axis=2)
    return float((pixels[:, :, stronger] - others >= by).mean())


def driven(page: str, steps: str) -> str:
    """Return the page with steps behind its script, and a policy that lets both run."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    old, new = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, script + steps)
    )
    assert old in page
    return page.replace(old, new).replace(script, script + steps)


def title_after(page: str, folder: Path) -> str:
    title = re.findall(r"<title>(.*?)</title>", browse(page, folder, "--dump-dom"), re.DOTALL)[
        0
    ]  # those of the map follow
    return html.unescape(title)


def test_kinds_and_targets_have_their_colours_in_light_and_in_dark(
    page: str, tmp_path: Path
) -> None:
    light = picture(page, tmp_path)
    dark = picture(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    for pixels in (light, dark):
        assert pixels.shape == (900, 1200, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
        assert share(pixels, 1, by=15) > 0.03  # green: assistant, trained
        assert share(pixels, 2, by=8) > 0.01  # blue: user
        assert share(pixels, 0, by=30) > 0.0001  # orange: terminator
    assert np.median(light) > 200
    assert np.median(dark) < 60


def test_the_filter_leaves_only_what_is_trained(page: str, tmp_path: Path) -> None:
    pixels = picture(page.replace('id="only"', 'id="only" checked'), tmp_path)
    body = pixels[300:]  # below the map
    assert share(body, 2, by=8) < 0.002  # no user
    assert share(body, 1, by=15) > 0.03


def test_the_keyboard_walks_over_tokens_and_tells_what_they_are(page: str, tmp_path: Path) -> None:
    steps = """
    const text = document.querySelector(".text");
    const press = (key) => text.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    press("ArrowRight"); press("ArrowRight");
    const first = tip.textContent;
    press("t"); press("Home");
    const trained = tip.textContent;
    press("End");
    const seen = [first, trained, tip.textContent, only.checked];
    document.title = seen.join("|").replaceAll("\\n", ";");
    """
    first, trained, last, checked = title_after(driven(page, steps), tmp_path).split("|", 3)[:4]
    length = sum(len(text) for text, _, _ in CHAT[:-1]) + 1
    assert re.fullmatch(rf"id \d+;bytes 75;template, not trained;token 1 of {length}", first)
    at = sum(len(text) for text, _, _ in CHAT[:3])
    assert re.fullmatch(rf"id \d+;bytes 49;assistant, trained;token {at} of {length}", trained)
    assert re.fullmatch(
        rf"id 256;bytes 3c .* 3e;terminator, trained;token {length - 1} of {length}", last
    )
    assert checked == "true"


def test_a_script_that_gets_into_the_page_does_not_run(page: str, tmp_path: Path) -> None:
    added = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
    spoiled = page.replace("</main>", f"</main>{added}")
    assert title_after(spoiled, tmp_path) == "lettered: pack 0"
