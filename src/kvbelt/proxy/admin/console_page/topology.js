// The picture: proxy on top, prefill workers on the left, decode workers on the right, the belt between them.

import { byId, say, svg } from "./dom.js";
import { bytesPerSecond, digits, percent } from "./format.js";
import { severityOf } from "./trouble.js";

const GAP = 16;
const RAIL = 22; // between a column and the line that brings it requests
const PROXY = { width: 226, height: 58 };
const ROOM_FOR_LABELS = 16; // edges beyond which rates stand in the workers' boxes alone

const row = (count) => (count > 6 ? 46 : 78);

export function stateOf(worker) {
  if (worker.standing !== "active") return worker.standing;
  return worker.warming && worker.state === "ready" ? "warming" : worker.state;
}

function text(x, y, content, kind, set = {}) {
  return svg("text", { x, y, class: kind, ...set }, content);
}

/** A bar of shares of a whole, from the left. */
function meter(x, y, width, shares) {
  const parts = [svg("rect", { x, y, width, height: 5, rx: 2.5, class: "track" })];
  let from = x;
  for (const [share, kind] of shares) {
    const wide = Math.max(0, Math.min(share, 1)) * width;
    if (wide > 0.2) parts.push(svg("rect", { x: from, y, width: wide, height: 5, rx: Math.min(2.5, wide / 2), class: kind }));
    from += wide;
  }
  return parts;
}

/** Used, and held by the prefix cache alone, as shares of all blocks. */
export function kvShares({ load }) {
  if (!load.blocks_total) return null;
  const used = (load.blocks_total - load.blocks_free) / load.blocks_total;
  return { used, cached: Math.min(load.blocks_cached / load.blocks_total, 1) };
}

/** The used share of the receive buffer. */
export function bufferShare({ buffers }) {
  if (!buffers || !buffers.receive_bytes) return null;
  return (buffers.bytes_reserved + buffers.bytes_committed + buffers.bytes_quarantined) / buffers.receive_bytes;
}

/** A name that fits. The port is kept, because it distinguishes workers of one host. */
function fitting(name, room) {
  const fits = Math.floor(room / 7.4);
  return name.length <= fits ? name : `…${name.slice(1 - fits)}`;
}

function box(seen, worker, place, rate) {
  const { x, y, width, height } = place;
  const state = stateOf(worker);
  const bad = state === "lost" || state === "unready";
  const idle = state !== "ready";
  const kind = `node ${bad ? "bad" : idle ? "idle" : ""}`;
  const inner = x + 12;
  const right = x + width - 12;
  const drawn = [svg("rect", { x, y, width, height, rx: 10, class: "box" })];
  const narrow = width < 190;
  drawn.push(svg("circle", { cx: inner + 4, cy: y + 19, r: 4, class: "state" }));
  drawn.push(text(inner + 15, y + 23, fitting(worker.worker, width - 40 - (narrow ? 0 : 52)), "name"));
  const told = bad || idle ? state : rate ? `${digits(rate)}/s` : "";
  if (!narrow) drawn.push(text(right, y + 23, told, bad ? "word bad" : "word", { "text-anchor": "end" }));
  const shares = kvShares(worker);
  if (height > 50) {
    const { running, waiting } = worker.load;
    const load = narrow && idle ? state : narrow ? `${running} run, ${waiting} wait` : `${running} running, ${waiting} waiting`;
    const severity = (subject) => severityOf(seen, subject, worker);
    drawn.push(text(inner, y + 45, load, narrow && bad ? "word bad" : "word", { "data-severity": severity("waiting") }));
    if (shares && !narrow) drawn.push(text(right, y + 45, `KV ${percent(shares.used)}`, "word", { "text-anchor": "end", "data-severity": severity("kv") }));
  }
  if (shares) drawn.push(...meter(inner, y + height - 19, width - 24, [[shares.used, "used"]]));
  const buffer = bufferShare(worker);
  if (buffer !== null) drawn.push(...meter(inner, y + height - 11, width - 24, [[buffer, "buffer"]]));
  return svg("g", { class: kind }, svg("title", {}, `${worker.worker}, ${worker.role}: ${state}${worker.detail ? `, ${worker.detail}` : ""}`), ...drawn);
}

/** A point on the curve between two boxes. */
function along(from, to, t) {
  const middle = (from.x + to.x) / 2;
  const [a, b, c, d] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
  return { x: a * from.x + b * middle + c * middle + d * to.x, y: (a + b) * from.y + (c + d) * to.y };
}

function belt(from, to, { pair, link }, labelled) {
  const middle = (from.x + to.x) / 2;
  const path = `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x} ${to.y}`;
  const rate = link?.bytes_per_second ?? 0;
  const broken = pair && (pair.state === "failed" || pair.state === "refused");
  const wide = rate > 0 ? Math.min(7, 2 + Math.log10(1 + rate / 1e6)) : 1.5;
  const kind = broken ? "belt broken" : rate > 0 ? "belt moving" : pair ? "belt" : "belt unknown";
  const said = broken ? `${pair.reason}: ${pair.detail}` : pair ? `connected, ${bytesPerSecond(rate)}` : "not connected yet";
  const drawn = [svg("path", { d: path, class: kind, "stroke-width": wide })];
  if (rate > 0) drawn.push(svg("path", { d: path, class: "flow", "stroke-width": Math.max(1, wide / 3) }));
  if ((labelled && rate > 0) || broken) {
    const at = along(from, to, Math.abs(from.y - to.y) < 1 ? 0.5 : 0.27);
    const label = broken ? "no way" : bytesPerSecond(rate);
    drawn.push(text(at.x, at.y - 4 + 8, label, broken ? "edge bad" : "edge", { "text-anchor": "middle" }));
  }
  return svg("g", {}, svg("title", {}, said), ...drawn);
}

/** The line from the proxy past a column, with an arrow into each of its boxes. */
function rail(from, places, side, moving) {
  if (!places.length) return [];
  const left = side === "left";
  const edge = (place) => (left ? place.x : place.x + place.width);
  const x = edge(places[0]) + (left ? -RAIL : RAIL);
  const radius = 8;
  const turn = left ? -radius : radius;
  const last = places.at(-1);
  const drawn = [];
  for (const place of places) {
    const y = place.y + place.height / 2;
    const end = edge(place) + (left ? -2 : 2);
    drawn.push(
      svg("path", {
        d: `M${from.x} ${from.y}H${x - turn}Q${x} ${from.y} ${x} ${from.y + radius}V${y - radius}Q${x} ${y} ${x - turn} ${y}H${end}`,
        class: place === last || moving ? `rail${moving ? " moving" : ""}` : "rail",
        "marker-end": moving ? "url(#arrow-moving)" : "url(#arrow)",
      }),
    );
  }
  return drawn;
}

function arrow(id, kind) {
  return svg("marker", { id, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", markerUnits: "userSpaceOnUse" }, svg("path", { d: "M0 0.5L8 4L0 7.5z", class: kind }));
}

function column(workers, x, width, top) {
  const height = row(workers.length);
  return workers.map((_, index) => ({ x, width, height, y: top + index * (height + GAP) }));
}

const sum = (values) => Object.values(values).reduce((a, b) => a + b, 0);

export function showTopology(told) {
  const { proxy, workers, pairs, live } = told;
  const holder = byId("topology");
  const width = Math.max(300, holder.clientWidth);
  const prefill = workers.filter((worker) => worker.role === "prefill");
  const decode = workers.filter((worker) => worker.role !== "prefill");
  const narrow = width < 620;
  const boxWidth = Math.min(width > 1100 ? 320 : 250, Math.floor((width - 2 * RAIL - 12 - (narrow ? 44 : 150)) / 2));
  const margin = Math.max(RAIL + 6, narrow ? 0 : (width - 2 * boxWidth - Math.max(460, width / 3)) / 2);
  const top = PROXY.height + (narrow ? 40 : 46);
  const left = column(prefill, margin, boxWidth, top);
  const right = column(decode, width - margin - boxWidth, boxWidth, top);
  // The shorter column is centred on the longer one.
  const end = (places) => (places.length ? places.at(-1).y + places.at(-1).height : top);
  const bottom = Math.max(end(left), end(right));
  for (const places of [left, right]) {
    const down = (bottom - end(places)) / 2;
    for (const place of places) place.y += down;
  }
  const centre = width / 2;
  const at = { x: centre - PROXY.width / 2, y: 4 };
  const middle = at.y + PROXY.height / 2;
  const drawn = [svg("defs", {}, arrow("arrow", "head"), arrow("arrow-moving", "head moving"))];

  const [prompts, answers] = [sum(live.legs.prefill), sum(live.legs.decode)];
  drawn.push(...rail({ x: at.x, y: middle }, left, "left", prompts > 0));
  drawn.push(...rail({ x: at.x + PROXY.width, y: middle }, right, "right", answers > 0));
  if (!narrow) {
    const between = (a, b) => (a + b) / 2;
    if (left.length) drawn.push(text(between(left[0].x - RAIL, at.x), middle - 8, `prompts ${digits(prompts)}/s`, "edge", { "text-anchor": "middle" }));
    drawn.push(text(between(at.x + PROXY.width, width - margin + RAIL), middle - 8, `answers ${digits(answers)}/s, ${digits(live.tokens_per_second)} tokens/s`, "edge", { "text-anchor": "middle" }));
  }

  const known = new Map(pairs.map((pair) => [`${pair.prefill} ${pair.decode}`, pair]));
  const moved = new Map(live.links.map((link) => [`${link.prefill} ${link.decode}`, link]));
  const edges = [];
  const labelled = !narrow && prefill.length * decode.length <= ROOM_FOR_LABELS;
  prefill.forEach((p, i) =>
    decode.forEach((d, j) => {
      const name = `${p.worker} ${d.worker}`;
      const [from, to] = [left[i], right[j]];
      edges.push(
        belt(
          { x: from.x + from.width, y: from.y + from.height / 2 },
          { x: to.x, y: to.y + to.height / 2 },
          { pair: known.get(name), link: moved.get(name) },
          labelled,
        ),
      );
    }),
  );
  // Labels are above every line.
  drawn.push(...edges);
  for (const edge of edges) drawn.push(...edge.querySelectorAll("text"));

  drawn.push(
    svg(
      "g",
      { class: "node proxy" },
      svg("rect", { x: at.x, y: at.y, width: PROXY.width, height: PROXY.height, rx: 10, class: "box" }),
      text(centre, at.y + 24, "proxy", "name", { "text-anchor": "middle" }),
      text(centre, at.y + 43, `${digits(live.requests_per_second)} requests/s, ${digits(proxy.in_flight)} under way`, "word", { "text-anchor": "middle" }),
    ),
  );
  for (const [role, places] of [["prefill", left], ["decode", right]]) {
    if (places.length) drawn.push(text(places[0].x + places[0].width / 2, places[0].y - 7, `${role} worker${places.length > 1 ? "s" : ""}`, "role-name", { "text-anchor": "middle" }));
  }
  prefill.forEach((worker, i) => drawn.push(box(told, worker, left[i], live.legs.prefill[worker.worker])));
  decode.forEach((worker, i) => drawn.push(box(told, worker, right[i], live.legs.decode[worker.worker])));
  const summary = `The proxy sends ${digits(prompts)} prompts per second to ${prefill.length} prefill workers, which send ${bytesPerSecond(live.bytes_per_second)} of KV to ${decode.length} decode workers. The workers' table says more.`;
  const height = bottom + 6;
  holder.replaceChildren(svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary }, ...drawn));
  const off = proxy.placement && proxy.placement.mode !== proxy.placement.setting;
  const broken = pairs.filter((pair) => pair.reason).length;
  say(byId("topology-note"), broken ? `${broken} of ${pairs.length} pairs cannot exchange KV` : off ? "splitting is switched off, because it has lost: requests are answered whole" : prefill.length ? `rates of the last ${Math.round(live.seconds)} s` : "no prefill workers: each prompt is computed where it is answered");
}
