// What the page remembers: theme, reasoning effort and system prompt in this browser, the API key until the tab closes. A browser
// that keeps nothing is no error.

const PLACES = { theme: "localStorage", effort: "localStorage", system: "localStorage", key: "sessionStorage" };

export function remembered(name) {
  try {
    return window[PLACES[name]].getItem(`gptoss.${name}`) ?? "";
  } catch {
    return "";
  }
}

export function remember(name, value) {
  try {
    if (value) window[PLACES[name]].setItem(`gptoss.${name}`, value);
    else window[PLACES[name]].removeItem(`gptoss.${name}`);
  } catch {
    // kept on the page alone, as long as it is open
  }
}

const system = matchMedia("(prefers-color-scheme: dark)");

/** Makes `button` switch between dark and light. Choosing what the system prefers follows the system again. */
export function themeButton(button) {
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    const dark = !isDark();
    if (dark === system.matches) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = dark ? "dark" : "light";
    remember("theme", document.documentElement.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}
