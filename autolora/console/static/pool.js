// The pool's page: add files, check them, bring the index up to date, look around.

import { closeButton, cover, el, emit, getJson, icon, lines, namePath, on, reason, say, t, toast, url } from "./core.js";
import { browser } from "./gallery.js";

export function pool({ element }) {
  const root = element.firstElementChild;
  let grid = null;

  function draw() {
    const status = el("div", { class: "al-status", role: "status" });
    const rows = el("div", { class: "al-rows" });
    const detail = el("div", { class: "al-detail" });
    grid = browser((item) => showDetail(item, detail));
    const input = el("input", { type: "file", accept: ".safetensors", multiple: true, hidden: true, id: "al-upload" });
    input.addEventListener("change", () => send([...input.files], status));
    const zone = el("button", { class: "al-zone", onclick: () => input.click() }, el("strong", {}, t("upload")), el("span", {}, t("upload_hint")));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      document.body.classList.remove("al-dropping");
      send([...event.dataTransfer.files], status);
    });
    root.replaceChildren(
      el("div", { class: "al-tools" }, zone, input,
        el("div", { class: "al-actions" },
          el("button", { class: "al-soft", id: "al-reindex", onclick: () => index(status, false) }, t("reindex")),
          el("button", { class: "al-soft", onclick: () => index(status, true) }, t("rebuild")),
          el("button", { class: "al-soft", id: "al-check", onclick: () => check(status, rows) }, t("check")))),
      status, rows, detail, grid.node,
    );
  }

  function progress(status, text, part) {
    const bar = el("i");
    bar.style.width = `${Math.round(100 * part)}%`;
    status.replaceChildren(el("p", { class: "al-doing" }, text), el("div", { class: "al-bar" }, bar));
  }

  function tell(status, text, problem = false) {
    status.append(el("p", { class: problem ? "al-problem" : "al-doing" }, text));
  }

  async function send(files, status) {
    status.replaceChildren();
    const problems = [];
    let added = 0;
    for (const file of files) {
      try {
        const answer = await upload(file, (part) => progress(status, file.name, part));
        status.replaceChildren();
        tell(status, [t("uploaded", { name: answer.name }), ...answer.notes.map(say)].join(" "));
        added += 1;
      } catch (error) {
        problems.push(say(reason(error)));
      }
    }
    if (problems.length) status.replaceChildren(...(added ? status.children : []));
    problems.forEach((problem) => tell(status, problem, true));
    if (added) {
      grid.reload();
      await index(status, false, true);
    }
  }

  function upload(file, tell) {
    return new Promise((done, failed) => {
      const request = new XMLHttpRequest();
      const body = new FormData();
      body.append("file", file);
      request.open("POST", url("api/pool"));
      request.responseType = "json";
      request.upload.onprogress = (event) => tell(event.loaded / Math.max(1, event.total));
      request.onload = () => (request.status < 400 ? done(request.response) : failed(Object.assign(new Error(request.response?.error ?? String(request.status)), { said: request.response ?? {} })));
      request.onerror = () => failed(new Error(t("lost")));
      request.send(body);
    });
  }

  async function index(status, rebuild, keep = false) {
    const own = el("div");
    if (keep) status.append(own);
    else status.replaceChildren(own);
    try {
      await lines(`index?rebuild=${rebuild}`, { method: "POST" }, (row) => {
        if (row.error) throw new Error(row.error);
        if (!row.result) progress(own, `${t("indexing")} ${row.total ? `${row.done}/${row.total}` : ""}`, row.total ? row.done / row.total : 0);
        else {
          own.replaceChildren();
          tell(own, t("indexed", { n: row.result.loras }));
          Object.values(row.result.left_out).forEach((why) => tell(own, `${t("index_left_out")} ${why}`, true));
        }
      });
      emit("pool");
      grid.reload();
    } catch (error) {
      own.replaceChildren();
      tell(own, say(reason(error)), true);
    }
  }

  async function check(status, rows) {
    const table = el("table", {}, el("tr", {}, ...["file", "format", "layers", "rank", "dropped_keys", "problem"].map((key) => el("th", { scope: "col" }, t(key)))));
    rows.replaceChildren(table);
    let problems = 0;
    let files = 0;
    try {
      await lines("check", {}, (row) => {
        if (row.error) throw new Error(row.error);
        if (row.done) progress(status, t("checking", { n: row.done, m: row.total }), row.done / row.total);
        files += 1;
        if (row.problem) problems += 1;
        const report = row.report ?? {};
        const ranks = report.ranks ? [...new Set(report.ranks)].join("–") : "";
        const cells = [row.name, report.format ?? "", report.layers ?? "", ranks, report.dropped_count || "", row.problem || (row.notes ?? []).join(" ")];
        const line = el("tr", { class: row.problem ? "bad" : "" }, ...cells.map((cell) => el("td", {}, String(cell))));
        if (row.problem) table.firstElementChild.after(line);
        else table.append(line);
      });
      const close = closeButton(() => [status, rows].forEach((part) => part.replaceChildren()));
      const said = t(problems ? "not_fine" : "fine", { n: files, m: problems });
      status.replaceChildren(el("div", { class: "al-row" }, el("p", { class: problems ? "al-problem" : "al-doing" }, said), el("span", { class: "al-space" }), close));
    } catch (error) {
      status.replaceChildren();
      tell(status, say(reason(error)), true);
    }
  }

  async function showDetail(item, detail) {
    try {
      const facts = await getJson(`pool/${namePath(item.name)}`);
      const covers = Array.from({ length: Math.min(facts.covers, 6) }, (_, n) =>
        el("img", { src: url(`api/cover/${namePath(item.name)}?n=${n}&size=256`), loading: "lazy", alt: "" }));
      const rows = [["file", `${facts.name}.safetensors`], ["format", facts.format], ["triggers", facts.triggers.join(", ")], ["strength", facts.strength], ["base_model", facts.base_model], ["file_size", megabytes(facts.size)], ["problem", say(facts.problem)]];
      const use = el("button", { class: "al-soft al-use", onclick: () => (emit("use", facts), openTab(0)) }, icon("plus"), t("use"));
      const close = closeButton(() => detail.replaceChildren());
      detail.replaceChildren(
        el("div", { class: "al-covers" }, ...(covers.length ? covers : [cover(facts, 256)])),
        el("div", { class: "al-about" },
          el("div", { class: "al-title" }, el("h3", {}, facts.title), el("span", { class: "al-space" }), facts.problem ? null : use, close),
          el("dl", {}, ...rows.filter(([, value]) => value !== "" && value !== undefined).flatMap(([key, value]) => [el("dt", {}, t(key)), el("dd", {}, String(value))])),
          el("p", { class: "al-tags" }, ...facts.tags.map((tag) => el("span", {}, tag))),
          el("p", { class: "al-hint" }, facts.description ?? "")),
      );
      detail.scrollIntoView({ block: "nearest", behavior: "smooth" });
    } catch (error) {
      toast(say(reason(error)));
    }
  }

  draw();
  on("language", draw);
  on("back", () => grid.reload());
  on("upload", (files) => {
    openTab(1);
    send(files, root.querySelector(".al-status"));
  });
}

const openTab = (number) => document.querySelectorAll("#al-tabs button[role='tab']")[number]?.click();

const megabytes = (bytes) => (bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
