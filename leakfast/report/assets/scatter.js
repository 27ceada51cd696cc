// Cosine against leakage, one point a persona: hover tells who, click chooses, dragging compares a selection's mean.
"use strict";
LF.points = (adapter = LF.state.adapter) => {
  const { layer, cosine, y } = LF.state;
  const { personas } = LF.data;
  const found = [];
  personas.forEach((person, persona) => {
    const cell = adapter === null ? null : LF.cell(adapter, persona);
    const value = cell && cell[y];
    const at = cell && LF.cosine(adapter, persona, layer, cosine);
    if (value === null || value === undefined || at === null || at === undefined) return;
    const [low, high] = y === "rate" ? [cell.low, cell.high] : [cell[`${y}_low`], cell[`${y}_high`]];
    found.push({ persona, name: person.name, x: at, y: LF.percent(value), leaks: LF.sign() * value, value, low, high, cell, category: LF.category(persona), source: cell.role === "source" });
  });
  return found;
};

// the isotonic curve of y on x over points, rising or falling as they do, by pools of adjacent violators: as the statistics have it
LF.isotonic = (points, weight = (point) => Math.max(point.cell.total || 1, 1e-9)) => {
  const ordered = d3.sort(points, (point) => point.x);
  const ways = [1, -1].map((way) => {
    const pools = [];
    for (const point of ordered) {
      pools.push({ y: point.value, w: weight(point), n: 1 });
      for (let at = pools.length - 1; at > 0 && way * pools[at - 1].y >= way * pools[at].y; at -= 1) {
        const [a, b] = [pools[at - 1], pools.pop()];
        pools[at - 1] = { y: (a.y * a.w + b.y * b.w) / (a.w + b.w), w: a.w + b.w, n: a.n + b.n };
      }
    }
    const fitted = pools.flatMap((pool) => Array(pool.n).fill(pool.y));
    return [fitted, d3.sum(ordered, (point, at) => weight(point) * (point.value - fitted[at]) ** 2)];
  });
  const [fitted] = ways[1][1] < ways[0][1] ? ways[1] : ways[0];
  const mean = d3.rollup(d3.range(ordered.length), (places) => d3.mean(places, (at) => fitted[at]), (at) => ordered[at].x);
  return (point) => mean.get(point.x);
};

// what each bystander shows more than the curve of leakage on cosine over them all, itself among them, and less below it; most
// of the behavior first: a low rate where less is more of it (accuracy, alignment)
LF.beyond = (points) => {
  const mine = points.filter((point) => !point.source);
  if (new Set(mine.map((point) => point.value)).size < 2) return []; // where all leak alike there is no curve
  const expected = LF.isotonic(mine);
  return mine.map((point) => ({ ...point, expected: expected(point), beyond: point.value - expected(point) }))
    .sort((a, b) => LF.sign() * (b.beyond - a.beyond) || a.persona - b.persona);
};

LF.rhoWords = (found) => {
  if (!found || found.spearman === null) return "ρ is not defined here";
  const [low, high, over] = found.spearman_both_low !== null
    ? [found.spearman_both_low, found.spearman_both_high, "personas and questions"]
    : [found.spearman_ci_low, found.spearman_ci_high, "personas"];
  const interval = low === null ? "" : `, 95 % ${LF.signed(low)} to ${LF.signed(high)} over ${over}`;
  const rank = found.rank === null ? "" : `; the source's own |ρ| is number ${LF.number(found.rank, found.rank % 1 ? 1 : 0)} of ${found.candidates} personas put in its place`;
  return `ρ ${LF.signed(found.spearman)}${interval}, N ${found.n}${rank}`;
};

(() => {
  let brushing = false;

  const describe = (point) => [
    LF.words(point.name),
    `${LF.yWords()} ${LF.shown(point.value, LF.unit())}, 95 % ${LF.shownRange(point.low, point.high, LF.unit())}`,
    ...(point.cell.hits === null ? [] : [`${LF.number(point.cell.hits, 0)} of ${LF.count(point.cell.total)}`]),
    point.source ? "the source itself" : `cosine ${LF.signed(point.x, 3)}`,
    ...(point.cell.mean_tokens === null ? [] : [`${LF.number(point.cell.mean_tokens, 1)} tokens a reply`]),
    ...(LF.data.personas[point.persona].prompt ? [`“${LF.inert(LF.data.personas[point.persona].prompt)}”`] : []),
  ];

  const told = (points) => {
    const { behavior, layer, cosine, y, adapter } = LF.state;
    const name = LF.data.adapters[adapter].adapter;
    const star = points.some((point) => point.source) ? "; the star is the source, at cosine 1" : "";
    const less = LF.sign() < 0 ? ` Lower is more of ${LF.words(behavior)}.` : "";
    return `${LF.rhoWords(LF.correlation(behavior, name, layer, cosine, y))}. Each point is a bystander${star}; thin lines are 95 % intervals.${less}`;
  };

  const compare = (points, inside) => {
    const mine = points.filter((point) => !point.source);
    const [chosen, others] = [mine.filter(inside), mine.filter((point) => !inside(point))];
    const mean = (some) => LF.mean(some.map((point) => point.value));
    const line = chosen.length
      ? `${chosen.length} selected: mean ${LF.shown(mean(chosen), LF.unit())}; the other ${others.length}: ${LF.shown(mean(others), LF.unit())}. Chosen by looking, so no interval is given. ${chosen.map((point) => LF.words(point.name)).join(", ")}`
      : "Nothing selected. Drag over points to compare their mean with the others'.";
    LF.at("selected").textContent = line;
  };

  const addBrush = (chart, points) => {
    const [x, y] = [chart.scale("x"), chart.scale("y")];
    const brush = d3.brush().on("end", ({ selection }) => {
      if (!selection) return compare(points, () => false);
      const [[left, top], [right, bottom]] = selection;
      return compare(points, (p) => x.apply(p.x) >= left && x.apply(p.x) <= right && y.apply(p.y) >= top && y.apply(p.y) <= bottom);
    });
    d3.select(chart).append("g").attr("class", "brush").call(brush);
  };

  // of labels that would lie over each other the first stays; the chosen persona's before all
  const apart = (chart) => {
    const texts = [...chart.querySelectorAll(".labels > text")].reverse();
    const kept = [];
    for (const text of texts) {
      const box = text.getBBox();
      const at = text.transform.baseVal.consolidate()?.matrix ?? { e: 0, f: 0 };
      const mine = [box.x + at.e, box.y + at.f, box.x + at.e + box.width, box.y + at.f + box.height];
      if (kept.some((one) => mine[0] < one[2] && one[0] < mine[2] && mine[1] < one[3] && one[1] < mine[3])) text.remove();
      else kept.push(mine);
    }
  };

  const draw = () => {
    const into = LF.at("scatter");
    const points = LF.points();
    const bystanders = points.filter((point) => !point.source);
    const outliers = LF.beyond(points);
    LF.at("beyond").hidden = !outliers.length;
    LF.at("brush").hidden = LF.at("legend").hidden = !bystanders.length;
    if (!bystanders.length) {
      LF.fill(into, LF.h("p", { class: "note" }, "No cosines of this source at this layer, or nothing measured: there is nothing to set against each other."));
      LF.at("scatter-told").textContent = "";
      return;
    }
    const faded = (point) => LF.state.category !== null && point.category !== LF.state.category && !point.source;
    const labelled = new Set([...outliers.slice(0, 3), ...outliers.slice(-1)].map((point) => point.persona));
    if (LF.state.persona !== null) labelled.add(LF.state.persona);
    const kinds = LF.kinds();
    const chart = LF.plot(into, `Scatter plot: ${LF.state.cosine} cosine to ${LF.words(LF.data.adapters[LF.state.adapter].source)} at layer ${LF.state.layer} against ${LF.yWords()}, ${bystanders.length} bystanders. Arrow keys move between points, Enter chooses one.`, {
      height: Math.min(460, Math.max(300, LF.width(into) * 0.55)),
      marginLeft: 48, marginBottom: 40, inset: 10,
      x: { label: `${LF.state.cosine} cosine to ${LF.words(LF.data.adapters[LF.state.adapter].source)}, layer ${LF.state.layer} →`, grid: true, labelAnchor: "center" },
      y: { label: `↑ ${LF.yWords()} (${LF.unitWords()})`, grid: true },
      color: { domain: kinds, range: kinds.map((_, place) => LF.PALETTE[place % 12]) },
      symbol: { domain: kinds, range: kinds.map((_, place) => LF.SYMBOLS[place % 12]) },
      marks: [
        Plot.ruleY([0], { strokeOpacity: 0.4 }),
        Plot.ruleX(points.filter((point) => point.low !== null && !faded(point)), { x: "x", y1: (p) => LF.percent(p.low), y2: (p) => LF.percent(p.high), render: intervals }),
        Plot.dot(bystanders, { x: "x", y: "y", fill: "category", stroke: "category", strokeWidth: 1.2, symbol: "category", r: 4, opacity: (point) => (faded(point) ? 0.15 : 0.9), className: "points" }),
        Plot.dot(points.filter((point) => point.source), { x: "x", y: "y", symbol: "star", r: 9, fill: LF.STAR }),
        Plot.dot(points.filter((point) => point.persona === LF.state.persona), { x: "x", y: "y", r: 9, stroke: "currentColor", strokeWidth: 2 }),
        Plot.text(d3.sort(points.filter((point) => labelled.has(point.persona)), (point) => point.persona === LF.state.persona), { x: "x", y: "y", text: (point) => LF.words(point.name), dy: -11, fontSize: 11, stroke: "var(--paper)", strokeWidth: 3, fill: "currentColor", className: "labels" }),
        ...(brushing ? [] : [Plot.dot(points, Plot.pointer({ x: "x", y: "y", r: 8, stroke: "currentColor", maxRadius: 30 }))]),
      ],
    });
    LF.last.push(() => apart(chart));
    const dots = [...chart.querySelectorAll(".points > *")];
    LF.keys(dots, (place) => describe(bystanders[place]).join(", "), (place) => LF.set({ persona: bystanders[place].persona }));
    if (brushing) addBrush(chart, points);
    else {
      chart.addEventListener("pointermove", (event) => (chart.value ? LF.tip(event, ...describe(chart.value)) : LF.tip(event)));
      chart.addEventListener("pointerleave", (event) => LF.tip(event));
      chart.addEventListener("click", () => { if (chart.value) { LF.set({ persona: chart.value.persona }); LF.at("tip").hidden = true; } });
    }
    LF.at("scatter-told").textContent = told(points);
    const row = (point) => LF.h("li", {}, LF.h("button", { type: "button", class: "link", onclick: () => LF.set({ persona: point.persona }) }, LF.words(point.name)),
      ` ${LF.shown(point.value, LF.unit())}, cosine ${LF.signed(point.x)}, ${LF.change(point.beyond, LF.unit())} from ${LF.shown(point.expected, LF.unit())}`);
    LF.fill(LF.at("more"), outliers.slice(0, 5).map(row));
    LF.fill(LF.at("less"), outliers.slice(-5).reverse().map(row));
  };

  const intervals = (...given) => {
    const group = LF.joined(({ x, y1, y2 }, place) => `M${x[place]},${y1[place]}V${y2[place]}`)(...given);
    group.setAttribute("stroke", "currentColor");
    group.setAttribute("stroke-opacity", "0.18");
    return group;
  };

  const legend = () => LF.fill(LF.at("legend"), LF.kinds().map((kind, place) =>
    LF.h("button", { type: "button", "aria-pressed": String(LF.state.category === kind), onclick: () => LF.set({ category: LF.state.category === kind ? null : kind }) },
      LF.h("span", { colour: LF.PALETTE[place % 12], "aria-hidden": "true" }, LF.SIGNS[place % 12]), ` ${LF.words(kind)}`)));

  // a small chart a source, drawn after everything else has been painted; LF.small: a promise that they stand
  const SMALL = 2.4;
  const discs = LF.joined(({ x, y }, place) => `M${x[place] - SMALL},${y[place]}a${SMALL},${SMALL} 0 1,0 ${2 * SMALL},0a${SMALL},${SMALL} 0 1,0 ${-2 * SMALL},0`);
  const faint = (...given) => { const group = discs(...given); group.setAttribute("fill-opacity", "0.8"); return group; };
  let asked = 0;
  let stood = null;
  const sideBySide = () => {
    const adapters = LF.adaptersOf(LF.state.behavior).map((adapter) => [adapter, LF.points(adapter.place)]).filter(([, points]) => points.some((point) => !point.source));
    LF.at("all-figure").hidden = adapters.length < 2;
    if (adapters.length < 2) return;
    const all = adapters.flatMap(([, points]) => points);
    const [least, most] = d3.extent(all, (point) => point.y);
    const xs = d3.extent(all, (point) => point.x);
    const kinds = LF.kinds();
    LF.fill(LF.at("all"), adapters.map(([adapter, points]) => {
      const found = LF.correlation(LF.state.behavior, adapter.adapter, LF.state.layer, LF.state.cosine, LF.state.y);
      const title = `${LF.adapterWords(adapter)}, ρ ${LF.signed(found ? found.spearman : null)}`;
      const chart = Plot.plot({
        className: "lf", width: 300, height: 200, marginLeft: 34, marginBottom: 26, style: { background: "transparent" },
        x: { domain: xs, label: null, ticks: 4 }, y: { domain: [Math.min(0, least), most], label: null, ticks: 4, grid: true },
        color: { domain: kinds, range: kinds.map((_, place) => LF.PALETTE[place % 12]) },
        marks: [
          Plot.dot(points.filter((point) => !point.source), { x: "x", y: "y", fill: "category", r: SMALL, render: faint }),
          Plot.dot(points.filter((point) => point.source), { x: "x", y: "y", symbol: "star", r: 6, fill: LF.STAR }),
        ],
      });
      const button = LF.h("button", { type: "button", "aria-pressed": String(adapter.place === LF.state.adapter), onclick: () => LF.set({ adapter: adapter.place }) }, LF.h("span", {}, title));
      const box = LF.h("div", {});
      button.append(box);
      LF.named(box, chart, title);
      chart.setAttribute("aria-hidden", "true");
      chart.removeAttribute("role");
      chart.removeAttribute("aria-label");
      return button;
    }));
  };

  LF.parts.push((_, change) => {
    if (LF.touches(change, "behavior", "category")) legend();
    draw();
    if (!LF.touches(change, "behavior", "adapter", "layer", "cosine", "y")) return;
    LF.small ??= new Promise((done) => { stood = done; });
    const mine = ++asked;
    // a task that is posted from a frame's callback runs when that frame has been painted
    requestAnimationFrame(() => setTimeout(() => {
      if (mine !== asked) return;
      sideBySide();
      LF.small = null;
      stood();
    }));
  });
  LF.redraw = () => LF.set({});
  LF.brush = () => {
    brushing = !brushing;
    LF.at("brush").setAttribute("aria-pressed", String(brushing));
    LF.at("selected").textContent = brushing ? "Drag over points to compare their mean with the others'." : "";
    draw();
    LF.finish();
  };
})();
