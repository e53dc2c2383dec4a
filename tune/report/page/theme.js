"use strict";
// Runs in the head, so that the page is never painted in the wrong colours first.
try {
  const theme = localStorage.getItem("report-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is forbidden: the theme of the system */ }
