// What the browser does by itself: report clicks, move among chips by arrow keys, shade texts on hover, remember the
// theme, keep the address in step. Nothing is computed here.
window.qwenScope = (() => {
  const picks = (event) => event.target.closest("[data-pick]");

  function attach(element, report, watch) {
    element.addEventListener("click", (event) => {
      const copy = event.target.closest("[data-copy]");
      if (copy) return copied(copy);
      const target = picks(event);
      if (target) report({ pick: target.dataset.pick });
    });
    element.addEventListener("keydown", rove);
    for (const kind of ["mouseover", "focusin"]) element.addEventListener(kind, shade);
    watch("value", () => arranged(element));
    arranged(element);
  }

  // One stop of the tab key per group; arrow keys move inside it.
  function arranged(element) {
    for (const group of element.querySelectorAll("[data-roving]")) {
      const buttons = [...group.querySelectorAll("button")];
      const current = buttons.find((b) => b.getAttribute("aria-pressed") === "true") ?? buttons[0];
      for (const button of buttons) button.tabIndex = button === current ? 0 : -1;
    }
    const address = element.querySelector("[data-address]");
    if (address && element.offsetParent) history.replaceState(null, "", address.dataset.address);
    const goes = element.querySelector("[data-go]");
    if (goes && openTab() === goes.dataset.from) show(goes.dataset.go);
    for (const peak of element.querySelectorAll(".qs-whole .qs-peak")) {
      const box = peak.closest(".qs-whole");
      box.scrollTop = peak.offsetTop - box.offsetTop - box.clientHeight / 2;
    }
  }

  // Only the browser opens tabs: at once, on the visitor's click or for the address. An answer that comes late has at
  // most a `data-go`, which is followed while the visitor still is where they asked.
  const buttons = () => [...document.querySelectorAll("#qs-tabs button[role='tab']")];
  const named = (button) => button.textContent.trim().toLowerCase();
  const openTab = () => buttons().filter((b) => b.getAttribute("aria-selected") === "true").map(named)[0];
  const show = (tab) => buttons().find((b) => named(b) === tab)?.click();

  function arrive() {
    const asked = new URLSearchParams(location.search);
    const tab = asked.has("text") ? "explore" : asked.has("feature") || asked.has("layer") ? "feature" : asked.get("tab");
    if (!tab || tab === "explore") return;
    const watching = new MutationObserver(() => {
      if (!buttons().some((b) => named(b) === tab)) return;
      watching.disconnect();
      show(tab);
    });
    watching.observe(document.documentElement, { childList: true, subtree: true });
  }
  arrive();

  // A link to a feature opens in this page, so that nothing of the other tabs is lost; Back reads the address again.
  let follow = null;
  const route = (report) => (follow = report);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='?layer=']");
    if (!link || !follow || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    const asked = new URLSearchParams(link.getAttribute("href"));
    history.pushState(null, "", link.getAttribute("href"));
    show("feature");
    follow({ pick: `open:${asked.get("layer")}/${asked.get("feature")}` });
  });
  window.addEventListener("popstate", () => location.reload());

  function rove(event) {
    const group = event.target.closest("[data-roving]");
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!group || (!step && event.key !== "Home" && event.key !== "End")) return;
    const buttons = [...group.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    event.preventDefault();
    const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : at + step;
    const next = buttons[Math.min(buttons.length - 1, Math.max(0, to))];
    buttons.forEach((button) => (button.tabIndex = button === next ? 0 : -1));
    next.focus();
  }

  // A row carries its activations as {"a": [[position, share], ...], "b": ...}; the chips it shades have the ids of
  // the groups in data-shades. All other chips of those groups lose their shade.
  function shade(event) {
    const row = event.target.closest("[data-shade]");
    if (!row || row.classList.contains("qs-shading")) return;
    const root = row.closest("[data-shading]");
    root?.querySelectorAll(".qs-shading").forEach((other) => other.classList.remove("qs-shading"));
    row.classList.add("qs-shading");
    for (const [side, pairs] of Object.entries(JSON.parse(row.dataset.shade))) {
      const chips = document.querySelectorAll(`[data-side="${side}"] .qs-token`);
      chips.forEach((chip) => chip.style.removeProperty("--v"));
      for (const [position, share] of pairs) chips[position]?.style.setProperty("--v", share);
    }
  }

  function copied(button) {
    const text = new URL(button.dataset.copy, location.href).href;
    const before = button.textContent;
    const done = (word) => {
      button.textContent = word;
      setTimeout(() => (button.textContent = before), 1500);
    };
    const copying = navigator.clipboard?.writeText(text);
    if (copying) copying.then(() => done("Copied"), () => window.prompt("Copy this link", text));
    else window.prompt("Copy this link", text);
  }

  function save(name, text, type = "application/json") {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  // The theme: what was chosen last, else what the system prefers; ?__theme= of the address goes before both.
  const THEME = "qwen-scope-theme";
  document.addEventListener("click", (event) => {
    if (!event.target.closest?.("#qs-theme")) return;
    const dark = document.body.classList.toggle("dark");
    dress();
    try { localStorage.setItem(THEME, dark ? "dark" : "light"); } catch { /* private windows remember nothing */ }
  });
  let remembered = null;
  try { remembered = localStorage.getItem(THEME); } catch { /* private windows remember nothing */ }
  const asked = new URLSearchParams(location.search).get("__theme");
  if (remembered && !asked) {
    const apply = () => document.body.classList.toggle("dark", remembered === "dark");
    if (document.body) apply(); else document.addEventListener("DOMContentLoaded", apply);
    window.addEventListener("load", apply);
  }

  // A graph is a page of its own inside this one, which reaches nothing here: it tells which nodes are pinned in it, and
  // is told whether this page is light or dark.
  let pins = [];
  const frame = () => document.querySelector("#why-graph iframe");
  const dress = () =>
    frame()?.contentWindow.postMessage({ scheme: document.body.classList.contains("dark") ? "dark" : "light" }, "*");
  window.addEventListener("message", (event) => {
    if (event.source !== frame()?.contentWindow || !Array.isArray(event.data?.pinned)) return;
    pins = event.data.pinned.filter(Number.isInteger);
    dress();
  });
  const pinned = () => JSON.stringify(pins);
  const savePage = () => frame() && save("why.html", frame().srcdoc, "text/html");

  return { attach, route, save, pinned, savePage };
})();
