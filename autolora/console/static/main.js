// Makes the parts of the page known to the page.

import { el, emit, getJson, icon, language, on, setLabels, setLanguage, t } from "./core.js";
import { desk, refresh } from "./desk.js";
import { history } from "./history.js";
import { pool } from "./pool.js";
import { stage } from "./stage.js";

const THEME = "autolora-theme";

function applyTheme() {
  const chosen = localStorage.getItem(THEME);
  if (chosen) document.body.classList.toggle("dark", chosen === "dark");
}

function toggleTheme() {
  const dark = !document.body.classList.contains("dark");
  localStorage.setItem(THEME, dark ? "dark" : "light");
  applyTheme();
}

// What the server is doing: pictures are counted, what it does by itself is named.
function working(jobs) {
  const own = jobs.find((job) => job.kind !== "pictures" && job.state === "running");
  const pictures = jobs.filter((job) => job.kind === "pictures").length;
  const doing = own && `${t(own.kind === "index" ? "indexing" : "loading")} …`;
  return [doing, pictures ? t("queue_now", { n: pictures }) : ""].filter(Boolean).join(" · ");
}

function header({ element, props, trigger }) {
  setLabels(props.value.labels, props.value.messages, props.value.phrases);
  applyTheme();
  const languages = Object.entries(props.value.languages);
  const queue = el("span", { class: "al-queue", role: "status" });
  let lost = false;
  const draw = () => {
    const next = languages.find(([code]) => code !== language());
    const change = () => {
      document.cookie = `autolora_language=${next[0]}; path=/; max-age=31536000; samesite=strict`;
      setLanguage(next[0]);
      trigger("language", { language: next[0] });
    };
    element.firstElementChild.replaceChildren(
      el("img", { src: "console/static/icon.svg", class: "al-logo", alt: "" }),
      el("strong", { role: "heading", "aria-level": "1" }, "AutoLoRA"),
      el("span", { class: "al-model" }, `${t("model")} ${props.value.model}`),
      queue,
      el("span", { class: "al-space" }),
      el("button", { class: "al-plain", title: t("language"), lang: next[0], id: "al-language", onclick: change }, icon("language"), next[1]),
      el("button", { class: "al-plain", title: t("theme"), "aria-label": t("theme"), id: "al-theme", onclick: toggleTheme }, icon("sun")),
    );
  };
  draw();
  on("language", draw);
  const look = async () => {
    if (document.hidden) return;
    const before = lost;
    const { jobs } = await getJson("queue").catch(() => ({}));
    lost = !jobs;
    queue.classList.toggle("al-lost", lost);
    queue.textContent = lost ? t("lost") : working(jobs);
    if (before && !lost) emit("back");
  };
  look();
  on("state", () => setTimeout(look, 300));
  setInterval(look, 5000);
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#al-left")) {
    document.querySelector("#al-generate")?.click();
  }
});

// What is in the form outlives a reload of the page, in this tab only.
const DRAFT = "autolora-draft";
let restored = false;

function keep(values) {
  if (!restored) return; // the empty form, before the draft was read
  try {
    sessionStorage.setItem(DRAFT, JSON.stringify(values));
  } catch {
    // A browser that keeps nothing only loses the draft.
  }
}

function kept(values) {
  restored = true;
  try {
    const draft = JSON.parse(sessionStorage.getItem(DRAFT));
    if (draft?.length !== values.length) return values;
    return [...draft.slice(0, -1), { ...draft.at(-1), saved: "", problem: "" }];
  } catch {
    return values;
  }
}

window.autolora = { header, desk, stage, history, pool, refresh, keep, kept };
window.autoloraDone(window.autolora);
