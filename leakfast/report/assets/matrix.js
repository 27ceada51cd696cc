// Who leaked from whom: one row an adapter, one column a persona.
"use strict";
(() => {
  let order = "category";
  const orderWords = { category: "category", leakage: "leakage", cluster: "place in the geometry" };

  // the chart that stands; another behavior of the same adapters and personas only gives its cells other colours and words
  let kept = { key: null };

  const draw = () => {
    const { behavior, y, persona } = LF.state;
    const into = LF.at("matrix");
    const adapters = LF.adaptersOf(behavior, y !== "delta");
    const places = LF.data.order[order];
    const cells = adapters.flatMap((adapter) => places.map((one) => ({ adapter, persona: one, cell: LF.cell(adapter.place, one) })))
      .filter((one) => one.cell && one.cell[y] !== null).map((one) => ({ ...one, value: LF.percent(one.cell[y]) }));
    LF.at("matrix-figure").hidden = !cells.length;
    if (!cells.length) return;
    const words = new Map(adapters.map((adapter) => [adapter, LF.adapterWords(adapter)]));
    const least = Math.min(0, ...cells.map((one) => one.value));
    const most = Math.max(...cells.map((one) => one.value), least < 0 ? -least : 1e-9);
    const named = (one) => words.get(one.adapter);
    const color = least < 0 ? { type: "diverging", scheme: "PuOr", domain: [-most, most], reverse: true } : { type: "linear", scheme: "YlGnBu", domain: [0, most] };
    const frame = cells.map((one) => [named(one), one.persona, one.cell.role === "source"]);
    const key = JSON.stringify([LF.width(into), order, places, persona, frame]);
    const describe = (one) => [`${LF.words(LF.data.personas[one.persona].name)} under ${LF.adapterWords(one.adapter)}`, `${LF.yWords()} ${LF.shown(one.cell[LF.state.y], LF.unit())}`];
    const label = `Matrix of ${LF.yWords()}: ${adapters.length} adapters, ${places.length} personas, ordered by ${orderWords[order]}. Arrow keys move between cells, Enter chooses one.`;
    if (key === kept.key) {
      const scale = Plot.scale({ color });
      cells.forEach((one, place) => {
        Object.assign(kept.cells[place], one);
        kept.rects[place].setAttribute("fill", scale.apply(one.value));
        kept.rects[place].setAttribute("aria-label", describe(one).join(", "));
      });
      kept.chart.setAttribute("aria-label", label);
    } else {
      make(cells, { into, adapters, places, words, named, color, persona, describe, label });
      kept.key = key;
    }
    const highest = Math.max(...cells.map((one) => one.value));
    const scale = least < 0 ? `orange below 0, pale at 0, purple above; ${LF.number(least, 1)} to ${LF.number(highest, 1)}` : highest > 0 ? `from 0 (pale) to ${LF.number(highest, 1)} (dark)` : "0 everywhere";
    LF.at("matrix-told").textContent = `${LF.yWords()} (${LF.unitWords()}), ${scale}.${cells.some((one) => one.cell.role === "source") ? " Red frames: the source itself." : ""} A row an adapter, a column a persona, ordered by ${orderWords[order]}.`;
  };

  const make = (cells, { into, adapters, places, words, named, color, persona, describe, label }) => {
    const chart = Plot.plot({
      className: "lf", width: Math.max(720, LF.width(into)), height: 60 + 26 * adapters.length, marginLeft: Math.min(360, Math.max(150, 7 * Math.max(...[...words.values()].map((one) => one.length)))), marginBottom: 14, marginTop: 10, padding: 0.04,
      style: { background: "transparent" },
      x: { domain: places, axis: null },
      y: { domain: [...words.values()], label: null },
      color,
      marks: [
        Plot.cell(cells, { x: "persona", y: named, fill: "value", className: "cells" }),
        Plot.cell(cells.filter((one) => one.cell.role === "source"), { x: "persona", y: named, stroke: LF.STAR, strokeWidth: 2, fill: "none" }),
        Plot.cell(cells.filter((one) => one.persona === persona), { x: "persona", y: named, stroke: "currentColor", strokeWidth: 1.5, fill: "none" }),
        Plot.cell(cells, Plot.pointer({ x: "persona", y: named, stroke: "currentColor", strokeWidth: 2, fill: "none", maxRadius: 20 })),
      ],
    });
    LF.named(into, chart, label);
    const choose = (one) => LF.set({ persona: one.persona, ...(one.adapter.source === null ? {} : { adapter: one.adapter.place }) });
    const rects = [...chart.querySelectorAll(".cells > *")];
    LF.keys(rects, (place) => describe(cells[place]).join(", "), (place) => choose(cells[place]));
    chart.addEventListener("pointermove", (event) => (chart.value ? LF.tip(event, ...describe(chart.value)) : LF.tip(event)));
    chart.addEventListener("pointerleave", (event) => LF.tip(event));
    chart.addEventListener("click", () => { if (chart.value) choose(chart.value); });
    Object.assign(kept, { chart, cells, rects });
  };

  // the orders that the data has; the chosen one stays while it is among them
  LF.orders = () => {
    const select = LF.at("order");
    const names = Object.keys(LF.data.order);
    if (!names.includes(order)) [order] = names;
    LF.fill(select, names.map((name) => LF.h("option", { value: name }, orderWords[name])));
    select.value = order;
    select.onchange = () => { order = select.value; draw(); };
  };
  LF.parts.push((_, change) => { if (LF.touches(change, "behavior", "y", "persona")) draw(); });
})();
