"""The page at ``/``, in a real browser: it shows what the pool has, changes it, and takes nothing that it shows for more than text."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from asgi import application
from commandline import make_rootfs
from conftest import needs_root, needs_tool
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from test_server_same import open_pool

import thinpool
from thinpool.server.tcp import Guard
from thinpool.server.transport import _Connection

pytestmark = needs_tool("chromium")

KIB, MIB = 1 << 10, 1 << 20
TOKEN = "a token for tests"
HOSTILE = "</td><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> ${1} {{2}} '\"&amp;"
expect.set_options(timeout=30_000)


def guarded(app: Any) -> Guard:
    """The application behind a token, all but the page itself, as it is served over TCP."""
    return Guard(app, TOKEN, has_tls=False)


@contextmanager
def serving(pool: thinpool.Pool, wrap: Callable[[Any], Any] = lambda app: app) -> Iterator[str]:
    """The pool's application on a loopback port; the page's address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(wrap(application(pool)), lifespan="off", log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])  # Chromium has none for root
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must neither complain nor ask anybody but the server."""
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    complaints: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if request.url.startswith("http") else "data"))
    yield page
    context.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []  # failed requests the browser itself reports
    assert len(hosts - {"data"}) == 1


@pytest.fixture
def filled(pool: thinpool.Pool) -> thinpool.Pool:
    """A pool with a base, a snapshot of it, and two clones of that."""
    base = pool.create_layer("base", "64M")
    base.pwrite(random.Random(1).randbytes(MIB), 0)
    snapshot = base.snapshot("base@1")
    snapshot.clone("one").pwrite(b"x" * 4096, 0)
    snapshot.clone("two")
    pool.create_layer("other", "1G")
    return pool


@pytest.fixture
def shown(filled: thinpool.Pool, page: Page) -> Iterator[Page]:
    """The page of the filled pool."""
    with serving(filled) as address:
        page.goto(address)
        expect(page.locator("#layers tbody tr")).to_have_count(5)
        yield page


def row(page: Page, layer: str) -> Any:
    return page.locator("#layers tbody tr").filter(has=page.locator(f'[title="{layer}"]'))


def press(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def submit(page: Page) -> None:
    page.locator("#dialog button[type=submit]").click()


# --- what it shows ---


def test_the_tree_of_layers_with_what_they_share(shown: Page) -> None:
    assert [text.split("\t")[0] for text in shown.locator("#layers tbody tr").all_inner_texts()] == ["base", "└─ base@1", "   ├─ one", "   └─ two", "other"]
    assert row(shown, "one").inner_text().split()[2:9] == ["writable", "64", "MiB", "64", "KiB", "1.0", "MiB"]
    assert row(shown, "base@1").inner_text().split()[2] == "sealed"


def test_where_space_goes(shown: Page) -> None:
    expect(shown.locator("#space")).to_contain_text("exclusive to one layer 64 KiB")
    expect(shown.locator("#space")).to_contain_text("shared 1.0 MiB")
    expect(shown.locator("#tiles")).to_contain_text("1.1 MiB\ntaken, no limit set", use_inner_text=True)
    widths = [shown.locator(f"#stack .{kind}").bounding_box() for kind in ("exclusive", "shared", "free")]
    assert all(box is not None for box in widths)


def test_figures_move_with_the_traffic(shown: Page, filled: thinpool.Pool) -> None:
    layer, stop = filled.layer("one"), threading.Event()

    def write() -> None:
        while not stop.wait(0.001):
            layer.pwrite(b"y" * 4096, 0)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        expect(shown.locator("#busy tbody tr").filter(has_text="one")).to_be_visible()
        expect(shown.locator("#operations .legend .write")).not_to_have_text("write 0")
        expect(shown.locator("#latency path.write")).to_be_attached()
    finally:
        stop.set()
        thread.join()


def test_images_with_their_history_and_what_containers_cost(pool: thinpool.Pool, page: Page, tmp_path: Path) -> None:
    pool.images.load(make_rootfs(tmp_path), "debian:12", size="512M")
    pool.containers.create("debian:12", name="web")
    pool.layer("web").pwrite(b"x" * 4096, 0)
    with serving(pool) as address:
        page.goto(address)
        page.locator("#images summary").filter(has_text="debian:12").click()
        expect(page.locator("#images tbody tr")).to_contain_text("load rootfs.tar.gz")
        expect(page.locator("#containers tbody tr")).to_contain_text("64 KiB")
        expect(page.locator("#containers tbody tr")).to_contain_text("stopped")
        expect(page.locator("#layers tbody tr")).to_have_count(2)
        page.locator("#inner").check()  # the blank file system and the archive
        expect(page.locator("#layers tbody tr")).to_have_count(4)


@needs_root()
def test_devices_and_whose_they_are(filled: thinpool.Pool, page: Page) -> None:
    device = filled.layer("one").attach().device
    with serving(filled) as address:
        page.goto(address)
        expect(page.locator("#uses tbody tr")).to_contain_text(device)
        expect(row(page, "one")).to_contain_text(device)
        press(page, "Delete one")
        submit(page)
        expect(page.locator("#dialog [role=alert]")).to_contain_text(f"used by block device {device}")


def test_light_and_dark_differ(shown: Page) -> None:
    def colour() -> str:
        return str(shown.evaluate("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color"))

    light = colour()
    shown.emulate_media(color_scheme="dark")
    assert colour() != light


# --- what it changes ---


def test_create(shown: Page, filled: thinpool.Pool) -> None:
    press(shown, "New layer")
    shown.locator("#dialog [name=name]").fill("new/one")
    shown.locator("#dialog [name=size]").fill("3G")
    submit(shown)
    expect(row(shown, "new/one")).to_contain_text("3.0 GiB")
    assert filled.layer("new/one").size == 3 << 30


def test_clone(shown: Page, filled: thinpool.Pool) -> None:
    press(shown, "Clone one")
    shown.locator("#dialog [name=name]").fill("three")
    submit(shown)
    expect(row(shown, "three")).to_be_visible()
    assert filled.layer("three").parent == filled.layer("one")


def test_reset(shown: Page, filled: thinpool.Pool) -> None:
    press(shown, "Reset one")
    expect(shown.locator("#dialog")).to_contain_text("it frees 64 KiB")
    submit(shown)
    expect(row(shown, "one")).to_contain_text("0 B")
    assert filled.layer("one").pread(100, 0) == filled.layer("base").pread(100, 0)


def test_delete(shown: Page, filled: thinpool.Pool) -> None:
    press(shown, "Delete base@1")
    expect(shown.locator("#dialog")).to_contain_text("2 layers made from it stay whole")
    submit(shown)
    expect(row(shown, "base@1")).to_have_count(0)
    assert {layer.name for layer in filled.layers()} == {"base", "one", "two", "other"}


def test_nothing_happens_without_a_yes(shown: Page, filled: thinpool.Pool) -> None:
    press(shown, "Delete one")
    press(shown, "Cancel")
    expect(shown.locator("#dialog")).to_be_hidden()
    assert filled.layer("one").pread(1, 0) == b"x"


def test_a_failure_is_said_in_words_and_can_be_mended(shown: Page, filled: thinpool.Pool) -> None:
    press(shown, "Clone base@1")
    shown.locator("#dialog [name=name]").fill("two")
    submit(shown)
    expect(shown.locator("#dialog [role=alert]")).to_have_text("a layer named 'two' exists already")
    shown.locator("#dialog [name=name]").fill("four")
    submit(shown)
    expect(row(shown, "four")).to_be_visible()
    assert filled.layer("four").parent == filled.layer("base@1")


def test_a_server_that_is_gone_is_said(filled: thinpool.Pool, page: Page) -> None:
    with serving(filled) as address:
        page.goto(address)
        expect(page.locator("#layers tbody tr")).to_have_count(5)
        page.route("**/v1/**", lambda route: route.fulfill(status=500, body="no JSON"))
        expect(page.locator("#alert")).to_have_text("The pool's server answered 500.")
        page.unroute_all(behavior="wait")
        expect(page.locator("#alert")).to_be_hidden()


# --- whom it trusts ---


def test_whatever_the_pool_says_is_text(filled: thinpool.Pool, page: Page) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: value[key] if key in ("mode", "type") else poisoned(value[key]) for key in value}
        return [poisoned(item) for item in value] if isinstance(value, list) else HOSTILE if isinstance(value, str) else value

    layers = {"id": "sha256:1", "references": ["a"], "digest": "b", "platform": "c", "created": 1.0, "layers": ["d"], "blobs": 1}
    usage = {"virtual": 1, "mapped": 1, "exclusive": 1, "shared": 0}
    made_up = {
        "/v1/images/list": [{**layers, "usage": usage}],
        "/v1/images/history": [{"created": 1.0, "created_by": "a", "comment": "b", "layer": "c", "diff_id": "d", "size": 1, "shared": 0, "exclusive": 1}],
        "/v1/containers/list": [{"name": "a", "image": "b", "image_id": "c", "layer": "d", "created": 1.0, "command": ["e"], "running": True, "usage": usage}],
        "/v1/attachments": [{"layer": "a", "device": "b", "mountpoint": "c", "purpose": "d", "owner": 1, "container": "e"}],
    }

    def answer(route: Route) -> None:
        path = "/" + route.request.url.split("/", 3)[3].split("?")[0]
        response = None if path in made_up else route.fetch()
        route.fulfill(json=poisoned(made_up[path] if response is None else response.json()))

    page.route("**/v1/**", answer)
    with serving(filled) as address:
        page.goto(address)
        expect(page.locator("#layers tbody tr")).to_have_count(5)
        page.locator("#images summary").click()
        expect(page.locator("#images td")).to_have_count(4)
        for place in ("#path", "#layers", "#containers", "#uses", "#images summary", "#images td code"):
            expect(page.locator(place).first).to_contain_text(HOSTILE)
        page.locator("#layers").get_by_role("button", name="Delete").first.click()
        expect(page.locator("#dialog h2")).to_have_text(f"Delete {HOSTILE}?")
        assert page.title() == "thinpool"
        assert page.locator("img").count() == 0 and page.locator("script").count() == 1
        page.unroute_all(behavior="wait")


def test_the_token_comes_with_the_address_and_leaves_it(filled: thinpool.Pool, page: Page) -> None:
    with serving(filled, guarded) as address:
        page.goto(f"{address}#token={TOKEN.replace(' ', '%20')}")
        expect(page.locator("#layers tbody tr")).to_have_count(5)
        assert page.url == address
        page.reload()
        expect(page.locator("#layers tbody tr")).to_have_count(5)
        assert page.evaluate("localStorage.length") == 0


def test_the_token_is_asked_for(filled: thinpool.Pool, page: Page) -> None:
    with serving(filled, guarded) as address:
        page.goto(address)
        page.locator("#dialog [name=token]").fill("a wrong one")
        submit(page)
        expect(page.locator("#dialog [name=token]")).to_have_value("")  # asked for again
        page.locator("#dialog [name=token]").fill(TOKEN)
        submit(page)
        expect(page.locator("#layers tbody tr")).to_have_count(5)


def test_the_pools_server_has_it_and_lets_nothing_else_run_in_it(pool_path: Path) -> None:
    pool = open_pool(pool_path, "remote")
    connection: http.client.HTTPConnection = _Connection(pool_path)
    connection.request("GET", "/")
    with connection.getresponse() as response:
        policy = response.headers["Content-Security-Policy"]
        assert response.status == 200 and "unsafe" not in policy
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert b"<title>thinpool</title>" in response.read()
    connection.close()
    pool.close()


def test_no_markup_is_made_of_data() -> None:
    text = (Path(thinpool.__file__).parent / "server" / "page" / "index.html").read_text()
    for maker in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "//cdn", "https://"):
        assert maker not in text
    assert text.count("<script") == 1
