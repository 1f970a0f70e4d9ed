// The pool's page: add files, check them, bring the index up to date, look around.

import { cover, el, emit, getJson, lines, namePath, on, t, toast, url } from "./core.js";
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

  function say(status, text, problem = false) {
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
        say(status, [t("uploaded", { name: answer.name }), ...answer.notes].join(" "));
        added += 1;
      } catch (error) {
        problems.push(error.message);
      }
    }
    if (problems.length) status.replaceChildren(...(added ? status.children : []));
    problems.forEach((problem) => say(status, problem, true));
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
      request.onload = () => (request.status < 400 ? done(request.response) : failed(new Error(request.response?.error ?? String(request.status))));
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
          say(own, t("indexed", { n: row.result.loras }));
          Object.values(row.result.left_out).forEach((why) => say(own, `${t("index_left_out")} ${why}`, true));
        }
      });
      emit("pool");
      grid.reload();
    } catch (error) {
      own.replaceChildren();
      say(own, error.message, true);
    }
  }

  async function check(status, rows) {
    const table = el("table", {}, el("tr", {}, ...["file", "format", "layers", "rank", "dropped_keys", "problem"].map((key) => el("th", {}, t(key)))));
    rows.replaceChildren(table);
    let problems = 0;
    try {
      await lines("check", {}, (row) => {
        if (row.error) throw new Error(row.error);
        if (row.done) progress(status, t("checking", { n: row.done, m: row.total }), row.done / row.total);
        if (row.problem) problems += 1;
        const report = row.report ?? {};
        const ranks = report.ranks ? [...new Set(report.ranks)].join("–") : "";
        const cells = [row.name, report.format ?? "", report.layers ?? "", ranks, report.dropped_count || "", row.problem || (row.notes ?? []).join(" ")];
        const line = el("tr", { class: row.problem ? "bad" : "" }, ...cells.map((cell) => el("td", {}, String(cell))));
        if (row.problem) table.firstElementChild.after(line);
        else table.append(line);
      });
      status.replaceChildren();
      if (!problems) say(status, t("fine"));
    } catch (error) {
      status.replaceChildren();
      say(status, error.message, true);
    }
  }

  async function showDetail(item, detail) {
    try {
      const facts = await getJson(`pool/${namePath(item.name)}`);
      const covers = Array.from({ length: Math.min(facts.covers, 6) }, (_, n) =>
        el("img", { src: url(`api/cover/${namePath(item.name)}?n=${n}&size=256`), loading: "lazy", alt: "" }));
      const rows = [["file", `${facts.name}.safetensors`], ["format", facts.format], ["triggers", facts.triggers.join(", ")], ["strength", facts.strength], ["problem", facts.problem]];
      const close = el("button", { class: "al-plain", title: t("close"), onclick: () => detail.replaceChildren() }, "×");
      detail.replaceChildren(
        el("div", { class: "al-covers" }, ...(covers.length ? covers : [cover(facts, 256)])),
        el("div", { class: "al-about" },
          el("div", { class: "al-title" }, el("h3", {}, facts.title), el("span", { class: "al-space" }), close),
          el("dl", {}, ...rows.filter(([, value]) => value !== "" && value !== undefined).flatMap(([key, value]) => [el("dt", {}, t(key)), el("dd", {}, String(value))])),
          el("p", { class: "al-tags" }, ...facts.tags.map((tag) => el("span", {}, tag))),
          el("p", { class: "al-hint" }, facts.description ?? "")),
      );
      detail.scrollIntoView({ block: "nearest", behavior: "smooth" });
    } catch (error) {
      toast(error.message);
    }
  }

  draw();
  on("language", draw);
}
