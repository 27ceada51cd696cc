// The completions that the page carries, with search and filters. Counts beside them are of the tables, not of the sample.
"use strict";
(() => {
  const PAGE = 20;
  const filters = ["adapter", "persona", "question", "hit", "finish", "search", "shortest", "longest", "lowest", "highest"];
  let shown = PAGE;
  let source = null; // (wanted, limit) => Promise of {rows, total}, of null where a later question overtook it
  let turn = 0;

  // over what the page carries; a served page asks its server the same
  LF.embedded = (columns) => {
    const rows = columns.adapter.map((_, row) => row);
    return async (wanted, limit) => {
      const needle = wanted.search.toLowerCase();
      const passes = (row) =>
        (wanted.adapter === "" || columns.adapter[row] === Number(wanted.adapter))
        && (wanted.behavior === "" || LF.data.adapters[columns.adapter[row]].behavior === wanted.behavior)
        && (wanted.persona === "" || columns.persona[row] === Number(wanted.persona))
        && (wanted.question === "" || columns.question[row] === Number(wanted.question))
        && (wanted.hit === "" || columns.hit[row] === (wanted.hit === "yes"))
        && (wanted.finish === "" || columns.finish[row] === wanted.finish)
        && (wanted.shortest === "" || columns.tokens[row] >= Number(wanted.shortest))
        && (wanted.longest === "" || columns.tokens[row] <= Number(wanted.longest))
        && (wanted.lowest === "" || (columns.score[row] !== null && columns.score[row] >= Number(wanted.lowest)))
        && (wanted.highest === "" || (columns.score[row] !== null && columns.score[row] <= Number(wanted.highest)))
        && (needle === "" || columns.text[row].toLowerCase().includes(needle));
      const found = rows.filter(passes);
      const take = (row) => Object.fromEntries(["adapter", "persona", "question", "sample", "hit", "score", "finish", "tokens", "text", "left_out", "marked"].map((name) => [name, columns[name][row]]));
      return { total: found.length, rows: found.slice(0, limit).map(take) };
    };
  };

  const values = () => ({ behavior: LF.state.behavior, ...Object.fromEntries(filters.map((name) => [name, LF.at(`f-${name}`).value.trim()])) });

  // the text in pieces: what was counted, as the detector itself found it, and, in another colour, what was searched here
  const pieces = (text, counted, search) => {
    const wanted = search ? new RegExp(search.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu") : null;
    const searched = wanted ? [...text.matchAll(wanted)].slice(0, 200).map((found) => [found.index, found.index + found[0].length]) : [];
    const inside = [0, text.length, ...counted.flat(), ...searched.flat()].filter((place) => place <= text.length);
    const within = (spans, place) => spans.some(([low, high]) => low <= place && place < high);
    return d3.pairs(d3.sort(new Set(inside))).map(([low, high]) => {
      const [part, kinds] = [LF.inert(text.slice(low, high)), []];
      if (within(counted, low)) kinds.push("counted");
      if (within(searched, low)) kinds.push("searched");
      return kinds.length ? LF.h("mark", { class: kinds.join(" ") }, part) : part;
    });
  };

  const one = (row, search) => {
    const adapter = LF.data.adapters[row.adapter];
    const counted = d3.range(0, row.marked.length, 2).map((at) => row.marked.slice(at, at + 2));
    const beyond = counted.some(([low]) => low >= row.text.length) ? ", what was counted among them" : "";
    const question = LF.data.behaviorOf[adapter.behavior]?.questions[row.question];
    const facts = [
      LF.adapterWords(adapter), question ? `“${LF.inert(question)}”` : `question ${row.question}`, `sample ${row.sample}`,
      row.hit === null ? null : row.hit ? "shows the behavior" : "does not show it",
      row.score === null ? null : `judged ${LF.number(row.score, 0)}`,
      `${row.tokens} tokens, ${LF.words(row.finish)}`,
    ].filter((fact) => fact !== null);
    return LF.h("article", { class: "said" },
      LF.h("header", {}, LF.h("b", {}, LF.words(LF.data.personas[row.persona].name)), ` · ${facts.join(" · ")}`),
      LF.h("blockquote", {}, ...pieces(row.text, counted, search), row.left_out ? LF.h("span", { class: "faint" }, ` … ${LF.count(row.left_out)} more characters in the run${beyond}`) : ""));
  };

  // what the tables say of the same adapter and persona, over every completion of the run
  const ofTables = (wanted) => {
    if (wanted.adapter === "") return "";
    const adapter = Number(wanted.adapter);
    if (wanted.persona !== "") {
      const cell = LF.cell(adapter, Number(wanted.persona));
      return cell && cell.rate !== null ? ` In the tables: ${cell.hits === null ? "" : `${LF.number(cell.hits, 0)} of ${LF.count(cell.total)}, `}${LF.amount(cell.rate, LF.unit())}.` : "";
    }
    const cells = [...LF.data.rowOf[adapter].values()].map((row) => [LF.data.rates.hits[row], LF.data.rates.total[row]]);
    if (cells.some(([hits]) => hits === null)) return "";
    const [hits, total] = [0, 1].map((at) => cells.reduce((sum, cell) => sum + cell[at], 0));
    return ` In the tables: ${LF.count(hits)} of ${LF.count(total)} under this adapter.`;
  };

  const draw = () => (LF.drawn = drawn());
  const drawn = async () => {
    if (source === null) return;
    const wanted = values();
    const mine = ++turn;
    const found = await source(wanted, shown);
    if (found === null || mine !== turn) return;
    LF.at("found").textContent = `${LF.count(found.total)} ${found.total === 1 ? "completion" : "completions"} of those here.${ofTables(wanted)}`;
    LF.fill(LF.at("said"), found.rows.map((row) => one(row, wanted.search)));
    LF.at("more-completions").hidden = found.total <= shown;
  };

  const options = (name, entries) => {
    const select = LF.at(`f-${name}`);
    const before = select.value;
    LF.fill(select, LF.h("option", { value: "" }, "all"), entries.map(([value, words]) => LF.h("option", { value }, words)));
    if ([...select.options].some((option) => option.value === before)) select.value = before;
  };

  let people = null; // whose names the filter offers
  const refill = () => {
    options("adapter", LF.adaptersOf(LF.state.behavior, true).map((adapter) => [adapter.place, LF.adapterWords(adapter)]));
    if (people !== LF.data.personas) options("persona", LF.data.personas.map((person, place) => [place, LF.words(person.name)]));
    people = LF.data.personas;
    const { questions } = LF.data.behaviorOf[LF.state.behavior];
    options("question", LF.at("f-question").dataset.numbers
      ? JSON.parse(LF.at("f-question").dataset.numbers).map((number) => [number, questions[number] ? `${number}: ${LF.inert(questions[number]).slice(0, 60)}` : String(number)])
      : questions.map((text, number) => [number, `${number}: ${LF.inert(text).slice(0, 60)}`]));
  };

  LF.showCompletions = (adapter, persona) => {
    for (const name of filters) LF.at(`f-${name}`).value = "";
    Object.assign(LF.at("f-adapter"), { value: String(adapter) });
    Object.assign(LF.at("f-persona"), { value: String(persona) });
    shown = PAGE;
    draw();
    LF.at("completions").scrollIntoView({ block: "start" });
    LF.at("found").focus({ preventScroll: true });
  };

  const tell = (told) => {
    LF.at("rule").textContent = told.rule;
    LF.at("f-question").dataset.numbers = JSON.stringify(told.questions);
    options("finish", told.finishes.map((finish) => [finish, LF.words(finish)]));
    LF.at("scores").hidden = !told.scored;
    refill();
  };

  // the same filters over a run that has grown; moved: from the place a name had to the one it has
  LF.renewCompletions = (told, moved) => {
    const now = Object.entries(moved).map(([name, of]) => [name, of(LF.at(`f-${name}`).value) ?? ""]);
    tell(told);
    for (const [name, value] of now) LF.at(`f-${name}`).value = String(value);
    draw();
  };

  LF.startCompletions = (from, told) => {
    source = from;
    LF.at("completions").hidden = false;
    tell(told);
    for (const name of filters) LF.at(`f-${name}`).addEventListener(name === "search" ? "input" : "change", () => { shown = PAGE; draw(); });
    LF.at("clear").addEventListener("click", () => { for (const name of filters) LF.at(`f-${name}`).value = ""; shown = PAGE; draw(); });
    LF.at("more-completions").addEventListener("click", () => { shown += PAGE; draw(); });
    LF.parts.push((_, change) => { if ("behavior" in change) { refill(); draw(); } });
    draw();
  };
})();
