// The numbers at the top.

import { byId, el, mark, say } from "./dom.js";
import { digits, duration, size } from "./format.js";
import { severityOf } from "./trouble.js";

const parts = new Map();

function figure(name) {
  let made = parts.get(name);
  if (!made) {
    const [value, unit, more] = [el("span", { class: "value" }), el("span", { class: "unit" }), el("dd", { class: "more" })];
    const box = el("div", { class: "figure" }, el("dt", {}, name), el("dd", {}, value, unit), more);
    byId("figures").append(box);
    made = { box, value, unit, more };
    parts.set(name, made);
  }
  return made;
}

function show(name, [value, unit], more = "", severity = "") {
  const made = figure(name);
  mark(made.box, "data-severity", severity);
  say(made.value, value);
  say(made.unit, unit);
  say(made.more, more);
}

const p99 = (values) => (values.count ? `p99 ${duration(values.p99).join(" ")}` : "none yet");

export function showFigures(state) {
  const { proxy, live } = state;
  const failing = live.errors_per_second ? `${digits(live.errors_per_second)}/s failed` : "none failed";
  show("Requests", [digits(live.requests_per_second), "/s"], failing);
  show("Under way", [digits(proxy.in_flight), ""], `${digits(proxy.requests)} since the start`);
  show("First token, p50", duration(live.first_token_ms.p50), p99(live.first_token_ms), severityOf(state, "first_token_ms"));
  show("Between tokens, p50", duration(live.between_tokens_ms.p50), p99(live.between_tokens_ms));
  show("Tokens", [digits(live.tokens_per_second), "/s"], "of streamed answers");
  const whole = live.transfer_ms.count ? `, ${duration(live.transfer_ms.p50).join(" ")} in all` : "";
  show("KV exposed, p50", duration(live.transfer_exposed_ms.p50), p99(live.transfer_exposed_ms) + whole, severityOf(state, "transfer_exposed_ms"));
  const [rate, unit] = size(live.bytes_per_second);
  show("KV sent", [rate, `${unit}/s`], `${digits(live.transfers_per_second)} transfers/s`);
}
