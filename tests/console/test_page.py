"""The console in a real browser, in front of a real proxy with stand-in workers."""

import pytest

from tests.console.browser import Visit, chromium
from tests.ops.served import serving
from tests.ops.support import request_record

KEY = "k" * 32
LOAD = {"running": 0, "waiting": 0, "blocks_total": 10, "blocks_free": 10, "blocks_cached": 0}
BODY = {"prompt": "hello", "max_tokens": 6, "stream": True}


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def served():
    """A 2p2d with an admin key that has answered one request."""
    with serving(2, 2, admin_key=KEY, health_interval_seconds=0.1) as made:
        made.call(made.deployment.ask(BODY, request_id="before"))
        yield made


@pytest.fixture
def visit(browser, served):
    """An open page. At its end the browser must have logged no error."""
    with Visit(browser, served.url) as made:
        yield made.live()
        assert made.complaints == []
        assert {url for url in made.asked if not url.startswith(served.url + "/")} == set()


def name_of(standin):
    """The worker's name at the proxy."""
    return f"127.0.0.1:{standin.port}"


def names(served):
    """All workers' names, in the order of the page."""
    return [name_of(one) for one in (*served.deployment.prefill, *served.deployment.decode)]


def test_the_topology_shows_every_worker_and_every_pair(visit, served):
    """It has a line for each pair, and a sentence for screen readers."""
    picture = visit.page.locator("#topology svg")
    boxes = picture.locator("g.node:not(.proxy) title").all_text_contents()
    assert [box.partition(",")[0] for box in boxes] == names(served)
    assert picture.locator("path.belt").count() == 4
    assert "2 prefill workers" in picture.get_attribute("aria-label")
    assert [row.split()[0] for row in visit.page.locator("#workers th").all_inner_texts()] == names(served)


def test_the_topology_names_the_roles(visit):
    headings = visit.page.locator("#topology .role-name").all_text_contents()
    assert headings == ["prefill workers", "decode workers"]


def test_the_root_leads_to_the_page(visit, served):
    visit.page.goto(served.url + "/")
    assert visit.page.url == served.url + "/console"
    visit.live()


def test_another_window_is_asked_for(visit):
    """Rates, percentiles and plots follow it."""
    with visit.page.expect_request(lambda request: "window=300" in request.url):
        visit.page.get_by_label("Time window").select_option("300")
    visit.page.locator("#plots").get_by_text("−4 min").first.wait_for()


def test_a_queue_is_coloured_where_it_stands(visit, served):
    """In the table, in the topology, and as the first line of the page, until it is gone."""
    worker = served.deployment.prefill[0]
    calm = visit.page.evaluate("getComputedStyle(document.querySelector('#workers td.num')).color")
    worker.more_health = {"load": LOAD | {"waiting": 11}}
    visit.page.get_by_text(f"11 requests wait in prefill worker {name_of(worker)}").wait_for()
    cell = visit.page.locator("#workers td[data-severity=warning]")
    assert cell.inner_text() == "11"
    assert cell.evaluate("it => getComputedStyle(it).color") != calm
    assert "11 waiting" in visit.page.locator("#topology text[data-severity=warning]").text_content()
    worker.more_health = {}
    visit.page.locator("#trouble").wait_for(state="hidden")


def test_the_doctor_is_asked_and_quoted(browser):
    """Below the first line, once it has looked."""
    with serving(health_interval_seconds=0.1, health_timeout_seconds=0.3) as ill, Visit(browser, ill.url) as visit:
        visit.live()
        ill.call(ill.deployment.decode[0].stop())
        visit.page.get_by_text("The doctor says: ").wait_for()
        assert "What to do" in visit.page.locator("#doctor").inner_text()


def test_splitting_that_is_switched_off_is_said(visit, served):
    switch = served.deployment.proxy.context.shadow._switch
    switch.off = True
    visit.page.get_by_text("splitting is switched off").wait_for()
    switch.off = False
    visit.page.get_by_text("rates of the last").wait_for()


def test_a_request_appears_and_opens_into_its_waterfall(visit, served):
    """It appears without a reload, and a click opens it."""
    served.call(served.deployment.ask(BODY, request_id="while-looking"))
    visit.page.get_by_role("button", name="while-looking").click()
    visit.page.locator("ol.waterfall").wait_for()  # it is asked for
    parts = visit.page.locator("ol.waterfall .wf-name").all_inner_texts()
    names = [part.partition("\n")[0].partition("127")[0].strip() for part in parts]
    assert [name for name in names if name != "on the way"] == [
        "proxy", "queue", "prefill", "KV wait", "decode queue", "KV load", "first decode step", "rest of the answer",
    ]  # fmt: skip
    assert "6 tokens" in visit.page.locator("ol.waterfall").inner_text()
    assert visit.page.locator("ol.waterfall .wf-axis span").count() == 5
    assert "first token after" in visit.page.locator("dl.facts").inner_text()


def test_a_bar_that_goes_on_beyond_the_axis_has_a_sign(visit):
    """Of a long answer all but its beginning lies beyond the second token, where the axis ends."""
    drawn = """async (record) => {
        const { detail } = await import("/console/waterfall.js");
        const lines = [...detail(record).querySelectorAll("ol.waterfall li:not(.wf-scale)")];
        const signed = lines.filter((line) => line.querySelector(".wf-bar").textContent);
        return signed.map((line) => line.querySelector(".wf-name").textContent);
    }"""
    assert visit.page.evaluate(drawn, request_record()) == ["rest of the answer"]


def test_a_worker_is_drained_with_the_key_and_used_again(visit, served):
    """The page asks for the key once, and shows the refusal of a wrong one."""
    worker = served.deployment.decode[1]
    button = visit.page.get_by_role("button", name=f"Drain {name_of(worker)}", exact=False)
    standing = lambda: served.deployment.worker(worker).endpoint.standing  # noqa: E731
    button.click()
    visit.page.get_by_label("Key", exact=True).fill("w" * 32)
    visit.page.get_by_role("button", name="Use key").click()
    visit.page.get_by_text("The proxy refuses this key.").wait_for()
    assert standing() == "active"
    visit.complaints.clear()  # the browser's own line about the status 401
    visit.page.get_by_label("Key", exact=True).fill(KEY)
    visit.page.get_by_role("button", name="Use key").click()
    undrain = visit.page.get_by_role("button", name=f"Undrain {name_of(worker)}", exact=False)
    undrain.wait_for()
    assert standing() == "draining"
    undrain.click()
    button.wait_for()
    assert standing() == "active"
    assert KEY not in visit.page.content()


def test_without_the_key_nothing_is_drained(visit, served):
    """Closing the dialog changes nothing."""
    worker = served.deployment.decode[0]
    visit.page.get_by_role("button", name=f"Drain {name_of(worker)}", exact=False).click()
    visit.page.keyboard.press("Escape")
    visit.page.locator("dialog").wait_for(state="hidden")
    assert served.deployment.worker(worker).endpoint.standing == "active"


def test_everything_is_reached_by_keyboard(visit, served):
    """Keys lead from the top to the list, along it, into a request and back; the focus is always visible."""
    page = visit.page
    served.call(served.deployment.ask(BODY, request_id="second"))
    page.get_by_role("button", name="second").wait_for()
    focused = lambda: page.evaluate("document.activeElement.textContent || document.activeElement.id")  # noqa: E731
    page.keyboard.press("Tab")
    assert focused() == "Skip to requests"
    page.keyboard.press("Enter")
    for _ in range(3):  # two filters, then the list
        page.keyboard.press("Tab")
    first = focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    assert focused() != first
    page.keyboard.press("Enter")
    page.locator("ol.waterfall").wait_for()
    page.keyboard.press("Escape")
    page.locator("ol.waterfall").wait_for(state="detached")
    page.keyboard.press("Home")
    assert focused() == first


def test_requests_are_found_by_a_word(visit, served):
    """The filter finds requests by id, workers, path or reason, and says so if it finds none."""
    served.call(served.deployment.ask(BODY | {"seed": 1}, request_id="seeded"))
    visit.page.get_by_role("button", name="seeded").wait_for()
    visit.page.locator("#find").fill("SEED")
    assert visit.page.locator("tr.request").count() == 1
    visit.page.locator("#find").fill("nowhere")
    assert visit.page.get_by_text("No request fits the filter.").is_visible()


def test_the_theme_is_the_systems_until_another_is_chosen(browser, served):
    """The choice is kept, and every text is readable in both themes."""
    with Visit(browser, served.url, scheme="dark") as visit:
        visit.live()
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = visit.page.evaluate(paper)
        assert min(visit.page.evaluate(CONTRASTS).values()) >= 4.5
        visit.page.get_by_label("Theme").select_option("light")
        light = visit.page.evaluate(paper)
        assert light != dark
        assert min(visit.page.evaluate(CONTRASTS).values()) >= 4.5
        visit.page.reload()
        visit.live()
        assert visit.page.evaluate(paper) == light


def test_a_wide_window_is_filled(browser, served):
    """The topology stands beside the workers there."""
    with Visit(browser, served.url, width=2560) as visit:
        visit.live()
        edges = visit.page.evaluate(
            "[...document.querySelectorAll('main > section')].map(it => it.getBoundingClientRect().right)"
        )
        assert max(edges) > 2500
        topology, workers = (
            visit.page.locator(f"section:has(#{one})").bounding_box() for one in ("topology", "workers")
        )
        assert topology["y"] == workers["y"]


def test_a_telephone_shows_whole_request_ids(browser, served):
    """Ids often differ in their ends only."""
    served.call(served.deployment.ask(BODY, request_id="104c77dd-5f0e-4d0f-9a3b-77e0c1d2a9f1"))
    with Visit(browser, served.url, width=390) as visit:
        button = visit.live().page.get_by_role("button", name="104c77dd-5f0e")
        assert button.evaluate("it => it.scrollWidth <= it.clientWidth && getComputedStyle(it).whiteSpace") == "normal"


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_the_page_is_never_wider_than_its_window(browser, served, width):
    """This holds for a small telephone and for a desktop."""
    with Visit(browser, served.url, width=width) as visit:
        visit.live()
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [320, 390])
def test_a_telephone_shows_every_button_of_the_workers_whole(browser, served, width):
    """A drained worker has a longer label, and needs no scrolling either."""
    worker = name_of(served.deployment.decode[1])
    with Visit(browser, served.url, width=width) as visit:
        visit.live()
        change = f"{served.url}/kvbelt/workers/{worker}/{{}}?role=decode"
        headers = {"authorization": f"Bearer {KEY}"}
        try:
            assert visit.page.request.post(change.format("drain"), headers=headers).ok
            visit.page.get_by_role("button", name=f"Undrain {worker}", exact=False).wait_for()
            table = visit.page.locator(".scroll", has=visit.page.locator("#workers"))
            assert table.evaluate("it => it.scrollWidth - it.clientWidth") == 0
            edge = table.bounding_box()["x"] + table.bounding_box()["width"]
            boxes = [button.bounding_box() for button in visit.page.locator("#workers .act button").all()]
            assert len(boxes) == 4
            assert max(box["x"] + box["width"] for box in boxes) <= edge
        finally:
            assert visit.page.request.post(change.format("undrain"), headers=headers).ok


def test_without_an_admin_key_there_is_nothing_to_press(browser):
    """The page names the flag that enables the buttons; without requests it says that there are none."""
    with serving() as plain, Visit(browser, plain.url) as visit:
        visit.live()
        assert visit.page.get_by_role("button", name="Drain", exact=False).first.is_disabled()
        assert "--admin-key-file" in visit.page.locator("#workers-note").inner_text()
        assert "No request yet" in visit.page.locator("#requests-empty").inner_text()
        assert "nothing in the last 60 s" in visit.page.locator("#plots").inner_text()


def test_beyond_loopback_the_page_asks_for_the_key_before_it_shows_anything(browser):
    with serving(host="0.0.0.0", admin_key=KEY) as public, Visit(browser, public.url) as visit:
        public.call(public.deployment.ask(BODY, request_id="private"))
        visit.page.get_by_label("Key", exact=True).fill(KEY)
        assert visit.page.locator("#workers tr").count() == 0
        visit.page.get_by_role("button", name="Use key").click()
        visit.live()
        visit.page.get_by_role("button", name="private").wait_for()


def test_the_page_shows_that_the_proxy_is_gone_and_that_it_is_back(browser):
    """The page keeps its contents and marks them as old."""
    with serving(health_interval_seconds=0.1) as mortal, Visit(browser, mortal.url) as visit:
        visit.live()
        deployment = mortal.deployment
        port = deployment.proxy.port
        mortal.call(deployment.proxy.close())
        visit.page.locator("html[data-status=gone]").wait_for(state="attached")
        assert "has not answered" in visit.page.get_by_role("alert").first.inner_text()
        assert visit.page.locator("#workers tr").count() == 2
        mortal.call(deployment.restart_proxy(port))
        visit.live()
        assert not visit.page.locator("#banner").is_visible()


#: Contrast of each kind of text with what is behind it, by WCAG's formula.
CONTRASTS = """() => {
  const colour = (name) => {
    const probe = document.createElement("span");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
    probe.remove();
    return [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  };
  const light = (name) => colour(name).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const [text, behind] of [["ink", "paper"], ["ink", "surface"], ["ink", "raised"], ["muted", "paper"],
      ["muted", "surface"], ["muted", "raised"], ["accent", "surface"], ["accent", "raised"], ["bad", "surface"],
      ["bad", "bad-soft"], ["ink", "bad-soft"],
      ["warn", "surface"], ["warn", "raised"], ["ink", "warn-soft"], ["on-accent", "accent"]]) {
    const [a, b] = [light(text), light(behind)].sort((x, y) => y - x);
    found[`${text} on ${behind}`] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""
