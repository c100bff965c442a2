"""Headless Chromium, driven by its DevTools protocol, without a network: what a page asked for, complained of, and shows."""
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tornado.ioloop import IOLoop  # comes with Jupyter
from tornado.websocket import websocket_connect

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    " --remote-debugging-port=0 --proxy-server=127.0.0.1:1 --window-size=1300,900"
).split()
# what does not fit: `scrolls` if the reader can scroll it into view within its own box, `cut` if not at all
SHOWN = """(async () => {
  if (window.MathJax) await MathJax.startup.promise;
  await new Promise(r => setTimeout(r, 50));  // a change of size is told with the next frame
  const article = document.querySelector("article"), scrolls = [], cut = [];
  for (const e of article ? article.querySelectorAll("pre, table, img, mjx-container") : []) {
    const own = e.getBoundingClientRect(), inline = e.tagName === "MJX-CONTAINER" && !e.hasAttribute("display");
    const right = inline ? own.right : Math.max(own.right, own.left + e.scrollWidth);
    if (!own.width || e.tagName === "PRE" && !e.innerText) continue;  // folded
    let hidden = false, reached = false;
    for (let box = e; box !== article.parentElement && !reached; box = box.parentElement) {
      const style = getComputedStyle(box), edge = box.getBoundingClientRect().right;
      if (right > edge + 1 && style.overflowX !== "visible") { hidden = true; reached = ["auto", "scroll"].includes(style.overflowX); }
    }
    const beyond = right > article.getBoundingClientRect().right + 1;
    if (hidden || beyond) (reached ? scrolls : cut).push(e.tagName + " " + (e.alt || e.innerText || "").slice(0, 60) + ` (by ${Math.round(right - article.getBoundingClientRect().right)})`);
  }
  return JSON.stringify({
    formulas: document.querySelectorAll(".math").length,
    rendered: document.querySelectorAll(".math mjx-container").length,
    broken: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    pictures: [...document.querySelectorAll("article img")].map(i => ({src: i.src.slice(0, 80), alt: i.alt, wide: i.naturalWidth})),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    wide: document.documentElement.scrollWidth, scrolls, cut,
  });
})()"""


class Browser:
    "One Chromium for many pages, as a context manager."

    def __enter__(self):
        self.folder, self.loop, self.number = Path(tempfile.mkdtemp()), IOLoop(make_current=False), 0
        self.process = subprocess.Popen([shutil.which("chromium"), *FLAGS, f"--user-data-dir={self.folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, deadline = self.folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and len(port.read_text().splitlines()) == 2):
            assert time.monotonic() < deadline and self.process.poll() is None, "chromium does not start"
            time.sleep(0.1)
        number, path = port.read_text().splitlines()
        self.socket = self.loop.run_sync(lambda: websocket_connect(f"ws://127.0.0.1:{number}{path}", max_message_size=2**28), timeout=30)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method, session=None, seen=None, **params):
        "The result of a command; events that come before it are appended to `seen`."
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": session} if session else {})

        async def answered():
            await self.socket.write_message(json.dumps(message))
            while True:
                reply = json.loads(await self.socket.read_message())
                if reply.get("id") == self.number:
                    assert "error" not in reply, reply
                    return reply["result"]
                if seen is not None and reply.get("sessionId") == session:
                    seen.append(reply)

        return self.loop.run_sync(answered, timeout=120)

    def open(self, url, widths=(1300,), wait="true") -> list:
        """What a page shows at each width once its formulas are rendered and a condition holds, and the `complaints` on the
        way: failed requests, exceptions, errors."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session, seen = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], []
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.send(f"{domain}.enable", session)
        resize = lambda width: self.send("Emulation.setDeviceMetricsOverride", session, seen, width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        resize(widths[0])
        self.send("Page.navigate", session, seen, url=url)
        look, deadline = lambda code: self.send("Runtime.evaluate", session, seen, expression=code, awaitPromise=True)["result"].get("value"), time.monotonic() + 60
        while not look(f"location.href !== 'about:blank' && document.readyState === 'complete' && ({wait})"):
            assert time.monotonic() < deadline, f"{url}: waited in vain for {wait}"
            time.sleep(0.05)
        shown = [json.loads(look(SHOWN))]
        for width in widths[1:]:
            resize(width)
            shown.append(json.loads(look(SHOWN)))
        time.sleep(0.1)
        look("1")  # collects what came meanwhile
        self.send("Target.closeTarget", targetId=target)
        return [s | {"complaints": [c for c in map(complaint, seen) if c]} for s in shown]


def complaint(event):
    "The words of an event that a page should not cause, else None."
    method, p = event.get("method"), event.get("params", {})
    if method == "Network.loadingFailed":
        return f"failed request: {p['errorText']}"
    if method == "Network.requestWillBeSent" and not p["request"]["url"].startswith(("file:", "data:", "blob:", "about:")):
        return f"asks for {p['request']['url']}"
    if method == "Runtime.exceptionThrown":
        return f"exception: {p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text'])}"
    if method == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
        return f"console: {[a.get('value') for a in p['args']]}"
    if method == "Log.entryAdded" and p["entry"]["level"] == "error":
        return f"log: {p['entry']['text']} {p['entry'].get('url', '')}"
