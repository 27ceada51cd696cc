// ρ over the layers, and rates on the way through training.
"use strict";
(() => {
  const curve = () => {
    const { behavior, cosine, y, layer, adapter } = LF.state;
    const into = LF.at("layers");
    const { layers } = LF.data.cosines;
    const rows = LF.adaptersOf(behavior).flatMap((one) => layers.map((at) => {
      const found = LF.correlation(behavior, one.adapter, at, cosine, y);
      return { layer: at, rho: found?.spearman ?? null, low: found?.spearman_both_low ?? found?.spearman_ci_low ?? null, high: found?.spearman_both_high ?? found?.spearman_ci_high ?? null, adapter: one.place, who: LF.adapterWords(one), found };
    })).filter((row) => row.rho !== null);
    LF.at("layers-figure").hidden = layers.length < 2 || !rows.length;
    if (LF.at("layers-figure").hidden) return;
    const mine = rows.filter((row) => row.adapter === adapter);
    const picked = LF.data.picked.filter((one) => one.behavior === behavior && one.cosine === cosine && one.y === y && one.adapter === LF.data.adapters[adapter].adapter && one.picked_low !== null);
    const chart = LF.plot(into, `ρ of ${cosine} cosine and ${LF.yWords()} at each layer, a line a source. Click a layer to choose it.`, {
      height: 240, marginLeft: 48, marginBottom: 38,
      x: { label: "layer (block) →", labelAnchor: "center", tickFormat: "d", ticks: layers.filter((_, place) => place % Math.ceil(layers.length / 16) === 0) },
      y: { label: "↑ Spearman’s ρ", grid: true },
      marks: [
        Plot.ruleY([0]),
        Plot.ruleX([layer], { stroke: LF.STAR, strokeOpacity: 0.5, strokeWidth: 2 }),
        Plot.areaY(mine.filter((row) => row.low !== null), { x: "layer", y1: "low", y2: "high", fillOpacity: 0.12, fill: "currentColor" }),
        Plot.lineY(rows.filter((row) => row.adapter !== adapter), { x: "layer", y: "rho", z: "adapter", stroke: "currentColor", strokeOpacity: 0.3 }),
        Plot.lineY(mine, { x: "layer", y: "rho", stroke: "currentColor", strokeWidth: 2.2 }),
        Plot.ruleX(picked, { x: "layer", y1: "picked_low", y2: "picked_high", stroke: LF.STAR, strokeWidth: 2 }),
        Plot.dot(rows, Plot.pointerX({ x: "layer", y: "rho", r: 4, fill: LF.STAR })),
      ],
    });
    chart.addEventListener("pointermove", (event) => (chart.value ? LF.tip(event, `layer ${chart.value.layer}, ${chart.value.who}`, LF.rhoWords(chart.value.found)) : LF.tip(event)));
    chart.addEventListener("pointerleave", (event) => LF.tip(event));
    chart.addEventListener("click", () => { if (chart.value) LF.set({ layer: chart.value.layer }); });
    LF.at("layers-told").textContent = `Dark: ${LF.adapterWords(LF.data.adapters[adapter])} with its 95 % interval at each layer${new Set(rows.map((row) => row.adapter)).size > 1 ? "; pale: the other sources" : ""}. Red line: the layer shown above.`
      + (picked.length ? ` Red bar: the interval at layer ${picked[0].layer}, its largest |ρ|, with the pick paid for (${LF.signed(picked[0].picked_low)} to ${LF.signed(picked[0].picked_high)}).` : "");
  };

  const trajectory = () => {
    const { behavior, adapter } = LF.state;
    const table = LF.data.trajectory;
    const figure = LF.at("trajectory-figure");
    const name = adapter === null ? null : LF.data.adapters[adapter].adapter;
    const rows = !table ? [] : table.behavior.map((_, row) => row)
      .filter((row) => table.behavior[row] === behavior && table.adapter[row] === name && table.rate[row] !== null)
      .map((row) => ({ share: 100 * table.share[row], y: LF.percent(table.rate[row]), persona: table.persona[row], source: table.role[row] === "source", items: table.items[row] }));
    figure.hidden = !rows.length;
    if (!rows.length) return;
    const means = d3.flatRollup(rows.filter((row) => !row.source), (some) => LF.mean(some.map((row) => row.y)), (row) => row.share)
      .map(([share, y]) => ({ share, y })).sort((a, b) => a.share - b.share);
    const chart = LF.plot(LF.at("trajectory-chart"), `${LF.measure()} of each persona at shares of training.`, {
      height: 260, marginLeft: 48, marginBottom: 38,
      x: { label: "share of the training steps (%) →", labelAnchor: "center" },
      y: { label: `↑ ${LF.measure()} (${LF.unit() === "share" ? "%" : "points"})`, grid: true },
      marks: [
        Plot.lineY(rows.filter((row) => !row.source), { x: "share", y: "y", z: "persona", stroke: "currentColor", strokeOpacity: 0.13 }),
        Plot.lineY(means, { x: "share", y: "y", stroke: "currentColor", strokeWidth: 2, strokeDasharray: "4,3" }),
        Plot.lineY(rows.filter((row) => row.source), { x: "share", y: "y", stroke: LF.STAR, strokeWidth: 2.4 }),
        Plot.dot(rows, Plot.pointer({ x: "share", y: "y", r: 4, fill: LF.STAR })),
      ],
    });
    chart.addEventListener("pointermove", (event) => (chart.value ? LF.tip(event, LF.words(LF.data.personas[chart.value.persona].name), `${LF.number(chart.value.y, 1)} at ${LF.number(chart.value.share, 2).replace(/\.?0+$/, "")} % of training`) : LF.tip(event)));
    chart.addEventListener("pointerleave", (event) => LF.tip(event));
    chart.addEventListener("click", () => { if (chart.value) LF.set({ persona: chart.value.persona }); });
  };

  LF.parts.push((_, change) => {
    if (LF.touches(change, "behavior", "adapter", "cosine", "y", "layer")) curve();
    if (LF.touches(change, "behavior", "adapter")) trajectory();
  });
})();
