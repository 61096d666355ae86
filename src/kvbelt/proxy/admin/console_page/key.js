// The dialog that asks for the admin key.

import { byId, say } from "./dom.js";

const dialog = byId("key-dialog");
const input = byId("key-input");
let answer = null;

/** Ask for the key; `why` says what for, `error` what was wrong with the last one. Null: not given. */
export function askForKey(why, error = "") {
  say(byId("key-why"), `${why} It is kept in this page until you close or reload it.`);
  say(byId("key-error"), error);
  input.value = "";
  if (!dialog.open) dialog.showModal();
  input.focus();
  answer?.(null);
  return new Promise((resolve) => {
    answer = resolve;
  });
}

function end(key) {
  const resolve = answer;
  answer = null;
  input.value = "";
  if (dialog.open) dialog.close();
  resolve?.(key);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  end(input.value.trim());
});
byId("key-cancel").addEventListener("click", () => end(null));
dialog.addEventListener("close", () => end(null));
