// One request in full: its path, and where its time went.

import { el } from "./dom.js";
import { bytes, clock, time } from "./format.js";

/** The axis ends with the second token; the rest of an answer would dwarf the parts of interest. */
function axis(spans) {
  const first = spans.filter((span) => span.name !== "answer").map((span) => span.start_ms + span.duration_ms);
  return Math.max(1e-3, ...first, ...spans.filter((span) => span.name === "answer").map((span) => span.start_ms));
}

function transferNote({ transfer }) {
  if (!transfer) return "";
  const parts = [];
  const beside = transfer.state === "done" ? Math.max(0, transfer.milliseconds - transfer.exposed_ms) : 0;
  if (transfer.state === "done") parts.push(`${time(transfer.exposed_ms)} exposed`);
  if (beside) parts.push(`${time(beside)} beside the prefill`);
  parts.push(bytes(transfer.bytes));
  if (transfer.writes) parts.push(`${transfer.writes} writes`);
  // Beside the prefill it is as slow as the layers are computed: its rate says nothing.
  if (transfer.gb_per_second && !beside) parts.push(`${transfer.gb_per_second} GB/s`);
  if (transfer.channel) parts.push(transfer.channel);
  if (transfer.transport) parts.push(transfer.transport);
  return parts.join(", ");
}

/** The numbers of the axis, and a line for each in all tracks (by the style). */
function scale(whole) {
  const numbers = [0, 0.25, 0.5, 0.75, 1].map((share) => el("span", {}, share ? time(share * whole) : "0"));
  return el("li", { class: "wf-scale", "aria-hidden": "true" }, el("span", { class: "wf-axis num muted" }, ...numbers));
}

function line(span, whole, record) {
  const bar = el("span", { class: `wf-bar ${span.failed ? "bad" : span.name === "transfer" ? "belt" : span.name === "answer" ? "rest" : ""}` });
  const from = Math.min(span.start_ms / whole, 1);
  bar.style.left = `${from * 100}%`;
  bar.style.width = `${Math.min(span.duration_ms / whole, 1 - from) * 100}%`;
  const goesOn = (span.start_ms + span.duration_ms) / whole > 1 + 1e-6;
  if (goesOn) bar.append("▸");
  const note = span.failed && span.name !== "transfer" ? `failed: ${span.failed}` : span.name === "transfer" ? (span.failed ? `failed: ${span.failed}; ` : "") + transferNote(record) : span.name === "answer" && record.tokens ? `${record.tokens} tokens, ${time(record.timings_ms.between_tokens)} between two` : "";
  return el(
    "li",
    {},
    el("span", { class: "wf-name" }, span.name === "answer" ? "rest of the answer" : span.name, span.worker ? el("span", { class: "wf-worker muted" }, span.worker) : null),
    el("span", { class: "wf-time num" }, time(span.duration_ms)),
    el("span", { class: "wf-track", "aria-hidden": "true" }, bar),
    el("span", { class: "wf-note muted" }, note),
  );
}

function placed(placing) {
  if (!placing) {
    return null;
  }
  const parts = [placing.reason ? `${placing.action} (${placing.reason})` : placing.action];
  if (placing.waited_ms) {
    parts.push(`after a wait of ${time(placing.waited_ms)}`);
  }
  if (placing.predicted_first_token_ms !== null) {
    parts.push(`first token expected after ${time(placing.predicted_first_token_ms)}`);
  }
  return parts.join(", ");
}

function times({ status, timings_ms: { first_token: first, total } }) {
  if (status !== 200) return null;
  const parts = [first === null ? "first token unknown (not streamed)" : `first token after ${time(first)}`];
  if (total !== null) parts.push(`whole answer after ${time(total)}`);
  return parts.join(", ");
}

function facts(record) {
  const { decision } = record;
  const told = [
    ["Way", decision.path ? `${decision.path}${decision.reason ? `, because of ${decision.reason}` : ""}` : "none chosen"],
    ["Why", decision.meaning],
    ["Placed", placed(record.placing)],
    ["KV", record.kv],
    ["Times", times(record)],
    ["Came", `${clock(record.time)}, ${record.route}`],
    ["Prompt", record.prompt],
  ];
  return el("dl", { class: "facts" }, ...told.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

export function detail(record) {
  const whole = axis(record.spans);
  const failed = record.attempts.filter((attempt) => attempt.reason);
  const parts = [facts(record)];
  if (record.spans.length) {
    parts.push(el("ol", { class: "waterfall", "aria-label": `Where the time of ${record.request_id} went` }, scale(whole), ...record.spans.map((span) => line(span, whole, record))));
  }
  if (failed.length) {
    parts.push(el("ul", { class: "attempts" }, ...failed.map((attempt) => el("li", {}, el("strong", {}, attempt.reason), ` ${attempt.leg} on ${attempt.worker}: ${attempt.detail}`))));
  }
  const others = record.errors.filter((error) => !failed.some((attempt) => error.startsWith(attempt.reason)));
  if (others.length) parts.push(el("ul", { class: "attempts" }, ...others.map((error) => el("li", {}, error))));
  return el("div", { class: "detail" }, ...parts);
}
