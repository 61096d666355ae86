// Before the first paint: the theme that was chosen here.
"use strict";
try {
  document.documentElement.dataset.theme = localStorage.getItem("kvbelt-theme") || "auto";
} catch {
  // Storage may be forbidden; the system's theme is good.
}
