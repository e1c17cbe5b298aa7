"""The frame of HTML pages: nothing that is shown can become markup, and nothing is loaded."""

import json

import pytest

from fxresu.html_page import escape, page, script_data

HOSTILE = "</script><script>throw 1</script><!-- <b>&\"'\u2028"
SHOW = "document.getElementById('out').textContent = JSON.parse(document.getElementById('data').text).text;"


def test_escape_covers_markup_and_quotes():
    assert escape("<a b=\"c\" d='e'>&") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;"


def test_data_is_json_and_cannot_end_its_element():
    element = script_data("data", {"text": HOSTILE})
    body = element.removeprefix('<script type="application/json" id="data">').removesuffix("</script>")
    assert "<" not in body
    assert json.loads(body) == {"text": HOSTILE}
    with pytest.raises(ValueError, match="JSON compliant"):
        script_data("data", float("nan"))


def test_script_and_style_that_end_early_are_refused():
    with pytest.raises(ValueError, match="script: contains"):
        page("t", "", script="'</SCRIPT>'")
    with pytest.raises(ValueError, match="style: contains"):
        page("t", "", style="</style>")


def test_page_opens_and_shows_hostile_text_as_text(tmp_path, open_page):
    path = tmp_path / "page.html"
    body = f'<h1>{escape(HOSTILE)}</h1><p id="out"></p>{script_data("data", {"text": HOSTILE})}'
    path.write_text(page(HOSTILE, body, script=SHOW), encoding="utf-8")
    opened = open_page(path)
    assert opened.page.title() == HOSTILE
    assert opened.page.text_content("h1") == HOSTILE
    assert opened.page.text_content("#out") == HOSTILE


def test_errors_and_requests_are_noticed_and_the_network_is_forbidden(tmp_path, open_page):
    path = tmp_path / "page.html"
    path.write_text(page("t", '<img src="other.png">', script="throw new Error('on purpose')"), encoding="utf-8")
    opened = open_page(path)
    assert any("on purpose" in e for e in opened.errors)
    assert any("Content Security Policy" in e for e in opened.errors)
    opened.errors.clear()
    opened.requests.clear()


@pytest.mark.parametrize("dark", [False, True])
def test_page_follows_the_colour_scheme(tmp_path, open_page, dark):
    path = tmp_path / "page.html"
    path.write_text(page("t", "<p>text</p>"), encoding="utf-8")
    colour = open_page(path, dark=dark).page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
