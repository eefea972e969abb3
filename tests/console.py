"""Looks at the console with Chromium, as a person would: tests/it/console.rs runs it.

    console.py denial URL KEY_ARN NBD_URI
    console.py token URL TOKEN

With BYOKD_SCREENSHOTS=DIR it leaves pictures there.
"""

import base64
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

import axe_playwright_python
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 30
# What is promised is 2 s from a denied answer to the fence. On top come a probe's second, the page's
# second, and a busy machine.
SEEN_WITHIN = 10
AXE = pathlib.Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()


def byokctl(*args):
    command = [os.environ["BYOKCTL"], "--json", *args]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


class Page:
    def __init__(self, driver, url):
        self.driver = driver
        self.wide()
        driver.get(url)

    def size(self, width, height):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )

    def wide(self):
        self.size(1280, 900)

    def phone(self):
        self.size(360, 740)

    def scheme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def until(self, what, so):
        WebDriverWait(self.driver, PATIENCE, 0.1).until(lambda _: so(), what)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def shown(self, selector):
        return any(e.is_displayed() for e in self.driver.find_elements(By.CSS_SELECTOR, selector))

    def card(self, volume):
        return Card(self, f'article[aria-labelledby="volume-{volume}"]')

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def picture(self, name):
        place = os.environ.get("BYOKD_SCREENSHOTS")
        if place:
            options = {"captureBeyondViewport": True}
            shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
            pathlib.Path(place, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def is_accessible(self):
        """axe finds nothing against WCAG 2.2 AA and its own best practices."""
        self.run(f"if (!window.axe) {{ {AXE} }}")
        found = self.driver.execute_async_script("axe.run(document).then(arguments[0])")
        problems = [
            f"{rule['id']}: {node['html']}: {node['failureSummary']}"
            for rule in found["violations"]
            for node in rule["nodes"]
        ]
        assert not problems, "\n".join(problems)
        assert len(found["passes"]) > 20, "the rules ran"

    def fits_its_width(self):
        wide = self.run(
            "return [document.scrollingElement.scrollWidth, innerWidth,"
            " [...document.querySelectorAll('body *')].filter(e => e.getClientRects().length &&"
            " !e.closest('.unseen, .skip') && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.outerHTML.slice(0, 120))]"
        )
        assert wide[0] <= wide[1] and not wide[2], f"it scrolls sideways: {wide}"

    def looks_good_everywhere(self, name):
        for scheme in ["light", "dark"]:
            self.scheme(scheme)
            back = self.run("return getComputedStyle(document.body).backgroundColor")
            bright = sum(map(int, back[4:-1].split(","))) > 3 * 128
            assert bright == (scheme == "light"), f"{scheme}: {back}"
            for size, resize in [("wide", self.wide), ("phone", self.phone)]:
                resize()
                self.fits_its_width()
                self.picture(f"{name}-{scheme}-{size}")
            # Colours differ by scheme alone, and what stands where by width alone.
            if scheme == "light":
                self.wide()
            self.is_accessible()
        self.scheme("light")
        self.wide()


class Card:
    def __init__(self, page, selector):
        self.page, self.selector = page, selector

    def part(self, selector):
        return self.page.one(f"{self.selector} {selector}")

    def state(self):
        return self.part(".state").text.split(" ", 1)[-1]

    def says(self, name):
        return self.part(f'[data-is="{name}"]').text

    def is_there(self):
        return bool(self.page.driver.find_elements(By.CSS_SELECTOR, self.selector))


def denial(page, key):
    card, calm = page.card("zeebe-0"), page.card("zeebe-1")
    page.until("the volume is shown", lambda: card.is_there() and card.state() == "serving")
    assert card.says("key") == key
    assert "in 59 min" in card.says("left"), card.says("left")
    assert page.text("#summary") == "3 volumes serving, 1 detached"
    assert not page.shown("dl.trouble")
    page.until("reads are shown", lambda: "Reads 0 B/s" in card.part("figcaption").text)
    page.looks_good_everywhere("serving")

    # The keyboard alone: the first stop leads to the volumes, and a history is opened.
    page.run("document.activeElement.blur(); window.getSelection().collapse(document.body, 0)")
    keys = webdriver.ActionChains(page.driver)
    keys.send_keys(Keys.TAB).perform()
    assert page.run("return document.activeElement.className") == "skip"
    keys.send_keys(Keys.ENTER).perform()
    page.until("the volumes have the focus", lambda: page.run("return document.activeElement.id") == "volumes")
    keys.send_keys(Keys.TAB).perform()
    assert page.run("return document.activeElement.tagName") == "SUMMARY"
    keys.send_keys(Keys.ENTER).perform()
    page.until("the history is there", lambda: "attached" in card.part("details .events").text)

    # A client that goes on asking, whatever it is told.
    asking = ask(sys.argv[4])
    page.until("its reads are shown", lambda: "Reads 0 B" not in card.part("figcaption").text)
    started = time.monotonic()
    byokctl("dev", "key", "disable", key)
    page.until("the fence is seen", lambda: card.state() == "fenced")
    took = time.monotonic() - started
    assert took < SEEN_WITHIN, f"it was seen after {took:.1f} s"
    said = byokctl("status", "zeebe-0")["volumes"][0]
    for part in ["cause", "effect", "remedy"]:
        shown, meant = card.says(part), said["trouble"][part]
        assert shown.lower() == meant.lower(), f"{shown} / {meant}"
    page.until("the last request id is shown", lambda: same_id(card))
    evidence = card.says("evidence")
    assert "DisabledException" in evidence and said["lease"]["evidence"]["message"] in evidence
    page.until("both are fenced", lambda: page.text("#summary") == "1 volume serving, 2 fenced, 1 detached")
    assert page.driver.title == "2 with trouble – byokd", page.driver.title
    # Each that is fenced is read out, also where both are in one answer.
    for said in ["zeebe-0", "zeebe-3", "fenced. the customer's KMS key may not be used"]:
        assert said in announced(page), announced(page)
    # It comes first, and the other one is none the worse.
    assert page.text("#volumes > li:first-child h3") == "zeebe-0"
    assert calm.state() == "serving"
    assert page.run("return document.activeElement.tagName") == "SUMMARY", "the focus stays"
    page.until("the history goes on", lambda: "KMS denied the key: DisabledException" in card.part("details .events").text)
    page.looks_good_everywhere("fenced")

    # It reads nothing any more, and that is what is shown.
    nothing = lambda: card.part("figcaption").text.startswith("Reads 0 B/s, writes 0 B/s; ")
    page.until("nothing is read, and errors are shown", lambda: nothing() and "requests a second fail" in card.part("figcaption").text)
    page.picture("failing-reads")
    asking.kill()
    asking.wait()

    # Only those with trouble; and one that is looked for.
    page.one("#troubled").click()
    assert [e.text for e in page.driver.find_elements(By.CSS_SELECTOR, "#volumes h3") if e.text] == ["zeebe-0", "zeebe-3"]
    page.one("#troubled").click()
    page.one("#filter").send_keys("zeebe-1")
    assert [e.text for e in page.driver.find_elements(By.CSS_SELECTOR, "#volumes h3") if e.text] == ["zeebe-1"]
    page.one("#filter").clear()
    page.one("#filter").send_keys(" ")

    # A daemon that stands still: the page says that it does not know.
    daemon = int(os.environ["BYOKD_PID"])
    os.kill(daemon, signal.SIGSTOP)
    try:
        page.until("it says that its data are old", lambda: page.shown("#stale"))
        assert "does not answer" in page.text("#stale")
        assert card.state() == "was fenced" and calm.says("left").lower() == "not known"
        assert page.text("#summary") == "Last known: 1 volume serving, 2 fenced, 1 detached"
        assert calm.part(".headline").text == "Last known: served; KMS allows its key"
        assert card.says("cause").startswith("Last known: the customer's KMS key")
        assert calm.part("figcaption").text.startswith("Last known: reads")
        said = [calm.says("since"), calm.says("success"), card.says("clients")]
        assert said[0].lower().startswith("was held, since ") and said[2].lower().startswith("were "), said
        assert said[1].lower().endswith("as far as is known"), said
        heard = page.text("#heard")
        page.until("time goes on", lambda: page.text("#heard") != heard)
        assert [calm.says("since"), calm.says("success"), card.says("clients")] == said, "and no clock of theirs does"
        page.looks_good_everywhere("stale")
    finally:
        os.kill(daemon, signal.SIGCONT)
    page.until("it is heard of again", lambda: not page.shown("#stale"))

    byokctl("dev", "key", "enable", key)
    page.until("it is served again", lambda: card.state() == "serving")
    assert not page.shown("dl.trouble")
    page.until("the history has it", lambda: "served again: KMS allows the key" in card.part("details .events").text)
    page.until("nothing is left of it", lambda: page.driver.title == "byokd")
    assert page.text("#summary") == "3 volumes serving, 1 detached"

    # What KMS says turns nothing around, and no key of another is read into it.
    bidi = "no\u202e (request id 0000)\u2066\n\u001b[2Jx"
    fault = {"fault": "http", "status": 400, "code": "AccessDeniedException", "message": bidi, "operations": ["Decrypt"]}
    kms = pathlib.Path(os.environ["BYOKD_STATE_DIR"], "kms-endpoint").read_text().strip()
    post = urllib.request.Request(f"{kms}/_dev/faults", json.dumps(fault).encode(), method="POST")
    urllib.request.urlopen(post).read()
    page.until("it is denied", lambda: card.state() == "fenced")
    page.until("the last request id is shown", lambda: same_id(card))
    shown = card.says("evidence")
    assert "no\\u{202e} (request id 0000)\\u{2066}\\n\\u{1b}[2Jx (request id " in shown, shown
    page.until("the history has it", lambda: "no\\u{202e}" in card.part("details .events").text)
    everything = page.run("return document.body.textContent")
    assert not any(c in everything for c in "\u202e\u2066\u001b")
    page.picture("bidi")
    urllib.request.urlopen(urllib.request.Request(f"{kms}/_dev/faults", method="DELETE")).read()


def announced(page):
    return page.run("return document.getElementById('announce').textContent")


def ask(uri):
    """A client that reads again and again, whatever it is told."""
    script = (
        "import time\nwhile True:\n    try:\n        h.pread(4096, 0)\n"
        "    except nbd.Error as e:\n        if e.errno != 'EPERM': raise\n    time.sleep(0.05)"
    )
    return subprocess.Popen(["/usr/bin/python3", "-m", "nbd", "-u", uri, "-c", script])


def same_id(card):
    told = byokctl("status", "zeebe-0")["volumes"][0]["lease"]["evidence"]["request_id"]
    return card.says("id") == told


def token(page, right):
    page.until("the token is asked for", lambda: page.shown("#ask"))
    assert not page.shown("#data")
    page.looks_good_everywhere("token")
    field = page.one("#token")
    field.send_keys("wrong" + Keys.ENTER)
    page.until("a wrong one is refused", lambda: page.text("#refused") == "That is not the token.")
    assert not page.shown("#data")
    field.send_keys(right + Keys.ENTER)
    page.until("the data are shown", lambda: page.shown("#data"))
    assert page.text("#none").startswith("There are no volumes")
    # It is kept in this tab, and nowhere else.
    assert page.run("return [sessionStorage.token, localStorage.length, document.cookie]") == [right, 0, ""]
    page.one("#forget").click()
    page.until("it is asked for again", lambda: page.shown("#ask"))


def main():
    part, url, argument = sys.argv[1:4]
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        driver = webdriver.Chrome(options, service)
        try:
            driver.set_script_timeout(PATIENCE)
            page = Page(driver, url)
            {"denial": denial, "token": token}[part](page, argument)
            # Nothing went wrong in the page, and its policy forbade it nothing.
            told = [entry["message"] for entry in driver.get_log("browser")]
            wrong = [words for words in told if "api/v1/" not in words]
            assert not wrong, wrong
        except BaseException:
            page.picture("failed")
            print(driver.execute_script("return document.body.innerText"), file=sys.stderr)
            raise
        finally:
            driver.quit()


main()
