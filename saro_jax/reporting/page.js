"use strict";
// The browser of transcripts, and the switch between light and dark. All text is set as text:
// nothing that came from a model or a data set is ever parsed as HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const PAGE = 20;
  const MOST_CHIPS = 5; // beyond them a prompt's outcomes are counted
  const HARMFUL = new Set(["harmful", "jailbreak"]);

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // ---- light and dark ----
  const theme = byId("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("saro-theme", value);
      return localStorage.getItem("saro-theme");
    } catch {
      return null; // a browser may forbid storage to files
    }
  };
  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : dark.matches;
  }
  function showTheme() {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  }
  const before = stored();
  if (before === "dark" || before === "light") document.documentElement.dataset.theme = before;
  theme.hidden = false;
  showTheme();
  dark.addEventListener("change", showTheme);
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    stored(document.documentElement.dataset.theme);
    showTheme();
  });

  // ---- transcripts ----
  const packed = byId("packed");
  if (!packed) return;
  const names = ["text", "model", "benchmark", "kind", "view", "outcome", "verdict", "compare", "open"];
  const field = Object.fromEntries(names.map((name) => [name, byId("f-" + name)]));
  const count = byId("count"), list = byId("list");
  let data, items = [], shown = [], page = 0;

  async function unpack() {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot unpack gzip");
    const text = atob(packed.textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    packed.remove();
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function transcript(row) {
    const [prompt, model, view, outcome, status, finish, forced, tokens, reasoning, decision, correct, steps, answer, verdicts] = row;
    const found = {
      prompt, model, view, outcome: data.outcomes[outcome], status: data.words[status], finish: data.words[finish],
      forced, tokens, reasoning, decision, correct, steps, answer,
      verdicts: verdicts.map(([judge, target, label, score, refusal]) => ({ judge, target, label, score, refusal })),
    };
    found.unsafe = found.verdicts.some((v) => v.label === "unsafe");
    return found;
  }

  // An item is a prompt in a view, with the transcripts of all models.
  function group() {
    const found = new Map();
    for (const row of data.rows) {
      const one = transcript(row);
      const key = one.prompt * 8 + one.view;
      if (!found.has(key)) {
        const [id, benchmark, kind, category, attack, text] = data.prompts[one.prompt];
        found.set(key, { id, benchmark, kind: data.kinds[kind], category, attack, text, view: one.view, all: [], haystack: null });
      }
      found.get(key).all.push(one);
    }
    items = [...found.values()];
    for (const item of items) {
      item.harmful = HARMFUL.has(item.kind);
      item.sensitive = item.harmful || item.all.some((one) => one.unsafe);
    }
  }

  const wanted = (item, one) => {
    if (one.correct !== null) return one.correct ? 1 : -1;
    if (one.outcome === "incomplete") return 0;
    if (item.harmful) return one.unsafe ? -1 : one.outcome === "refused" ? 1 : one.outcome === "complied" ? -1 : 0;
    return one.outcome === "complied" ? 1 : -1;
  };

  function haystack(item) {
    if (item.haystack === null) {
      const parts = [item.text, item.id, item.category];
      for (const one of item.all) parts.push(one.answer, ...one.steps.map((step) => step[1]));
      item.haystack = parts.join("\n").toLowerCase();
    }
    return item.haystack;
  }

  function verdictFits(one, value) {
    if (!value) return true;
    if (value === "correct" || value === "wrong") return one.correct === (value === "correct");
    if (value === "forced") return Boolean(one.forced);
    if (value === "reflects") return one.steps.some((step) => data.steps[step[0]] === "reflect");
    return one.verdicts.some((v) => v.label === value || v.refusal === value);
  }

  function filter() {
    const words = field.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const pick = (name) => (field[name].value === "" ? null : field[name].value);
    const model = pick("model"), benchmark = pick("benchmark"), kind = pick("kind"), view = pick("view");
    const outcome = pick("outcome"), verdict = pick("verdict"), compare = pick("compare");
    shown = [];
    let transcripts = 0;
    for (const item of items) {
      if (benchmark !== null && item.benchmark !== Number(benchmark)) continue;
      if (kind !== null && item.kind !== kind) continue;
      if (view !== null && item.view !== Number(view)) continue;
      const mine = item.all.filter((one) =>
        (model === null || one.model === Number(model)) && (outcome === null || one.outcome === outcome) && verdictFits(one, verdict));
      if (!mine.length) continue;
      if (compare !== null) {
        const scores = item.all.map((one) => wanted(item, one));
        const gain = Math.max(...scores.slice(1)) - scores[0], loss = scores[0] - Math.min(...scores.slice(1));
        if (compare === "differ" && new Set(item.all.map((one) => one.outcome + one.correct)).size < 2) continue;
        if (compare === "better" && !(item.all.length > 1 && gain > 0)) continue;
        if (compare === "worse" && !(item.all.length > 1 && loss > 0)) continue;
      }
      if (words.length && !words.every((word) => haystack(item).includes(word))) continue;
      shown.push({ item, mine });
      transcripts += mine.length;
    }
    page = 0;
    const number = (n) => n.toLocaleString("en-US");
    count.textContent = shown.length
      ? `${number(shown.length)} of ${number(items.length)} prompts, ${number(transcripts)} transcripts`
      : "No transcript matches these filters.";
    draw();
  }

  function chip(item, one, named) {
    const good = wanted(item, one);
    const word = one.correct === null ? one.outcome : one.outcome === "incomplete" ? "incomplete" : one.correct ? "correct" : "wrong";
    const sign = good > 0 ? "\u2713 " : good < 0 ? "\u2717 " : "";
    const text = `${sign}${named ? data.models[one.model] + ": " : ""}${word}${one.unsafe ? ", unsafe" : ""}`;
    return make("span", "chip" + (good > 0 ? " good" : good < 0 ? " bad" : ""), text);
  }

  function tally(item, mine) {
    const counts = new Map([[1, 0], [-1, 0], [0, 0]]);
    for (const one of mine) counts.set(wanted(item, one), counts.get(wanted(item, one)) + 1);
    const made = [];
    if (counts.get(1)) made.push(make("span", "chip good", `\u2713 ${counts.get(1)} as wanted`));
    if (counts.get(-1)) made.push(make("span", "chip bad", `\u2717 ${counts.get(-1)} not`));
    if (counts.get(0)) made.push(make("span", "chip", `${counts.get(0)} incomplete or partial`));
    return made;
  }

  function draw() {
    const start = page * PAGE;
    list.replaceChildren(...shown.slice(start, start + PAGE).map(entry));
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    byId("pages").hidden = pages < 2;
    byId("page").textContent = `Page ${page + 1} of ${pages}`;
    byId("before").disabled = page === 0;
    byId("after").disabled = page >= pages - 1;
  }

  function entry({ item, mine }) {
    const node = make("details", "item"), head = make("summary"), title = make("span");
    const hide = item.harmful && !field.open.checked;
    const line = hide ? make("span", "preview hiddentext", `${item.kind} prompt, hidden`) : make("span", "preview", item.text.slice(0, 300));
    title.append(line);
    const facts = [data.benchmarks[item.benchmark], item.kind, item.category, item.attack, item.id];
    if (data.views.length > 1) facts.push(data.views[item.view]);
    title.append(make("span", "meta", facts.filter(Boolean).join(" \u00B7 ")));
    const chips = make("span", "chips");
    if (mine.length <= MOST_CHIPS) for (const one of mine) chips.append(chip(item, one, true));
    else chips.append(...tally(item, mine));
    head.append(title, chips);
    node.append(head);
    node.addEventListener("toggle", () => { if (node.open && node.childElementCount === 1) node.append(opened(item, mine)); });
    const wrapper = make("li");
    wrapper.append(node);
    return wrapper;
  }

  function folded(name, text, closed, body) {
    const node = make("details"), size = text.length.toLocaleString("en-US");
    node.open = !closed;
    node.append(make("summary", "", closed ? `${name}: collapsed, may be harmful (${size} characters)` : name), body());
    return node;
  }

  function opened(item, mine) {
    const node = make("div", "open"), closed = item.sensitive && !field.open.checked;
    const ask = make("div", "ask");
    ask.append(folded("Prompt", item.text, item.harmful && closed, () => make("div", "said", item.text)));
    const panels = make("div", "panels");
    for (const one of mine) panels.append(panel(item, one, closed));
    node.append(ask, make("div", "gap"), panels);
    return node;
  }

  function panel(item, one, closed) {
    const node = make("div", "panel"), head = make("h3", "", data.models[one.model]);
    head.append(chip(item, one, false));
    node.append(head);
    const facts = [`${one.tokens} tokens, ${one.reasoning} of them reasoning`, `parsed: ${one.status}`, `ended: ${one.finish}`];
    if (one.forced) facts.push("thought closed by the budget");
    if (one.decision) facts.push(`decision: ${one.decision}`);
    node.append(make("p", "meta", facts.join(" \u00B7 ")));
    if (one.steps.length) {
      const whole = one.steps.map((step) => step[1]).join("");
      const reflections = one.steps.filter((step) => data.steps[step[0]] === "reflect").length;
      const title = `Reasoning, ${one.steps.length} steps` + (reflections ? `, ${reflections} reflect` : "");
      node.append(folded(title, whole, closed, () => reasoning(one)));
    } else {
      node.append(make("p", "meta", "No reasoning."));
    }
    if (one.answer) node.append(folded("Answer", one.answer, closed, () => make("div", "said", one.answer)));
    else node.append(make("p", "meta", "No answer."));
    if (one.verdicts.length) node.append(verdicts(one));
    return node;
  }

  function reasoning(one) {
    const steps = make("ol", "steps");
    for (const [kind, text] of one.steps) {
      const name = data.steps[kind], reflects = name === "reflect";
      const step = make("li", reflects ? "reflect" : "");
      step.append(make("span", "tag", reflects ? "\u21BA reflects" : name || "not segmented"), document.createTextNode(text.trim()));
      steps.append(step);
    }
    return steps;
  }

  function verdicts(one) {
    const table = make("table", "verdicts"), head = make("tr"), top = make("thead"), rows = make("tbody");
    for (const name of ["judge", "of", "verdict", "score"]) {
      const cell = make("th", "", name);
      cell.scope = "col";
      head.append(cell);
    }
    top.append(head);
    for (const v of one.verdicts) {
      const row = make("tr"), judge = make("th", "", v.judge);
      judge.scope = "row";
      const words = [v.label, v.refusal].filter(Boolean).join(", ") || "\u2013";
      row.append(judge, make("td", "", v.target), make("td", v.label === "unsafe" ? "unsafe" : "", words));
      row.append(make("td", "", v.score === null ? "\u2013" : v.score.toFixed(2)));
      rows.append(row);
    }
    table.append(top, rows);
    return table;
  }

  function options(select, all, pairs) {
    select.append(new Option(all, ""), ...pairs.map(([text, value]) => new Option(text, value)));
    select.closest("label").hidden = pairs.length < 2;
  }

  function prepare() {
    const places = (texts) => texts.map((text, i) => [text, i]);
    const same = (texts) => texts.map((text) => [text, text]);
    options(field.model, "all models", places(data.models));
    options(field.benchmark, "all", places(data.benchmarks));
    options(field.kind, "all kinds", same(data.kinds));
    options(field.view, "all views", places(data.views));
    options(field.outcome, "any", same(data.outcomes));
    const refusals = { FC: "full compliance", FR: "full refusal", PR: "partial refusal" };
    const found = new Map();
    for (const item of items) for (const one of item.all) {
      for (const v of one.verdicts) for (const word of [v.label, v.refusal]) if (word) found.set(word, refusals[word] || word);
      if (one.correct !== null) found.set(one.correct ? "correct" : "wrong", one.correct ? "correct" : "wrong");
      if (one.forced) found.set("forced", "thought closed by the budget");
      if (one.steps.some((step) => data.steps[step[0]] === "reflect")) found.set("reflects", "reflects");
    }
    options(field.verdict, "any", [...found].map(([value, text]) => [text, value]));
    const first = data.models[0];
    options(field.compare, "all prompts", data.models.length < 2 ? [] :
      [["models differ", "differ"], [`some better than ${first}`, "better"], [`some worse than ${first}`, "worse"]]);
    byId("filters").hidden = false;
  }

  function turn(by) {
    page += by;
    draw();
    count.scrollIntoView({ block: "start" });
  }

  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); };
  for (const name of names) field[name].addEventListener(name === "text" ? "input" : "change", later);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", later);
  byId("before").addEventListener("click", () => turn(-1));
  byId("after").addEventListener("click", () => turn(1));
  setTimeout(() => unpack().then((found) => {
    data = found;
    group();
    prepare();
    filter();
    document.documentElement.dataset.ready = "yes";
  }).catch((error) => { count.textContent = `The transcripts cannot be shown: ${error.message}`; }), 0);
})();
