// What every part of the page uses: making elements (text is always text, never markup), numbers in words, the data by
// place, and the one state that all charts follow.
"use strict";
const LF = { parts: [], data: null, completions: null };

LF.h = (tag, attributes, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "colour") element.style.color = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
};
LF.at = (id) => document.getElementById(id);
LF.fill = (element, ...children) => element.replaceChildren(...children.flat().filter((child) => child !== null));

// what steers instead of being read is written out: the same characters as leakfast/inert.py has, in the same way
LF.STEERING = /[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\u{1bca0}-\u{1bca3}\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/gu;
LF.inert = (text) =>
  String(text).replace(LF.STEERING, (c) => {
    const code = c.codePointAt(0);
    const [mark, width] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
    return `\\${mark}${code.toString(16).padStart(width, "0")}`;
  });
LF.words = (name) => (name === null || name === undefined ? "–" : LF.inert(name).replaceAll("_", " "));

LF.number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
LF.signed = (value, digits = 2) =>
  value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + LF.number(value, digits);
LF.amount = (value, unit, digits = 1) =>
  value === null || value === undefined ? "–" : unit === "share" ? `${LF.number(100 * value, digits)}\u00a0%` : LF.number(value, digits);
LF.range = (low, high, unit, digits = 1) =>
  low === null || high === null || low === undefined
    ? "no interval"
    : unit === "share" ? `${LF.number(100 * low, digits)} to ${LF.number(100 * high, digits)}\u00a0%`
    : `${LF.number(low, digits)} to ${LF.number(high, digits)}`;
// a change: of shares in percentage points, with its sign
LF.change = (value, unit) =>
  value === null || value === undefined ? "–" : unit === "share" ? `${LF.signed(100 * value, 1)}\u00a0pp` : LF.signed(value, 1);
LF.changeRange = (low, high, unit) =>
  low === null || high === null || low === undefined ? "no interval"
    : unit === "share" ? `${LF.signed(100 * low, 1)} to ${LF.signed(100 * high, 1)}\u00a0pp` : `${LF.signed(low, 1)} to ${LF.signed(high, 1)}`;
// in the unit of what the axis shows: a rate or a change of it
LF.shown = (value, unit) => (LF.state.y === "delta" ? LF.change(value, unit) : LF.amount(value, unit));
LF.shownRange = (low, high, unit) => (LF.state.y === "delta" ? LF.changeRange : LF.range)(low, high, unit);
LF.count = (value) => value.toLocaleString("en-US");
LF.mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

// ── data ──────────────────────────────────────────────────────────────────────────────────────────
LF.unpack = async (id) => {
  const bytes = Uint8Array.from(atob(LF.at(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

LF.index = (data) => {
  LF.data = data;
  data.adapters.forEach((adapter, place) => { adapter.place = place; });
  data.adaptersOf = new Map(d3.group(data.adapters, (adapter) => adapter.behavior));
  data.wordsOf = new Map();
  [data.cells, data.found] = [[], []];
  data.rowOf = data.adapters.map(() => new Map());
  data.rates.adapter.forEach((adapter, row) => data.rowOf[adapter].set(data.rates.persona[row], row));
  data.behaviorOf = Object.fromEntries(data.behaviors.map((behavior) => [behavior.name, behavior]));
  data.correlationOf = new Map();
  data.correlations.behavior.forEach((behavior, row) => {
    const c = data.correlations;
    data.correlationOf.set([behavior, c.adapter[row] ?? `pooled ${c.seed[row]}`, c.layer[row], c.cosine[row], c.y[row]].join("|"), row);
  });
};

LF.adaptersOf = (behavior, base = false) =>
  (LF.data.adaptersOf.get(behavior) ?? []).filter((adapter) => base || adapter.source !== null);
LF.severalSeeds = (behavior) => new Set(LF.adaptersOf(behavior).map((adapter) => adapter.seed)).size > 1;
// whether another adapter has the same source and seed: then it is called by its own name too
LF.hasTwin = ({ behavior, source, seed, place }) =>
  LF.adaptersOf(behavior).some((other) => other.place !== place && other.source === source && other.seed === seed);
// charts ask for the same words hundreds of times: they are made once
LF.adapterWords = (adapter) => {
  const { wordsOf } = LF.data;
  if (!wordsOf.has(adapter.place)) {
    wordsOf.set(adapter.place, adapter.source === null ? "unadapted model"
      : LF.words(adapter.source) + (LF.severalSeeds(adapter.behavior) && adapter.seed !== null ? `, seed ${adapter.seed}` : "")
        + (LF.hasTwin(adapter) ? `, ${LF.inert(adapter.adapter)}` : "")
        + (adapter.health && adapter.health !== "ok" ? ` (${adapter.health})` : ""));
  }
  return wordsOf.get(adapter.place);
};

// a row of columns as an object, made once; nobody changes it
const asObject = (columns, made, row) =>
  (made[row] ??= Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[row]])));

// one persona under one adapter: everything the tables say of it
LF.cell = (adapter, persona) => {
  const row = LF.data.rowOf[adapter].get(persona);
  return row === undefined ? null : asObject(LF.data.rates, LF.data.cells, row);
};
LF.cosine = (adapter, persona, layer, kind) => {
  const { source } = LF.data.adapters[adapter];
  if (source === LF.data.personas[persona].name) return 1;
  const found = LF.data.cosines.sources[source];
  const place = LF.data.cosines.layers.indexOf(layer);
  return found === undefined || place < 0 ? null : found[kind][place][persona];
};
LF.correlation = (behavior, adapter, layer, cosine, y) => {
  const row = LF.data.correlationOf.get([behavior, adapter, layer, cosine, y].join("|"));
  return row === undefined ? null : asObject(LF.data.correlations, LF.data.found, row);
};

// ── state ─────────────────────────────────────────────────────────────────────────────────────────
LF.state = { behavior: null, adapter: null, layer: null, cosine: "centered", y: null, persona: null, category: null };

LF.set = (asked) => {
  const change = { ...asked };
  const state = Object.assign(LF.state, change);
  if ("behavior" in change) {
    const behavior = LF.data.behaviorOf[state.behavior];
    Object.assign(state, { y: behavior.outcome, layer: behavior.layer, adapter: null });
    Object.assign(change, { y: null, layer: null, adapter: null });
  }
  const there = LF.adaptersOf(state.behavior);
  if (!there.some((adapter) => adapter.place === state.adapter)) state.adapter = there.length ? there[0].place : null;
  if (!LF.data.cosines.layers.includes(state.layer)) state.layer = LF.data.cosines.layers[0] ?? null;
  if (!LF.data.behaviorOf[state.behavior].ys.includes(state.y)) state.y = "rate";
  LF.data.width = LF.widths();
  for (const part of LF.parts) part(state, change);
  LF.finish();
};
// what needs the page's layout is done after everything has been drawn: once, as the browser has to anyway
LF.last = [];
LF.finish = () => { for (const rest of LF.last.splice(0)) rest(); };
// whether a change asks a part to be drawn anew; without any change all are (another width, data that grew)
LF.touches = (change, ...names) => !Object.keys(change).length || names.some((name) => name in change);
// +1 where a larger rate is more of the behavior, −1 where a smaller one is
LF.sign = () => LF.data.behaviorOf[LF.state.behavior].sign;
LF.unit = () => LF.data.behaviorOf[LF.state.behavior].unit;
// what is measured: of judged behaviors an aligned score, of choices an accuracy, else a rate
LF.measure = () => `${LF.words(LF.state.behavior)} ${LF.data.behaviorOf[LF.state.behavior].measure}`;
LF.yWords = () =>
  LF.state.y === "delta" ? `change of ${LF.measure()}`
    : LF.state.y === "probability" ? `probability of ${LF.words(LF.state.behavior)}` : LF.measure();
LF.percent = (value) => (LF.unit() === "share" ? 100 * value : value);
LF.unitWords = () => (LF.unit() === "share" ? (LF.state.y === "delta" ? "percentage points" : "%") : "points");

// ── what all charts share ─────────────────────────────────────────────────────────────────────────
LF.PALETTE = ["#737373", "#6a5acd", "#56a8d8", "#2f9e8f", "#2e8b45", "#8c8c2a", "#c79a1b", "#cc6677", "#a8325e", "#b055b0", "#4477aa", "#e06a1f"];
LF.SYMBOLS = ["circle", "square", "triangle", "diamond2", "times", "plus", "wye", "hexagon", "asterisk", "cross", "diamond", "star"];
LF.SIGNS = ["●", "■", "▲", "◆", "✕", "+", "Y", "⬢", "✱", "✚", "♦", "✶"];
LF.STAR = "#d7263d";
LF.category = (persona) => LF.data.personas[persona].category ?? "none";
LF.kinds = () => [...LF.data.categories, ...(LF.data.personas.some((p) => p.category === null) ? ["none"] : [])];

// a chart's width is asked before anything is drawn: asked in between, each chart would have the whole page laid out anew
LF.widths = () => new Map([...document.querySelectorAll(".chart")].map((element) => [element, element.clientWidth]));
LF.width = (element) => {
  const known = LF.data.width;
  if (!known.get(element)) known.set(element, element.clientWidth); // it was hidden
  return Math.max(280, Math.min(1060, known.get(element) || 640));
};
LF.plot = (into, label, options) => {
  const chart = Plot.plot({ className: "lf", width: LF.width(into), style: { background: "transparent" }, ...options });
  return LF.named(into, chart, label);
};
// what nobody points at one by one is one path for all that look alike, which Plot's own scales place: a browser styles and
// paints a few elements where there would be hundreds. outline: (values by channel, place) => a path's commands
LF.joined = (outline) => (index, scales, values, dimensions, context) => {
  const group = context.document.createElementNS("http://www.w3.org/2000/svg", "g");
  for (const [fill, places] of d3.group(index, (place) => values.fill?.[place] ?? null)) {
    const path = context.document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", places.map((place) => outline(values, place)).join(""));
    if (fill !== null) path.setAttribute("fill", fill);
    group.append(path);
  }
  return group;
};
// Plot labels groups of marks that have no role, which a screen reader may not say: the chart's own label says it all
LF.named = (into, chart, label) => {
  for (const group of chart.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
  for (const group of chart.querySelectorAll("g[aria-description]")) group.removeAttribute("aria-description");
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-label", label);
  LF.fill(into, chart);
  return chart;
};

// points that the keyboard reaches: one stop a chart, arrows to the next, Enter to choose
LF.keys = (elements, describe, choose) => {
  elements.forEach((element, place) => {
    element.setAttribute("role", "button");
    element.setAttribute("tabindex", place === 0 ? "0" : "-1");
    element.setAttribute("aria-label", describe(place));
  });
  elements[0]?.parentNode.addEventListener("keydown", (event) => {
    const place = elements.indexOf(event.target);
    if (place < 0) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step !== undefined) {
      const next = elements[(place + step + elements.length) % elements.length];
      event.target.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
      event.preventDefault();
    } else if (event.key === "Enter" || event.key === " ") {
      choose(place);
      event.preventDefault();
    }
  });
};

LF.tip = (event, ...lines) => {
  const tip = LF.at("tip");
  if (!lines.length) { tip.hidden = true; return; }
  LF.fill(tip, lines.map((line, place) => LF.h(place ? "span" : "b", {}, line)));
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const top = below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
};
