// Makes the parts of the page known to the page.

import { el, getJson, icon, language, on, setLabels, setLanguage, t } from "./core.js";
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

function header({ element, props, trigger }) {
  setLabels(props.value.labels);
  applyTheme();
  const languages = Object.entries(props.value.languages);
  const queue = el("span", { class: "al-queue" });
  const draw = () => {
    const next = languages.find(([code]) => code !== language());
    const change = () => {
      document.cookie = `autolora_language=${next[0]}; path=/; max-age=31536000; samesite=strict`;
      setLanguage(next[0]);
      trigger("language", { language: next[0] });
    };
    element.firstElementChild.replaceChildren(
      el("img", { src: "console/static/icon.svg", class: "al-logo", alt: "" }),
      el("strong", {}, "AutoLoRA"),
      el("span", { class: "al-model" }, `${t("model")} ${props.value.model}`),
      queue,
      el("span", { class: "al-space" }),
      el("button", { class: "al-plain", title: t("language"), id: "al-language", onclick: change }, icon("language"), next[1]),
      el("button", { class: "al-plain", title: t("theme"), id: "al-theme", onclick: toggleTheme }, icon("sun")),
    );
  };
  draw();
  on("language", draw);
  const look = async () => {
    if (document.hidden) return;
    const { jobs } = await getJson("queue").catch(() => ({ jobs: [] }));
    queue.textContent = jobs.length ? t("queue_now", { n: jobs.length }) : "";
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

window.autolora = { header, desk, stage, history, pool, refresh };
window.autoloraDone(window.autolora);
