// One persona under the chosen adapter, in full, and its numbers to copy.
"use strict";
(() => {
  const full = (value) => (value === null || value === undefined ? "not defined" : String(value));

  // exact numbers with everything one needs to find them again
  LF.citation = (adapter, persona) => {
    const { behavior, layer, cosine } = LF.state;
    const cell = LF.cell(adapter, persona);
    const { run, tables, personas } = LF.data;
    const lines = [
      `behavior ${behavior}, adapter ${LF.data.adapters[adapter].adapter}, persona ${personas[persona].name}`,
      `rate ${full(cell.rate)}, 95 % interval ${full(cell.low)} to ${full(cell.high)}, ${full(cell.hits)} of N = ${full(cell.total)}`,
    ];
    if (cell.delta !== null) lines.push(`change against the unadapted model ${full(cell.delta)}, 95 % interval ${full(cell.delta_low)} to ${full(cell.delta_high)}`);
    if (cell.probability !== null) lines.push(`probability ${full(cell.probability)}, 95 % interval ${full(cell.probability_low)} to ${full(cell.probability_high)}`);
    if (cell.role === "bystander" && layer !== null) lines.push(`${cosine} cosine to the source at layer ${layer}: ${full(LF.cosine(adapter, persona, layer, cosine))}`);
    lines.push(`run ${run.name}${run.study ? ` (study SHA-256 ${run.study})` : ""}, leakfast ${run.leakfast ?? "of a version not recorded"}${run.commit ? `, commit ${run.commit}` : ""}`);
    lines.push(`measured by ${run.made.length ? run.made.join("; then ") : "leakfast of a version not recorded"}`);
    for (const [name, hash] of Object.entries(tables)) lines.push(`tables/${name}.parquet SHA-256 ${hash}`);
    return lines.map(LF.inert).join("\n");
  };

  const copy = async (text, said) => {
    const area = LF.h("textarea", { readonly: true, rows: 7, "aria-label": "Exact numbers" });
    area.value = text;
    LF.fill(said, area);
    area.select();
    try {
      await navigator.clipboard.writeText(text);
      said.append(LF.h("span", { class: "note" }, "Copied."));
    } catch {
      said.append(LF.h("span", { class: "note" }, "Select and copy: this browser keeps the clipboard to itself."));
    }
  };

  const draw = () => {
    const { adapter, persona, layer, cosine } = LF.state;
    const into = LF.at("who");
    if (persona === null || adapter === null) {
      LF.fill(into, LF.h("p", { class: "note" }, "Choose a point, a cell or a name: here stands who it is and what it said."));
      return;
    }
    const person = LF.data.personas[persona];
    const cell = LF.cell(adapter, persona);
    const unit = LF.unit();
    const entry = (name, ...value) => [LF.h("dt", {}, name), LF.h("dd", {}, ...value)];
    const points = LF.points();
    const ranked = LF.beyond(points).find((point) => point.persona === persona);
    const place = (key) => 1 + points.filter((point) => !point.source && point[key] > points.find((one) => one.persona === persona)[key]).length;
    const far = (point) => `${LF.change(point.beyond, unit)} from the ${LF.shown(point.expected, unit)} of its cosine`;
    const one = points.find((point) => point.persona === persona && !point.source);
    const others = LF.adaptersOf(LF.state.behavior, true).filter((one) => one.place !== adapter)
      .map((one) => [one, LF.cell(one.place, persona)]).filter(([, found]) => found && found.rate !== null)
      .map(([one, found]) => `${LF.adapterWords(one)} ${LF.amount(found.rate, unit)}`);
    const said = LF.h("div", { class: "cite" });
    LF.fill(into,
      LF.h("h4", {}, LF.words(person.name)),
      person.prompt ? LF.h("blockquote", {}, LF.inert(person.prompt)) : null,
      cell === null ? LF.h("p", { class: "note" }, "Not measured under this adapter.") : LF.h("dl", {},
        entry("role", cell.role === "source" ? "the source" : `${cell.role}${person.category ? `, ${LF.words(person.category)}` : ""}`),
        entry(LF.data.behaviorOf[LF.state.behavior].measure, `${LF.amount(cell.rate, unit)} (95 % ${LF.range(cell.low, cell.high, unit)})`, cell.hits === null ? "" : `, ${LF.number(cell.hits, 0)} of ${LF.count(cell.total)}`),
        cell.delta === null ? [] : entry("change", `${LF.change(cell.delta, unit)} (95 % ${LF.changeRange(cell.delta_low, cell.delta_high, unit)})`),
        cell.probability === null ? [] : entry("probability", `${LF.amount(cell.probability, "share")} (95 % ${LF.range(cell.probability_low, cell.probability_high, "share")})`),
        one ? entry("cosine", `${LF.signed(one.x, 3)} (${cosine}, layer ${layer}), number ${place("x")} of ${points.filter((p) => !p.source).length} bystanders`,
          ranked ? `; by leakage number ${place("leaks")}: ${far(ranked)}` : "") : [],
        cell.mean_tokens === null ? [] : entry("tokens", `${LF.number(cell.mean_tokens, 1)} a reply`),
        person.related.length ? entry("related to", person.related.map(LF.words).join(", ")) : [],
        others.length ? entry("elsewhere", others.join(", ")) : []),
      cell === null ? null : LF.h("p", {},
        LF.h("button", { type: "button", onclick: () => LF.showCompletions(adapter, persona) }, "Its completions"), " ",
        LF.h("button", { type: "button", onclick: () => copy(LF.citation(adapter, persona), said) }, "Copy exact numbers")),
      said);
  };
  LF.parts.push(draw);
})();
