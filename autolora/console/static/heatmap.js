// Gates as heat maps: one picture per adapter, layers as rows and steps as columns.

import { el, t } from "./core.js";

const SPAN = 0.4; // shortest range that the colours stand for, so that noise stays grey

export function heatmap(gates, order) {
  const range = rangeOf(gates);
  const readout = el("p", { class: "al-readout" }, " ");
  const names = Object.keys(gates.adapters).sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const maps = names.map((name) => one(name, gates.adapters[name], gates, range, readout));
  const scale = el("div", { class: "al-scale" }, range[0].toFixed(1), el("i"), range[1].toFixed(1), readout);
  return el("div", { class: "al-heat" }, el("div", { class: "al-maps" }, ...maps), scale);
}

// One range for all adapters; a gate counts 1 where the plain sum lets everything through.
function rangeOf(gates) {
  const values = Object.values(gates.adapters).flat(2).filter((value) => value !== null);
  const middle = (Math.min(...values) + Math.max(...values)) / 2;
  const half = Math.max(SPAN / 2, (Math.max(...values) - Math.min(...values)) / 2);
  const low = Math.max(0, middle - half);
  return [low, Math.max(middle + half, low + SPAN)];
}

function one(name, rows, gates, range, readout) {
  const known = rows.flat().filter((value) => value !== null);
  const mean = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 0;
  const said = t("gate_mean", { value: mean.toFixed(2) });
  const canvas = el("canvas", { width: gates.steps, height: gates.layers.length, role: "img", "aria-label": `${name}, ${said}` });
  const context = canvas.getContext("2d");
  const image = context.createImageData(gates.steps, gates.layers.length);
  rows.forEach((row, y) => {
    for (let x = 0; x < gates.steps; x++) {
      image.data.set(row ? colour((row[x] - range[0]) / (range[1] - range[0])) : [0, 0, 0, 0], 4 * (y * gates.steps + x));
    }
  });
  context.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.min(gates.steps - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * gates.steps)));
    const y = Math.min(gates.layers.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * gates.layers.length)));
    const value = rows[y]?.[x];
    readout.textContent = `${name} · ${gates.layers[y]} · ${t("step")} ${x + 1}: ${value === undefined ? "–" : value.toFixed(2)}`;
  });
  canvas.addEventListener("pointerleave", () => (readout.textContent = " "));
  return el("figure", {}, el("figcaption", {}, el("strong", {}, name), ` ${said}`), canvas,
    el("div", { class: "al-axis" }, el("span", {}, `${t("step")} 1`), el("span", {}, String(gates.steps))));
}

// From night to flame; even steps in lightness, so that it reads in grey as well.
const STOPS = [[22, 20, 34], [86, 33, 82], [178, 58, 58], [233, 131, 57], [252, 214, 122], [255, 250, 226]];

function colour(value) {
  const place = Math.min(0.9999, Math.max(0, value)) * (STOPS.length - 1);
  const below = Math.floor(place);
  const mix = place - below;
  return [0, 1, 2].map((i) => Math.round(STOPS[below][i] * (1 - mix) + STOPS[below + 1][i] * mix)).concat(255);
}
