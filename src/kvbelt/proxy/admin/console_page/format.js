// Formats numbers for people.

const NONE = "–";

/** About three digits. */
export function digits(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3 });
}

/** Milliseconds, as a number and its unit. */
export function duration(ms) {
  if (ms === null || ms === undefined) return [NONE, ""];
  if (ms >= 60_000) return [digits(ms / 60_000), "min"];
  return ms >= 1000 ? [digits(ms / 1000), "s"] : [digits(ms), "ms"];
}

export const time = (ms) => duration(ms).join("\u202f").trim();

/** Bytes, as a number and its unit. */
export function size(bytes) {
  if (bytes === null || bytes === undefined) return [NONE, ""];
  for (const [unit, one] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
    if (bytes >= one) return [digits(bytes / one), unit];
  }
  return [digits(bytes), "B"];
}

export const bytes = (count) => size(count).join("\u202f").trim();
export const bytesPerSecond = (count) => (count ? `${bytes(count)}/s` : "0");
export const percent = (share) => `${Math.round(share * 100)}\u202f%`;
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

/** Seconds, in the unit that fits. */
export function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}
