// The list of requests. A request opens into its waterfall, by click or keyboard.

import { byId, el, mark, say } from "./dom.js";
import { clock, time } from "./format.js";
import { detail } from "./waterfall.js";

const SHOWN = 20;
const KEPT = 2000;

const STATUS = { 0: "under way", 499: "client left" };

export class Requests {
  #proxy;
  #byId = new Map(); // id → request, the newest last
  #rows = new Map(); // id → its elements, while it is shown
  #open = new Map(); // id → its detail's row
  #shown = []; // ids, the newest first
  #most = SHOWN;

  constructor(proxy) {
    this.#proxy = proxy;
    byId("find").addEventListener("input", () => this.show());
    byId("which").addEventListener("change", () => this.show());
    byId("fresh").addEventListener("click", () => {
      this.show();
      byId("requests").querySelector("button")?.focus();
    });
    byId("more").addEventListener("click", () => {
      this.#most += 2 * SHOWN;
      this.show();
    });
    byId("requests").addEventListener("keydown", (event) => this.#move(event));
  }

  /** All known requests, the newest first. */
  get all() {
    return [...this.#byId.values()].reverse();
  }

  forget() {
    this.#byId.clear();
  }

  take(rows) {
    for (const row of [...rows].reverse()) {
      const known = this.#byId.get(row.request_id);
      // An id may be used again: the later request takes its place.
      if (known && known.time !== row.time) this.#byId.delete(row.request_id);
      this.#byId.set(row.request_id, row);
    }
    const ordered = [...this.#byId.values()].sort((a, b) => a.time - b.time).slice(-KEPT);
    this.#byId = new Map(ordered.map((row) => [row.request_id, row]));
    for (const id of this.#shown) if (this.#byId.has(id)) this.#fill(this.#rows.get(id), this.#byId.get(id));
    // The list must not move while a user reads in it.
    const reading = byId("requests").contains(document.activeElement) || this.#open.size > 0;
    const fresh = this.#wanted().filter((id) => !this.#rows.has(id)).length;
    if (reading && this.#shown.length) this.#offer(fresh);
    else this.show();
    this.#note();
  }

  show() {
    const body = byId("requests");
    this.#shown = this.#wanted();
    const kept = new Set(this.#shown);
    for (const [id, made] of this.#rows) {
      if (kept.has(id)) continue;
      made.row.remove();
      this.#open.get(id)?.remove();
      this.#open.delete(id);
      this.#rows.delete(id);
    }
    const order = [];
    for (const id of this.#shown) {
      if (!this.#rows.has(id)) this.#rows.set(id, this.#make(id));
      const made = this.#rows.get(id);
      this.#fill(made, this.#byId.get(id));
      order.push(made.row);
      if (this.#open.has(id)) order.push(this.#open.get(id));
    }
    order.forEach((row, index) => {
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
    });
    this.#offer(0);
    this.#note();
    byId("more").hidden = this.#shown.length < this.#most;
    const empty = byId("requests-empty");
    empty.hidden = order.length > 0;
    say(empty, this.#byId.size ? "No request fits the filter." : "No request yet. Each one that comes through the proxy appears here, with where its time went.");
  }

  #wanted() {
    const word = byId("find").value.trim().toLowerCase();
    const which = byId("which").value;
    const fits = (row) => {
      if (which === "trouble" && row.status < 400 && !row.error) return false;
      if (which === "other" && row.path === "first-token") return false;
      return !word || [row.request_id, row.prefill, row.decode, row.path, row.reason, row.error, row.status].some((value) => String(value ?? "").toLowerCase().includes(word));
    };
    return this.all.filter(fits).slice(0, this.#most).map((row) => row.request_id);
  }

  #note() {
    const shown = this.#shown.length;
    say(byId("requests-note"), this.#byId.size ? `${shown} of the last ${this.#byId.size}` : "");
  }

  #offer(count) {
    const button = byId("fresh");
    button.hidden = count === 0;
    if (count) say(button, `${count} newer: show`);
  }

  #make(id) {
    const made = {
      button: el("button", { type: "button", class: "link mono", "aria-expanded": "false" }, id),
      time: el("td", { class: "wide" }),
      status: el("td"),
      path: el("span", { class: "path" }),
      reason: el("span", { class: "muted" }),
      pair: el("td", { class: "wide mono small" }),
      first: el("td", { class: "num" }),
      between: el("td", { class: "num wide" }),
      transfer: el("td", { class: "num wide" }),
      total: el("td", { class: "num" }),
    };
    made.row = el("tr", { class: "request" }, el("th", { scope: "row" }, made.button), made.time, made.status, el("td", { class: "way" }, made.path, " ", made.reason), made.pair, made.first, made.between, made.transfer, made.total);
    made.row.addEventListener("click", () => void this.#toggle(id));
    return made;
  }

  #fill(made, row) {
    const failed = row.status >= 400;
    mark(made.row, "data-state", failed ? "failed" : row.status ? "ended" : "open");
    say(made.time, clock(row.time));
    say(made.status, STATUS[row.status] ?? String(row.status));
    say(made.path, row.path || "–");
    say(made.reason, row.reason ?? "");
    say(made.pair, [row.prefill, row.decode].filter(Boolean).join(" → ") || "–");
    say(made.first, time(row.first_token_ms));
    say(made.between, time(row.between_tokens_ms));
    say(made.transfer, time(row.transfer_exposed_ms));
    say(made.total, time(row.total_ms));
  }

  async #toggle(id) {
    const made = this.#rows.get(id);
    const open = this.#open.get(id);
    mark(made.button, "aria-expanded", String(!open));
    if (open) {
      open.remove();
      this.#open.delete(id);
      return;
    }
    const cell = el("td", { colSpan: 9 }, el("p", { class: "muted" }, "asking…"));
    const row = el("tr", { class: "opened", id: `detail-${id}` }, cell);
    mark(made.button, "aria-controls", row.id);
    this.#open.set(id, row);
    made.row.after(row);
    try {
      cell.replaceChildren(detail(await this.#proxy.ask(`kvbelt/requests/${encodeURIComponent(id)}`)));
    } catch (error) {
      cell.replaceChildren(el("p", { class: "error" }, `No details: ${error.message}`));
    }
  }

  /** Arrows walk through the list, Escape closes what is open. */
  #move(event) {
    const buttons = [...byId("requests").querySelectorAll("tr.request button")];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      buttons[Math.max(0, Math.min(to, buttons.length - 1))].focus();
    } else if (event.key === "Escape" && buttons[at].getAttribute("aria-expanded") === "true") {
      buttons[at].click();
    }
  }
}
