// Sets the chosen theme before the first paint.
"use strict";
try {
  document.documentElement.dataset.theme = localStorage.getItem("kvbelt-theme") || "auto";
} catch {
  // Storage may be forbidden; then the system's theme applies.
}
