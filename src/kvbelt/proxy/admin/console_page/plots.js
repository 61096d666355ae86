// Time to first token, between tokens, and of transfers: a dot for each request, p50 and p99 of each few seconds.

import { byId, el, say, svg } from "./dom.js";
import { ago, time } from "./format.js";

const BUCKETS = 30; // in a picture
const TICKS = 5;
const HEIGHT = 170;
const AREA = { left: 46, right: 10, top: 10, bottom: 20 };
const MOST_DOTS = 2000;

const PLOTS = [
  ["Time to first token", "first_token_ms"],
  ["Time between tokens", "between_tokens_ms"],
  ["KV transfer, exposed", "transfer_exposed_ms"],
];

const panels = PLOTS.map(([title, field]) => {
  const [figures, picture] = [el("p", { class: "muted" }), el("div", { class: "plot" })];
  return { title, field, figures, picture, made: el("figure", { class: "card" }, el("figcaption", { class: "card-head" }, el("h3", {}, title), figures), picture) };
});
byId("plots").append(...panels.map((panel) => panel.made));

const nearest = (sorted, percentile) => sorted[Math.ceil((sorted.length * percentile) / 100) - 1];

const tick = (decade) => (decade < 0 ? `${10 ** (decade + 3)}\u202fµs` : time(10 ** decade));

/** Whole decades around all values. */
function decades(values) {
  const low = Math.floor(Math.log10(Math.max(1e-3, Math.min(...values))));
  const high = Math.ceil(Math.log10(Math.max(...values) * 1.0001));
  return [low, Math.max(high, low + 1)];
}

function draw(panel, points, now, span) {
  const width = Math.max(220, panel.picture.clientWidth);
  const inner = { width: width - AREA.left - AREA.right, height: HEIGHT - AREA.top - AREA.bottom };
  const values = points.map((point) => point[1]);
  const [low, high] = values.length ? decades(values) : [0, 3];
  const x = (at) => AREA.left + inner.width * (1 - (now - at) / span);
  const y = (value) => AREA.top + inner.height * (1 - (Math.log10(Math.max(value, 1e-3)) - low) / (high - low));
  const drawn = [];
  for (let decade = low; decade <= high; decade += 1) {
    const at = y(10 ** decade);
    drawn.push(svg("line", { x1: AREA.left, x2: width - AREA.right, y1: at, y2: at, class: "grid" }));
    drawn.push(svg("text", { x: AREA.left - 8, y: at + 4, class: "tick", "text-anchor": "end" }, tick(decade)));
  }
  for (let step = TICKS - 1; step >= 0; step -= 1) {
    const before = (span / TICKS) * step;
    const label = step === 0 ? "now" : width < 300 && step % 2 ? "" : `−${ago(before)}`;
    const anchor = step === 0 ? "end" : "middle";
    drawn.push(svg("text", { x: x(now - before), y: HEIGHT - 4, class: "tick", "text-anchor": anchor }, label));
  }
  if (points.length) {
    const dots = points.slice(0, MOST_DOTS).map(([at, value]) => `M${x(at).toFixed(1)} ${y(value).toFixed(1)}h0`);
    drawn.push(svg("path", { d: dots.join(""), class: "dots" }));
    const wide = span / BUCKETS;
    const buckets = new Map();
    for (const [at, value] of points) {
      const bucket = Math.floor(at / wide);
      if (!buckets.has(bucket)) buckets.set(bucket, []);
      buckets.get(bucket).push(value);
    }
    const lines = { p99: "", p50: "" };
    let before = null;
    for (const bucket of [...buckets.keys()].sort((a, b) => a - b)) {
      const sorted = buckets.get(bucket).sort((a, b) => a - b);
      const at = x(Math.min(now, Math.max(now - span, (bucket + 0.5) * wide)));
      const joined = before === bucket - 1;
      for (const [name, percentile] of [["p50", 50], ["p99", 99]]) {
        const level = y(nearest(sorted, percentile)).toFixed(1);
        lines[name] += joined ? `L${at.toFixed(1)} ${level}` : `M${(at - 2).toFixed(1)} ${level}h4M${at.toFixed(1)} ${level}`;
      }
      before = bucket;
    }
    drawn.push(svg("path", { d: lines.p99, class: "p99" }), svg("path", { d: lines.p50, class: "p50" }));
  } else {
    drawn.push(svg("text", { x: AREA.left + inner.width / 2, y: AREA.top + inner.height / 2, class: "nothing", "text-anchor": "middle" }, `nothing in the last ${ago(span)}`));
  }
  const sorted = values.sort((a, b) => a - b);
  const said = sorted.length ? `p50 ${time(nearest(sorted, 50))}, p99 ${time(nearest(sorted, 99))}` : "";
  say(panel.figures, said);
  const label = `${panel.title}, the last ${ago(span)}: ${said || "nothing"}, ${sorted.length} requests`;
  panel.picture.replaceChildren(svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label }, ...drawn));
}

/** `span` seconds of `requests`, the newest first; a point is at the time of its request's arrival. */
export function showPlots(requests, now, span) {
  for (const panel of panels) {
    const points = [];
    for (const request of requests) {
      if (request[panel.field] !== null && now - request.time <= span) points.push([request.time, request[panel.field]]);
    }
    draw(panel, points, now, span);
  }
}
