// Runs before the page is drawn, so that a theme the user chose does not flash the other one first.
try {
  const chosen = localStorage.getItem("gptoss.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is switched off: the page follows the system.
}
