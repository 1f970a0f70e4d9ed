// Styles, and the adapters that the picture would take: found while the prompt is typed.

import { api, closeButton, cover, debounce, el, getJson, icon, language, on, postJson, reason, say, t, toast } from "./core.js";
import { openGallery } from "./gallery.js";

const DEBOUNCE = 30;
const PATIENCE = 1500; // milliseconds between two questions while the server is not ready
let askAgain = () => {};

export const refresh = () => askAgain();

const promptText = () => document.querySelector("#al-prompt textarea")?.value ?? "";
const negativeText = () => document.querySelector("#al-negative :is(textarea, input)")?.value ?? "";

export function desk({ element, props, trigger, watch }) {
  const root = element.firstElementChild;
  const state = { plan: { cards: [], notes: [], ready: true }, styles: [], asked: 0, cards: new Map(), naming: false };
  const parts = {
    styles: el("div", { class: "al-styles", role: "group" }),
    head: el("div", { class: "al-head" }),
    cards: el("div", { class: "al-cards" }),
    foot: el("div", { class: "al-foot" }),
  };
  root.append(parts.styles, parts.head, parts.cards, parts.foot);

  const selection = () => props.value ?? {};
  const change = (changes, ask = true) => {
    props.value = { ...selection(), saved: "", problem: "", ...changes };
    if (ask) askAgain();
  };

  async function ask() {
    const number = ++state.asked;
    const prompt = promptText();
    try {
      const plan = await postJson("cards", { prompt, selection: selection(), negative_prompt: negativeText() });
      if (number !== state.asked) return;
      Object.assign(state, { plan, problem: "" });
    } catch (error) {
      if (number !== state.asked) return;
      state.problem = reason(error);
    }
    state.prompt = prompt;
    drawCards();
    clearTimeout(state.later);
    if (!state.problem && !state.plan.ready) state.later = setTimeout(askAgain, PATIENCE);
  }
  askAgain = debounce(ask, DEBOUNCE);

  async function loadStyles() {
    state.styles = await getJson("styles").catch(() => state.styles);
    drawStyles();
  }

  function drawStyles() {
    parts.styles.setAttribute("aria-label", t("style"));
    const current = selection().style || "base";
    const usable = (style) => style.saved || style.problem || style.name === current || !style.adapters.length || style.missing.length < style.adapters.length;
    const buttons = state.styles.filter(usable).map((style) => {
      const missing = style.missing.length ? `${t("missing")}: ${style.missing.join(", ")}` : "";
      const bad = style.problem || (style.missing.length === style.adapters.length && missing);
      const title = style.title[language()] ?? style.title.en ?? style.name;
      const first = style.adapters[0];
      const image = first && !bad ? cover({ name: first.name, title, covers: 1, version: "" }, 96) : null;
      return el(
        "button",
        {
          class: "al-chip",
          "aria-pressed": String(style.name === current),
          disabled: Boolean(bad),
          title: say(bad || missing || title),
          data: { style: style.name },
          onclick: () => {
            change({ style: style.name === "base" ? "" : style.name, dropped: [], strengths: {} });
            drawStyles();
          },
        },
        image,
        title,
      );
    });
    parts.styles.replaceChildren(...buttons, state.naming ? nameField() : saveButton());
  }

  function saveButton() {
    const open = () => {
      state.naming = true;
      drawStyles();
      parts.styles.querySelector("input").focus();
    };
    return el("button", { class: "al-chip quiet", id: "al-save-style", onclick: open }, icon("plus"), t("save_style"));
  }

  function nameField() {
    const input = el("input", { placeholder: t("style_name"), maxLength: 48, "aria-label": t("style_name") });
    const close = () => {
      state.naming = false;
      drawStyles();
      parts.styles.querySelector("#al-save-style").focus();
    };
    const save = (event) => {
      event.preventDefault();
      if (!input.value.trim()) return;
      change({ save_as: input.value.trim() }, false);
      trigger("save_style");
      close();
    };
    return el(
      "form",
      { class: "al-chip naming", onsubmit: save, onkeydown: (event) => event.key === "Escape" && close() },
      input,
      el("button", { type: "submit" }, t("save")),
      closeButton(close, t("cancel")),
    );
  }

  function drawHead() {
    parts.head.replaceChildren(
      el("h3", {}, t("adapters")),
      toggle("automatic", "automatic", "automatic_hint"),
      toggle("use_triggers", "add_triggers", "add_triggers_hint"),
      el("span", { class: "al-space" }),
      el("button", { class: "al-soft", id: "al-add", onclick: add }, icon("plus"), t("add")),
    );
  }

  function toggle(key, name, hint) {
    const box = el("input", { type: "checkbox", checked: selection()[key] !== false, data: { toggle: key } });
    box.addEventListener("change", () => change({ [key]: box.checked }));
    return el("label", { class: "al-switch", title: t(hint) }, box, el("span"), t(name));
  }

  function add() {
    const taking = () => new Set(state.plan.cards.map((card) => card.name));
    openGallery(taking, (item) => {
      const pinned = { ...selection().pinned };
      if (item.name in pinned) delete pinned[item.name];
      else pinned[item.name] = item.strength;
      const dropped = (selection().dropped ?? []).filter((name) => name !== item.name);
      change({ pinned, dropped }, false);
      return ask();
    });
  }

  function drawCards() {
    const kept = new Map();
    const nodes = state.plan.cards.map((card) => {
      const node = state.cards.get(card.name) ?? makeCard(card.name);
      fillCard(node, card);
      kept.set(card.name, node);
      return node;
    });
    state.cards = kept;
    const same = nodes.length === parts.cards.children.length && nodes.every((node, i) => parts.cards.children[i] === node);
    if (!same) parts.cards.replaceChildren(...nodes);
    drawFoot();
    root.dataset.prompt = state.prompt ?? "";
  }

  async function takeSettings() {
    try {
      const answer = await api("settings", { method: "POST", headers: { "Content-Type": "text/plain" }, body: state.prompt });
      const { order, notes } = await answer.json();
      trigger("restore", { order });
      for (const note of notes) toast(say(note), "info");
    } catch (error) {
      toast(say(reason(error)));
    }
  }

  function drawFoot() {
    const dropped = (selection().dropped ?? []).map((name) => {
      const back = () => change({ dropped: selection().dropped.filter((other) => other !== name) });
      const title = t("bring_back", { name });
      return el("button", { class: "al-gone", title, "aria-label": title, onclick: back }, name);
    });
    const hint = state.plan.cards.length || state.problem ? "" : emptyHint();
    parts.foot.replaceChildren(
      ...(state.plan.pasted && !state.problem ? [el("button", { class: "al-soft", id: "al-take-settings", onclick: takeSettings }, t("take_settings"))] : []),
      ...(state.problem ? [el("p", { class: "al-problem", role: "alert" }, say(state.problem))] : []),
      ...(state.problem ? [] : state.plan.notes.map((note) => el("p", { class: "al-hint" }, say(note)))),
      ...(hint ? [el("p", { class: "al-hint" }, hint)] : []),
      ...(dropped.length ? [el("span", { class: "al-hint" }, t("left_out")), ...dropped] : []),
    );
  }

  function emptyHint() {
    if (state.plan.indexing) return ""; // a note says so, and Generate waits for it
    if (!state.plan.ready) return t("draws_alone");
    return state.prompt?.trim() ? t("nothing_fits") : t("no_prompt");
  }

  function makeCard(name) {
    const slider = el("input", { type: "range", step: 0.05 });
    const number = el("input", { type: "number", step: 0.05, min: -10, max: 10 });
    const node = el("article", { class: "al-card", data: { name }, "aria-label": name });
    node.parts = {
      slider,
      number,
      picture: el("div", { class: "al-cover" }),
      title: el("h4"),
      why: el("p", { class: "al-why" }),
      triggers: el("p", { class: "al-triggers" }),
      channels: el("div", { class: "al-channels" }),
      score: el("span", { class: "al-score" }),
      pin: el("button", { class: "al-plain al-pin" }, icon("pin")),
      drop: el("button", { class: "al-plain al-drop" }, icon("drop")),
    };
    const p = node.parts;
    const set = (value) => {
      if (!Number.isFinite(value)) return;
      slider.value = number.value = value;
      node.classList.toggle("silent", value === 0);
      const pinned = selection().pinned ?? {};
      if (name in pinned) change({ pinned: { ...pinned, [name]: value } }, false);
      else change({ strengths: { ...selection().strengths, [name]: value } }, false);
    };
    slider.addEventListener("input", () => set(slider.valueAsNumber));
    number.addEventListener("change", () => set(number.valueAsNumber));
    p.pin.addEventListener("click", () => pin(name, slider.valueAsNumber));
    p.drop.addEventListener("click", () => drop(name));
    node.append(
      p.picture,
      el("div", { class: "al-body" },
        el("div", { class: "al-title" }, p.title, p.score, el("span", { class: "al-space" }), p.pin, p.drop),
        p.why, p.triggers, p.channels,
        el("div", { class: "al-strength" }, slider, number)),
    );
    return node;
  }

  function fillCard(node, card) {
    const p = node.parts;
    const moving = document.activeElement === p.slider || document.activeElement === p.number;
    if (node.version !== card.version) p.picture.replaceChildren(cover(card, 256));
    node.version = card.version;
    const low = Math.min(0, card.bounds?.[0] ?? 0, card.strength);
    const high = Math.max(1.5, card.bounds?.[1] ?? 0, card.strength);
    Object.assign(p.slider, { min: low, max: high });
    if (!moving) p.slider.value = p.number.value = card.strength;
    node.classList.toggle("silent", card.strength === 0);
    p.title.textContent = card.title;
    p.title.title = card.name;
    for (const part of [p.slider, p.number]) part.setAttribute("aria-label", t("strength_of", { name: card.title }));
    const pinned = card.source === "pinned";
    // What was named by a person needs no reason; that it fits the prompt, too, is worth saying.
    const fits = card.score !== null && (card.source === "found" || card.score >= 0.5);
    const origin = card.source === "found" ? "" : t(`from_${card.source}`);
    p.why.textContent = [origin, fits ? say(card.why) : ""].filter(Boolean).join(" · ");
    p.why.title = p.why.textContent;
    p.triggers.textContent = card.triggers.length ? t("triggers_are", { words: card.triggers.slice(0, 4).join(", ") }) : "";
    p.score.textContent = !fits ? "" : `${Math.round(card.score * 100)} %`;
    p.score.title = t("score");
    p.channels.replaceChildren(...Object.entries(fits ? card.channels : {}).map(([name, value]) => channel(name, value)));
    p.pin.setAttribute("aria-pressed", String(pinned));
    name(p.pin, t(pinned ? "unpin" : "pin"));
    name(p.drop, t("drop"));
    p.pin.hidden = p.drop.hidden = card.source === "prompt";
  }

  function name(button, text) {
    button.title = text;
    button.setAttribute("aria-label", `${text} (${button.closest("article").dataset.name})`);
  }

  function channel(name, value) {
    const bar = el("i");
    bar.style.width = `${Math.round(value * 100)}%`;
    const said = `${t(`channel_${name}`)} ${value.toFixed(2)}`;
    return el("span", { class: `al-channel ${name}`, role: "img", "aria-label": said, title: said }, t(`channel_${name}`), el("b", {}, bar));
  }

  function pin(name, strength) {
    const pinned = { ...selection().pinned };
    if (name in pinned) delete pinned[name];
    else pinned[name] = strength;
    // What more a unit of a style says, such as its steps, is pinned with it.
    const unit = state.plan.cards.find((card) => card.name === name)?.unit ?? {};
    change({ pinned, units: { ...selection().units, [name]: unit } });
  }

  function drop(name) {
    const { pinned = {}, dropped = [], strengths = {} } = selection();
    const rest = { ...pinned };
    delete rest[name];
    const values = { ...strengths };
    delete values[name];
    change({ pinned: rest, strengths: values, dropped: [...new Set([...dropped, name])] });
  }

  function drawAll() {
    drawStyles();
    drawHead();
    drawCards();
  }

  watch("value", () => {
    const { saved, problem } = selection();
    if (saved) toast(t("saved_style", { name: saved }), "info");
    if (problem) toast(say(problem));
    loadStyles();
    drawHead();
    askAgain();
  });
  on("language", drawAll);
  on("pool", () => { loadStyles(); askAgain(); });
  on("use", (item) => {
    const { pinned = {}, dropped = [] } = selection();
    change({ pinned: { ...pinned, [item.name]: item.strength }, dropped: dropped.filter((name) => name !== item.name) });
  });
  document.addEventListener("input", (event) => {
    if (event.target.closest?.("#al-prompt, #al-negative")) askAgain();
  });
  window.addEventListener("focus", loadStyles);
  drawAll();
  loadStyles();
  ask();
}
