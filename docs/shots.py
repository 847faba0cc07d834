"""Screenshots of the site by headless Chromium: ``make docs-shots`` writes them to ``docs/_build/shots``.

Pages of every kind are opened from the files on disk, at 1280 and at 400 pixels wide, light and dark. Then
every page is opened at 400 pixels. The script names what is wider than its page, what asked for the network
and what the browser's console complained of, and ends with an error if there was anything.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
SITE = HERE / "_build/html"
SHOTS = HERE / "_build/shots"
PAGES = (
    "index.html", "guides/index.html", "guides/evidence.html", "guides/missing_data.html",
    "tutorial/1_vae.html", "gallery.html",
    "api/processes.html", "equations.html", "glossary.html", "benchmarks.html", "search.html?q=likelihood",
)  # fmt: skip
SIZES = {1280: 1500, 400: 1500}
FLAGS = (  # noqa: SIM905, as one types them
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
).split()
#: Waits for mathematics and for the results of a search.
READY = """(async () => {
  await window.MathJax?.startup?.promise;
  const search = document.querySelector('#search-results');
  for (let i = 0; search && !search.querySelector('li') && i < 50; i++)
    await new Promise(done => setTimeout(done, 100));
})()"""
#: What is wider than the page, and not inside of something that scrolls.
TOO_WIDE = """[...document.querySelectorAll('.content *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1 || !e.checkVisibility()) return false;
  for (let a = e; a && a.tagName != 'BODY'; a = a.parentElement)
    if (getComputedStyle(a).overflowX != 'visible') return false;
  return true;
}).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 60)).slice(0, 4)"""
RESULTS = "[...document.querySelectorAll('#search-results li')].length"


class Browser:
    """Chromium by its debugging protocol: JSON that ends in a zero byte, on two pipes."""

    def __init__(self, program, folder):
        (theirs_in, self.out), (self.inn, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(3, 4), stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.number, self.session, self.events, self.rest = 0, None, [], b""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """Send a command and wait for its answer; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def read(self):
        """The next message."""
        while b"\0" not in self.rest:
            self.rest += os.read(self.inn, 1 << 16)
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression):
        """The value of a JavaScript expression, after its promise."""
        answer = self.ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        return answer["result"].get("value")

    def open(self, page, width, theme):
        """Open a page of the site and wait until it is complete; returns the complaints."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=SIZES[width], deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": theme}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=f"{SITE.as_uri()}/{page}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.evaluate(READY)
        found = [f"wider than the page: {words}" for words in self.evaluate(TOO_WIDE)]
        if "search.html?" in page and not self.evaluate(RESULTS):
            found.append("the search finds nothing")
        return found + [words for event in self.events for words in complaint(event)]

    def shoot(self, path):
        """A picture of what is seen."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


def complaint(event):
    """Requests to the network and errors of the console."""
    parameters = event.get("params", {})
    if event.get("method") == "Network.requestWillBeSent":
        url = parameters["request"]["url"]
        if not url.startswith(("file:", "data:", "blob:")):
            yield f"asks for {url[:120]}"
    if event.get("method") == "Runtime.exceptionThrown":
        yield f"exception: {parameters['exceptionDetails'].get('text')}"
    if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
        yield f"console: {parameters['entry']['text'][:120]}"


@contextmanager
def browser():
    """A browser with a folder of its own, closed in the end."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        sys.exit("make docs-shots: no Chromium found. On Debian: apt-get install -y chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = Browser(program, folder)
        try:
            yield opened
        finally:
            opened.process.terminate()
            opened.process.wait()


def main():
    if not (SITE / "index.html").exists():
        sys.exit("make docs-shots: there is no site in docs/_build/html. Run make docs first")
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir(parents=True)
    start, failures, shots = time.perf_counter(), [], 0
    with browser() as opened:
        for page in PAGES:
            if not (SITE / page.partition("?")[0]).exists():
                continue
            for width in SIZES:
                for theme in ("light", "dark"):
                    failures += [(page, words) for words in opened.open(page, width, theme)]
                    name = page.partition(".html")[0].replace("/", "-")
                    opened.shoot(SHOTS / f"{name}_{width}_{theme}.png")
                    shots += 1
        others = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
        for page in others:
            if not page.startswith("_"):
                failures += [(page, words) for words in opened.open(page, 400, "light")]
    for page, words in dict.fromkeys(failures):
        print(f"{page}: {words}")
    print(f"{shots} screenshots in {SHOTS}, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
