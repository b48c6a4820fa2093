"use strict";
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const scheme = root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.style.colorScheme = scheme === "dark" ? "light" : "dark";
});
