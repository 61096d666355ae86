// The workers' table, with its buttons.

import { byId, el, mark, say } from "./dom.js";
import { bytes, digits, percent } from "./format.js";
import { bufferShare, kvShares, stateOf } from "./topology.js";
import { severityOf } from "./trouble.js";

const rows = new Map();

function bar() {
  const used = el("span", { class: "bar-used" });
  const cached = el("span", { class: "bar-cached" });
  const label = el("span");
  const more = el("span", { class: "long" });
  const track = el("span", { class: "bar-track", "aria-hidden": "true" }, used, cached);
  return { used, cached, label, more, made: el("div", { class: "bar" }, track, el("span", { class: "bar-text" }, label, more)) };
}

function makeRow(worker, act) {
  const made = {
    dot: el("span", { class: "dot", "aria-hidden": "true" }),
    state: el("span"),
    detail: el("span", { class: "detail-text muted" }),
    running: el("td", { class: "num" }),
    waiting: el("td", { class: "num" }),
    requests: el("td", { class: "num wide" }),
    kv: bar(),
    buffer: bar(),
    button: el("button", { type: "button" }),
  };
  made.button.addEventListener("click", () => act(made.worker));
  made.row = el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: "mono" }, ...breakable(worker.worker)), " ", el("span", { class: "muted role" }, worker.role)),
    el("td", { class: "state-cell" }, made.dot, made.state, made.detail),
    made.running,
    made.waiting,
    made.requests,
    el("td", {}, made.kv.made),
    el("td", { class: "wide" }, made.buffer.made),
    el("td", { class: "act" }, made.button),
  );
  return made;
}

/** A name that may break before its port. */
function breakable(name) {
  const port = name.lastIndexOf(":");
  return port < 0 ? [name] : [name.slice(0, port), el("wbr"), name.slice(port)];
}

function fill(drawn, share, cached, label, more = "") {
  drawn.used.style.width = `${(share ?? 0) * 100}%`;
  drawn.cached.style.width = `${Math.max(0, Math.min(cached, 1 - (share ?? 0))) * 100}%`;
  drawn.made.classList.toggle("none", share === null);
  say(drawn.label, label);
  say(drawn.more, more);
}

/** `act(worker)` drains or undrains one. */
export function showWorkers(told, act) {
  const { workers, pairs, proxy } = told;
  const body = byId("workers");
  const seen = new Set();
  workers.forEach((worker, index) => {
    const name = `${worker.role} ${worker.worker}`;
    seen.add(name);
    if (!rows.has(name)) rows.set(name, makeRow(worker, act));
    const made = rows.get(name);
    made.worker = worker;
    if (body.children[index] !== made.row) body.insertBefore(made.row, body.children[index] ?? null);
    const state = stateOf(worker);
    mark(made.row, "data-state", state);
    say(made.state, state);
    const broken = pairs.filter((pair) => pair.reason && pair[worker.role] === worker.worker);
    say(made.detail, worker.detail || broken.map((pair) => `no KV ${worker.role === "prefill" ? `to ${pair.decode}` : `from ${pair.prefill}`}: ${pair.reason}`).join("; "));
    say(made.running, digits(worker.load.running));
    say(made.waiting, digits(worker.load.waiting));
    for (const [place, subject] of [[made.waiting, "waiting"], [made.kv.made, "kv"], [made.buffer.made, "buffer"]]) {
      mark(place, "data-severity", severityOf(told, subject, worker));
    }
    say(made.requests, digits(worker.in_flight));
    const kv = kvShares(worker);
    fill(made.kv, kv ? kv.used : null, kv ? kv.cached : 0, kv ? percent(kv.used) : "not told", kv?.cached ? `, ${percent(kv.cached)} cached` : "");
    const buffer = bufferShare(worker);
    const held = worker.buffers?.bytes_quarantined ?? 0;
    fill(made.buffer, buffer, 0, buffer === null ? "–" : `${percent(buffer)} of ${bytes(worker.buffers.receive_bytes)}${held ? `, ${bytes(held)} in quarantine` : ""}`);
    const draining = worker.standing !== "active";
    say(made.button, draining ? "Undrain" : "Drain");
    mark(made.button, "aria-label", `${draining ? "Undrain" : "Drain"} ${worker.worker} (${worker.role})`);
    made.button.disabled = !proxy.admin || worker.standing === "leaving";
  });
  for (const [name, made] of rows) {
    if (seen.has(name)) continue;
    made.row.remove();
    rows.delete(name);
  }
  say(byId("workers-note"), proxy.admin ? "a drained worker finishes what it has, and gets nothing new" : "to drain workers here, start the proxy with --admin-key-file");
}
