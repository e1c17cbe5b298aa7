"use strict";
// The script of the inspector's page. All text goes in through textContent, so nothing that a model is called can become
// markup. Only the chosen module is drawn, with its parts as boxes, so that the size of the model does not matter.

const DATA = JSON.parse(document.getElementById("inspection").text);
const NODES = DATA.nodes.map((row) => {
  const [name, op, call, value, module, mark, weight, source] = row.slice(0, 8).map((i) => DATA.texts[i]);
  return { name, op, call, value, module, mark, weight, source, operands: row[8].map((i) => DATA.texts[i]) };
});
const AT_ONCE = 200; // boxes in one drawing
const EXPANDED_UP_TO = 70; // operations of a module that are all shown from the start
const LONGEST_EDGE = 8; // layers; a longer edge becomes a label at its end
const DIFF_LINES = 200;
const CHILDREN = 200; // entries of one level of the tree shown at once
const QUIET = new Set([
  ".view", ".reshape", ".transpose", ".permute", ".contiguous", ".flatten", ".unflatten", ".expand", ".unsqueeze",
  ".squeeze", ".unbind", ".t", ".split", ".chunk", ".clone", "getitem", "transpose", "reshape", "permute", "flatten",
  "unbind", "getattr", "_set_grad_enabled", "_log_api_usage_once", "_enter_autocast", "_exit_autocast",
]);
const MEANINGS = {
  rewritten: "rewritten by a pass",
  reads: "reads a managed weight, not rewritten",
  marker: "where a managed weight enters the graph",
  cast: "cast",
  transfer: "transfer to another device",
};

const state = { phase: 0, stage: 0, module: "", expanded: null, chosen: null, page: 0, views: false, open: new Set([""]) };

// ------------------------------------------------------------------------------------------------------------- elements

function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function s(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

function put(id, ...children) {
  document.getElementById(id).replaceChildren(...children.flat(Infinity).filter(Boolean));
}

function table(headers, lines, rowAttributes) {
  const cell = (tag) => (c) => {
    const number = typeof c === "number" || (c && c.number !== undefined);
    const text = c && c.number !== undefined ? c.number : c;
    return h(tag, { class: number ? "number" : null }, typeof text === "number" ? text.toLocaleString("en") : text);
  };
  return h(
    "table", {},
    h("thead", {}, h("tr", {}, headers.map(cell("th")))),
    h("tbody", {}, lines.map((line, i) => h("tr", rowAttributes ? rowAttributes(i) : {}, line.map(cell("td"))))),
  );
}

function plural(n, word) {
  return `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
}

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 999.5 && i < 4) { n /= 1000; i += 1; }
  return `${i === 0 || n >= 99.95 ? Math.round(n) : n >= 9.995 ? n.toFixed(1) : n.toFixed(2)} ${units[i]}`;
}

// ---------------------------------------------------------------------------------------------------------------- model

const KNOWN = new Map(DATA.modules);
const PARTS = new Map();
for (const [fqn] of DATA.modules) if (fqn) (PARTS.get(parentOf(fqn)) || PARTS.set(parentOf(fqn), []).get(parentOf(fqn))).push(fqn);

function parentOf(fqn) {
  return fqn.includes(".") ? fqn.slice(0, fqn.lastIndexOf(".")) : "";
}

function home(node) {
  let fqn = node.module;
  while (fqn && !KNOWN.has(fqn)) fqn = parentOf(fqn);
  return fqn;
}

function inside(fqn, outer) {
  return outer === "" || fqn === outer || fqn.startsWith(`${outer}.`);
}

const phase = () => DATA.phases[state.phase];
const stages = () => phase().graphs.reduce((best, g) => (g.stages.length > best.length ? g.stages : best), []);
const stageOf = (graph, i) => graph.stages[Math.min(i, graph.stages.length - 1)];

const expandedRuns = new WeakMap();
function nodesOf(graph, i) {
  const stage = stageOf(graph, i);
  if (!expandedRuns.has(stage)) {
    const found = [];
    for (let k = 0; k < stage[1].length; k += 2) found.push(...NODES.slice(stage[1][k], stage[1][k] + stage[1][k + 1]));
    expandedRuns.set(stage, found);
  }
  return expandedRuns.get(stage);
}

function lastStage() {
  return state.stage >= stages().length - 1;
}

/** {kept, discarded}: bytes that autograd keeps of a node's result, and that this phase no longer keeps. */
function keeping(graph, node) {
  const old = graph.replaced[node.name] || node.name;
  const plain = (graph.plain[old] || graph.plain[node.name] || ["", 0])[1];
  if (!lastStage()) return { kept: plain, discarded: 0 };
  const now = (graph.kept[node.name] || ["", 0])[1];
  return { kept: now, discarded: Math.max(0, plain - now) };
}

const counted = new WeakMap();
/** By module of the phase, all parts included: operations, consumers rewritten and not. */
function counts() {
  const p = phase();
  if (!counted.has(p)) {
    const found = new Map();
    for (const graph of p.graphs) {
      for (const node of nodesOf(graph, 1e9)) {
        for (let fqn = home(node); ; fqn = parentOf(fqn)) {
          const own = found.get(fqn) || found.set(fqn, { ops: 0, rewritten: 0, reads: 0 }).get(fqn);
          own.ops += 1;
          if (node.mark === "rewritten") own.rewritten += 1;
          if (node.mark === "reads") own.reads += 1;
          if (!fqn) break;
        }
      }
    }
    counted.set(p, found);
  }
  return counted.get(p);
}

// --------------------------------------------------------------------------------------------------------------- header

function drawTabs() {
  const tab = (p, i) => h(
    "button",
    {
      role: "tab", "aria-selected": String(i === state.phase), tabindex: i === state.phase ? 0 : -1, "data-phase": p.phase,
      onclick: () => choosePhase(i),
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        choosePhase((state.phase + step + DATA.phases.length) % DATA.phases.length);
      },
    },
    h("b", {}, p.phase),
    h("span", {}, `${p.rewritten}/${p.consumers} rewritten`),
    h("span", {}, p.total ? `memory ${p.total[2] || "+0%"}` : "memory unknown"),
  );
  put("phases", DATA.phases.map(tab));
}

function card(title, big, kind, ...rest) {
  return h("div", { class: "card" }, h("h3", {}, title), h("div", { class: `big ${kind}` }, big), rest);
}

function drawAnswers() {
  const p = phase();
  const missed = p.consumers - p.rewritten;
  const into = p.became.map(([n, a, b]) => h("p", {}, `${n.toLocaleString("en")} × `, h("code", {}, a), " → ", h("code", {}, b)));
  const plan = Object.entries(p.plan).filter(([k]) => k !== "phase").map(([k, v]) => `${k.replace("_", " ")} ${v}`);
  const memory = h("table", {},
    h("tr", {}, ["", "plain dense", p.phase].map((t, i) => h("th", { class: i ? "number" : null }, t))),
    p.memory.map(([name, a, b]) => h("tr", {}, h("td", {}, name), h("td", { class: "number" }, a), h("td", { class: "number" }, b))));
  const alone = p.alone.length;
  put(
    "answers",
    card("Rewritten", `${p.rewritten} of ${p.consumers}`, missed ? "bad" : "good", h("p", { class: "quiet" }, "operations that read a managed weight"), into,
      h("p", { class: "quiet" }, `Plan: ${plan.join(", ")}`)),
    card("Saves, of a step's memory", p.total ? p.total[2] || "0%" : "unknown", "",
      p.total ? h("p", {}, `${p.total[0]} → ${p.total[1]} for the managed weights and all activations`) : h("p", {}, p.unknown), memory),
    card("Not rewritten", String(missed), missed ? "bad" : "good",
      p.reasons.map(([why, names]) => h("p", {}, `${names.length} × ${why}`)),
      h("p", {}, alone ? `${plural(alone, "large parameter")} not managed:` : "every large parameter is managed"),
      grouped(p.alone.map((a) => a[2])).map(([why, n]) => h("p", { class: "quiet" }, `${n} × ${why}`))),
    card("Graph", plural(p.captured, "graph"), "", h("p", {}, plural(p.operations, "operation")),
      h("p", { class: p.breaks.length ? "bad" : null }, plural(p.breaks.reduce((n, b) => n + b[2], 0), "graph break")),
      p.breaks.slice(0, 3).map(([why, where]) => h("p", { class: "quiet" }, `${where.split("/").pop()}: ${why}`)),
      h("p", { class: p.recompiles ? "bad" : null }, plural(p.recompiles, "recompilation"))),
  );
}

function grouped(values) {
  const found = new Map();
  for (const v of values) found.set(v, (found.get(v) || 0) + 1);
  return [...found];
}

function drawTable() {
  const rows = phase().rows;
  const lines = rows.map((r) => [
    h("span", {}, h("code", {}, r.weight), r.times > 1 ? h("span", { class: "quiet" }, ` ×${r.times}`) : null),
    { number: r.shape }, { number: r.active }, { number: r.candidates },
    r.reason
      ? h("span", {}, h("span", { class: "tag reads" }, r.before || "not read"), ` ${r.reason}`)
      : h("span", {}, h("code", {}, r.before), " → ", h("span", { class: "tag rewritten" }, r.after)),
    r.casts.length ? h("span", { class: "tag cast", title: r.casts.join("; ") }, castText(r.casts)) : "",
    { number: r.keeps ? (r.keeps[0] === r.keeps[1] ? r.keeps[0] : `${r.keeps[0]} → ${r.keeps[1]}`) : "unknown" },
  ]);
  const headers = ["weight", { number: "shape" }, { number: "active" }, { number: "candidates" }, "became", "casts",
    { number: "kept for backward" }];
  put("table", table(headers, lines, (i) => ({
    tabindex: 0, title: `executes: ${rows[i].executes || "-"}`, onclick: () => show(rows[i]),
    onkeydown: (event) => { if (event.key === "Enter") show(rows[i]); },
  })));
}

function castText(casts) {
  const down = casts.find((c) => !c.startsWith("result"));
  return down ? `in ${down.split(" ").pop()}` : casts[0];
}

function drawReasons() {
  const p = phase();
  const lines = [
    ...p.reasons.flatMap(([why, names]) => names.map((name) => [name, "", h("span", { class: "tag reads" }, "not rewritten"), why])),
    ...p.alone.map(([name, shape, why]) => [name, { number: shape }, h("span", { class: "tag kept" }, "not managed"), why]),
    ...p.breaks.map(([why, where, times]) => [where || "unknown place", "", h("span", { class: "tag reads" }, `graph break ×${times}`), why]),
  ];
  put("reasons", lines.length ? table(["what", { number: "shape" }, "", "why"], lines) : h("p", {}, "Nothing: every large parameter is managed and every reader rewritten."));
}

// ----------------------------------------------------------------------------------------------------------------- tree

function drawTree() {
  const focused = document.activeElement && document.activeElement.dataset.fqn;
  put("tree", h("ul", { role: "group" }, branch("")));
  const again = focused !== undefined && document.querySelector(`#tree [data-fqn="${CSS.escape(focused)}"]`);
  if (again) again.focus({ preventScroll: true });
}

function branch(fqn) {
  const own = counts().get(fqn);
  const parts = PARTS.get(fqn) || [];
  const open = state.open.has(fqn);
  const label = fqn ? fqn.slice(parentOf(fqn) ? parentOf(fqn).length + 1 : 0) : DATA.model;
  const total = own ? own.rewritten + own.reads : 0;
  const toggle = (event) => {
    event.stopPropagation();
    if (!state.open.delete(fqn)) state.open.add(fqn);
    drawTree();
  };
  const entry = h(
    "div",
    {
      class: "node", role: "treeitem", tabindex: 0, "data-fqn": fqn, "aria-selected": String(fqn === state.module),
      "aria-expanded": parts.length ? String(open) : null,
      onclick: () => chooseModule(fqn),
      onkeydown: (event) => {
        if (event.key === "Enter") chooseModule(fqn);
        else if ((event.key === "ArrowRight" && !open) || (event.key === "ArrowLeft" && open)) toggle(event);
      },
    },
    parts.length ? h("button", { class: "twist", tabindex: -1, "aria-label": open ? "close" : "open", onclick: toggle }, open ? "▾" : "▸") : h("span", { class: "twist" }),
    h("span", {}, label),
    h("span", { class: "quiet" }, fqn ? KNOWN.get(fqn) : ""),
    total ? h("span", { class: `count ${own.reads ? "bad" : "good"}`, title: "consumers rewritten" }, `${own.rewritten}/${total}`)
      : h("span", { class: "count quiet" }, own ? "" : "no ops"),
  );
  if (!open || !parts.length) return h("li", {}, entry);
  const shown = state.open.has(`${fqn}\n`) ? parts : parts.slice(0, CHILDREN);
  const rest = parts.length - shown.length;
  const more = rest > 0 && h("li", {}, h("div", { class: "node quiet", tabindex: 0, onclick: () => { state.open.add(`${fqn}\n`); drawTree(); } }, `… ${rest} more`));
  return h("li", {}, entry, h("ul", { role: "group" }, shown.map(branch), more));
}

// --------------------------------------------------------------------------------------------------------------- passes

function drawPasses() {
  const names = stages().map((x) => x[0]);
  const slider = document.getElementById("slider");
  slider.max = Math.max(0, names.length - 1);
  slider.value = state.stage;
  slider.setAttribute("aria-valuetext", names[state.stage] || "");
  put("ticks", names.map((name, i) => h("button", { class: i === state.stage ? "on" : "", tabindex: -1, onclick: () => chooseStage(i) }, name)));
  const found = phase().passes.find(([name]) => name === names[state.stage]);
  const changed = found ? found[2].map(([op, a, b]) => `${op} ${a} → ${b}`).join(", ") : "";
  put("pass", found ? h("span", {}, h("b", {}, found[0]), `: ${plural(found[1], "match").replace("matchs", "matches")}${changed ? `; ${changed}` : ""}`) : "the graph before all passes");
}

function drawLegend() {
  const tag = (kind, text) => h("span", { class: `tag ${kind}` }, text);
  put("legend", tag("rewritten", "rewritten"), tag("reads", "reads a managed weight, not rewritten"), tag("cast", "cast"),
    tag("discarded", "activation no longer kept"), tag("kept", "activation kept for the backward"), tag("transfer", "transfer"), tag("new", "new after this pass"),
    h("label", {}, h("input", { type: "checkbox", id: "views", checked: state.views || null, onchange: (e) => { state.views = e.target.checked; drawGraph(); } }), " views and bookkeeping too"));
}

// -------------------------------------------------------------------------------------------------------------- details

function drawDetails(box) {
  if (!box) {
    put("details", h("span", { class: "quiet" }, "Click an operation to see its arguments, where it is in the code, and what became of it; click a part to open it."));
    return;
  }
  const node = box.nodes[0];
  const graph = phase().graphs[box.g];
  const own = keeping(graph, node);
  const more = lastStage() ? phase().at.find((a) => a.graph === box.g && a.node === node.name) : null;
  const lines = [
    ["result", node.value], ["module", node.module || "the model itself"], ["code", node.source],
    ["is", MEANINGS[node.mark]], ["weight", node.weight],
    ["keeps", own.discarded ? `${bytes(own.kept)} for the backward; ${bytes(own.discarded)} discarded` : own.kept ? `${bytes(own.kept)} for the backward` : ""],
  ];
  if (more) {
    lines.push(["passes", more.steps.map(([name, op]) => (name === "captured" ? op : `${name} → ${op}`)).join("; ")]);
    lines.push(["casts", more.casts.join("; ") || "none"], ["executes", more.executes]);
    lines.push([more.considered.length === 1 ? "one candidate" : "candidates", more.considered.map(([name, why, us, taken]) =>
      `${name}${taken ? ", chosen" : ""}${us === null ? "" : `, ${us} µs`}${why ? `: ${why}` : ""}`).join("\n")]);
  }
  put("details", `%${node.name} = ${node.op}(${node.call})`,
    h("dl", {}, lines.filter((l) => l[1]).map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])));
}

// ----------------------------------------------------------------------------------------------------------------- diff

const blank = (call) => call.replace(/%[\w.]+/g, "%");

/** [sign, node] of what the stage's pass took out of and put into one graph. */
function changes(graph) {
  if (state.stage === 0 || state.stage >= graph.stages.length) return [];
  const before = nodesOf(graph, state.stage - 1);
  const after = nodesOf(graph, state.stage);
  const old = new Map(before.map((n) => [n.name, n]));
  const names = new Set(after.map((n) => n.name));
  const found = [];
  let at = 0;
  const gone = (until) => {
    for (; at < before.length && before[at].name !== until; at += 1) if (!names.has(before[at].name)) found.push(["−", before[at]]);
  };
  for (const node of after) {
    const same = old.get(node.name);
    if (!same) { found.push(["+", node]); continue; }
    gone(node.name);
    at += 1;
    if (same !== node && (same.op !== node.op || same.value !== node.value || blank(same.call) !== blank(node.call))) found.push(["−", same], ["+", node]);
  }
  gone(null);
  return found;
}

function newNames() {
  const found = new Set();
  phase().graphs.forEach((graph, g) => changes(graph).forEach(([sign, node]) => { if (sign === "+") found.add(`${g}:${node.name}`); }));
  return found;
}

/** Changes of one module that follow each other: first what goes, then what comes. */
function goneFirst(found) {
  const runs = [];
  for (const change of found) {
    const run = runs[runs.length - 1];
    if (run && run[0][1].module === change[1].module) run.push(change);
    else runs.push([change]);
  }
  return runs.flatMap((run) => [...run.filter((c) => c[0] !== "+"), ...run.filter((c) => c[0] === "+")]);
}

function drawDiff() {
  const found = phase().graphs.flatMap(changes).filter(([, node]) => inside(home(node), state.module) && node.op !== "output");
  const lines = [];
  let place = null;
  for (const [sign, node] of goneFirst(found.slice(0, DIFF_LINES))) {
    if (node.module !== place) {
      place = node.module;
      lines.push(h("span", { class: "place" }, `@ ${place || "the model itself"}\n`));
    }
    const value = node.value ? ` -> ${node.value}` : "";
    lines.push(h("span", { class: sign === "+" ? "come" : "gone" }, `${sign} %${node.name} = ${node.op}(${node.call})${value}\n`));
  }
  const rest = found.length - DIFF_LINES;
  if (rest > 0) lines.push(h("span", { class: "quiet" }, `… ${rest.toLocaleString("en")} more; choose a smaller part of the model`));
  put("diff", lines.length ? lines : h("span", { class: "quiet" }, state.stage ? "Nothing in this module." : "This is the graph before all passes. Move the slider to see what each pass does."));
}

// -------------------------------------------------------------------------------------------------------------- choices

function choosePhase(i) {
  state.phase = i;
  state.stage = Math.max(0, stages().length - 1);
  state.page = 0;
  state.chosen = null;
  drawAll();
  document.querySelector('#phases [aria-selected="true"]').focus({ preventScroll: true });
}

function chooseStage(i) {
  state.stage = i;
  state.chosen = null;
  drawPasses();
  drawGraph();
  drawDetails(null);
}

function chooseModule(fqn) {
  state.module = fqn;
  state.expanded = null;
  state.page = 0;
  state.chosen = null;
  for (let at = fqn; ; at = parentOf(at)) { state.open.add(at); if (!at) break; }
  drawTree();
  drawGraph();
  drawDetails(null);
}

function chooseNode(box) {
  state.chosen = box.key;
  for (const element of document.querySelectorAll("#canvas .chosen")) element.classList.remove("chosen");
  for (const element of document.querySelectorAll("#canvas .box")) {
    if (element.dataset.key !== box.key) continue;
    element.classList.add("chosen");
    for (const path of document.querySelectorAll("#canvas path")) {
      path.classList.toggle("lit", path.dataset.from === element.dataset.box || path.dataset.to === element.dataset.box);
    }
  }
  drawDetails(box);
}

/** Shows the node of a row of the table, in the block that it belongs to. */
function show(row) {
  state.stage = Math.max(0, stages().length - 1);
  drawPasses();
  chooseModule(blockOf(row.module));
  const node = row.node && nodesOf(phase().graphs[row.graph], 1e9).find((n) => n.name === row.node);
  if (node) chooseNode({ g: row.graph, part: null, nodes: [node], key: `${row.graph}:${row.node}` });
  document.getElementById("graph").scrollIntoView({ block: "start" });
}

/** The repeated block around a module (`layers.0`), or the module around it. */
function blockOf(module) {
  const steps = module.split(".");
  const number = steps.findIndex((step) => /^\d+$/.test(step));
  const block = number >= 0 ? steps.slice(0, number + 1).join(".") : parentOf(module);
  return KNOWN.has(block) ? block : "";
}

function drawAll() {
  drawTabs();
  drawAnswers();
  drawTable();
  drawReasons();
  drawPasses();
  drawTree();
  drawGraph();
  drawDetails(null);
}

function start() {
  document.getElementById("title").textContent = DATA.model;
  document.getElementById("settings").textContent = DATA.settings;
  document.getElementById("slider").addEventListener("input", (event) => chooseStage(Number(event.target.value)));
  const resu = DATA.phases.findIndex((p) => p.phase === "resu");
  state.phase = Math.max(0, resu);
  state.stage = Math.max(0, stages().length - 1);
  const first = phase().rows.find((r) => r.module);
  state.module = first ? blockOf(first.module) : "";
  for (let at = state.module; ; at = parentOf(at)) { state.open.add(at); if (!at) break; }
  drawLegend();
  drawAll();
}

document.addEventListener("DOMContentLoaded", start);
