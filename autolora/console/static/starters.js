// What stands where the first picture will be: a few LoRAs of the pool to begin with.

import { cover, el, getJson, on, t } from "./core.js";

const COUNT = 8;

export function starters() {
  const row = el("div", { class: "al-starters" });
  const head = el("p", { class: "al-hint", hidden: true }, t("starters"));
  const node = el("div", { class: "al-empty" },
    el("p", { class: "al-lead" }, t("empty_stage")), el("p", { class: "al-hint" }, t("empty_stage_hint")), head, row);
  fill(head, row);
  on("pool", () => node.isConnected && fill(head, row));
  return node;
}

async function fill(head, row) {
  const page = await getJson("pool?count=240").catch(() => ({ items: [] }));
  const known = page.items.filter((item) => item.covers > 0 && !item.problem);
  const count = Math.min(COUNT, known.length);
  const picked = Array.from({ length: count }, (_, n) => known[Math.floor((n * known.length) / count)]);
  head.hidden = picked.length === 0;
  row.replaceChildren(...picked.map(tile));
  if (page.reading) setTimeout(() => row.isConnected && fill(head, row), 1500);
}

function tile(item) {
  const title = t("use_word", { name: item.title });
  return el("button", { class: "al-tile", title, "aria-label": title, onclick: () => add(item.triggers[0] ?? item.title) },
    cover(item, 256), el("span", { class: "al-name" }, item.title));
}

// As if it had been typed, so that the cards follow.
function add(word) {
  const box = document.querySelector("#al-prompt textarea");
  box.value = [box.value.trim(), word].filter(Boolean).join(", ");
  box.dispatchEvent(new Event("input", { bubbles: true }));
  box.focus();
}
