// What all parts of the page share: elements, labels, requests, messages.
// Text from people and files only ever becomes text nodes, never markup.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "style") Object.assign(node.style, value);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const labels = { all: { en: {} }, messages: {}, phrases: {}, language: "en" };
const listeners = new Map();

export function on(name, listener) {
  if (!listeners.has(name)) listeners.set(name, new Set());
  listeners.get(name).add(listener);
}

export function emit(name, data) {
  for (const listener of listeners.get(name) ?? []) listener(data);
}

export function setLabels(all, messages, phrases) {
  labels.all = all;
  labels.messages = messages;
  for (const [language, pairs] of Object.entries(phrases)) {
    labels.phrases[language] = pairs.map(([pattern, said]) => [new RegExp(pattern), said]);
  }
  setLanguage(cookie("autolora_language") || (navigator.language.startsWith("zh") ? "zh" : "en"));
}

export function setLanguage(language) {
  labels.language = language in labels.all ? language : "en";
  document.documentElement.lang = labels.language;
  emit("language", labels.language);
}

export const language = () => labels.language;

export function t(key, values = {}) {
  const text = labels.all[labels.language]?.[key] ?? labels.all.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

// A sentence of the program in the language of the page; as it is where it is not known. An error
// comes with its template and values, notes of pictures as they were written.
export function say(sentence) {
  if (typeof sentence?.template === "string") {
    const { template, values, error } = sentence;
    const said = labels.messages[labels.language]?.[template];
    if (said === undefined && error) return say(error);
    let place = 0;
    return (said ?? template).replace(/\{(\d*)\}/g, (whole, number) => say(values[number || place++]));
  }
  if (sentence?.error) return say(sentence.error);
  for (const [pattern, said] of labels.phrases[labels.language] ?? []) {
    const found = pattern.exec(sentence);
    if (found) return said.replace(/\{(\d+)\}/g, (whole, group) => say(found[Number(group) + 1]));
  }
  return sentence;
}

// What an exception says, with its template where it came from the program.
export const reason = (error) => (error.said?.error ? error.said : error.message);

// What a picture of a comparison shows.
export function caption(label) {
  if (label === "fused") return t("fused");
  if (label === "no adapters") return t("no_adapters");
  return label.startsWith("only ") ? `${t("only")} ${label.slice(5)}` : label;
}

export function cookie(name) {
  const found = document.cookie.split("; ").find((pair) => pair.startsWith(`${name}=`));
  return found ? decodeURIComponent(found.slice(name.length + 1)) : "";
}

export async function api(path, options = {}) {
  let answer;
  try {
    answer = await fetch(new URL(`api/${path}`, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("lost"));
  }
  if (answer.ok) return answer;
  const data = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(data.error ?? `${answer.status} ${answer.statusText}`), { said: data });
}

export async function getJson(path, options) {
  return (await api(path, options)).json();
}

export function postJson(path, data, options = {}) {
  const headers = { "Content-Type": "application/json" };
  return getJson(path, { method: "POST", headers, body: JSON.stringify(data), ...options });
}

export async function lines(path, options, each) {
  const reader = (await api(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    parts.filter(Boolean).forEach((part) => each(JSON.parse(part)));
  }
}

export const url = (path) => new URL(path, document.baseURI).href;

export const namePath = (name) => name.split("/").map(encodeURIComponent).join("/");

export function debounce(call, wait) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), wait);
  };
}

export function toast(text, kind = "problem") {
  let box = document.getElementById("al-toasts");
  if (!box) {
    box = el("div", { id: "al-toasts", role: "status", "aria-live": "polite" });
    document.body.append(box);
  }
  const note = el("div", { class: `al-toast ${kind}`, role: kind === "problem" ? "alert" : null }, el("span", {}, text));
  note.append(closeButton(() => note.remove()));
  box.append(note);
  setTimeout(() => note.remove(), kind === "problem" ? 12000 : 5000);
}

export function closeButton(onclick, name = t("close")) {
  return el("button", { type: "button", class: "al-plain", title: name, "aria-label": name, onclick }, icon("drop"));
}

const ICONS = {
  pin: "M9 3h6l-1 6 4 4v2h-5v6h-2v-6H6v-2l4-4z",
  drop: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  seed: "M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  sun: "M12 7a5 5 0 1 0 0 10 5 5 0 0 0 0-10M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M5 19l1.5-1.5M17.5 6.5L19 5",
  language: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M3 12h18M12 3c3 3 3 15 0 18M12 3c-3 3-3 15 0 18",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `al-icon ${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// A cover, or where there is none the first letter on a colour that follows from the name.
export function cover(item, size, props = {}) {
  if (item.covers > 0) {
    const src = url(`api/cover/${namePath(item.name)}?size=${size}&v=${item.version}`);
    const image = el("img", { src, loading: "lazy", decoding: "async", alt: "", draggable: false, ...props });
    image.addEventListener("error", () => image.replaceWith(letter(item, props)), { once: true });
    return image;
  }
  return letter(item, props);
}

function letter(item, props) {
  let hue = 0;
  for (const char of item.name) hue = (hue * 31 + char.codePointAt(0)) % 360;
  const node = el("div", { class: "al-letter", "aria-hidden": "true", ...props }, [...(item.title || item.name)][0].toUpperCase());
  node.style.setProperty("--hue", hue);
  return node;
}
