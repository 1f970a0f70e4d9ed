// The pool as a grid that loads page by page, in a dialog or as a part of a page.

import { closeButton, cover, debounce, el, getJson, reason, say, t } from "./core.js";

const PAGE = 60;

export function browser(pick, chosen = () => new Set()) {
  const state = { start: 0, total: 0, number: 0, busy: false, tag: "", format: "" };
  const search = el("input", { type: "search", placeholder: t("search_pool"), "aria-label": t("search_pool") });
  const tags = el("select", { "aria-label": t("all_tags"), hidden: true });
  const formats = el("select", { "aria-label": t("all_formats"), hidden: true });
  const grid = el("div", { class: "al-grid" });
  const count = el("span", { class: "al-count" });
  const end = el("div", { class: "al-end" });
  const problem = el("p", { class: "al-problem", role: "status" });
  const node = el("div", { class: "al-browser" }, el("div", { class: "al-filters" }, search, tags, formats, count), problem, grid, end);

  async function load(fresh) {
    if (!fresh && (state.busy || state.start >= state.total)) return;
    const number = ++state.number;
    state.busy = true;
    const start = fresh ? 0 : state.start;
    const query = new URLSearchParams({ q: search.value, tag: tags.value, format: formats.value, start, count: PAGE });
    try {
      const page = await getJson(`pool?${query}`);
      if (number !== state.number) return;
      problem.textContent = "";
      state.start = start + page.items.length;
      state.total = page.total;
      if (fresh) {
        grid.replaceChildren();
        grid.scrollTop = 0;
        facet(tags, t("all_tags"), page.tags);
        facet(formats, t("all_formats"), page.formats);
      }
      grid.append(...page.items.map(tile));
      count.textContent = t("shown_of", { n: page.total, m: page.pool });
      if (!page.total) problem.textContent = t("nothing_found");
      problem.className = "al-hint";
      if (page.reading) setTimeout(() => state.start <= PAGE && load(true), 1500);
    } catch (error) {
      if (number !== state.number) return;
      problem.textContent = say(reason(error));
      problem.className = "al-problem";
      if (fresh) grid.replaceChildren();
    } finally {
      if (number === state.number) state.busy = false;
    }
  }

  function facet(select, all, counts) {
    const value = select.value;
    const options = Object.entries(counts).map(([name, n]) => el("option", { value: name }, `${name} (${n})`));
    select.replaceChildren(el("option", { value: "" }, all), ...options);
    select.value = [...select.options].some((option) => option.value === value) ? value : "";
    select.hidden = options.length < 2;
  }

  function tile(item) {
    const button = el(
      "button",
      { class: "al-tile", "aria-pressed": String(chosen().has(item.name)), title: item.name, data: { name: item.name } },
      cover(item, 256),
      el("span", { class: "al-name" }, item.title),
      item.problem ? el("span", { class: "al-bad", title: say(item.problem) }, "!") : null,
    );
    button.addEventListener("click", async () => {
      await pick(item, button);
      button.setAttribute("aria-pressed", String(chosen().has(item.name)));
    });
    return button;
  }

  search.addEventListener("input", debounce(() => load(true), 80));
  tags.addEventListener("change", () => load(true));
  formats.addEventListener("change", () => load(true));
  new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && load(false), { rootMargin: "600px" }).observe(end);
  load(true);
  return { node, search, reload: () => load(true) };
}

export function openGallery(chosen, pick) {
  const { node, search } = browser(pick, chosen);
  const dialog = el("dialog", { class: "al-dialog", id: "al-gallery" });
  const close = () => dialog.close();
  dialog.setAttribute("aria-label", t("add"));
  dialog.append(el("header", {}, el("h3", {}, t("add")), closeButton(close)), node);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  document.body.append(dialog);
  dialog.showModal();
  search.focus();
}
