// The picture: how far it is, how it looks so far, and how it was made.

import { api, caption, el, emit, getJson, icon, on, reason, say, t, toast, url } from "./core.js";
import { heatmap } from "./heatmap.js";
import { starters } from "./starters.js";

export function stage({ element, props, trigger, watch }) {
  const root = element.firstElementChild;
  const state = { job: null, chosen: 0, follow: true, shown: 0 };
  const parts = {
    frame: el("div", { class: "al-frame" }),
    bar: el("div", { class: "al-bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, el("i")),
    doing: el("p", { class: "al-doing", role: "status" }),
    strip: el("div", { class: "al-strip" }),
    facts: el("div", { class: "al-facts" }),
  };
  root.append(parts.frame, parts.bar, parts.doing, parts.strip, parts.facts);

  function take(value) {
    if (!value) return;
    if (value.state === "notice") {
      if (value.error) toast(say(value));
      else toast(t("restored"), "info");
      if (value.picture && !active()) show(value.picture);
      return;
    }
    const fresh = !state.job || value.pictures.length < state.job.pictures.length || state.job.state !== "running";
    if (fresh && value.pictures.length === 0) Object.assign(state, { chosen: 0, follow: true, shown: 0 });
    if (state.job?.state !== value.state) emit("state");
    state.job = value;
    if (state.follow) state.chosen = value.pictures[0]?.label ? 0 : Math.max(0, value.pictures.length - 1);
    if (value.pictures.length > state.shown) emit("picture");
    state.shown = value.pictures.length;
    draw();
  }

  // A picture of the history, as if it had just been drawn.
  function show(picture) {
    Object.assign(state, { chosen: 0, follow: true, shown: 1 });
    state.job = { state: "done", kind: "pictures", task: 1, tasks: 1, done: 0, total: 0, preview: "", error: "", pictures: [picture] };
    draw();
  }

  const active = () => ["waiting", "running"].includes(state.job?.state);

  function draw() {
    const job = state.job;
    root.dataset.state = job?.state ?? "empty";
    drawProgress(job);
    drawStrip(job);
    drawFrame(job);
    drawFacts(job);
  }

  function drawProgress(job) {
    parts.bar.hidden = !active();
    parts.doing.className = "al-doing";
    if (!job) parts.doing.textContent = "";
    else if (job.state === "failed") {
      parts.doing.classList.add("al-problem");
      parts.doing.textContent = say(job);
    } else if (job.state === "cancelled") parts.doing.textContent = t("stopped");
    else parts.doing.textContent = active() ? doing(job) : "";
    const part = job?.total ? job.done / job.total : 0;
    const all = job?.kind === "pictures" ? (job.task - 1 + part) / job.tasks : part;
    const percent = Math.round(100 * all);
    parts.bar.firstElementChild.style.width = `${percent}%`;
    parts.bar.setAttribute("aria-valuenow", String(percent));
    parts.bar.setAttribute("aria-label", t("steps"));
    // Whoever listens to the page hears of the end, not of every step.
    parts.doing.setAttribute("aria-live", active() && job.total ? "off" : "polite");
  }

  function doing(job) {
    if (job.kind === "index") return `${t("indexing")} ${job.total ? `${job.done}/${job.total}` : ""}`;
    if (job.state === "waiting") return job.position <= 1 ? t("next") : t("waiting", { n: job.position - 1 });
    if (!job.total) return t("loading");
    const picture = job.tasks > 1 ? `${t("picture_of", { n: job.task, m: job.tasks })} ${caption(job.label)} · ` : "";
    return picture + t("step_of", { n: job.done, m: job.total });
  }

  function drawStrip(job) {
    const pictures = job?.pictures ?? [];
    parts.strip.hidden = pictures.length < 2;
    parts.strip.classList.toggle("compare", Boolean(pictures[0]?.label));
    const nodes = pictures.map((picture, number) => {
      const known = [...parts.strip.children].find((node) => node.dataset.id === picture.id);
      const node = known ?? stripTile(picture, number);
      node.setAttribute("aria-pressed", String(number === state.chosen));
      return node;
    });
    if (nodes.some((node) => !node.isConnected) || nodes.length !== parts.strip.children.length) parts.strip.replaceChildren(...nodes);
  }

  function stripTile(picture, number) {
    const choose = () => {
      Object.assign(state, { chosen: number, follow: false });
      draw();
    };
    const text = picture.label ? caption(picture.label) : String(picture.seed);
    return el("button", { class: "al-shot", data: { id: picture.id }, title: t("show_picture", { seed: picture.seed }), onclick: choose },
      el("img", { src: url(`api/pictures/${picture.id}/small`), alt: "" }), el("span", {}, text));
  }

  function drawFrame(job) {
    const picture = job?.pictures[state.chosen];
    const preview = active() && state.follow && job.preview;
    const source = preview || (picture ? url(picture.url) : "");
    if (!source) {
      const kind = active() ? "busy" : "empty";
      if (parts.frame.dataset.kind === kind) return;
      parts.frame.dataset.kind = kind;
      parts.frame.replaceChildren(active() ? "" : starters());
      return;
    }
    let image = parts.frame.querySelector("a > img");
    if (!image) {
      image = el("img", {});
      parts.frame.replaceChildren(el("a", { target: "_blank", rel: "noopener" }, image));
    }
    parts.frame.dataset.kind = preview ? "preview" : "picture";
    if (image.src !== source) image.src = source;
    image.alt = preview ? t("step_of", { n: job.done, m: job.total }) : picture.report.used_prompt;
    const link = image.parentElement;
    if (preview) link.removeAttribute("href");
    else Object.assign(link, { href: source, title: t("full_size") });
  }

  function drawFacts(job) {
    const picture = active() && state.follow && job.preview ? null : job?.pictures[state.chosen];
    if (parts.facts.dataset.id === (picture?.id ?? "")) return;
    parts.facts.dataset.id = picture?.id ?? "";
    parts.facts.replaceChildren(...(picture ? factsOf(picture) : []));
  }

  function factsOf(picture) {
    const report = picture.report;
    const seed = el("button", { class: "al-soft", title: t("reuse_seed"), "aria-label": `${t("reuse_seed")}: ${picture.seed}`, data: { seed: picture.seed }, onclick: () => trigger("reuse", { seed: picture.seed }) }, icon("seed"), String(picture.seed));
    const facts = [
      `${report.width} × ${report.height}`,
      `${report.steps} ${t("steps")}`,
      `${t("guidance")} ${report.guidance}`,
      `${t("strategy")} ${report.strategy}`,
      t("seconds", { n: report.timings.total.toFixed(1) }),
    ];
    const download = el("a", { class: "al-soft", href: url(picture.url), download: picture.file }, icon("save"), t("download"));
    const nodes = [
      el("div", { class: "al-row" }, el("span", { class: "al-label" }, t("seed")), seed, ...facts.map((fact) => el("span", { class: "al-fact" }, fact)), el("span", { class: "al-space" }), download),
      el("p", { class: "al-reads" }, el("span", { class: "al-label" }, t("reads")), report.used_prompt),
      ...report.notes.map((note) => el("p", { class: "al-hint" }, say(note))),
    ];
    if (report.adapters.length) nodes.push(adapters(report), gates(picture));
    return nodes;
  }

  function adapters(report) {
    const rows = report.adapters.map((used) => {
      const bar = el("i");
      bar.style.width = `${Math.min(100, Math.round((used.gate ?? 0) * 50))}%`;
      return el("li", {},
        el("strong", {}, used.name),
        el("span", { class: "al-times" }, `× ${Number(used.strength.toFixed(2))}`),
        used.gate === null ? null : el("span", { class: "al-gate", title: t("gates") }, el("b", {}, bar), used.gate.toFixed(2)),
        el("span", { class: "al-why" }, say(used.why)));
    });
    return el("ul", { class: "al-used" }, ...rows);
  }

  function gates(picture) {
    const body = el("div");
    const node = el("details", { class: "al-gates" }, el("summary", {}, t("gates")), body);
    node.addEventListener("toggle", async () => {
      if (!node.open || body.childElementCount) return;
      try {
        const order = picture.report.adapters.map((used) => used.name);
        body.replaceChildren(el("p", { class: "al-hint" }, t("gates_hint")), heatmap(await getJson(`pictures/${picture.id}/gates`), order));
      } catch {
        body.replaceChildren(el("p", { class: "al-hint" }, t("gates_none")));
      }
    });
    return node;
  }

  async function dropped(file) {
    if (file.name.toLowerCase().endsWith(".safetensors")) return emit("upload", [file]);
    try {
      const answer = await api("settings", { method: "POST", headers: { "Content-Type": "image/png" }, body: file });
      const { order, notes } = await answer.json();
      trigger("restore", { order });
      for (const note of notes) toast(say(note), "info");
    } catch (error) {
      toast(say(reason(error)));
    }
  }

  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("al-dropping");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("al-dropping"));
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("al-dropping");
    const file = event.dataTransfer?.files[0];
    if (!file || event.defaultPrevented) return;
    event.preventDefault();
    dropped(file);
  });

  watch("value", () => take(props.value));
  on("language", () => {
    parts.facts.dataset.id = "?";
    parts.frame.dataset.kind = "";
    draw();
  });
  draw();
}
