"""The site of the docs: built strictly, whole, without the network, searchable; and links of what is not in it."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import shown
from nnunet_project import program
from shown import ROOT

import nnunet_ima
from nnunet_ima import attack_losses, attacks
from nnunet_ima.evaluation.command_line import _parser


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does."""
    command = [program("sphinx-build"), "--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    command += ["--doctree-dir", str(output.with_name("doctrees")), str(source), str(output)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page refers to, its ids, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag == "a":
            self.links.append(found.get("href", ""))
        self.loaded += [found[name] for name in ("src", "srcset", "data", "poster", "action") if name in found]
        if tag != "a" and "href" in found:
            self.loaded.append(found["href"])

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(site: Path) -> dict[str, Page]:
    return {file.name: Page(file) for file in sorted(site.glob("*.html"))}


def test_every_page_of_the_docs_is_in_the_site_and_in_its_navigation(site):
    navigation = Page(site / "index.html").links
    for source in (ROOT / "docs").glob("*.md"):
        assert (site / f"{source.stem}.html").is_file()
        assert f"{source.stem}.html" in navigation or source.stem == "index", source.name


def test_the_site_asks_nothing_of_the_network(site):
    """But for links that a reader may follow."""
    for name, page in pages(site).items():
        foreign = [address for address in page.loaded if urlsplit(address).netloc]
        assert foreign == [], name
    for style in site.rglob("*.css"):
        for address in re.findall(r"url\(([^)]+)\)|@import\s+([^;]+)", style.read_text(encoding="utf-8")):
            assert not re.search(r"^[\"']?(https?:)?//", "".join(address)), (style.name, address)


def test_every_link_within_the_site_leads_somewhere(site):
    """Sphinx checked those that were written; this also finds those that it made itself."""
    found = pages(site)
    for name, page in found.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = site / unquote(address.path) if address.path else site / name
            assert target.exists(), f"{name}: {link}"
            if address.fragment and target.suffix == ".html":
                assert unquote(address.fragment) in found[target.name].ids, f"{name}: {link}"


def test_a_dead_link_a_dead_anchor_and_a_missing_picture_fail_the_build(tmp_path):
    """Each alone would."""
    shutil.copytree(ROOT / "docs", tmp_path / "repository" / "docs")
    for beside in ("CHANGELOG.md", "CITATION.cff", "Dockerfile", "benchmarks"):
        (tmp_path / "repository" / beside).symlink_to(ROOT / beside)
    broken = tmp_path / "repository" / "docs" / "questions.md"
    wrong = ("[a](nothing.md)", "[b](numbers.md#nothing)", "[c](../nothing.txt)", "![d](pictures/nothing.png)")
    broken.write_text(broken.read_text(encoding="utf-8") + "\n\n".join(["", *wrong, ""]), encoding="utf-8")
    done = build(broken.parent, tmp_path / "site")
    assert done.returncode != 0
    for name in ("'nothing.md'", "'nothing'", "'../nothing.txt'", "pictures/nothing.png"):
        assert name in done.stderr
    assert len(re.findall("WARNING.*(?:not found|not readable)", done.stderr)) == len(wrong)


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OUTSIDE_THE_SITE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", OUTSIDE_THE_SITE, ids=lambda page: page.name)
def test_links_of_pages_outside_the_site_lead_somewhere(site, page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        address = urlsplit(link)
        if address.scheme:
            continue
        target = page.parent / address.path
        assert target.exists(), link
        if address.fragment:
            assert address.fragment in Page(site / f"{target.stem}.html").ids, link


# A site that is linked to for the first time is written down here, by someone who has looked at it.
HOSTS = {"arxiv.org", "github.com"}


def test_links_to_other_sites_are_well_formed_and_to_known_ones():
    """There is no network where the tests run, so whether they answer is not asked."""
    found = {
        address
        for page in shown.PAGES
        for address in re.findall(r"https?:[^\s)>`\"']+", page.read_text(encoding="utf-8"))
    }
    assert found
    for address in found:
        parts = urlsplit(address)
        assert parts.scheme == "https", address
        assert parts.hostname in HOSTS, address
        if parts.hostname == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", parts.path), address
        else:
            assert re.fullmatch(r"/[\w.-]+/[\w.-]+(/\S*)?", parts.path), address


# ---- what the pages must hold


def subcommands() -> dict[str, argparse.ArgumentParser]:
    return next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_the_command_line_page_has_every_subcommand_and_option(site):
    page = Page(site / "command-line.html")
    for name, parser in subcommands().items():
        assert f"nnunet-ima-{name}" in page.ids, f"docs/command-line.md needs a section '## nnunet_ima {name}'"
        for action in parser._actions:
            for option in action.option_strings:
                assert option in page.text, f"{name} {option}"
            if action.help and action.dest != "help":
                said = " ".join(action.help.replace("%%", "%").split())
                assert said in " ".join(page.text.split()), f"{name} {action.dest}"


def test_the_python_page_has_every_public_name(site):
    page = Page(site / "python.html")
    for module in (nnunet_ima, attacks, attack_losses):
        for name in module.__all__:
            if name in ("LossFunction", "likely_others"):  # a type, and a part of an attack
                continue
            assert any(there.endswith(f".{name}") for there in page.ids), f"docs/python.md: {module.__name__}.{name}"
    # Shapes are no italics, and two attributes in a line no attribute and its type.
    assert "(B, C, *spatial)" in page.text
    assert "forward_passes/backward_passes" in page.text


def test_every_attack_loss_and_method_has_its_algorithm(site):
    algorithms, methods = Page(site / "algorithms.html").text, Page(site / "methods.html")
    for name in (*attacks.ATTACKS, *attack_losses.LOSSES):
        assert name in algorithms, name
    for name in ("std", "ima", "sat", "trades", "te"):
        assert name in methods.ids


# ---- in a browser


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where a web server on this machine offers the site."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def tab(browser, address) -> Iterator[Any]:
    """The start page; at the end nothing may have been complained about, or asked of any other server."""
    opened = browser.new_page(viewport={"width": 1300, "height": 900})
    complaints: list[str] = []
    asked: list[str] = []
    # Browsers ask for an icon whether or not there is one.
    opened.on("console", lambda m: complaints.append(m.text) if "favicon" not in m.location["url"] else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address + "index.html")
    yield opened
    assert complaints == []
    assert [other for other in asked if not other.startswith((address, "data:"))] == []
    opened.close()


@pytest.mark.parametrize(("words", "expected"), [("bisection", "algorithms.html"), ("start_from", "harden.html")])
def test_the_search_finds(tab, words, expected):
    """Typed into the field at the side, as a reader does, and followed."""
    tab.fill("input[name=q]", words)
    tab.press("input[name=q]", "Enter")
    tab.locator(f"ul.search li a[href*='{expected}']").first.click()  # waits for it
    tab.wait_for_url(f"**/{expected}*")
    assert words in tab.inner_text("article").lower()


def test_the_search_says_when_there_is_nothing(tab):
    tab.fill("input[name=q]", "zzzqqq")
    tab.press("input[name=q]", "Enter")
    tab.get_by_text("did not match any documents").wait_for()


def test_opened_from_a_file_the_search_finds_as_well(browser, site):
    """Without a server it cannot quote from the pages, but lists them."""
    opened = browser.new_page()
    opened.goto((site / "index.html").as_uri())
    opened.fill("input[name=q]", "bisection")
    opened.press("input[name=q]", "Enter")
    opened.locator("ul.search li a[href*='algorithms.html']").first.click()
    opened.wait_for_url("**/algorithms.html*")
    opened.close()


@pytest.mark.parametrize("width", [380, 1300])
def test_no_page_sticks_out_to_the_side(tab, address, site, width):
    tab.set_viewport_size({"width": width, "height": 900})
    for file in sorted(site.glob("*.html")):
        tab.goto(address + file.name)
        wide = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1], file.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(tab, scheme):
    tab.emulate_media(color_scheme=scheme)

    def brightness(selector: str, of: str) -> float:
        colour = tab.locator(selector).first.evaluate(f"element => getComputedStyle(element).{of}")
        return sum(float(value) for value in re.findall(r"[\d.]+", colour)[:3]) / 3

    paper = brightness("body", "backgroundColor")
    assert (paper < 60) == (scheme == "dark")
    for selector in ("h1", "article p", "article td", "article a.reference", ".highlight pre"):
        assert abs(brightness(selector, "color") - paper) > 75, selector
