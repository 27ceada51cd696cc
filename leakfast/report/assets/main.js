// Controls, and the order in which the page comes up: charts first, the completions when they are unpacked.
"use strict";
(() => {
  const choices = {
    behavior: () => LF.data.behaviors.map((behavior) => [behavior.name, LF.words(behavior.name)]),
    adapter: () => LF.adaptersOf(LF.state.behavior).map((adapter) => [adapter.place, LF.adapterWords(adapter)]),
    layer: () => LF.data.cosines.layers.map((layer) => [layer, layer === LF.data.behaviorOf[LF.state.behavior].layer ? `${layer} (the headline’s)` : String(layer)]),
    cosine: () => [["centered", "centered"], ["raw", "raw"]],
    y: () => LF.data.behaviorOf[LF.state.behavior].ys.map((y) => [y, { rate: "rate", delta: "change", probability: "probability" }[y]]),
    persona: () => [["", "nobody"], ...LF.data.personas.map((person, place) => [place, LF.words(person.name)])],
  };
  const numeric = new Set(["adapter", "layer", "persona"]);

  // entries are made anew where they can be others: with a behavior, and with the data
  const ofBehavior = new Set(["adapter", "layer", "y"]);
  let filled = null;
  const controls = (_, change) => {
    for (const [name, entries] of Object.entries(choices)) {
      const select = LF.at(`c-${name}`);
      if (filled !== LF.data || (ofBehavior.has(name) && "behavior" in change)) {
        const found = entries();
        LF.fill(select, found.map(([value, words]) => LF.h("option", { value }, words)));
        select.closest("label").hidden = !found.length;
      }
      select.value = LF.state[name] === null ? "" : String(LF.state[name]);
    }
    filled = LF.data;
  };

  const remember = () => {
    const { behavior, adapter, layer, cosine, y, persona } = LF.state;
    const kept = { behavior, adapter: adapter === null ? null : LF.data.adapters[adapter].adapter, layer, cosine, y, persona: persona === null ? null : LF.data.personas[persona].name };
    const view = new URLSearchParams(Object.entries(kept).filter(([, value]) => value !== null));
    history.replaceState(null, "", `#view?${view}`);
  };

  const recall = () => {
    const [, query] = location.hash.split("#view?");
    const view = new URLSearchParams(query || "");
    const behavior = LF.data.behaviorOf[view.get("behavior")] ? view.get("behavior") : LF.data.behaviors[0].name;
    LF.state.behavior = behavior;
    const adapter = LF.adaptersOf(behavior).find((one) => one.adapter === view.get("adapter"));
    const persona = LF.data.personas.findIndex((person) => person.name === view.get("persona"));
    LF.set({ behavior });
    LF.set({
      ...(adapter ? { adapter: adapter.place } : {}),
      ...(view.get("layer") !== null && LF.data.cosines.layers.includes(Number(view.get("layer"))) ? { layer: Number(view.get("layer")) } : {}),
      ...(["centered", "raw"].includes(view.get("cosine")) ? { cosine: view.get("cosine") } : {}),
      ...(view.get("y") ? { y: view.get("y") } : {}),
      persona: persona < 0 ? null : persona,
    });
  };

  LF.start = (data) => {
    LF.index(data);
    if (!data.behaviors.length) return;
    for (const name of Object.keys(choices)) {
      LF.at(`c-${name}`).addEventListener("change", (event) => {
        const { value } = event.target;
        LF.set({ [name]: value === "" ? null : numeric.has(name) ? Number(value) : value });
        remember();
      });
    }
    LF.at("brush").addEventListener("click", LF.brush);
    LF.orders();
    LF.parts.unshift(controls);
    recall();
    let width = window.innerWidth;
    let waiting = null;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      clearTimeout(waiting);
      waiting = setTimeout(LF.redraw, 150);
    });
    document.documentElement.dataset.ready = "charts";
    performance.mark("charts");
  };

  const ofPage = async () => {
    for (const bar of document.querySelectorAll("[data-share]")) bar.style.width = `${bar.dataset.share}%`;
    if (LF.at("served")) return void LF.serve();
    if (!LF.at("data")) return;
    LF.start(await LF.unpack("data"));
    const columns = await LF.unpack("texts");
    LF.startCompletions(LF.embedded(columns), {
      rule: columns.rule,
      questions: [...new Set(columns.question)].sort((a, b) => a - b),
      finishes: [...new Set(columns.finish)].sort(),
      scored: columns.score.some((score) => score !== null),
    });
    document.documentElement.dataset.ready = "all";
    performance.mark("all");
  };
  document.addEventListener("DOMContentLoaded", () => { if (LF.at("explore")) ofPage(); });
})();
