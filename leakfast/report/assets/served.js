// The page over a run that may still be filling: it asks its own server for what the charts are drawn from, again when the
// run has changed, and for each page of completions. Names, not places, keep what was chosen: places move as a run grows.
"use strict";
(() => {
  const EVERY_MS = 3000; // between two questions whether the run has changed
  const TYPING_MS = 200; // a search waits for the next letter that long
  const MOST = 200; // completions of one answer
  const STATES = {
    reading: "The run is being read.",
    empty: "Nothing has been measured yet. This page looks again every few seconds.",
    preliminary: "Of what the run holds now. Its tables are not finished: rates, their intervals and ρ are computed here from what is there; p-values and intervals of ρ are not, leakfast stats makes them.",
    whole: "The run’s own tables, up to date with its files.",
    gone: "The server does not answer. What stands here is what it said last.",
  };
  let version = null;
  let started = false;
  let looking = null;
  let places = { adapter: new Map(), persona: new Map() };

  const pause = (ms) => new Promise((done) => setTimeout(done, ms));

  const ask = async (path, query) => {
    const answer = await fetch(`${path}?${new URLSearchParams(query)}`, { cache: "no-store", credentials: "omit" });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  };

  const say = (state, failed) => {
    const words = STATES[state] + (failed ? " The last look at the run could not be finished and is tried again." : "");
    if (LF.at("live").textContent !== words) LF.at("live").textContent = words;
    LF.at("older").hidden = version === null || version === LF.at("served").value;
  };

  // ── completions ─────────────────────────────────────────────────────────────────────────────────
  let asked = 0;
  let searched = "";
  let kept = { key: null, rows: [], total: null };

  // what the embedded page filters itself; null where a later question has overtaken this one
  const completions = async (wanted, limit) => {
    const mine = ++asked;
    if (wanted.search !== searched) {
      await pause(TYPING_MS);
      if (mine !== asked) return null;
      searched = wanted.search;
    }
    const query = {
      ...wanted,
      adapter: wanted.adapter === "" ? "" : LF.data.adapters[wanted.adapter].key,
      persona: wanted.persona === "" ? "" : LF.data.personas[wanted.persona].name,
    };
    const key = JSON.stringify([version, query]);
    if (kept.key !== key) kept = { key, rows: [], total: null };
    while (kept.rows.length < Math.min(limit, kept.total ?? limit)) {
      let found;
      try {
        found = await ask("completions", { ...query, offset: kept.rows.length, limit: Math.min(MOST, limit - kept.rows.length) });
      } catch (error) {
        if (mine === asked) LF.at("found").textContent = error instanceof TypeError ? STATES.gone : `Not answered: ${error.message}.`;
        return null;
      }
      if (mine !== asked) return null;
      if (found.version !== version) {
        look(); // the run has grown: its data first, then this question again
        return null;
      }
      kept.total = found.total;
      if (!found.rows.length) break;
      kept.rows.push(...found.rows);
    }
    const rows = kept.rows.slice(0, limit).map((row) => ({ ...row, adapter: places.adapter.get(row.adapter), persona: places.persona.get(row.persona) }));
    return { total: kept.total, rows: rows.filter((row) => row.adapter !== undefined && row.persona !== undefined) };
  };

  // ── data ────────────────────────────────────────────────────────────────────────────────────────
  const place = (data) => {
    places = {
      adapter: new Map(data.adapters.map((adapter, at) => [adapter.key, at])),
      persona: new Map(data.personas.map((person, at) => [person.name, at])),
    };
  };

  const renew = (found) => {
    const before = LF.data;
    version = found.version;
    place(found.data);
    if (!started) {
      if (!found.data.behaviors.length) return;
      started = true;
      LF.start(found.data);
      LF.startCompletions(completions, found.completions);
      document.documentElement.dataset.ready = "all";
      return;
    }
    const moved = {
      adapter: (at) => (at === null || at === "" ? at : places.adapter.get(before.adapters[at].key) ?? null),
      persona: (at) => (at === null || at === "" ? at : places.persona.get(before.personas[at].name) ?? null),
    };
    LF.index(found.data);
    const { state } = LF;
    Object.assign(state, { adapter: moved.adapter(state.adapter), persona: moved.persona(state.persona) });
    LF.orders();
    const behavior = LF.data.behaviorOf[state.behavior];
    if (behavior && state.layer === null) state.layer = behavior.layer;
    LF.set(behavior ? {} : { behavior: LF.data.behaviors[0].name });
    LF.renewCompletions(found.completions, moved);
  };

  const lookOnce = async () => {
    let found;
    try {
      found = await ask("data", version === null ? {} : { have: version });
    } catch {
      say("gone");
      return;
    }
    if (found.data && found.version !== version && (!started || found.data.behaviors.length)) renew(found);
    say(found.state, found.failed);
  };
  const look = () => (looking ??= lookOnce().finally(() => { looking = null; }));

  LF.serve = async () => {
    LF.at("reload").addEventListener("click", () => location.reload());
    for (;;) {
      if (!document.hidden) await look();
      await pause(EVERY_MS);
    }
  };
})();
