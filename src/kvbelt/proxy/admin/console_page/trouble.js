// What is wrong now, by the thresholds of the alerts. The proxy judges; this page only colours.

import { byId, mark, say } from "./dom.js";

/** `critical`, `warning` or nothing: of a figure, or of a worker's value. */
export function severityOf({ alarms = [] }, subject, worker = null) {
  const found = alarms.find((alarm) => alarm.subject === subject && (!worker || (alarm.worker === worker.worker && alarm.role === worker.role)));
  return found ? found.severity : "";
}

/** The first of them, with what to do. */
export function showTrouble({ alarms = [] }) {
  const node = byId("trouble");
  node.hidden = alarms.length === 0;
  if (!alarms.length) return;
  const [first, ...others] = alarms;
  mark(node, "data-severity", first.severity);
  say(node, `${first.what}${others.length ? ` (and ${others.length} more)` : ""}. What to do: ${first.change}`);
}
