// What is wrong now, by the thresholds of the alerts. The proxy judges; this page only colours.

import { byId, mark, say } from "./dom.js";

/** `critical`, `warning` or nothing: of a figure, or of a worker's value. */
export function severityOf({ alarms = [] }, subject, worker = null) {
  const found = alarms.find((alarm) => alarm.subject === subject && (!worker || (alarm.worker === worker.worker && alarm.role === worker.role)));
  return found ? found.severity : "";
}

function show(id, one, begin, more = "") {
  const node = byId(id);
  node.hidden = !one;
  if (!one) return;
  mark(node, "data-severity", one.severity);
  say(node, `${begin}${one.what}${more}.${one.change ? ` What to do: ${one.change}` : ""}`);
}

/** The first alarm, and what the doctor, who looks every half minute, has found first. */
export function showTrouble({ alarms = [], doctor = null }) {
  show("trouble", alarms[0] ?? null, "", alarms.length > 1 ? ` (and ${alarms.length - 1} more)` : "");
  show("doctor", doctor, "The doctor says: ");
}
