// The page: asks the proxy, shows its answers, and says when it does not answer.

import { byId, mark, say } from "./dom.js";
import { showFigures } from "./figures.js";
import { ago } from "./format.js";
import { askForKey } from "./key.js";
import { showPlots } from "./plots.js";
import { Poll, Proxy, Refused } from "./poll.js";
import { Requests } from "./requests.js";
import { showTopology } from "./topology.js";
import { showTrouble } from "./trouble.js";
import { showWorkers } from "./workers.js";

const proxy = new Proxy();
const requests = new Requests(proxy);
const poll = new Poll(proxy, got, failed);
let latest = null;
let asking = false;

function status(state, text) {
  mark(document.documentElement, "data-status", state);
  say(byId("status-text"), text);
}

function banner(text) {
  const node = byId("banner");
  node.hidden = !text;
  say(node, text);
}

function got(state) {
  if (state.restarted) requests.forget();
  latest = state;
  banner("");
  status("live", "live");
  requests.take(state.requests);
  draw();
}

function draw() {
  if (!latest) return;
  const { proxy: told } = latest;
  say(byId("model"), told.model);
  showTrouble(latest);
  showFigures(latest);
  showTopology(latest);
  showWorkers(latest, change);
  showPlots(requests.all, told.time, poll.seconds);
  const kept = `${told.records.kept} of at most ${told.records.most} requests kept`;
  say(byId("foot"), `kvbelt ${told.version}, up for ${ago(told.uptime_seconds)}; ${kept}, ${told.prompts ? "with the beginning of their prompts" : "without their text"}`);
}

function failed(error, seconds) {
  if (error instanceof Refused && error.status === 401) {
    status("locked", "locked");
    banner(proxy.hasKey ? "The proxy refuses this key." : "This proxy shows its requests only with its admin key.");
    if (!asking) void unlock(proxy.hasKey ? "The proxy refuses this key." : "");
    return;
  }
  if (error instanceof Refused) {
    status("locked", "refused");
    banner(error.message);
    return;
  }
  status("gone", "proxy gone");
  const since = seconds < 1 ? "" : ` for ${ago(seconds)}`;
  banner(`The proxy has not answered${since}. The page shows the last answer, and goes on when the proxy is back.`);
}

async function unlock(wrong = "") {
  asking = true;
  const key = await askForKey("With it you see this proxy's requests, and drain its workers.", wrong);
  if (key) {
    proxy.key = key;
    poll.now();
  }
  // A closed dialog is not opened again until the user asks for it.
  asking = !key;
}

/** Drain or undrain a worker. */
async function change(worker) {
  const verb = worker.standing === "active" ? "drain" : "undrain";
  const place = `kvbelt/workers/${encodeURIComponent(worker.worker)}/${verb}?role=${worker.role}`;
  let wrong = "";
  for (;;) {
    if (!proxy.hasKey || wrong) {
      const key = await askForKey(`To ${verb} ${worker.worker}, the proxy needs its admin key.`, wrong);
      if (!key) return;
      proxy.key = key;
    }
    try {
      await proxy.ask(place, "POST");
      tell(`${worker.worker} ${verb === "drain" ? "is draining: it finishes what it has" : "takes requests again"}`);
      poll.now();
      return;
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        proxy.key = null;
        wrong = "The proxy refuses this key.";
        continue;
      }
      tell(`${worker.worker} was not changed: ${error.message}`, true);
      return;
    }
  }
}

function tell(text, bad = false) {
  const node = byId("workers-said");
  node.classList.toggle("error", bad);
  say(node, text);
}

byId("pause").addEventListener("click", () => {
  poll.paused = !poll.paused;
  mark(byId("pause"), "aria-pressed", String(poll.paused));
  say(byId("pause"), poll.paused ? "Go on" : "Pause");
  if (poll.paused) status("paused", "paused");
  else poll.now();
});
byId("key").addEventListener("click", () => void unlock());

const span = byId("window");
span.value = String(poll.seconds);
span.addEventListener("change", () => {
  poll.seconds = Number(span.value);
  poll.now();
});

const theme = byId("theme");
theme.value = document.documentElement.dataset.theme;
theme.addEventListener("change", () => {
  document.documentElement.dataset.theme = theme.value;
  try {
    localStorage.setItem("kvbelt-theme", theme.value);
  } catch {
    // For as long as the page is open.
  }
});

new ResizeObserver(() => draw()).observe(byId("main"));
requests.show();
poll.now();
