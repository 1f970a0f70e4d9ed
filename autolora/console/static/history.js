// The pictures of this visit; one click brings the settings back.

import { caption, el, getJson, on, t, url } from "./core.js";

export function history({ element, trigger }) {
  const root = element.firstElementChild;
  let entries = [];

  function draw() {
    root.hidden = entries.length === 0;
    const tiles = entries.map((entry) => {
      const restore = () => trigger("restore", { picture: entry.id });
      const title = [entry.prompt, `${t("seed")} ${entry.seed}`, caption(entry.label)].filter(Boolean).join("\n");
      return el("button", { class: "al-past", title, data: { id: entry.id, seed: entry.seed }, onclick: restore },
        el("img", { src: url(`api/pictures/${entry.id}/small`), loading: "lazy", alt: title }));
    });
    root.replaceChildren(
      el("div", { class: "al-head" }, el("h3", {}, t("history")), el("span", { class: "al-hint" }, t("history_hint"))),
      el("div", { class: "al-pasts" }, ...tiles),
    );
  }

  async function load() {
    entries = await getJson("history").catch(() => entries);
    draw();
  }

  on("picture", load);
  on("language", draw);
  on("back", load);
  window.addEventListener("focus", load); // another tab of the same visit may have drawn
  load();
}
